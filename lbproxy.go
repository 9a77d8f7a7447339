package lbproxy

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/internal/loop"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// Errors that end a connection, or keep it from being served. Match them with errors.Is in
// [Result].Err and in returned errors.
var (
	ErrRateLimited = errors.New("lbproxy: rate limit exceeded")
	ErrNoUpstream  = errors.New("lbproxy: no upstream available") // all are full, down or draining
	ErrIdleTimeout = errors.New("lbproxy: idle timeout")
	ErrAppClosed   = errors.New("lbproxy: app closed")
	ErrConnUsed    = errors.New("lbproxy: Conn has been served before: make a new one")
)

// A DialError is a failed attempt to reach an upstream. If several were tried, [Result].Err joins
// one for each.
type DialError struct {
	App, Addr string
	Err       error
}

func (e *DialError) Error() string {
	return fmt.Sprintf("lbproxy: app %q: upstream %s: %v", e.App, e.Addr, e.Err)
}

func (e *DialError) Unwrap() error { return e.Err }

// Options change how an app works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// DialContext dials an upstream. It must return when ctx ends. network is "tcp", addr the
	// upstream's Addr. [ConnFromContext] returns the connection it dials for. It may return any
	// connection, such as one to a Unix socket that Addr stands for; the app uses it like
	// Conn.Client. nil means a net.Dialer.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)

	// DialTimeout bounds each attempt to reach an upstream, PROXY header and TLS handshake
	// included. 0 means 5 seconds.
	DialTimeout time.Duration

	// IdleTimeout ends a connection in which no bytes moved in either direction for so long. It is
	// the only bound on a connection of which one side has ended its stream and the other has
	// not. 0 means 1 hour, negative means never.
	IdleTimeout time.Duration

	// FailTimeout is how long an upstream is skipped after a failed dial, unless every upstream has
	// failed. When FailTimeout has passed, one connection probes it; others keep skipping it until
	// the probe succeeds. 0 means 10 seconds, negative means that it is not skipped.
	FailTimeout time.Duration

	// HealthCheck makes the app check its upstreams all the time. Such an app must be closed, by
	// Shutdown or Close, because the checks begin with New. nil means no checks: an upstream is
	// judged by its dials.
	HealthCheck *HealthCheck

	// OnUpstream is called for every change of an upstream. Upstreams that SetUpstreams adds or
	// removes are changes; those given to New are not. One goroutine of the app calls it, in the
	// order of the changes. While it runs, changes of one upstream are merged into the newest, so
	// that at most one for each waits. It may block, and call the app: nothing waits for it,
	// neither Shutdown nor Close. A panic is logged. nil means no call.
	OnUpstream func(UpstreamChange)

	// CloseOnDown resets an upstream's connections when health checks find it down. Their
	// Result.End is EndUpstreamError. By default they go on for as long as they can.
	CloseOnDown bool

	// MaxConns is the most connections that Serve holds at once, those not yet admitted included.
	// At the limit Serve stops accepting until one ends, and clients wait in the listen queue;
	// each listener may have accepted one more. 0 means no bound.
	MaxConns int

	// Loops makes Serve run plain TCP on event loops: at most one for each processor (GOMAXPROCS),
	// as few as keep up. A short connection then takes about two thirds of the CPU, an idle one
	// a ninth of the memory. An AdmitFunc and the RateLimit's EventOpen run on a goroutine, which
	// costs some of the gain. A connection stays on goroutines if its Client is not a *net.TCPConn
	// when admit returns, if its RateLimit asks a manager that is not this package's own, if the
	// upstream has TLS, or with Options.DialContext. Large transfers leave their loop for
	// goroutines. Loops are experimental: docs/engine.md lists what differs. They exist on Linux;
	// elsewhere the field is ignored.
	Loops bool

	// Logger gets a line from Serve for each connection, at level Warn if the upstream's side was
	// the cause and at Debug otherwise, and a line for each upstream that fails, recovers, or is
	// found down or up by health checks. Lines are written by a goroutine of their own, so a
	// Handler that blocks holds nothing up (its Enabled must not block): 4,096 lines wait, more
	// are dropped and counted in a line of their own. Shutdown and Close wait 100 ms at most for
	// lines to be written. nil means slog.Default().
	Logger *slog.Logger

	// OnDone is called once for every connection that was accepted, or given to ServeConn, when it
	// is over and out of all counts; that is a little after the client sees its end. It runs on the
	// connection's last goroutine. If it blocks, each connection that ends holds a goroutine,
	// without bound. Shutdown and Close wait for it, so it must not call them; they do not wait for
	// the OnDone of a ServeConn that began after the app was stopped. It is the place for an access
	// log; see [Result.LogValue].
	OnDone func(Result)
}

