package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A journal is a RateLimitManager that records events and allows everything.
type journal struct {
	mu     sync.Mutex
	events []Event
}

func (j *journal) Report(ctx context.Context, e Event) Decision {
	j.mu.Lock()
	defer j.mu.Unlock()
	if e.Kind == EventClose && ctx.Err() != nil {
		panic("EventClose came with a context that has ended: a store could not be told")
	}
	j.events = append(j.events, e)
	return Decision{}
}

func (j *journal) count(kind EventKind) (n int) {
	for _, e := range j.events {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

func TestEventsOfAConnection(t *testing.T) {
	const size = 8 << 20
	var j journal
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.ClientID = "alice"
		c.RateLimit = &j
		return nil
	}))
	go func() { sendPattern(c, size); c.CloseWrite() }()
	if s := readAll(c); s != pattern(size) {
		t.Errorf("got %s, want %s", s, pattern(size))
	}
	c.Close()
	r := <-results
	bytes := map[Direction]int64{}
	for _, e := range j.events {
		bytes[e.Direction] += e.Bytes
		if e.App != "test" || e.ClientID != "alice" || e.Refused {
			t.Fatalf("%+v", e)
		}
		if e.Kind == EventData && (e.Bytes < 1 || e.Bytes > 1<<20) {
			t.Fatalf("%+v, want a grain of at most 1 MiB", e)
		}
	}
	if first, last := j.events[0], j.events[len(j.events)-1]; first.Kind != EventOpen ||
		last.Kind != EventClose ||
		j.count(EventOpen) != 1 || j.count(EventClose) != 1 {
		t.Errorf("first %+v, last %+v", first, last)
	}
	if n := j.count(EventData); n > size/firstChunk {
		t.Errorf("%d events for %d bytes, though nothing was slowed", n, size)
	}
	if bytes[Upload] != size || bytes[Download] != size || r.Sent != size || r.Received != size {
		t.Errorf("bytes by events %v, by %+v", bytes, r)
	}
}

func TestRefusedOpenHasNoOtherEvents(t *testing.T) {
	var events []Event
	a, _ := newApp(t, Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
		panic("dialed")
	}}, "u:1")
	c := serveFake(t.Context(), a, &Conn{RateLimit: limitFunc(func(e Event) Decision {
		events = append(events, e)
		return Decision{Exceeded: true, Wait: time.Hour}
	})})
	r := <-c.result
	if r.End != EndRateLimited || r.Err != ErrRateLimited || r.Attempts != 0 || len(events) != 1 {
		t.Errorf("%+v after events %v", r, events)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the client reads %v, want a reset", err)
	}
	wantCounts(t, a, 1, 1, 0)
}

func TestExceededOnDataCutsTheConnection(t *testing.T) {
	var total atomic.Int64
	a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
	var j journal
	c := serveFake(t.Context(), a, &Conn{RateLimit: All(&j, limitFunc(func(e Event) Decision {
		if e.Direction == Upload {
			total.Add(e.Bytes)
		}
		return Decision{Exceeded: total.Load() > 2}
	}))})
	ping(t, c)
	ping(t, c)
	c.Write([]byte("x"))
	if r := <-c.result; r.End != EndRateLimited || r.Err != ErrRateLimited || r.Sent != 3 {
		t.Errorf("%+v", r)
	}
	if j.count(EventClose) != 1 {
		t.Errorf("events %v", j.events)
	}
	wantCounts(t, a, 1, 0, 0)
}

func TestWaitHoldsTheOpenOrOneDirection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		start := time.Now()
		var at []string
		note := func(what string) { // one end may wait some milliseconds for the other
			at = append(at, fmt.Sprint(what, " ", time.Since(start).Round(50*time.Millisecond)))
		}
		c := serveFake(t.Context(), a, &Conn{RateLimit: limitFunc(func(e Event) (d Decision) {
			switch {
			case e.Kind == EventOpen:
				d.Wait = 2 * time.Second
			case e.Direction == Upload:
				d.Wait = time.Second
			}
			return d
		})})
		ping(t, c)
		note("held at open:")
		ping(t, c)
		note("upload held:")
		c.CloseWrite()
		io.ReadAll(c)
		note("done:")
		want := "[held at open: 2s upload held: 3s done: 4s]"
		if got := fmt.Sprint(at); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		c.Close()
		<-c.result
	})
}

