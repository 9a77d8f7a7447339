package relay

import (
	"io"
	"math"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestIdleTimeIsExactOverBothDirections(t *testing.T) {
	for _, keepAlive := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			engine := newEngine(t, Config{Idle: time.Minute, KeepAlive: keepAlive})
			client, server, h, _ := joinPipes(engine, nil)
			go func() {
				b := make([]byte, 1)
				io.ReadFull(server, b)       // at 50 s
				time.Sleep(50 * time.Second) // 100 s
				server.Write(b)
				server.Read(b) // no more
			}()
			start := time.Now()
			time.Sleep(50 * time.Second)
			proxytest.Must(t, proxytest.Ping(client))
			proxytest.ReadReset(t, client)
			if took := time.Since(start); took != 160*time.Second {
				t.Errorf("ended after %v, want 160s", took)
			}
			if o := h.wait(t); o.Err != errIdle || o.Failed != NoSide || o.Sent != 1 ||
				o.Received != 1 {
				t.Errorf("%+v", o)
			}
		})
	}
}

func TestIdleTimeBeginsWithConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, Config{Idle: time.Minute})
		for range 2 { // the second time the engine has been idle for long
			client, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			h := newRecorder(nil)
			r := e.Start(ours, h, 0)
			start := time.Now()
			time.Sleep(2 * time.Minute)
			r.Connect(theirs)
			if o := h.wait(t); o.Err != errIdle || time.Since(start) != 3*time.Minute {
				t.Errorf("%+v after %v", o, time.Since(start))
			}
			client.Close()
			server.Close()
			time.Sleep(time.Hour)
		}
	})
}

// Nothing else bounds how long one stream may go on when the other has ended.
func TestOnlyIdleTimeBoundsAHalfClosedRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, h, _ := joinPipes(newEngine(t, Config{Idle: time.Minute}), nil)
		go func() {
			io.ReadAll(server)
			for range 100 {
				time.Sleep(50 * time.Second)
				server.Write([]byte("x"))
			}
			server.Close()
		}()
		start := time.Now()
		client.CloseWrite()
		if b, err := io.ReadAll(client); len(b) != 100 || err != nil {
			t.Errorf("%d bytes, %v; want 100", len(b), err)
		}
		if o := h.wait(t); o.Err != nil || time.Since(start) != 5000*time.Second {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		client, server, h, _ := joinPipes(newEngine(t, Config{Idle: time.Minute}), nil)
		start := time.Now()
		server.CloseWrite()
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("client reads %v", err)
		}
		if o := h.wait(t); o.Err != errIdle || time.Since(start) != time.Minute {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
	})
}

func TestNoIdleTimeMeansNoLimit(t *testing.T) {
	for _, idle := range []time.Duration{0, -1} {
		synctest.Test(t, func(t *testing.T) {
			engine := newEngine(t, Config{Idle: idle, KeepAlive: true})
			client, server, h, _ := joinPipes(engine, nil)
			go func() { io.Copy(server, server); server.Close() }()
			time.Sleep(1000 * time.Hour)
			engine.mu.Lock()
			if engine.timer == nil {
				t.Error("no sweep looks for resets any more")
			}
			engine.mu.Unlock()
			proxytest.Must(t, proxytest.Ping(client))
			client.Close()
			if o := h.wait(t); o.Err != nil {
				t.Errorf("%+v", o)
			}
		})
	}
}

// Where the system cannot be asked for the queue, writing in pieces shows that a relay is not idle.
func TestSlowReaderInMemoryIsNotIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 10 * writePiece
		client, server, h, _ := joinPipes(newEngine(t, Config{Idle: time.Minute}), nil)
		go func() { pattern.Send(server, size); server.CloseWrite() }()
		client.CloseWrite()
		var got []byte
		for b := make([]byte, writePiece/4); ; {
			time.Sleep(10 * time.Second)
			n, err := client.Read(b)
			got = append(got, b[:n]...)
			if err != nil {
				break
			}
		}
		if len(got) != size || pattern.Check(0, got) != nil {
			t.Errorf("%d bytes, %v", len(got), pattern.Check(0, got))
		}
		if o := h.wait(t); o.Err != nil {
			t.Errorf("%+v", o)
		}
		server.Close()
	})
}

func TestSlowReaderOfASocketIsNotIdle(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	client, ours := duplex(t)
	server, theirs := duplex(t)
	if canMeasure {
		ours.SetWriteBuffer(2 * size) // all of it fits, so nothing wakes the relay
	} else {
		ours.SetWriteBuffer(16 << 10)
	}
	client.SetReadBuffer(16 << 10)
	h := newRecorder(nil)
	const idle = 4 * time.Second // a busy machine may pause the reader, but hardly for so long
	r := newEngine(t, Config{Idle: idle}).Start(ours, h, 0)
	r.Connect(theirs)
	go func() { pattern.Send(server, size); server.CloseWrite() }()
	start := time.Now()
	tick := time.NewTicker(100 * time.Millisecond) // 64 reads take longer than idle
	defer tick.Stop()
	b := make([]byte, 16<<10)
	for at := int64(0); at < size; {
		<-tick.C
		n, err := io.ReadFull(client, b)
		if err != nil || pattern.Check(at, b[:n]) != nil {
			t.Fatalf("after %d of %d bytes: %v", at, size, err)
		}
		at += int64(n)
	}
	client.Close()
	server.Close()
	if o := h.wait(t); o.Err != nil || time.Since(start) < idle {
		t.Errorf("%+v after %v", o, time.Since(start))
	}
}

