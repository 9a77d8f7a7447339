package lbproxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A duplexConn is one end of a connection in memory that, unlike net.Pipe, can be half-closed and reset.
type duplexConn struct {
	in, out net.Conn
	peer    *duplexConn
	reset   atomic.Bool
}

func duplex() (a, b *duplexConn) {
	a, b = new(duplexConn), new(duplexConn)
	a.peer, b.peer = b, a
	a.out, b.in = net.Pipe()
	b.out, a.in = net.Pipe()
	return a, b
}

func (c *duplexConn) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	if err == io.EOF && c.peer.reset.Load() {
		err = syscall.ECONNRESET
	}
	return n, err
}

func (c *duplexConn) Write(b []byte) (int, error)        { return c.out.Write(b) }
func (c *duplexConn) CloseWrite() error                  { return c.out.Close() }
func (c *duplexConn) SetLinger(int) error                { c.reset.Store(true); return nil }
func (c *duplexConn) Close() error                       { c.in.Close(); return c.out.Close() }
func (c *duplexConn) LocalAddr() net.Addr                { return nil }
func (c *duplexConn) RemoteAddr() net.Addr               { return nil }
func (c *duplexConn) SetDeadline(t time.Time) error      { c.in.SetDeadline(t); return c.out.SetDeadline(t) }
func (c *duplexConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *duplexConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialFake reaches upstreams in memory, which do handle with each connection, then close it.
func dialFake(handle func(net.Conn)) dialFunc {
	return func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := duplex()
		go func() {
			defer theirs.Close()
			handle(theirs)
		}()
		return ours, nil
	}
}

// served is a connection in memory that ServeConn is busy with.
type served struct {
	*duplexConn
	result chan Result
}

func serveFake(ctx context.Context, a *LBProxyApp, c *Conn) served {
	client, ours := duplex()
	s := served{client, make(chan Result, 1)}
	c.Client = ours
	go func() {
		r, err := a.ServeConn(ctx, c)
		if err != r.Err {
			panic(fmt.Sprintf("ServeConn returned %v and a Result with %v", err, r.Err))
		}
		s.result <- r
	}()
	return s
}

func echoFake(c net.Conn) { io.Copy(c, c) }

// The half-close table: who ends its stream first, over what.

func TestHalfClose(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	const size = 1 << 20
	for _, side := range []struct {
		name             string
		client, upstream bool // speak TLS
	}{{"plain", false, false}, {"TLS client", true, false}, {"TLS upstream", false, true}, {"TLS both", true, true}} {
		for _, order := range []string{"client first", "upstream first", "both"} {
			t.Run(side.name+"/"+order, func(t *testing.T) {
				clientEnded := make(chan struct{})
				got := make(chan string, 1)
				addr := upstreamDoing(t, func(tcp *net.TCPConn) {
					var c halfCloser = tcp
					if side.upstream {
						tc := tls.Server(tcp, serverTLS)
						defer tc.Close()
						c = tc
					}
					switch order {
					case "client first": // answer only when all has been read
						got <- readAll(c)
						sendPattern(c, size)
					case "upstream first": // go on reading when all has been said
						sendPattern(c, size)
						c.CloseWrite()
						got <- readAll(c)
					case "both":
						go func() { sendPattern(c, size); c.CloseWrite() }()
						got <- readAll(c)
						<-clientEnded
					}
				})
				up := Upstream{Addr: addr}
				if side.upstream {
					up.TLS = clientTLS
				}
				a, results := newAppOver(t, Options{}, up)
				var admit AdmitFunc
				if side.client {
					admit = func(ctx context.Context, c *Conn) error {
						tc := tls.Server(c.Client, serverTLS)
						c.Client = tc
						return tc.HandshakeContext(ctx)
					}
				}
				tcp := dial(t, serve(t, a, admit))
				var c halfCloser = tcp
				if side.client {
					c = tls.Client(tcp, clientTLS)
				}
				read := make(chan string, 1)
				if order == "upstream first" {
					if s := readAll(c); s != pattern(size) {
						t.Errorf("client got %s, want %s", s, pattern(size))
					}
					sendPattern(c, size)
					c.CloseWrite()
				} else {
					go func() { read <- readAll(c) }()
					sendPattern(c, size)
					c.CloseWrite()
					if s := <-read; s != pattern(size) {
						t.Errorf("client got %s, want %s", s, pattern(size))
					}
				}
				close(clientEnded)
				if s := <-got; s != pattern(size) {
					t.Errorf("upstream got %s, want %s", s, pattern(size))
				}
				c.Close()
				if r := <-results; r.End != EndDone || r.Err != nil || r.Sent != size || r.Received != size || r.Upstream != addr || r.Attempts != 1 {
					t.Errorf("result %+v", r)
				}
				a.Close()
				wantCounts(t, a, 1, 0, 0)
			})
		}
	}
}

