package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// TestMain fails if a test leaves a goroutine or a descriptor behind.
func TestMain(m *testing.M) {
	switch run := os.Getenv("LBPROXY_TEST_CHILD"); run {
	case "":
	case "blocking":
		blockingMain()
	default:
		childMain(run)
	}
	proxytest.Main(runner{m})
}

// A runner runs the tests, and says what they ran on.
type runner struct{ *testing.M }

func (r runner) Run() int {
	code := r.M.Run()
	if useLoops() {
		printEngines()
	}
	return code
}

func (b *balancer) stats() []UpstreamStats {
	all, _ := b.snapshot()
	return all
}

// useLoops says that apps of newApp use event loops where they can. Then the tests say in the end
// how many connections each engine has served.
func useLoops() bool { return os.Getenv("LBPROXY_LOOPS") != "" }

var engines struct {
	sync.Mutex
	onLoops, onGoroutines uint64
	goroutinesOnly        map[string]bool // tests of which no connection was on a loop
}

// countEngines counts the connections that a has served.
func countEngines(test string, a *LBProxyApp) {
	engines.Lock()
	defer engines.Unlock()
	all, n := a.Stats().Accepted, uint64(loopSessions(a))
	engines.onLoops += n
	engines.onGoroutines += all - n
	if engines.goroutinesOnly == nil {
		engines.goroutinesOnly = map[string]bool{}
	}
	if top, _, _ := strings.Cut(test, "/"); n > 0 {
		engines.goroutinesOnly[top] = false
	} else if _, known := engines.goroutinesOnly[top]; !known && all > 0 {
		engines.goroutinesOnly[top] = true
	}
}

// loopSessions is how many sessions a has given to loops.
func loopSessions(a *LBProxyApp) int64 {
	a.loops.once.Do(func() {}) // they have started, or never will
	if a.loops.group == nil {
		return 0
	}
	return a.loops.group.Started()
}

func printEngines() {
	engines.Lock()
	defer engines.Unlock()
	fmt.Printf("connections on loops: %d, on goroutines: %d\n", engines.onLoops, engines.onGoroutines)
	for _, test := range slices.Sorted(maps.Keys(engines.goroutinesOnly)) {
		if engines.goroutinesOnly[test] {
			fmt.Println("on goroutines only:", test)
		}
	}
}

// quiet is for tests that break things on purpose.
var quiet = slog.New(slog.DiscardHandler)

// newApp returns an app that is closed when the test ends, and the results of its connections.
func newApp(t testing.TB, opts Options, addrs ...string) (*LBProxyApp, <-chan Result) {
	t.Helper()
	ups := make([]Upstream, len(addrs))
	for i, addr := range addrs {
		ups[i].Addr = addr
	}
	return newAppOver(t, opts, ups...)
}

func newAppOver(t testing.TB, opts Options, ups ...Upstream) (*LBProxyApp, <-chan Result) {
	t.Helper()
	results := make(chan Result, 20_000)
	done := opts.OnDone
	opts.OnDone = func(r Result) {
		results <- r
		if done != nil {
			done(r)
		}
	}
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	opts.Loops = opts.Loops || useLoops()
	a, err := New("test", ups, &opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		if useLoops() {
			countEngines(t.Name(), a)
		}
	})
	return a, results
}

// serve makes a serve on a loopback address and returns the address.
func serve(t testing.TB, a *LBProxyApp, admit AdmitFunc) string {
	t.Helper()
	l := listen(t)
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(l, admit) }()
	t.Cleanup(func() {
		a.Close()
		if err := <-ended; err != ErrAppClosed {
			t.Errorf("Serve: %v, want ErrAppClosed", err)
		}
	})
	return l.Addr().String()
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	return proxytest.Listen(t)
}

func upstreamDoing(t testing.TB, handle func(*net.TCPConn)) string {
	t.Helper()
	return proxytest.Upstream(t, handle)
}

