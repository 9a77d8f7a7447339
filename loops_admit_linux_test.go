//go:build linux && !lbproxy_portable

package lbproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// serveAdmitted is newLoopApp with an admit.
func serveAdmitted(t *testing.T, admit func(*Conn), opts Options, ups ...Upstream) (
	*LBProxyApp, string, <-chan Result,
) {
	t.Helper()
	opts.Loops = true
	a, results := newAppOver(t, opts, ups...)
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		admit(c)
		return nil
	})
	return a, addr, results
}

// readUntilReset is a client that is reset, perhaps before it has noticed that it is connected.
func readUntilReset(addr string) {
	if c, err := net.Dial("tcp", addr); err == nil {
		io.Copy(io.Discard, c)
		c.Close()
	}
}

// TestAdmittedConnectionMovesToALoop limits a connection by the package's own managers. Afterwards
// the connection that admit saw is closed, and the session has two sockets, each with one
// descriptor.
func TestAdmittedConnectionMovesToALoop(t *testing.T) {
	open := &OpenLimit{Max: 1}
	clients := NewClientLimits(10, func(string) RateLimitManager {
		return All(&TokenBucket{Burst: 2}, &Bandwidth{BytesPerSecond: 1 << 30, Burst: 1 << 20})
	})
	seen := make(chan net.Conn, 3)
	up := upstreamDoing(t, func(c *net.TCPConn) {
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // without a pipe to splice by
	})
	a, addr, results := serveAdmitted(t, func(c *Conn) {
		seen <- c.Client
		c.ClientID = "somebody"
		c.RateLimit = All(open, clients.For("somebody"))
	}, Options{}, Upstream{Addr: up})
	first := dial(t, addr)
	ping(t, first)
	if _, err := (<-seen).Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a Read of what admit saw: %v, want net.ErrClosed", err)
	}
	readUntilReset(addr)
	if r := result(t, results); r.End != EndRateLimited || r.ClientID != "somebody" {
		t.Errorf("%+v", r)
	}
	first.Close()
	if r := result(t, results); r.End != EndDone || r.ClientID != "somebody" || r.Sent != 1 {
		t.Errorf("%+v", r)
	}
	proxytest.Eventually(t, "the limit is told of the end", func() bool {
		open.mu.Lock()
		defer open.mu.Unlock()
		return open.open == 0
	})
	before := sockets(t)
	third := dial(t, addr)
	ping(t, third)
	after := sockets(t)
	maps.DeleteFunc(after, func(socket string, _ int) bool { return before[socket] > 0 })
	// the client's, the upstream's, and the session's two
	if want := slices.Repeat([]int{1}, 4); !slices.Equal(slices.Collect(maps.Values(after)), want) {
		t.Errorf("the sockets of a session and its peers have descriptors: %v, want 1 for each of 4",
			after)
	}
	third.Close()
	if r := result(t, results); r.End != EndDone {
		t.Errorf("%+v", r)
	}
	wantOnLoops(t, a, 2)
	wantCounts(t, a, 3, 1, 0)
}

// sockets returns the sockets of this process, each with the number of its descriptors.
func sockets(t *testing.T) map[string]int {
	t.Helper()
	descriptors, err := os.ReadDir("/proc/self/fd")
	proxytest.Must(t, err)
	found := map[string]int{}
	for _, d := range descriptors {
		link, _ := os.Readlink("/proc/self/fd/" + d.Name()) // it may be closed by now
		if strings.HasPrefix(link, "socket:") {
			found[link]++
		}
	}
	return found
}

// TestBandwidthHoldsLoopSessions has two downloads share a rate. Each takes as long as the rate
// says, at least.
func TestBandwidthHoldsLoopSessions(t *testing.T) {
	t.Parallel()
	const size, rate = 1 << 20, 2 << 20
	shared := &Bandwidth{BytesPerSecond: rate}
	up := upstreamDoing(t, func(c *net.TCPConn) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			proxytest.Pattern(1).Send(c, size)
		}
		c.CloseWrite()
		io.Copy(io.Discard, c)
	})
	a, addr, results := serveAdmitted(t, func(c *Conn) { c.RateLimit = shared }, Options{
		IdleTimeout: proxytest.Patience,
	}, Upstream{Addr: up})
	began := time.Now()
	var downloads sync.WaitGroup
	for range 2 {
		downloads.Go(func() {
			c := dial(t, addr)
			c.Write([]byte("d"))
			if n, err := proxytest.Pattern(1).Receive(c); n != size || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			c.CloseWrite()
		})
	}
	downloads.Wait()
	if took := time.Since(began); took < 9*time.Second/10 {
		t.Errorf("2 MiB took %v at 2 MiB/s", took)
	}
	for range 2 {
		if r := result(t, results); r.End != EndDone || r.Received != size {
			t.Errorf("%+v", r)
		}
	}
	wantOnLoops(t, a, 2)
}