type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// pattern names a stream of n bytes as readAll does one that sendPattern sent.
func pattern(n int) string {
	var b patternWriter
	sendPattern(&b, n)
	return b.sum()
}

type patternWriter struct{ bytes.Buffer }

func (w *patternWriter) sum() string {
	return fmt.Sprintf("%d bytes %x", w.Len(), sha256.Sum256(w.Bytes()))
}

func sendPattern(w io.Writer, n int) {
	io.CopyN(w, rand.NewChaCha8([32]byte{'p'}), int64(n))
}

// readAll reads c to the end of its stream and names what came, and what ended it if that was not clean.
func readAll(c io.Reader) string {
	var b patternWriter
	if _, err := b.ReadFrom(c); err != nil {
		return b.sum() + " then " + err.Error()
	}
	return b.sum()
}

func TestLongReplyAfterHalfCloseArrivesWhole(t *testing.T) {
	const size = 64 << 20
	serverTLS, clientTLS := tlsConfigs(t)
	want := sha256.New()
	sendPattern(want, size)
	for _, overTLS := range []bool{false, true} {
		a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
			io.Copy(io.Discard, c)
			sendPattern(c, size)
		}))
		tcp := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
			if overTLS {
				c.Client = TLSServer(c.Client, serverTLS, 0)
			}
			return nil
		}))
		var c halfCloser = tcp
		if overTLS {
			c = tls.Client(tcp, clientTLS)
		}
		c.Write([]byte("everything, please"))
		c.CloseWrite()
		sum := sha256.New()
		n, err := io.Copy(sum, c)
		if err != nil || n != size || !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
			t.Errorf("TLS %v: %d bytes, %v; want %d, the same that were sent", overTLS, n, err, size)
		}
		c.Close()
		if r := <-results; r.End != EndDone || r.Received != size {
			t.Errorf("TLS %v: %+v", overTLS, r)
		}
	}
}

// A stream that keeps changing between small and bulk goes in and out of whatever is used for bulk.
func TestSmallAndBulkAlternate(t *testing.T) {
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	c := dial(t, serve(t, a, nil))
	var sent int64
	sum, want := sha256.New(), sha256.New()
	r := rand.NewChaCha8([32]byte{'s'})
	for _, size := range []int{64, 8 << 20, 64, 64, 64, 300_000, 1, 70_000, 16 << 20, 5} {
		b := make([]byte, size)
		r.Read(b)
		want.Write(b)
		go c.Write(b)
		if _, err := io.CopyN(sum, c, int64(size)); err != nil {
			t.Fatal(err)
		}
		sent += int64(size)
	}
	if !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
		t.Error("what came back is not what was sent")
	}
	c.Close()
	if r := <-results; r.End != EndDone || r.Sent != sent || r.Received != sent {
		t.Errorf("%+v, want %d bytes each way", r, sent)
	}
	if u := a.Stats().Upstreams[0]; u.Sent != uint64(sent) || u.Received != uint64(sent) || u.Total != 1 {
		t.Errorf("%+v, want %d bytes each way", u, sent)
	}
}