func echo(c *net.TCPConn) { proxytest.Echo(c) }

func dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	return proxytest.Dial(t, addr)
}

// ping sends a byte and waits for it to come back.
func ping(t testing.TB, c net.Conn) {
	t.Helper()
	proxytest.Must(t, proxytest.Ping(c))
}

// bytesFrom returns how many bytes a silent client of addr receives. It may be reset while it
// connects.
func bytesFrom(addr string) int64 {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return 0
	}
	defer c.Close()
	n, _ := io.Copy(io.Discard, c)
	return n
}

// wantCounts checks the app's counters, and that no upstream has a connection open.
func wantCounts(t *testing.T, a *LBProxyApp, accepted, refused, failed uint64) {
	t.Helper()
	s := a.Stats()
	if s.Open != 0 || s.Accepted != accepted || s.Refused+s.NotAdmitted != refused ||
		s.Failed != failed {
		t.Errorf("Stats: open %d, accepted %d, refused %d, failed %d; want 0, %d, %d, %d",
			s.Open, s.Accepted, s.Refused, s.Failed, accepted, refused, failed)
	}
	for _, u := range s.Upstreams {
		if u.Open != 0 {
			t.Errorf("Stats: upstream %s: open %d, want 0", u.Addr, u.Open)
		}
	}
}

func TestBadOptionsAreRejectedByNameAndValue(t *testing.T) {
	good := []Upstream{{Addr: "127.0.0.1:1"}}
	up := func(u Upstream) []Upstream { return append(good[:1:1], u) }
	for _, tc := range []struct {
		id   string
		ups  []Upstream
		opts *Options
		want string
	}{
		{"", good, nil, "id is empty"},
		{"db", nil, nil, `app "db": no upstreams`},
		{"db", up(Upstream{}), nil, `upstream 1: Addr "": missing port`},
		{"db", up(Upstream{Addr: "10.0.0.1"}), nil,
			`app "db": upstream 1: Addr "10.0.0.1": missing port`},
		{"db", up(Upstream{Addr: "10.0.0.1:"}), nil, `Addr "10.0.0.1:": port ""`},
		{"db", up(Upstream{Addr: ":80"}), nil, `Addr ":80": missing host`},
		{"db", up(Upstream{Addr: " a:80"}), nil, `Addr " a:80": a space in the host`},
		{"db", up(Upstream{Addr: "h/x:80"}), nil,
			`Addr "h/x:80": a slash or a control character in the host`},
		{"db", up(Upstream{Addr: "h\x00:80"}), nil,
			`Addr "h\x00:80": a slash or a control character in the host`},
		{"db", up(Upstream{Addr: "h:+80"}), nil, `Addr "h:+80": port "+80": want 1 to 65535`},
		{"db", up(Upstream{Addr: "::1:80"}), nil, `Addr "::1:80": too many colons`},
		{"db", up(Upstream{Addr: "h:0"}), nil, `port "0": want 1 to 65535`},
		{"db", up(Upstream{Addr: "h:65536"}), nil, `port "65536"`},
		{"db", up(Upstream{Addr: "h:-1"}), nil, `port "-1"`},
		{"db", up(Upstream{Addr: "h:99999999999999999999"}), nil, `port "99999999999999999999"`},
		{"db", up(Upstream{Addr: "h:no-such-service"}), nil, `port "no-such-service"`},
		{"db", up(Upstream{Addr: "127.0.0.1:1"}), nil,
			`upstream 1: Addr "127.0.0.1:1": upstream 0 has it already`},
		{"db", up(Upstream{Addr: "h:1", Weight: -1}), nil, `Addr "h:1": Weight -1: want`},
		{"db", up(Upstream{Addr: "h:1", Weight: math.MaxInt32}), nil, "Weight 2147483647"},
		{"db", up(Upstream{Addr: "h:1", MaxConns: -2}), nil, "MaxConns -2 is negative"},
		{"db", good, &Options{DialTimeout: -time.Second}, "DialTimeout -1s is negative"},
		{"db", good, &Options{MaxConns: -1}, "Options.MaxConns -1 is negative"},
	} {
		a, err := New(tc.id, tc.ups, tc.opts)
		if a != nil || err == nil || !strings.HasPrefix(err.Error(), "lbproxy: ") ||
			!strings.Contains(err.Error(), tc.want) {
			t.Errorf("New(%q, %v, %v) = %v, %v; want an error with %q", tc.id, tc.ups, tc.opts,
				a, err,
				tc.want)
		}
	}
	for _, addr := range []string{"localhost:http", "[::1]:80", "example.com:65535"} {
		if _, err := New("db", []Upstream{{Addr: addr}}, nil); err != nil {
			t.Error(err)
		}
	}
}