func TestIdleTimeEndsStalledRelays(t *testing.T) {
	t.Parallel()
	e := newEngine(t, Config{Idle: 300 * time.Millisecond})
	var hs []*recorder
	for range 100 {
		client, server, h, _ := joinOver(t, e, nil)
		client.Write([]byte("x"))
		io.ReadFull(server, make([]byte, 1))
		hs = append(hs, h)
	}
	for _, h := range hs {
		if o := h.wait(t); o.Err != errIdle || o.Sent != 1 {
			t.Fatalf("%+v", o)
		}
	}
}

// A relay whose conn is slow to close does not delay the others.
func TestIdleRelaysDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, Config{Idle: time.Minute})
		client, ours := proxytest.Pipe()
		_, theirs := proxytest.Pipe()
		slow := &slowReset{PipeConn: ours, resetting: make(chan struct{}),
			release: make(chan struct{})}
		held := newRecorder(nil)
		e.Start(slow, held, 0).Connect(theirs)
		time.Sleep(time.Second)
		_, _, h, _ := joinPipes(e, nil)
		start := time.Now()
		if o := h.wait(t); o.Err != errIdle || time.Since(start) != time.Minute {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
		time.Sleep(10 * time.Minute) // it is aborted only once
		close(slow.release)
		held.wait(t)
		client.Close()
	})
}

// The cost of a sweep over silent relays, counted in questions to the system.
func TestSweepAsksOnlyAboutRelaysThatMoved(t *testing.T) {
	if !canMeasure {
		t.Skip("nobody can be asked")
	}
	_, ours := duplex(t)
	asked := 0
	raw := askedConn{rawTCP(ours), &asked}
	e := NewEngine(Config{Idle: time.Minute})
	r := &Relay{client: end{raw: raw}, server: end{raw: raw}}
	now := int64(time.Hour)
	r.last.Store(now)
	look := func(after time.Duration) time.Duration {
		now += int64(after)
		left := e.look(r, now)
		return left.Round(time.Second)
	}
	for i, row := range []struct {
		after time.Duration
		asked int // so far
		left  time.Duration
	}{
		{10 * time.Second, 0, 50 * time.Second}, // not silent for a quarter
		{5 * time.Second, 2, 45 * time.Second},  // the first question, one for each side
		{20 * time.Second, 2, 25 * time.Second}, // the queues are empty, and nothing has moved
		{20 * time.Second, 2, 5 * time.Second},
	} {
		if left := look(row.after); left != row.left || asked != row.asked {
			t.Errorf("look %d: %v left after %d questions, want %v and %d", i, left, asked,
				row.left,
				row.asked)
		}
	}
	r.last.Store(now)
	if look(15 * time.Second); asked != 4 {
		t.Errorf("%d questions after bytes have moved, want 4", asked)
	}
	// Before a relay is condemned the system is asked again, however short it is since it last was:
	// what a slow reader has taken meanwhile has moved.
	r.idle.unsent, r.idle.asked = 10, now
	r.last.Store(now + int64(time.Second) - int64(time.Minute))
	if left := look(time.Second); asked != 6 || left != time.Minute || r.condemned {
		t.Errorf("%v left after %d questions, condemned %v", left, asked, r.condemned)
	}
	if look(20 * time.Second); asked != 6 {
		t.Errorf("%d questions, want 6: the queues were empty when it was last asked", asked)
	}
}

func TestOnlyAShorterQueueMeansThatASlowReaderHasTakenBytes(t *testing.T) {
	if !canMeasure {
		t.Skip("nobody can be asked")
	}
	const s = int64(time.Second)
	config := &Config{Idle: time.Minute}
	var i Idleness
	for _, row := range []struct {
		last, now int64
		unsent    int
		taken     bool
	}{
		{100 * s, 120 * s, 50, false}, // the first question
		{100 * s, 140 * s, 50, false}, // the reader is stuck
		{100 * s, 160 * s, 40, true},
		{160 * s, 180 * s, 30, true},  // also when what it took last is all that has moved
		{190 * s, 210 * s, 20, false}, // what was written counts already
		{190 * s, 230 * s, 0, true},
	} {
		asked, taken := i.Ask(config, row.last, row.now, func() int { return row.unsent })
		if !asked || taken != row.taken {
			t.Errorf("at %d s: asked %v, taken %v, want true, %v",
				row.now/s, asked, taken, row.taken)
		}
	}
}