func TestIdleConnectionsHoldNoPipes(t *testing.T) {
	const conns, size = 40, 4 << 20
	if runtime.GOOS != "linux" {
		t.Skip("descriptors are counted in /proc")
	}
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		io.Copy(struct{ io.Writer }{c}, c) // io.Copy from TCP to TCP would hold pipes of its own
	}))
	addr := serve(t, a, nil)
	before := openPipes()
	for range conns {
		c := dial(t, addr)
		go sendPattern(c, size) // bulk, for which there are pipes
		if _, err := io.CopyN(io.Discard, c, size); err != nil {
			t.Fatal(err)
		}
		ping(t, c)
	}
	deadline := time.Now().Add(10 * time.Second)
	for pipesSince(before) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d idle connections hold %d pipes", conns, pipesSince(before))
		}
		runtime.Gosched()
	}
}

// openPipes are those of which the process has an end, by names that are not used again.
func openPipes() map[string]bool {
	pipes := map[string]bool{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "pipe:") {
			pipes[to] = true
		}
	}
	return pipes
}

// pipesSince is how many are open that were not before. (Those of io.Copy, in earlier tests, are closed by the garbage
// collector, whenever that comes.)
func pipesSince(before map[string]bool) (n int) {
	for pipe := range openPipes() {
		if !before[pipe] {
			n++
		}
	}
	return n
}

func TestSlowReadersUseBoundedMemory(t *testing.T) {
	const conns, each = 100, 2 * 64 << 10
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		for b := make([]byte, 64<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}))
	addr := serve(t, a, nil)
	before := memoryInUse()
	for range conns {
		c := dial(t, addr)
		io.ReadFull(c, make([]byte, 200<<10)) // enough to be taken for bulk, then nothing
	}
	// The upstreams here hold a buffer of that size, too.
	if grown := memoryInUse() - before; grown > conns*(each+64<<10) {
		t.Errorf("%d stuck connections hold %d bytes each, want at most %d", conns, grown/conns, each+64<<10)
	}
}

func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere a connection waits with a small one in its hand")
	}
	const conns = 100
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		for b := make([]byte, 1); ; {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			c.Write(b)
		}
	}))
	addr := serve(t, a, nil)
	ping(t, dial(t, addr)) // what only the first allocates
	before := memoryInUse()
	for range conns {
		ping(t, dial(t, addr))
	}
	const most = 4 << 10 * 3 / 2 // they need less than 4 KiB without
	if grown := memoryInUse() - before; grown > conns*most {
		t.Errorf("%d idle connections hold %d bytes each, want at most %d: no buffer", conns, grown/conns, most)
	}
}

// What crypto/tls keeps for each connection is more than a small buffer, and much less than a large one.
func TestIdleTLSConnectionsHoldNoLargeBuffers(t *testing.T) {
	const conns, bulk = 40, 1 << 20
	serverTLS, clientTLS := tlsConfigs(t)
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		if n, err := io.CopyN(io.Discard, c, bulk); n != bulk || err != nil {
			return
		}
		c.Write([]byte("x"))
		c.Read(make([]byte, 1))
	}))
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		c.Client = TLSServer(c.Client, serverTLS, 0)
		return nil
	})
	come := func() {
		c := tls.Client(dial(t, addr), clientTLS)
		sendPattern(c, bulk)
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	come() // what only the first allocates
	before := memoryInUse()
	for range conns {
		come()
	}
	grown := memoryInUse() - before
	const most = 64 << 10 * 5 / 4 // they have 50 KiB, and one of those buffers more would be too much
	if grown > conns*most {
		t.Errorf("%d idle connections hold %d bytes each, want at most %d", conns, grown/conns, most)
	}
}

// A connection that breaks while bulk is on its way leaves nothing of it to the next.
func TestNothingOfABrokenConnectionReachesTheNext(t *testing.T) {
	const size = 4 << 20
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) { sendPattern(c, 16*size) }))
	addr := serve(t, a, nil)
	for range 3 {
		c := dial(t, addr)
		io.CopyN(io.Discard, c, size)                         // enough to be taken for bulk
		for last, now := uint64(0), uint64(1); now != last; { // until it is stuck
			<-time.After(20 * time.Millisecond)
			last, now = now, a.Stats().Upstreams[0].Received
		}
		c.SetLinger(0)
		c.Close()
		if r := <-results; r.End != EndClientError {
			t.Fatalf("%+v", r)
		}
		c = dial(t, addr)
		var b patternWriter
		if io.CopyN(&b, c, size); b.sum() != pattern(size) {
			t.Fatalf("the next one got %s, want %s", b.sum(), pattern(size))
		}
		c.Close()
		<-results
	}
}

