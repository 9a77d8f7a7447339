package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// These tests are about OnRefused, which sends a last word to clients that cannot be served.

const sorry = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 1000\r\nConnection: " +
	"close\r\n\r\n"

func say503(c net.Conn, _ error) { io.WriteString(c, sorry+strings.Repeat("x", 1000)) }

// refusing are the three ways not to be served, each with its error.
var refusing = map[EndReason]struct {
	up    Upstream
	limit RateLimitManager
	err   error
}{
	EndRateLimited: {Upstream{Addr: "127.0.0.1:1"}, new(OpenLimit), ErrRateLimited},
	EndNoUpstream:  {Upstream{Addr: "127.0.0.1:1", Drain: true}, nil, ErrNoUpstream},
	EndDialFailed:  {Upstream{Addr: "127.0.0.1:1"}, nil, syscall.ECONNREFUSED},
}

// To close a connection with bytes unread resets it, and the client would lose the answer.
func TestRefusedClientThatHasSentReadsAWhole503(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	handshake := HandshakeTLS(serverTLS, nil)
	for end, tc := range refusing {
		for _, overTLS := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/TLS=%v", end, overTLS), func(t *testing.T) {
				sent, told := make(chan bool), make(chan error, 1)
				a, results := newAppOver(t, Options{
					DialContext: func(context.Context, string, string) (net.Conn, error) {
						return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
					}}, tc.up)
				tcp := dial(t, serve(t, a, func(ctx context.Context, c *Conn) error {
					c.RateLimit = tc.limit
					c.OnRefused = func(c net.Conn, err error) {
						if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil ||
							errors.Is(err, io.EOF) {
							t.Errorf("OnRefused read %d bytes, %v; want an error", n, err)
						}
						say503(c, err)
						told <- err
					}
					if overTLS {
						if err := handshake(ctx, c); err != nil {
							return err
						}
					}
					<-sent
					return nil
				}))
				var c net.Conn = tcp
				if overTLS {
					c = tls.Client(tcp, clientTLS)
				}
				if n, err := c.Write(make([]byte, 64<<10)); err != nil {
					t.Fatal(n, err)
				}
				close(sent)
				got, err := io.ReadAll(c)
				if want := sorry + strings.Repeat("x", 1000); string(got) != want || err != nil {
					t.Errorf("the client read %d bytes, %v; want %d", len(got), err, len(want))
				}
				r := <-results
				if err := <-told; err != r.Err || !errors.Is(err, tc.err) || r.End != end {
					t.Errorf("OnRefused got %v; the result is %+v", err, r)
				}
			})
		}
	}
}

// Neither is it lost to a client that goes on sending.
func TestRefusedClientThatGoesOnSendingReadsAWhole503(t *testing.T) {
	a, _ := newAppOver(t, Options{}, Upstream{Addr: "127.0.0.1:1", Drain: true})
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		c.OnRefused = say503
		return nil
	})
	for range 20 {
		c := dial(t, addr)
		sent := make(chan error)
		go func() {
			_, err := c.Write(make([]byte, 8<<20))
			sent <- err
		}()
		got, err := io.ReadAll(c)
		if len(got) != len(sorry)+1000 || err != nil {
			t.Errorf("the client read %d bytes, %v", len(got), err)
		}
		c.Close()
		<-sent
	}
}

func TestOnRefusedIsNotCalledForAnAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, stop := range map[string]func(a *LBProxyApp, c *Conn, cancel func()){
			"Abort":   func(_ *LBProxyApp, c *Conn, _ func()) { c.Abort(errKicked) },
			"context": func(_ *LBProxyApp, _ *Conn, cancel func()) { cancel() },
			"Close":   func(a *LBProxyApp, _ *Conn, _ func()) { a.Close() },
		} {
			for _, where := range []string{"limit", "dial"} {
				stopping := make(chan bool)
				block := func() {
					stopping <- true
					<-stopping
				}
				a, _ := newApp(t, Options{
					DialContext: func(context.Context, string, string) (net.Conn, error) {
						block()
						return nil, errors.New("refused")
					}}, "u:1")
				c := &Conn{OnRefused: func(net.Conn, error) {
					t.Errorf("%s, %s: OnRefused was called", name, where)
				}}
				if where == "limit" {
					c.RateLimit = rateFunc(func(context.Context, Event) Decision {
						block()
						return Decision{Exceeded: true}
					})
				}
				ctx, cancel := context.WithCancel(t.Context())
				s := serveFake(ctx, a, c)
				<-stopping
				go stop(a, c, cancel)
				synctest.Wait()
				stopping <- true
				if r := <-s.result; r.End != EndCanceled && r.End != EndClosed {
					t.Errorf("%s, %s: %+v", name, where, r)
				}
				wantReset(t, name+" client", s)
				cancel()
				a.Close()
			}
		}
	})
}