// A reader that is slow may be on either side, or on both.
func TestSweepCountsTheQueuesOfBothSides(t *testing.T) {
	if !canMeasure {
		t.Skip("nobody can be asked")
	}
	r := &Relay{client: stuck(t), server: stuck(t)}
	r.last.Store(int64(time.Second))
	e := NewEngine(Config{Idle: time.Minute})
	proxytest.Eventually(t, "both queues are counted", func() bool {
		r.idle = Idleness{}
		e.look(r, int64(30*time.Second))
		client, server := r.client.unsent(), r.server.unsent()
		return client > 0 && server > 0 && r.idle.unsent == client+server
	})
}

// stuck returns the end of a connection whose peer does not read, with bytes in its queue.
func stuck(t *testing.T) end {
	_, ours := duplex(t)
	e := newEnd(ours)
	go ours.Write(make([]byte, 64<<20)) // far more than the systems hold
	proxytest.Eventually(t, "bytes are in its queue", func() bool { return e.unsent() > 0 })
	return e
}

// An askedConn counts how often it is used.
type askedConn struct {
	syscall.RawConn
	n *int
}

func (c askedConn) Control(f func(uintptr)) error { *c.n++; return c.RawConn.Control(f) }

func TestSweepSeesEachRelayWhileOthersComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, Config{Idle: time.Minute})
		start := time.Now()
		var hs []*recorder
		var conns []net.Conn
		for i := range 2*sweepBatch + 10 {
			client, server, h, r := joinPipes(e, nil)
			conns = append(conns, client, server)
			if i%3 == 0 {
				r.Abort(nil)
				h.wait(t)
				continue
			}
			hs = append(hs, h)
		}
		for _, h := range hs {
			if o := h.wait(t); o.Err != errIdle {
				t.Fatalf("%+v", o)
			}
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("after %v", took)
		}
		for _, c := range conns {
			c.Close()
		}
		if len(e.relays) != 0 {
			t.Errorf("%d relays are left", len(e.relays))
		}
	})
}

// The relay's bytes have moved since the sweep read the clock.
func TestLongestIdleTimeEndsNoBusyRelay(t *testing.T) {
	e := NewEngine(Config{Idle: math.MaxInt64})
	r := &Relay{}
	r.last.Store(int64(time.Hour) + 1)
	if left := e.look(r, int64(time.Hour)); left <= 0 || r.condemned {
		t.Errorf("%v is left, condemned: %v", left, r.condemned)
	}
}

func TestSweepPeriod(t *testing.T) {
	for _, row := range []struct {
		idle      time.Duration
		keepAlive bool
		want      time.Duration
	}{
		{0, true, keepAliveAge},
		{-1, true, keepAliveAge},
		{4 * time.Second, true, time.Second + 1},
		{4 * time.Second, false, time.Second + 1},
		{time.Hour, true, keepAliveAge},
		{time.Hour, false, time.Hour/4 + 1},
	} {
		c := Config{Idle: row.idle, KeepAlive: row.keepAlive}
		if got := c.SweepPeriod(); got != row.want {
			t.Errorf("%+v: %v, want %v", c, got, row.want)
		}
	}
}

// A burst of relays does not hold memory once it is over.
func TestListOfRelaysShrinks(t *testing.T) {
	var e Engine
	for range 5000 {
		e.add(new(Relay))
	}
	most := cap(e.relays)
	for len(e.relays) > 0 {
		e.remove(e.relays[len(e.relays)/2])
		for i, r := range e.relays {
			if r.index != i {
				t.Fatalf("the relay at %d has the index %d", i, r.index)
			}
		}
		if len(e.relays) == most/2 && cap(e.relays) < most {
			t.Error("it shrinks while half of it is in use")
		}
	}
	if n := cap(e.relays); n == 0 || n > 1024 {
		t.Errorf("there is room for %d relays, want at most 1024", n)
	}
}

func TestEngineAtRestHasNoTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := NewEngine(Config{Idle: time.Minute, KeepAlive: true})
		client, server, h, r := joinPipes(e, nil)
		r.Abort(nil)
		h.wait(t)
		time.Sleep(time.Hour)
		e.mu.Lock()
		if e.timer != nil {
			t.Error("the timer runs")
		}
		e.mu.Unlock()
		client.Close()
		server.Close()
		_, _, h, r = joinPipes(e, nil)
		r.Abort(nil)
		h.wait(t)
		e.Close() // with the timer running
		if e.timer != nil {
			t.Error("the timer runs")
		}
		e = newEngine(t, Config{}) // which has nothing to sweep for
		_, _, h, r = joinPipes(e, nil)
		if e.timer != nil {
			t.Error("there is a timer")
		}
		r.Abort(nil)
		h.wait(t)
	})
}
