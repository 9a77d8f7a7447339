package relay

import (
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// FuzzRelay has a client and a server read, write, end and break their streams as a schedule says,
// in any order, also before there is a server, and while the handler slows or cuts them. It is all
// in memory, in a time of its own, so that a schedule does the same each time.
//
// The oracle compares the two ends. Received bytes equal the sent ones; a stream that looks
// complete is complete; bytes read from a side that failed arrive nevertheless; the Outcome and the
// handler's calls agree with the events.
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
			run := fuzzRun{t: t, schedule: schedule[:min(len(schedule), 300)],
				failed: map[Side]bool{}, causes: map[error]bool{}}
			run.run()
		})
	})
}

const (
	fuzzIdle = time.Minute
	fuzzMost = 3*LargeBuffer + 7 // bytes at once
)

var (
	errFuzzAbort = errors.New("abort")
	errFuzzLimit = errors.New("limit")
)

// A fuzzRun is one relay and the steps that it is put through.
type fuzzRun struct {
	t              *testing.T
	schedule       []byte
	client, server *fuzzEnd
	relay          *Relay
	limit          *fuzzLimit
	dialled        atomic.Bool

	slept  time.Duration
	failed map[Side]bool  // sides that were broken; each may be what ends the relay
	causes map[error]bool // and what else may
	// debt is owed to debtor after the other has reset its stream, if nothing else happens.
	debtor *fuzzEnd
	debt   int64
}

// next is the next choice in the schedule: one of 0 to n-1, and 0 if there are no more.
func (f *fuzzRun) next(n int) int {
	if len(f.schedule) == 0 {
		return 0
	}
	c := int(f.schedule[0]) % n
	f.schedule = f.schedule[1:]
	return c
}

func (f *fuzzRun) run() {
	client, ours := proxytest.Pipe()
	theirs, server := proxytest.Pipe()
	f.client, f.server = newFuzzEnd(client), newFuzzEnd(server)
	busy := f.next(4) // both cannot be: they would wait for each other
	f.client.start(f.server, busy == 1)
	f.server.start(f.client, busy == 2)
	dialTime := []time.Duration{0, 0, time.Millisecond, 700 * time.Millisecond}[f.next(4)]
	f.limit = newFuzzLimit(f.next(8), f.next(256))
	chunk := []int{0, 0, 1, 4096}[f.next(4)]
	h := newRecorder(f.limit.moved)
	e := NewEngine(Config{Idle: fuzzIdle, IdleErr: errIdle, KeepAlive: f.next(2) == 1})
	f.relay = e.Start(ours, h, chunk)
	var dialling sync.WaitGroup
	dialling.Go(func() {
		select {
		case <-time.After(dialTime):
			f.dialled.Store(f.relay.Connect(theirs))
		case cause := <-h.over:
			h.over <- cause
			f.relay.Connect(nil)
		}
	})
	synctest.Wait()
	for len(f.schedule) > 0 {
		f.step()
		synctest.Wait()
	}
	start := time.Now()
	f.client.finish()
	f.server.finish()
	o := <-h.done
	if took := time.Since(start); f.limit.wait == 0 && took > dialTime+2*LingerTime {
		f.t.Errorf("with both ends reading and at their ends it took %v: %+v", took, o)
	}
	dialling.Wait()
	if !f.dialled.Load() {
		theirs.Close() // nobody else would
	}
	f.client.wait()
	f.server.wait()
	e.Close()
	h.check(f.t, o)
	f.check(o)
}

// step does the next thing in the schedule.
func (f *fuzzRun) step() {
	op := f.next(64)
	end, other, side := f.client, f.server, Client
	if op&1 == 1 {
		end, other, side = f.server, f.client, Server
	}
	sizes := []int{1, 2, 100, SmallBuffer, SmallBuffer + 1, LargeBuffer, fuzzMost}
	switch op /= 2; {
	case op < 10:
		size := sizes[f.next(len(sizes))]
		end.asked += int64(size)
		end.writes <- size
	case op < 21:
		end.reads <- -sizes[f.next(len(sizes))]
	case op < 24:
		end.writes <- 0
	case op < 26:
		d := []time.Duration{time.Millisecond, 100 * time.Millisecond, time.Second,
			fuzzIdle / 2, fuzzIdle + time.Second}[f.next(5)]
		f.slept += d
		f.debtor = nil
		time.Sleep(d)
	case op < 29 && !end.broken:
		reset := op < 28
		f.debtor = nil
		if reset && len(f.failed)+len(f.causes) == 0 && f.dialled.Load() && end.asked == end.sent {
			f.debtor, f.debt = other, end.sent
		}
		f.failed[side] = true
		end.breakOff(reset)
	case op >= 29 && f.next(4) == 0:
		f.debtor = nil
		f.causes[errFuzzAbort] = true
		start := time.Now()
		f.relay.Abort(errFuzzAbort)
		if took := time.Since(start); took > 0 {
			f.t.Errorf("Abort took %v", took)
		}
	}
}