func TestBadUpstreamsChangeNothing(t *testing.T) {
	a, _ := newApp(t, Options{}, "10.0.0.1:1", "10.0.0.2:1")
	ups := []Upstream{{Addr: "10.0.0.3:1"}, {Addr: "10.0.0.4"}}
	if err := a.SetUpstreams(ups); err == nil {
		t.Error("SetUpstreams took an Addr without a port")
	}
	if s := a.Stats().Upstreams; len(s) != 2 || s[0].Addr != "10.0.0.1:1" ||
		s[1].Addr != "10.0.0.2:1" {
		t.Errorf("the upstreams are now %+v", s)
	}
}

func TestOptionsAndUpstreamsAreCopied(t *testing.T) {
	opts := &Options{IdleTimeout: time.Minute}
	conf := &tls.Config{}
	ups := []Upstream{{Addr: "10.0.0.1:1", TLS: conf}}
	a, err := New("db", ups, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	opts.IdleTimeout, ups[0].Addr = -1, "nonsense"
	if a.opts.IdleTimeout != time.Minute || a.Stats().Upstreams[0].Addr != "10.0.0.1:1" {
		t.Error("changing what New was given changes the app")
	}
	if ours := a.balancer.heap[0].conf.TLS; conf.ServerName != "" || ours == conf ||
		ours.ServerName != "10.0.0.1" {
		t.Errorf("the caller's tls.Config has ServerName %q, the app's %q", conf.ServerName,
			ours.ServerName)
	}
}

// A scriptedListener accepts what a function returns.
type scriptedListener struct {
	accept func() (net.Conn, error)
	closes atomic.Int32
	closed chan struct{}
}

func newScriptedListener(accept func(closed <-chan struct{}) (net.Conn, error)) *scriptedListener {
	l := &scriptedListener{closed: make(chan struct{})}
	l.accept = func() (net.Conn, error) { return accept(l.closed) }
	return l
}

func (l *scriptedListener) Accept() (net.Conn, error) { return l.accept() }
func (l *scriptedListener) Addr() net.Addr            { return &net.TCPAddr{} }
func (l *scriptedListener) Close() error {
	if l.closes.Add(1) == 1 {
		close(l.closed)
	}
	return nil
}

func TestAcceptErrorsNeitherEndTheLoopNorSpin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log proxytest.Buffer
		a, results := newApp(t, Options{
			Logger:      slog.New(slog.NewTextHandler(&log, nil)),
			DialContext: dialFake(func(c net.Conn) {})}, "u:1")
		client, ours := duplex()
		tries := 0
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			switch tries++; {
			case tries <= 10_000:
				return nil, &net.OpError{Op: "accept",
					Err: os.NewSyscallError("accept4", syscall.EMFILE)}
			case tries == 10_001:
				return ours, nil
			}
			<-closed
			return nil, net.ErrClosed
		})
		start := time.Now()
		ended := make(chan error)
		go func() { ended <- a.Serve(l, nil) }()
		client.Close()
		if r := <-results; r.End != EndDone {
			t.Errorf("after the errors: %+v", r)
		}
		took := time.Since(start)
		if least := 9_990 * time.Second; took < least || took > 10_000*time.Second {
			t.Errorf("10,000 errors took %v, want about a second each", took)
		}
		if lines := strings.Count(log.String(), "cannot accept"); lines < 9_000 ||
			lines > 1+int(took/time.Second) {
			t.Errorf("%d log lines in %v, want one a second", lines, took)
		}
		a.Close()
		if err := <-ended; err != ErrAppClosed {
			t.Errorf("Serve: %v", err)
		}
	})
}

