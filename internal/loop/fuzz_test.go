//go:build linux && !lbproxy_portable

package loop

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// FuzzSession makes a client and a server write, end and break their streams as a schedule says,
// over sockets. Sessions go back and forth between loops. When one leaves, a relay goes on with it.
// It is the counterpart of relay's FuzzRelay, which runs in memory. Behind sockets less
// can be checked: each end has received a prefix of the other's bytes; a stream that looks whole is
// whole; and if nothing was broken, every byte has arrived.
func FuzzSession(f *testing.F) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 24 {
		schedule := make([]byte, 60)
		for i := range schedule {
			schedule[i] = byte(random.Uint32())
		}
		f.Add(schedule)
	}
	g, err := NewGroup(relay.Config{}, 2)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(g.Close)
	f.Fuzz(func(t *testing.T, schedule []byte) { fuzzOnce(t, g, schedule[:min(len(schedule), 120)]) })
}

func fuzzOnce(t *testing.T, g *Group, schedule []byte) {
	e := relay.NewEngine(relay.Config{})
	defer e.Close()
	l := proxytest.Listen(t)
	h := &recorder{targets: []netip.AddrPort{addrOf(l)}}
	if len(schedule) > 0 && schedule[0]%3 == 0 {
		h.verdict = briefVerdict(schedule)
	}
	if len(schedule) > 1 && schedule[1]%2 == 0 {
		h.onMoved = func() { sendAway(g, h.session) }
	}
	client := start(t, g, h)
	server, err := l.AcceptTCP()
	proxytest.Must(t, err)
	server.SetDeadline(time.Now().Add(proxytest.Patience))
	outcome := make(chan relay.Outcome, 1)
	go func() {
		select {
		case o := <-h.done:
			outcome <- o
		case fds := <-h.left:
			after := &relayed{done: make(chan relay.Outcome, 1)}
			h.goOn(e, fds, after)
			o := <-after.done
			sent, received := h.session.Counts()
			o.Sent, o.Received = o.Sent+sent, o.Received+received
			outcome <- o
		}
	}()
	ends := [2]*fuzzEnd{newFuzzEnd(client, 1), newFuzzEnd(server, 2)}
	ends[0].other, ends[1].other = ends[1], ends[0]
	for _, c := range ends {
		c.working.Go(c.write)
		c.working.Go(c.read)
	}
	aborted := false
	for len(schedule) > 0 {
		c, op := ends[schedule[0]&1], schedule[0]/2%32
		schedule = schedule[1:]
		switch {
		case op < 20:
			sizes := []int{1, 2, 100, relay.SmallBuffer, relay.SmallBuffer + 1, bufferSize, 5*bufferSize + 7}
			c.writes <- sizes[int(op)%len(sizes)]
		case op < 26:
			time.Sleep(time.Duration(op%4) * time.Millisecond)
		case op < 28:
			c.writes <- 0
		case op < 29:
			c.slow.Store(int32(op) % 3)
		case op == 30:
			c.broken.Store(true)
			c.conn.SetLinger(0)
			c.conn.Close()
		case op == 31 && len(schedule)%8 == 0:
			aborted = true
			h.session.Abort(errAborted)
		}
	}
	for _, c := range ends {
		c.writes <- 0
		close(c.writes)
	}
	for _, c := range ends {
		c.working.Wait()
		c.conn.Close()
	}
	o := proxytest.Receive(t, "the end", outcome)
	harm := aborted || ends[0].broken.Load() || ends[1].broken.Load()
	for i, c := range ends {
		if c.problem != nil && !(harm && c.writeFailed.Load() && errors.Is(c.problem, errNotWhole)) {
			t.Errorf("end %d: %v; %+v", i, c.problem, o)
		}
		if c.whole && c.got != c.other.sent && !c.writeFailed.Load() {
			t.Errorf("end %d takes %d bytes of %d for all: %+v", i, c.got, c.other.sent, o)
		}
		if !harm && c.got != c.other.sent {
			t.Errorf("end %d got %d bytes of %d: %+v", i, c.got, c.other.sent, o)
		}
	}
	switch {
	case !harm && (o.Err != nil || o.Sent != ends[1].got || o.Received != ends[0].got):
		t.Errorf("nothing was wrong: %+v", o)
	case o.Err == errNone && ends[1].broken.Load() && !o.Connected: // before the dial was over
	case o.Failed == relay.NoSide && o.Err != nil && !aborted:
		t.Errorf("nobody has done that: %+v", o)
	}
	if o.Sent < ends[1].got || o.Received < ends[0].got {
		t.Errorf("more has arrived than was sent: %d, %d, %+v", ends[1].got, ends[0].got, o)
	}
}

// briefVerdict returns verdicts with waits and chunks that depend on the schedule. They end after a
// while: chunks of some bytes could make a run last 10 seconds, which the fuzzer takes for a hang.
func briefVerdict(schedule []byte) func(int) relay.Verdict {
	i := 0
	return func(int) relay.Verdict {
		if i == 500 {
			return relay.Verdict{}
		}
		b := int(schedule[i%len(schedule)])
		i++
		return relay.Verdict{Wait: time.Duration(b%5-2) * time.Millisecond, Chunk: b * b * b}
	}
}

var errNotWhole = errors.New("an end before all has come")

// A fuzzEnd is a client or a server.
type fuzzEnd struct {
	conn        *net.TCPConn
	other       *fuzzEnd
	out         proxytest.Pattern
	writes      chan int // sizes; 0: the end of the stream
	working     sync.WaitGroup
	sent        int64 // by write
	ended       atomic.Bool
	broken      atomic.Bool
	writeFailed atomic.Bool  // a write that meets a reset takes the error: a read then sees an end
	slow        atomic.Int32 // milliseconds between reads
	got         int64        // by read
	whole       bool         // it looks so
	problem     error
}

func newFuzzEnd(c *net.TCPConn, out proxytest.Pattern) *fuzzEnd {
	return &fuzzEnd{conn: c, out: out, writes: make(chan int, 200)}
}

func (e *fuzzEnd) write() {
	for size := range e.writes {
		switch {
		case e.ended.Load() || e.writeFailed.Load():
		case size == 0:
			e.ended.Store(true)
			if e.conn.CloseWrite() != nil {
				e.writeFailed.Store(true)
			}
		default:
			for end := e.sent + int64(size); e.sent < end && !e.writeFailed.Load(); {
				n, err := e.conn.Write(e.out.At(e.sent, int(end-e.sent)))
				e.sent += int64(n)
				e.writeFailed.Store(err != nil)
			}
		}
	}
}

func (e *fuzzEnd) read() {
	b := make([]byte, bufferSize)
	for {
		time.Sleep(time.Duration(e.slow.Load()) * time.Millisecond)
		n, err := e.conn.Read(b)
		if wrong := e.other.out.Check(e.got, b[:n]); wrong != nil {
			e.problem = wrong
		}
		e.got += int64(n)
		if e.whole = err == io.EOF; e.whole && !e.other.ended.Load() {
			e.problem = errNotWhole
		}
		if err != nil {
			return
		}
	}
}
