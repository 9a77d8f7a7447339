//go:build linux && !lbproxy_portable

package loop

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// overload makes the loop of s look as if it had been awake for long, and s as if it were of that
// age. It runs on that loop.
func overload(s *Session, age time.Duration) {
	b := &s.loop.Load().busy
	b.began, b.slept, b.cpu = -1<<60, 0, -1<<60
	s.idle.Since = relay.Clock() - int64(age)
}

func TestLoopIsBusyWhenItIsAwakeForMostOfAPeriod(t *testing.T) {
	const period = int64(busyPeriod)
	const begin = 1000 * period
	used := processTime()
	for _, row := range []struct {
		name   string
		passed int64 // since the period began
		slept  int64
		cpu    int64 // used before the period, compared with now
		busy   bool
		behind bool
	}{
		{"awake", period, 0, -period, true, true},
		{"awake for long", 5 * period, period / 20, -5 * period, true, true},
		{"before the period ends", period - 1, 0, -period, false, false},
		{"asleep for a fiftieth", period, period / 50, -period, true, false},
		{"asleep for almost a fiftieth", period, period/50 - 1, -period, true, true},
		{"asleep for a fifth", period, period / 5, -period, false, false},
		{"asleep for almost a fifth", period, period/5 - 1, -period, true, false},
		{"other processes have the processor", period, 0, 1 << 40, false, false},
	} {
		b := &busyness{began: begin, cpu: used + row.cpu}
		if row.slept > 0 {
			b.sleeper = begin + 1
			if b.awake(begin + 1 + row.slept); b.sleeper != 0 || b.slept != row.slept {
				t.Errorf("%s: slept for %d, want %d", row.name, b.slept, row.slept)
			}
		}
		now := begin + row.passed
		if got := b.awake(now); got != row.busy || b.isBusy(now) != row.busy {
			t.Errorf("%s: busy: %v, %v", row.name, got, b.isBusy(now))
		}
		if b.isBehind(now) != row.behind {
			t.Errorf("%s: behind: %v", row.name, b.isBehind(now))
		}
		if later := now + 2*row.passed; b.isBusy(later) || b.isBehind(later) {
			t.Errorf("%s: for ever", row.name)
		}
	}
}

func TestNewSessionsGoToTheFirstLoopThatKeepsUp(t *testing.T) {
	g := newGroup(t, relay.Config{})
	const now = 1000
	behind := func(a, b int64) {
		g.loops[0].busy.behind.Store(a)
		g.loops[1].busy.behind.Store(b)
	}
	place := func(want int, when string) {
		t.Helper()
		if g.place(now) != g.loops[want] {
			t.Errorf("%s: not on loop %d", when, want)
		}
	}
	g.loops[0].load.Store(100)
	place(0, "both keep up")
	behind(now+1, 0)
	place(1, "the first is behind")
	behind(now+1, now+1)
	place(1, "both are behind, and the second has fewer")
	behind(now, now+1)
	place(0, "the first was behind")
	behind(0, 0)
	g.loops[0].load.Store(0)
}

// The loop that gets the new sessions accepts them, too.
func TestAcceptingFollowsNewSessions(t *testing.T) {
	g := newGroup(t, relay.Config{})
	front := proxytest.Listen(t)
	accepted := make(chan Accepted, 1)
	a, err := g.NewListener(front, func(c Accepted) bool {
		accepted <- c
		return true
	})
	proxytest.Must(t, err)
	ended := make(chan error, 1)
	go func() {
		_, err := a.Accept()
		ended <- err
	}()
	proxytest.Eventually(t, "a loop accepts", func() bool { return len(listeners(g)) == 1 })
	for i, behind := range []int64{0, 1 << 62, 0} {
		g.loops[0].busy.behind.Store(behind)
		proxytest.Dial(t, front.Addr().String())
		want := g.loops[i%2]
		c := proxytest.Receive(t, "it is accepted", accepted)
		if Reset(c.FD); c.near != want {
			t.Errorf("%d: accepted by loop %d, want %d", i,
				slices.Index(g.loops, c.near), slices.Index(g.loops, want))
		}
		if got := listeners(g); !slices.Equal(got, []*loop{want}) {
			t.Errorf("%d: %d loops accept", i, len(got))
		}
	}
	g.loops[0].busy.behind.Store(1 << 62)
	a.Close()
	if err := proxytest.Receive(t, "Accept's end", ended); err != net.ErrClosed {
		t.Error(err)
	}
	if got := listeners(g); len(got) > 0 {
		t.Errorf("%d loops accept from a closed listener", len(got))
	}
}

