package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

	"github.com/danielepagano/lbproxy/internal/relay"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// tlsConfigs are those of a server called localhost and of a client that trusts it.
func tlsConfigs(testing.TB) (server, client *tls.Config) { return proxytest.TLSConfigs() }

// Failed dials.

func TestRefusingUpstreamCostsNoClient(t *testing.T) {
	const workers, conns = 10, 1_000
	dead := proxytest.RefusingAddr(t)
	var dials atomic.Int32
	var d net.Dialer
	a, results := newApp(t, Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == dead {
				dials.Add(1)
			}
			return d.DialContext(ctx, network, addr)
		}}, dead, upstreamDoing(t, echo), upstreamDoing(t, echo))
	addr := serve(t, a, nil)
	var wg sync.WaitGroup
	start := time.Now()
	for range workers {
		wg.Go(func() {
			for range conns / workers {
				c := dial(t, addr)
				ping(t, c)
				c.Close()
			}
		})
	}
	wg.Wait()
	for range conns {
		if r := <-results; r.End != EndDone || r.Attempts > 2 {
			t.Fatalf("%+v", r)
		}
	}
	trials := int32(time.Since(start) / (10 * time.Second))
	if n := dials.Load(); n < 1 || n > workers+trials {
		t.Errorf("the dead upstream was dialed %d times, want 1 to %d, and %d trials", n,
			workers, trials)
	}
	if u := a.Stats().Upstreams[0]; u.State != "cooling" || u.Failed != uint64(dials.Load()) {
		t.Errorf("%+v", u)
	}
}

func TestBlackHoleCostsOneDialTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log proxytest.Buffer
		a, _ := newApp(t, Options{
			DialTimeout: 3 * time.Second,
			Logger:      slog.New(slog.NewTextHandler(&log, nil)),
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "hole:1" {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return dialFake(echoFake)(ctx, network, addr)
			},
		}, "hole:1", "good:1")
		start := time.Now()
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("served after %v, want the DialTimeout of 3s", took)
		}
		c.Close()
		if r := <-c.result; r.Attempts != 2 || r.Upstream != "good:1" || r.End != EndDone {
			t.Errorf("%+v", r)
		}
		start = time.Now()
		c = serveFake(t.Context(), a, &Conn{}) // hole:1 is skipped now
		ping(t, c)
		if took := time.Since(start); took != 0 {
			t.Errorf("the second was served after %v, too", took)
		}
		c.Close()
		<-c.result
		if s := a.Stats(); s.Upstreams[0].State != "cooling" || s.Upstreams[0].Failed != 1 ||
			s.Failed != 0 {
			t.Errorf("%+v", s)
		}
		time.Sleep(10 * time.Second)
		c = serveFake(t.Context(), a, &Conn{}) // the trial
		synctest.Wait()
		c2 := serveFake(t.Context(), a, &Conn{})
		start = time.Now()
		ping(t, c2)
		if time.Since(start) != 0 {
			t.Error("another connection than the trial had to wait for it")
		}
		for _, c := range []served{c, c2} {
			ping(t, c)
			c.Close()
			<-c.result
		}
		if n := strings.Count(log.String(), "upstream failed"); n != 1 {
			t.Errorf("%d log lines of the failure, want 1 for the change:\n%s", n, log.String())
		}
	})
}

func TestDialTimeIsOfTheDialThatSucceeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "bad:1" {
					time.Sleep(time.Second)
					return nil, errors.New("no")
				}
				time.Sleep(2 * time.Second)
				return dialFake(echoFake)(ctx, network, addr)
			},
		}, "bad:1", "good:1")
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		c.Close()
		if r := <-c.result; r.Attempts != 2 || r.DialTime != 2*time.Second {
			t.Errorf("%+v", r)
		}
		a.SetUpstreams([]Upstream{{Addr: "bad:1"}})
		c = serveFake(t.Context(), a, &Conn{})
		if r := <-c.result; r.End != EndDialFailed || r.DialTime != 0 {
			t.Errorf("none succeeded: %+v", r)
		}
	})
}

func TestDefaultDialTimeoutAndFailTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "hole:1" {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return dialFake(echoFake)(ctx, network, addr)
			}}, "hole:1", "good:1")
		begun := time.Now()
		for _, step := range []struct{ at, served time.Duration }{
			{0, 5 * time.Second}, {15*time.Second - 1, 15*time.Second - 1},
			{15 * time.Second, 20 * time.Second},
			{30*time.Second - 1, 30*time.Second - 1}, {30 * time.Second, 35 * time.Second},
		} {
			time.Sleep(step.at - time.Since(begun))
			c := serveFake(t.Context(), a, &Conn{})
			ping(t, c)
			if at := time.Since(begun); at != step.served {
				t.Errorf("who came at %v was served at %v, want %v", step.at, at, step.served)
			}
			defer c.Close()
		}
	})
}