// check compares what the ends have seen with each other, and with the Outcome.
func (f *fuzzRun) check(got Outcome) {
	t, client, server := f.t, f.client, f.server
	client.check(t, "client")
	if f.dialled.Load() {
		server.check(t, "server")
	}
	if got.Sent != server.got || got.Received != client.got {
		t.Errorf("the ends got %d and %d bytes: %+v", server.got, client.got, got)
	}
	if f.limit.exceeded.Load() {
		if len(f.failed)+len(f.causes) == 0 && f.slept < fuzzIdle && got.Err != errFuzzLimit {
			t.Errorf("it goes on beyond the limit: %+v", got)
		}
		f.causes[errFuzzLimit] = true
	}
	switch {
	case got.Panic != nil || got.Quiet:
		t.Errorf("%+v", got)
	case got.Err == nil:
		if !client.ended.Load() || !server.ended.Load() || client.sent != server.got ||
			server.sent != client.got {
			t.Errorf("not all was done: %+v, the client sent %d and got %d, the server %d and %d",
				got, client.sent, client.got, server.sent, server.got)
		}
	case got.Err == errIdle:
		if f.slept < fuzzIdle {
			t.Errorf("idle within %v: %+v", f.slept, got)
		}
	case got.Failed != NoSide:
		if !f.failed[got.Failed] {
			t.Errorf("that side has not failed: %+v", got)
		}
	case !f.causes[got.Err]:
		t.Errorf("nobody has done that: %+v", got)
	}
	if len(f.failed)+len(f.causes) == 0 && f.slept < fuzzIdle && got.Err != nil {
		t.Errorf("nothing was wrong: %+v", got)
	}
	if f.debtor != nil && f.limit.kind == 0 && f.slept < fuzzIdle && f.debtor.got != f.debt {
		t.Errorf("before the reset %d bytes were read, %d have arrived: %+v", f.debt,
			f.debtor.got, got)
	}
}

// A fuzzEnd is a client or a server. It takes orders, one after the other: write so many bytes,
// read up to so many (a negative number), or end the stream (0). It also reads while it writes,
// unless it is busy.
type fuzzEnd struct {
	conn          *proxytest.PipeConn
	other         *fuzzEnd
	writes, reads chan int // the same one if it is busy; when it is closed, the rest is read
	wg            sync.WaitGroup

	asked, sent int64       // bytes to be written, and those that somebody has read
	ended       atomic.Bool // its stream is whole, and said to be
	broken      bool        // it has closed or reset its conn
	buf         []byte
	got         int64
	readErr     error
	problem     string // what its reader found wrong
}

func newFuzzEnd(c *proxytest.PipeConn) *fuzzEnd {
	return &fuzzEnd{conn: c, writes: make(chan int, 400), reads: make(chan int, 400),
		buf: make([]byte, fuzzMost)}
}

func (e *fuzzEnd) start(other *fuzzEnd, busy bool) {
	e.other = other
	if busy {
		e.reads = e.writes
	} else {
		e.wg.Go(func() { e.do(e.writes) })
	}
	e.wg.Go(func() {
		e.do(e.reads)
		for e.readErr == nil {
			e.read(fuzzMost)
		}
	})
}

func (e *fuzzEnd) do(told <-chan int) {
	for size := range told {
		switch {
		case size > 0:
			for end := e.sent + int64(size); e.sent < end; {
				n, err := e.conn.Write(pattern.At(e.sent, int(end-e.sent)))
				if e.sent += int64(n); err != nil {
					break
				}
			}
		case size < 0 && e.readErr == nil:
			e.read(-size)
		case size == 0 && !e.broken:
			e.ended.Store(true)
			e.conn.CloseWrite()
		}
	}
}

func (e *fuzzEnd) read(most int) {
	n, err := e.conn.Read(e.buf[:most])
	if wrong := pattern.Check(e.got, e.buf[:n]); wrong != nil {
		e.problem = wrong.Error()
	}
	e.got += int64(n)
	if err == io.EOF && !e.other.ended.Load() {
		e.problem = "was told of the end of a stream that has not ended"
	}
	if err == io.EOF && e.got != e.other.sent {
		e.problem = "takes a part of a stream for all of it"
	}
	e.readErr = err
}

// breakOff resets the conn, or closes it.
func (e *fuzzEnd) breakOff(reset bool) {
	e.broken = true
	if reset {
		e.conn.SetLinger(0)
	} else {
		e.ended.Store(true) // this is how TCP says both
	}
	e.conn.Close()
}

// finish brings the end to its end.
func (e *fuzzEnd) finish() {
	e.writes <- 0
	close(e.writes)
	if e.reads != e.writes {
		close(e.reads)
	}
}

func (e *fuzzEnd) wait() {
	e.wg.Wait()
	e.conn.Close()
}

func (e *fuzzEnd) check(t *testing.T, name string) {
	if e.problem != "" {
		t.Errorf("the %s: %s", name, e.problem)
	}
}

// A fuzzLimit slows or cuts a relay, or only chooses chunks.
type fuzzLimit struct {
	kind     int // 0: none
	wait     time.Duration
	chunk    int
	cutAt    int64 // the call that is one too many; 0: none is
	calls    atomic.Int64
	exceeded atomic.Bool
}

func newFuzzLimit(kind, how int) *fuzzLimit {
	switch l := (&fuzzLimit{kind: kind - 3}); kind {
	case 4:
		l.wait = time.Duration(how) * time.Millisecond / 4
		return l
	case 5:
		l.cutAt = int64(1 + how%16)
		return l
	case 6:
		l.chunk = 64 + how*300
		return l
	}
	return &fuzzLimit{}
}

func (l *fuzzLimit) moved(Side, int) Verdict {
	if l.cutAt > 0 && l.calls.Add(1) >= l.cutAt {
		l.exceeded.Store(true)
		return Verdict{Err: errFuzzLimit}
	}
	return Verdict{Wait: l.wait, Chunk: l.chunk}
}