// Idle time.

func TestIdleTimeoutIsExactOverBothDirections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{IdleTimeout: time.Minute, DialContext: dialFake(func(c net.Conn) {
			b := make([]byte, 1)
			io.ReadFull(c, b)            // at 50 s
			time.Sleep(50 * time.Second) // 100 s
			c.Write(b)
			c.Read(b) // no more
		})}, "u:1")
		start := time.Now()
		c := serveFake(t.Context(), a, &Conn{})
		time.Sleep(50 * time.Second)
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("idle: the client reads %v, want a reset", err)
		}
		r := <-c.result
		if r.End != EndIdleTimeout || r.Err != ErrIdleTimeout || r.Sent != 1 || r.Received != 1 {
			t.Errorf("%+v", r)
		}
		if took := time.Since(start); took != 160*time.Second {
			t.Errorf("ended after %v, want 160s", took)
		}
	})
}

func TestIdleTimeoutEndsHalfClosedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) { c.(*duplexConn).CloseWrite(); io.Copy(io.Discard, c) })}, "u:1")
		start := time.Now()
		c := serveFake(t.Context(), a, &Conn{})
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the upstream's end arrives as %v", err)
		}
		if r := <-c.result; r.End != EndIdleTimeout || time.Since(start) != time.Hour {
			t.Errorf("%+v after %v, want the default of an hour", r, time.Since(start))
		}
	})
}

// There is no other bound on how long one stream may go on when the other has ended.
func TestReplyAfterHalfCloseOutlastsIdleTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{IdleTimeout: time.Minute, DialContext: dialFake(func(c net.Conn) {
			io.ReadAll(c)
			for range 100 {
				time.Sleep(50 * time.Second)
				c.Write([]byte("x"))
			}
		})}, "u:1")
		start := time.Now()
		c := serveFake(t.Context(), a, &Conn{})
		c.CloseWrite()
		if b, err := io.ReadAll(c); len(b) != 100 || err != nil {
			t.Errorf("%d bytes, %v; want 100", len(b), err)
		}
		if r := <-c.result; r.End != EndDone || time.Since(start) != 5000*time.Second {
			t.Errorf("%+v after %v", r, time.Since(start))
		}
	})
}

func TestNegativeIdleTimeoutMeansNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{IdleTimeout: -1, DialContext: dialFake(echoFake)}, "u:1")
		c := serveFake(t.Context(), a, &Conn{})
		time.Sleep(1000 * time.Hour)
		ping(t, c)
		c.Close()
		if r := <-c.result; r.End != EndDone {
			t.Errorf("%+v", r)
		}
	})
}

func TestIdleTimeoutEndsStalledConnections(t *testing.T) {
	const conns = 200
	a, results := newApp(t, Options{IdleTimeout: 300 * time.Millisecond}, upstreamDoing(t, func(c *net.TCPConn) {
		io.Copy(io.Discard, c)
	}))
	addr := serve(t, a, nil)
	for range conns {
		dial(t, addr).Write([]byte("x"))
	}
	for range conns {
		if r := <-results; r.End != EndIdleTimeout || r.Duration > 10*time.Second {
			t.Fatalf("%+v", r)
		}
	}
	a.Close()
	wantCounts(t, a, conns, 0, 0)
}

