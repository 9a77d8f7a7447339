//go:build linux

package soak

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

const (
	patience = 30 * time.Second // how long a connection may take, all in all
	giveUp   = 2 * patience     // and what it gets, for a machine that is busy with other things
)

var (
	errCanceled = errors.New("soak: canceled")
	errReset    = errors.New("reset, as the socket's state tells")
	errCut      = errors.New("the end of TCP without the end of TLS")
)

// A conn is a connection under test: its plan and its state.
type conn struct {
	*plan
	up, down     end           // the client's end and the upstream's
	seen         atomic.Bool   // an upstream has it
	clientDone   chan struct{} // closed when up is complete
	upstreamDone chan struct{} // closed when down is complete
	outcome      chan outcome  // the proxy's result
	results      atomic.Int32  // the number of results
	abort        func(error)
	dials        atomic.Int32
	audit        audit
	started      time.Time
	holding      time.Time // when the client had all it was to have, and began to wait
	ended        time.Time // when the client's stream ended
	// the machine was busy elsewhere: what has to be done within a second may not have been
	late        bool
	dropsBefore uint64 // droppedSegments at most a second before started
	drops       uint64 // segments that the system has dropped since, of any connection
}

func newConn(p *plan) *conn {
	c := &conn{plan: p, clientDone: make(chan struct{}), upstreamDone: make(chan struct{}),
		outcome: make(chan outcome, 1)}
	c.up = end{conn: c, out: streamOf(p.id, fromClient), in: streamOf(p.id, fromUpstream)}
	c.down = end{conn: c, out: streamOf(p.id, fromUpstream), in: streamOf(p.id, fromClient)}
	return c
}

func (c *conn) took() time.Duration { return c.ended.Sub(c.started) }

// An outcome is the proxy's result of a connection.
type outcome struct {
	end            string
	err            error // plain only
	attempts       int   // plain only
	sent, received int64
}

// limited reports whether the connection was over a limit.
func (o *outcome) limited() bool { return o.end == string(lbproxy.EndRateLimited) }

// An end is one end of a connection.
type end struct {
	conn    *conn
	net     net.Conn // for reads and writes: tcp, or TLS over it
	tcp     *net.TCPConn
	out, in proxytest.Pattern

	// These belong to the goroutine that sends.
	offered, sent int64 // bytes given to Write, and taken
	writeErr      error
	faultAt       time.Time // when this end reset or cut it
	flooded       bool      // a flood did not end

	finished atomic.Bool // its stream was ended as it should be

	// These belong to the goroutine that receives.
	got     int64
	readErr error
	readEnd time.Time // when readErr came
	wrong   string    // what was wrong with a byte
}

// play runs scripts at the same time, to their ends.
func (e *end) play(scripts []script) {
	var wg sync.WaitGroup
	for _, s := range scripts[1:] {
		wg.Go(func() { e.run(s) })
	}
	e.run(scripts[0])
	wg.Wait()
}

func (e *end) run(s script) {
	unsendable := false
	for i, step := range s {
		if unsendable && step.op != recvEnd {
			continue
		}
		switch step.op {
		case send:
			unsendable = !e.send(step.n)
		case recv:
			if !e.recv(step.n) {
				return
			}
		case recvEnd:
			if e == &e.conn.up && i == len(s)-1 {
				e.conn.holding = time.Now()
			}
			for e.recv(64 << 10) {
			}
		case fin:
			e.finished.Store(true) // before the system knows, for recv asks in the other order
			e.writeErr = e.net.(interface{ CloseWrite() error }).CloseWrite()
			e.finished.Store(e.writeErr == nil)
		case pause:
			time.Sleep(time.Duration(step.n) * time.Millisecond)
		case flush:
			for late := time.Now().Add(giveUp); unsent(e.tcp) > 0 && time.Now().Before(late); {
				time.Sleep(200 * time.Microsecond)
			}
		case reset:
			e.faultAt = time.Now()
			e.tcp.SetLinger(0)
			e.tcp.Close()
			return
		case cut:
			e.faultAt = time.Now()
			e.tcp.CloseWrite()
		case shut:
			e.finished.Store(true)
			e.net.Close()
			return
		case flood:
			for e.send(256 << 10) {
				// More than the proxy discards in the second that an answer has to leave.
				if int64(e.sent) > 8<<30 {
					e.flooded = true
					return
				}
			}
		case hold:
			<-e.conn.clientDone
		case cancel:
			e.conn.abort(errCanceled)
		}
	}
}

