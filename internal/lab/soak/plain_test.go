//go:build linux

package soak

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// dialUpstreams is the number of upstreams of the app with faults in its dials.
const dialUpstreams = 4

// nobody is an address where nobody listens.
const nobody = "127.0.0.1:1"

// A panicLog is lbproxy's log handler. It reports panics and ignores everything else.
type panicLog struct{ run *run }

func (l panicLog) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelError
}
func (l panicLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l panicLog) WithGroup(string) slog.Handler      { return l }

func (l panicLog) Handle(_ context.Context, line slog.Record) error {
	line.Attrs(func(a slog.Attr) bool {
		if a.Key == "panic" {
			l.run.fail("%s: %v", line.Message, a.Value)
		}
		return true
	})
	return nil
}

// A plainFront is lbproxy over TCP, with an app for each way of using it.
type plainFront struct {
	run   *run
	apps  map[string]*lbproxy.LBProxyApp
	addrs map[string]string

	limits *lbproxy.ClientLimits
	all    lbproxy.RateLimitManager // nobody comes near it
	few    lbproxy.RateLimitManager // some are over it

	serving sync.WaitGroup
	dialer  net.Dialer

	mu      sync.Mutex
	books   map[string]book // by app
	refused uint64          // dials of the app dial that were sent to where nobody listens
}

// A book has the sums of an app's results. Its Stats must equal them.
type book struct{ results, refused, failed, sent, received uint64 }

func newPlainFront(t testing.TB, r *run) *plainFront {
	f := &plainFront{
		run: r, apps: map[string]*lbproxy.LBProxyApp{}, addrs: map[string]string{},
		limits: lbproxy.NewClientLimits(40, func(string) lbproxy.RateLimitManager {
			return lbproxy.All(&lbproxy.OpenLimit{Max: 1 << 20},
				&lbproxy.TokenBucket{Burst: 1 << 20, Every: time.Nanosecond})
		}),
		all:   &lbproxy.Bandwidth{BytesPerSecond: 300 << 20, Burst: 1 << 20},
		few:   &lbproxy.OpenLimit{Max: 1},
		books: map[string]book{},
	}
	for _, app := range []struct {
		id      string
		servers []*server
		opts    lbproxy.Options
	}{
		{"web", r.web, lbproxy.Options{FailTimeout: 50 * time.Millisecond}},
		{"greet", r.greeting, lbproxy.Options{MaxConns: 2 * r.inflight}},
		{"tls", r.overTLS, lbproxy.Options{}},
		{"slow", r.slow, lbproxy.Options{}},
		{"limits", r.web, lbproxy.Options{}},
		{"idle", r.web, lbproxy.Options{IdleTimeout: idleTimeout}},
		{"dial", r.web[:dialUpstreams],
			lbproxy.Options{DialContext: f.dial, FailTimeout: 20 * time.Millisecond}},
		{"hole", r.web[:dialUpstreams],
			lbproxy.Options{DialContext: f.dial, FailTimeout: 20 * time.Millisecond,
				DialTimeout: dialTimeout}},
		{"kill", r.mortal, lbproxy.Options{FailTimeout: 20 * time.Millisecond}},
	} {
		app.opts.Loops = useLoops()
		app.opts.Logger, app.opts.OnDone = slog.New(panicLog{r}), f.done
		if app.opts.DialTimeout == 0 {
			app.opts.DialTimeout = giveUp
		}
		a, err := lbproxy.New(app.id, f.upstreams(app.servers), &app.opts)
		proxytest.Must(t, err)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		proxytest.Must(t, err)
		f.apps[app.id], f.addrs[app.id] = a, l.Addr().String()
		admit := f.admit
		switch {
		case app.id == "web" && !useLoops():
			l = &flakyListener{Listener: l, run: r}
		case app.id == "web": // its connections move to loops after admit
		case useLoops() && app.id != "limits" && app.opts.DialContext == nil:
			admit = nil // loops accept themselves
		}
		f.serving.Go(func() {
			if err := a.Serve(l, admit); !errors.Is(err, lbproxy.ErrAppClosed) {
				r.fail("app %s: Serve returned %v", app.id, err)
			}
		})
	}
	return f
}

// useLoops says that plain connections run on event loops, most of them unseen by an AdmitFunc.
func useLoops() bool { return os.Getenv("LBPROXY_LOOPS") != "" }

// abort aborts a connection that admit has not seen.
func (f *plainFront) abort(c *conn, cause error) {
	for conn := range f.apps[c.app].Conns() {
		if id, ok := idOf(conn.Client.RemoteAddr()); ok && id == c.id {
			conn.Abort(cause)
		}
	}
}

func (f *plainFront) upstreams(servers []*server) (all []lbproxy.Upstream) {
	for _, s := range servers {
		u := lbproxy.Upstream{Addr: s.addr}
		if s.tls != nil {
			u.TLS = &tls.Config{RootCAs: f.run.pki.Pool()}
		}
		all = append(all, u)
	}
	return all
}

