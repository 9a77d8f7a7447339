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
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A duplexConn is one end of a connection in memory that can be half-closed and reset.
type duplexConn = proxytest.PipeConn

func duplex() (a, b *duplexConn) { return proxytest.Pipe() }

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

// dialFake returns a dialer to upstreams in memory. They call handle for each connection, then
// close it.
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

// served is the client's end of a connection in memory that ServeConn serves.
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

// Half-close: who ends its stream first, over plain TCP or TLS.

func TestHalfClose(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	const size = 1 << 20
	for _, side := range []struct {
		name             string
		client, upstream bool // speak TLS
	}{{"plain", false, false}, {"TLS client", true, false}, {"TLS upstream", false, true},
		{"TLS both", true, true}} {
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
					case "client first": // answer after reading everything
						got <- readAll(c)
						sendPattern(c, size)
					case "upstream first": // read on after ending the own stream
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
				if r := <-results; r.End != EndDone || r.Err != nil || r.Sent != size ||
					r.Received != size ||
					r.Upstream != addr || r.Attempts != 1 {
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

// pattern returns what readAll returns for n bytes that sendPattern sent.
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

// readAll reads c to the end and describes what came, and the error unless the end was clean.
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
			t.Errorf("TLS %v: %d bytes, %v; want %d, the same that were sent", overTLS, n, err,
				size)
		}
		c.Close()
		if r := <-results; r.End != EndDone || r.Received != size {
			t.Errorf("TLS %v: %+v", overTLS, r)
		}
	}
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
	before := proxytest.HeapInUse()
	for range conns {
		c := dial(t, addr)
		io.ReadFull(c, make([]byte, 200<<10)) // enough to count as bulk, then nothing
	}
	// The upstreams of this test hold a buffer of that size, too.
	if grown := proxytest.HeapInUse() - before; grown > conns*(each+64<<10) {
		t.Errorf("%d stuck connections hold %d bytes each, want at most %d", conns, grown/conns,
			each+64<<10)
	}
}

func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	most := int64(4 << 10 * 3 / 2) // without a buffer each needs less than 4 KiB
	if portable {
		most += 2 * 4 << 10 // a small one for each direction
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
	ping(t, dial(t, addr)) // the first one allocates more
	before := proxytest.HeapInUse()
	for range conns {
		ping(t, dial(t, addr))
	}
	if grown := proxytest.HeapInUse() - before; grown > conns*most {
		t.Errorf("%d idle connections hold %d bytes each, want at most %d", conns, grown/conns,
			most)
	}
}

