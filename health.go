package lbproxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"
)

// A HealthCheck has every upstream checked, over and over. One that fails Fall checks in a row is down: it gets no
// connection, not even when there is no other, until it passes Rise checks in a row; those that it has are left
// alone. Up again it is like one back from a failed dial, and gets at most every second new connection until
// another upstream has as few. Where all are down, clients get [ErrNoUpstream].
//
// An upstream is taken to be up until checks say otherwise, so that service begins at once; its first check comes
// within an Interval. What dials tell goes on to count: an upstream whose dial failed is passed over for
// [Options].FailTimeout although its checks pass, and one that is down is not dialled at all.
//
// The checks of an upstream follow it through [LBProxyApp.SetUpstreams]: they go on while its Addr stays, and stop,
// the one in progress included, when it is removed.
//
// The zero HealthCheck is a TCP or TLS dial every 5 seconds.
type HealthCheck struct {
	// Interval is the time from the end of one check of an upstream to its next, less up to a tenth at random, so
	// that checks do not fall into step. 0 means 5 seconds.
	Interval time.Duration

	// Timeout bounds each check: one that has no result by then has failed. 0 means 2 seconds.
	Timeout time.Duration

	// Rise is how many checks in a row a down upstream has to pass to be up. 0 means 2.
	Rise int

	// Fall is how many checks in a row an upstream has to fail to be down. 0 means 3.
	Fall int

	// Check says how an upstream is: nil means well. u is the check's own copy, with the defaults filled in. Check
	// must be safe for concurrent use, for upstreams are checked side by side, but never twice at a time. It should
	// return when ctx ends, which is at the Timeout, when u is removed, and when the app is closed. While it does
	// not, each further check of u that would be due has failed. Shutdown and Close wait for it, so it must not
	// call them. A panic is logged and means not well. An error that is the proxy's own, such as having run out of
	// descriptors, and context.Canceled count neither way.
	//
	// nil means to dial with Options.DialContext, whose context is then no client's, to make a TLS handshake if
	// u.TLS is set, and to close. (That a server of TLS 1.3 refuses the proxy's certificate does not show in that.)
	Check func(ctx context.Context, u Upstream) error
}

// complete returns hc with its defaults filled in, or what is wrong with it.
func (hc HealthCheck) complete() (_ HealthCheck, wrong string) {
	switch {
	case hc.Interval < 0:
		wrong = fmt.Sprintf("Interval %v is negative: use 0 for the default of 5s", hc.Interval)
	case hc.Timeout < 0:
		wrong = fmt.Sprintf("Timeout %v is negative: use 0 for the default of 2s", hc.Timeout)
	case hc.Rise < 0:
		wrong = fmt.Sprintf("Rise %d is negative: use 0 for the default of 2", hc.Rise)
	case hc.Fall < 0:
		wrong = fmt.Sprintf("Fall %d is negative: use 0 for the default of 3", hc.Fall)
	}
	hc.Interval = cmp.Or(hc.Interval, 5*time.Second)
	hc.Timeout = cmp.Or(hc.Timeout, 2*time.Second)
	hc.Rise = cmp.Or(hc.Rise, 2)
	hc.Fall = cmp.Or(hc.Fall, 3)
	return hc, wrong
}

// A checker runs an app's health checks. Each upstream has a prober, which is a goroutine: that is the simplest
// thing that cannot have one upstream wait for another. All it does is wait, so its stack stays small (all told it
// holds about 6 KiB); a check has a goroutine of its own, whose stack goes when the check is over.
type checker struct {
	HealthCheck // complete
	app         *LBProxyApp

	mu      sync.Mutex // held over no hook; may be held when balancer.mu is taken, never the other way round
	probers map[string]*prober
	stopped bool          // no prober is started any more
	ended   chan struct{} // closed when stopped is set and there are no probers
}

// A prober checks one upstream. It is in checker.probers, by the upstream's Addr, as long as its goroutine runs,
// so that an Addr that is removed and added again meanwhile does not get a second one.
type prober struct {
	*checker
	addr string

	// What checker.mu guards: replaced by SetUpstreams.
	conf     *Upstream
	upstream *upstream
	ctx      context.Context // ends when the upstream is removed, which is under checker.mu, and with the app
	cancel   context.CancelFunc
}

func newChecker(a *LBProxyApp, hc HealthCheck) *checker {
	a.balancer.checked = true
	c := &checker{HealthCheck: hc, app: a, probers: map[string]*prober{}, ended: make(chan struct{})}
	if c.Check == nil {
		c.Check = c.dial
	}
	return c
}