func TestAcceptBackoffGrowsFrom5msTo1sAndStartsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {})}, "u:1")
		var delays []time.Duration
		last := time.Now()
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			delays = append(delays, time.Since(last))
			last = time.Now()
			switch len(delays) {
			case 11:
				client, ours := duplex()
				client.Close()
				return ours, nil
			case 14:
				<-closed
			}
			return nil, errors.New("something passing")
		})
		done := make(chan struct{})
		go func() { defer close(done); a.Serve(l, nil) }()
		time.Sleep(time.Minute) // of fake time
		a.Close()
		<-done
		want := "[0s 5ms 10ms 20ms 40ms 80ms 160ms 320ms 640ms 1s 1s 0s 5ms 10ms]"
		if got := fmt.Sprint(delays); got != want {
			t.Errorf("delays %v,\nwant   %v", got, want)
		}
	})
}

func TestCloseEndsTheAcceptBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{}, "u:1")
		l := newScriptedListener(func(<-chan struct{}) (net.Conn, error) {
			return nil, errors.New("something passing")
		})
		ended := make(chan error, 1)
		go func() { ended <- a.Serve(l, nil) }()
		time.Sleep(10 * time.Second) // by now each wait is a second
		start := time.Now()
		a.Close()
		if err := <-ended; err != ErrAppClosed || time.Since(start) != 0 {
			t.Errorf("Serve: %v after %v", err, time.Since(start))
		}
	})
}

func TestServeReturnsWhenItsListenerIsClosed(t *testing.T) {
	a, _ := newApp(t, Options{}, "u:1")
	l := listen(t)
	l.Close()
	if err := a.Serve(l, nil); !errors.Is(err, net.ErrClosed) || errors.Is(err, ErrAppClosed) {
		t.Errorf("closed by somebody else: %v, want net.ErrClosed", err)
	}
	if err := a.Serve(nil, nil); err == nil {
		t.Error("a nil listener: no error")
	}
	fake := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
		<-closed
		return nil, io.EOF
	})
	ended := make(chan error)
	go func() { ended <- a.Serve(fake, nil) }()
	a.Close()
	if err := <-ended; err != ErrAppClosed {
		t.Errorf("closed by us: %v, want ErrAppClosed", err)
	}
	if n := fake.closes.Load(); n != 1 {
		t.Errorf("the listener was closed %d times, want once", n)
	}
	broken := newScriptedListener(func(<-chan struct{}) (net.Conn, error) {
		return nil, net.ErrClosed
	})
	b, _ := newApp(t, Options{}, "u:1")
	if err := b.Serve(broken, nil); !errors.Is(err, net.ErrClosed) || broken.closes.Load() != 1 {
		t.Errorf("one that says it is closed: %v, closed %d times; want net.ErrClosed, once", err,
			broken.closes.Load())
	}
	late := newScriptedListener(func(<-chan struct{}) (net.Conn, error) {
		panic("accepting after Close")
	})
	if err := a.Serve(late, nil); err != ErrAppClosed || late.closes.Load() != 1 {
		t.Errorf("after Close: %v, listener closed %d times; want ErrAppClosed, once", err,
			late.closes.Load())
	}
}

