//go:build linux && !lbproxy_portable

package lbproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
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
// the connection that admit saw is closed, and the session has two descriptors.
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
	before := proxytest.Descriptors()
	third := dial(t, addr)
	ping(t, third)
	// the client's, the upstream's, and the session's two
	if n := proxytest.Descriptors() - before; n != 4 {
		t.Errorf("a session and its peers have %d descriptors, want 4", n)
	}
	third.Close()
	if r := result(t, results); r.End != EndDone {
		t.Errorf("%+v", r)
	}
	wantOnLoops(t, a, 2)
	wantCounts(t, a, 3, 1, 0)
}

// TestBandwidthHoldsLoopSessions has two downloads share a rate. Each takes as long as the rate
// says, at least.
func TestBandwidthHoldsLoopSessions(t *testing.T) {
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
		c := dial(t, addr)
		ping(t, c)
		c.Close()
		if r := result(t, results); r.End != EndDone {
			t.Errorf("%+v", r)
		}
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

// TestAbortOnTheWayToALoop aborts connections from within admit, right after it, and later, and
// closes the app among the last of them. Each has one Result, and no descriptor is left.
func TestAbortOnTheWayToALoop(t *testing.T) {
	const n = 400
	up := upstreamDoing(t, echo)
	before := proxytest.Descriptors()
	admitted := make(chan *Conn, n)
	admit := func(c *Conn) { admitted <- c }
	a, addr, results := serveAdmitted(t, admit, Options{}, Upstream{Addr: up})
	cause := errors.New("no more")
	var aborters sync.WaitGroup
	for i := range 8 {
		aborters.Go(func() {
			for c := range admitted {
				time.Sleep(time.Duration(i) * 20 * time.Microsecond)
				c.Abort(cause)
			}
		})
	}
	for range n {
		readUntilReset(addr)
		if r := result(t, results); r.End != EndCanceled || r.Err != cause {
			t.Errorf("%+v", r)
		}
	}
	close(admitted)
	aborters.Wait()
	a.Close()
	proxytest.Eventually(t, "no descriptor is left", func() bool {
		return proxytest.Descriptors() <= before
	})
}