// send sends n bytes in the plan's pieces and reports whether it could.
func (e *end) send(n int) bool {
	for writes := 0; n > 0; writes++ {
		piece := e.conn.piece
		switch {
		case writes > 500, piece == 0, piece == -1 && writes%2 == 1: // small ones take their time
			piece = 256 << 10
		case piece == -1:
			piece = 1
		}
		b := e.out.At(e.sent, min(piece, n))
		e.offered += int64(len(b))
		m, err := e.net.Write(b)
		e.sent += int64(m)
		if err != nil {
			e.writeErr = err
			return false
		}
		n -= len(b)
	}
	return true
}

var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// recv receives n bytes, or 64 KiB if that is less, and reports whether it could and they were
// right.
func (e *end) recv(n int) bool {
	buffer := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(buffer)
	for n > 0 {
		m, err := e.net.Read(buffer[:min(n, len(buffer))])
		if wrong := e.in.Check(e.got, buffer[:m]); wrong != nil {
			e.wrong = wrong.Error()
			e.readErr = errors.New("wrong bytes")
			return false
		}
		e.got += int64(m)
		n -= m
		if err != nil {
			if err == io.EOF && e.net == net.Conn(e.tcp) && wasReset(e.tcp) && !e.finished.Load() {
				err = errReset
			}
			e.readErr, e.readEnd = err, time.Now()
			return false
		}
	}
	return true
}

// overTLS makes e speak TLS.
func (e *end) overTLS(layer func(net.Conn, *tls.Config) *tls.Conn, conf *tls.Config) error {
	raw := &noter{Conn: e.tcp}
	t := layer(raw, conf)
	e.net = &noted{t, raw}
	return t.Handshake()
}

// A noter notes that TCP has ended, which crypto/tls takes for the end that the peer meant.
type noter struct {
	net.Conn
	ended bool // belongs to the reader
}

func (c *noter) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.ended = c.ended || n == 0 && err == io.EOF
	return n, err
}

type noted struct {
	*tls.Conn
	raw *noter
}

func (c *noted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF && c.raw.ended {
		err = errCut
	}
	return n, err
}

// faults is a list of faults found.
type faults []string

func (f *faults) add(format string, args ...any) { *f = append(*f, fmt.Sprintf(format, args...)) }

// judge lists all faults of c, which has ended at both ends, or never reached an upstream.
func (c *conn) judge(o *outcome) (wrong faults) {
	clientEnd, upstreamEnd, reach := c.clientEnd, c.upstreamEnd, c.reach
	if c.kind == someLimit {
		clientEnd, upstreamEnd, reach = whole, whole, surely
		if o.limited() {
			clientEnd, upstreamEnd, reach = refused, refused, never
		}
	}
	seen := c.seen.Load()
	if reach == surely && !seen {
		wrong.add("no upstream has seen it")
	} else if reach == never && seen {
		wrong.add("an upstream has seen it")
	}
	wrong = append(wrong, c.up.judge("client", clientEnd, &c.down)...)
	if seen {
		wrong = append(wrong, c.down.judge("upstream", upstreamEnd, &c.up)...)
	}
	if !slices.Contains(c.ends, o.end) {
		wrong.add("the proxy calls its end %q (%v), want one of %q", o.end, o.err, c.ends)
	}
	if clientEnd == whole && upstreamEnd == whole && seen {
		hello := int64(0)
		if c.app == "greet" {
			hello = int64(len(greeting))
		}
		if o.sent != headerSize+c.down.got || o.received != hello+c.up.got {
			wrong.add("the proxy counts %d bytes to and %d from the upstream, want %d and %d",
				o.sent, o.received, headerSize+c.down.got, hello+c.up.got)
		}
		if c.mtls {
			return wrong
		}
		least := 1
		if c.kind != slowDial {
			least += c.dialFaults
		}
		if o.err != nil || o.attempts < least {
			wrong.add("%d dials, error %v", o.attempts, o.err)
		}
	}
	switch {
	case c.kind == canceled && !errors.Is(o.err, errCanceled),
		c.kind == overLimit && !errors.Is(o.err, lbproxy.ErrRateLimited),
		c.kind == stall && !c.mtls && !errors.Is(o.err, lbproxy.ErrIdleTimeout):
		wrong.add("the proxy says %v", o.err)
	case c.kind == refuseAll && o.attempts != dialUpstreams,
		c.kind == noDescriptors && o.attempts != 1:
		wrong.add("%d dials", o.attempts)
	}
	return append(wrong, c.audit.judge(o)...)
}