func TestAllUpstreamsRefuse(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	var dialled []string
	a, results := newApp(t, Options{
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			dialled = append(dialled, addr)
			return nil, refused
		}}, "a:1", "b:1", "c:1")
	for range 2 { // the second time all are cooling and are tried anyway
		dialled = nil
		c := serveFake(t.Context(), a, &Conn{})
		if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("the client reads %v, want a reset", err)
		}
		r := <-c.result
		var dial *DialError
		if r.End != EndDialFailed || r.Attempts != 3 || r.Upstream != "" ||
			!errors.Is(r.Err, syscall.ECONNREFUSED) ||
			!errors.As(r.Err, &dial) || dial.App != "test" || dial.Addr != "a:1" ||
			strings.Count(r.Err.Error(), "connection refused") != 3 {
			t.Errorf("%+v", r)
		}
		if s := fmt.Sprint(dialled); s != "[a:1 b:1 c:1]" {
			t.Errorf("dialled %v", s)
		}
		<-results
	}
	wantCounts(t, a, 2, 0, 2)
}

func TestAllUpstreamsAreBlackHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{
			DialTimeout: 3 * time.Second,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}}, "a:1", "b:1", "c:1")
		start := time.Now()
		c := serveFake(t.Context(), a, &Conn{})
		if r := <-c.result; r.End != EndDialFailed || r.Attempts != 3 ||
			!errors.Is(r.Err, context.DeadlineExceeded) {
			t.Errorf("%+v", r)
		}
		if took := time.Since(start); took != 9*time.Second {
			t.Errorf("it took %v, want three times the DialTimeout", took)
		}
		wantCounts(t, a, 1, 0, 1)
	})
}

func TestAllUpstreamsFull(t *testing.T) {
	a, _ := newAppOver(t, Options{DialContext: dialFake(echoFake)},
		Upstream{Addr: "u:1", MaxConns: 1})
	first := serveFake(t.Context(), a, &Conn{})
	ping(t, first)
	second := serveFake(t.Context(), a, &Conn{})
	if r := <-second.result; r.End != EndNoUpstream || !errors.Is(r.Err, ErrNoUpstream) ||
		r.Attempts != 0 {
		t.Errorf("%+v", r)
	}
	first.Close()
	<-first.result
	wantCounts(t, a, 2, 0, 1)
}

func TestLocalDialErrorsDoNotCountAsFailures(t *testing.T) {
	for ours, attempts := range map[error]int{
		syscall.EADDRNOTAVAIL: 2, context.Canceled: 2,
		// the next dial would fail, too
		syscall.EMFILE: 1, syscall.ENFILE: 1, syscall.ENOBUFS: 1, syscall.ENOMEM: 1,
		syscall.ENOSPC: 1,
	} {
		a, _ := newApp(t, Options{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", ours)}
			}}, "a:1", "b:1")
		c := serveFake(t.Context(), a, &Conn{})
		if r := <-c.result; r.End != EndDialFailed || r.Attempts != attempts ||
			!errors.Is(r.Err, ours) {
			t.Errorf("%v: %+v", ours, r)
		}
		for _, u := range a.Stats().Upstreams {
			if u.State != "up" || u.Failed != 0 || u.Open != 0 {
				t.Errorf("%v: %+v", ours, u)
			}
		}
	}
}

func TestNilConnFromDialerIsAnError(t *testing.T) {
	a, _ := newApp(t, Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return nil, nil
	}}, "a:1")
	c := serveFake(t.Context(), a, &Conn{})
	if r := <-c.result; r.End != EndDialFailed || !errors.Is(r.Err, errNilDialed) {
		t.Errorf("%+v", r)
	}
}

// Clients that act before the dial is done.