func TestBandwidthHoldsAStreamToItsRate(t *testing.T) {
	for _, rate := range []int64{2_000, 100_000, 10 << 20} {
		for _, both := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {
					if both {
						go io.Copy(io.Discard, c)
					}
					for b := make([]byte, 64<<10); ; {
						if _, err := c.Write(b); err != nil {
							return
						}
					}
				})}, "u:1")
				c := serveFake(t.Context(), a, &Conn{RateLimit: &Bandwidth{BytesPerSecond: rate}})
				go io.Copy(io.Discard, c)
				if both {
					go func() {
						for b := make([]byte, 64<<10); ; {
							if _, err := c.Write(b); err != nil {
								return
							}
						}
					}()
				}
				time.Sleep(3 * time.Second)
				synctest.Wait()
				u := a.Stats().Upstreams[0] // after Close nothing is held back
				sent, received, want := int64(u.Sent), int64(u.Received), 3*rate
				if moved := sent + received; moved < want-want/20 ||
					moved > want+want/20+2*firstChunk {
					t.Errorf("%d B/s, both directions %v: %d bytes in 3 s, want %d", rate, both,
						moved, want)
				}
				if both && (sent < want/4 || received < want/4) {
					t.Errorf("%d B/s: %d up, %d down: not shared", rate, sent, received)
				}
				a.Close()
				<-c.result
				c.Close()
			})
		}
	}
}

func TestBandwidthOverRealSockets(t *testing.T) {
	t.Parallel()
	const rate, runs = 4 << 20, time.Second
	a, results := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) {
		for b := make([]byte, 256<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}))
	limit := &Bandwidth{BytesPerSecond: rate}
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.RateLimit = limit
		return nil
	}))
	start := time.Now()
	c.SetReadDeadline(start.Add(runs))
	n, _ := io.Copy(io.Discard, c)
	want := int64(time.Since(start).Seconds() * rate)
	c.Close()
	<-results
	// slower is the machine's fault; the test above checks that the rate is reached
	if n > want+want/20 || n == 0 {
		t.Errorf("%d bytes in %v, want %d at most", n, runs, want)
	}
}

// The first chunk moves before the limit has answered anything, so it is small.
func TestFirstChunkOfALimitedStreamIsSmall(t *testing.T) {
	first := make(chan int64, 1)
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) { sendPattern(c, 1<<20) }))
	c := dial(t, serve(t, a, func(_ context.Context, c *Conn) error {
		c.RateLimit = limitFunc(func(e Event) (d Decision) {
			switch e.Kind {
			case EventOpen:
				d.Wait = 50 * time.Millisecond // for the upstream to send
			case EventData:
				select {
				case first <- e.Bytes:
				default:
				}
			}
			return d
		})
		return nil
	}))
	io.Copy(io.Discard, c)
	if n := <-first; n > firstChunk {
		t.Errorf("the first chunk has %d bytes, want at most %d", n, firstChunk)
	}
}

// Hooks that panic: counts and events stay paired, and the panic reaches ServeConn's caller.

func TestPanicInHookKeepsCountsAndEventsPaired(t *testing.T) {
	boom := func(when bool) {
		if when {
			panic("boom")
		}
	}
	kinds := []string{"open", "upload", "download", "close", "dial", "dial again", "OnDone",
		"own OnDone", "client", "upstream"}
	for _, kind := range kinds {
		synctest.Test(t, func(t *testing.T) {
			var inner journal
			dials := 0
			opts := Options{Logger: quiet}
			opts.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials++
				boom(kind == "dial" || kind == "dial again" && dials == 2)
				if kind == "dial again" {
					return nil, errors.New("refused")
				}
				c, err := dialFake(echoFake)(ctx, network, addr)
				if kind == "upstream" {
					c = panicConn{c}
				}
				return c, err
			}
			if kind == "OnDone" {
				opts.OnDone = func(Result) { panic("boom") }
			}
			a, results := newApp(t, opts, "a:1", "b:1")
			outer := limitFunc(func(e Event) Decision {
				boom(e.Kind == EventOpen && kind == "open" ||
					e.Kind == EventClose && kind == "close" && !e.Refused ||
					e.Direction == Upload && kind == "upload" || e.Direction == Download &&
					kind == "download")
				return Decision{}
			})
			client, ours := duplex()
			conn := &Conn{Client: ours, RateLimit: All(&inner, outer)}
			if kind == "own OnDone" {
				conn.OnDone = func(Result) { panic("boom") }
			}
			if kind == "client" {
				conn.Client = panicConn{ours}
			}
			caught := make(chan any)
			go func() {
				defer func() { caught <- recover() }()
				a.ServeConn(t.Context(), conn)
			}()
			go func() {
				client.Write([]byte("x"))
				client.Read(make([]byte, 1))
				client.Close()
			}()
			if p := <-caught; !strings.Contains(fmt.Sprint(p), "boom") {
				t.Errorf("%s: the caller caught %v", kind, p)
			}
			r := <-results
			if !strings.HasSuffix(kind, "OnDone") && kind != "close" &&
				(r.End != EndCanceled || r.Err == nil) {
				t.Errorf("%s: %+v", kind, r)
			}
			wantCounts(t, a, 1, 0, 0)
			if o, c := inner.count(EventOpen), inner.count(EventClose); o != 1 || c != 1 {
				t.Errorf("%s: %d opens, %d closes", kind, o, c)
			}
			if dials > 0 { // no upstream is stuck in its trial
				time.Sleep(time.Minute)
				synctest.Wait()
				p, _ := a.balancer.acquire(new(search), time.Now())
				a.balancer.settle(p.u, works, nil, time.Now())
				a.balancer.release(p.u)
			}
			client.Close()
		})
	}
}

