package lbproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
)

// What ended a connection, or kept it from being served. They are found in [Result.Err] and in what functions
// return with errors.Is.
var (
	ErrRateLimited = errors.New("lbproxy: rate limit exceeded")
	ErrNoUpstream  = errors.New("lbproxy: no upstream available") // every one is at its MaxConns, or down
	ErrIdleTimeout = errors.New("lbproxy: idle timeout")
	ErrAppClosed   = errors.New("lbproxy: app closed")
)

// A DialError is a failed attempt to reach an upstream. Where several were tried, [Result.Err] joins one for each.
type DialError struct {
	App, Addr string
	Err       error
}

func (e *DialError) Error() string {
	return fmt.Sprintf("lbproxy: app %q: upstream %s: %v", e.App, e.Addr, e.Err)
}

func (e *DialError) Unwrap() error { return e.Err }

// An Upstream is a server that connections are forwarded to.
type Upstream struct {
	// Addr is "host:port". It is what an upstream is known by, unique within an app. A host name is resolved at
	// each dial.
	Addr string

	// Weight is its capacity relative to the others, at most a million; 0 means 1.
	Weight int

	// MaxConns is the most connections it gets at once, dials included; a full one is passed over. 0 means no bound.
	MaxConns int

	// Drain keeps new connections from it. Its open ones go on; it is still checked, counted and
	// shown. When all upstreams drain or cannot take a connection, clients get ErrNoUpstream.
	Drain bool

	// TLS, if set, has TLS spoken to the upstream; its Certificates prove the proxy to it. If ServerName is empty
	// it is taken from Addr, as in tls.Dial. A stream that the upstream ends without saying so in TLS (close_notify)
	// counts as cut. nil means plain TCP.
	TLS *tls.Config
}

// Options change how an app works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// DialContext dials an upstream. It must return when ctx ends. network is "tcp", addr the upstream's Addr. ctx has
	// the values of the session's, by which a function can learn for whom it dials. It may return any connection, such as
	// one to a Unix socket that it knows by Addr; its methods count as those of Conn.Client do. nil means that of a
	// zero net.Dialer.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)

	// DialTimeout bounds each attempt to reach an upstream, TLS handshake included. 0 means 5 seconds.
	DialTimeout time.Duration

	// IdleTimeout ends a session in which no bytes moved either way for so long. It is also what bounds a session
	// of which one side has ended and the other does not. 0 means 1 hour, negative means never.
	IdleTimeout time.Duration

	// FailTimeout is how long an upstream is passed over after a failed dial. Then one connection tries it, while
	// the others go on passing it over until that is decided. 0 means 10 seconds, negative means not at all.
	FailTimeout time.Duration

	// HealthCheck has upstreams checked while nobody is connecting, too. An app that has it must be closed, by
	// Shutdown or Close, for its checks begin with New. nil means no checks: an upstream is judged by its dials.
	HealthCheck *HealthCheck

	// OnUpstream is called for every change of an upstream, also of the set that SetUpstreams gives;
	// not for the upstreams that New is given. One goroutine for the app calls it, in the order of
	// the changes. While it runs, changes of one upstream are merged into the newest, so that at
	// most one for each waits. It may block, and call the app: nothing waits for it, neither
	// Shutdown nor Close. A panic is logged. nil means no call.
	OnUpstream func(UpstreamChange)

	// CloseOnDown resets an upstream's connections when health checks find it down. Their
	// Result.End is EndUpstreamError. By default they go on for as long as they can.
	CloseOnDown bool

	// MaxConns is the most connections that Serve holds at once, those not yet admitted included. At that number
	// it accepts no more until one ends, but for one that each listener may have in hand; clients wait in the
	// listener's queue, and that somebody else has closed the listener is noticed only then. 0 means no bound.
	MaxConns int

	// Logger gets a line from Serve for each connection, at level Warn if the trouble was on the upstream's side and
	// else at Debug, and a line for each upstream that begins or ceases to be passed over, or is found down or up by
	// its health checks. nil means slog.Default().
	Logger *slog.Logger

	// OnDone is called once for every connection that ServeConn was given, directly or by Serve, in the connection's
	// goroutine, when everything about it is over and out of all counts, which is a little after the client sees
	// its end. Shutdown and Close wait for it, so it must not call them. What admit refused was never given to ServeConn.
	OnDone func(Result)
}