func TestDataSentDuringTheDialArrives(t *testing.T) {
	const size = 300_000
	for _, half := range []bool{false, true} {
		got := make(chan string, 1)
		up := upstreamDoing(t, func(c *net.TCPConn) {
			var b patternWriter
			io.CopyN(&b, c, size)
			got <- b.sum()
			io.Copy(io.Discard, c)
			c.Write([]byte("bye"))
		})
		dialling, goOn := make(chan bool), make(chan bool)
		a, results := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialling <- true
				<-goOn
				return new(net.Dialer).DialContext(ctx, network, addr)
			}}, up)
		c := dial(t, serve(t, a, nil))
		<-dialling
		var wg sync.WaitGroup
		wg.Go(func() {
			sendPattern(c, size)
			if half {
				c.CloseWrite()
			}
		})
		if half {
			wg.Wait() // it all fits into socket buffers
		}
		goOn <- true
		if s := <-got; s != pattern(size) {
			t.Errorf("half-closed %v: upstream got %s, want %s", half, s, pattern(size))
		}
		wg.Wait()
		c.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
			t.Errorf("half-closed %v: client got %q, %v", half, b, err)
		}
		c.Close()
		if r := <-results; r.End != EndDone {
			t.Errorf("%+v", r)
		}
	}
}

func TestClientGoneDuringDialCancelsIt(t *testing.T) {
	for name, leave := range map[string]func(c *duplexConn){
		"reset":                            func(c *duplexConn) { c.SetLinger(0); c.Close() },
		"closed, where there is half-open": nil,
	} {
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					<-ctx.Done()
					return nil, errors.New("interrupted") // an error that is not the context's
				}}, "a:1", "b:1")
			var r Result
			start := time.Now()
			if leave != nil {
				c := serveFake(t.Context(), a, &Conn{})
				synctest.Wait()
				leave(c.duplexConn)
				r = <-c.result
			} else { // without half-close an end means that the client has left
				client, ours := net.Pipe()
				go func() { synctest.Wait(); client.Close() }()
				r, _ = a.ServeConn(t.Context(), &Conn{Client: ours})
			}
			if r.End != EndClientError || r.Err == nil || r.Attempts != 1 ||
				time.Since(start) != 0 {
				t.Errorf("%s: %+v after %v", name, r, time.Since(start))
			}
			for _, u := range a.Stats().Upstreams {
				if u.Open != 0 || u.Failed != 0 || u.State != "up" {
					t.Errorf("%s: %+v", name, u)
				}
			}
		})
	}
}

func TestResetBehindUnreadDataCancelsDial(t *testing.T) {
	if portable {
		t.Skip("the system does not say so: it is noticed when the dial is done")
	}
	dialling := make(chan bool)
	a, results := newApp(t, Options{
		DialTimeout: time.Minute,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dialling <- true
			<-ctx.Done()
			return nil, ctx.Err()
		}}, "a:1")
	c := dial(t, serve(t, a, nil))
	<-dialling
	c.Write([]byte("hello"))
	c.SetLinger(0)
	c.Close()
	if r := <-results; r.End != EndClientError || r.Duration > 10*time.Second {
		t.Errorf("%+v", r)
	}
	if u := a.Stats().Upstreams[0]; u.Failed != 0 {
		t.Errorf("%+v: it is not the upstream's fault", u)
	}
}

func TestContextEndsConnectionInEveryState(t *testing.T) {
	cause := errors.New("because")
	hang := func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	hold := limitFunc(func(e Event) Decision { return Decision{Wait: time.Hour} })
	for _, tc := range []struct {
		name  string
		dial  dialFunc
		limit RateLimitManager
	}{
		{"dialling", hang, nil},
		{"held before the dial", hang, hold},
		{"forwarding", dialFake(echoFake), nil},
		{"held while forwarding", dialFake(echoFake), limitFunc(func(e Event) (d Decision) {
			if e.Kind == EventData {
				d.Wait = time.Hour
			}
			return d
		})},
	} {
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{DialContext: tc.dial}, "a:1")
			ctx, cancel := context.WithCancelCause(t.Context())
			c := serveFake(ctx, a, &Conn{RateLimit: tc.limit})
			go c.Write([]byte("x"))
			synctest.Wait()
			start := time.Now()
			cancel(cause)
			if r := <-c.result; r.End != EndCanceled || r.Err != cause || time.Since(start) != 0 {
				t.Errorf("%s: %+v after %v", tc.name, r, time.Since(start))
			}
			wantCounts(t, a, 1, 0, 0)
		})
	}
	a, _ := newApp(t, Options{DialContext: hang}, "a:1")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	c := serveFake(ctx, a, &Conn{RateLimit: limitFunc(func(Event) Decision { panic("asked") })})
	if r := <-c.result; r.End != EndCanceled || r.Err != cause {
		t.Errorf("ended before it began: %+v", r)
	}
	wantCounts(t, a, 1, 0, 0)
}

