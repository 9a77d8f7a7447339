package cluster

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestJoinRefusesWrongSelf(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), nil)
	for _, self := range []Self{
		{ID: "A"}, {ID: "a b"}, {ID: "-a"}, {ID: "a."}, {ID: strings.Repeat("a", 64)},
		{Interval: -1}, {Capacity: -1},
		{Addr: "10.0.0.5:9443"}, {Addr: "a b"},
	} {
		if m, err := s.Join(self); err == nil {
			m.Leave()
			t.Errorf("%+v: no error", self)
		}
	}
}

// A fleet is a set of proxies that beat on demand.
type fleet struct {
	t     *testing.T
	store *Store // for all; the ID distinguishes the proxies

	interval time.Duration // a member's lease is three of them
	live     map[string]*Member
	open     map[string]map[string]int // by proxy, field
}

func newFleet(t *testing.T, url string) *fleet {
	s, _ := dial(t, url, calm)
	return &fleet{t: t, store: s, interval: time.Second, live: map[string]*Member{},
		open: map[string]map[string]int{}}
}

// member returns a Member that does not beat by itself.
func (f *fleet) member(id string) *Member {
	if m := f.live[id]; m != nil {
		return m
	}
	m := newMember(f.store, Self{ID: id, Interval: f.interval})
	f.live[id], f.open[id] = m, map[string]int{}
	return m
}

func (f *fleet) beat(id string) {
	f.t.Helper()
	m := f.member(id)
	for range 2 {
		again, err := m.send(f.t.Context(), m.info(0), maps.Clone(f.open[id]))
		if err != nil {
			f.t.Fatal(err)
		}
		if !again {
			return
		}
	}
}

// check compares the sums in the store with the open connections.
func (f *fleet) check() {
	f.t.Helper()
	want := map[string]int{}
	for _, counts := range f.open {
		for field, n := range counts {
			if n > 0 {
				want[field] += n
			}
		}
	}
	tally, err := f.store.Tally(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	got := map[string]int{}
	for _, u := range tally.Upstreams {
		got[field(u.App, u.Addr)] = u.Open
		by := 0
		for _, n := range u.By {
			by += n
		}
		if by != u.Open {
			f.t.Fatalf("%s: %d in all, and %v by proxy", u.Addr, u.Open, u.By)
		}
	}
	if !maps.Equal(got, want) {
		f.t.Fatalf("the store has %v\nopen are %v", got, want)
	}
	if len(tally.Proxies) != len(f.live) {
		f.t.Fatalf("%d proxies, want %d", len(tally.Proxies), len(f.live))
	}
}

// Proxies come, go, die, pause and repeat beats; two beats later the sums equal the open
// connections.
func TestSumsEqualTheOpenConnections(t *testing.T) {
	t.Parallel()
	const seed = 1
	story := func(t *testing.T, url string, rounds int, later func(time.Duration)) {
		rng := rand.New(rand.NewPCG(seed, 0))
		f := newFleet(t, url)
		kills := 0
		for round := range rounds {
			id := fmt.Sprintf("p%d", rng.IntN(6))
			f.member(id)
			for range 3 {
				f.open[id][field("an app", fmt.Sprintf("10.0.0.%d:80", rng.IntN(5)))] = rng.IntN(3)
			}
			f.beat(id)
			switch rng.IntN(5) {
			case 0:
				f.beat(id) // a beat whose answer was lost, told again
				f.live[id].sent = map[string]int{}
				f.beat(id)
			case 1: // paused for longer than its lease, and buried by the others
				later(3500 * time.Millisecond)
				for other := range f.live {
					if other != id {
						f.beat(other)
					}
				}
			default: // killed: nobody hears of it again
				delete(f.live, id)
				delete(f.open, id)
				kills++
			}
			if len(f.live) == 0 || round%10 != 9 {
				continue
			}
			later(3500 * time.Millisecond)
			for range 2 {
				for id := range f.live {
					f.beat(id)
				}
			}
			f.check()
		}
		t.Log(kills, "kills")
	}
	t.Run("miniredis", func(t *testing.T) {
		server := miniredis.RunT(t)
		now := time.Now()
		server.SetTime(now)
		rounds := 1700 // 1,000 kills
		if testing.Short() {
			rounds = 200
		}
		story(t, "redis://"+server.Addr(), rounds,
			func(d time.Duration) { now = now.Add(d); server.SetTime(now) })
	})
	// Nobody sets this server's clock: the killed would not be dead in time, so they say goodbye.
	t.Run("redis-server", func(t *testing.T) {
		server := storetest.Redis(t)
		f := newFleet(t, server.URL())
		rng := rand.New(rand.NewPCG(seed, 0))
		rounds := 300
		if testing.Short() {
			rounds = 100
		}
		for range rounds {
			id := fmt.Sprintf("p%d", rng.IntN(6))
			f.member(id)
			f.open[id][field("an app", fmt.Sprintf("10.0.0.%d:80", rng.IntN(5)))] = rng.IntN(3)
			f.beat(id)
			if rng.IntN(4) == 0 {
				f.live[id].sent = nil // another process has taken its ID
				f.open[id] = map[string]int{}
				f.beat(id)
			}
			f.check()
		}
	})
}

// A beat without an answer may have reached the store or not, or reach it after the next one.
func TestLostAndLateBeats(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, url string) {
		wire := storetest.NewWire(t, strings.TrimPrefix(url, "redis://"))
		cut, _ := dial(t, wire.URL(), nil)
		f := newFleet(t, url)
		direct := f.store
		m := f.member("a")
		up := field("app", "10.0.0.1:80")
		lose := func(n int) { // a beat with count n that times out
			t.Helper()
			wire.Cut()
			m.store = cut
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := m.send(ctx, m.info(0), map[string]int{up: n}); err == nil {
				t.Fatal("a beat through a wire that is cut")
			}
		}
		arrives := func() { // the lost beat reaches the store late
			t.Helper()
			wire.Heal()
			storetest.Await(t, "the wire is healed", func() error { return cut.Ping(t.Context()) })
		}

		f.open["a"][up] = 1
		f.beat("a")
		lose(2)
		arrives()
		f.beat("a") // it has 1 again
		f.check()

		lose(3)
		m.store = direct
		f.beat("a")
		arrives()
		f.beat("a")
		f.check()
	})
}

