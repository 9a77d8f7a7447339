package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

var errSick = errors.New("sick")

// A ward says which upstreams are sick and records checks. Its check is a HealthCheck.Check.
type ward struct {
	mu     sync.Mutex
	sick   map[string]error // by Addr
	asked  []string
	at     []time.Time
	within map[string]int // checks in progress
}

func newWard() *ward { return &ward{sick: map[string]error{}, within: map[string]int{}} }

func (w *ward) check(_ context.Context, u Upstream) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, u.Addr)
	w.at = append(w.at, time.Now())
	return w.sick[u.Addr]
}

func (w *ward) set(err error, addrs ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, addr := range addrs {
		w.sick[addr] = err
	}
}

// count returns how often an upstream was checked.
func (w *ward) count(addr string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.asked {
		if a == addr {
			n++
		}
	}
	return n
}

// newCheckedApp returns an app with health checks, and its log.
func newCheckedApp(
	t *testing.T, hc HealthCheck, opts Options, addrs ...string,
) (*LBProxyApp, *proxytest.Buffer) {
	t.Helper()
	var log proxytest.Buffer
	opts.HealthCheck = &hc
	opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
	a, _ := newApp(t, opts, addrs...)
	return a, &log
}

func states(a *LBProxyApp) string {
	var s []string
	for _, u := range a.Stats().Upstreams {
		s = append(s, string(u.State)+map[bool]string{true: " (removed)"}[u.Removed])
	}
	return strings.Join(s, " ")
}

func wantStates(t *testing.T, when string, a *LBProxyApp, want string) {
	t.Helper()
	if got := states(a); got != want {
		t.Fatalf("%s: states %q, want %q", when, got, want)
	}
}

// wantLines checks how often the log has each text.
func wantLines(t *testing.T, log *proxytest.Buffer, want map[string]int) {
	t.Helper()
	for text, n := range want {
		if got := strings.Count(log.String(), text); got != n {
			t.Errorf("the log has %q %d times, want %d:\n%s", text, got, n, log.String())
		}
	}
}

const (
	saysDown = "upstream is down by its health checks"
	saysUp   = "upstream is up again by its health checks"
)

func TestBadHealthCheckIsRejectedByNameAndValue(t *testing.T) {
	for want, hc := range map[string]HealthCheck{
		"Options.HealthCheck.Interval -1s is negative: " +
			"use 0 for the default of 5s": {Interval: -time.Second},
		"Options.HealthCheck.Timeout -1ns is negative: use 0 for the default of 2s": {Timeout: -1},
		"Options.HealthCheck.Rise -2 is negative: use 0 for the default of 2":       {Rise: -2},
		"Options.HealthCheck.Fall -3 is negative: use 0 for the default of 3":       {Fall: -3},
	} {
		a, err := New("db", []Upstream{{Addr: "u:1"}}, &Options{HealthCheck: &hc})
		if a != nil || err == nil || err.Error() != `lbproxy: app "db": `+want {
			t.Errorf("%+v: %v, want %s", hc, err, want)
		}
	}
	if _, err := New("db", []Upstream{{Addr: "u:1"}, {Addr: "u"}},
		&Options{HealthCheck: &HealthCheck{}}); err == nil {
		t.Error("an Addr without a port: no error")
	} // and no goroutine is left: TestMain would fail
}

func TestHealthCheckIsCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		hc := HealthCheck{Interval: time.Second, Check: w.check}
		a, err := New("test", []Upstream{{Addr: "u:1"}}, &Options{HealthCheck: &hc})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		hc = HealthCheck{Interval: time.Hour,
			Check: func(context.Context, Upstream) error { panic("replaced") }}
		time.Sleep(10 * time.Second)
		if n := w.count("u:1"); n < 9 || n > 12 {
			t.Errorf("%d checks in 10 s, want one each second", n)
		}
	})
}

func TestNoHealthCheckMeansNoChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		newApp(t, Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
			panic("dialed")
		}}, "u:1")
		time.Sleep(time.Hour)
	})
}

// First checks are spread over the Interval; later ones come 9 to 10 tenths of it apart.
func TestChecksAreSpreadOverTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval, upstreams = 10 * time.Second, 200
		w := newWard()
		var addrs []string
		for i := range upstreams {
			addrs = append(addrs, fmt.Sprintf("u%d:1", i))
		}
		begin := time.Now()
		newCheckedApp(t, HealthCheck{Interval: interval, Check: w.check}, Options{}, addrs...)
		time.Sleep(10 * interval)
		w.mu.Lock()
		defer w.mu.Unlock()
		last := map[string]time.Time{}
		var tenths [10]int // of the first Interval
		gaps := map[time.Duration]int{}
		for i, addr := range w.asked {
			at := w.at[i]
			if before, again := last[addr]; again {
				gaps[at.Sub(before)]++
			} else {
				tenths[at.Sub(begin)*10/interval]++ // panics if it is later
			}
			last[addr] = at
		}
		if len(last) != upstreams || slices.Contains(tenths[:], 0) {
			t.Errorf("first checks of %d upstreams by tenths of an interval: %v", len(last), tenths)
		}
		all := slices.Sorted(maps.Keys(gaps))
		if least, most := all[0], all[len(all)-1]; least < interval*9/10 || most > interval ||
			most-least < interval/20 {
			t.Errorf("checks are %v to %v apart, want what is between 9s and 10s", least, most)
		}
	})
}