// An LBProxyApp spreads the connections of one application over its upstreams. [New] makes one; the
// zero value is not usable. All methods are safe for concurrent use.
type LBProxyApp struct {
	id       string
	opts     Options // with the defaults filled in
	balancer balancer
	checker  *checker // nil: no health checks
	engine   *relay.Engine
	loops    loops // those of Options.Loops
	lines    *logqueue.Lines
	slots    chan struct{}   // holds an element for each connection of Serve; nil: no bound
	ctx      context.Context // ends with ErrAppClosed when the app has been closed
	cancel   context.CancelCauseFunc
	stopping chan struct{} // closed under mu: no Serve and no connection is counted any more
	drained  chan struct{} // closed when stopping is, and active is 0
	ended    func()        // closes what connections shared, once

	mu        sync.Mutex // held over no I/O, hook or foreign method
	active    int        // calls of Serve, and connections until OnDone has returned
	listeners map[*closeOnce]struct{}
	sessions  list.List             // of *session, those open, oldest first; and the markers of walks
	open      int                   // sessions in it
	lastWords map[*session]struct{} // those whose OnRefused runs
	ends      map[EndReason]uint64
	refused   uint64 // of the rate-limited: when they opened
}

// New returns an app that spreads connections over upstreams. The id names it in events, results,
// errors and logs. New fails, and says which value is wrong, if the id is empty or an upstream or
// an option is not valid. The slice and the options are copied, the HealthCheck included.
//
// An app holds nothing that must be closed until it is given a connection or a listener, unless it
// has a HealthCheck: then the checks have begun when New returns, and end with Shutdown or Close.
func New(id string, upstreams []Upstream, opts *Options) (*LBProxyApp, error) {
	if id == "" {
		return nil, errors.New("lbproxy: the app's id is empty: give it a name")
	}
	a := &LBProxyApp{
		id:        id,
		stopping:  make(chan struct{}),
		drained:   make(chan struct{}),
		listeners: map[*closeOnce]struct{}{},
		lastWords: map[*session]struct{}{},
		ends:      map[EndReason]uint64{},
		lines:     logqueue.NewLines(),
	}
	if opts != nil {
		a.opts = *opts
	}
	o := &a.opts
	if o.DialTimeout < 0 {
		return nil, fmt.Errorf("lbproxy: app %q: Options.DialTimeout %v is negative: "+
			"use 0 for the default of 5s", id, o.DialTimeout)
	}
	if o.MaxConns < 0 {
		return nil, fmt.Errorf("lbproxy: app %q: Options.MaxConns %d is negative: "+
			"use 0 for no bound", id, o.MaxConns)
	}
	plainDialer := o.DialContext == nil
	if plainDialer {
		o.DialContext = (&net.Dialer{KeepAlive: -1}).DialContext // the engine sets it if it is needed
	}
	o.DialTimeout = cmp.Or(o.DialTimeout, 5*time.Second)
	o.IdleTimeout = cmp.Or(o.IdleTimeout, time.Hour)
	a.balancer.failTimeout = cmp.Or(o.FailTimeout, 10*time.Second)
	if o.MaxConns > 0 {
		a.slots = make(chan struct{}, o.MaxConns)
	}
	a.ctx, a.cancel = context.WithCancelCause(context.Background())
	config := relay.Config{
		Idle: o.IdleTimeout, IdleErr: &ending{EndIdleTimeout, ErrIdleTimeout}, KeepAlive: plainDialer,
	}
	a.engine = relay.NewEngine(config)
	a.loops.config, a.loops.wanted = config, o.Loops && plainDialer
	a.ended = sync.OnceFunc(func() {
		a.loops.close()
		a.engine.Close()
	})
	if o.HealthCheck != nil {
		hc, wrong := o.HealthCheck.complete()
		if wrong != "" {
			return nil, fmt.Errorf("lbproxy: app %q: Options.HealthCheck.%s", id, wrong)
		}
		a.checker = newChecker(a, hc)
	}
	if o.OnUpstream != nil {
		a.balancer.changes = &changes{app: a, byAddr: map[string]*list.Element{}}
	}
	if err := a.SetUpstreams(upstreams); err != nil { // the last thing, as it begins the checks
		return nil, err
	}
	return a, nil
}