// What a slow reader takes out of its socket's queue is bytes that flow, though nothing wakes us meanwhile.
func TestSlowReaderIsNotIdle(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no portable way to ask for the queue")
	}
	const size = 1 << 20
	a, results := newApp(t, Options{IdleTimeout: time.Second}, upstreamDoing(t, func(c *net.TCPConn) {
		sendPattern(c, size)
		c.CloseWrite()
		io.Copy(io.Discard, c)
	}))
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		return c.Client.(*net.TCPConn).SetWriteBuffer(2 * size)
	}))
	c.SetReadBuffer(16 << 10)
	var b patternWriter
	for { // slowly, with a pause in which the system can be seen to do something
		<-time.After(40 * time.Millisecond)
		if _, err := io.CopyN(&b, c, 16<<10); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("after %d of %d bytes: %v", b.Len(), size, err)
		}
	}
	if b.sum() != pattern(size) {
		t.Errorf("got %s, want %s", b.sum(), pattern(size))
	}
	c.Close()
	if r := <-results; r.End != EndDone || r.Duration < 2*time.Second {
		t.Errorf("%+v", r)
	}
}

func TestThrottledConnectionIsNotIdle(t *testing.T) {
	for _, blocks := range []bool{false, true} { // or says how long to wait
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{IdleTimeout: time.Minute, DialContext: dialFake(echoFake)}, "u:1")
			c := serveFake(t.Context(), a, &Conn{RateLimit: limitFunc(func(e Event) Decision {
				switch {
				case e.Kind != EventData || e.Direction != Upload:
					return Decision{}
				case blocks:
					time.Sleep(time.Hour)
					return Decision{}
				}
				return Decision{Wait: time.Hour}
			})})
			start := time.Now()
			ping(t, c)
			time.Sleep(time.Hour + 50*time.Second) // it is held no more, and not idle for long enough
			c.Write([]byte("y"))
			c.CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "y" || err != nil || time.Since(start) < 2*time.Hour {
				t.Errorf("read %q, %v after %v", b, err, time.Since(start))
			}
			c.Close()
			if r := <-c.result; r.End != EndDone {
				t.Errorf("%+v", r)
			}
		})
	}
}

type limitFunc func(Event) Decision

func (f limitFunc) Report(_ context.Context, e Event) Decision { return f(e) }

// Cut streams.

func TestResetIsPassedOnAfterTheDataBeforeIt(t *testing.T) {
	const before = 100_000
	rounds := 1_000
	if testing.Short() {
		rounds = 200
	}
	for _, who := range []string{"client", "upstream"} {
		t.Run(who, func(t *testing.T) {
			got := make(chan string, 1)
			allRead := make(chan struct{})
			breakIt := func(c *net.TCPConn) { // when its bytes have been taken in by the proxy
				sendPattern(c, before)
				<-allRead
				c.SetLinger(0)
				c.Close()
			}
			watch := func(c *net.TCPConn) {
				var b patternWriter
				io.CopyN(&b, c, before)
				allRead <- struct{}{}
				if _, err := b.ReadFrom(c); err != nil && errors.Is(err, syscall.ECONNRESET) {
					got <- b.sum() + " then reset"
				} else {
					got <- fmt.Sprint(b.sum(), " then ", err)
				}
			}
			upstream, client := watch, breakIt
			end := EndClientError
			if who == "upstream" {
				upstream, client, end = breakIt, watch, EndUpstreamError
			}
			a, results := newApp(t, Options{}, upstreamDoing(t, upstream))
			addr := serve(t, a, nil)
			for range rounds {
				client(dial(t, addr))
				if s, want := <-got, pattern(before)+" then reset"; s != want {
					t.Fatalf("the other side got %s,\nwant %s", s, want)
				}
				if r := <-results; r.End != end || r.Err == nil {
					t.Fatalf("%+v, want %s", r, end)
				}
			}
			a.Close()
			wantCounts(t, a, uint64(rounds), 0, 0)
		})
	}
}