func TestRiseAndFallAreExact(t *testing.T) {
	verdicts := map[rune]error{
		'.': nil, 'x': errSick,
		'o': &net.OpError{Op: "dial", Err: syscall.EMFILE}, // a local error
	}
	for _, tc := range []struct {
		rise, fall              int
		checks, want            string // u: up afterwards, d: down
		foundDown, foundUpAgain int
	}{
		{0, 0, "xxx..", "uuddu", 1, 1},
		{0, 0, "xx.xx.xx.xx.xx.xx.", "uuuuuuuuuuuuuuuuuu", 0, 0}, // flapping
		{0, 0, "xxxx.x.x.x.xxx..xxx", "uuddddddddddddduuud", 2, 1},
		{0, 0, "xxox.o.", "uuudddu", 1, 1},
		{0, 0, "oooooooooooo", "uuuuuuuuuuuu", 0, 0},
		{0, 0, "xxxoooooooo.", "uudddddddddd", 1, 0},
		{1, 1, "x.xx..", "dudduu", 2, 2},
		{3, 1, "x..x...", "ddddddu", 1, 1},
		{1, 4, "xxxxxx.xxxx", "uuudddu" + "uuud", 2, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			results := make(chan error)
			a, log := newCheckedApp(t, HealthCheck{Rise: tc.rise, Fall: tc.fall, Timeout: time.Hour,
				Check: func(ctx context.Context, u Upstream) error {
					select {
					case err := <-results:
						return err
					case <-ctx.Done():
						return ctx.Err()
					}
				}}, Options{}, "u:1")
			got := ""
			for _, c := range tc.checks {
				results <- verdicts[c]
				synctest.Wait()
				got += states(a)[:1]
			}
			if got != tc.want {
				t.Errorf("Rise %d, Fall %d, checks %s: %s, want %s", tc.rise, tc.fall,
					tc.checks, got, tc.want)
			}
			wantLines(t, log, map[string]int{saysDown: tc.foundDown, saysUp: tc.foundUpAgain,
				"level=WARN": tc.foundDown, "level=INFO": tc.foundUpAgain,
				"app=test":     tc.foundDown + tc.foundUpAgain,
				"upstream=u:1": tc.foundDown + tc.foundUpAgain, "err=sick": tc.foundDown})
		})
	}
}

func TestLocalErrorsInChecksChangeNothing(t *testing.T) {
	for _, ours := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
		syscall.ENOSPC, syscall.EADDRNOTAVAIL, context.Canceled} {
		synctest.Test(t, func(t *testing.T) {
			var broken atomic.Bool
			broken.Store(true)
			a, log := newCheckedApp(t, HealthCheck{},
				Options{DialContext: func(context.Context, string, string) (net.Conn, error) {
					if broken.Load() {
						return nil, fmt.Errorf("dial: %w", ours)
					}
					return nil, errSick
				}}, "u:1")
			time.Sleep(time.Hour)
			wantStates(t, ours.Error(), a, "up")
			broken.Store(false)
			time.Sleep(time.Minute)
			wantStates(t, "sick", a, "down")
			broken.Store(true)
			time.Sleep(time.Hour)
			wantStates(t, ours.Error(), a, "down")
			wantLines(t, log, map[string]int{"level=": 1})
		})
	}
}

// The default check.

func TestDefaultCheckDialsAndCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dialled, ended atomic.Int32
		dial := dialFake(func(c net.Conn) {
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("the upstream reads %d bytes, %v; want the end", n, err)
			}
			ended.Add(1)
		})
		var how atomic.Value
		how.Store("works")
		a, log := newCheckedApp(t, HealthCheck{},
			Options{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) != 2*time.Second ||
					network != "tcp" || addr != "u:1" {
					t.Errorf("dial of %s %s with deadline %v, %v", network, addr, deadline, ok)
				}
				switch how.Load() {
				case "nothing":
					return nil, nil
				case "hangs":
					<-ctx.Done()
					return nil, ctx.Err()
				}
				dialled.Add(1)
				return dial(ctx, network, addr)
			}}, "u:1")
		for _, h := range []string{"works", "nothing", "works", "hangs", "works"} {
			how.Store(h)
			time.Sleep(time.Minute)
			wantStates(t, h, a, map[bool]string{true: "up", false: "down"}[h == "works"])
		}
		a.Close()
		synctest.Wait()
		if dialled.Load() != ended.Load() || dialled.Load() < 30 {
			t.Errorf("%d dials, %d connections ended", dialled.Load(), ended.Load())
		}
		wantLines(t, log,
			map[string]int{saysDown: 2, saysUp: 2, errNilDialed.Error(): 1,
				"no result within 2s": 1})
		if s := a.Stats(); s.Accepted != 0 || s.Upstreams[0].Total != 0 ||
			s.Upstreams[0].Failed != 0 {
			t.Errorf("%+v: checks are no connections", s)
		}
	})
}