func TestUpstreamConnectedTooLateIsReset(t *testing.T) {
	dialling, reached := make(chan bool), make(chan *duplexConn, 1)
	a, _ := newApp(t, Options{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dialling <- true
			<-ctx.Done()
			ours, theirs := duplex()
			reached <- theirs
			return ours, nil
		}}, "a:1")
	c := serveFake(t.Context(), a, &Conn{})
	<-dialling
	c.SetLinger(0)
	c.Close()
	if r := <-c.result; r.End != EndClientError || r.Upstream != "" {
		t.Errorf("%+v", r)
	}
	upstream := <-reached
	upstream.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := upstream.Read(make([]byte, 1)); err != syscall.ECONNRESET {
		t.Errorf("the upstream reads %v, want a reset", err)
	}
}

// A watchedContext counts the functions registered with it.
type watchedContext struct {
	context.Context
	watchers atomic.Int32
}

func (c *watchedContext) Value(any) any { return nil } // or package context would look through it

func (c *watchedContext) AfterFunc(f func()) (stop func() bool) {
	c.watchers.Add(1)
	ours := context.AfterFunc(c.Context, f)
	return func() bool { c.watchers.Add(-1); return ours() }
}

func TestServeConnLeavesNothingInTheContext(t *testing.T) {
	a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
	ctx := &watchedContext{Context: t.Context()}
	c := serveFake(ctx, a, &Conn{})
	ping(t, c)
	if n := ctx.watchers.Load(); n == 0 {
		t.Error("nobody waits for its end")
	}
	c.Close()
	<-c.result
	if n := ctx.watchers.Load(); n != 0 {
		t.Errorf("%d wait for its end", n)
	}
}

// TLS to the upstream.

func TestUpstreamTLSIsVerifiedWithinTheDialTimeout(t *testing.T) {
	t.Parallel()
	serverTLS, clientTLS := tlsConfigs(t)
	// accepts and stays silent
	silent := upstreamDoing(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	good := upstreamDoing(t, func(c *net.TCPConn) {
		tc := tls.Server(c, serverTLS)
		defer tc.Close()
		io.Copy(tc, tc)
	})
	clientTLS.ServerName = "" // so it is taken from Addr
	a, results := newAppOver(t, Options{DialTimeout: 300 * time.Millisecond},
		Upstream{Addr: silent, TLS: clientTLS},
		Upstream{Addr: upstreamDoing(t, func(c *net.TCPConn) {
			c.Write([]byte("220 not TLS\r\n"))
		}),
			TLS: clientTLS},
		// trusts nobody
		Upstream{Addr: strings.Replace(good, "127.0.0.1", "localhost", 1), TLS: &tls.Config{}},
		Upstream{Addr: good, TLS: clientTLS})
	c := dial(t, serve(t, a, nil))
	ping(t, c)
	c.Close()
	if r := <-results; r.End != EndDone || r.Attempts != 4 || r.Upstream != good {
		t.Errorf("%+v", r)
	}
	for i, u := range a.Stats().Upstreams {
		if failed := u.Failed == 1; failed != (i < 3) {
			t.Errorf("%+v", u)
		}
	}
}

func TestTLSStreamWithoutCloseNotifyIsCut(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	a, results := newAppOver(t, Options{},
		Upstream{TLS: clientTLS, Addr: upstreamDoing(t, func(c *net.TCPConn) {
			tc := tls.Server(c, serverTLS)
			io.ReadFull(tc, make([]byte, 5))
			tc.Write([]byte("half of the ans"))
		})})
	c := dial(t, serve(t, a, nil))
	c.Write([]byte("what?"))
	b, err := io.ReadAll(c)
	if string(b) != "half of the ans" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client got %q, %v; want what there was, then a reset", b, err)
	}
	if r := <-results; r.End != EndUpstreamError || r.Err != io.ErrUnexpectedEOF {
		t.Errorf("%+v", r)
	}
}

// The client sees a reset, not a close_notify.
func TestAbortedTLSClientSeesAReset(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	c := tls.Client(dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.Client = TLSServer(c.Client, serverTLS, 0)
		return nil
	})), clientTLS)
	ping(t, c)
	a.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it reads %v, want a reset", err)
	}
	if r := <-results; r.End != EndClosed {
		t.Errorf("%+v", r)
	}
}