// A server that has seen enough answers and closes while its client is still sending: its system then resets the
// connection. The client is to get the answer, and not to take it for one that ended well.
func TestAnswerFollowedByAResetArrives(t *testing.T) {
	const rounds, answer = 100, 200_000
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1000))
		sendPattern(c, answer)
		c.SetLinger(0)
	}))
	addr := serve(t, a, nil)
	for i := range rounds {
		c := dial(t, addr)
		written := make(chan error)
		go func() {
			b := make([]byte, 32<<10)
			for n := 0; n < 100 || i%2 == 0; n++ { // every other one for as long as it can
				if _, err := c.Write(b); err != nil {
					written <- err
					return
				}
			}
			written <- nil
		}()
		got := readAll(c)
		c.Close()
		// What the upstream's own system had not sent yet is lost there, before it gets to us. One call of the client
		// gets the error of the reset; it may be a write.
		r, err := <-results, <-written
		if !strings.HasPrefix(got, fmt.Sprint(r.Received, " bytes")) || !strings.Contains(got, "then") && err == nil || r.End != EndUpstreamError {
			t.Fatalf("round %d: client got %s, wrote until %v; result %+v", i, got, err, r)
		}
	}
}

func TestAnswerReadBeforeAResetIsNotLost(t *testing.T) {
	const rounds, answer = 10, 1_000_000
	for _, sending := range []bool{false, true} {
		answered := make(chan struct{})
		a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1000))
			sendPattern(c, answer)
			<-answered // the proxy has all of it
			c.SetLinger(0)
		}))
		addr := serve(t, a, nil)
		for range rounds {
			c := dial(t, addr)
			var wg sync.WaitGroup
			wg.Go(func() {
				b := make([]byte, 32<<10)
				c.Write(b)
				for sending {
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			})
			for a.Stats().Upstreams[0].Received != answer {
				runtime.Gosched()
			}
			answered <- struct{}{}
			var b patternWriter
			_, err := b.ReadFrom(c)
			if b.sum() != pattern(answer) || err == nil && !sending { // if sending, a write may have got the error
				t.Fatalf("sending %v: client got %s, %v; want %s, then a reset", sending, b.sum(), err, pattern(answer))
			}
			c.Close()
			wg.Wait()
			if r := <-results; r.End != EndUpstreamError || r.Received != answer {
				t.Fatalf("%+v", r)
			}
			for a.Stats().Upstreams[0].Open > 0 {
				runtime.Gosched()
			}
			a.balancer.heap[0].received.Store(0)
		}
	}
}

// answeredThenReset returns a client whose upstream has answered and then reset the connection, of which nothing is read yet.
func answeredThenReset(t *testing.T) served {
	upstreams := make(chan *duplexConn, 1)
	a, _ := newApp(t, Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := duplex()
		upstreams <- theirs
		return ours, nil
	}}, "u:1")
	c := serveFake(t.Context(), a, &Conn{})
	upstream := <-upstreams
	upstream.Write([]byte("answer"))
	upstream.SetLinger(0)
	upstream.Close()
	c.Write([]byte("x")) // so that the reset is noticed
	return c
}

// A reader that takes a while for what came before the reset is not made to wait for the reset.
func TestResetFollowsDeliveryAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, start := answeredThenReset(t), time.Now()
		time.Sleep(100 * time.Millisecond)
		if b, err := io.ReadAll(c); string(b) != "answer" || err != syscall.ECONNRESET {
			t.Errorf("client got %q, %v; want the answer, then a reset", b, err)
		}
		if r := <-c.result; r.End != EndUpstreamError || time.Since(start) != 100*time.Millisecond {
			t.Errorf("%+v after %v", r, time.Since(start))
		}
	})
}

func TestResetWaitsOneSecondForUnreadData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, start := answeredThenReset(t), time.Now()
		if r := <-c.result; r.End != EndUpstreamError || r.Received != 0 || time.Since(start) != time.Second {
			t.Errorf("%+v after %v", r, time.Since(start))
		}
		if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("client reads %v, want a reset", err)
		}
	})
}