// An LBProxyApp spreads the connections of one application over its upstreams. All methods are safe for
// concurrent use.
type LBProxyApp struct {
	id       string
	opts     Options // with the defaults filled in
	balancer balancer
	checker  *checker // nil: no health checks
	crew     crew
	pipes    pipePool
	slots    chan struct{}   // one element for each connection that Serve holds; nil: no bound
	ctx      context.Context // ends with ErrAppClosed when connections are to be broken
	cancel   context.CancelCauseFunc
	stopping chan struct{} // closed when stopped is set
	drained  chan struct{} // closed when stopped is set and active is 0

	mu        sync.Mutex
	stopped   bool // no Serve and no connection is counted in any more
	active    int  // calls of Serve and of checkIdle, and connections until OnDone has returned
	listeners map[*closeOnce]struct{}
	sessions  map[*session]struct{} // the connections that are open; those of which all is over but OnDone are not
	idle      *time.Timer           // runs checkIdle; nil if there has been nothing to check

	accepted, refused, failed uint64
}

// New returns an app that spreads connections over upstreams. The id names it in events, results, errors and
// logs. It fails, saying which value is wrong, if the id is empty or an upstream or option is not valid.
// The slice and the options are copied, the HealthCheck included.
//
// An app holds nothing that has to be closed until it is given a connection or a listener, unless it has a
// HealthCheck: then the checks have begun when New returns, and end with Shutdown or Close.
func New(id string, upstreams []Upstream, opts *Options) (*LBProxyApp, error) {
	if id == "" {
		return nil, errors.New("lbproxy: the app's id is empty: give it a name")
	}
	a := &LBProxyApp{
		id:        id,
		stopping:  make(chan struct{}),
		drained:   make(chan struct{}),
		listeners: map[*closeOnce]struct{}{},
		sessions:  map[*session]struct{}{},
	}
	if opts != nil {
		a.opts = *opts
	}
	o := &a.opts
	if o.DialTimeout < 0 {
		return nil, fmt.Errorf("lbproxy: app %q: Options.DialTimeout %v is negative: use 0 for the default of 5s", id, o.DialTimeout)
	}
	if o.MaxConns < 0 {
		return nil, fmt.Errorf("lbproxy: app %q: Options.MaxConns %d is negative: use 0 for no bound", id, o.MaxConns)
	}
	if o.DialContext == nil {
		o.DialContext = new(net.Dialer).DialContext
	}
	o.DialTimeout = orDefault(o.DialTimeout, 5*time.Second)
	o.IdleTimeout = orDefault(o.IdleTimeout, time.Hour)
	a.balancer.failTimeout = orDefault(o.FailTimeout, 10*time.Second)
	if o.MaxConns > 0 {
		a.slots = make(chan struct{}, o.MaxConns)
	}
	a.ctx, a.cancel = context.WithCancelCause(context.Background())
	a.crew = crew{tasks: make(chan *task), over: a.drained}
	if o.HealthCheck != nil {
		hc, wrong := o.HealthCheck.complete()
		if wrong != "" {
			return nil, fmt.Errorf("lbproxy: app %q: Options.HealthCheck.%s", id, wrong)
		}
		a.checker = newChecker(a, hc)
	}
	a.balancer.changes = newChanges(a)
	if err := a.SetUpstreams(upstreams); err != nil { // the last thing, as it begins the checks
		return nil, err
	}
	return a, nil
}

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

// SetUpstreams replaces the upstreams. One whose Addr stays keeps its connections, counters and state, and what else is
// new about it holds from the next connection on; one that is removed gets no new connections, and those it has go on to
// their end. If any upstream is not valid nothing changes. The slice is copied.
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

// check returns Addr's host, or what is wrong with u.
func (u *Upstream) check() (host, wrong string) {
	const maxWeight = 1_000_000 // (open+1)*weight must not overflow
	host, port, err := net.SplitHostPort(u.Addr)
	var addrErr *net.AddrError
	switch {
	case errors.As(err, &addrErr):
		return "", addrErr.Err + ": want host:port"
	case host == "":
		return "", "missing host: want host:port"
	case strings.ContainsFunc(host, unicode.IsSpace):
		return "", "a space in the host: want host:port"
	case strings.ContainsRune(host, '/'), strings.ContainsFunc(host, unicode.IsControl):
		return "", "a slash or a control character in the host: want host:port"
	case u.Weight < 0 || u.Weight > maxWeight:
		return "", fmt.Sprintf("Weight %d: want 0 (which means 1) to %d", u.Weight, maxWeight)
	case u.MaxConns < 0:
		return "", fmt.Sprintf("MaxConns %d is negative: use 0 for no bound", u.MaxConns)
	}
	if n, err := net.LookupPort("tcp", port); err != nil || n == 0 || port[0] == '+' { // which it takes
		return "", fmt.Sprintf("port %q: want 1 to 65535 or the name of a service", port)
	}
	return host, ""
}