// SetUpstreams replaces the upstreams. One whose Addr stays keeps its connections, counters and
// state; the rest of its configuration holds from the next connection on. One that is removed gets
// no new connections, and those it has go on to their end; if it is added again before that, it
// keeps them and its counters. If an upstream is not valid, or there is none, nothing changes and
// the error says which and why. The slice is copied. After Close, SetUpstreams has no effect on
// connections.
func (a *LBProxyApp) SetUpstreams(upstreams []Upstream) error {
	if len(upstreams) == 0 {
		return fmt.Errorf("lbproxy: app %q: no upstreams: give at least one", a.id)
	}
	confs := make([]Upstream, len(upstreams))
	place := make(map[string]int, len(upstreams))
	for i, u := range upstreams {
		host, wrong := u.check()
		if first, twice := place[u.Addr]; wrong == "" && twice {
			wrong = fmt.Sprintf("upstream %d has it already: give it once", first)
		}
		if wrong != "" {
			return fmt.Errorf("lbproxy: app %q: upstream %d: Addr %q: %s", a.id, i, u.Addr, wrong)
		}
		place[u.Addr] = i
		u.Weight = max(u.Weight, 1)
		if u.TLS != nil {
			u.TLS = u.TLS.Clone()
			if u.TLS.ServerName == "" {
				u.TLS.ServerName = host
			}
		}
		confs[i] = u
	}
	if a.checker != nil {
		a.checker.set(confs)
	} else {
		a.balancer.set(confs, time.Now())
	}
	return nil
}

// An AdmitFunc decides whether and how c, which Serve has accepted, is served: handshake,
// authentication, authorization, limits. It changes the fields of c as needed; Client is the
// accepted connection. A nil error admits it; any other rejects it: bytes written to Client
// have a second to arrive, then it is reset, and the error is Result.Err with EndNotAdmitted.
//
// ctx carries c (see [ConnFromContext]). It is canceled when the connection ends or is aborted, or
// the app is closed. An AdmitFunc may block, because it has a goroutine of its own. Once it has
// returned, no goroutine of it may change a field of c, or use Client, which Serve replaces then.
//
// Clear any deadline set on Client before returning nil: it may end the connection. To be sure that
// a rejected client sees a message, read from Client before writing it: otherwise the client's
// connect may fail first.
type AdmitFunc func(ctx context.Context, c *Conn) error

// Listen returns a listener on addr, a "host:port", for Serve, which takes any other, too. On Linux
// its connections inherit keep-alive from it, which saves four system calls each: idle 15 s,
// interval 15 s, 9 probes, the defaults of package net. Listen is for plain TCP, not MPTCP.
func Listen(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // splicing and resets are known of TCP alone
	relay.InheritKeepAlive(&lc)
	return lc.Listen(context.Background(), "tcp", addr)
}

// Serve accepts connections from l and serves each on goroutines of its own, asking admit first. A
// nil admit admits everyone, unlimited. Serve always closes l and returns a non-nil error:
// [ErrAppClosed] after Shutdown or Close, else, when somebody else has closed l, an error that
// wraps net.ErrClosed.
// Other errors of l, such as running out of descriptors, are treated as temporary: Serve logs them,
// waits 5 ms to 1 s, and accepts again. A panic in a hook is logged and ends only that connection.
//
// With a crypto/tls listener the handshake happens after an upstream was dialed, without a
// deadline. Use [HandshakeTLS] instead.
//
// Serve may be called for several listeners. It returns while connections may still be open;
// Shutdown and Close wait for them.
func (a *LBProxyApp) Serve(l net.Listener, admit AdmitFunc) error {
	if l == nil {
		return fmt.Errorf("lbproxy: app %q: Serve: the listener is nil", a.id)
	}
	l = a.listenForLoops(l, admit)
	once := &closeOnce{Listener: l}
	if !a.trackListener(once) {
		once.Close()
		return ErrAppClosed
	}
	defer a.untrackListener(once)
	defer once.Close()
	backoff := acceptBackoff{app: a}
	for {
		c, err := l.Accept()
		if c == nil && err == nil {
			err = errors.New("the listener returned neither a conn nor an error")
		}
		switch {
		case err == nil:
			backoff.delay = 0
			if !a.serve(c, admit) {
				return ErrAppClosed
			}
		case a.isStopping():
			return ErrAppClosed
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("lbproxy: app %q: accept: %w", a.id, err)
		case !backoff.wait(err):
			return ErrAppClosed
		}
	}
}

