package admin

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A Recorder keeps the counts of apps, including removed ones, and the durations of dials and
// connections. Several handlers may share one. The zero Recorder is ready for use. All methods are
// safe for concurrent use. A Recorder must not be copied after first use.
type Recorder struct {
	times sync.Map // of *times, by app id

	mu        sync.Mutex // held over Stats of apps, so that no older counts follow newer ones
	seen      map[*lbproxy.LBProxyApp]*sighting
	sightings int
	past      map[string]*App // by id: counts that no app in seen holds
	history   []Sample
}

// A sighting holds an app's counts at the last look.
type sighting struct {
	number int // counts up: the first app seen has 1
	last   App
	left   time.Time // when the app was first seen not to be current; zero while it is
}

const (
	maxGone     = 1000        // removed apps, and removed upstreams of an app, kept by name
	keepApp     = time.Minute // how long a removed app may still begin connections
	maxSamples  = 150
	sampleEvery = 2 * time.Second
)

// Track makes r keep app's counts even if app is removed before the next request to a handler. Call
// it for each app that may be replaced.
func (r *Recorder) Track(app *lbproxy.LBProxyApp) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.look(app)
}

// Sample adds a point to the curves of the page, unless the last point is less than a second old.
// Each request does the same. Call Sample every two seconds, so that the page has curves as soon as
// it is opened.
func (r *Recorder) Sample(current []*lbproxy.LBProxyApp) { r.stats(current, time.Now()) }

// stats returns the counts of all apps. The current ones come first, in their order.
func (r *Recorder) stats(current []*lbproxy.LBProxyApp, now time.Time) Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	sums := sums{byID: map[string]*App{}}
	for _, app := range current {
		s := r.look(app)
		s.left = time.Time{}
		sums.add(s.last, true)
	}
	for _, app := range r.others(current) {
		s := r.look(app)
		if s.left.IsZero() {
			s.left = now
		}
		if s.last.Open == 0 && now.Sub(s.left) > keepApp {
			delete(r.seen, app)
			r.of(s.last.ID).merge(&s.last, false, maxGone)
		} else {
			sums.add(s.last, false)
		}
	}
	r.forget()
	for _, id := range sorted(r.past) {
		sums.add(*r.past[id], false)
	}
	all := Stats{Time: now, Apps: sums.finish()}
	r.sample(all.Apps, now)
	all.History = slices.Clone(r.history)
	return all
}

// all returns the current apps, then the removed ones that may have connections.
func (r *Recorder) all(current []*lbproxy.LBProxyApp) []*lbproxy.LBProxyApp {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append(slices.Clone(current), r.others(current)...)
}

// others returns the apps in seen that are not current, the first seen first. The caller holds mu,
// as for the methods below.
func (r *Recorder) others(current []*lbproxy.LBProxyApp) (all []*lbproxy.LBProxyApp) {
	for app := range r.seen {
		if !slices.Contains(current, app) {
			all = append(all, app)
		}
	}
	slices.SortFunc(all, func(a, b *lbproxy.LBProxyApp) int {
		return cmp.Compare(r.seen[a].number, r.seen[b].number)
	})
	return all
}

// look updates the sighting of app. It moves the counts of upstreams that are gone, or count from
// zero again, to past.
func (r *Recorder) look(app *lbproxy.LBProxyApp) *sighting {
	s := r.seen[app]
	if s == nil {
		if r.seen == nil {
			r.seen = map[*lbproxy.LBProxyApp]*sighting{}
		}
		r.sightings++
		s = &sighting{number: r.sightings}
		r.seen[app] = s
	}
	now := appOf(app.Stats())
	for _, u := range s.last.Upstreams {
		if i, ok := now.rows[u.Addr]; !ok || now.Upstreams[i].less(u) {
			r.of(now.ID).keep(u, maxGone)
		}
	}
	s.last = now
	return s
}

// of returns r.past[id], and makes it if there is none.
func (r *Recorder) of(id string) *App {
	if r.past == nil {
		r.past = map[string]*App{}
	}
	if r.past[id] == nil {
		r.past[id] = newApp(id)
	}
	return r.past[id]
}

// forget moves the counts of ids without an app to the empty id while r.past exceeds maxGone.
func (r *Recorder) forget() {
	if len(r.past) <= maxGone {
		return
	}
	keep := map[string]bool{"": true}
	for _, s := range r.seen {
		keep[s.last.ID] = true
	}
	for id, a := range r.past {
		if !keep[id] && len(r.past) > maxGone {
			r.of("").merge(a, false, 0)
			r.forgetTimes(id)
			delete(r.past, id)
		}
	}
}