func TestMaxConnsLeavesClientsInTheListenQueue(t *testing.T) {
	a, _ := newApp(t, Options{MaxConns: 2}, upstreamDoing(t, echo))
	addr := serve(t, a, nil)
	one, two, three := dial(t, addr), dial(t, addr), dial(t, addr)
	ping(t, one)
	ping(t, two)
	three.Write([]byte("x"))
	if n := a.Stats().Open; n != 2 {
		t.Errorf("%d connections open, want 2", n)
	}
	one.Close()
	if _, err := io.ReadFull(three, make([]byte, 1)); err != nil {
		t.Errorf("the third, after the first closed: %v", err)
	}
	if n := a.Stats().Open; n > 2 {
		t.Errorf("%d connections open, want 2", n)
	}
}

func TestIdleListenersHoldNoSlotOfMaxConns(t *testing.T) {
	a, results := newApp(t, Options{MaxConns: 1}, upstreamDoing(t, echo))
	addrs := []string{serve(t, a, nil), serve(t, a, nil)}
	for range 3 {
		for _, addr := range addrs {
			c := dial(t, addr)
			ping(t, c)
			c.Close()
			<-results
		}
	}
}

func TestNilConnFromListenerIsTemporaryError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{}, "u:1")
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			select {
			case <-closed:
				return nil, net.ErrClosed
			default:
				return nil, nil
			}
		})
		ended := make(chan error)
		go func() { ended <- a.Serve(l, nil) }()
		time.Sleep(time.Minute)
		a.Close()
		<-ended
		wantCounts(t, a, 0, 0, 0)
	})
}

func TestConnAcceptedWhileStoppingIsReset(t *testing.T) {
	a, _ := newApp(t, Options{}, "u:1")
	client, ours := duplex()
	l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
		<-closed
		return ours, nil
	})
	ended := make(chan error)
	go func() { ended <- a.Serve(l, nil) }()
	for a.Stats(); ; runtime.Gosched() {
		a.mu.Lock()
		listening := len(a.listeners) > 0
		a.mu.Unlock()
		if listening {
			break
		}
	}
	a.Close()
	if err := <-ended; err != ErrAppClosed {
		t.Errorf("Serve: %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); err != syscall.ECONNRESET {
		t.Errorf("the client reads %v, want a reset", err)
	}
	wantCounts(t, a, 0, 0, 0)
}

func TestAdmitDecidesHowAConnectionIsServed(t *testing.T) {
	var log proxytest.Buffer
	a, results := newApp(t, Options{
		Logger: slog.New(slog.NewTextHandler(&log,
			&slog.HandlerOptions{Level: slog.LevelDebug}))},
		upstreamDoing(t, echo))
	cause := errors.New("session over")
	var end context.CancelCauseFunc
	var n atomic.Int32
	addr := serve(t, a, func(ctx context.Context, c *Conn) error {
		switch n.Add(1) {
		case 1:
			return errors.New("who are you?")
		case 2:
			panic("admit is broken")
		}
		c.ClientID = "alice"
		end = c.Abort
		return nil
	})
	for range 2 {
		if n := bytesFrom(addr); n > 0 {
			t.Error("not admitted, but read something")
		}
	}
	c := dial(t, addr)
	ping(t, c)
	end(cause)
	r := <-results
	for r.ClientID == "" { // those that were not admitted
		r = <-results
	}
	if r.ClientID != "alice" || r.End != EndCanceled || r.Err != cause {
		t.Errorf("result %+v, want alice's, canceled, by the cause of Abort", r)
	}
	a.Close()
	wantCounts(t, a, 3, 1, 0)
	for _, want := range []string{"who are you?", "admit is broken", "client_id=alice",
		"end=canceled"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log.String())
		}
	}
}

func TestMessageWrittenByAdmitArrives(t *testing.T) {
	const size = 500_000
	a, _ := newApp(t, Options{}, "u:1")
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		io.ReadFull(c.Client, make([]byte, 5))
		sendPattern(c.Client, size)
		return errors.New("no")
	})
	c := dial(t, addr)
	c.Write([]byte("hello"))
	if got := readAll(c); !strings.HasPrefix(got, pattern(size)+" then") {
		t.Errorf("got %s, want %s and a reset", got, pattern(size))
	}
}

