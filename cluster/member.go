package cluster

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/redis/rueidis"
)

//go:embed beat.lua
var beatText string

var beatScript = rueidis.NewLuaScript(beatText)

// Self describes this proxy to the others. All fields are optional. Each beat calls the functions,
// one at a time.
type Self struct {
	// ID is the proxy's name, also in the gateway's zone: at most 63 lower-case letters, digits and
	// '-'. It must be unique among live proxies. Empty means a random name.
	ID string

	// Addr is the host at which clients find the proxy: an IP address or a name. A name appears
	// only in SRV records. Gateways leave out a proxy without Addr.
	Addr string

	// Ports returns the port of each app, for SRV records.
	Ports func() map[string]int

	// Apps returns the apps by their ids. The store counts their connections, and SetPeers of each
	// app gets the state of the other proxies.
	Apps func() map[string]*lbproxy.LBProxyApp

	// Config returns the version of the configuration in force, and the reason if it is not the
	// store's. With a Watch, use [Watch.Running].
	Config func() (version int64, problem string)

	Capacity int    // gateways leave out a proxy with as many connections; 0 means no bound
	Version  string // of the program, for people

	// Interval is the time between beats. A proxy counts as dead after three intervals without a
	// beat. 0 means a second.
	Interval time.Duration
}

// A Member is this proxy's membership in the cluster. All methods are safe for concurrent use.
type Member struct {
	store *Store
	self  Self
	since time.Time
	kick  chan struct{} // has an element when the next beat should come now
	stop  context.CancelFunc
	over  chan struct{}

	mu       sync.Mutex
	draining bool
	place    Place

	// Only the beating goroutine uses the fields below.
	turn   int64            // of the last call; a restarted process begins with a higher one
	sent   map[string]int   // the counts in the store; nil before the first beat
	sums   map[string]int   // of all proxies
	sumsAt string           // the store's time of sums
	bias   map[string]bias  // by app
	step   time.Duration    // between the last two sums; 0 once the biases have followed it
	peers  map[string]peers // by app: the last call of SetPeers
	missed int              // beats in a row without an answer
}

// unknown is a count that the store may or may not have.
const unknown = -1

// A Place is the place of a [Member] among the others.
type Place struct {
	ID           string
	Index, Count int           // number Index, from 0, of Count; 0 of 0 before the first answer
	Lag          time.Duration // since the last answered beat, or since Join
	Err          string        // why the last beat had no answer; empty if it had one

	heard time.Time
}

// Join makes this proxy a member. Every second (Self.Interval) the member writes its open
// connections to the store, reads the number of proxies and the connections of all, and passes both
// to its apps by [lbproxy.LBProxyApp.SetPeers]. Join fails only if self is invalid; while the store
// is away, the member keeps trying. The caller must call Leave.
func (s *Store) Join(self Self) (*Member, error) {
	self.ID = cmp.Or(self.ID, strings.ToLower(s.id))
	self.Interval = cmp.Or(self.Interval, time.Second)
	switch {
	case len(self.ID) > 63 || strings.Trim(self.ID, idRunes) != "" ||
		strings.Trim(self.ID, "-") != self.ID:
		return nil, fmt.Errorf("cluster: Self.ID %q: want at most 63 lower-case letters, "+
			"digits and '-', which does not come first or last", self.ID)
	case self.Addr != "" && !isHost(self.Addr):
		return nil, fmt.Errorf("cluster: Self.Addr %q: want an IP address or a name, "+
			"without a port", self.Addr)
	case self.Interval < 0:
		return nil, fmt.Errorf("cluster: Self.Interval %v is negative: use 0 for a second",
			self.Interval)
	case self.Capacity < 0:
		return nil, fmt.Errorf("cluster: Self.Capacity %d is negative: use 0 for no bound",
			self.Capacity)
	}
	m := newMember(s, self)
	var ctx context.Context
	ctx, m.stop = context.WithCancel(s.ctx)
	go m.run(ctx)
	return m, nil
}

// isHost reports whether clients could be sent to addr.
func isHost(addr string) bool {
	_, err := netip.ParseAddr(addr)
	return err == nil || !strings.ContainsFunc(addr, func(r rune) bool { return !isNameRune(r) })
}

const idRunes = "abcdefghijklmnopqrstuvwxyz0123456789-"

