package cluster

import (
	"context"
	"math"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
)

func open(t testing.TB, m lbproxy.RateLimitManager) bool {
	return !m.Report(t.Context(), lbproxy.Event{Kind: lbproxy.EventOpen}).Exceeded
}

func closeOne(t testing.TB, m lbproxy.RateLimitManager) {
	m.Report(t.Context(), lbproxy.Event{Kind: lbproxy.EventClose})
}

// report opens a connection, which must be admitted (1), refused (0) or either (-1).
func report(t testing.TB, m lbproxy.RateLimitManager, want int) {
	t.Helper()
	if got := open(t, m); want >= 0 && got != (want == 1) {
		t.Fatalf("let in: %v", got)
	}
}

// count returns how many of n are admitted.
func count(t testing.TB, n int, m lbproxy.RateLimitManager) (in int) {
	for range n {
		if open(t, m) {
			in++
		}
	}
	return in
}

const never = 1000 * time.Hour

// calm are options for tests in which no call may be late, even on a busy machine.
var calm = &Options{Timeout: storetest.Patience}

func TestLimitIsSharedByProxies(t *testing.T) {
	storetest.Each(t, func(t *testing.T, url string) {
		for name, l := range map[string]Limit{
			"leased": {Burst: 100, Every: never},
			"exact":  {Burst: 100, Every: never, Exact: true},
			"open":   {Burst: 100, Every: never, Open: 1000},
		} {
			var each [4]lbproxy.RateLimitManager
			for i := range each {
				s, _ := dial(t, url, calm)
				each[i] = s.Limit(name, l)
			}
			var all sync.WaitGroup
			in := make([]int, 4)
			for i, m := range each {
				all.Go(func() { in[i] = count(t, 40, m) })
			}
			all.Wait()
			total := in[0] + in[1] + in[2] + in[3]
			if total > 100 {
				t.Errorf("%s: %v let in, of 100", name, in)
			}
			storetest.Await(t, name+": what was borrowed and not used is given back", func() error {
				total += count(t, 1, each[3])
				return storetest.Want(total >= 100, strconv.Itoa(total))
			})
			if total += count(t, 10, each[0]); total != 100 {
				t.Errorf("%s: %d let in, of 100", name, total)
			}
		}
	})
}

func TestNoLimitAtAllRefusesAll(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), calm)
	for _, l := range []Limit{{}, {Burst: -1, Open: 1}, {Open: -1}, {BytesPerSecond: -1},
		{Outage: Open}} {
		if open(t, s.Limit("k", l)) {
			t.Errorf("%+v lets in", l)
		}
	}
}

func TestHugeLimitsDoNotOverflow(t *testing.T) {
	const huge = 1<<63 - 1
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), calm)
	for _, l := range []Limit{
		{Burst: math.MaxInt, Every: huge}, {Burst: 1, Every: huge}, {Burst: math.MaxInt},
		{Burst: 1}, {Burst: math.MaxInt, Every: 1},
		{Burst: math.MaxInt, Every: huge, Open: math.MaxInt, BytesPerSecond: huge, Exact: true},
	} {
		m := s.Limit("k", l)
		if !open(t, m) {
			t.Errorf("%+v refuses", l)
		}
		data := lbproxy.Event{Kind: lbproxy.EventData, Bytes: 1 << 20}
		if d := m.Report(t.Context(), data); d.Wait < 0 || d.Wait > time.Second {
			t.Errorf("%+v: wait %v", l, d.Wait)
		}
	}
}

// The clocks of proxies do not matter: tokens are refilled by the store's clock.
func TestTimeIsTheStores(t *testing.T) {
	server := miniredis.RunT(t)
	at := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	server.SetTime(at)
	s, _ := dial(t, "redis://"+server.Addr(), calm)
	for name, l := range map[string]Limit{"leased": {Burst: 2, Every: time.Microsecond},
		"exact": {Burst: 2, Every: time.Microsecond, Exact: true}} {
		m := s.Limit(name, l)
		report(t, m, 1)
		report(t, m, 1)
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
			report(t, m, 0)
		}
		at = at.Add(time.Microsecond)
		server.SetTime(at)
		storetest.Await(t, name+": one is regained",
			func() error { return storetest.Want(open(t, m), "none") })
		report(t, m, 0)
	}
}