// sample adds a point to the curves, unless the last one is recent.
func (r *Recorder) sample(apps []App, now time.Time) {
	if n := len(r.history); n > 0 && now.Sub(r.history[n-1].Time) < sampleEvery/2 {
		return
	}
	s := Sample{Time: now}
	for _, a := range apps {
		s.Open += a.Open
		s.Accepted += a.Accepted
		s.Bytes += a.Sent + a.Received
	}
	r.history = append(r.history, s)
	r.history = r.history[max(0, len(r.history)-maxSamples):]
}

func newApp(id string) *App {
	return &App{
		ID: id, Ends: map[lbproxy.EndReason]uint64{},
		rows: map[string]int{}, gone: map[string]Upstream{},
	}
}

func appOf(s lbproxy.Stats) App {
	a := App{
		ID: s.App, Stopping: s.Stopping, Open: s.Open, Accepted: s.Accepted,
		NotAdmitted: s.NotAdmitted, Refused: s.Refused, Failed: s.Failed,
		Sent: s.Sent, Received: s.Received, Ends: s.Ends,
		Upstreams: make([]Upstream, len(s.Upstreams)), rows: make(map[string]int, len(s.Upstreams)),
		all: Upstream{Total: s.Gone.Total, Failed: s.Gone.Failed, Sent: s.Sent, Received: s.Received},
	}
	for i, u := range s.Upstreams {
		a.rows[u.Addr] = i
		a.Upstreams[i] = Upstream{
			Addr: u.Addr, State: u.State, Since: u.Since, Weight: u.Weight, Drain: u.Drain,
			Removed: u.Removed, Open: u.Open, Total: u.Total, Failed: u.Failed, Sent: u.Sent,
			Received: u.Received,
		}
		if u.Err != nil {
			a.Upstreams[i].Error = clean(fmt.Sprintf("%.300s", u.Err))
		}
		a.all.Total += u.Total
		a.all.Failed += u.Failed
	}
	return a
}

// merge adds b to a. Upstreams of an app that is not current get rows only while they have
// connections.
func (a *App) merge(b *App, current bool, most int) {
	a.Current = a.Current || current
	a.Stopping = a.Stopping || current && b.Stopping
	a.Open += b.Open
	a.Accepted += b.Accepted
	a.NotAdmitted += b.NotAdmitted
	a.Refused += b.Refused
	a.Failed += b.Failed
	a.Sent += b.Sent
	a.Received += b.Received
	a.all.add(b.all)
	for end, n := range b.Ends {
		a.Ends[end] += n
	}
	for _, u := range b.Upstreams {
		if i, ok := a.rows[u.Addr]; ok {
			a.Upstreams[i].add(u)
		} else if current || u.Open > 0 {
			u.Removed = u.Removed || !current
			a.rows[u.Addr] = len(a.Upstreams)
			a.Upstreams = append(a.Upstreams, u)
		} else {
			a.keep(u, most)
		}
	}
	for _, u := range b.gone {
		a.keep(u, most)
	}
}

// keep adds u to the counts of removed upstreams. It keeps at most most of them by name.
func (a *App) keep(u Upstream, most int) {
	if u.Total+u.Sent+u.Received == 0 {
		return // never used
	}
	sum, known := a.gone[u.Addr]
	if !known && len(a.gone) >= most {
		u.Addr = ""
		sum = a.gone[""]
	}
	sum.Addr = u.Addr
	sum.add(u)
	a.gone[u.Addr] = sum
}

// add adds v's counts to u.
func (u *Upstream) add(v Upstream) {
	u.Open += v.Open
	u.Total += v.Total
	u.Failed += v.Failed
	u.Sent += v.Sent
	u.Received += v.Received
}

// less reports whether a counter of u is less than v's.
func (u *Upstream) less(v Upstream) bool {
	return u.Total < v.Total || u.Failed < v.Failed || u.Sent < v.Sent || u.Received < v.Received
}

// sums add up the apps of each id.
type sums struct {
	apps []*App
	byID map[string]*App
}

func (s *sums) add(b App, current bool) {
	a := s.byID[b.ID]
	if a == nil {
		a = newApp(b.ID)
		s.byID[b.ID] = a
		s.apps = append(s.apps, a)
	}
	a.merge(&b, current, math.MaxInt)
}

// finish adds the counts of removed upstreams that are back to their rows. Counts made between the
// last look at an upstream and its removal go under the empty name.
func (s *sums) finish() (apps []App) {
	for _, a := range s.apps {
		lost := a.all
		for addr, u := range a.gone {
			u.Open = 0
			if i, ok := a.rows[addr]; ok {
				a.Upstreams[i].add(u)
				delete(a.gone, addr)
			} else {
				a.gone[addr] = u
				a.Gone.add(u)
			}
		}
		for _, u := range append(a.Upstreams, a.Gone) {
			lost.Total -= u.Total
			lost.Failed -= u.Failed
			lost.Sent -= u.Sent
			lost.Received -= u.Received
		}
		if lost != (Upstream{}) {
			a.keep(lost, 0)
			a.Gone.add(lost)
		}
		apps = append(apps, *a)
	}
	return apps
}