// judge lists the faults of the stream that e has received from peer.
func (e *end) judge(name string, want verdict, peer *end) (wrong faults) {
	note := func(format string, args ...any) {
		wrong.add("%s: received %d of the %d bytes sent (%d tried), then %v; sent %d of %d, then %v: %s",
			name, e.got, peer.sent, peer.offered, e.readErr, e.sent, e.offered, e.writeErr,
			fmt.Sprintf(format, args...))
	}
	clean := e.readErr == io.EOF
	switch {
	case e.wrong != "":
		note("wrong bytes: %s", e.wrong)
	case errors.Is(e.readErr, os.ErrDeadlineExceeded), errors.Is(e.writeErr, os.ErrDeadlineExceeded):
		note("took more than %v", giveUp)
	case e.got > peer.offered:
		note("more than was sent")
	case clean && (!peer.finished.Load() || e.got != peer.sent):
		note("a clean end of what is not whole")
	case e.flooded, e.conn.floods && !peer.conn.floodFailed():
		note("nothing kept it from sending to who is not there")
	case want == whole && (!clean || e.writeErr != nil ||
		e.sent != sends(e.scripts()) || e.got != sends(peer.scripts())):
		note("want %d bytes each way whole, and a clean end", sends(peer.scripts()))
	case (want == broken || want == refused) && (clean || e.readErr == nil):
		note("want an end that is not clean")
	case want == broken && e.conn.exact && !e.conn.late && e.got != peer.sent:
		note("want all of what was sent before the fault; the end came %v after it, "+
			"and meanwhile the system dropped %d segments of all connections",
			e.readEnd.Sub(peer.faultAt), e.conn.drops)
	case want == refused && e.got > 0:
		note("want nothing")
	}
	return wrong
}

func (e *end) scripts() []script {
	if e == &e.conn.up {
		return e.conn.client
	}
	return e.conn.upstream
}

// floodFailed reports whether a flood ended as it must, by an error.
func (c *conn) floodFailed() bool {
	if c.client[0][0].op == flood {
		return c.up.writeErr != nil
	}
	return c.down.writeErr != nil
}

// An audit is a RateLimitManager that lets another one decide, keeps accounts of its events, and
// may cut the connection.
type audit struct {
	lbproxy.RateLimitManager       // nil: none was asked
	cutAt                    int64 // bytes

	mu             sync.Mutex
	opens, closes  int
	sent, received int64
}

func (a *audit) Report(ctx context.Context, e lbproxy.Event) lbproxy.Decision {
	d := a.RateLimitManager.Report(ctx, e)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch e.Kind {
	case lbproxy.EventOpen:
		if !d.Exceeded {
			a.opens++
		}
	case lbproxy.EventData:
		if e.Direction == lbproxy.Upload {
			a.sent += e.Bytes
		} else {
			a.received += e.Bytes
		}
		if a.cutAt > 0 && a.sent+a.received >= a.cutAt {
			d.Exceeded = true
		}
	case lbproxy.EventClose:
		a.closes++
	}
	return d
}

// judge lists the faults of the events of a connection with outcome o.
func (a *audit) judge(o *outcome) (wrong faults) {
	if a.RateLimitManager == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.opens != a.closes || a.opens > 1 {
		wrong.add("its limit was told of %d times opened, %d times closed", a.opens, a.closes)
	}
	if a.sent != o.sent || a.received != o.received {
		wrong.add("its limit was told of %d and %d bytes, its result of %d and %d",
			a.sent, a.received, o.sent, o.received)
	}
	return wrong
}