func TestConnReplacedByAdmitAfterCloseIsReset(t *testing.T) {
	a, results := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
	client, ours := duplex()
	admitting := make(chan bool)
	addr := serve(t, a, func(ctx context.Context, c *Conn) error {
		admitting <- true
		c.Client.Read(make([]byte, 1)) // until Close has reset it
		c.Client = ours
		return nil
	})
	dial(t, addr)
	<-admitting
	a.Close()
	if r := <-results; r.End != EndClosed {
		t.Errorf("%+v", r)
	}
	if _, err := client.Read(make([]byte, 1)); err != syscall.ECONNRESET {
		t.Errorf("it reads %v, want a reset", err)
	}
}

func TestAcceptedConnIsClosedWhenAdmitReplacesIt(t *testing.T) {
	a, results := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
	client, ours := duplex()
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.Client = ours
		return nil
	}))
	ping(t, client)
	client.Close()
	if r := <-results; r.End != EndDone {
		t.Errorf("%+v", r)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it reads %v, want an end", err)
	}
}

func TestConnDuringAdmitCountsAsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{}, "u:1")
		_, ours := duplex()
		conns := make(chan net.Conn, 1)
		conns <- ours
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			case <-closed:
				return nil, net.ErrClosed
			}
		})
		go a.Serve(l, func(ctx context.Context, c *Conn) error {
			_, err := c.Client.Read(make([]byte, 1)) // a handshake with a silent client
			if context.Cause(ctx) != ErrAppClosed {
				t.Errorf("admit's context: %v", context.Cause(ctx))
			}
			return err
		})
		synctest.Wait()
		if n := a.Stats().Open; n != 1 {
			t.Errorf("open %d, want 1", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.Shutdown(ctx); err != context.DeadlineExceeded {
			t.Errorf("Shutdown: %v, want the context's error", err)
		}
		before := time.Now()
		a.Close()
		if took := time.Since(before); took != 0 {
			t.Errorf("Close took %v", took)
		}
		wantCounts(t, a, 1, 0, 0)
	})
}