func TestFloodOverTheLimitCostsTheStoreNothing(t *testing.T) {
	storetest.Each(t, func(t *testing.T, url string) {
		s, _ := dial(t, url, calm)
		for name, l := range map[string]Limit{
			"leased": {Burst: 3, Every: never}, "exact": {Burst: 3, Every: never, Exact: true},
			"open": {Open: 3},
		} {
			m := s.Limit(name, l)
			if in := count(t, 10, m); in != 3 {
				t.Fatalf("%s: %d let in, of 3", name, in)
			}
			before := s.Status().Calls
			began := time.Now()
			count(t, 10_000, m)
			// Every 100 ms an open limit asks again, and every second the others do. The flusher
			// has its own.
			most := 4 + 2*uint64(time.Since(began)/(100*time.Millisecond))
			if n := s.Status().Calls - before; n > most {
				t.Errorf("%s: %d calls in %v of flood, want at most %d", name, n, time.Since(began),
					most)
			}
		}
	})
}

// Openings granted by the store count against the share without it, and the reverse.
func TestShareIsNotGivenTwice(t *testing.T) {
	server := storetest.Redis(t)
	s, _ := dial(t, server.URL(), &Options{Timeout: storetest.Patience, Peers: 4})
	for name, l := range map[string]Limit{
		"leased": {Burst: 40, Every: never}, "exact": {Burst: 40, Every: never, Exact: true},
	} {
		spent, fresh := s.Limit(name+"spent", l), s.Limit(name+"fresh", l)
		if in := count(t, 30, spent); in != 30 {
			t.Fatalf("%s: %d let in, of 30", name, in)
		}
		away(t, s, server)
		lent := spent.(*limiter).lent // paid for, so they may be used
		if in := count(t, 100, spent); in != lent {
			t.Errorf("%s: %d let in without the store, after 30 with it, want the %d it had borrowed",
				name, in, lent)
		}
		if in := count(t, 100, fresh); in != 10 {
			t.Errorf("%s: %d let in without the store, want a quarter of 40", name, in)
		}
		server.Start() // empty
		storetest.Await(t, "the store is back", func() error { return s.Ping(t.Context()) })
		in := 0
		storetest.Await(t, "the rest is let in", func() error {
			in += count(t, 1, fresh)
			return storetest.Want(in >= 30, strconv.Itoa(in))
		})
		if in += count(t, 20, fresh); in != 30 {
			t.Errorf("%s: %d let in by the store that came back, want 40 without the 10 of meanwhile",
				name, in)
		}
	}
}

// away kills the store and waits until the client notices.
func away(t *testing.T, s *Store, server *storetest.Server) {
	server.Kill()
	storetest.Await(t, "the store is known to be away", func() error {
		s.Ping(t.Context())
		return storetest.Want(!s.Status().Connected, "connected")
	})
}

func TestOutagePolicies(t *testing.T) {
	server := storetest.Redis(t)
	s, _ := dial(t, server.URL(), &Options{Timeout: storetest.Patience, Peers: 5})
	limits := map[Outage]lbproxy.RateLimitManager{}
	for _, o := range []Outage{Share, Open, Closed} {
		limits[o] = s.Limit("k", Limit{Burst: 50, Every: never, Open: 20, BytesPerSecond: 1 << 20,
			Outage: o})
	}
	away(t, s, server)
	for o, want := range map[Outage]int{Share: 4, Open: 100, Closed: 0} {
		if in := count(t, 100, limits[o]); in != want {
			t.Errorf("%v: %d let in, want %d", o, in, want)
		}
	}
	for o, want := range map[Outage]time.Duration{Share: 5 * time.Second, Open: 0,
		Closed: 5 * time.Second} {
		d := limits[o].Report(t.Context(), lbproxy.Event{Kind: lbproxy.EventData, Bytes: 1 << 20})
		if d.Exceeded || d.Wait > want || d.Wait < want-time.Second {
			t.Errorf("%v: %v for a mebibyte, want %v", o, d.Wait, want)
		}
	}
	status := s.Status()
	if status.Alone != 104 || status.TurnedAway != 96+100 {
		t.Errorf("%d let in and %d refused without the store, want 104 and 196", status.Alone,
			status.TurnedAway)
	}
}

