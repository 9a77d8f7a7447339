package lbproxy

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// FuzzRelay has a client and an upstream read, write, end and break their streams as a schedule says, in any order, also
// while the upstream is dialled and while a RateLimitManager slows or cuts them. It is all in memory, in a time of its
// own, so that a schedule does the same each time.
//
// The oracle is what the two ends know together: what one got is what the other sent; a stream that looks whole is
// whole; what was read from a side that failed arrives nevertheless; the Result and the events say what happened.
func FuzzRelay(f *testing.F) {
	random := rand.New(rand.NewPCG(7, 8))
	for range 16 {
		schedule := make([]byte, 120)
		for i := range schedule {
			schedule[i] = byte(random.Uint32())
		}
		f.Add(schedule)
	}
	f.Fuzz(func(t *testing.T, schedule []byte) {
		synctest.Test(t, func(t *testing.T) {
			r := relayRun{t: t, schedule: schedule[:min(len(schedule), 300)], causes: map[EndReason]bool{}}
			r.run()
		})
	})
}

const (
	relayIdle = time.Minute
	relayMost = 3*largeBuffer + 7 // bytes at once
)

// A relayRun is one connection and what is done to it.
type relayRun struct {
	t                *testing.T
	schedule         []byte
	client, upstream *relayEnd
	dialled          atomic.Bool
	limit            *relayLimit
	app              *LBProxyApp
	cancel           context.CancelFunc

	slept  time.Duration
	causes map[EndReason]bool // of those that have been given, each may end the session
	// What is owed to one end after the other has reset its stream, if nothing else happens.
	debtor *relayEnd
	debt   int
}

// next is the next choice in the schedule: one of 0 to n-1, and 0 if there are no more.
func (r *relayRun) next(n int) int {
	if len(r.schedule) == 0 {
		return 0
	}
	c := int(r.schedule[0]) % n
	r.schedule = r.schedule[1:]
	return c
}

