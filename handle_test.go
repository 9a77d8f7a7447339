package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// These tests use a Conn as a handle: Abort, Info, ConnFromContext, and its state after the end.

var errKicked = errors.New("kicked")

// comeFake has a serve connections in memory until the test ends. Each call of the function that it
// returns is one that comes, and returns the client's end of it.
func comeFake(t *testing.T, a *LBProxyApp, admit AdmitFunc) (come func() *duplexConn) {
	t.Helper()
	conns := make(chan net.Conn)
	l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
		select {
		case c := <-conns:
			return c, nil
		case <-closed:
			return nil, net.ErrClosed
		}
	})
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(l, admit) }()
	t.Cleanup(func() {
		a.Close()
		if err := <-ended; err != ErrAppClosed {
			t.Errorf("Serve: %v, want ErrAppClosed", err)
		}
	})
	return func() *duplexConn {
		client, ours := duplex()
		conns <- ours
		return client
	}
}

// wantReset checks that c's peer has reset it.
func wantReset(t *testing.T, who string, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the %s read %d bytes, %v; want a reset", who, n, err)
	}
}

func wantCanceled(t *testing.T, r Result, cause error) {
	t.Helper()
	if r.End != EndCanceled || r.Err != cause {
		t.Errorf("%s, %v; want canceled, %v", r.End, r.Err, cause)
	}
}

func TestAbortBeforeServeConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, results := newApp(t, Options{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				t.Error("an upstream was dialed")
				return nil, errors.New("no")
			}}, "u:1")
		var asked journal
		c := &Conn{RateLimit: &asked, OnRefused: func(net.Conn, error) {
			t.Error("OnRefused was called")
		}}
		c.Abort(errKicked)
		c.Abort(io.EOF)
		if i := c.Info(); i != (ConnInfo{}) {
			t.Errorf("before ServeConn: %+v", i)
		}
		s := serveFake(t.Context(), a, c)
		wantCanceled(t, <-s.result, errKicked)
		wantReset(t, "client", s)
		if len(asked.events) > 0 {
			t.Errorf("the RateLimitManager was told of %v", asked.events)
		}
		if r := <-results; r.Conn != c || r.Attempts != 0 {
			t.Errorf("OnDone: %+v", r)
		}
		if i := c.Info(); i.State != ConnOver || i.Upstream != "" {
			t.Errorf("after the end: %+v", i)
		}
		if s := a.Stats(); s.Accepted != 1 || s.Ends[EndCanceled] != 1 {
			t.Errorf("%+v", s)
		}
	})
}

// The cause of an Abort is the reason for the end, whatever admit does afterwards.
func TestAbortDuringAdmit(t *testing.T) {
	for name, then := range map[string]func(c *Conn) error{
		"admits":  func(*Conn) error { return nil },
		"rejects": func(*Conn) error { return errors.New("no") },
		"panics":  func(*Conn) error { panic("boom") },
		"replaces Client": func(c *Conn) error {
			_, c.Client = duplex()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, results := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
				var asked journal
				var conn *Conn
				come := comeFake(t, a, func(ctx context.Context, c *Conn) error {
					conn = c
					c.RateLimit = &asked
					_, err := c.Client.Read(make([]byte, 1)) // a client that is silent
					if err == nil || context.Cause(ctx) != errKicked {
						t.Errorf("admit read %v, and its context ended with %v", err,
							context.Cause(ctx))
					}
					return then(c)
				})
				client := come()
				synctest.Wait()
				if i := conn.Info(); i.State != ConnAdmitting || i.Start.IsZero() {
					t.Errorf("while admit runs: %+v", i)
				}
				conn.Abort(errKicked)
				conn.Abort(nil)
				wantReset(t, "client", client)
				wantCanceled(t, <-results, errKicked)
				if len(asked.events) > 0 {
					t.Errorf("the RateLimitManager was told of %v", asked.events)
				}
				if s := a.Stats(); s.NotAdmitted != 0 || s.Ends[EndCanceled] != 1 {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TLS may want to say goodbye, and wait for a client that does not listen. The reset comes from
// below it.
func TestAbortDuringAHandshakeResetsTheConnectionBelow(t *testing.T) {
	serverTLS, _ := tlsConfigs(t)
	a, results := newApp(t, Options{}, "u:1")
	conns := make(chan *Conn, 1)
	handshake := HandshakeTLS(serverTLS, nil)
	c := dial(t, serve(t, a, func(ctx context.Context, c *Conn) error {
		conns <- c
		return handshake(ctx, c)
	}))
	(<-conns).Abort(errKicked)
	wantCanceled(t, <-results, errKicked)
	wantReset(t, "client", c)
}

func TestAbortWhileDialing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, context.Cause(ctx)
			}}, "u:1", "v:1")
		c := new(Conn)
		s := serveFake(t.Context(), a, c)
		synctest.Wait()
		if i := c.Info(); i.State != ConnDialing || i.Upstream != "u:1" {
			t.Errorf("%+v", i)
		}
		c.Abort(errKicked)
		r := <-s.result
		wantCanceled(t, r, errKicked)
		wantReset(t, "client", s)
		if r.Attempts != 1 || r.Upstream != "" {
			t.Errorf("%+v", r)
		}
		if u := a.Stats().Upstreams[0]; u.Failed != 0 || u.State != StateUp || u.Open != 0 {
			t.Errorf("it was held against the upstream: %+v", u)
		}
	})
}

func TestAbortOfAnOpenConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		upstream := make(chan error, 1)
		a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {
			_, err := io.Copy(c, c)
			upstream <- err
		})}, "u:1")
		c := new(Conn)
		s := serveFake(t.Context(), a, c)
		ping(t, s)
		start := time.Now()
		synctest.Wait()
		if i := c.Info(); i != (ConnInfo{"u:1", start, 1, 1, ConnOpen}) {
			t.Errorf("open: %+v", i)
		}
		c.Abort(nil)
		c.Abort(errKicked)
		r := <-s.result
		wantCanceled(t, r, context.Canceled)
		wantReset(t, "client", s)
		if err := <-upstream; err != syscall.ECONNRESET {
			t.Errorf("the upstream read %v, want a reset", err)
		}
		over := ConnInfo{"u:1", start, 1, 1, ConnOver}
		if i := c.Info(); i != over {
			t.Errorf("over: %+v", i)
		}
		time.Sleep(time.Hour)
		c.Abort(errKicked)
		if i := c.Info(); i != over {
			t.Errorf("later: %+v", i)
		}
		if s := a.Stats(); s.Ends[EndCanceled] != 1 || s.Accepted != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestInfoOfARejectedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, results := newApp(t, Options{}, "u:1")
		start := time.Now()
		comeFake(t, a, func(context.Context, *Conn) error { return errors.New("no") })()
		r := <-results
		if i := r.Conn.Info(); i != (ConnInfo{Start: start, State: ConnOver}) {
			t.Errorf("%+v", i)
		}
	})
}

func TestAConnIsServedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked journal
		a, results := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		b, others := newApp(t, Options{}, "u:1")
		c := &Conn{RateLimit: &asked}
		s := serveFake(t.Context(), a, c)
		ping(t, s)
		again := func(app *LBProxyApp) {
			t.Helper()
			r, err := app.ServeConn(t.Context(), c)
			if err != ErrConnUsed || r.Err != ErrConnUsed || r.Conn != c {
				t.Errorf("again: %+v, %v", r, err)
			}
		}
		again(a)
		again(b)
		ping(t, s) // as if nothing had happened
		s.Close()
		<-s.result
		over := c.Info()
		again(a)
		b.Close()
		again(b)
		if i := c.Info(); i != over {
			t.Errorf("after the second time: %+v, want %+v", i, over)
		}
		if len(results) != 1 || len(others) != 0 || asked.count(EventOpen) != 1 {
			t.Errorf("%d and %d results, %v", len(results), len(others), asked.events)
		}
		wantCounts(t, a, 1, 0, 0)
		wantCounts(t, b, 0, 0, 0)
	})
}

// contextual is a RateLimitManager that looks at its contexts.
type contextual func(ctx context.Context, e Event)

func (f contextual) Report(ctx context.Context, e Event) Decision { f(ctx, e); return Decision{} }