func TestShutdownWaitsForConnections(t *testing.T) {
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	addr := serve(t, a, nil)
	c := dial(t, addr)
	ping(t, c)
	if a.Stats().Stopping {
		t.Error("Stopping before Shutdown")
	}
	ended := make(chan error)
	go func() { ended <- a.Shutdown(t.Context()) }()
	<-a.stopping
	if s := a.Stats(); !s.Stopping || s.Open != 1 {
		t.Errorf("during Shutdown: %+v, want Stopping with one open", s)
	}
	for { // the listener is closed right after
		late, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		late.Close()
	}
	ping(t, c) // still served
	client, ours := net.Pipe()
	defer client.Close()
	if r, err := a.ServeConn(t.Context(),
		&Conn{Client: ours, ClientID: "late"}); err != ErrAppClosed || r.End != EndClosed ||
		r.ClientID != "late" {
		t.Errorf("ServeConn while shutting down: %+v, %v", r, err)
	}
	if r := <-results; r.ClientID != "late" {
		t.Errorf("OnDone: %+v", r)
	}
	select {
	case err := <-ended:
		t.Fatalf("Shutdown returned (%v) with a connection open", err)
	default:
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if r := <-results; r.End != EndDone {
		t.Errorf("the connection that was waited for: %+v", r)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Shutdown(canceled); err != nil {
		t.Errorf("Shutdown again, with nothing to wait for: %v", err)
	}
	if !a.Stats().Stopping {
		t.Error("not Stopping after Shutdown")
	}
	if err := a.Close(); err != nil {
		t.Errorf("Close after Shutdown: %v", err)
	}
}

func TestCloseResetsConnectionsWithoutWaitingForPeers(t *testing.T) {
	const conns, most, tries = 200, 100 * time.Millisecond, 5
	serverTLS, clientTLS := tlsConfigs(t)
	var took [tries]time.Duration
	for i := range took { // more than once, because the machine may be busy
		took[i] = closeUnderLoad(t, conns, serverTLS, clientTLS)
		if took[i] <= most {
			return
		}
	}
	t.Errorf("Close took %v, want at most %v", took, most)
}

// lateness measures how late a goroutine that only sleeps is run, in all, until the function it
// returns is called. Whatever else waits only for a processor is about as late.
func lateness() func() time.Duration {
	const nap = time.Millisecond
	stop, sum := make(chan struct{}), make(chan time.Duration)
	go func() {
		late := time.Duration(0)
		for {
			began := time.Now()
			select {
			case <-time.After(nap):
				late += max(0, time.Since(began)-2*nap)
			case <-stop:
				sum <- late + max(0, time.Since(began)-2*nap)
				return
			}
		}
	}()
	return func() time.Duration { close(stop); return <-sum }
}

// closeUnderLoad returns how long Close takes, less the wait for processors, with so many
// connections, plain and TLS, whose upstreams send all they can to clients that do not read. Socket
// buffers are bounded, because the system takes time to discard them.
func closeUnderLoad(t *testing.T, conns int, serverTLS, clientTLS *tls.Config) time.Duration {
	bounded := func(c net.Conn) net.Conn {
		c.(*net.TCPConn).SetReadBuffer(64 << 10)
		c.(*net.TCPConn).SetWriteBuffer(64 << 10)
		return c
	}
	stuck := make(chan bool, conns)
	dialer := func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			bounded(c)
		}
		return c, err
	}
	a, results := newApp(t, Options{DialContext: dialer}, upstreamDoing(t, func(c *net.TCPConn) {
		bounded(c)
		for b := make([]byte, 64<<10); ; { // and never reads
			c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := c.Write(b); err != nil {
				break
			}
		}
		stuck <- true
		c.SetWriteDeadline(time.Time{})
		c.Write([]byte("x"))
	}))
	plain := serve(t, a, func(_ context.Context, c *Conn) error {
		c.Client = bounded(c.Client)
		return nil
	})
	overTLS := serve(t, a, func(_ context.Context, c *Conn) error {
		c.Client = TLSServer(bounded(c.Client), serverTLS, 0)
		return nil
	})
	for i := range conns {
		c := bounded(dial(t, []string{plain, overTLS}[i%2]))
		if i%2 == 1 {
			c = tls.Client(c, clientTLS)
		}
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil { // and then no more
			t.Fatal(err)
		}
	}
	for range conns {
		<-stuck
	}
	late, start := lateness(), time.Now()
	a.Close()
	took := time.Since(start) - late()
	wantCounts(t, a, uint64(conns), 0, 0)
	for range conns {
		if r := <-results; r.End != EndClosed || r.Err != ErrAppClosed {
			t.Fatalf("%+v", r)
		}
	}
	return took
}

func TestNoGoroutineIsLeftWhenCloseReturns(t *testing.T) {
	for range 10 {
		const conns = 50
		var dialling sync.WaitGroup
		dialling.Add(conns)
		a, _ := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialling.Done()
				dialling.Wait() // all at once
				return dialFake(echoFake)(ctx, network, addr)
			}}, "u:1")
		addr := serve(t, a, nil)
		for range conns {
			dial(t, addr)
		}
		dialling.Wait()
		a.Close()
		// a goroutine in none of these is about to end
		for _, stack := range proxytest.Goroutines() {
			for _, f := range []string{"(*session).connect(", "(*session).report(",
				"(*session).log(",
				"(*direction).copy("} {
				if strings.Contains(stack, f) {
					t.Fatal(stack)
				}
			}
		}
	}
}