// The connection is over for everybody else before OnRefused runs.
func TestOnRefusedHoldsNothing(t *testing.T) {
	const clients, most = 10_000, 256
	goOn := make(chan bool)
	var running, highest atomic.Int32
	a, results := newAppOver(t, Options{MaxConns: 1, DialContext: dialFake(echoFake)},
		Upstream{Addr: "u:1", MaxConns: 1})
	full := serveFake(t.Context(), a, new(Conn))
	ping(t, full)
	var wg sync.WaitGroup
	come := comeFake(t, a, func(_ context.Context, c *Conn) error {
		c.OnRefused = func(net.Conn, error) {
			wg.Add(1)
			defer wg.Done()
			now := running.Add(1)
			for high := highest.Load(); now > high &&
				!highest.CompareAndSwap(high, now); high = highest.Load() {
			}
			<-goOn
		}
		return nil
	})
	var last *duplexConn
	for range clients {
		last = come()
		if r := <-results; r.End != EndNoUpstream {
			t.Fatalf("%+v", r)
		}
	}
	wantReset(t, "last client", last)
	ping(t, full) // still served
	if s := a.Stats(); s.Open != 1 || s.Failed != clients {
		t.Errorf("%+v", s)
	}
	closed := make(chan error)
	go func() { closed <- a.Close() }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Error("Close waits for OnRefused")
	}
	if n := highest.Load(); n > most || n < most/2 {
		t.Errorf("%d calls of OnRefused at once, want at most %d", n, most)
	}
	close(goOn)
	for len(a.running()) > 0 {
		time.Sleep(time.Millisecond)
	}
	wg.Wait()
}

// running are the sessions whose OnRefused has not ended.
func (a *LBProxyApp) running() map[*session]struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	running := map[*session]struct{}{}
	for s := range a.lastWords {
		running[s] = struct{}{}
	}
	return running
}

func TestCloseResetsTheConnThatOnRefusedWritesTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newAppOver(t, Options{}, Upstream{Addr: "u:1", Drain: true})
		wrote := make(chan error, 1)
		s := serveFake(t.Context(), a, &Conn{OnRefused: func(c net.Conn, _ error) {
			_, err := c.Write(make([]byte, 10)) // to a client that does not read
			wrote <- err
		}})
		synctest.Wait()
		if r := <-s.result; r.End != EndNoUpstream {
			t.Errorf("%+v", r)
		}
		start := time.Now()
		a.Close()
		if err := <-wrote; err == nil || time.Since(start) > 0 {
			t.Errorf("the write ends with %v after %v", err, time.Since(start))
		}
		wantReset(t, "client", s)
	})
}

func TestALastWordHasASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newAppOver(t, Options{}, Upstream{Addr: "u:1", Drain: true})
		start := time.Now()
		took := make(chan time.Duration, 1)
		s := serveFake(t.Context(), a, &Conn{OnRefused: func(c net.Conn, _ error) {
			for {
				if _, err := c.Write([]byte{'x'}); err != nil {
					took <- time.Since(start)
					return
				}
			}
		}})
		for { // a client that drips must not hold its place
			if _, err := s.Read(make([]byte, 1)); err != nil {
				break
			}
			time.Sleep(300 * time.Millisecond)
		}
		if d := <-took; d != time.Second {
			t.Errorf("writing failed after %v, want a second", d)
		}
		s.Close()
	})
	synctest.Test(t, func(t *testing.T) { // nor one that reads it and stays
		a, _ := newAppOver(t, Options{}, Upstream{Addr: "u:1", Drain: true})
		start := time.Now()
		s := serveFake(t.Context(), a, &Conn{OnRefused: say503})
		io.ReadAll(s)
		for _, err := s.Write([]byte("x")); err == nil; _, err = s.Write([]byte("x")) {
			time.Sleep(10 * time.Millisecond)
		}
		if d := time.Since(start); d > 1100*time.Millisecond {
			t.Errorf("it was closed after %v, want a second at most", d)
		}
	})
}