func TestOpenLimitIsExact(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, url string) {
		var each [4]lbproxy.RateLimitManager
		for i := range each {
			s, _ := dial(t, url, calm)
			each[i] = s.Limit("k", Limit{Open: 10})
		}
		var all sync.WaitGroup
		var mu sync.Mutex
		open, most := 0, 0
		for _, m := range each {
			for range 4 {
				all.Go(func() {
					for range 30 {
						asks := lbproxy.Event{Kind: lbproxy.EventOpen}
						if m.Report(context.Background(), asks).Exceeded {
							continue
						}
						mu.Lock()
						open++
						most = max(most, open)
						mu.Unlock()
						time.Sleep(time.Millisecond) // a connection
						mu.Lock()
						open--
						mu.Unlock()
						m.Report(context.Background(), lbproxy.Event{Kind: lbproxy.EventClose})
					}
				})
			}
		}
		all.Wait()
		if most > 10 {
			t.Errorf("%d open at once, of 10", most)
		}
		in := 0
		storetest.Await(t, "all 10 may be opened again", func() error {
			in += count(t, 1, each[0])
			return storetest.Want(in >= 10, strconv.Itoa(in))
		})
		if in += count(t, 5, each[1]); in != 10 {
			t.Errorf("%d let in, of 10", in)
		}
	})
}

// A dead proxy cannot report that its connections are closed.
func TestConnectionsOfTheDeadStopCounting(t *testing.T) {
	t.Parallel()
	server := miniredis.RunT(t)
	at := time.Now()
	server.SetTime(at)
	wire := storetest.NewWire(t, server.Addr())
	dead, _ := dial(t, wire.URL(), calm)
	defer wire.Heal() // or it would wait to say goodbye
	s, _ := dial(t, "redis://"+server.Addr(), calm)
	l := Limit{Open: 10}
	if in := count(t, 10, dead.Limit("k", l)); in != 10 {
		t.Fatal(in, "let in, of 10")
	}
	wire.Cut()
	m := s.Limit("k", l)
	report(t, m, 0)
	server.SetTime(at.Add(6*time.Second - time.Millisecond))
	storetest.Await(t, "the refusal is forgotten", func() error {
		before := s.Status().Calls
		report(t, m, 0)
		return storetest.Want(s.Status().Calls > before, "not asked")
	})
	server.SetTime(at.Add(6 * time.Second))
	in := 0
	storetest.Await(t, "all 10 are free", func() error {
		in += count(t, 10, m)
		return storetest.Want(in >= 10, strconv.Itoa(in))
	})
	if in != 10 {
		t.Error(in, "let in, of 10")
	}
}

// A lost reply leaves the store with a wrong number; the next renewal corrects it.
func TestLostRepliesHeal(t *testing.T) {
	t.Parallel()
	server := miniredis.RunT(t)
	wire := storetest.NewWire(t, server.Addr())
	s, _ := dial(t, wire.URL(), &Options{Peers: 1})
	other, _ := dial(t, "redis://"+server.Addr(), calm)
	l := Limit{Open: 10}
	m, o := s.Limit("k", l), other.Limit("k", l)
	report(t, m, 1)
	wire.Cut() // the store gets these reports when the wire has healed, and nobody reads its answer
	for range 3 {
		report(t, m, 1)
	}
	for range 2 {
		closeOne(t, m)
	}
	wire.Heal()
	storetest.Await(t, "the store is back", func() error { return s.Ping(t.Context()) })
	in := 0
	storetest.Await(t, "the other proxy may have what is left", func() error {
		in += count(t, 1, o)
		return storetest.Want(in >= 8, strconv.Itoa(in))
	})
	if in += count(t, 5, o); in != 8 {
		t.Errorf("%d let in beside 2, of 10", in)
	}
}

func TestRefusalSpendsNothing(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, url string) {
		s, _ := dial(t, url, calm)
		m := s.Limit("k", Limit{Burst: 10, Every: never, Open: 1})
		in := 0
		storetest.Await(t, "ten are let in, one after the other", func() error {
			if open(t, m) {
				in++
				count(t, 5, m) // there may be only one at once
				closeOne(t, m)
			}
			return storetest.Want(in == 10, strconv.Itoa(in))
		})
		// Another limit refuses a connection that this one has admitted.
		for name, l := range map[string]Limit{
			"leased": {Burst: 5, Every: never}, "exact": {Burst: 5, Every: never, Exact: true},
			"open": {Burst: 5, Every: never, Open: 5},
		} {
			m := s.Limit(name, l)
			both := lbproxy.All(m, new(lbproxy.OpenLimit))
			count(t, 100, both)
			in := 0
			storetest.Await(t, "nothing was spent", func() error {
				in += count(t, 1, m)
				return storetest.Want(in >= 5, strconv.Itoa(in))
			})
			report(t, m, 0)
		}
	})
}

