package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestPipesAreBoundedAndNoneIsLost(t *testing.T) {
	before := openPipes()
	var pool pipePool
	inUse := make([]*pipe, maxPipes)
	for range 2 { // once with new pipes, once with used ones
		for i := range inUse {
			if inUse[i] = pool.get(); inUse[i] == nil {
				t.Fatalf("no pipe when %d are in use", i)
			}
		}
		if pool.get() != nil {
			t.Errorf("more than %d pipes", maxPipes)
		}
		pool.drop(inUse[0]) // for which there may be another one
		for _, p := range inUse[1:] {
			pool.put(p)
		}
	}
	pool.mu.Lock()
	pool.spare = len(pool.free)
	pool.mu.Unlock()
	pool.trim()
	if n := pipesSince(before); n != 0 || pool.all != 0 {
		t.Errorf("trimmed: %d pipes are open, %d counted", n, pool.all)
	}
	late, early := pool.get(), pool.get()
	pool.put(early)
	pool.close()
	pool.put(late)
	if n := pipesSince(before); n != 0 {
		t.Errorf("closed: %d pipes are open", n)
	}
}

// What was written to a peer that has reset the connection is not waited for, and nothing more can be written.
func TestNothingIsUnsentToAPeerThatIsGone(t *testing.T) {
	l := listen(t)
	peer := dial(t, l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go c.Write(make([]byte, 64<<20)) // far more than the systems take
	for unsent(c) == 0 {
		runtime.Gosched()
	}
	peer.SetLinger(0)
	peer.Close()
	for reset := false; !reset; reset, _ = wasReset(c) {
		runtime.Gosched()
	}
	if n := unsent(c); n != 0 {
		t.Errorf("%d bytes are said to be on their way", n)
	}
	if n, err := direct(c).Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("writing: %d, %v; want an error", n, err)
	}
}

func TestNoPipeIsKeptWhenCloseReturns(t *testing.T) {
	enough := make(chan struct{})
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		for b := make([]byte, 1<<20); ; {
			select {
			case <-enough:
				return
			default:
				c.Write(b)
			}
		}
	}))
	c := dial(t, serve(t, a, nil))
	pipes := func() (all, free int) {
		a.pipes.mu.Lock()
		defer a.pipes.mu.Unlock()
		return a.pipes.all, len(a.pipes.free)
	}
	for all := 0; all == 0; all, _ = pipes() { // until it is taken for bulk, which takes two full reads in a row
		if _, err := io.CopyN(io.Discard, c, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	close(enough)
	io.Copy(io.Discard, c) // and the pipe is kept for a while
	a.Close()
	if _, free := pipes(); free > 0 {
		t.Errorf("%d pipes are kept", free)
	}
}

// A limit that does not slow a stream does not keep it from being spliced, and is told of each chunk.
func TestALimitLeavesBulkSpliced(t *testing.T) {
	const size = 64 << 20
	var j journal
	limit := All(&j, &Bandwidth{BytesPerSecond: 1 << 50}, &OpenLimit{Max: 1})
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) { sendPattern(c, size) }))
	c := dial(t, serve(t, a, func(context.Context, net.Conn) (context.Context, Conn, error) {
		return nil, Conn{RateLimit: limit}, nil
	}))
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	c.Close()
	if r := <-results; r.End != EndDone || r.Received != size {
		t.Errorf("%+v", r)
	}
	a.pipes.mu.Lock()
	defer a.pipes.mu.Unlock()
	if a.pipes.all == 0 {
		t.Error("no pipe was used")
	}
	sum := int64(0)
	for _, e := range j.events {
		sum += e.Bytes
	}
	if sum != size {
		t.Errorf("the limit was told of %d bytes, want %d", sum, size)
	}
}

// What a listener by Listen accepts has the keep-alive that net would give it.
func TestListenersConnectionsInheritKeepAlive(t *testing.T) {
	options := func(listen func() (net.Listener, error)) (got [4]int) {
		l, err := listen()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial(t, l.Addr().String())
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		rawTCP(c).Control(func(fd uintptr) {
			got[0], _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
			for i, name := range []int{syscall.TCP_KEEPIDLE, syscall.TCP_KEEPINTVL, syscall.TCP_KEEPCNT} {
				got[1+i], _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, name)
			}
		})
		return got
	}
	got := options(func() (net.Listener, error) { return Listen("127.0.0.1:0") })
	if want := options(func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }); got != want || want[0] != 1 {
		t.Errorf("on, idle, interval, count are %v, want %v", got, want)
	}
	if _, err := Listen("127.0.0.1:66000"); err == nil || !strings.Contains(err.Error(), "66000: invalid port") {
		t.Errorf("port 66000: %v", err)
	}
}