// serve starts to serve an accepted connection, when there is a slot for it. It returns false if
// the app is stopping; then c has been reset.
func (a *LBProxyApp) serve(c net.Conn, admit AdmitFunc) bool {
	if on, ok := c.(*loopConn); ok {
		if a.takeSlot() && a.startOnLoop(on.accepted) {
			return true
		}
		loop.Reset(on.accepted.FD)
		return false
	}
	if a.takeSlot() {
		s := a.begin(context.Background(), &Conn{Client: c})
		s.accepted = true
		if a.enter(s) {
			go s.handle(admit)
			return true
		}
		a.freeSlot()
	}
	defer a.logConnPanic() // of c's methods
	relay.Reset(c)
	return false
}

// takeSlot waits until Serve may hold one more connection. It returns false if the app is stopping.
func (a *LBProxyApp) takeSlot() bool {
	if a.slots == nil {
		return true
	}
	select {
	case a.slots <- struct{}{}:
		return true
	case <-a.stopping:
		return false
	}
}

func (a *LBProxyApp) freeSlot() {
	if a.slots != nil {
		<-a.slots
	}
}

// An acceptBackoff paces Serve while accepting fails.
type acceptBackoff struct {
	app    *LBProxyApp
	delay  time.Duration
	logged time.Time
	errors int // since logged
}

// wait returns when it is time to accept again, or false if the app is stopping.
func (r *acceptBackoff) wait(err error) bool {
	r.delay = min(max(2*r.delay, 5*time.Millisecond), time.Second)
	r.errors++
	if now := time.Now(); r.logged.IsZero() || now.Sub(r.logged) >= time.Second {
		r.app.log(slog.LevelError, "lbproxy: cannot accept connections, trying again",
			slog.String("err", err.Error()), slog.Int("errors", r.errors))
		r.logged, r.errors = now, 0
	}
	t := time.NewTimer(r.delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.app.stopping:
		return false
	}
}

// Shutdown stops accepting, closes the listeners, and waits until every connection has ended; then
// it ends the health checks and waits for those in progress. It also waits for a connection whose
// AdmitFunc has not returned, and serves it if it is admitted.
//
// Shutdown may be called again; after Close it returns nil at once. If ctx ends first, it returns
// ctx's error and leaves the rest to go on: call Close to end it. The error may also mean that a
// health check has not returned. After Close, Stats().Ends[EndClosed] counts the connections that
// Close has reset.
func (a *LBProxyApp) Shutdown(ctx context.Context) error {
	a.stop()
	if err := await(ctx, a.drained); err != nil {
		return err
	}
	a.cancel(ErrAppClosed)
	a.ended()
	a.lines.Flush(100 * time.Millisecond)
	if a.checker == nil {
		return nil
	}
	a.checker.stop()
	return await(ctx, a.checker.ended)
}

// await waits for done. It returns ctx's error if ctx ends first.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		select {
		case <-done: // both: it is done
			return nil
		default:
			return ctx.Err()
		}
	}
}

// Close stops accepting, closes the listeners, resets every connection without waiting for clients
// or upstreams, ends health checks, and returns when the app's goroutines have ended. It waits for
// hooks that are running, and for the system to discard queued bytes: some tenths of a second if
// there are hundreds of sockets with megabytes each. It returns nil, and may be called again.
func (a *LBProxyApp) Close() error {
	a.stop()
	a.cancel(ErrAppClosed)
	var aborts sync.WaitGroup // closing a caller's conn may take its time
	for s := range a.walk() {
		aborts.Go(func() { s.conn.abort(&ending{EndClosed, ErrAppClosed}) })
	}
	a.mu.Lock()
	refused := slices.Collect(maps.Keys(a.lastWords))
	a.mu.Unlock()
	for _, s := range refused {
		aborts.Go(func() {
			defer s.app.logConnPanic()
			relay.Reset(s.client)
		})
	}
	aborts.Wait()
	return a.Shutdown(context.Background())
}