// For each connection crypto/tls keeps more than a small buffer, and much less than a large one.
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
	come() // the first one allocates more
	before := proxytest.HeapInUse()
	for range conns {
		come()
	}
	grown := proxytest.HeapInUse() - before
	most := int64(64 << 10 * 5 / 4) // each has 50 KiB; one more large buffer would be too much
	if portable {
		most += 64 << 10 // but there it waits in it
	}
	if grown > conns*most {
		t.Errorf("%d idle connections hold %d bytes each, want at most %d", conns, grown/conns,
			most)
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
		a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {
			c.(*duplexConn).CloseWrite()
			io.Copy(io.Discard, c)
		})}, "u:1")
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
	a, results := newApp(t, Options{IdleTimeout: 300 * time.Millisecond},
		upstreamDoing(t, func(c *net.TCPConn) {
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

func TestThrottledConnectionIsNotIdle(t *testing.T) {
	for _, blocks := range []bool{false, true} { // false: the limit returns a Wait
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{
				IdleTimeout: time.Minute, DialContext: dialFake(echoFake)}, "u:1")
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
			time.Sleep(time.Hour + 50*time.Second) // no longer held, and not idle for a minute yet
			c.Write([]byte("y"))
			c.CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "y" || err != nil ||
				time.Since(start) < 2*time.Hour {
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
	rounds := 200
	if portable {
		rounds = 3 // a second each
	}
	for _, who := range []string{"client", "upstream"} {
		t.Run(who, func(t *testing.T) {
			got := make(chan string, 1)
			allRead := make(chan struct{})
			breakIt := func(c *net.TCPConn) { // after the proxy has read its bytes
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

// A server answers and closes while its client is still sending, so its system resets the
// connection. The client gets the answer, and a reset rather than a clean end.
func TestAnswerFollowedByAResetArrives(t *testing.T) {
	const answer = 200_000
	rounds := 100
	if portable {
		rounds = 4 // a second each
	}
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
			for n := 0; n < 100 || i%2 == 0; n++ { // every other client sends until its write fails
				if _, err := c.Write(b); err != nil {
					written <- err
					return
				}
			}
			written <- nil
		}()
		got := readAll(c)
		c.Close()
		// What the upstream's system had not sent yet is lost there. One call of the client gets
		// the error of the reset; it may be a write.
		r, err := <-results, <-written
		if !strings.HasPrefix(got, fmt.Sprint(r.Received, " bytes")) ||
			!strings.Contains(got, "then") && err == nil || r.End != EndUpstreamError {
			t.Fatalf("round %d: client got %s, wrote until %v; result %+v", i, got, err, r)
		}
	}
}

// The caller's context ends a connection also when one side has ended its stream before.
func TestContextEndsHalfClosedConnection(t *testing.T) {
	for name, half := range map[string]func(client, upstream *duplexConn){
		"neither side has ended": func(client, upstream *duplexConn) {},
		"the client has ended":   func(client, upstream *duplexConn) { client.CloseWrite() },
		"the upstream has ended": func(client, upstream *duplexConn) { upstream.CloseWrite() },
		"the upstream, after words": func(client, upstream *duplexConn) {
			upstream.Write([]byte("bye"))
			upstream.CloseWrite()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				upstreams := make(chan *duplexConn, 1)
				a, _ := newApp(t, Options{
					DialContext: func(context.Context, string, string) (net.Conn, error) {
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
		a, _ := newApp(t, Options{
			IdleTimeout: time.Minute, DialTimeout: time.Hour,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				time.Sleep(2 * time.Minute)
				return dialFake(echoFake)(ctx, network, addr)
			}}, "u:1")
		for range 2 { // the second time the app has been idle for long
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

// However a connection ends, its upstream is the least loaded one afterwards.
func TestEveryEndReleasesTheCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		upstreams := make(chan *duplexConn, 1)
		a, _ := newApp(t, Options{
			IdleTimeout: time.Minute,
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				ours, theirs := duplex()
				go io.Copy(io.Discard, theirs)
				upstreams <- theirs
				return ours, nil
			}}, "a:1", "b:1")
		tooMuch := limitFunc(func(e Event) Decision {
			return Decision{Exceeded: e.Kind == EventData}
		})
		for end, how := range map[EndReason]func(c served, upstream *duplexConn, cancel func()){
			EndDone: func(c served, upstream *duplexConn, _ func()) {
				c.CloseWrite()
				upstream.CloseWrite()
			},
			EndClientError: func(c served, _ *duplexConn, _ func()) { c.SetLinger(0); c.Close() },
			EndUpstreamError: func(_ served, upstream *duplexConn, _ func()) {
				upstream.SetLinger(0)
				upstream.Close()
			},
			EndIdleTimeout: func(served, *duplexConn, func()) {},
			EndCanceled:    func(_ served, _ *duplexConn, cancel func()) { cancel() },
			EndRateLimited: func(c served, _ *duplexConn, _ func()) { c.Write([]byte("x")) },
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

// TLSConn without an app.

func tlsPair(t *testing.T, maxHandshake int) (client *tls.Conn, server *TLSConn, raw net.Conn) {
	serverTLS, clientTLS := tlsConfigs(t)
	raw, theirs := net.Pipe()
	t.Cleanup(func() { raw.Close(); theirs.Close() })
	return tls.Client(theirs, clientTLS), TLSServer(raw, serverTLS, maxHandshake), raw
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
	// Read performs the handshake
	if n, err := io.Copy(io.Discard, server); n != 100_000 || err != nil {
		t.Errorf("after it: %d bytes, %v", n, err)
	}
}

func TestTLSConnNetConn(t *testing.T) {
	_, server, raw := tlsPair(t, 0)
	if server.NetConn() != raw {
		t.Errorf("%T", server.NetConn())
	}
}