// The end of a stream fails as it does in net.
func TestCloseWriteOfWhatIsOver(t *testing.T) {
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer := dial(t, l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := newTCPWriter(c, rawTCP(c))
	peer.SetLinger(0)
	peer.Close()
	c.Read(make([]byte, 1)) // until it has been reset
	want := c.(*net.TCPConn).CloseWrite()
	if err := w.CloseWrite(); !errors.Is(err, syscall.ENOTCONN) || err.Error() != want.Error() {
		t.Errorf("reset: %v, want %v", err, want)
	}
	c.Close()
	if err := w.CloseWrite(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// A lateEnd has the upload write and end its stream at the very time when somebody asks what is below it.
type lateEnd struct {
	net.Conn
	writing, asked chan struct{}
	once           sync.Once
}

func (c *lateEnd) Write(b []byte) (int, error) {
	close(c.writing)
	<-c.asked
	return c.Conn.Write(b)
}

func (c *lateEnd) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

func (c *lateEnd) NetConn() net.Conn {
	c.once.Do(func() {
		close(c.asked)
		for over := false; !over; over, _ = wasReset(c.Conn) {
			runtime.Gosched()
		}
	})
	return c.Conn
}

func TestAnEndOfBothSidesIsNotTakenForAReset(t *testing.T) {
	writing := make(chan struct{})
	upstream := upstreamDoing(t, func(c *net.TCPConn) {
		<-writing
		c.CloseWrite()
		io.Copy(io.Discard, c)
	})
	a, results := newApp(t, Options{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		return &lateEnd{Conn: c, writing: writing, asked: make(chan struct{})}, err
	}}, upstream)
	c := dial(t, serve(t, a, nil))
	c.Write([]byte("x"))
	c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil {
		t.Errorf("client reads %q, %v; want the end", b, err)
	}
	if r := <-results; r.End != EndDone {
		t.Errorf("%+v", r)
	}
}

// A heldError takes the error of a reset in a write, which leaves reading with what looks like an end, but is late to
// return it.
type heldError struct {
	net.Conn
	writing, taken, release chan struct{}
}

func (c *heldError) Write(b []byte) (int, error) {
	close(c.writing)
	for reset := false; !reset; reset, _ = wasReset(c.Conn) {
		runtime.Gosched()
	}
	n, err := c.Conn.Write(b)
	close(c.taken)
	<-c.release
	return n, err
}

func (c *heldError) Read(b []byte) (int, error) {
	<-c.taken
	return c.Conn.Read(b)
}

func (c *heldError) NetConn() net.Conn { return c.Conn }

func TestAResetThatAWriteMetIsNotTakenForAnEnd(t *testing.T) {
	writing, release := make(chan struct{}), make(chan struct{})
	upstream := upstreamDoing(t, func(c *net.TCPConn) { <-writing; c.SetLinger(0) }) // and it is closed
	a, results := newApp(t, Options{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		return &heldError{Conn: c, writing: writing, taken: make(chan struct{}), release: release}, err
	}}, upstream)
	c := dial(t, serve(t, a, nil))
	c.Write([]byte("x"))
	if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client reads %q, %v; want a reset", b, err)
	}
	close(release)
	if r := <-results; r.End != EndUpstreamError || r.Err != errReset {
		t.Errorf("%+v", r)
	}
}

// A lateGoodbye takes the error of a reset in the write of a TLS connection's goodbye. It returns it when somebody asks
// what is below, or the upstream has come to an end.
type lateGoodbye struct {
	net.Conn
	armed               atomic.Bool
	writing, taken, end chan struct{}
	asked               sync.Once
}

func (c *lateGoodbye) Write(b []byte) (int, error) {
	if !c.armed.Load() {
		return c.Conn.Write(b)
	}
	close(c.writing)
	for reset := false; !reset; reset, _ = wasReset(c.Conn) {
		runtime.Gosched()
	}
	n, err := c.Conn.Write(b)
	close(c.taken)
	<-c.end
	return n, err
}

func (c *lateGoodbye) Read(b []byte) (int, error) {
	if c.armed.Load() {
		<-c.taken
	}
	return c.Conn.Read(b)
}

func (c *lateGoodbye) ask() { c.asked.Do(func() { close(c.end) }) }

func (c *lateGoodbye) NetConn() net.Conn {
	select {
	case <-c.taken:
		c.ask()
	default:
	}
	return c.Conn
}

func TestAResetThatAGoodbyeMetIsNotTakenForAnEnd(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	below := make(chan *lateGoodbye, 1)
	got := make(chan error, 1)
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		c.CloseWrite()
		_, err := io.Copy(io.Discard, c)
		got <- err
		b := <-below
		b.ask()
	}))
	writing := make(chan struct{})
	raw := dial(t, serve(t, a, func(_ context.Context, c net.Conn) (context.Context, Conn, error) {
		b := &lateGoodbye{Conn: c, writing: writing, taken: make(chan struct{}), end: make(chan struct{})}
		tc := tls.Server(b, serverTLS)
		err := tc.Handshake()
		b.armed.Store(true)
		below <- b
		return nil, Conn{Client: tc}, err
	}))
	if err := tls.Client(raw, clientTLS).Handshake(); err != nil {
		t.Fatal(err)
	}
	<-writing
	raw.SetLinger(0)
	raw.Close()
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("upstream reads %v, want a reset", err)
	}
	if r := <-results; r.End != EndClientError {
		t.Errorf("%+v", r)
	}
}

// A below is a layer that has no half-close.
type below struct{ net.Conn }

func (b below) NetConn() net.Conn { return b.Conn }

func TestAWholeAnswerEndsWellThoughTheClientCannotHalfClose(t *testing.T) {
	const size = 2 << 20
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		sendPattern(c, size)
		c.CloseWrite()
		io.Copy(io.Discard, c)
	}))
	c := dial(t, serve(t, a, func(_ context.Context, c net.Conn) (context.Context, Conn, error) {
		return nil, Conn{Client: below{c}}, nil
	}))
	if got := readAll(c); got != pattern(size) {
		t.Errorf("got %s, want %s", got, pattern(size))
	}
	if r := <-results; r.End != EndClientError { // for it might have gone on
		t.Errorf("%+v", r)
	}
}