func TestConnFromContext(t *testing.T) {
	if c := ConnFromContext(t.Context()); c != nil {
		t.Errorf("of a context that has none: %v", c)
	}
	synctest.Test(t, func(t *testing.T) {
		var conn *Conn
		var seen []string
		saw := func(ctx context.Context, where string) {
			c := ConnFromContext(ctx)
			if c == nil {
				where += ": none"
			} else if c != conn {
				where += ": another"
			}
			if !slices.Contains(seen, where) {
				seen = append(seen, where)
			}
		}
		a, results := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				saw(ctx, "dial")
				return dialFake(echoFake)(ctx, network, addr)
			},
		}, "u:1")
		come := comeFake(t, a, func(ctx context.Context, c *Conn) error {
			conn = c
			saw(ctx, "admit")
			c.RateLimit = contextual(func(ctx context.Context, e Event) {
				saw(ctx, e.Kind.String())
			})
			return nil
		})
		c := come()
		ping(t, c)
		c.Close()
		<-results
		if got, want := strings.Join(seen, ", "), "admit, open, dial, data, close"; got != want {
			t.Errorf("%s; want %s", got, want)
		}

		seen = nil
		checked, _ := newApp(t, Options{HealthCheck: &HealthCheck{},
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				saw(ctx, "check")
				return nil, errors.New("no")
			}}, "u:1")
		time.Sleep(time.Minute)
		checked.Close()
		if got, want := strings.Join(seen, ", "), "check: none"; got != want {
			t.Errorf("%s; want %s", got, want)
		}
	})
}

// A context that ServeConn is given keeps its values.
func TestAContextsValuesReachTheHooks(t *testing.T) {
	type key struct{}
	ctx := context.WithValue(t.Context(), key{}, "mine")
	a, _ := newApp(t, Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if ctx.Value(key{}) != "mine" {
				t.Error("the dialer's context lacks the caller's value")
			}
			return dialFake(echoFake)(ctx, network, addr)
		}}, "u:1")
	s := serveFake(ctx, a, new(Conn))
	ping(t, s)
	s.Close()
	<-s.result
}

func TestFieldsAreFixedOnceAdmitted(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	addr := &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1}
	handshake := HandshakeTLS(serverTLS, nil)
	for _, overTLS := range []bool{false, true} {
		tcp := dial(t, serve(t, a, func(ctx context.Context, c *Conn) error {
			c.ClientAddr, c.ClientID, c.Verified, c.Value = addr, "ann", true, 7
			if overTLS {
				return handshake(ctx, c)
			}
			return nil
		}))
		var client net.Conn = tcp
		if overTLS {
			client = tls.Client(tcp, clientTLS)
		}
		ping(t, client)
		var conn *Conn
		for conn = range a.Conns() {
		}
		look := func(when string) {
			t.Helper()
			if conn.ClientAddr != net.Addr(addr) || conn.ServerAddr != nil ||
				conn.ClientID != "ann" ||
				!conn.Verified || conn.Value != 7 {
				t.Errorf("%s: %+v", when, conn)
			}
			if l, r := conn.Client.LocalAddr().String(),
				conn.Client.RemoteAddr().String(); l != tcp.RemoteAddr().String() ||
				r != tcp.LocalAddr().String() {
				t.Errorf("%s: addresses %s and %s", when, l, r)
			}
			if c, ok := conn.Client.(*TLSConn); ok != overTLS || ok &&
				!c.ConnectionState().HandshakeComplete {
				t.Errorf("%s: a %T with its handshake undone", when, conn.Client)
			}
		}
		look("open")
		client.Close()
		r := <-results
		look("over")
		if r.Conn != conn || r.Client != addr.String() {
			t.Errorf("%+v", r)
		}
		wantClosed(t, conn.Client)
	}
}

// wantClosed checks that c can no longer be used.
func wantClosed(t *testing.T, c net.Conn) {
	t.Helper()
	_, read := c.Read(make([]byte, 1))
	_, wrote := c.Write(make([]byte, 1))
	for i, err := range []error{
		read, wrote, c.SetDeadline(time.Time{}), c.SetReadDeadline(time.Time{}),
		c.SetWriteDeadline(time.Time{}), c.Close(),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%T: method %d returns %v, want net.ErrClosed", c, i, err)
		}
	}
}

// The caller of ServeConn may look at its Conn's addresses at any time.
func TestServeConnLeavesClientInPlace(t *testing.T) {
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	l := listen(t)
	client := dial(t, l.Addr().String())
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c := &Conn{Client: accepted}
	go a.ServeConn(t.Context(), c)
	for range 100 {
		if c.Client.RemoteAddr().String() != client.LocalAddr().String() || c.Client != accepted {
			t.Fatal("it is another")
		}
	}
	ping(t, client)
	client.Close()
	<-results
}