// A flakyListener is now and then out of descriptors.
type flakyListener struct {
	net.Listener
	run *run
	n   atomic.Int64
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.n.Add(1)%50 == 0 {
		l.run.count(noAccept)
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// admit admits everyone, with the limits of the connection.
func (f *plainFront) admit(_ context.Context, conn *lbproxy.Conn) error {
	id, ok := idOf(conn.Client.RemoteAddr())
	if !ok {
		return nil
	}
	c := f.run.find(id)
	if c == nil {
		return fmt.Errorf("soak: nobody connects from %v", conn.Client.RemoteAddr())
	}
	if !useLoops() {
		c.abort = conn.Abort
	}
	conn.ClientID, conn.Value = fmt.Sprint(id%64), c
	switch {
	case c.kind == overLimit:
		c.audit.RateLimitManager = lbproxy.All(f.limits.For(conn.ClientID), new(lbproxy.TokenBucket))
	case c.kind == someLimit:
		c.audit.RateLimitManager = lbproxy.All(f.all, f.few)
	case c.app == "limits":
		// Here there are fewer clients than are remembered: else some newcomers would be refused.
		c.audit.RateLimitManager = lbproxy.All(f.all, f.limits.For(fmt.Sprint(id%16)))
	default:
		return nil
	}
	c.audit.cutAt = int64(c.limitedBytes)
	conn.RateLimit = &c.audit
	return nil
}

// dial injects the faults of the connection that an upstream is dialed for.
func (f *plainFront) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, _ := lbproxy.ConnFromContext(ctx).Value.(*conn)
	if c == nil || int(c.dials.Add(1)) > c.dialFaults {
		return f.dialer.DialContext(ctx, network, addr)
	}
	failed := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	switch c.kind {
	case refuse, refuseAll:
		addr = nobody
		f.mu.Lock()
		f.refused++
		f.mu.Unlock()
	case blackHole:
		if c.id%2 == 0 {
			<-ctx.Done()
			return failed(ctx.Err())
		}
		addr = f.run.black
	case slowDial:
		time.Sleep(time.Duration(10+c.id%90) * time.Millisecond)
	case noDescriptors:
		return failed(syscall.EMFILE)
	case noPorts:
		return failed(syscall.EADDRNOTAVAIL)
	}
	return f.dialer.DialContext(ctx, network, addr)
}

// done is lbproxy's hook.
func (f *plainFront) done(r lbproxy.Result) {
	f.note(&r)
	f.run.report(r.Client, outcome{string(r.End), r.Err, r.Attempts, r.Sent, r.Received})
}

func (f *plainFront) note(r *lbproxy.Result) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.books[r.App]
	b.results++
	switch {
	case r.End == lbproxy.EndRateLimited && r.Attempts == 0:
		b.refused++
	case r.End == lbproxy.EndDialFailed, r.End == lbproxy.EndNoUpstream:
		b.failed++
	}
	b.sent += uint64(r.Sent)
	b.received += uint64(r.Received)
	f.books[r.App] = b
}

// reshuffle gives the app web other upstreams: some of those there are, in another order, with
// other weights, and now and then one that refuses.
func (f *plainFront) reshuffle() {
	all := f.upstreams(f.run.web)
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:1+rand.IntN(len(all))]
	for i := range all {
		all[i].Weight = rand.IntN(4)
	}
	if rand.IntN(3) == 0 {
		all = append(all, lbproxy.Upstream{Addr: nobody, Weight: 10})
	}
	if err := f.apps["web"].SetUpstreams(all); err != nil {
		f.run.fail("SetUpstreams: %v", err)
	}
	f.run.count(reload)
}

// look checks the counts in ways that hold at any time.
func (f *plainFront) look() {
	for id, a := range f.apps {
		s := a.Stats()
		open := 0
		for _, u := range s.Upstreams {
			open += u.Open
			if u.Open < 0 || u.Failed > u.Total {
				f.run.fail("app %s: upstream %+v", id, u)
			}
		}
		if open > s.Open || s.Open > 2*f.run.inflight {
			f.run.fail("app %s: %d open, %d on its upstreams", id, s.Open, open)
		}
	}
}

// settled lists the counts that are wrong when there are no connections.
func (f *plainFront) settled() (wrong faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, a := range f.apps {
		s, failedDials := a.Stats(), uint64(0)
		if s.Open != 0 {
			wrong.add("app %s has %d connections open", id, s.Open)
		}
		said := book{s.Accepted, s.Refused, s.Failed, s.Sent, s.Received}
		ended := uint64(0)
		for _, n := range s.Ends {
			ended += n
		}
		if ended != s.Accepted || s.NotAdmitted != 0 {
			wrong.add("app %s: %d accepted, %d ended, %d not admitted",
				id, s.Accepted, ended, s.NotAdmitted)
		}
		for _, u := range s.Upstreams {
			if u.Open != 0 || u.Removed {
				wrong.add("app %s: upstream %s has %d connections open, removed %v",
					id, u.Addr, u.Open, u.Removed)
			}
			failedDials += u.Failed
		}
		if want := f.books[id]; said != want {
			wrong.add("app %s: the stats say %+v, the results %+v", id, said, want)
		}
		if id == "dial" && failedDials != f.refused {
			wrong.add("app dial: upstreams failed %d dials, want %d", failedDials, f.refused)
		}
	}
	return wrong
}

// stop ends the apps, whose connections have ended.
func (f *plainFront) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for id, a := range f.apps {
		if err := a.Shutdown(ctx); err != nil {
			f.run.fail("app %s: Shutdown: %v", id, err)
		}
		a.Close()
	}
	f.serving.Wait()
}
