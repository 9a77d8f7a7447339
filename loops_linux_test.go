//go:build linux && !lbproxy_portable

package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/loop"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// newLoopApp returns an app with event loops, the address where it serves, and its results.
func newLoopApp(t testing.TB, opts Options, ups ...Upstream) (*LBProxyApp, string, <-chan Result) {
	t.Helper()
	opts.Loops = true
	a, results := newAppOver(t, opts, ups...)
	return a, serve(t, a, nil), results
}

// wantOnLoops checks how many of a's connections were given to loops.
func wantOnLoops(t *testing.T, a *LBProxyApp, want int64) {
	t.Helper()
	if got := loopSessions(a); got != want {
		t.Errorf("%d connections were on loops, want %d", got, want)
	}
}

func result(t testing.TB, results <-chan Result) Result {
	t.Helper()
	return proxytest.Receive(t, "a Result", results)
}

// visit is a client that has one answer and leaves.
func visit(t *testing.T, addr string, results <-chan Result) {
	t.Helper()
	c := dial(t, addr)
	ping(t, c)
	c.Close()
	if r := result(t, results); r.End != EndDone {
		t.Errorf("%+v", r)
	}
}

func TestLoopsServe(t *testing.T) {
	up := upstreamDoing(t, echo)
	a, addr, results := newLoopApp(t, Options{}, Upstream{Addr: up})
	c := dial(t, addr)
	ping(t, c)
	var conn *Conn
	for conn = range a.Conns() {
	}
	// A loop counts a byte after it has moved, so the client may have it before.
	proxytest.Eventually(t, "the answer is counted", func() bool { return conn.Info().Received == 1 })
	info := conn.Info()
	if info.State != ConnOpen || info.Upstream != up || info.Sent != 1 || info.Received != 1 {
		t.Errorf("%+v", info)
	}
	client := conn.Client
	if client.RemoteAddr().String() != c.LocalAddr().String() ||
		client.LocalAddr().String() != addr {
		t.Errorf("Client is from %v to %v", client.RemoteAddr(), client.LocalAddr())
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read of the stub: %v", err)
	}
	if _, err := client.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write of the stub: %v", err)
	}
	if s := a.Stats(); s.Open != 1 || s.Sent != 1 || s.Received != 1 || s.Upstreams[0].Open != 1 {
		t.Errorf("%+v", s)
	}
	c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Error(err)
	}
	r := result(t, results)
	if r.End != EndDone || r.Err != nil || r.Upstream != up || r.Attempts != 1 || r.Sent != 1 ||
		r.Received != 1 || r.Client != c.LocalAddr().String() || r.Conn != conn {
		t.Errorf("%+v", r)
	}
	if info := conn.Info(); info.State != ConnOver || info.Sent != 1 {
		t.Errorf("%+v", info)
	}
	wantOnLoops(t, a, 1)
	wantCounts(t, a, 1, 0, 0)
}

func TestLoopsAreNotForOtherConnections(t *testing.T) {
	up := upstreamDoing(t, echo)
	with := func(change func(*Conn)) AdmitFunc {
		return func(_ context.Context, c *Conn) error {
			change(c)
			return nil
		}
	}
	foreign := limitFunc(func(Event) Decision { return Decision{} })
	clients := NewClientLimits(10, func(string) RateLimitManager { return foreign })
	for name, tc := range map[string]struct {
		opts  Options
		admit AdmitFunc
	}{
		"a client of another type": {Options{Loops: true}, with(func(c *Conn) {
			c.Client = struct{ *net.TCPConn }{c.Client.(*net.TCPConn)}
		})},
		"a client that blocks": {Options{Loops: true}, with(func(c *Conn) {
			f, err := c.Client.(*net.TCPConn).File()
			proxytest.Must(t, err)
			f.Fd() // makes both block
			f.Close()
		})},
		"a caller's RateLimit": {Options{Loops: true}, with(func(c *Conn) { c.RateLimit = foreign })},
		"a caller's limit for clients": {Options{Loops: true}, with(func(c *Conn) {
			c.RateLimit = All(&OpenLimit{Max: 9}, clients.For("x"))
		})},
		"a caller's address": {Options{Loops: true}, with(func(c *Conn) {
			c.ClientAddr = struct{ net.Addr }{c.Client.RemoteAddr()}
		})},
		"DialContext": {Options{Loops: true, DialContext: new(net.Dialer).DialContext}, nil},
		"off":         {Options{}, nil},
	} {
		if name == "off" && useLoops() {
			continue // newApp sets it
		}
		t.Run(name, func(t *testing.T) {
			a, results := newApp(t, tc.opts, up)
			l := listen(t)
			go a.Serve(l, tc.admit)
			visit(t, l.Addr().String(), results)
			wantOnLoops(t, a, 0)
		})
	}
}