func newMember(s *Store, self Self) *Member {
	now := time.Now()
	return &Member{
		store: s, self: self, since: now, turn: now.UnixMicro(),
		kick: make(chan struct{}, 1), over: make(chan struct{}),
		place: Place{ID: self.ID, heard: now},
		bias:  map[string]bias{}, peers: map[string]peers{},
	}
}

// Drain tells gateways to leave out this proxy, and returns at once. It stops nothing: the proxy
// should accept connections for a few more seconds.
func (m *Member) Drain() {
	m.mu.Lock()
	m.draining = true
	m.mu.Unlock()
	m.Beat()
}

// Beat makes the next beat come now, for urgent changes of what Self returns.
func (m *Member) Beat() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// Leave ends the beats and removes the proxy from the store, for which it waits up to a second. If
// the store is away, the proxy's lease expires instead. Leave may be called more than once.
func (m *Member) Leave() {
	m.stop()
	<-m.over
}

// Place returns the place of m. It makes no call.
func (m *Member) Place() Place {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.place
	p.Lag = time.Since(p.heard)
	return p
}

func (m *Member) run(ctx context.Context) {
	defer close(m.over)
	every := time.NewTicker(m.self.Interval)
	defer every.Stop()
	for {
		m.beat(ctx)
		select {
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			m.call(ctx, 0, "", nil)
			return
		case <-every.C:
		case <-m.kick:
		}
	}
}

// beat makes one beat: one call, or a few for many counts.
func (m *Member) beat(ctx context.Context) {
	var apps map[string]*lbproxy.LBProxyApp
	if m.self.Apps != nil {
		apps = m.self.Apps()
	}
	stats := map[string]lbproxy.Stats{}
	counts := map[string]int{}
	total := 0
	for id, app := range apps {
		stats[id] = app.Stats()
		total += stats[id].Open
		for _, u := range stats[id].Upstreams {
			counts[field(id, u.Addr)] += u.Open
		}
	}
	info := m.info(total)
	var err error
	for range 2 { // twice, if the store has forgotten this proxy
		var again bool
		if again, err = m.send(ctx, info, counts); !again {
			break
		}
	}
	now := time.Now()
	m.mu.Lock()
	if err == nil {
		m.place.heard, m.place.Err = now, ""
	} else {
		m.place.Err = err.Error()
	}
	place := m.place
	m.mu.Unlock()
	if err == nil {
		m.missed = 0
	} else {
		m.missed++
	}
	if place.Count > 0 {
		m.setPeers(apps, stats, place)
	}
}

func (m *Member) info(open int) string {
	p := Proxy{ID: m.self.ID, Addr: m.self.Addr, Open: open, Capacity: m.self.Capacity,
		Since:   m.since,
		Version: m.self.Version, Lease: 3 * m.self.Interval}
	if m.self.Ports != nil {
		p.Ports = m.self.Ports()
	}
	if m.self.Config != nil {
		p.Config, p.Problem = m.self.Config()
	}
	m.mu.Lock()
	p.Draining = m.draining
	m.mu.Unlock()
	text, err := json.Marshal(p)
	if err != nil {
		panic(err) // every field of a Proxy marshals
	}
	return string(text)
}

// send makes the calls of a beat. again means that the store did not know this proxy, so that all
// counts must be sent again.
func (m *Member) send(ctx context.Context, info string, counts map[string]int,
) (again bool, err error) {
	if m.sent == nil { // remove the counts of an earlier process with the same ID
		if _, err := m.call(ctx, 0, "", nil); err != nil {
			return false, err
		}
		m.sent = map[string]int{}
	}
	var news []string
	for f, n := range counts {
		if m.sent[f] != n {
			news = append(news, f)
		}
	}
	for f := range m.sent {
		if _, ok := counts[f]; !ok {
			news = append(news, f)
		}
	}
	first := len(m.sent) == 0
	for {
		some := news[:min(len(news), 1000)] // a longer call would delay the other proxies
		news = news[len(some):]
		args := make([]string, 0, 2*len(some))
		for _, f := range some {
			args = append(args, f, strconv.Itoa(counts[f]))
		}
		joined, err := m.call(ctx, 3*m.self.Interval, info, args)
		if err != nil { // the call may have reached the store all the same
			for _, f := range some {
				m.sent[f] = unknown
			}
			return false, err
		}
		if joined && !first {
			m.sent = map[string]int{}
			return true, nil
		}
		first = false
		for _, f := range some {
			if m.sent[f] = counts[f]; counts[f] == 0 {
				delete(m.sent, f)
			}
		}
		if len(news) == 0 {
			return false, nil
		}
	}
}