// An AdmitFunc decides whether and how c is served: handshake, authentication, authorization, limits. It may block; its
// goroutine is for this connection, but will be used for others when it has returned. The Conn it returns is served; a
// nil Client in it means c. An error refuses c, which is then reset, when what was written to it has arrived or a second
// is over. (Arrived at the client's system: a client whose dial has not returned by then may see only that fail. Who has
// something to say reads from c first.) A deadline that is left on c goes on to count. The context it returns governs the
// session: when it ends, so does the session, and its cause becomes [Result.Err]. nil means the one it was given, which
// ends when the app is closed, as does c.
type AdmitFunc func(ctx context.Context, c net.Conn) (context.Context, Conn, error)

// Listen returns a listener on addr, a "host:port", for Serve. Any other listener will do, too. This one is for plain TCP,
// not MPTCP, and on Linux its connections inherit the keep-alive that net gives to each (after 15 s of silence, and lost when
// 9 probes, 15 s apart, are not answered), which spares each of them four system calls.
func Listen(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // what is known here of splicing and resets is known of TCP
	inheritKeepAlive(&lc)
	return lc.Listen(context.Background(), "tcp", addr)
}

// Serve accepts connections from l and serves each in a goroutine of its own, asking admit first. A nil admit
// admits everyone, unlimited. Serve always closes l and returns a non-nil error: [ErrAppClosed] after Shutdown or
// Close, else what closed the listener (net.ErrClosed). Any other error of l, such as having run out of
// descriptors, is taken to pass: Serve logs it, waits 5 ms to 1 s, and accepts again. A panic in a connection's
// goroutine is logged and ends only that connection.
//
// A listener of crypto/tls leaves the handshake to the relay: by then an upstream has been dialled, and a client that
// says nothing is held until Options.IdleTimeout. It is better made in admit, with a deadline, as in [TLSServer]'s example.
//
// Serve may be called for several listeners. It returns while connections may still be open; Shutdown and Close
// wait for them.
func (a *LBProxyApp) Serve(l net.Listener, admit AdmitFunc) error {
	if l == nil {
		return fmt.Errorf("lbproxy: app %q: Serve: the listener is nil", a.id)
	}
	once := &closeOnce{Listener: l}
	if !a.listen(once) {
		once.Close()
		return ErrAppClosed
	}
	defer a.unlisten(once)
	defer once.Close()
	retry := acceptRetry{app: a}
	for {
		if !a.takeSlot() {
			return ErrAppClosed
		}
		a.freeSlot() // there was one: what another listener waits for is not kept while this one has nothing
		c, err := l.Accept()
		if c == nil && err == nil {
			err = errors.New("the listener returned neither a conn nor an error")
		}
		if err == nil {
			retry.delay = 0
			var s *session
			if a.takeSlot() {
				s = newSession(a, Conn{Client: c})
				s.accepted = true
			}
			if s == nil || !a.enter(s) {
				discard(c)
				return ErrAppClosed
			}
			go s.handle(admit)
			continue
		}
		if a.isStopping() {
			return ErrAppClosed
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("lbproxy: app %q: accept: %w", a.id, err)
		}
		if !retry.wait(err) {
			return ErrAppClosed
		}
	}
}

// takeSlot waits until there may be another connection, or returns false if the app is stopping.
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

// An acceptRetry is what Serve does when accepting fails.
type acceptRetry struct {
	app    *LBProxyApp
	delay  time.Duration
	logged time.Time
	errors int // since logged
}