func TestGoroutinesServeWhereLoopsAreRefused(t *testing.T) {
	newLoops = func(relay.Config, int) (*loop.Group, error) { return nil, errors.New("no such thing") }
	defer func() { newLoops = loop.NewGroup }()
	var log proxytest.Buffer
	a, addr, results := newLoopApp(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))},
		Upstream{Addr: upstreamDoing(t, echo)})
	c := dial(t, addr)
	ping(t, c)
	c.Close()
	if r := result(t, results); r.End != EndDone {
		t.Errorf("%+v", r)
	}
	wantOnLoops(t, a, 0)
	serve(t, a, nil)
	a.Close()
	if n := strings.Count(log.String(), "no such thing"); n != 1 {
		t.Errorf("%d lines say why: %s", n, log.String())
	}
}

func TestLoopDialFails(t *testing.T) {
	t.Parallel()
	refusing := proxytest.RefusingAddr(t)
	hole := proxytest.BlackHole(t)
	up := upstreamDoing(t, echo)
	var log proxytest.Buffer
	a, addr, results := newLoopApp(t, Options{
		DialTimeout: 300 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}, Upstream{Addr: refusing}, Upstream{Addr: hole}, Upstream{Addr: up})
	c := dial(t, addr)
	ping(t, c)
	c.Close()
	if r := result(t, results); r.Attempts != 3 || r.Upstream != up || r.End != EndDone {
		t.Errorf("%+v", r)
	}
	for i, u := range a.Stats().Upstreams[:2] {
		if u.State != StateCooling || u.Failed != 1 || u.Open != 0 {
			t.Errorf("upstream %d: %+v", i, u)
		}
	}
	proxytest.Eventually(t, "both failures are logged", func() bool {
		return strings.Count(log.String(), "upstream failed and is skipped") == 2
	})

	proxytest.Must(t, a.SetUpstreams([]Upstream{{Addr: refusing}, {Addr: hole}}))
	if err := proxytest.Cut(dial(t, addr)); err != nil {
		t.Error(err)
	}
	r := result(t, results)
	var failed *DialError
	if r.End != EndDialFailed || r.Attempts != 2 || r.Upstream != "" || !errors.As(r.Err, &failed) ||
		!errors.Is(r.Err, syscall.ECONNREFUSED) || !errors.Is(r.Err, os.ErrDeadlineExceeded) {
		t.Errorf("%+v", r)
	}
	want := "dial tcp " + refusing + ": connect: connection refused"
	if !strings.Contains(r.Err.Error(), want) {
		t.Errorf("%q does not say %q", r.Err, want)
	}
	wantCounts(t, a, 2, 0, 1)
	wantOnLoops(t, a, 2)
}

func TestLongestTimeoutsAreForEver(t *testing.T) {
	up := upstreamDoing(t, echo)
	_, addr, results := newLoopApp(t, Options{
		DialTimeout: math.MaxInt64, IdleTimeout: math.MaxInt64,
	}, Upstream{Addr: up})
	visit(t, addr, results)
}

func TestLoopWithoutUpstream(t *testing.T) {
	a, addr, results := newLoopApp(t, Options{}, Upstream{Addr: "127.0.0.1:1", Drain: true})
	if n := bytesFrom(addr); n != 0 { // it may be reset while it connects
		t.Errorf("the client was sent %d bytes", n)
	}
	if r := result(t, results); r.End != EndNoUpstream ||
		r.Err.Error() != ErrNoUpstream.Error()+": 1 draining" {
		t.Errorf("%+v", r)
	}
	wantCounts(t, a, 1, 0, 1)
}