// call calls beat.lua once. A lease of 0 removes the proxy.
func (m *Member) call(ctx context.Context, lease time.Duration, info string, counts []string,
) (joined bool, err error) {
	var version int64
	if m.self.Config != nil {
		version, _ = m.self.Config()
	}
	s := m.store
	m.turn++
	args := append([]string{s.key(""), m.self.ID, strconv.FormatInt(lease.Milliseconds(), 10), info,
		m.sumsAt,
		strconv.FormatInt(m.countsEvery().Milliseconds(), 10), strconv.FormatInt(version, 10),
		strconv.FormatInt(m.turn, 10)}, counts...)
	v, err := s.script(ctx, s.patience(), beatScript, []string{s.key("live")}, args...)
	if err != nil || lease == 0 {
		return false, err
	}
	if len(v) != 6 {
		return false, fmt.Errorf("cluster: the store answers with %d values instead of 6", len(v))
	}
	isNew, err0 := v[0].AsInt64()
	index, err1 := v[1].AsInt64()
	count, err2 := v[2].AsInt64()
	version, err3 := v[3].AsInt64()
	at, err4 := v[4].ToString()
	sums, err5 := v[5].ToString()
	if err := errors.Join(err0, err1, err2, err3, err4, err5); err != nil {
		return false, err
	}
	s.peers.Store(max(count, 1))
	s.config.hear(version)
	m.mu.Lock()
	m.place.Index, m.place.Count = int(index), int(count)
	m.mu.Unlock()
	if sums != "" {
		if err := m.learn(at, sums); err != nil {
			return false, err
		}
	}
	return isNew == 1, nil
}

// learn decodes the open connections of all proxies together.
func (m *Member) learn(at, text string) error {
	var list []string
	if text != "{}" { // Lua's empty list
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return fmt.Errorf("cluster: cannot decode the counts in the store: %w", err)
		}
	}
	m.sums = map[string]int{}
	for i := 0; i+1 < len(list); i += 2 {
		m.sums[list[i]], _ = strconv.Atoi(list[i+1])
	}
	was, _ := strconv.ParseInt(m.sumsAt, 10, 64)
	is, _ := strconv.ParseInt(at, 10, 64)
	if was > 0 { // after an outage, one step must not make up for all of it
		m.step = min(max(time.Duration(is-was)*time.Millisecond, 0), 5*time.Second)
	}
	m.sumsAt = at
	return nil
}

// countsEvery returns how old the sums may be. With many proxies or upstreams, making and sending
// them every second costs too much, and they change more slowly.
func (m *Member) countsEvery() time.Duration {
	if m.store.peers.Load() > 200 || len(m.sums) > 2000 {
		return 5 * m.self.Interval
	}
	return m.self.Interval
}

// setPeers calls SetPeers of each app whose Peers have changed.
func (m *Member) setPeers(apps map[string]*lbproxy.LBProxyApp, stats map[string]lbproxy.Stats,
	place Place) {
	for id, app := range apps {
		upstreams := stats[id].Upstreams
		b := m.bias[id]
		if b == nil {
			b = bias{}
			m.bias[id] = b
		}
		if m.step > 0 {
			total := func(addr string) int { return m.sums[field(id, addr)] }
			b.follow(upstreams, total, place.Count, m.step.Seconds())
		} else if m.missed > 3 {
			b.fade()
		}
		p := lbproxy.Peers{Index: place.Index, Count: place.Count, Bias: b.steps(upstreams)}
		if old, ok := m.peers[id]; ok && old.app == app && reflect.DeepEqual(old.set, p) {
			continue
		}
		if err := app.SetPeers(p); err != nil {
			m.store.log().Error("cluster: an app refuses its peers", "app", id, "err", err)
		}
		m.peers[id] = peers{app, p}
	}
	m.step = 0
	maps.DeleteFunc(m.bias, func(id string, _ bias) bool { return apps[id] == nil })
	maps.DeleteFunc(m.peers, func(id string, _ peers) bool { return apps[id] == nil })
}

// peers are the Peers that an app has.
type peers struct {
	app *lbproxy.LBProxyApp
	set lbproxy.Peers
}