func (r *relayRun) run() {
	client, ours := duplex()
	theirs, upstream := duplex()
	r.client, r.upstream = newRelayEnd(client), newRelayEnd(upstream)
	busy := r.next(4) // both cannot be: they would wait for each other
	r.client.start(r.upstream, busy == 1)
	r.upstream.start(r.client, busy == 2)
	dialTime := []time.Duration{0, 0, time.Millisecond, 700 * time.Millisecond}[r.next(4)]
	app, err := New("fuzz", []Upstream{{Addr: "u:1"}}, &Options{
		Logger: quiet, IdleTimeout: relayIdle,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			select {
			case <-time.After(dialTime):
				r.dialled.Store(true)
				return theirs, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	var ctx context.Context
	r.app = app
	ctx, r.cancel = context.WithCancel(r.t.Context())
	defer r.cancel()
	conn := Conn{Client: ours}
	if r.limit = newRelayLimit(r.next(8), r.next(256)); r.limit != nil {
		conn.RateLimit = r.limit
	}
	var result Result
	var serving sync.WaitGroup
	serving.Go(func() { result, _ = app.ServeConn(ctx, conn) })
	synctest.Wait()
	for len(r.schedule) > 0 {
		r.step()
		synctest.Wait()
	}
	start := time.Now()
	r.client.finish()
	r.upstream.finish()
	serving.Wait()
	if took := time.Since(start); r.limit == nil && took > dialTime+2*lingerTime {
		r.t.Errorf("with both ends reading and at their ends it took %v: %+v", took, result)
	}
	if !r.dialled.Load() {
		theirs.Close() // nobody else would
	}
	r.client.wait()
	r.upstream.wait()
	app.Close()
	r.check(result)
}

// step does the next thing in the schedule.
func (r *relayRun) step() {
	op := r.next(64)
	end, other, failure := r.client, r.upstream, EndClientError
	if op&1 == 1 {
		end, other, failure = r.upstream, r.client, EndUpstreamError
	}
	sizes := []int{1, 2, 100, smallBuffer, smallBuffer + 1, largeBuffer, relayMost}
	switch op /= 2; op {
	case 0, 1, 2, 3, 4, 5, 6, 7, 8, 9:
		size := sizes[r.next(len(sizes))]
		end.asked += size
		end.writes <- size
	case 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20:
		end.reads <- -sizes[r.next(len(sizes))]
	case 21, 22, 23:
		end.writes <- 0
	case 24, 25:
		d := []time.Duration{time.Millisecond, 100 * time.Millisecond, time.Second, relayIdle / 2, relayIdle + time.Second}[r.next(5)]
		r.slept += d
		r.debtor = nil
		time.Sleep(d)
	case 26, 27:
		if !end.broken {
			r.debtor = nil
			if len(r.causes) == 0 && r.dialled.Load() && end.asked == end.sent {
				r.debtor, r.debt = other, end.sent
			}
			r.causes[failure] = true
			end.breakOff(true)
		}
	case 28:
		if !end.broken {
			r.debtor = nil
			r.causes[failure] = true
			end.breakOff(false)
		}
	case 29:
		if r.next(4) == 0 {
			r.debtor = nil
			r.causes[EndCanceled] = true
			r.cancel()
		}
	case 30:
		if r.next(4) == 0 {
			r.debtor = nil
			r.causes[EndClosed] = true
			start := time.Now()
			r.app.Close()
			if took := time.Since(start); took > 100*time.Millisecond {
				r.t.Errorf("Close took %v", took)
			}
		}
	}
}

// check compares what the ends have seen with each other, and with the Result and the events.
func (r *relayRun) check(got Result) {
	t, client, upstream := r.t, r.client, r.upstream
	client.check(t, "client")
	if r.dialled.Load() {
		upstream.check(t, "upstream")
	}
	if got.Sent != int64(upstream.got) || got.Received != int64(client.got) {
		t.Errorf("the ends got %d and %d bytes: %+v", upstream.got, client.got, got)
	}
	if r.limit != nil {
		r.limit.check(t, got)
		if r.limit.exceeded {
			if len(r.causes) == 0 && r.slept < relayIdle && got.End != EndRateLimited {
				t.Errorf("over the rate, and goes on: %+v", got)
			}
			r.causes[EndRateLimited] = true
		}
	}
	if (got.End == EndDone) != (got.Err == nil) {
		t.Errorf("an end and an error that do not go together: %+v", got)
	}
	switch {
	case got.End == EndDone:
		if !client.ended.Load() || !upstream.ended.Load() || client.sent != upstream.got || upstream.sent != client.got {
			t.Errorf("not all was done: %+v, the client sent %d and got %d, the upstream %d and %d",
				got, client.sent, client.got, upstream.sent, upstream.got)
		}
	case got.End == EndIdleTimeout:
		if r.slept < relayIdle {
			t.Errorf("idle within %v: %+v", r.slept, got)
		}
	case !r.causes[got.End]:
		t.Errorf("nobody has done that: %+v", got)
	}
	if len(r.causes) == 0 && r.slept < relayIdle && got.End != EndDone {
		t.Errorf("nothing was wrong: %+v", got)
	}
	if r.debtor != nil && r.limit == nil && r.slept < relayIdle && r.debtor.got != r.debt {
		t.Errorf("before the reset %d bytes were read, %d have arrived: %+v", r.debt, r.debtor.got, got)
	}
}

// A relayEnd is a client or an upstream. It is told to write so many bytes, to read up to so many (a negative number),
// or to end its stream (0), and does one thing after the other; but it reads while it writes, unless it is busy.
type relayEnd struct {
	conn          *duplexConn
	other         *relayEnd
	writes, reads chan int // the same one if it is busy; when it is closed, the rest is read
	wg            sync.WaitGroup

	asked, sent int         // bytes to be written, and those that somebody has read
	ended       atomic.Bool // its stream is whole, and said to be
	broken      bool        // it has closed or reset its conn
	buf         []byte
	got         int
	readErr     error
	problem     string // what its reader found wrong
}

func newRelayEnd(c *duplexConn) *relayEnd {
	return &relayEnd{conn: c, writes: make(chan int, 400), reads: make(chan int, 400), buf: make([]byte, relayMost)}
}

func (e *relayEnd) start(other *relayEnd, busy bool) {
	e.other = other
	if busy {
		e.reads = e.writes
	} else {
		e.wg.Go(func() { e.do(e.writes) })
	}
	e.wg.Go(func() {
		e.do(e.reads)
		for e.readErr == nil {
			e.read(relayMost)
		}
	})
}

func (e *relayEnd) do(told <-chan int) {
	for size := range told {
		switch {
		case size > 0:
			n, _ := e.conn.Write(relayBytes(e.sent, size))
			e.sent += n
		case size < 0 && e.readErr == nil:
			e.read(-size)
		case size == 0 && !e.broken:
			e.ended.Store(true)
			e.conn.CloseWrite()
		}
	}
}

func (e *relayEnd) read(most int) {
	n, err := e.conn.Read(e.buf[:most])
	if !bytes.Equal(e.buf[:n], relayBytes(e.got, n)) {
		e.problem = "got what was not sent"
	}
	e.got += n
	if err == io.EOF && !e.other.ended.Load() {
		e.problem = "was told of the end of a stream that has not ended"
	}
	if err == io.EOF && e.got != e.other.sent {
		e.problem = "takes a part of a stream for all of it"
	}
	e.readErr = err
}

// breakOff resets the conn, or closes it.
func (e *relayEnd) breakOff(reset bool) {
	e.broken = true
	if reset {
		e.conn.SetLinger(0)
	} else {
		e.ended.Store(true) // this is how TCP says both
	}
	e.conn.Close()
}

// finish has the end come to its end.
func (e *relayEnd) finish() {
	e.writes <- 0
	close(e.writes)
	if e.reads != e.writes {
		close(e.reads)
	}
}

func (e *relayEnd) wait() {
	e.wg.Wait()
	e.conn.Close()
}

func (e *relayEnd) check(t *testing.T, name string) {
	if e.problem != "" {
		t.Errorf("the %s %s", name, e.problem)
	}
}

// relayBytes are n bytes of a stream that begin at one place in it.
func relayBytes(at, n int) []byte {
	const period = 65_537 // prime: no buffer's size goes into it
	relayStream.Do(func() {
		once := make([]byte, period)
		rand.NewChaCha8([32]byte{'r'}).Read(once)
		relayStreamBytes = slices.Repeat(once, 5)
	})
	at %= period
	return relayStreamBytes[at : at+n]
}

var (
	relayStream      sync.Once
	relayStreamBytes []byte
)

// A relayLimit is a RateLimitManager that counts, and that slows or cuts one connection.
type relayLimit struct {
	refuse            bool
	openWait, wait    time.Duration
	cutAt             int // the data event that is one too many; 0: none is
	mu                sync.Mutex
	opened, closed, n int
	bytes             map[Direction]int64
	exceeded          bool
	late              bool // an event came before the opening, or after the close
}

func newRelayLimit(kind, how int) *relayLimit {
	l := &relayLimit{bytes: map[Direction]int64{}}
	switch kind {
	case 4:
		l.wait = time.Duration(how) * time.Millisecond / 4
	case 5:
		l.cutAt = 1 + how%16
	case 6:
		l.refuse = how < 64
	case 7:
		l.openWait = time.Duration(how) * 4 * time.Millisecond
	default:
		return nil
	}
	return l
}

func (l *relayLimit) Report(_ context.Context, e Event) Decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.late = l.late || l.opened > 0 == (e.Kind == EventOpen) || l.closed > 0
	switch e.Kind {
	case EventOpen:
		l.opened++
		l.exceeded = l.refuse
		return Decision{Exceeded: l.refuse, Wait: l.openWait}
	case EventData:
		l.n++
		l.bytes[e.Direction] += e.Bytes
		cut := l.cutAt > 0 && l.n >= l.cutAt
		l.exceeded = l.exceeded || cut
		return Decision{Exceeded: cut, Wait: l.wait}
	case EventClose:
		l.closed++
	}
	return Decision{}
}

func (l *relayLimit) check(t *testing.T, got Result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	closes := 1
	if l.refuse {
		closes = 0
	}
	if l.late || l.opened != 1 || l.closed != closes {
		t.Errorf("%d openings, %d closings, or in the wrong order", l.opened, l.closed)
	}
	if l.bytes[Upload] != got.Sent || l.bytes[Download] != got.Received {
		t.Errorf("events about %v bytes: %+v", l.bytes, got)
	}
}