// awaitStates waits in real time until the states are as wanted.
func awaitStates(t *testing.T, a *LBProxyApp, want string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for states(a) != want {
		if time.Now().After(deadline) {
			t.Fatalf("states %q, want %q", states(a), want)
		}
		runtime.Gosched()
	}
}

func TestChecksFollowAServerDownAndUp(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	addr := proxytest.FreeAddr(t) // which no other test gets while the server is down
	start := func() (stop func()) {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { echo(c.(*net.TCPConn)); c.Close() })
			}
		})
		return func() { l.Close(); wg.Wait() }
	}
	stop := start()
	secure := upstreamDoing(t, func(c *net.TCPConn) {
		tc := tls.Server(c, serverTLS)
		io.Copy(tc, tc)
		tc.Close()
	})
	stranger := strings.Replace(secure, "127.0.0.1", "localhost", 1)
	plain := upstreamDoing(t, func(c *net.TCPConn) { c.Write([]byte("220 not TLS\r\n")) })
	clientTLS.ServerName = "" // so it is taken from Addr
	a, _ := newAppOver(t, Options{HealthCheck: &HealthCheck{Interval: time.Millisecond}},
		Upstream{Addr: addr}, Upstream{Addr: secure, TLS: clientTLS},
		Upstream{Addr: stranger, TLS: &tls.Config{}}, Upstream{Addr: plain, TLS: clientTLS})
	awaitStates(t, a, "up up down down")
	stop()
	awaitStates(t, a, "down up down down")
	defer start()()
	awaitStates(t, a, "up up down down")
	c := dial(t, serve(t, a, nil))
	ping(t, c)
	a.Close() // before the servers
}

// Checks that misbehave.

func TestHungCheckFailsAtItsTimeout(t *testing.T) {
	for _, obeys := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan bool)
			w := newWard()
			begun := make(chan bool, 1)
			a, log := newCheckedApp(t, HealthCheck{
				Timeout: time.Second, Fall: 1, Rise: 1,
				Check: func(ctx context.Context, u Upstream) error {
					w.check(ctx, u)
					if u.Addr != "b:1" || w.count("b:1") > 1 {
						return nil
					}
					begun <- true
					if obeys {
						<-ctx.Done()
						return ctx.Err()
					}
					<-release
					return nil
				}}, Options{}, "a:1", "b:1", "c:1")
			<-begun
			time.Sleep(time.Second - 1)
			wantStates(t, "before the Timeout", a, "up up up")
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			wantStates(t, "at the Timeout", a, "up down up")
			wantLines(t, log, map[string]int{"no result within 1s": 1})
			if obeys {
				time.Sleep(6 * time.Second)
			} else {
				time.Sleep(time.Minute)
				if n := w.count("b:1"); n != 1 {
					t.Errorf("%d checks of an upstream of which the first has not returned", n)
				}
				for _, addr := range []string{"a:1", "c:1"} {
					if n := w.count(addr); n < 11 {
						t.Errorf("%s was checked %d times in a minute, while b's "+
							"check was hung", addr, n)
					}
				}
				release <- true
				synctest.Wait()
				// its late success does not count
				wantStates(t, "when it has returned", a, "up down up")
				time.Sleep(6 * time.Second)
			}
			wantStates(t, "after the next check", a, "up up up")
		})
	}
}

func TestCheckThatNeverReturnsCountsAsFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		var checks atomic.Int32
		a, log := newCheckedApp(t, HealthCheck{Check: func(context.Context, Upstream) error {
			checks.Add(1)
			<-release
			return nil
		}}, Options{}, "u:1")
		// until it begins, times out, and two more are due
		time.Sleep(5*time.Second + 2*time.Second + 2*5*time.Second)
		wantStates(t, "hung", a, "down")
		time.Sleep(time.Hour)
		if n := checks.Load(); n != 1 {
			t.Errorf("%d checks of it at once", n)
		}
		wantLines(t, log, map[string]int{"level=": 1, "has not returned": 1})
		close(release)
		time.Sleep(11 * time.Second)
		wantStates(t, "well", a, "up")
	})
}