// stop makes the app reject new connections and listeners, and closes its listeners.
func (a *LBProxyApp) stop() {
	a.mu.Lock()
	if !a.isStopping() {
		close(a.stopping)
		a.drain()
	}
	listeners := a.listeners
	a.listeners = nil
	a.mu.Unlock()
	for l := range listeners {
		l.Close()
	}
}

func (a *LBProxyApp) isStopping() bool {
	select {
	case <-a.stopping:
		return true
	default:
		return false
	}
}

// trackListener counts a call of Serve, or returns false if the app is stopping.
func (a *LBProxyApp) trackListener(l *closeOnce) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.isStopping() {
		return false
	}
	a.active++
	a.listeners[l] = struct{}{}
	return true
}

func (a *LBProxyApp) untrackListener(l *closeOnce) {
	a.mu.Lock()
	delete(a.listeners, l)
	a.mu.Unlock()
	a.leave()
}

// enter counts a connection, or returns false if the app is stopping. The caller owes one exit and
// one leave.
func (a *LBProxyApp) enter(s *session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.isStopping() {
		return false
	}
	a.active++
	a.open++
	s.element = a.sessions.PushBack(s)
	return true
}

// exit takes a connection out of those open, and gives back its slot.
func (a *LBProxyApp) exit(s *session) {
	a.mu.Lock()
	a.sessions.Remove(s.element)
	a.open--
	a.ends[s.result.End]++
	if s.result.End == EndRateLimited && !s.opened {
		a.refused++
	}
	a.mu.Unlock()
	if s.accepted {
		a.freeSlot()
	}
}

// leave takes a connection or a call of Serve out of what Shutdown waits for.
func (a *LBProxyApp) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.active--
	a.drain()
}

// drain closes drained if nothing is left. The caller holds mu.
func (a *LBProxyApp) drain() {
	if a.isStopping() && a.active == 0 {
		close(a.drained)
	}
}

// maxLastWords bounds the OnRefused hooks that run at once.
const maxLastWords = 256

// reserveLastWord counts one more OnRefused, to be undone by endLastWord. It returns false if there
// are too many, or the app has been closed.
func (a *LBProxyApp) reserveLastWord(s *session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.lastWords) >= maxLastWords || a.ctx.Err() != nil {
		return false
	}
	a.lastWords[s] = struct{}{}
	return true
}

func (a *LBProxyApp) endLastWord(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.lastWords, s)
}

// logger returns where lines go.
func (a *LBProxyApp) logger() *slog.Logger {
	if a.opts.Logger != nil {
		return a.opts.Logger
	}
	return slog.Default()
}

// log queues a line about the app.
func (a *LBProxyApp) log(level slog.Level, msg string, attrs ...slog.Attr) {
	a.lines.Add(context.Background(), a.logger(), level, msg, func() []slog.Attr {
		return append([]slog.Attr{slog.String("app", a.id)}, attrs...)
	})
}

// logConnPanic logs a panic of a connection's hook, or of a method of its client's conn, and ends it.
// It must be called by defer.
func (a *LBProxyApp) logConnPanic() {
	if p := recover(); p != nil {
		a.logPanic("serving a connection", p, string(debug.Stack()))
	}
}

// logPanic queues a line about a panic in a hook.
func (a *LBProxyApp) logPanic(hook string, p any, stack string) {
	a.log(slog.LevelError, "lbproxy: panic in a hook",
		slog.String("hook", hook), slog.String("panic", fmt.Sprint(p)), slog.String("stack", stack))
}

// closeOnce lets Serve and Shutdown close a listener without regard to each other.
type closeOnce struct {
	net.Listener
	once sync.Once
}

func (l *closeOnce) Close() (err error) {
	l.once.Do(func() { err = l.Listener.Close() })
	return err
}