// TestHeldLoopSessionIsNotIdleAndCanBeAborted holds a session for longer than its idle timeout.
func TestHeldLoopSessionIsNotIdleAndCanBeAborted(t *testing.T) {
	up := upstreamDoing(t, echo)
	a, addr, results := serveAdmitted(t, func(c *Conn) {
		c.RateLimit = &Bandwidth{BytesPerSecond: 1}
	}, Options{IdleTimeout: 20 * time.Millisecond}, Upstream{Addr: up})
	c := dial(t, addr)
	c.Write(make([]byte, 1000))
	select {
	case r := <-results:
		t.Fatalf("%+v", r)
	case <-time.After(300 * time.Millisecond):
	}
	cause := errors.New("enough")
	for conn := range a.Conns() {
		conn.Abort(cause)
	}
	if r := result(t, results); r.End != EndCanceled || r.Err != cause {
		t.Errorf("%+v", r)
	}
	wantOnLoops(t, a, 1)
}

// A newLimit that never returns holds only the clients it is called for.
func TestNewLimitThatBlocksHoldsNobodyElse(t *testing.T) {
	up := upstreamDoing(t, echo)
	asked, blocked := make(chan struct{}, 10), make(chan struct{})
	clients := NewClientLimits(100, func(client string) RateLimitManager {
		if client == "stuck" {
			asked <- struct{}{}
			<-blocked
		}
		return &OpenLimit{Max: 100}
	})
	var mu sync.Mutex
	name := "stuck"
	a, addr, results := serveAdmitted(t, func(c *Conn) {
		mu.Lock()
		client := name
		mu.Unlock()
		c.RateLimit = clients.For(client)
	}, Options{}, Upstream{Addr: up})
	defer close(blocked)
	for range 4 { // more than there are loops on a small machine
		dial(t, addr)
		proxytest.Receive(t, "a call of newLimit", asked)
	}
	mu.Lock()
	name = "good"
	mu.Unlock()
	for range 20 {
		visit(t, addr, results)
	}
	wantOnLoops(t, a, 20)
}

// TestLoopSessionSaysALastWord has OnRefused answer for a session whose upstreams all fail.
func TestLoopSessionSaysALastWord(t *testing.T) {
	refusing := proxytest.RefusingAddr(t)
	told := make(chan error, 1)
	a, addr, results := serveAdmitted(t, func(c *Conn) {
		c.OnRefused = func(c net.Conn, err error) {
			told <- err
			io.WriteString(c, "sorry")
		}
	}, Options{}, Upstream{Addr: refusing}, Upstream{Addr: proxytest.RefusingAddr(t)})
	c := dial(t, addr)
	if b, err := io.ReadAll(c); string(b) != "sorry" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	r := result(t, results)
	if err := <-told; r.End != EndDialFailed || r.Attempts != 2 || r.Err != err {
		t.Errorf("%+v; OnRefused was told %v", r, err)
	}
	wantOnLoops(t, a, 1)
	wantCounts(t, a, 1, 0, 1)
}

// TestOnDoneOfAnAdmittedLoopSessionMayBlock blocks in Conn.OnDone, where no loop may be.
func TestOnDoneOfAnAdmittedLoopSessionMayBlock(t *testing.T) {
	up := upstreamDoing(t, echo)
	blocked, called := make(chan struct{}), make(chan struct{}, 10)
	a, err := New("test", []Upstream{{Addr: up}}, &Options{Loops: true, Logger: quiet})
	proxytest.Must(t, err)
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		c.OnDone = func(Result) {
			called <- struct{}{}
			<-blocked
		}
		return nil
	})
	for range 6 {
		c := dial(t, addr)
		ping(t, c)
		c.Close()
		proxytest.Receive(t, "a call of OnDone", called)
	}
	close(blocked)
	wantOnLoops(t, a, 6)
}