// The upstream has reset the connection, and the client does not read what came before that.
func TestUnreadSocketDataDelaysTheResetBriefly(t *testing.T) {
	stuck := make(chan bool)
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		for b := make([]byte, 64<<10); ; {
			c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := c.Write(b); err != nil {
				break
			}
		}
		c.SetLinger(0)
		close(stuck)
	}))
	c := dial(t, serve(t, a, nil))
	<-stuck
	late := time.After(10 * time.Second)
	for {
		c.Write([]byte("x")) // so that the reset is noticed
		select {
		case r := <-results:
			if r.End != EndUpstreamError {
				t.Errorf("%+v", r)
			}
			return
		case <-late:
			t.Fatal("it is still waited for")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// The caller's context governs a session to its end, also when one side has ended its stream before.
func TestContextEndsHalfClosedConnection(t *testing.T) {
	for name, half := range map[string]func(client, upstream *duplexConn){
		"neither side has ended":    func(client, upstream *duplexConn) {},
		"the client has ended":      func(client, upstream *duplexConn) { client.CloseWrite() },
		"the upstream has ended":    func(client, upstream *duplexConn) { upstream.CloseWrite() },
		"the upstream, after words": func(client, upstream *duplexConn) { upstream.Write([]byte("bye")); upstream.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				upstreams := make(chan *duplexConn, 1)
				a, _ := newApp(t, Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
					ours, theirs := duplex()
					upstreams <- theirs
					return ours, nil
				}}, "u:1")
				ctx, cancel := context.WithCancelCause(t.Context())
				s := serveFake(ctx, a, &Conn{})
				upstream := <-upstreams
				go io.Copy(io.Discard, s)
				go io.Copy(io.Discard, upstream)
				half(s.duplexConn, upstream)
				synctest.Wait()
				why := errors.New("revoked")
				cancel(why)
				synctest.Wait()
				select {
				case r := <-s.result:
					if r.End != EndCanceled || r.Err != why {
						t.Errorf("%+v", r)
					}
				default:
					t.Error("it goes on")
					s.Close()
					upstream.Close()
				}
			})
		})
	}
}

func TestIdleTimeBeginsWithTheUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{IdleTimeout: time.Minute, DialTimeout: time.Hour, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			time.Sleep(2 * time.Minute)
			return dialFake(echoFake)(ctx, network, addr)
		}}, "u:1")
		for range 2 { // the second time the app has been at rest for long
			start := time.Now()
			c := serveFake(t.Context(), a, &Conn{})
			if r := <-c.result; r.End != EndIdleTimeout || time.Since(start) != 3*time.Minute {
				t.Errorf("%+v after %v", r, time.Since(start))
			}
			c.Close()
			time.Sleep(time.Hour)
		}
	})
}

// Whatever ends a connection, the upstream that had it is the emptiest again.
func TestEveryEndReleasesTheCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		upstreams := make(chan *duplexConn, 1)
		a, _ := newApp(t, Options{IdleTimeout: time.Minute, DialContext: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := duplex()
			go io.Copy(io.Discard, theirs)
			upstreams <- theirs
			return ours, nil
		}}, "a:1", "b:1")
		tooMuch := limitFunc(func(e Event) Decision { return Decision{Exceeded: e.Kind == EventData} })
		for end, how := range map[EndReason]func(c served, upstream *duplexConn, cancel func()){
			EndDone:          func(c served, upstream *duplexConn, _ func()) { c.CloseWrite(); upstream.CloseWrite() },
			EndClientError:   func(c served, _ *duplexConn, _ func()) { c.SetLinger(0); c.Close() },
			EndUpstreamError: func(_ served, upstream *duplexConn, _ func()) { upstream.SetLinger(0); upstream.Close() },
			EndIdleTimeout:   func(served, *duplexConn, func()) {},
			EndCanceled:      func(_ served, _ *duplexConn, cancel func()) { cancel() },
			EndRateLimited:   func(c served, _ *duplexConn, _ func()) { c.Write([]byte("x")) },
		} {
			ctx, cancel := context.WithCancel(t.Context())
			c := serveFake(ctx, a, &Conn{RateLimit: tooMuch})
			go io.Copy(io.Discard, c)
			upstream := <-upstreams
			synctest.Wait()
			how(c, upstream, cancel)
			if r := <-c.result; r.End != end || r.Upstream != "a:1" {
				t.Errorf("%+v, want %s, and the first upstream", r, end)
			}
			cancel()
			c.Close()
			upstream.Close()
		}
		wantCounts(t, a, 6, 0, 0)
	})
}