func TestLoopAbort(t *testing.T) {
	cause := errors.New("enough")
	for _, dialling := range []bool{false, true} {
		up := upstreamDoing(t, echo)
		if dialling {
			up = proxytest.BlackHole(t)
		}
		a, addr, results := newLoopApp(t, Options{}, Upstream{Addr: up})
		c := dial(t, addr)
		want := ConnDialing
		if !dialling {
			ping(t, c)
			want = ConnOpen
		}
		var conn *Conn
		proxytest.Eventually(t, "the connection is known", func() bool {
			for conn = range a.Conns() {
			}
			return conn != nil && conn.Info().Upstream == up
		})
		if s := conn.Info().State; s != want {
			t.Errorf("%v, want %v", s, want)
		}
		conn.Abort(cause)
		conn.Abort(errors.New("too late"))
		if err := proxytest.Cut(c); err != nil {
			t.Error(err)
		}
		if r := result(t, results); r.End != EndCanceled || r.Err != cause {
			t.Errorf("%+v", r)
		}
		wantCounts(t, a, 1, 0, 0)
		if u := a.Stats().Upstreams[0]; u.State != StateUp || u.Failed != 0 {
			t.Errorf("%+v", u)
		}
	}
}

func TestLoopCloseAndShutdown(t *testing.T) {
	t.Parallel()
	open, hole := upstreamDoing(t, echo), proxytest.BlackHole(t)
	a, addr, results := newLoopApp(t, Options{},
		Upstream{Addr: open, MaxConns: 20}, Upstream{Addr: hole})
	var clients []*net.TCPConn
	for range 40 { // 20 are open, 20 are dialing
		clients = append(clients, dial(t, addr))
	}
	proxytest.Eventually(t, "all have an upstream", func() bool {
		s := a.Stats()
		return s.Upstreams[0].Open == 20 && s.Upstreams[1].Open == 20
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.Shutdown(ctx); err != context.DeadlineExceeded {
		t.Errorf("Shutdown: %v", err)
	}
	if _, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
		t.Error("it accepts after Shutdown")
	}
	start := time.Now()
	proxytest.Must(t, a.Close())
	if took := time.Since(start); took > proxytest.Patience/2 {
		t.Errorf("Close took %v", took)
	}
	for _, c := range clients {
		if err := proxytest.Cut(c); err != nil {
			t.Error(err)
		}
		if r := result(t, results); r.End != EndClosed || r.Err != ErrAppClosed {
			t.Errorf("%+v", r)
		}
	}
	wantCounts(t, a, 40, 0, 0)
	wantOnLoops(t, a, 40)
}

func TestLoopUpstreamName(t *testing.T) {
	up := upstreamDoing(t, echo)
	_, port, _ := net.SplitHostPort(up)
	a, addr, results := newLoopApp(t, Options{},
		Upstream{Addr: "no-such-host.invalid:80"}, Upstream{Addr: "localhost:" + port})
	c := dial(t, addr)
	ping(t, c)
	c.Close()
	r := result(t, results)
	if r.End != EndDone || r.Upstream != "localhost:"+port || r.Attempts != 2 {
		t.Errorf("%+v", r)
	}
	var lookup *net.DNSError
	if u := a.Stats().Upstreams[0]; u.Failed != 1 || !errors.As(u.Err, &lookup) {
		t.Errorf("%+v", u)
	}
	wantOnLoops(t, a, 1)
	wantCounts(t, a, 1, 0, 0)
}

func TestLoopProxyHeader(t *testing.T) {
	for version := 1; version <= 2; version++ {
		got := make(chan []byte, 1)
		up := upstreamDoing(t, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			got <- b
		})
		a, addr, results := newLoopApp(t, Options{}, Upstream{Addr: up, ProxyProtocol: version})
		c := dial(t, addr)
		c.Write([]byte("hello"))
		c.CloseWrite()
		b := <-got
		from, to := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
		header := fmt.Sprintf("PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n", from.Port, to.Port)
		if version == 2 {
			header = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01" +
				string([]byte{byte(from.Port >> 8), byte(from.Port), byte(to.Port >> 8), byte(to.Port)})
		}
		if string(b) != header+"hello" {
			t.Errorf("version %d: %q, want %q", version, b, header+"hello")
		}
		if r := result(t, results); r.Sent != 5 || r.End != EndDone {
			t.Errorf("%+v", r)
		}
		wantOnLoops(t, a, 1)
	}
}

