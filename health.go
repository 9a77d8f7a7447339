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

// A HealthCheck makes an app check all its upstreams, over and over. An upstream that fails Fall
// checks in a row is down: it gets no connection, even if there is no other upstream, until it
// passes Rise checks in a row. Dials to it that are in progress are given up at once for the next
// upstream; its open connections go on, unless [Options].CloseOnDown is set. An upstream that is up
// again gets at most every second connection for as long as its load is the lowest. When no upstream
// is up, clients get [ErrNoUpstream].
//
// An upstream counts as up until its checks fail, so that service begins at once; its first check
// comes within an Interval. Dials still count: an upstream whose dial failed is skipped for
// [Options].FailTimeout although its checks pass. An upstream that is down is not dialed at all.
//
// A client waits for an unresponsive upstream for at most the lesser of [Options].DialTimeout and
// Fall × (Interval + Timeout); then the next one is tried.
//
// The checks of an upstream go on over [LBProxyApp.SetUpstreams] while its Addr stays. When it is
// removed they stop, and the check in progress is canceled.
//
// The zero HealthCheck is a TCP or TLS dial every 5 seconds.
type HealthCheck struct {
	// Interval is the time from the end of an upstream's check to its next one, less up to a tenth
	// at random, so that checks do not fall into step. 0 means 5 seconds.
	Interval time.Duration

	// Timeout bounds each check: one that has no result by then has failed. 0 means 2 seconds.
	Timeout time.Duration

	// Rise is how many checks in a row a down upstream has to pass to be up. 0 means 2.
	Rise int

	// Fall is how many checks in a row an upstream has to fail to be down. 0 means 3.
	Fall int

	// Check checks u, its own copy with the defaults filled in. A nil error means that u is well.
	// Check must be safe for concurrent use: different upstreams are checked at the same time, but
	// each by one call at a time. It should return when ctx ends: at the Timeout, when u is removed,
	// and when the app is closed. As long as it does not return, each further check of u that
	// becomes due counts as failed. Shutdown and Close wait for Check, so it must not call them. A
	// panic is logged and counts as failed. context.Canceled, and an error that is the proxy's own,
	// such as having run out of descriptors, count neither way.
	//
	// A nil Check dials with Options.DialContext, in a context without a Conn, performs a TLS
	// handshake if u.TLS is set, and closes. (A TLS 1.3 server that rejects the proxy's certificate
	// still completes the handshake.) A Check of your own may start with [Upstream.Dial], which
	// does the same through a zero net.Dialer; the example of HealthCheck checks web servers.
	Check func(ctx context.Context, u Upstream) error
}

// complete returns hc with its defaults filled in, or the problem with it.
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

// A checker runs an app's health checks. Each upstream has a prober with a goroutine of its own, so
// that no upstream waits for another. That goroutine only waits, on a small stack (a prober takes
// about 6 KiB in all); each check gets a goroutine, whose stack goes when the check is over.
type checker struct {
	HealthCheck // complete
	app         *LBProxyApp

	// mu guards what follows. It is not held while a hook runs. balancer.mu may be taken under it,
	// but not the other way round.
	mu      sync.Mutex
	probers map[string]*prober // by Addr
	stopped bool               // no more probers are started
	ended   chan struct{}      // closed when stopped is set and there are no probers
}

// A prober checks one upstream. It stays in checker.probers until its goroutine ends, so that an
// Addr that is removed and added again meanwhile does not get a second prober.
type prober struct {
	*checker
	addr string

	// checker.mu guards these; SetUpstreams replaces them.
	conf     *Upstream
	upstream *upstream
	ctx      context.Context // ends when the upstream is removed, under checker.mu, or with the app
	cancel   context.CancelFunc
}

func newChecker(a *LBProxyApp, hc HealthCheck) *checker {
	a.balancer.checked = true
	c := &checker{
		HealthCheck: hc, app: a, probers: map[string]*prober{}, ended: make(chan struct{}),
	}
	if c.Check == nil {
		c.Check = c.dial
	}
	return c
}

// set makes confs the balancer's current set, and checks its upstreams and no others.
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
		if !found || p.ctx.Err() != nil { // new, or removed before and still in its last check
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

// stop starts no more probers; ended is closed when the last one exits. The app's context must have
// been canceled.
func (c *checker) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped {
		c.stopped = true
		c.closeIfEnded()
	}
}

// closeIfEnded closes ended if no prober is left and none will come. The caller holds c.mu.
func (c *checker) closeIfEnded() {
	if c.stopped && len(c.probers) == 0 {
		close(c.ended)
	}
}

// run checks the upstream until it is removed. If it has been added again by then, run starts over.
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

// watch checks u until ctx ends. It returns after the last check has.
func (p *prober) watch(ctx context.Context, u *upstream) {
	isDown, streak := false, 0 // streak: the checks in a row that contradict isDown
	check := make(chan error)
	close(check) // none is in progress
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
		case <-check: // closed or about to be; a result that came after its Timeout is dropped
			check, err = p.check(ctx)
		default:
			err = errors.New("the previous check has not returned yet")
		}
		switch {
		case err != nil && ourFault(err): // says nothing about the upstream
		case (err != nil) == isDown:
			streak = 0
		default:
			streak++
		}
		if isDown && streak == p.Rise || !isDown && streak == p.Fall {
			isDown, streak = !isDown, 0
			p.mark(ctx, u, isDown, err)
		}
		timer.Reset(p.Interval - rand.N(p.Interval/10+1))
	}
}

// check starts a check and waits for its result, until the Timeout or the end of ctx. The channel
// is closed when the check has returned; before that it gets a result that came too late.
func (p *prober) check(ctx context.Context) (chan error, error) {
	p.mu.Lock()
	conf := *p.conf
	p.mu.Unlock()
	conf.TLS = conf.TLS.Clone() // nil stays nil
	ctx, cancel := context.WithTimeout(ctx, p.Timeout)
	defer cancel()
	result := make(chan error, 1)
	go p.runCheck(ctx, conf, result)
	var err error
	select {
	case err = <-result:
		<-result // until it is closed, or the next check, if due at once, would find this one running
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("no result within %v", p.Timeout)
	}
	return result, err
}

// runCheck calls Check, sends its result and closes the channel, also after a panic or a Goexit.
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

// mark tells the balancer that u is down because of err, or up again, and logs it. It does nothing
// if u has been removed.
func (p *prober) mark(ctx context.Context, u *upstream, isDown bool, err error) {
	p.mu.Lock()
	removed := ctx.Err() != nil
	switch {
	case removed:
	case isDown:
		p.app.balancer.markDown(u, err, time.Now())
	default:
		p.app.balancer.markUp(u, time.Now())
	}
	p.mu.Unlock()
	switch {
	case removed:
	case isDown:
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