func TestManyCountsAreToldInSeveralCalls(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, url string) {
		f := newFleet(t, url)
		f.interval = 3 * time.Second // many counts take a busy machine longer than a lease of 3 s
		f.member("a")
		for i := range 2500 {
			f.open["a"][field("app", fmt.Sprintf("10.0.%d.%d:80", i/250, i%250))] = 1 + i%3
		}
		f.beat("a")
		f.member("b")
		storetest.Await(t, "another proxy knows all sums", func() error {
			f.beat("b") // again and again: sums may be an interval old
			return storetest.Want(len(f.live["b"].sums) == 2500,
				strconv.Itoa(len(f.live["b"].sums)))
		})
		f.check()
		clear(f.open["a"])
		f.beat("a")
		f.check()
	})
}

// Each live proxy has another index, and they are those below their number.
func TestIndexes(t *testing.T) {
	storetest.Each(t, func(t *testing.T, url string) {
		var members []*Member
		indexes := func(want int) {
			t.Helper()
			storetest.Await(t, "all know their places", func() error {
				seen := map[int]bool{}
				for _, m := range members {
					p := m.Place()
					if p.Count != want || p.Index >= want || seen[p.Index] {
						return fmt.Errorf("%+v, of %d", p, want)
					}
					seen[p.Index] = true
				}
				return nil
			})
		}
		for range 5 {
			s, _ := dial(t, url, calm)
			m, err := s.Join(Self{Interval: 20 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			members = append(members, m)
		}
		indexes(5)
		if n := members[0].store.Status().Peers; n != 5 {
			t.Errorf("limits are shared by %d, want 5", n)
		}
		members[2].Leave()
		members[2].store.Close() // which makes a proxy leave, too
		members = append(members[:2], members[3:]...)
		indexes(4)
		for _, m := range members {
			m.Leave()
		}
	})
}

// newApp returns an app with n upstreams that echo, and its address.
func newApp(t *testing.T, n int) (*lbproxy.LBProxyApp, string) {
	t.Helper()
	var upstreams []lbproxy.Upstream
	for range n {
		upstreams = append(upstreams, lbproxy.Upstream{Addr: proxytest.Upstream(t, proxytest.Echo)})
	}
	app, err := lbproxy.New("web", upstreams, nil)
	if err != nil {
		t.Fatal(err)
	}
	return app, serveApp(t, app, nil)
}

// serveApp has app serve until the test ends, and returns its address.
func serveApp(t *testing.T, app *lbproxy.LBProxyApp, admit lbproxy.AdmitFunc) string {
	t.Helper()
	l := proxytest.Listen(t)
	served := make(chan struct{})
	go func() {
		defer close(served)
		app.Serve(l, admit)
	}()
	t.Cleanup(func() {
		app.Close()
		<-served
	})
	return l.Addr().String()
}

// Without the store a proxy keeps its place, and limits their parts.
func TestPlaceStaysWithoutTheStore(t *testing.T) {
	server := storetest.Redis(t)
	var members [2]*Member
	for i := range members {
		s, _ := dial(t, server.URL(), calm)
		m, err := s.Join(Self{Interval: 20 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Leave()
		members[i] = m
	}
	for _, m := range members {
		storetest.Await(t, "both know of each other", func() error {
			return storetest.Want(m.Place().Count == 2, "not yet")
		})
	}
	server.Kill()
	for _, m := range members {
		storetest.Await(t, "beats fail", func() error {
			return storetest.Want(m.Place().Err != "" && m.Place().Lag > 200*time.Millisecond,
				"not yet")
		})
		if p := m.Place(); p.Count != 2 {
			t.Errorf("%+v, want one of 2", p)
		}
		if n := m.store.Status().Peers; n != 2 {
			t.Errorf("limits are shared by %d, want 2", n)
		}
	}
	if a, b := members[0].Place().Index, members[1].Place().Index; a == b {
		t.Errorf("both are number %d", a)
	}
}

func TestLiveShowsOpenConnections(t *testing.T) {
	storetest.Each(t, func(t *testing.T, url string) {
		app, addr := newApp(t, 2)
		s, _ := dial(t, url, calm)
		apps := map[string]*lbproxy.LBProxyApp{"web": app}
		m, err := s.Join(Self{
			ID: "one", Addr: "10.0.0.5", Capacity: 100, Version: "v1",
			Interval: 20 * time.Millisecond,
			Ports:    func() map[string]int { return map[string]int{"web": 9443} },
			Apps:     func() map[string]*lbproxy.LBProxyApp { return apps },
			Config:   func() (int64, string) { return 7, "too new" },
		})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Leave()
		for range 5 {
			c := proxytest.Dial(t, addr)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			io.ReadFull(c, make([]byte, 1))
		}
		storetest.Await(t, "5 connections are shown", func() error {
			tally, err := s.Tally(t.Context())
			if err != nil {
				return err
			}
			if len(tally.Proxies) != 1 || len(tally.Upstreams) != 2 {
				return fmt.Errorf("%+v", tally)
			}
			p := tally.Proxies[0]
			if p.ID != "one" || p.Addr != "10.0.0.5" || p.Ports["web"] != 9443 || p.Open != 5 ||
				p.Capacity != 100 ||
				p.Config != 7 || p.Problem != "too new" || p.Version != "v1" ||
				p.Age > storetest.Patience || p.Draining {
				return fmt.Errorf("%+v", p)
			}
			a, b := tally.Upstreams[0], tally.Upstreams[1]
			if a.App != "web" || a.Open+b.Open != 5 || a.By["one"] != a.Open || b.Open < 2 ||
				a.Open < 2 {
				return fmt.Errorf("%+v", tally.Upstreams)
			}
			return nil
		})
		m.Drain()
		storetest.Await(t, "it is draining", func() error {
			tally, err := s.Live(t.Context())
			if err == nil && (len(tally.Proxies) != 1 || !tally.Proxies[0].Draining) {
				err = fmt.Errorf("%+v", tally)
			}
			return err
		})
		m.Leave()
		tally, err := s.Live(t.Context())
		if err != nil || len(tally.Proxies) != 0 || len(tally.Upstreams) != 0 {
			t.Errorf("after Leave: %+v %v", tally, err)
		}
	})
}

// A store that comes back empty gets all counts again.
func TestEmptyStoreIsFilledAgain(t *testing.T) {
	server := storetest.Redis(t)
	app, addr := newApp(t, 1)
	s, _ := dial(t, server.URL(), nil)
	apps := map[string]*lbproxy.LBProxyApp{"web": app}
	m, err := s.Join(Self{Interval: 20 * time.Millisecond,
		Apps:   func() map[string]*lbproxy.LBProxyApp { return apps },
		Config: func() (int64, string) { return 7, "" },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Leave()
	c := proxytest.Dial(t, addr)
	fmt.Fprint(c, "x")
	io.ReadFull(c, make([]byte, 1))
	shown := func() error {
		tally, err := s.Live(t.Context())
		if err == nil && (len(tally.Upstreams) != 1 || tally.Upstreams[0].Open != 1) {
			err = fmt.Errorf("%+v", tally)
		}
		return err
	}
	storetest.Await(t, "the connection is shown", shown)
	away(t, s, server)
	storetest.Await(t, "a beat fails", func() error {
		return storetest.Want(m.Place().Err != "", "not yet")
	})
	server.Start()
	storetest.Await(t, "the connection is shown again", shown)
	// A new configuration has a version that proxies do not consider old.
	if v, err := s.Put(t.Context(), 0, []byte("{}"), "me"); err != nil || v != 8 {
		t.Errorf("Put after the store has lost everything: version %d, %v, want 8", v, err)
	}
}

func TestBiasFollowsALastingImbalanceOnly(t *testing.T) {
	upstreams := func(states ...lbproxy.UpstreamState) (all []lbproxy.UpstreamStats) {
		for i, s := range states {
			all = append(all, lbproxy.UpstreamStats{Addr: fmt.Sprint(i), Weight: 1, State: s})
		}
		return all
	}
	const up, down = lbproxy.StateUp, lbproxy.StateDown
	three := upstreams(up, up, up)
	totals := func(n ...int) func(string) int {
		return func(addr string) int { var i int; fmt.Sscan(addr, &i); return n[i] }
	}
	b := bias{}
	for range 1000 { // within the band: the noise of small numbers
		b.follow(three, totals(90, 110, 100), 4, 1)
	}
	if s := b.steps(three); len(s) != 0 {
		t.Errorf("noise has made a bias: %v", s)
	}
	for range 10 {
		b.follow(three, totals(40, 160, 100), 4, 1)
	}
	// 50 beyond the band of 10, 0.3 a second, 10 seconds, by 4 proxies: 37.5 up and 37.5 down.
	if s := b.steps(three); s["0"] != 0 || s["1"] != 75 || s["2"] != 37.5 {
		t.Errorf("%v, want 0 75 37.5", s)
	}
	b.follow(upstreams(up, down, up), totals(50, 0, 50), 4, 1) // which is no reason to send it more
	if got := b["1"]; got != 37.5 {
		t.Errorf("the bias of one that is down: %v, want 37.5", got)
	}
	for range 1000 {
		b.follow(three, totals(100, 100, 100), 4, 1)
	}
	if s := b.steps(three); len(s) != 0 {
		t.Errorf("the bias does not leak: %v", s)
	}
	b = bias{"0": 8, "gone": 9}
	b.follow(three, totals(0, 0, 0), 4, 1) // not even then is there a number that is none
	if s := b.steps(three); s["0"] != 7.75 || len(s) != 1 || len(b) != 3 {
		t.Errorf("%v %v", s, b)
	}
	for range 30 {
		b.fade()
	}
	if s := b.steps(three); len(s) != 0 {
		t.Errorf("the bias does not fade: %v", s)
	}
}

func TestWeightsCountInTheBias(t *testing.T) {
	two := []lbproxy.UpstreamStats{{Addr: "0", Weight: 3, State: lbproxy.StateUp},
		{Addr: "1", Weight: 1, State: lbproxy.StateUp}}
	b := bias{}
	for range 100 {
		total := func(addr string) int { return map[string]int{"0": 300, "1": 100}[addr] }
		b.follow(two, total, 2, 1)
	}
	if s := b.steps(two); len(s) != 0 {
		t.Errorf("loads by weight have made a bias: %v", s)
	}
}

// Beats of 64 concurrent proxies, without changes and with 40 changed counts.
func BenchmarkBeat(b *testing.B) {
	server := storetest.Redis(b)
	s, _ := dial(b, server.URL(), calm)
	for _, changes := range []int{0, 40} {
		b.Run(fmt.Sprintf("changes=%d", changes), func(b *testing.B) {
			var ids atomic.Int64
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				m := newMember(s, Self{ID: fmt.Sprintf("p%d", ids.Add(1)), Interval: time.Second})
				counts := make([]string, 2*changes)
				for n := 0; pb.Next(); n++ {
					for i := range changes {
						counts[2*i], counts[2*i+1] = "app 10.0.0.1:"+strconv.Itoa(i),
							strconv.Itoa(n%2+1)
					}
					if _, err := m.call(b.Context(), 3*time.Second, "{}", counts); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "beats/s")
		})
	}
}