func TestPanicInCheckIsAFailureAndIsLogged(t *testing.T) {
	for name, fail := range map[string]func(){
		"panic":  func() { panic("boom") },
		"Goexit": runtime.Goexit,
	} {
		synctest.Test(t, func(t *testing.T) {
			var broken atomic.Bool
			broken.Store(true)
			var checks atomic.Int32
			a, log := newCheckedApp(t, HealthCheck{
				Check: func(_ context.Context, u Upstream) error {
					if u.Addr == "a:1" && broken.Load() {
						checks.Add(1)
						fail()
					}
					return nil
				}}, Options{}, "a:1", "b:1")
			time.Sleep(15 * time.Second)
			wantStates(t, name, a, "down up")
			if name == "panic" {
				failures := int(checks.Load())
				wantLines(t, log,
					map[string]int{"level=ERROR": failures, "panic=boom": failures,
						"stack=":     failures,
						".runCheck(": failures, `err="panic: boom"`: 1})
			} else {
				wantLines(t, log, map[string]int{"Goexit": 1})
			}
			broken.Store(false)
			time.Sleep(15 * time.Second)
			wantStates(t, "mended", a, "up up")
		})
	}
}

func TestChecksSurviveLoggerThatPanicsOrBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		w.set(errSick, "a:1")
		hc := &HealthCheck{Check: func(ctx context.Context, u Upstream) error {
			if err := w.check(ctx, u); err != nil {
				panic(err)
			}
			return nil
		}}
		a, _ := newApp(t, Options{HealthCheck: hc, Logger: slog.New(panicHandler{})}, "a:1", "b:1")
		time.Sleep(time.Minute)
		wantStates(t, "panicking", a, "down up")
		w.set(nil, "a:1")
		time.Sleep(time.Minute)
		wantStates(t, "mended", a, "up up")

		goOn := make(chan bool)
		b, _ := newApp(t, Options{
			HealthCheck: &HealthCheck{Check: w.check},
			Logger: slog.New(callingHandler{call: func() {
				<-goOn
			}})}, "c:1", "d:1")
		w.set(errSick, "c:1", "d:1")
		time.Sleep(time.Minute)
		wantStates(t, "blocked", b, "down down") // no lock is held, and no check waits for another
		close(goOn)
	})
}

func TestChecksMayCallTheApp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a *LBProxyApp
		ready := make(chan bool)
		calls := 0
		app, _ := newCheckedApp(t, HealthCheck{Check: func(_ context.Context, u Upstream) error {
			<-ready
			a.Stats()
			calls++
			return a.SetUpstreams([]Upstream{{Addr: "u:1"}})
		}}, Options{}, "u:1")
		a = app
		close(ready)
		time.Sleep(time.Minute)
		wantStates(t, "afterwards", a, "up")
		a.Close()
		if calls < 10 {
			t.Errorf("%d checks in a minute", calls)
		}
	})
}

func TestCheckGetsItsOwnCopyOfTheUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := make(chan Upstream)
		a, _ := newAppOver(t, Options{
			HealthCheck: &HealthCheck{Check: func(_ context.Context, u Upstream) error {
				was := u
				was.TLS = u.TLS.Clone()
				u.TLS.NextProtos = []string{"h2"} // its own
				seen <- was
				return nil
			}}}, Upstream{Addr: "u:1", MaxConns: 7, TLS: &tls.Config{}})
		for range 3 {
			u := <-seen
			if u.Addr != "u:1" || u.Weight != 1 || u.MaxConns != 7 || u.TLS.ServerName != "u" ||
				u.TLS.NextProtos != nil {
				t.Errorf("checked %+v", u)
			}
		}
		a.SetUpstreams([]Upstream{{Addr: "u:1", Weight: 3, TLS: &tls.Config{ServerName: "v"}}})
		if u := <-seen; u.Weight != 3 || u.MaxConns != 0 || u.TLS.ServerName != "v" {
			t.Errorf("after SetUpstreams: checked %+v", u)
		}
	})
}

// What happens to connections.

func TestDownUpstreamsAreNotDialed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		var dialled []string
		a, _ := newCheckedApp(t, HealthCheck{Check: w.check},
			Options{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialled = append(dialled, addr)
				if addr == "b:1" {
					return nil, errSick
				}
				return dialFake(echoFake)(ctx, network, addr)
			}}, "a:1", "b:1")
		old := serveFake(t.Context(), a, &Conn{})
		ping(t, old)
		w.set(errSick, "a:1")
		time.Sleep(time.Minute)
		wantStates(t, "a is sick", a, "down up")
		ping(t, old) // is left alone

		dialled = nil
		c := serveFake(t.Context(), a, &Conn{})
		if r := <-c.result; r.End != EndDialFailed || r.Attempts != 1 {
			t.Errorf("%+v", r)
		}
		w.set(errSick, "b:1")
		time.Sleep(time.Minute)
		wantStates(t, "both are sick", a, "down down")
		for range 3 {
			c = serveFake(t.Context(), a, &Conn{})
			if _, err := c.Read(make([]byte, 1)); err != syscall.ECONNRESET {
				t.Errorf("the client reads %v, want a reset", err)
			}
			if r := <-c.result; r.End != EndNoUpstream || !errors.Is(r.Err, ErrNoUpstream) ||
				r.Attempts != 0 {
				t.Errorf("%+v", r)
			}
		}
		if s := fmt.Sprint(dialled); s != "[b:1]" {
			t.Errorf("dialled %v, want only b, while that was up", s)
		}
		ping(t, old)
		old.Close()
		<-old.result
		wantCounts(t, a, 5, 0, 4)
	})
}

func TestRecoveredUpstreamIsNotStampeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		w.set(errSick, "a:1")
		a, _ := newCheckedApp(t, HealthCheck{Check: w.check},
			Options{DialContext: dialFake(echoFake)},
			"a:1", "b:1", "c:1")
		time.Sleep(time.Minute)
		open := func(n int) {
			for range n {
				ping(t, serveFake(t.Context(), a, &Conn{}))
			}
		}
		open(300)
		w.set(nil, "a:1")
		time.Sleep(time.Minute)
		wantStates(t, "well", a, "up up up")
		open(100)
		if n := a.Stats().Upstreams[0].Open; n != 50 {
			t.Errorf("it got %d of the first 100 connections, want every second", n)
		}
		open(500) // 250 125 125
		open(60)
		for _, u := range a.Stats().Upstreams {
			if u.Open != 320 {
				t.Errorf("in the end %+v, want 320 open", u)
			}
		}
		a.Close()
	})
}

func TestOnlyBeingFoundUpEndsCooling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		a, log := newCheckedApp(t, HealthCheck{Interval: time.Second, Check: w.check}, Options{
			FailTimeout: time.Hour,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "a:1" {
					return nil, errSick
				}
				return dialFake(echoFake)(ctx, network, addr)
			}}, "a:1", "b:1")
		connect := func() Result {
			c := serveFake(t.Context(), a, &Conn{})
			ping(t, c)
			c.Close()
			return <-c.result
		}
		if r := connect(); r.Attempts != 2 {
			t.Errorf("%+v", r)
		}
		time.Sleep(time.Hour - time.Second)
		wantStates(t, "well by checks, not by dials", a, "cooling up")
		if r := connect(); r.Attempts != 1 {
			t.Errorf("%+v, want one that passes a over", r)
		}
		if n := w.count("a:1"); n < 3000 {
			t.Errorf("a was checked %d times in an hour", n)
		}
		w.set(errSick, "a:1")
		time.Sleep(5 * time.Second)
		wantStates(t, "sick", a, "down up")
		time.Sleep(2 * time.Hour)
		if r := connect(); r.Attempts != 1 {
			t.Errorf("%+v, want none to a", r)
		}
		wantStates(t, "two hours later", a, "down up")
		w.set(nil, "a:1")
		time.Sleep(5 * time.Second)
		wantStates(t, "found up", a, "up up")
		if r := connect(); r.Attempts != 2 {
			t.Errorf("%+v, want one that tries a", r)
		}
		w.set(errSick, "a:1")
		time.Sleep(5 * time.Second)
		w.set(nil, "a:1")
		time.Sleep(5 * time.Second)
		wantStates(t, "found down and up while it was cooling", a, "up up")
		wantLines(t, log,
			map[string]int{saysDown: 2, saysUp: 2, "upstream failed and is skipped": 2,
				"works again": 0})
	})
}

// A holeDialer dials echoing upstreams in memory; some of them are black holes.
type holeDialer struct {
	mu    sync.Mutex
	holes map[string]bool
	dials map[string]int // to black holes
}

func (d *holeDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	hole := d.holes[addr]
	if hole {
		d.dials[addr]++
	}
	d.mu.Unlock()
	if hole {
		<-ctx.Done()
		// an error that is not the context's
		return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("gave up")}
	}
	return dialFake(echoFake)(ctx, network, addr)
}

func (d *holeDialer) set(addr string, hole bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holes[addr] = hole
}

func newHoleDialer() *holeDialer {
	return &holeDialer{holes: map[string]bool{}, dials: map[string]int{}}
}

func TestDialMovesOnWhenUpstreamIsFoundDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newHoleDialer()
		a, log := newCheckedApp(t, HealthCheck{
			Interval: time.Second, Timeout: time.Second, Fall: 1},
			Options{DialContext: d.dial}, "a:1", "b:1", "c:1")
		var worst, waited atomic.Int64
		var wg sync.WaitGroup
		for i := range 2000 { // for 20 s
			if i == 500 {
				d.set("a:1", true)
			}
			start := time.Now()
			c := serveFake(t.Context(), a, &Conn{})
			wg.Go(func() {
				ping(t, c)
				took := int64(time.Since(start))
				if took > 0 {
					waited.Add(1)
				}
				for {
					most := worst.Load()
					if took <= most || worst.CompareAndSwap(most, took) {
						break
					}
				}
				c.Close()
				if r := <-c.result; r.End != EndDone {
					t.Errorf("%+v", r)
				}
			})
			time.Sleep(10 * time.Millisecond)
		}
		wg.Wait()
		if most := time.Duration(worst.Load()); most > 2500*time.Millisecond || waited.Load() == 0 {
			t.Errorf("%d clients waited, for up to %v; want some, for 2.5s at most",
				waited.Load(), most)
		}
		wantStates(t, "in the end", a, "down up up")
		s := a.Stats()
		if u := s.Upstreams[0]; u.Failed != 0 || u.Open != 0 || s.Failed != 0 {
			t.Errorf("a dial that was given up counts: %+v", s)
		}
		wantLines(t, log, map[string]int{saysDown: 1, "level=": 1})
	})
}

func TestAbandonedDialSaysUpstreamIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newHoleDialer()
		a, _ := newCheckedApp(t, HealthCheck{Interval: time.Second, Timeout: time.Second, Fall: 1},
			Options{DialContext: d.dial}, "a:1")
		for range 2 { // and again after it was up
			d.set("a:1", true)
			start := time.Now()
			c := serveFake(t.Context(), a, &Conn{})
			r := <-c.result
			if took := time.Since(start); took > 2*time.Second || r.End != EndNoUpstream ||
				r.Attempts != 1 || !errors.Is(r.Err, ErrNoUpstream) ||
				!errors.Is(r.Err, errUpstreamDown) ||
				!strings.Contains(r.Err.Error(), "\n"+`lbproxy: app "test": upstream a:1: `) {
				t.Errorf("after %v: %+v", took, r)
			}
			d.set("a:1", false)
			time.Sleep(10 * time.Second)
			wantStates(t, "well", a, "up")
			c = serveFake(t.Context(), a, &Conn{})
			ping(t, c)
			c.Close()
			<-c.result
		}
	})
}

func TestCloseOnDownResetsOpenConnections(t *testing.T) {
	for _, closes := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWard()
			a, _ := newCheckedApp(t, HealthCheck{Check: w.check},
				Options{DialContext: dialFake(echoFake), CloseOnDown: closes}, "a:1", "b:1")
			var conns []served // to a, b, a, b
			for range 4 {
				c := serveFake(t.Context(), a, &Conn{})
				ping(t, c)
				conns = append(conns, c)
			}
			conns[2].Close()
			if r := <-conns[2].result; r.End != EndDone {
				t.Errorf("%+v", r)
			}
			w.set(errSick, "a:1")
			time.Sleep(time.Minute)
			wantStates(t, "a is sick", a, "down up")
			if closes {
				if _, err := conns[0].Read(make([]byte, 1)); err != syscall.ECONNRESET {
					t.Errorf("the client of a reads %v, want a reset", err)
				}
				r := <-conns[0].result
				if r.End != EndUpstreamError || !errors.Is(r.Err, errUpstreamDown) ||
					r.Upstream != "a:1" {
					t.Errorf("%+v", r)
				}
			} else {
				ping(t, conns[0])
			}
			ping(t, conns[1])
			ping(t, conns[3])
			w.set(nil, "a:1")
			time.Sleep(time.Minute)
			again := serveFake(t.Context(), a, &Conn{})
			ping(t, again) // on a, up again
			w.set(errSick, "b:1")
			time.Sleep(time.Minute)
			wantStates(t, "b is sick", a, "up down")
			ping(t, again)
			a.Close()
		})
	}
}

func TestDrainingUpstreamIsChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		a, _ := newCheckedApp(t, HealthCheck{Check: w.check},
			Options{DialContext: dialFake(echoFake)},
			"a:1", "b:1")
		if err := a.SetUpstreams([]Upstream{{Addr: "a:1", Drain: true},
			{Addr: "b:1", Drain: true}}); err != nil {
			t.Fatal(err)
		}
		w.set(errSick, "a:1")
		time.Sleep(time.Minute)
		wantStates(t, "both drain", a, "down up")
		s := a.Stats().Upstreams[0]
		if s.Err != errSick || !s.Drain || time.Since(s.Since) < 45*time.Second ||
			time.Since(s.Since) > 51*time.Second {
			t.Errorf("%+v at %v", s, time.Now())
		}
		c := serveFake(t.Context(), a, &Conn{})
		r := <-c.result
		if want := "lbproxy: no upstream available: 2 draining"; r.End != EndNoUpstream ||
			r.Err.Error() != want {
			t.Errorf("%+v, want %s", r, want)
		}
	})
}

// Sets that change.