// Serve, ServeConn, Shutdown and Close start in any order. When Close has returned nothing is left,
// and each connection has had exactly one Result.
func TestShutdownInterleavings(t *testing.T) {
	rounds := 10_000
	if testing.Short() {
		rounds = 1_000
	}
	for range rounds {
		var given, done atomic.Int32
		a, err := New("test", []Upstream{{Addr: "u:1"}}, &Options{
			DialContext: dialFake(func(c net.Conn) { c.Close() }), Logger: quiet,
			OnDone: func(Result) { done.Add(1) },
		})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				given.Add(1)
				client, ours := duplex()
				defer client.Close()
				client.CloseWrite()
				a.ServeConn(t.Context(), &Conn{Client: ours})
			})
		}
		wg.Go(func() {
			l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
				select {
				case <-closed:
					return nil, net.ErrClosed
				default:
					peer, ours := duplex()
					return pairedConn{ours, peer}, nil
				}
			})
			a.Serve(l, func(_ context.Context, c *Conn) error {
				given.Add(1)
				c.Client.(pairedConn).peer.Close()
				return nil
			})
		})
		wg.Go(func() { a.Shutdown(t.Context()) })
		wg.Go(func() { a.SetUpstreams([]Upstream{{Addr: "v:1"}, {Addr: "u:1"}}) })
		wg.Go(func() { a.Close() })
		wg.Go(func() { a.Close() })
		wg.Wait()
		if s := a.Stats(); s.Open != 0 || s.Upstreams[0].Open+s.Upstreams[1].Open != 0 ||
			len(s.Upstreams) != 2 {
			t.Fatalf("left: %+v", s)
		}
		if given.Load() != done.Load() {
			t.Fatalf("%d connections, %d results", given.Load(), done.Load())
		}
	}
}

// A pairedConn knows its other end.
type pairedConn struct {
	*duplexConn
	peer *duplexConn
}

func TestOneLogLinePerConnection(t *testing.T) {
	var log proxytest.Buffer
	a, results := newApp(t, Options{
		Logger: slog.New(slog.NewTextHandler(&log,
			&slog.HandlerOptions{Level: slog.LevelDebug}))},
		upstreamDoing(t, echo))
	addr := serve(t, a, nil)
	for range 3 {
		c := dial(t, addr)
		ping(t, c)
		c.Close()
		<-results
	}
	a.Close()
	if n := strings.Count(log.String(), "\n"); n != 3 ||
		strings.Count(log.String(), "level=DEBUG") != 3 {
		t.Errorf("%d lines, want 3 at level DEBUG:\n%s", n, log.String())
	}
	b, results := newApp(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))},
		proxytest.RefusingAddr(t))
	if n := bytesFrom(serve(t, b, nil)); n > 0 {
		t.Error("read something from nobody")
	}
	<-results
	b.Close()
	if !strings.Contains(log.String(),
		`level=WARN msg="lbproxy: connection ended" app=test end=dial-failed`) {
		t.Errorf("no warning of the upstream's trouble:\n%s", log.String())
	}
}

// slowClose is a conn whose Close takes 5 seconds.
type slowClose struct{ net.Conn }

func (c slowClose) Close() error {
	time.Sleep(5 * time.Second)
	return c.Conn.Close()
}

func TestIdleConnectionsDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout, sessions = 10 * time.Second, 20
		a, results := newApp(t, Options{IdleTimeout: timeout, DialContext: dialFake(echoFake)},
			"u:1")
		start := time.Now()
		for range sessions {
			_, ours := net.Pipe()
			go a.ServeConn(t.Context(), &Conn{Client: slowClose{ours}})
		}
		for range sessions {
			if r := <-results; r.End != EndIdleTimeout {
				t.Errorf("%+v", r)
			}
		}
		if d := time.Since(start); d > timeout+2*5*time.Second {
			t.Errorf("the last one was over after %v", d)
		}
	})
}