func TestIdleLimiterMayBeForgotten(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), calm)
	l := Limit{Burst: 5, Every: never, Open: 5, BytesPerSecond: 1 << 30}
	idle := func(m lbproxy.RateLimitManager) bool { return m.(interface{ Idle() bool }).Idle() }
	m := s.Limit("k", l)
	if !idle(m) {
		t.Error("a new one is not idle")
	}
	report(t, m, 1)
	if idle(m) {
		t.Error("it is idle with a connection open")
	}
	m.Report(t.Context(), lbproxy.Event{Kind: lbproxy.EventData, Bytes: 1000})
	closeOne(t, m)
	storetest.Await(t, "everything is told", func() error {
		return storetest.Want(idle(m), "not idle")
	})
	storetest.Await(t, "the flusher lets go of it", func() error {
		s.limits.mu.Lock()
		defer s.limits.mu.Unlock()
		return storetest.Want(len(s.limits.active) == 0 && !m.(*limiter).active, "active")
	})
	if in := count(t, 10, s.Limit("k", l)); in != 4 {
		t.Errorf("a new one lets %d in, of the 4 that are left", in)
	}
	defer func() {
		if recover() == nil {
			t.Error("an EventClose without an EventOpen does not panic")
		}
	}()
	closeOne(t, m)
}

func TestChangedLimitBeginsAnew(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), calm)
	l := Limit{Burst: 3, Every: never, Exact: true}
	count(t, 5, s.Limit("k", l))
	report(t, s.Limit("k", l), 0)
	l.Burst = 4
	if in := count(t, 5, s.Limit("k", l)); in != 4 {
		t.Error(in, "let in, of 4")
	}
}

// Clients that come together wait for one trip.
func TestLeasesAreBorrowedOnce(t *testing.T) {
	server := storetest.Redis(t)
	wire := storetest.NewWire(t, server.Addr)
	s, _ := dial(t, wire.URL(), calm)
	m := s.Limit("k", Limit{Burst: 10_000, Every: 10 * time.Microsecond})
	wire.Cut()
	before := s.Status().Calls
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() { report(t, m, 1) })
	}
	storetest.Await(t, "they wait", func() error {
		l := m.(*limiter)
		l.mu.Lock()
		defer l.mu.Unlock()
		return storetest.Want(l.waiting == 99, "not yet")
	})
	wire.Heal()
	all.Wait()
	if n := s.Status().Calls - before; n > 4 {
		t.Errorf("%d calls for 100 clients that came together", n)
	}
}

// A client that has gone does not wait for the store.
func TestOpenOfAClientThatHasGone(t *testing.T) {
	server := storetest.Redis(t)
	wire := storetest.NewWire(t, server.Addr)
	s, _ := dial(t, wire.URL(), calm)
	m := s.Limit("k", Limit{Burst: 10, Every: never})
	wire.Cut()
	var first sync.WaitGroup
	first.Go(func() { report(t, m, 1) })
	storetest.Await(t, "the first asks", func() error {
		l := m.(*limiter)
		l.mu.Lock()
		defer l.mu.Unlock()
		return storetest.Want(l.inFlight == 1, "not yet")
	})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if !m.Report(gone, lbproxy.Event{Kind: lbproxy.EventOpen}).Exceeded {
		t.Error("it is let in")
	}
	wire.Heal()
	first.Wait()
}

// stopFlusher leaves only the calls that Report makes itself.
func stopFlusher(s *Store) { s.limits.stop() }

func TestDataNeverCallsTheStore(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), nil)
	stopFlusher(s)
	m := s.Limit("k", Limit{BytesPerSecond: 1 << 30})
	report(t, m, 1)
	ctx, e := t.Context(), lbproxy.Event{Kind: lbproxy.EventData, Bytes: 64 << 10}
	n := 1_000_000
	if testing.Short() {
		n = 10_000
	}
	before := s.Status().Calls
	if allocs := testing.AllocsPerRun(n, func() { m.Report(ctx, e) }); allocs != 0 {
		t.Errorf("%v allocations for each", allocs)
	}
	if calls := s.Status().Calls - before; calls != 0 {
		t.Errorf("%d calls for %d events", calls, n)
	}
}