type panicHandler struct{ slog.Handler }

func (panicHandler) Enabled(context.Context, slog.Level) bool  { return true }
func (panicHandler) Handle(context.Context, slog.Record) error { panic("boom") }

func TestConnOnDoneRunsBeforeOptionsOnDone(t *testing.T) {
	for _, closed := range []bool{false, true} {
		var own []Result
		opts := Options{Logger: quiet, DialContext: dialFake(echoFake)}
		opts.OnDone = func(r Result) {
			if len(own) != 1 || own[0] != r {
				t.Errorf("the connection's own: %+v, want %+v", own, r)
			}
		}
		a, results := newApp(t, opts, "a:1")
		if closed {
			a.Close()
		}
		client, ours := duplex()
		client.Close()
		a.ServeConn(t.Context(), &Conn{Client: ours, OnDone: func(r Result) {
			own = append(own, r)
		}})
		<-results
	}
}

func TestServeSurvivesHooksThatPanic(t *testing.T) {
	broken := limitFunc(func(e Event) Decision {
		if e.Kind != EventClose {
			panic("boom")
		}
		return Decision{}
	})
	var n atomic.Int32
	a, results := newApp(t, Options{Logger: slog.New(panicHandler{slog.DiscardHandler})},
		upstreamDoing(t, echo))
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		if n.Add(1) == 1 {
			c.RateLimit = broken
			return nil
		}
		return nil
	})
	if n := bytesFrom(addr); n > 0 {
		t.Error("read something from a connection whose hook panicked")
	}
	ping(t, dial(t, addr))
	if r := <-results; r.End != EndCanceled {
		t.Errorf("%+v", r)
	}
}

// No lock is held while a hook runs, so it may call the app.
func TestHooksMayCallTheApp(t *testing.T) {
	var a *LBProxyApp
	call := func() {
		a.Stats()
		if err := a.SetUpstreams([]Upstream{{Addr: "a:1"}, {Addr: "b:1"}}); err != nil {
			t.Error(err)
		}
	}
	var results <-chan Result
	dials := 0
	a, results = newApp(t, Options{
		Logger: slog.New(callingHandler{slog.DiscardHandler, call}),
		OnDone: func(Result) { call() },
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			call()
			if dials++; dials == 1 {
				return nil, errors.New("refused") // so that there is a line to log
			}
			return dialFake(echoFake)(ctx, network, addr)
		},
	}, "a:1", "b:1")
	var calls atomic.Int32 // both directions ask
	limits := NewClientLimits(1, func(string) RateLimitManager {
		call()
		return limitFunc(func(Event) Decision { calls.Add(1); call(); return Decision{} })
	})
	c := serveFake(t.Context(), a,
		&Conn{RateLimit: limits.For("ann"), OnDone: func(Result) { call() }})
	ping(t, c)
	c.Close()
	if r := <-results; r.End != EndDone || r.Attempts != 2 {
		t.Errorf("%+v", r)
	}
	if n := calls.Load(); n != 4 {
		t.Errorf("the limit was asked %d times, want when it opens, for a byte each way, "+
			"and at the end",
			n)
	}
}

type callingHandler struct {
	slog.Handler
	call func()
}

func (callingHandler) Enabled(context.Context, slog.Level) bool    { return true }
func (h callingHandler) Handle(context.Context, slog.Record) error { h.call(); return nil }

// A panicConn panics when it is read.
type panicConn struct{ net.Conn }

func (panicConn) Read([]byte) (int, error) { panic("boom") }