// wait returns when it is time to accept again, or false if the app is stopping.
func (r *acceptRetry) wait(err error) bool {
	r.delay = min(max(2*r.delay, 5*time.Millisecond), time.Second)
	r.errors++
	if now := time.Now(); r.logged.IsZero() || now.Sub(r.logged) >= time.Second {
		r.app.log().Error("lbproxy: cannot accept connections, trying again", "app", r.app.id, "err", err, "errors", r.errors)
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

// handle owns a connection that Serve accepted.
func (s *session) handle(admit AdmitFunc) {
	defer s.app.freeSlot()
	defer s.app.leave()
	defer s.logPanic()
	defer s.conn.Client.Close() // this one, which admit may wrap
	ctx := s.app.ctx
	if admit != nil {
		s.deeply(func() { ctx = s.admit(admit) })
	}
	if ctx != nil {
		s.serve(ctx)
		s.log(ctx)
	}
}

// logPanic is deferred.
func (s *session) logPanic() {
	if p := recover(); p != nil {
		defer func() { _ = recover() }() // the logger may be what panics
		s.app.log().Error("lbproxy: panic serving a connection", "app", s.app.id, "panic", p, "stack", string(debug.Stack()))
	}
}

// admit asks f, and returns the context of the session. If f does not let the connection in, it is taken out of the
// counts again, and there is none.
func (s *session) admit(f AdmitFunc) context.Context {
	accepted, admitted := s.conn.Client, false
	defer func() {
		if !admitted {
			s.up.ended = true // there is no pump, but what admit wrote, such as a TLS alert
			s.up.dst = accepted
			s.deliverThenReset(&s.up, false)
			s.hanging.Wait()
			s.app.exit(s, true, false)
		}
	}()
	ctx, conn, err := f(s.app.ctx, accepted)
	if err != nil {
		s.app.log().Debug("lbproxy: connection not admitted", "app", s.app.id, "client", remoteAddr(accepted), "err", err)
		return nil
	}
	if conn.Client == nil {
		conn.Client = accepted
	}
	s.mu.Lock()
	s.conn = conn
	over := s.end != ""
	s.mu.Unlock()
	if over { // before conn.Client was known
		reset(conn.Client)
	}
	admitted = true
	return cmp.Or(ctx, s.app.ctx)
}

// deeply calls f where there is stack to spare, which is not what this session will wait on: see crew.
func (s *session) deeply(f func()) {
	if s.accepted {
		s.app.crew.do(f)
	} else {
		f()
	}
}

// Stats is what an app has done and is doing.
type Stats struct {
	App      string
	Open     int    // connections now, those not yet admitted included
	Accepted uint64 // connections that Serve accepted or ServeConn was given, before the app was stopped
	Refused  uint64 // of those: not admitted, or over a rate limit when they opened
	Failed   uint64 // of those: let in, but no upstream could be reached

	// Upstreams are the current ones in slice order, then the removed ones that still serve.
	Upstreams []UpstreamStats
}

// UpstreamStats is what an upstream has done and is doing.
type UpstreamStats struct {
	Addr           string
	Weight         int
	Open           int    // connections now, dials included
	Total          uint64 // connections it was chosen for
	Failed         uint64 // of those: dials that failed for a reason that is the upstream's
	Sent, Received uint64 // bytes to and from it

	State   UpstreamState
	Since   time.Time // when State began
	Err     error     // why it is cooling or down: of the last dial or check; nil if it is up
	Drain   bool      // as configured
	Removed bool      // from the set; it goes when its connections have ended
}

// Stats returns a consistent snapshot: the upstreams never have more connections open than the app. It is cheap
// enough to be called every second.
func (a *LBProxyApp) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Stats{
		App: a.id, Open: len(a.sessions), Accepted: a.accepted, Refused: a.refused, Failed: a.failed,
		Upstreams: a.balancer.stats(),
	}
}

// Shutdown stops accepting, closes the listeners, and waits until every connection has ended; then it ends the health
// checks, and waits for those in progress. If ctx ends first it returns ctx's error and leaves connections open: call
// Close to break them.
func (a *LBProxyApp) Shutdown(ctx context.Context) error {
	a.stop()
	if err := await(ctx, a.drained); err != nil {
		return err
	}
	a.cancel(ErrAppClosed)
	a.crew.hands.Wait()
	a.pipes.close()
	if a.checker == nil {
		return nil
	}
	a.checker.stop()
	return await(ctx, a.checker.ended)
}

// await returns nil when done is closed. If ctx ends first it returns its error.
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

// Close stops accepting, closes the listeners, breaks every connection and health check without waiting for any peer,
// and returns when all their goroutines have ended. It waits for hooks that are running, and while the system throws away
// what it has queued: for hundreds of sockets with megabytes each that takes some tenths of a second. It returns nil.
func (a *LBProxyApp) Close() error {
	a.stop()
	a.cancel(ErrAppClosed)
	var breaking sync.WaitGroup
	for _, s := range a.open() {
		breaking.Go(func() { s.cut(a.ctx) })
	}
	breaking.Wait()
	return a.Shutdown(context.Background())
}

// stop makes a take nothing more.
func (a *LBProxyApp) stop() {
	a.mu.Lock()
	if !a.stopped {
		a.stopped = true
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

// listen counts a call of Serve in, or returns false if the app is stopped.
func (a *LBProxyApp) listen(l *closeOnce) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopped {
		return false
	}
	a.active++
	a.listeners[l] = struct{}{}
	return true
}

func (a *LBProxyApp) unlisten(l *closeOnce) {
	a.mu.Lock()
	delete(a.listeners, l)
	a.mu.Unlock()
	a.leave()
}

// enter counts a connection in, or returns false if the app is stopped. The caller owes one exit and one leave.
func (a *LBProxyApp) enter(s *session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopped {
		return false
	}
	a.active++
	a.sessions[s] = struct{}{}
	a.accepted++
	if d := a.opts.IdleTimeout; d > 0 && a.idle == nil {
		a.idle = time.AfterFunc(d/4, a.checkIdle)
	}
	return true
}

// exit takes a connection out of those open.
func (a *LBProxyApp) exit(s *session, refused, failed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.sessions, s)
	if refused {
		a.refused++
	}
	if failed {
		a.failed++
	}
}

// leave takes a connection or a call of Serve out of what Shutdown waits for.
func (a *LBProxyApp) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.active--
	a.drain()
}