// A TLSConn by itself.

// countedConn counts what is written, and fails from the write of the given number on.
type countedConn struct {
	net.Conn
	writes, failFrom int
	onWrite          func() // nil: nothing
}

func (c *countedConn) Write(b []byte) (int, error) {
	if c.onWrite != nil {
		c.onWrite()
	}
	if c.writes++; c.failFrom > 0 && c.writes >= c.failFrom {
		return 0, errors.New("broken wire")
	}
	return c.Conn.Write(b)
}

func tlsPair(t *testing.T, maxHandshake int) (client *tls.Conn, server *TLSConn, wire *countedConn) {
	serverTLS, clientTLS := tlsConfigs(t)
	serverTLS = serverTLS.Clone()
	serverTLS.DynamicRecordSizingDisabled = true
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	wire = &countedConn{Conn: ours}
	return tls.Client(theirs, clientTLS), TLSServer(wire, serverTLS, maxHandshake), wire
}

func TestTLSConnBatchesRecordsOfALargeWrite(t *testing.T) {
	client, server, wire := tlsPair(t, 0)
	got := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(client)
		got <- all
	}()
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 300_000)
	for i := range sent {
		sent[i] = byte(i * i >> 8)
	}
	wire.writes = 0
	for i, row := range []struct{ from, to, most int }{{0, 1, 1}, {1, 16_384, 1}, {16_384, 16_384 + 64<<10, 1}, {16_384 + 64<<10, 300_000, 4}} {
		before := wire.writes
		if n, err := server.Write(sent[row.from:row.to]); n != row.to-row.from || err != nil {
			t.Fatalf("write %d: %d, %v", i, n, err)
		}
		if n := wire.writes - before; n > row.most {
			t.Errorf("%d bytes took %d writes, want %d", row.to-row.from, n, row.most)
		}
	}
	server.Close()
	if all := <-got; !bytes.Equal(all, sent) {
		t.Errorf("%d bytes came, which are not the %d that were sent", len(all), len(sent))
	}
}

func TestTLSConnReportsABatchThatFailed(t *testing.T) {
	for which := 1; which <= 4; which++ { // of the writes that it takes
		client, server, wire := tlsPair(t, 0)
		go io.Copy(io.Discard, client)
		if err := server.Handshake(); err != nil {
			t.Fatal(err)
		}
		wire.failFrom = wire.writes + which
		if n, err := server.Write(make([]byte, 200_000)); n != 0 || err == nil || err.Error() != "broken wire" {
			t.Errorf("write %d fails: %d, %v", which, n, err)
		}
		if n, err := server.Write(make([]byte, 10)); n != 0 || err == nil {
			t.Errorf("afterwards: %d, %v", n, err)
		}
	}
}

func TestTLSConnBoundsTheHandshake(t *testing.T) {
	for _, explicitly := range []bool{true, false} {
		client, server, _ := tlsPair(t, 100)
		go client.Handshake()
		var err error
		if explicitly {
			err = server.Handshake()
		} else {
			_, err = server.Read(make([]byte, 1))
		}
		if !errors.Is(err, ErrHandshakeSize) {
			t.Errorf("100 bytes: %v", err)
		}
	}
	client, server, _ := tlsPair(t, 16<<10)
	go func() {
		client.Write(make([]byte, 100_000))
		client.Close()
	}()
	if n, err := io.Copy(io.Discard, server); n != 100_000 || err != nil { // Read makes the handshake
		t.Errorf("after it: %d bytes, %v", n, err)
	}
}

// A large write that makes the handshake itself must not keep that back.
func TestTLSConnHandshakesBeforeItBatches(t *testing.T) {
	client, server, _ := tlsPair(t, 0)
	go func() {
		server.Write(make([]byte, 100_000))
		server.Close()
	}()
	client.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := io.Copy(io.Discard, client); n != 100_000 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestTLSConnNetConn(t *testing.T) {
	_, server, wire := tlsPair(t, 0)
	if server.NetConn() != net.Conn(wire) {
		t.Errorf("%T", server.NetConn())
	}
}