func TestPanicAfterTheDialClosesTheConn(t *testing.T) {
	dialled := make(chan *duplexConn, 1)
	a, _ := newAppOver(t, Options{
		FailTimeout: time.Nanosecond, Logger: slog.New(panicHandler{slog.DiscardHandler}),
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			ours, theirs := duplex()
			dialled <- theirs
			return ours, nil
		},
	}, Upstream{Addr: "u:1", TLS: &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection:   func(tls.ConnectionState) error { panic("boom") },
	}})
	// So that there is something to log: it works again.
	p, _ := a.balancer.acquire(new(search), time.Now())
	a.balancer.settle(p.u, fails, errSick, time.Now())
	a.balancer.release(p.u)
	_, ours := duplex()
	caught := make(chan any)
	go func() {
		defer func() { caught <- recover() }()
		a.ServeConn(t.Context(), &Conn{Client: ours})
	}()
	theirs := <-dialled
	serverTLS, _ := tlsConfigs(t)
	tls.Server(theirs, serverTLS).Handshake()
	if p := <-caught; p != "boom" {
		t.Errorf("caught %v", p)
	}
	if _, err := io.Copy(io.Discard, theirs); err != syscall.ECONNRESET {
		t.Errorf("the upstream reads %v, want a reset", err)
	}
}

func TestNilClientIsAnError(t *testing.T) {
	a, _ := newApp(t, Options{}, "u:1")
	if r, err := a.ServeConn(t.Context(), &Conn{}); err == nil || r.End != EndClientError ||
		r.Err != err {
		t.Errorf("%+v, %v", r, err)
	}
}

// countingConn hides the methods of a conn, as wrappers do, and counts calls of Close.
type countingConn struct {
	net.Conn
	closes *atomic.Int32
}

func (c countingConn) Close() error { c.closes.Add(1); return c.Conn.Close() }

func (c countingConn) NetConn() net.Conn { return c.Conn }

func TestServeConnAlwaysClosesTheClient(t *testing.T) {
	for _, name := range []string{"done", "refused", "canceled", "closed"} {
		a, _ := newApp(t, Options{DialContext: dialFake(func(net.Conn) {})}, "u:1")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		conn := new(Conn)
		switch name {
		case "refused":
			conn.RateLimit = new(OpenLimit)
		case "canceled":
			cancel()
		case "closed":
			a.Close()
		}
		client, ours := duplex()
		client.CloseWrite()
		closes := new(atomic.Int32)
		conn.Client = countingConn{ours, closes}
		r, _ := a.ServeConn(ctx, conn)
		if closes.Load() == 0 {
			t.Errorf("%s: not closed; %+v", name, r)
		}
		if _, err := client.Write([]byte("x")); err == nil {
			t.Errorf("%s: the client can still write", name)
		}
	}
}

// Events after both sides have ended their streams do not change the Result.
func TestLateEventsDoNotChangeTheResult(t *testing.T) {
	for _, what := range []string{"idle", "close"} {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan struct{})
			a, _ := newApp(t, Options{
				IdleTimeout: time.Minute, DialContext: dialFake(echoFake)}, "u:1")
			c := serveFake(t.Context(), a, &Conn{RateLimit: limitFunc(func(e Event) Decision {
				if e.Kind == EventClose {
					<-release
				}
				return Decision{}
			})})
			ping(t, c)
			c.CloseWrite()
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Error(err)
			}
			c.Close()
			synctest.Wait()
			if what == "idle" {
				time.Sleep(time.Hour)
			} else {
				go a.Close()
			}
			synctest.Wait()
			close(release)
			if r := <-c.result; r.End != EndDone || r.Err != nil {
				t.Errorf("%s: %+v", what, r)
			}
		})
	}
}

// A slowReset takes its time to be reset.
type slowReset struct {
	*duplexConn
	resetting, release chan struct{}
}

func (c *slowReset) SetLinger(int) error {
	close(c.resetting)
	<-c.release
	return nil
}

// ServeConn does not return while a conn is still being reset.
func TestServeConnReturnsAfterTheReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := &slowReset{resetting: make(chan struct{}), release: make(chan struct{})}
		a, _ := newApp(t, Options{
			IdleTimeout: time.Minute,
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				u.duplexConn, _ = duplex()
				return u, nil
			}}, "u:1")
		c := serveFake(t.Context(), a, &Conn{})
		<-u.resetting // because it is idle
		u.Close()     // as its peer might
		synctest.Wait()
		select {
		case <-c.result:
			t.Error("ServeConn has returned")
		default:
		}
		close(u.release)
		c.Close()
	})
}