func TestSessionLeavesLoopForAnUpstreamWithTLS(t *testing.T) {
	config, clientConfig := proxytest.TLSConfigs()
	l := tls.NewListener(listen(t), config)
	t.Cleanup(proxytest.Serve(l, func(c net.Conn) {
		io.Copy(c, c)
		c.(*tls.Conn).CloseWrite()
	}))
	refusing := proxytest.RefusingAddr(t)
	a, addr, results := newLoopApp(t, Options{},
		Upstream{Addr: refusing}, Upstream{Addr: l.Addr().String(), TLS: clientConfig})
	c := dial(t, addr)
	c.Write([]byte("before the handshake"))
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "before the handshake" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	r := result(t, results)
	if r.End != EndDone || r.Attempts != 2 || r.Sent != 20 || r.Received != 20 {
		t.Errorf("%+v", r)
	}
	wantCounts(t, a, 1, 0, 0)
}

// TestBulkLeavesItsLoop moves more than a loop moves itself, in one direction or both, and aborts
// some on the way.
func TestBulkLeavesItsLoop(t *testing.T) {
	const size = 8 << 20
	up := upstreamDoing(t, func(c *net.TCPConn) {
		var both sync.WaitGroup
		both.Go(func() {
			proxytest.Pattern(1).Send(c, size)
			c.CloseWrite()
		})
		proxytest.Pattern(0).Receive(c)
		both.Wait()
	})
	a, addr, results := newLoopApp(t, Options{}, Upstream{Addr: up})
	for round := range 12 {
		c := dial(t, addr)
		if round%3 == 2 { // which does not write: a write takes the error of a reset
			if _, err := io.CopyN(io.Discard, c, int64(round)*60_000); err != nil {
				t.Error(err)
			}
			for conn := range a.Conns() {
				conn.Abort(nil)
			}
			if err := proxytest.Cut(c); err != nil {
				t.Error(err)
			}
			if r := result(t, results); r.End != EndCanceled || r.Received < int64(round)*60_000 {
				t.Errorf("%+v", r)
			}
			continue
		}
		var sending sync.WaitGroup
		sending.Go(func() {
			proxytest.Pattern(0).Send(c, size)
			c.CloseWrite()
		})
		if err := proxytest.Pattern(1).Exactly(c, size); err != nil {
			t.Error(err)
		}
		sending.Wait()
		if r := result(t, results); r.End != EndDone || r.Sent != size || r.Received != size {
			t.Errorf("%+v", r)
		}
	}
	s := a.Stats()
	if s.Ends[EndDone] != 8 || s.Ends[EndCanceled] != 4 || s.Sent < 8*size || s.Received < 8*size {
		t.Errorf("%+v", s)
	}
	wantOnLoops(t, a, 12)
}

func TestLoopIdleTimeout(t *testing.T) {
	up := upstreamDoing(t, echo)
	_, addr, results := newLoopApp(t, Options{IdleTimeout: 300 * time.Millisecond}, Upstream{Addr: up})
	// On a busy machine the timeout may be over before a ping, and even before the client has noticed
	// that it is connected.
	if c, err := net.Dial("tcp", addr); err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		if err := proxytest.Cut(c); err != nil {
			t.Error(err)
		}
	}
	if r := result(t, results); r.End != EndIdleTimeout || r.Err != ErrIdleTimeout ||
		r.Duration < 250*time.Millisecond {
		t.Errorf("%+v", r)
	}
}

func TestLoopResets(t *testing.T) {
	serving := make(chan *net.TCPConn)
	up := upstreamDoing(t, func(c *net.TCPConn) {
		serving <- c
		io.Copy(io.Discard, c)
	})
	_, addr, results := newLoopApp(t, Options{}, Upstream{Addr: up})
	for _, want := range []EndReason{EndClientError, EndUpstreamError} {
		c := dial(t, addr)
		server := <-serving
		server.Write([]byte("x"))
		io.ReadFull(c, make([]byte, 1))
		if want == EndClientError {
			c.SetLinger(0)
			c.Close()
		} else {
			server.Write([]byte("the last"))
			time.Sleep(20 * time.Millisecond) // until it has arrived, since a reset overtakes
			server.SetLinger(0)
			server.Close()
			if b, err := io.ReadAll(c); string(b) != "the last" || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%q, %v", b, err)
			}
		}
		if r := result(t, results); r.End != want || r.Err == nil || r.Upstream != up {
			t.Errorf("%+v", r)
		}
	}
}