// A Conn that is aborted in admit never opens, so ClientLimits know nothing of its client.
func TestAbortInAdmitWithALimit(t *testing.T) {
	clients := NewClientLimits(10, func(string) RateLimitManager { return &OpenLimit{Max: 5} })
	var log proxytest.Buffer
	cause := errors.New("no")
	a, err := New("test", []Upstream{{Addr: upstreamDoing(t, echo)}}, &Options{
		Loops: true, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	proxytest.Must(t, err)
	results := make(chan Result, 1)
	addr := serve(t, a, func(_ context.Context, c *Conn) error {
		c.RateLimit = clients.For("x")
		c.OnDone = func(r Result) { results <- r }
		c.Abort(cause)
		return nil
	})
	readUntilReset(addr)
	if r := result(t, results); r.Err != cause || r.End != EndCanceled {
		t.Errorf("%+v", r)
	}
	a.Close()
	if log.String() != "" {
		t.Errorf("the log has %s", log.String())
	}
	wantOnLoops(t, a, 0)
}

// An SO_LINGER that admit has set would make the close of a socket wait, and its loop with it.
func TestLoopSocketsDoNotLinger(t *testing.T) {
	shared := make(chan *os.File, 1)
	_, addr, _ := serveAdmitted(t, func(c *Conn) {
		tcp := c.Client.(*net.TCPConn)
		tcp.SetLinger(4)
		raw, err := tcp.SyscallConn()
		proxytest.Must(t, err)
		raw.Control(func(fd uintptr) {
			n, err := syscall.Dup(int(fd))
			proxytest.Must(t, err)
			shared <- os.NewFile(uintptr(n), "duplicate")
		})
	}, Options{}, Upstream{Addr: upstreamDoing(t, echo)})
	ping(t, dial(t, addr))
	f := <-shared
	defer f.Close()
	// The first half of the option's value says whether there is one.
	on, err := syscall.GetsockoptInt(int(f.Fd()), syscall.SOL_SOCKET, syscall.SO_LINGER)
	if on != 0 || err != nil {
		t.Errorf("SO_LINGER is %d, %v", on, err)
	}
}

// TestAbortOnTheWayToALoop aborts many connections at once: from within admit, right after it, and
// later. In the middle the app is closed. Each connection has one Result, each EventOpen its
// EventClose, and no descriptor is left.
func TestAbortOnTheWayToALoop(t *testing.T) {
	const clients, rounds = 16, 40
	up := upstreamDoing(t, func(c *net.TCPConn) { io.Copy(io.Discard, struct{ io.Reader }{c}) })
	before := proxytest.Descriptors()
	open := &OpenLimit{Max: clients * rounds}
	limits := NewClientLimits(clients, func(string) RateLimitManager {
		return &TokenBucket{Burst: 1 << 20}
	})
	var admitted, done atomic.Int64
	var aborts sync.WaitGroup
	cause := errors.New("no more")
	opts := Options{OnDone: func(Result) { done.Add(1) }}
	a, addr, _ := serveAdmitted(t, func(c *Conn) {
		n := admitted.Add(1)
		c.RateLimit = All(open, limits.For(fmt.Sprint(n%clients)))
		if n%8 == 0 {
			c.OnRefused = func(net.Conn, error) {}
		}
		if n%5 == 0 {
			c.Abort(cause)
			return
		}
		aborts.Go(func() {
			time.Sleep(time.Duration(n%7) * 20 * time.Microsecond)
			c.Abort(cause)
		})
	}, opts, Upstream{Addr: up})
	var dialers sync.WaitGroup
	for range clients {
		dialers.Go(func() {
			for range rounds {
				readUntilReset(addr)
				if admitted.Load() > clients*rounds*2/3 {
					a.Close() // those who come later are refused
				}
			}
		})
	}
	dialers.Wait()
	aborts.Wait()
	a.Close()
	proxytest.Eventually(t, "each has its Result, and no descriptor is left", func() bool {
		return done.Load() == admitted.Load() && proxytest.Descriptors() <= before
	})
	if open.open != 0 {
		t.Errorf("%d connections are open for ever", open.open)
	}
	if s := a.Stats(); s.Open != 0 || s.Accepted != uint64(admitted.Load()) {
		t.Errorf("%d admitted: %+v", admitted.Load(), s)
	}
}