func TestCloseNotifyWaitsForSlowReader(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	serverTLS.SessionTicketsDisabled = true     // nothing follows the handshake
	for _, ended := range []bool{false, true} { // the client's own stream
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {
				c.Write([]byte("answer"))
				c.(*duplexConn).CloseWrite()
				io.Copy(io.Discard, c)
			})}, "u:1")
			// unbuffered: a write waits for its reader
			client, ours := duplex()
			// which detects a cut
			proxy, c := tls.Server(ours, serverTLS), relay.TLSClient(client, clientTLS)
			go proxy.Handshake()
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			result := make(chan Result, 1)
			go func() { r, _ := a.ServeConn(t.Context(), &Conn{Client: proxy}); result <- r }()
			if ended {
				c.CloseWrite()
				time.Sleep(time.Second) // the upstream has seen the end, and the upload is over
			}
			io.ReadFull(c, make([]byte, 6))
			time.Sleep(time.Minute) // crypto/tls would give up after 5 s
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("client ended %v: it reads %v, want the end", ended, err)
			}
			client.Close()
			if r := <-result; r.End != EndDone && ended {
				t.Errorf("client ended %v: %+v", ended, r)
			}
		})
	}
}

func TestCloseDoesNotWaitForStuckTLSPeer(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) { flood(c) }))
	addr := serve(t, a, func(ctx context.Context, c *Conn) error {
		c.Client.(*net.TCPConn).SetWriteBuffer(64 << 10) // so that it is full soon
		tc := tls.Server(c.Client, serverTLS)
		c.Client = tc
		return tc.HandshakeContext(ctx)
	})
	c := dial(t, addr)
	c.SetReadBuffer(4 << 10)
	tc := tls.Client(c, clientTLS)
	if _, err := io.ReadFull(tc, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	fullAt := time.Now()
	// until all buffers are full
	for last := uint64(0); time.Since(fullAt) < 100*time.Millisecond; {
		if now := a.Stats().Upstreams[0].Received; now != last {
			last, fullAt = now, time.Now()
		}
		runtime.Gosched()
	}
	start := time.Now()
	a.Close()
	// tls.Conn.Close alone would try to send close_notify for 5 s.
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
	if r := <-results; r.End != EndClosed {
		t.Errorf("%+v", r)
	}
}

// Upstreams that change.

func TestSetUpstreamsWhileInUse(t *testing.T) {
	a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "a:1", "b:1")
	open := func() served {
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		return c
	}
	counts := func() string {
		s := ""
		for _, u := range a.Stats().Upstreams {
			s += fmt.Sprintf("%s %d %s, ", u.Addr, u.Open, u.State)
		}
		return s
	}
	set := func(addrs ...string) {
		var ups []Upstream
		for _, addr := range addrs {
			ups = append(ups, Upstream{Addr: addr})
		}
		if err := a.SetUpstreams(ups); err != nil {
			t.Fatal(err)
		}
	}
	end := func(c served) {
		c.Close()
		if r := <-c.result; r.End != EndDone {
			t.Errorf("%+v", r)
		}
	}
	one, two, three := open(), open(), open()
	var got []string
	note := func() { got = append(got, counts()) }
	note()
	set("b:1", "c:1")
	note()
	four, five := open(), open()
	note()
	set("c:1", "a:1", "b:1") // a is back
	note()
	six := open()
	note()
	for _, c := range []served{one, two, three, four, five, six} {
		ping(t, c)
		end(c)
	}
	note()
	want := []string{
		"a:1 2 up, b:1 1 up, ",
		"b:1 1 up, c:1 0 up, a:1 2 up, ",
		"b:1 2 up, c:1 1 up, a:1 2 up, ",
		"c:1 1 up, a:1 2 up, b:1 2 up, ",
		"c:1 2 up, a:1 2 up, b:1 2 up, ",
		"c:1 0 up, a:1 0 up, b:1 0 up, ",
	}
	if s, w := strings.Join(got, "\n"), strings.Join(want, "\n"); s != w {
		t.Errorf("got\n%s\nwant\n%s", s, w)
	}
}

func TestUpstreamRemovedDuringDial(t *testing.T) {
	dialling, goOn := make(chan bool), make(chan error)
	a, _ := newApp(t, Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr == "a:1" {
				dialling <- true
				if err := <-goOn; err != nil {
					return nil, err
				}
			}
			return dialFake(echoFake)(ctx, network, addr)
		}}, "a:1")
	for _, err := range []error{nil, syscall.ECONNREFUSED} {
		c := serveFake(t.Context(), a, &Conn{})
		<-dialling
		a.SetUpstreams([]Upstream{{Addr: "b:1"}})
		goOn <- err
		ping(t, c)
		c.Close()
		r := <-c.result
		if want := map[bool]string{true: "a:1", false: "b:1"}[err == nil]; r.Upstream != want ||
			r.End != EndDone {
			t.Errorf("dial said %v: %+v", err, r)
		}
		if s := a.Stats().Upstreams; len(s) != 1 || s[0].Open != 0 {
			t.Errorf("%+v", s)
		}
		a.SetUpstreams([]Upstream{{Addr: "a:1"}})
	}
}