func TestLoopHealthChecks(t *testing.T) {
	t.Parallel()
	up, hole := upstreamDoing(t, echo), proxytest.BlackHole(t)
	var mu sync.Mutex
	bad := map[string]bool{}
	a, addr, results := newLoopApp(t, Options{CloseOnDown: true, HealthCheck: &HealthCheck{
		Interval: 10 * time.Millisecond, Fall: 1, Rise: 1,
		Check: func(_ context.Context, u Upstream) error {
			mu.Lock()
			defer mu.Unlock()
			if bad[u.Addr] {
				return errors.New("bad")
			}
			return nil
		},
	}}, Upstream{Addr: hole}, Upstream{Addr: up})
	isBad := func(addr string) {
		mu.Lock()
		defer mu.Unlock()
		bad[addr] = true
	}
	c := dial(t, addr)
	proxytest.Eventually(t, "it is dialled", func() bool { return a.Stats().Upstreams[0].Open == 1 })
	isBad(hole) // the dial moves on
	ping(t, c)
	isBad(up) // the connection is reset
	if err := proxytest.Cut(c); err != nil {
		t.Error(err)
	}
	if r := result(t, results); r.End != EndUpstreamError || r.Attempts != 2 ||
		!errors.Is(r.Err, errUpstreamDown) && r.Err.Error() == "" {
		t.Errorf("%+v", r)
	}
}

func TestLoopMaxConnsLeavesClientsInTheQueue(t *testing.T) {
	up := upstreamDoing(t, echo)
	a, addr, results := newLoopApp(t, Options{MaxConns: 2}, Upstream{Addr: up})
	first, second := dial(t, addr), dial(t, addr)
	ping(t, first)
	ping(t, second)
	third := dial(t, addr)
	third.Write([]byte("p"))
	third.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a third connection was served: %v", err)
	}
	first.Close()
	result(t, results)
	third.SetReadDeadline(time.Now().Add(proxytest.Patience))
	if _, err := io.ReadFull(third, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	if n := a.Stats().Open; n != 2 {
		t.Errorf("%d are open", n)
	}
}