// set makes confs the balancer's current set, and its upstreams those that are checked.
func (c *checker) set(confs []Upstream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ups := c.app.balancer.set(confs, time.Now())
	if c.stopped {
		return
	}
	removed := maps.Clone(c.probers)
	for i := range confs {
		addr := confs[i].Addr
		delete(removed, addr)
		p, found := c.probers[addr]
		if !found {
			p = &prober{checker: c, addr: addr}
			c.probers[addr] = p
		}
		p.conf = &confs[i]
		if !found || p.ctx.Err() != nil { // new, or removed before and still there because of a check that goes on
			p.upstream = ups[i]
			p.ctx, p.cancel = context.WithCancel(c.app.ctx)
		}
		if !found {
			go p.run()
		}
	}
	for _, p := range removed {
		p.cancel()
	}
}

// stop has ended closed when all probers are gone, for which the app's context must end.
func (c *checker) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		c.stopped = true
		c.closeIfEnded()
	}
}

// closeIfEnded closes ended if all probers are gone and no more will come. The caller holds mu.
func (c *checker) closeIfEnded() {
	if c.stopped && len(c.probers) == 0 {
		close(c.ended)
	}
}

// run watches the upstream, and again if it has been removed and added before that was over.
func (p *prober) run() {
	for {
		p.mu.Lock()
		ctx, u := p.ctx, p.upstream
		if ctx.Err() != nil {
			delete(p.probers, p.addr)
			p.closeIfEnded()
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		p.watch(ctx, u)
	}
}

// watch checks u until ctx ends, and returns when the last check has.
func (p *prober) watch(ctx context.Context, u *upstream) {
	down, streak := false, 0 // streak: the checks in a row that contradict down
	check := make(chan error)
	close(check) // there is none yet
	defer func() {
		for range check {
		}
	}()
	timer := time.NewTimer(rand.N(p.Interval))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		var err error
		select {
		case <-check: // has returned, if too late for its result to count
			check, err = p.check(ctx)
		default:
			err = errors.New("the check before has not returned yet")
		}
		switch {
		case err != nil && ourFault(err): // which tells nothing
		case (err != nil) == down:
			streak = 0
		default:
			streak++
		}
		if down && streak == p.Rise || !down && streak == p.Fall {
			down, streak = !down, 0
			p.mark(ctx, u, down, err)
		}
		timer.Reset(p.Interval - rand.N(p.Interval/10+1))
	}
}

// check begins a check and waits for its result, at most until the Timeout or ctx's end. The channel is closed when
// the check has returned; a result that nobody waited for is in it before.
func (p *prober) check(ctx context.Context) (chan error, error) {
	p.mu.Lock()
	conf := *p.conf
	p.mu.Unlock()
	conf.TLS = conf.TLS.Clone() // nil if it is
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	result := make(chan error, 1)
	go p.runCheck(ctx, conf, result)
	var err error
	select {
	case err = <-result:
		<-result // it has returned, and the channel is closed next: the next check need not wait, however soon
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("no result within %v", p.Timeout)
	}
	return result, err
}

// runCheck sends what Check returns, whatever Check does.
func (c *checker) runCheck(ctx context.Context, u Upstream, result chan<- error) {
	err := errors.New("the check called runtime.Goexit")
	defer close(result)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			c.app.logPanic("the health check of "+u.Addr, p, string(debug.Stack()))
		}
		result <- err
	}()
	err = c.Check(ctx, u)
}

// mark lets the balancer know that u was found down, or up again, and logs it, unless u has been removed.
func (p *prober) mark(ctx context.Context, u *upstream, down bool, err error) {
	p.mu.Lock()
	removed := ctx.Err() != nil
	if !removed {
		if down {
			p.app.balancer.markDown(u, err, time.Now())
		} else {
			p.app.balancer.markUp(u, time.Now())
		}
	}
	p.mu.Unlock()
	switch {
	case removed:
	case down:
		p.app.log(slog.LevelWarn, "lbproxy: upstream is down by its health checks",
			slog.String("upstream", p.addr), slog.String("err", err.Error()))
	default:
		p.app.log(slog.LevelInfo, "lbproxy: upstream is up again by its health checks",
			slog.String("upstream", p.addr))
	}
}

// dial is the default Check.
func (c *checker) dial(ctx context.Context, u Upstream) error {
	conn, err := u.dial(ctx, c.app.opts.DialContext, nil)
	if err == nil {
		conn.Close()
	}
	return err
}