func TestAdmitThatLeavesNoClientRejects(t *testing.T) {
	for _, nothing := range []net.Conn{nil, (*net.TCPConn)(nil), (*TLSConn)(nil)} {
		a, results := newApp(t, Options{MaxConns: 1}, "u:1")
		addr := serve(t, a, func(_ context.Context, c *Conn) error {
			c.Client = nothing
			return nil
		})
		for range 2 {
			if n := bytesFrom(addr); n > 0 {
				t.Errorf("%T: it read %d bytes", nothing, n)
			}
			if r := <-results; r.End != EndNotAdmitted || r.Err == nil ||
				!strings.Contains(r.Err.Error(), "Client") || r.Client == "" {
				t.Errorf("%T: %+v", nothing, r)
			}
		}
		a.Close()
		wantCounts(t, a, 2, 2, 0)
	}
}

func TestVetSeesACopyOfAConn(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("go vet compiles this module")
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("there is no go command")
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module copies\ngo 1.26.6\nrequire github.com/danielepagano/lbproxy v0.0.0\n" +
			"replace github.com/danielepagano/lbproxy => " + wd + "\n",
		"copies.go": "package copies\nimport \"github.com/danielepagano/lbproxy\"\n" +
			"func Two(c *lbproxy.Conn) *lbproxy.Conn { d := *c; return &d }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(goTool, "vet", "./...")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err == nil ||
		!strings.Contains(string(out), "copies lock value") {
		t.Errorf("%v: %s", err, out)
	}
}

// Everything that can be done to a connection, at once, while admit replaces its Client.
func TestAbortInfoConnsStatsAndCloseRaceWithAdmit(t *testing.T) {
	rounds := 4000
	if testing.Short() {
		rounds = 500
	}
	for round := range rounds {
		var done atomic.Int32
		a, err := New("test", []Upstream{{Addr: "u:1"}}, &Options{
			DialContext: dialFake(func(c net.Conn) { c.Close() }), Logger: quiet,
			OnDone: func(r Result) {
				if i := r.Conn.Info(); i.State != ConnOver || i.Sent != r.Sent ||
					i.Received != r.Received {
					t.Errorf("%+v of %+v", i, r)
				}
				done.Add(1)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		conns := make(chan *Conn, 4)
		var accepted atomic.Int32
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			if accepted.Add(1) <= 4 {
				client, ours := duplex()
				client.CloseWrite()
				return ours, nil
			}
			accepted.Add(-1)
			<-closed
			return nil, net.ErrClosed
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			a.Serve(l, func(ctx context.Context, c *Conn) error {
				conns <- c
				client, ours := duplex()
				client.CloseWrite()
				c.Client, c.ClientID = ours, "ann"
				if round%3 == 0 {
					return errors.New("no")
				}
				return nil
			})
		})
		for i := range 2 {
			wg.Go(func() {
				select {
				case c := <-conns:
					for range 3 {
						c.Info()
						c.Abort(fmt.Errorf("by %d", i))
					}
				case <-a.drained: // Close came before they were accepted
				}
			})
		}
		wg.Go(func() {
			for range 5 {
				for c := range a.Conns() {
					if c.Info().State != ConnOver && c.ClientID != "ann" {
						t.Error("Conns returned one that was not admitted")
					}
					_ = c.Client.RemoteAddr()
				}
				s := a.Stats()
				wantSum(t, s)
			}
		})
		wg.Go(func() {
			for range round % 50 { // sooner or later
				runtime.Gosched()
			}
			a.Close()
		})
		wg.Wait()
		a.Close()
		if s := a.Stats(); s.Open != 0 || s.Accepted != uint64(done.Load()) {
			t.Fatalf("%+v, and %d results", s, done.Load())
		}
	}
}

// wantSum checks that the counters of s add up.
func wantSum(t *testing.T, s Stats) {
	t.Helper()
	sum := uint64(s.Open)
	for _, n := range s.Ends {
		sum += n
	}
	if s.Accepted != sum || len(s.Ends) != len(endReasons) {
		t.Errorf("accepted %d, open %d, ends %v: the sum is %d", s.Accepted, s.Open, s.Ends, sum)
	}
}