// TestHooksOfLoopSessionsMayBlock has OnDone and the log block for ever: others are served.
func TestHooksOfLoopSessionsMayBlock(t *testing.T) {
	up := upstreamDoing(t, echo)
	blocked := make(chan struct{})
	defer close(blocked) // before the app is closed, which waits for hooks
	a, addr, _ := newLoopApp(t, Options{
		MaxConns: 50,
		OnDone:   func(Result) { <-blocked },
		Logger: slog.New(slog.NewTextHandler(
			blockedWriter(blocked), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}, Upstream{Addr: up})
	for range 200 {
		c := dial(t, addr)
		ping(t, c)
		c.Close()
	}
	proxytest.Eventually(t, "all are counted out", func() bool { return a.Stats().Open == 0 })
	wantOnLoops(t, a, 200)
}

// A blockedWriter blocks until it is closed.
type blockedWriter chan struct{}

func (w blockedWriter) Write(b []byte) (int, error) {
	<-w
	return len(b), nil
}

func TestPanicInOnDoneOfALoopSession(t *testing.T) {
	var log proxytest.Buffer
	up := upstreamDoing(t, echo)
	a, addr, _ := newLoopApp(t, Options{
		OnDone: func(Result) { panic("oops") }, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}, Upstream{Addr: up})
	for range 3 {
		c := dial(t, addr)
		ping(t, c)
		c.Close()
	}
	proxytest.Eventually(t, "the panics are logged", func() bool {
		return strings.Count(log.String(), "panic=oops") == 3
	})
	proxytest.Eventually(t, "all are counted out", func() bool { return a.Stats().Open == 0 })
}

// TestServeOnLoopsReturnsWhenItsListenerIsClosed also shows that the address is free at once.
func TestServeOnLoopsReturnsWhenItsListenerIsClosed(t *testing.T) {
	t.Parallel()
	up := upstreamDoing(t, echo)
	a, results := newApp(t, Options{Loops: true}, up)
	addr := proxytest.FreeAddr(t) // which no other test gets meanwhile
	l, err := net.Listen("tcp", addr)
	proxytest.Must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(l, nil) }()
	c := dial(t, addr)
	ping(t, c)
	l.Close()
	proxytest.ListenAgain(t, addr).Close()
	if err := proxytest.Receive(t, "Serve's end", ended); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
	ping(t, c) // open ones go on
	c.Close()
	result(t, results)
}

// TestLoopSessionsStress has sessions end in every way at once, while upstreams change, and checks
// every byte, the counts, and that each connection has one Result.
func TestLoopSessionsStress(t *testing.T) {
	var ups []Upstream
	for range 3 {
		ups = append(ups, Upstream{Addr: upstreamDoing(t, echo)})
	}
	ups = append(ups, Upstream{Addr: proxytest.RefusingAddr(t)})
	a, addr, results := newLoopApp(t, Options{FailTimeout: -1}, ups...)
	stop := make(chan struct{})
	var changing, clients sync.WaitGroup
	changing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(3 * time.Millisecond):
			}
			a.SetUpstreams(append(ups[i%4:len(ups):len(ups)], ups[:i%4]...)[:3])
			for c := range a.Conns() {
				if i%7 == 0 {
					c.Abort(nil)
				}
				break
			}
			a.Stats()
		}
	})
	for i := range 16 {
		clients.Go(func() {
			for n := range 60 {
				p := proxytest.Pattern(i<<20 | n)
				c, err := net.Dial("tcp", addr)
				if err != nil {
					continue
				}
				tcp := c.(*net.TCPConn)
				c.SetDeadline(time.Now().Add(proxytest.Patience))
				size := int64([]int{1, 3000, 70_000, 1 << 20}[n%4])
				sent := make(chan error, 1)
				go func() {
					_, err := p.Send(c, size)
					sent <- errors.Join(err, tcp.CloseWrite())
				}()
				if n%5 == 4 {
					tcp.SetLinger(0)
				} else {
					b, err := io.ReadAll(c)
					if wrong := p.Check(0, b); wrong != nil {
						t.Error(wrong)
					}
					// A write that meets a reset takes the error: a read then sees an end.
					if err == nil && <-sent == nil && int64(len(b)) != size {
						t.Errorf("a clean end after %d of %d bytes", len(b), size)
					}
				}
				c.Close()
			}
		})
	}
	clients.Wait()
	close(stop)
	changing.Wait()
	proxytest.Eventually(t, "all have ended", func() bool { return a.Stats().Open == 0 })
	a.Close()
	s := a.Stats()
	var ends uint64
	for _, n := range s.Ends {
		ends += n
	}
	if ends != s.Accepted || uint64(len(results)) != s.Accepted || s.Ends[EndDone] == 0 {
		t.Errorf("%d Results, %+v", len(results), s)
	}
	for _, u := range s.Upstreams {
		if u.Open != 0 {
			t.Errorf("%+v", u)
		}
	}
	wantOnLoops(t, a, int64(s.Accepted))
}

// TestAbortBeforeALoopStarts aborts a session that is in Conns and whose loop has not got it yet: it
// dials nobody.
func TestAbortBeforeALoopStarts(t *testing.T) {
	a, results := newAppOver(t, Options{Loops: true}, Upstream{Addr: "127.0.0.1:1"})
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
	proxytest.Must(t, err)
	defer syscall.Close(fds[0])
	s := a.begin(context.Background(), &Conn{Client: &heldConn{}})
	s.accepted, s.client, s.state = true, s.raw, ConnDialing
	s.loop = loop.NewSession(fds[1], (*onLoop)(s))
	if !a.enter(s) {
		t.Fatal("the app is stopped")
	}
	cause := errors.New("aborted")
	for c := range a.Conns() {
		c.Abort(cause)
	}
	a.startLoops().Start(s.loop)
	if r := result(t, results); r.End != EndCanceled || r.Err != cause || r.Attempts != 0 {
		t.Errorf("%+v", r)
	}
}