// listeners returns the loops that accept.
func listeners(g *Group) (accept []*loop) {
	for _, l := range g.loops {
		n := make(chan int)
		l.post(func() { n <- len(l.listeners) })
		if <-n > 0 {
			accept = append(accept, l)
		}
	}
	return accept
}

// sendAway hands s to another loop, unless it is over by then, or elsewhere.
func sendAway(g *Group, s *Session) {
	from := s.loop.Load()
	to := g.loops[0]
	if to == from {
		to = g.loops[1]
	}
	from.post(func() {
		if s.loop.Load() == from && s.phase == open {
			if s.queued {
				from.again = slices.DeleteFunc(from.again, func(other *Session) bool { return other == s })
				s.queued = false
			}
			from.handOver(s, to)
		}
	})
}

// Sessions of a busy loop continue on another loop.
func TestHandOver(t *testing.T) {
	g := newGroup(t, relay.Config{})
	const sessions = 8
	var all [sessions]*recorder
	var clients sync.WaitGroup
	moved := make(chan struct{}, 1)
	for i := range all {
		h := &recorder{}
		h.onMoved = func() {
			if h.session.loop.Load() == g.loops[0] {
				overload(h.session, busyPeriod)
				return
			}
			select {
			case moved <- struct{}{}:
			default:
			}
		}
		all[i] = h
		client, server := joinAs(t, g, h)
		clients.Go(func() {
			for range 200 {
				if err := pingBoth(client, server); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	clients.Wait()
	proxytest.Receive(t, "a hand-over", moved)
	if n := g.Started(); n != sessions {
		t.Errorf("%d sessions were started, want %d", n, sessions)
	}
	if n := g.loops[0].load.Load() + g.loops[1].load.Load(); n != sessions {
		t.Errorf("the loops count %d sessions, want %d", n, sessions)
	}
	for _, h := range all {
		h.session.Abort(errAborted)
		if o := h.wait(t); o.Err != errAborted {
			t.Errorf("%+v", o)
		}
	}
}

// Young sessions may soon be over, and stay on a busy loop.
func TestYoungSessionsStay(t *testing.T) {
	g := newGroup(t, relay.Config{})
	const sessions = 4
	var ends [sessions][2]net.Conn
	for i := range ends {
		h := &recorder{}
		h.onMoved = func() { overload(h.session, -time.Hour) }
		ends[i][0], ends[i][1] = joinAs(t, g, h)
	}
	var clients sync.WaitGroup
	for _, e := range ends {
		clients.Go(func() {
			for range 100 {
				if err := pingBoth(e[0], e[1]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	clients.Wait()
	if n := g.loops[0].load.Load(); n != sessions {
		t.Errorf("%d of %d sessions are on the first loop", n, sessions)
	}
}

// An Abort that a loop meets while a session is on its way back to it comes after the session.
func TestAbortOnTheWayBack(t *testing.T) {
	g := newGroup(t, relay.Config{})
	client, server, h := join(t, g)
	proxytest.Must(t, pingBoth(client, server))
	s := h.session
	home := s.loop.Load()
	away := g.loops[0]
	if away == home {
		away = g.loops[1]
	}
	back := make(chan bool, 1)
	home.post(func() {
		s.Abort(errAborted) // is in the inbox before the message that s is back
		home.handOver(s, away)
		sendAway(g, s)
		late := time.Now().Add(proxytest.Patience / 2)
		for s.loop.Load() != home && time.Now().Before(late) {
			time.Sleep(time.Millisecond)
		}
		back <- s.loop.Load() == home
	})
	if !proxytest.Receive(t, "the way back", back) {
		t.Fatal("the session stays away")
	}
	if o := h.wait(t); o.Err != errAborted {
		t.Errorf("%+v", o)
	}
	held := make(chan bool, 1)
	home.post(func() { held <- slices.Contains(home.sessions, s) })
	if proxytest.Receive(t, "an answer", held) {
		t.Error("the session still has a slot")
	}
}

// TestAbortDuringHandOver aborts sessions that go back and forth between loops.
func TestAbortDuringHandOver(t *testing.T) {
	g := newGroup(t, relay.Config{})
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	var moves atomic.Int64
	for i := range rounds {
		h := &recorder{}
		var last *loop
		h.onMoved = func() {
			sendAway(g, h.session)
			if l := h.session.loop.Load(); l != last {
				last = l
				moves.Add(1)
			}
		}
		client, server := joinAs(t, g, h)
		var pings sync.WaitGroup
		pings.Go(func() {
			for pingBoth(client, server) == nil {
			}
		})
		proxytest.Eventually(t, "bytes move", func() bool {
			sent, _ := h.session.Counts()
			return sent > int64(i%7)
		})
		h.session.Abort(errAborted)
		if o := h.wait(t); o.Err != errAborted {
			t.Errorf("%+v", o)
		}
		pings.Wait()
	}
	if n := moves.Load(); n < 2*int64(rounds) {
		t.Errorf("sessions were on %d loops in all, want some moves each", n)
	}
}

// An idle session that was handed over is still looked after.
func TestIdleTimeoutAfterHandOver(t *testing.T) {
	g := newGroup(t, relay.Config{Idle: time.Hour})
	h := &recorder{}
	var once sync.Once
	h.onMoved = func() { once.Do(func() { sendAway(g, h.session) }) }
	client, server := joinAs(t, g, h)
	first := h.session.loop.Load()
	proxytest.Eventually(t, "it is handed over", func() bool {
		proxytest.Must(t, pingBoth(client, server))
		return h.session.loop.Load() != first
	})
	l := h.session.loop.Load()
	l.post(func() {
		if l.sweep.next == 0 {
			t.Error("no sweep is due")
		}
		h.session.idle.last -= int64(time.Hour)
		l.sweep.next = l.now
	})
	if o := h.wait(t); o.Err != errIdle {
		t.Errorf("%+v", o)
	}
}

// A hand-over includes the bytes that a reader has not taken yet, and those still to be read.
func TestHandOverLosesNothing(t *testing.T) {
	g := newGroup(t, relay.Config{})
	h := &recorder{verdict: smallReads}
	var moves int
	var last *loop
	h.onMoved = func() {
		sendAway(g, h.session)
		if l := h.session.loop.Load(); l != last {
			last = l
			moves++
		}
	}
	client, server := joinAs(t, g, h)
	const size = 16 << 20
	var ends sync.WaitGroup
	for i, c := range []*net.TCPConn{client, server} {
		c.SetReadBuffer(64 << 10)
		ends.Go(func() {
			proxytest.Pattern(i).Send(c, size)
			c.CloseWrite()
		})
		ends.Go(func() {
			if err := proxytest.Pattern(1-i).Exactly(c, size); err != nil {
				t.Error(err)
			}
		})
	}
	ends.Wait()
	if o := h.wait(t); o.Err != nil || o.Sent != size || o.Received != size {
		t.Errorf("%+v", o)
	}
	if moves < 3 {
		t.Errorf("it was on %d loops in all, want some", moves)
	}
}