// drain notes that nothing is left, if that is so. The caller holds mu.
func (a *LBProxyApp) drain() {
	if a.stopped && a.active == 0 {
		close(a.drained)
		if a.idle != nil {
			a.idle.Stop()
		}
	}
}

// open returns the connections that are.
func (a *LBProxyApp) open() []*session {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Keys(a.sessions))
}

// checkIdle ends the sessions that have been idle for too long, and has itself run again when the next may be. One
// timer does for all; it takes at most a fifth of one processor, or as little as one look each second takes.
func (a *LBProxyApp) checkIdle() {
	a.mu.Lock()
	if len(a.sessions) == 0 {
		a.idle = nil
		a.mu.Unlock()
		return
	}
	a.active++
	a.mu.Unlock()
	defer a.leave()
	var ending sync.WaitGroup
	defer ending.Wait()
	began, next := time.Now(), a.opts.IdleTimeout/4+1
	for _, s := range a.open() {
		if left := s.checkIdle(); left > 0 {
			next = min(next, left)
		} else {
			ending.Go(func() { s.abort(EndIdleTimeout, ErrIdleTimeout) }) // closing somebody's conn may take its time
		}
	}
	next = max(next, min(4*time.Since(began), time.Second), 100*time.Microsecond)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.idle.Reset(next)
}

func (a *LBProxyApp) log() *slog.Logger {
	if a.opts.Logger != nil {
		return a.opts.Logger
	}
	return slog.Default()
}

// log writes the one line that Serve has for each connection.
func (s *session) log(ctx context.Context) {
	level := slog.LevelDebug
	switch s.end {
	case EndNoUpstream, EndDialFailed, EndUpstreamError:
		level = slog.LevelWarn
	}
	if log := s.app.log(); log.Enabled(ctx, level) {
		log.LogAttrs(ctx, level, "lbproxy: connection ended", s.result.attrs()...)
	}
}

// A crew does what needs a deep stack, such as dialling, on goroutines that are kept for a while. A session's own
// goroutine waits for bytes most of its life and would keep that stack, 6 KiB more of it; and growing one for each took
// 3 % of a short connection's time. There are as many as there were tasks at once in the last second or so.
type crew struct {
	tasks chan *task
	hands sync.WaitGroup
	over  <-chan struct{} // closed when there will be no more tasks
}

type task struct {
	f        func()
	done     sync.WaitGroup
	returned bool
	panicked any
}

// do calls f, and panics or exits the goroutine as f does.
func (c *crew) do(f func()) {
	t := &task{f: f}
	t.done.Add(1)
	select {
	case c.tasks <- t:
	default:
		c.hands.Go(func() { c.work(t) })
	}
	t.done.Wait()
	switch {
	case t.panicked != nil:
		panic(t.panicked)
	case !t.returned:
		runtime.Goexit()
	}
}

// work does t and what else there is, until there has been nothing for a second.
func (c *crew) work(t *task) {
	idle := time.NewTimer(time.Second)
	defer idle.Stop()
	for {
		t.run()
		idle.Reset(time.Second)
		select {
		case t = <-c.tasks:
		case <-idle.C:
			return
		case <-c.over:
			return
		}
	}
}

func (t *task) run() {
	defer t.done.Done()
	defer func() {
		if p := recover(); p != nil {
			t.panicked = withStack(p)
		}
	}()
	t.f()
	t.returned = true
}

// withStack is a panic's value with what shows where it was, for the panic to go on in another goroutine.
func withStack(p any) any {
	if err, ok := p.(error); ok {
		return fmt.Errorf("%w\n\n%s", err, debug.Stack())
	}
	return fmt.Sprintf("%v\n\n%s", p, debug.Stack())
}

// closeOnce lets Serve and Shutdown close a listener without minding each other.
type closeOnce struct {
	net.Listener
	once sync.Once
}

func (l *closeOnce) Close() (err error) {
	l.once.Do(func() { err = l.Listener.Close() })
	return err
}