// TestAbortOnTheWayFromALoop aborts a session that has chosen an upstream with TLS, and left its
// loop for that, but has no relay yet: the dial that it owes is settled.
func TestAbortOnTheWayFromALoop(t *testing.T) {
	a, results := newAppOver(t, Options{}, Upstream{Addr: "127.0.0.1:1", TLS: new(tls.Config)})
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
	proxytest.Must(t, err)
	defer syscall.Close(fds[0])
	s := a.begin(context.Background(), &Conn{Client: &heldConn{}})
	s.client = s.raw
	if !a.enter(s) {
		t.Fatal("the app is stopped")
	}
	s.loop = loop.NewSession(fds[1], (*onLoop)(s))
	if _, err := (*onLoop)(s).Next(nil); err != loop.ErrLeave {
		t.Fatal(err)
	}
	s.conn.Abort(errors.New("aborted"))
	s.goOn(fds[1], -1)
	if r := result(t, results); r.End != EndCanceled {
		t.Errorf("%+v", r)
	}
	if u := a.balancer.heap[0]; u.dialing != 0 || u.open != 0 {
		t.Errorf("%d dials and %d connections are left", u.dialing, u.open)
	}
}

// TestAbortOnTheWayToARelay aborts sessions that leave their loop with an upstream: whenever that
// is, the Result names it.
func TestAbortOnTheWayToARelay(t *testing.T) {
	a, results := newAppOver(t, Options{}, Upstream{Addr: "127.0.0.1:1"})
	pair := func() [2]int {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
		proxytest.Must(t, err)
		return fds
	}
	for i := range 3000 {
		client, server := pair(), pair()
		s := a.begin(context.Background(), &Conn{Client: &heldConn{}})
		s.client = s.raw
		if !a.enter(s) {
			t.Fatal("the app is stopped")
		}
		s.loop = loop.NewSession(client[1], (*onLoop)(s))
		if _, err := (*onLoop)(s).Next(nil); err != nil {
			t.Fatal(err)
		}
		(*onLoop)(s).Connected()
		var abort sync.WaitGroup
		abort.Go(func() {
			for range i % 600 { // some of these waits end in the middle of goOn
				runtime.KeepAlive(time.Now())
			}
			s.conn.Abort(nil)
		})
		s.goOn(client[1], server[1])
		if r := result(t, results); r.End != EndCanceled || r.Upstream == "" {
			t.Fatalf("%+v", r)
		}
		abort.Wait()
		syscall.Close(client[0])
		syscall.Close(server[0])
	}
}

// TestLoopsAcceptFromASocketThatWasMadeBlocking has somebody who shares the listener's socket,
// as other processes may, make it block, which holds for all.
func TestLoopsAcceptFromASocketThatWasMadeBlocking(t *testing.T) {
	up := upstreamDoing(t, echo)
	a, _ := newApp(t, Options{Loops: true}, up)
	l, err := Listen("127.0.0.1:0")
	proxytest.Must(t, err)
	go a.Serve(l, nil)
	addr := l.Addr().String()
	ping(t, dial(t, addr))
	shared, err := l.(*net.TCPListener).File()
	proxytest.Must(t, err)
	defer shared.Close()
	proxytest.Must(t, syscall.SetNonblock(int(shared.Fd()), false))
	for range 3 {
		c := dial(t, addr)
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		ping(t, c)
		c.Close()
	}
}

// A slowError blocks whoever asks for its text.
type slowError chan struct{}

func (e slowError) Error() string {
	<-e
	return "slow"
}

// TestTextOfACauseDoesNotHoldLoopsUp aborts with an error whose text the log has to wait for.
func TestTextOfACauseDoesNotHoldLoopsUp(t *testing.T) {
	slow := make(slowError)
	a, err := New("test", []Upstream{{Addr: upstreamDoing(t, echo)}}, &Options{
		Loops: true, Logger: slog.New(slog.NewTextHandler(
			io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	proxytest.Must(t, err)
	defer a.Close()
	defer close(slow)
	addr := serve(t, a, nil)
	for range 4 {
		ping(t, dial(t, addr))
	}
	for c := range a.Conns() {
		c.Abort(slow)
	}
	proxytest.Eventually(t, "all are counted out", func() bool { return a.Stats().Open == 0 })
	for range 4 {
		ping(t, dial(t, addr))
	}
}