func TestAPanicInOnRefusedIsLogged(t *testing.T) {
	var log proxytest.Buffer
	a, results := newAppOver(t, Options{Logger: textLogger(&log)},
		Upstream{Addr: "127.0.0.1:1", Drain: true})
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.OnRefused = func(net.Conn, error) { panic("boom") }
		return nil
	}))
	io.Copy(io.Discard, c) // to its end
	if r := <-results; r.End != EndNoUpstream {
		t.Errorf("%+v", r)
	}
	c.Close()
	for len(a.running()) > 0 {
		time.Sleep(time.Millisecond)
	}
	a.Close()
	if !strings.Contains(log.String(), "panic=boom") {
		t.Errorf("the log lacks the panic:\n%s", log.String())
	}
}

// Conns that cannot be compared are refused like others.
func TestOnRefusedWithAConnThatCannotBeCompared(t *testing.T) {
	t.Parallel()
	a, results := newAppOver(t, Options{}, Upstream{Addr: "u:1", Drain: true})
	client, ours := duplex()
	c := &Conn{Client: incomparableConn{Conn: ours}, OnRefused: say503}
	go a.ServeConn(t.Context(), c)
	if got, err := io.ReadAll(client); len(got) != len(sorry)+1000 || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	client.Close()
	<-results
}

type incomparableConn struct {
	net.Conn
	_ []int
}

// A client that cannot be asked to stop reading is not waited for.
func TestOnRefusedWithAConnWithoutDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newAppOver(t, Options{}, Upstream{Addr: "u:1", Drain: true})
		client, ours := duplex()
		r, err := a.ServeConn(t.Context(), &Conn{Client: noDeadlines{ours}, OnRefused: say503})
		if r.End != EndNoUpstream || err == nil {
			t.Errorf("%+v, %v", r, err)
		}
		client.Close()
	})
}

type noDeadlines struct{ net.Conn }

func (noDeadlines) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (noDeadlines) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (noDeadlines) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

// A onceConn counts the calls of Close. It is not a wrapper: there is nothing below it.
type onceConn struct {
	*proxytest.PipeConn
	closes *atomic.Int32
}

func (c onceConn) Close() error { c.closes.Add(1); return c.PipeConn.Close() }

func TestRefusedClientIsClosedOnce(t *testing.T) {
	for _, name := range []string{
		"rate-limited", "no-upstream", "dial-failed", "not-admitted", "closed", "canceled",
	} {
		for _, lastWord := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				up := refusing[EndReason(name)].up
				if up.Addr == "" {
					up.Addr = "u:1"
				}
				dial := func(context.Context, string, string) (net.Conn, error) {
					return nil, errors.New("nobody")
				}
				a, results := newAppOver(t, Options{DialContext: dial}, up)
				client, ours := proxytest.Pipe()
				closes := new(atomic.Int32)
				c := &Conn{Client: onceConn{ours, closes},
					RateLimit: refusing[EndReason(name)].limit}
				if lastWord {
					c.OnRefused = func(net.Conn, error) {}
				}
				switch name {
				case "canceled":
					c.Abort(nil)
				case "closed":
					a.Close()
				}
				if name == "not-admitted" {
					accepted := make(chan net.Conn, 1)
					accepted <- c.Client
					go a.Serve(newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
						select {
						case c := <-accepted:
							return c, nil
						case <-closed:
							return nil, net.ErrClosed
						}
					}), func(context.Context, *Conn) error { return errKicked })
				} else {
					go a.ServeConn(t.Context(), c)
				}
				if r := <-results; r.End != EndReason(name) {
					t.Errorf("%s: %+v", name, r)
				}
				client.Close()
				synctest.Wait()
				if n := closes.Load(); n != 1 {
					t.Errorf("%s, last word %v: closed %d times", name, lastWord, n)
				}
				a.Close()
			})
		}
	}
}