func TestSetUpstreamsKeepsHealthAndItsCounters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := make(chan chan error)
		a, log := newCheckedApp(t, HealthCheck{
			Timeout: time.Hour, Check: func(ctx context.Context, u Upstream) error {
				answer := make(chan error)
				select {
				case asked <- answer:
					return <-answer
				case <-ctx.Done():
					return ctx.Err()
				}
			}}, Options{}, "a:1")
		answer := func(err error) {
			q := <-asked
			q <- err
			synctest.Wait()
		}
		set := func() {
			if err := a.SetUpstreams([]Upstream{{Addr: "a:1", Weight: 5}}); err != nil {
				t.Error(err)
			}
		}
		answer(errSick)
		set()
		answer(errSick)
		set()
		wantStates(t, "two checks failed", a, "up")
		q := <-asked
		set() // while it is checked
		q <- errSick
		synctest.Wait()
		wantStates(t, "three checks failed", a, "down")
		set()
		wantStates(t, "in a new set", a, "down")
		answer(nil)
		set()
		wantStates(t, "one check passed", a, "down")
		answer(nil)
		wantStates(t, "two checks passed", a, "up")
		wantLines(t, log, map[string]int{"level=": 2})
	})
}

func TestRemovingAnUpstreamCancelsItsCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		canceled := make(chan error, 1)
		goOn := make(chan error)
		a, log := newCheckedApp(t, HealthCheck{
			Interval: time.Second, Timeout: time.Hour, Rise: 1, Fall: 1,
			Check: func(ctx context.Context, u Upstream) error {
				if w.check(ctx, u); u.Addr != "a:1" || w.count("a:1") > 1 {
					return nil
				}
				<-ctx.Done()
				canceled <- ctx.Err()
				return <-goOn
			}}, Options{DialContext: dialFake(echoFake)}, "a:1")
		c := serveFake(t.Context(), a, &Conn{}) // so that a drains instead of going at once
		ping(t, c)
		time.Sleep(time.Second)
		if n := w.count("a:1"); n != 1 {
			t.Fatalf("%d checks", n)
		}
		begin := time.Now()
		a.SetUpstreams([]Upstream{{Addr: "b:1"}})
		if err := <-canceled; err != context.Canceled || time.Since(begin) != 0 {
			t.Errorf("%v after %v, want context.Canceled at once", err, time.Since(begin))
		}
		time.Sleep(time.Minute)
		a.SetUpstreams([]Upstream{{Addr: "b:1"}, {Addr: "a:1"}})
		time.Sleep(time.Minute)
		wantStates(t, "added again", a, "up up")
		if n := w.count("a:1"); n != 1 {
			t.Errorf("%d checks of a, of which the first has not returned", n)
		}
		goOn <- errSick
		time.Sleep(time.Minute)
		wantStates(t, "when the first check has returned", a, "up up")
		if n := w.count("a:1"); n < 50 || n > 70 {
			t.Errorf("%d checks of a, want one each second again", n)
		}
		a.SetUpstreams([]Upstream{{Addr: "b:1"}})
		n := w.count("a:1")
		time.Sleep(time.Minute)
		wantStates(t, "removed", a, "up up (removed)")
		if w.count("a:1") != n {
			t.Error("a is checked while it drains")
		}
		wantLines(t, log, map[string]int{"level=": 0})
		c.Close()
		<-c.result
	})
}

func TestDownUpstreamAddedAgainStartsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		w.set(errSick, "a:1")
		a, _ := newCheckedApp(t, HealthCheck{Check: w.check}, Options{}, "a:1", "b:1")
		time.Sleep(15 * time.Second)
		wantStates(t, "sick", a, "down up")
		a.SetUpstreams([]Upstream{{Addr: "b:1"}})
		a.SetUpstreams([]Upstream{{Addr: "a:1"}, {Addr: "b:1"}})
		wantStates(t, "at once", a, "up up")
		time.Sleep(9 * time.Second) // at most two checks
		wantStates(t, "at once", a, "up up")
		time.Sleep(6 * time.Second)
		wantStates(t, "sick", a, "down up")
	})
}

// While the set changes, an Addr has one check at a time, only upstreams in the set are checked,
// and nothing is checked after Close.
func TestChecksWhileUpstreamsChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		var closed atomic.Bool
		var checks atomic.Int32
		a, _ := newCheckedApp(t, HealthCheck{
			Interval: time.Millisecond, Timeout: time.Millisecond, Rise: 1, Fall: 1,
			Check: func(_ context.Context, u Upstream) error {
				checks.Add(1)
				w.mu.Lock()
				w.within[u.Addr]++
				if n := w.within[u.Addr]; n > 1 || closed.Load() {
					t.Errorf("%s: %d checks at a time; app closed: %v", u.Addr, n,
						closed.Load())
				}
				w.mu.Unlock()
				time.Sleep(rand.N(2 * time.Millisecond)) // ignores ctx
				w.mu.Lock()
				w.within[u.Addr]--
				w.mu.Unlock()
				return []error{nil, errSick}[rand.N(2)]
			}}, Options{DialContext: dialFake(func(net.Conn) {})}, "a:1")
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 200 {
					ups := []Upstream{{Addr: "a:1"}, {Addr: "b:1"}, {Addr: "c:1"}, {Addr: "d:1"}}
					rand.Shuffle(len(ups), func(i, j int) { ups[i], ups[j] = ups[j], ups[i] })
					if err := a.SetUpstreams(ups[:1+rand.N(4)]); err != nil {
						t.Error(err)
					}
					c := serveFake(t.Context(), a, &Conn{})
					c.Close()
					<-c.result
					time.Sleep(rand.N(3 * time.Millisecond))
				}
			})
		}
		time.Sleep(250 * time.Millisecond)
		a.Close() // while sets change
		closed.Store(true)
		n := checks.Load()
		wg.Wait()
		if checks.Load() != n || n < 50 {
			t.Errorf("%d checks until Close, %d in all", n, checks.Load())
		}
		if len(a.checker.probers) > 0 {
			t.Errorf("%d probers are left", len(a.checker.probers))
		}
	})
}