// A proxy borrows as many tokens as it has used lately, within bounds.
func TestBatch(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), &Options{Peers: 4})
	for _, c := range []struct {
		limit                 Limit
		used, before, waiting int
		short                 bool
		want                  int
	}{
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 0, 0, 0, false, 1},
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 3, 0, 0, false, 3},
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 3, 5, 0, false, 5},
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 0, 0, 6, false, 7},
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 4, 0, 0, true, 6},
		{Limit{Burst: 100, Every: 10 * time.Millisecond}, 50, 0, 0, false, 10}, // refills in 100 ms
		{Limit{Burst: 100, Every: time.Millisecond}, 50, 0, 0, false, 25},      // a quarter
		{Limit{Burst: 10, Every: time.Minute}, 5, 0, 0, false, 1},
		{Limit{Burst: 2, Every: time.Microsecond}, 5, 0, 0, false, 1},
	} {
		m := s.Limit("k", c.limit).(*limiter)
		m.used, m.before, m.waiting, m.short = c.used, c.before, c.waiting, c.short
		if got := m.batch(); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// A dead proxy's borrowed tokens are lost until they are refilled: one batch.
func TestCrashLosesOneBatch(t *testing.T) {
	server := miniredis.RunT(t)
	at := time.Now()
	server.SetTime(at)
	url := "redis://" + server.Addr()
	dead, _ := dial(t, url, &Options{Timeout: storetest.Patience, Peers: 4})
	stopFlusher(dead) // which would give back
	l := Limit{Burst: 40, Every: time.Millisecond}
	d := dead.Limit("k", l)
	in := count(t, 5, d)
	lost := d.(*limiter).lent
	if lost < 1 || lost > 10 {
		t.Fatalf("%d are lent, want some, and no more than a quarter", lost)
	}
	s, _ := dial(t, url, calm)
	m := s.Limit("k", l)
	storetest.Await(t, "the rest is let in", func() error {
		in += count(t, 1, m)
		return storetest.Want(in >= 40-lost, strconv.Itoa(in))
	})
	if in += count(t, 5, m); in != 40-lost {
		t.Errorf("%d let in, of 40 without the %d that are lost", in, lost)
	}
	server.SetTime(at.Add(time.Duration(lost) * time.Millisecond))
	storetest.Await(t, "the lost batch is regained", func() error {
		in += count(t, 1, m)
		return storetest.Want(in >= 40, strconv.Itoa(in))
	})
}

// One call checks the rate and the open connections.
func TestOneTripForAllBounds(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), calm)
	stopFlusher(s)
	m := s.Limit("k", Limit{Burst: 5, Every: never, Open: 5, BytesPerSecond: 1 << 20})
	before := s.Status().Calls
	report(t, m, 1)
	if n := s.Status().Calls - before; n != 1 {
		t.Errorf("%d calls for one opening", n)
	}
}

func BenchmarkOpen(b *testing.B) {
	server := storetest.Redis(b)
	s, _ := dial(b, server.URL(), nil)
	ctx, e := b.Context(), lbproxy.Event{Kind: lbproxy.EventOpen}
	for _, c := range []struct {
		name string
		m    lbproxy.RateLimitManager
	}{
		{"TokenBucket", &lbproxy.TokenBucket{Burst: 1 << 30, Every: 1}},
		{"leased", s.Limit("leased", Limit{Burst: 1 << 30, Every: time.Microsecond})},
		{"exact", s.Limit("exact", Limit{Burst: 1 << 30, Every: time.Microsecond, Exact: true})},
		{"open", s.Limit("open", Limit{Open: 1 << 30})},
		{"refused", s.Limit("refused", Limit{Burst: 1, Every: never})},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				c.m.Report(ctx, e)
			}
		})
	}
}

func BenchmarkData(b *testing.B) {
	server := storetest.Redis(b)
	s, _ := dial(b, server.URL(), nil)
	ctx, e := b.Context(), lbproxy.Event{Kind: lbproxy.EventData, Bytes: 64 << 10}
	for _, c := range []struct {
		name string
		m    lbproxy.RateLimitManager
	}{
		{"Bandwidth", &lbproxy.Bandwidth{BytesPerSecond: 1 << 50}},
		{"shared", s.Limit("shared", Limit{BytesPerSecond: 1 << 50})},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			before := s.Status().Calls
			for b.Loop() {
				c.m.Report(ctx, e)
			}
			b.ReportMetric(float64(s.Status().Calls-before)/float64(b.N), "calls/op")
		})
	}
}