// The end.

func TestCloseCancelsChecksAndWaitsForThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := make(chan bool, 10)
		var running atomic.Int32
		a, log := newCheckedApp(t, HealthCheck{
			Interval: 1, Timeout: time.Hour, Fall: 1,
			Check: func(ctx context.Context, u Upstream) error {
				running.Add(1)
				defer running.Add(-1)
				begun <- true
				<-ctx.Done()
				if u.Addr == "b:1" {
					time.Sleep(time.Second) // a hook that takes its time
				}
				return errSick
			}}, Options{}, "a:1", "b:1")
		<-begun
		<-begun
		begin := time.Now()
		a.Close()
		if took := time.Since(begin); took != time.Second || running.Load() != 0 {
			t.Errorf("Close took %v, %d checks still running", took, running.Load())
		}
		wantStates(t, "closed", a, "up up") // a canceled check does not count
		wantLines(t, log, map[string]int{"level=": 0})
		a.Close()
		if err := a.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestChecksRunUntilTheDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		a, _ := newCheckedApp(t, HealthCheck{Interval: time.Second, Check: w.check},
			Options{DialContext: dialFake(echoFake)}, "a:1")
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		ended := make(chan error)
		go func() { ended <- a.Shutdown(t.Context()) }()
		time.Sleep(time.Minute)
		if n := w.count("a:1"); n < 60 {
			t.Errorf("%d checks in a minute of draining", n)
		}
		c.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		n := w.count("a:1")
		if err := a.SetUpstreams([]Upstream{{Addr: "b:1"}}); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if w.count("a:1") != n || w.count("b:1") != 0 {
			t.Error("checks go on after Shutdown")
		}
	})
}

func TestShutdownWithAHungCheckEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		a, _ := newCheckedApp(t, HealthCheck{Check: func(context.Context, Upstream) error {
			<-release
			return nil
		}}, Options{}, "a:1")
		time.Sleep(5 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		if err := a.Shutdown(ctx); err != context.DeadlineExceeded ||
			time.Since(begin) != time.Second {
			t.Errorf("Shutdown: %v after %v", err, time.Since(begin))
		}
		go func() { time.Sleep(time.Minute); close(release) }()
		a.Close()
		if took := time.Since(begin); took != time.Second+time.Minute {
			t.Errorf("Close returned after %v, before the check had", took)
		}
	})
}

// Once the result of a check is known the check has returned, so the next one may begin at once.
func TestCheckHasReturnedOnceItsResultIsKnown(t *testing.T) {
	a, _ := newApp(t, Options{}, "u:1")
	hc, _ := HealthCheck{
		Timeout: time.Minute, // or a check that waits for a processor may time out
		Check:   func(context.Context, Upstream) error { return nil },
	}.complete()
	p := &prober{checker: newChecker(a, hc), conf: &Upstream{Addr: "u:1"}}
	var wg sync.WaitGroup
	for range 8 { // so that goroutines compete for processors
		wg.Go(func() {
			for range 20_000 {
				check, err := p.check(t.Context())
				select {
				case _, more := <-check:
					if !more && err == nil {
						continue
					}
				default:
				}
				t.Errorf("it seems to be in progress, with %v", err)
				return
			}
		})
	}
	wg.Wait()
}

// An upstream that stays up does not keep the connections it has served in memory.
func TestCloseOnDownForgetsEndedConnections(t *testing.T) {
	a, results := newApp(t, Options{
		HealthCheck: &HealthCheck{Interval: time.Hour}, CloseOnDown: true,
		DialContext: dialFake(echoFake),
	}, "a:1")
	var clients []weak.Pointer[duplexConn]
	for range 10 {
		client, ours := duplex()
		clients = append(clients, weak.Make(ours))
		client.Close()
		if r, err := a.ServeConn(t.Context(), &Conn{Client: ours}); err != nil {
			t.Fatalf("%+v", r)
		}
		<-results // which has the Conn, and so its Client
	}
	proxytest.Eventually(t, "ended connections are forgotten", func() bool {
		runtime.GC()
		return !slices.ContainsFunc(clients,
			func(c weak.Pointer[duplexConn]) bool { return c.Value() != nil })
	})
}
