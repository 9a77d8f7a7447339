package lbproxy

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"runtime/debug"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxyproto"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// The life of a connection, and the goroutine that drives each part of it:
//
//	            Serve                                   ServeConn
//	              │ accept                                  │
//	          admitting ── refused ──► over                 │        Serve's goroutine for it,
//	              └────────────────┬────────────────────────┘        or ServeConn's caller
//	                           dialing ── limited, no upstream ──► over
//	                               │ connected
//	                             open                                the relay's two goroutines
//	                               │ both streams ended, or the first failure or Abort
//	                             over: counted out, EventClose, Result, OnDone, log
//
// The last part runs where the relay ends, or in ServeConn's caller, which waits for it.

// A Conn is one client connection: what the caller says about it, and a handle on it. It must
// not be copied after first use.
//
// Until admit returns (or ServeConn is called) the fields belong to the caller. From then on they
// are fixed, and anybody may read them. The methods may be called at any time, by anybody.
//
// A Conn that is kept after its end holds no buffer, no descriptor and no upstream.
type Conn struct {
	// Client is the connection to the client. ServeConn requires it. Serve sets it before it
	// calls admit, which may replace it, by TLS for example. Once admitted it belongs to the app,
	// and only LocalAddr, RemoteAddr and, for TLS, ConnectionState may be called: for plain TCP it
	// is then a stub whose other methods fail with net.ErrClosed.
	//
	// Any net.Conn will do. The app looks for three methods. CloseWrite() error passes on the end
	// of the upstream's stream while the client's own goes on. NetConn() net.Conn leads to the
	// connection below a layer such as TLS. SetLinger(int) error, at the bottom, resets. A wrapper
	// around a TCP connection should have the first two: without them its peer may lose the last
	// bytes it was sent, and Result.Err says so. (A net.Pipe has none of them.)
	//
	// crypto/tls reports a client's FIN without close_notify as the end of its stream. Use a
	// [TLSConn], whose Read returns io.ErrUnexpectedEOF then, to have such a stream treated as cut.
	Client net.Conn

	// ClientAddr is who the client is, for limits, logs and PROXY headers. nil means
	// Client.RemoteAddr(). AcceptProxy sets it.
	ClientAddr net.Addr

	// ServerAddr is the address that the client connected to. nil means Client.LocalAddr().
	ServerAddr net.Addr

	// ClientID names the client in events, results, logs and PROXY v2 headers. It may be empty.
	ClientID string

	// Verified says that ClientID was proved, by a certificate for example. PROXY v2 headers
	// tell the upstream.
	Verified bool

	// RateLimit is asked before the connection is served, and told of the bytes that move. It may
	// refuse, cut or slow the connection. nil means no limit.
	RateLimit RateLimitManager

	// Value is the caller's own. The app does not look at it.
	Value any

	// OnRefused may send a last word, such as an HTTP 503, to a client that is over its rate limit
	// when it opens, or for whom there is no upstream. err is Result.Err: it matches
	// ErrRateLimited, ErrNoUpstream or *DialError. OnRefused is not called for a connection that
	// was aborted. nil means that such clients are reset.
	//
	// It runs on a goroutine of its own, when the connection is counted out. Writes to c fail after
	// a second, reads always; a TLS client, whose handshake must have been made, is spoken to in
	// TLS. c is closed when OnRefused has returned and the client has ended its stream, or after
	// another second. At most 256 of them run at once per app; beyond that clients are reset.
	// Shutdown and Close do not wait for it; Close resets its c.
	OnRefused func(c net.Conn, err error)

	// OnDone is called once, when the connection is over and out of all counts, just before
	// Options.OnDone. nil means no call.
	OnDone func(Result)

	mu      sync.Mutex // guards what follows; held over no I/O, hook or foreign method
	used    bool       // Serve or ServeConn has taken it
	session *session   // nil before and after
	cause   *ending    // of an Abort, a Close or a refusal, from before the relay began
	info    ConnInfo   // after the end

	tls *tls.ConnectionState // of Client, until the end; the session's
}

// A ConnInfo is a snapshot of a connection.
type ConnInfo struct {
	Upstream string    // the Addr in use or being dialed; empty before
	Start    time.Time // when it was accepted or given to ServeConn
	Sent     int64     // bytes from the client to the upstream
	Received int64     // bytes from the upstream to the client
	State    ConnState // empty before the connection is accepted or given to ServeConn
}

// A ConnState is how far a connection has come.
type ConnState string

const (
	ConnAdmitting ConnState = "admitting" // admit has not returned yet
	ConnDialing   ConnState = "dialing"   // admitted, not connected to an upstream yet
	ConnOpen      ConnState = "open"      // connected to an upstream
	ConnOver      ConnState = "over"      // its Result is known, or about to be
)

// String returns the state's word.
func (s ConnState) String() string { return string(s) }

// Info returns what is known of c now. After the end it stays as it was.
func (c *Conn) Info() ConnInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.session
	if s == nil {
		return c.info
	}
	info := ConnInfo{Upstream: s.addr, Start: s.start, State: s.state}
	if s.relay != nil {
		info.Sent, info.Received = s.relay.Counts()
	}
	return info
}

// Abort ends c with cause; nil means context.Canceled. Both sides are reset. It may be called any
// number of times; the first cause counts and becomes Result.Err, with EndCanceled. It waits for
// no peer and no hook. During admit it resets the accepted connection and cancels admit's context
// with cause. A Conn that is aborted before ServeConn is not served: ServeConn resets Client and
// returns cause. After the end it does nothing.
func (c *Conn) Abort(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	c.abort(&ending{EndCanceled, cause})
}

func (c *Conn) abort(e *ending) {
	c.mu.Lock()
	s := c.session
	if s != nil && s.relay != nil {
		c.mu.Unlock()
		s.relay.Abort(e)
		return
	}
	if c.cause == nil && (s != nil || !c.used) {
		c.cause = e
	}
	c.mu.Unlock()
	if s != nil { // also after admit has rejected it, while what admit wrote is on its way
		if l, ok := relay.Underlying(s.raw).(interface{ SetLinger(int) error }); ok {
			l.SetLinger(0) // first: a TLS handshake closes it when its context ends
		}
		s.stop(e)
		relay.Reset(s.raw)
	}
}

// decide makes e the cause of an end without a relay, unless there is one, and returns the cause.
func (c *Conn) decide(e *ending) *ending {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause == nil {
		c.cause = e
	}
	return c.cause
}

// An ending is the cause of an abort: an error, and the name for it.
type ending struct {
	end EndReason
	err error
}

func (e *ending) Error() string { return e.err.Error() }
func (e *ending) Unwrap() error { return e.err }

type connKey struct{}

// ConnFromContext returns the connection that ctx belongs to: in an AdmitFunc,
// Options.DialContext and RateLimitManager.Report. It returns nil if there is none, as for a
// health check.
func ConnFromContext(ctx context.Context) *Conn {
	c, _ := ctx.Value(connKey{}).(*Conn)
	return c
}

// clientAddr is the text of the client's address.
func (c *Conn) clientAddr() string {
	a := c.ClientAddr
	if a == nil {
		a = c.Client.RemoteAddr()
	}
	if a == nil {
		return ""
	}
	return a.String()
}

// A Result is what became of one connection.
type Result struct {
	Conn             *Conn
	App, ClientID    string
	Client, Upstream string        // addresses: the client's, and the upstream's Addr (empty if none was reached)
	Attempts         int           // dials tried
	Start            time.Time     // when it was accepted or given to ServeConn
	Duration         time.Duration // since Start, so with Serve the time in admit is in it
	Sent, Received   int64         // bytes client to upstream, upstream to client
	End              EndReason
	Err              error // what ended it; nil for a clean end; the cause of a context or an Abort
}

// LogValue implements slog.LogValuer: slog.Info("done", "conn", result) is an access log.
func (r Result) LogValue() slog.Value { return slog.GroupValue(r.attrs()...) }

func (r *Result) attrs() []slog.Attr {
	attrs := []slog.Attr{
		slog.String("app", r.App), slog.String("end", string(r.End)), slog.String("client", r.Client),
		slog.String("upstream", r.Upstream), slog.Int("attempts", r.Attempts),
		slog.Duration("duration", r.Duration),
		slog.Int64("sent", r.Sent), slog.Int64("received", r.Received),
	}
	if r.ClientID != "" {
		attrs = append(attrs, slog.String("client_id", r.ClientID))
	}
	if r.Err != nil {
		attrs = append(attrs, slog.String("err", r.Err.Error()))
	}
	return attrs
}

// An EndReason says in a word why a connection ended.
type EndReason string

const (
	EndDone          EndReason = "done"           // both sides ended their streams
	EndClientClosed  EndReason = "client-closed"  // the client closed a quiet TLS connection without close_notify
	EndNotAdmitted   EndReason = "not-admitted"   // admit returned an error
	EndRateLimited   EndReason = "rate-limited"   // refused (Attempts is 0) or cut by its RateLimitManager
	EndNoUpstream    EndReason = "no-upstream"    // every upstream is at its MaxConns, down, or draining
	EndDialFailed    EndReason = "dial-failed"    // no upstream that might have served it could be reached
	EndClientError   EndReason = "client-error"   // the client's side failed
	EndUpstreamError EndReason = "upstream-error" // the upstream's side failed
	EndIdleTimeout   EndReason = "idle-timeout"   // no bytes either way for Options.IdleTimeout
	EndCanceled      EndReason = "canceled"       // aborted, its context ended, or a hook panicked
	EndClosed        EndReason = "closed"         // the app was closed
)

var endReasons = []EndReason{
	EndDone, EndClientClosed, EndNotAdmitted, EndRateLimited, EndNoUpstream, EndDialFailed,
	EndClientError, EndUpstreamError, EndIdleTimeout, EndCanceled, EndClosed,
}

// String returns the reason's word.
func (e EndReason) String() string { return string(e) }

var (
	errNilDialed = errors.New("Options.DialContext returned neither a conn nor an error")
	errNoClient  = errors.New("lbproxy: admit left Conn.Client nil")
)

// A session drives one Conn from when it is counted in until its Result is known. Its fields
// belong to one goroutine at a time: Serve's or ServeConn's until Connect, then the relay's, then
// the one that calls finish. What others may look at is guarded by Conn.mu.
type session struct {
	app      *LBProxyApp
	conn     *Conn
	raw      net.Conn // what was accepted; admit may have wrapped it
	accepted bool     // by Serve: it has a slot, and its end is logged
	start    time.Time
	base     context.Context // has the values of the caller's, and the Conn, but does not end
	ctx      context.Context // base, and ends with the session where a hook is there to see it
	element  *list.Element   // of app.sessions; belongs to app.mu

	client   net.Conn  // what is relayed: conn.Client as admit left it
	upstream *upstream // what it is counted on
	unlost   func()    // ends what CloseOnDown waits for; nil: nothing
	opened   bool      // the RateLimit is owed an EventClose
	attempts int
	keep     bool // client outlives the relay, for OnRefused
	outcome  relay.Outcome
	done     chan struct{} // closed by Done where a goroutine waits to finish the session
	result   Result

	relay  *relay.Relay // guarded by conn.mu, like all that follows
	state  ConnState
	addr   string // of the upstream that was dialed last
	isOver bool
	cancel context.CancelCauseFunc // of ctx; nil if that does not end
	undial context.CancelFunc      // ends the dial in progress, or one before; nil before any
}

// begin makes a session of c, or returns nil if c has had one.
func (a *LBProxyApp) begin(ctx context.Context, c *Conn) *session {
	s := &session{app: a, conn: c, raw: c.Client, start: time.Now(), state: ConnAdmitting}
	s.base = context.WithValue(context.WithoutCancel(ctx), connKey{}, c)
	s.ctx = s.base
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used {
		return nil
	}
	c.used, c.session = true, s
	s.isOver = c.cause != nil // aborted before
	return s
}

// endCtx makes ctx end with the session, for hooks. A session that has none is spared the cost.
func (s *session) endCtx() {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.cancel == nil {
		s.ctx, s.cancel = context.WithCancelCause(s.base)
		if c.cause != nil {
			s.cancel(c.cause.err)
		}
	}
}

// stop ends the session's context and its dial, since it is over because of cause.
func (s *session) stop(cause error) {
	if e, ok := cause.(*ending); ok {
		cause = e.err
	}
	s.conn.mu.Lock()
	s.isOver = true
	cancel, undial := s.cancel, s.undial
	s.conn.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	}
	if undial != nil {
		undial()
	}
}

func (s *session) over() bool {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return s.isOver
}

// ServeConn serves one client: it asks c.RateLimit, chooses an upstream, dials it, goes on to the
// next one while that fails, and copies bytes both ways until both sides have ended. It blocks
// until the connection is over and always closes c.Client. The error is Result.Err. A Conn can be
// served once; a second time is [ErrConnUsed], and nothing is touched.
//
// When one side ends its stream, the other is told (CloseWrite) and may go on with its own. When
// a side fails, what was read from it is still delivered, for at most a second, and then the other
// side is reset rather than closed, so that nobody takes a cut stream for a whole one. Clients for
// whom there is no upstream, or that are over their rate limit, are reset unless c.OnRefused is
// set. Unix sockets have no reset; they are closed.
//
// When ctx ends, the connection is aborted with ctx's cause. A panic in a hook is passed on to the
// caller when the connection is closed and out of all counts.
func (a *LBProxyApp) ServeConn(ctx context.Context, c *Conn) (Result, error) {
	if c == nil || isNil(c.Client) {
		err := fmt.Errorf("lbproxy: app %q: ServeConn: Conn.Client is nil", a.id)
		return Result{Conn: c, App: a.id, Start: time.Now(), End: EndClientError, Err: err}, err
	}
	if ctx == nil {
		ctx = context.Background()
	}
	s := a.begin(ctx, c)
	if s == nil {
		return Result{Conn: c, App: a.id, End: EndCanceled, Err: ErrConnUsed}, ErrConnUsed
	}
	if !a.enter(s) {
		relay.Reset(c.Client)
		c.Client.Close()
		s.outcome.Err = &ending{EndClosed, ErrAppClosed}
		s.settle()
		s.report()
		return s.result, s.result.Err
	}
	if ctx.Err() != nil {
		c.abort(&ending{EndCanceled, context.Cause(ctx)})
	} else if ctx.Done() != nil {
		defer after(ctx, func() { c.abort(&ending{EndCanceled, context.Cause(ctx)}) })()
	}
	s.serve(true)
	if p := s.outcome.Panic; p != nil {
		panic(p)
	}
	return s.result, s.result.Err
}

// isNil reports whether c is nil, or an interface that holds a nil pointer.
func isNil(c net.Conn) bool {
	v := reflect.ValueOf(c)
	return !v.IsValid() || v.Kind() == reflect.Pointer && v.IsNil()
}

// isSame reports whether a and b are the same, also when they are of a type that == panics on.
func isSame(a, b net.Conn) bool {
	return a != nil && b != nil && reflect.ValueOf(a).Comparable() && a == b
}

// after calls f when ctx ends, until the function it returns has returned.
func after(ctx context.Context, f func()) (stop func()) {
	done := make(chan struct{})
	stopped := context.AfterFunc(ctx, func() {
		defer close(done)
		f()
	})
	return func() {
		if !stopped() {
			<-done
		}
	}
}

// handle serves a connection that Serve accepted.
func (s *session) handle(admit AdmitFunc) {
	defer s.logPanic()
	if admit == nil || s.admit(admit) {
		s.serve(false)
	}
}

// logPanic logs a panic of the goroutine that serves s. It must be called by defer.
func (s *session) logPanic() {
	if p := recover(); p != nil {
		s.app.logPanic("serving a connection", p, string(debug.Stack()))
	}
}

// admit asks f and reports whether it let the connection in. If not, what f wrote to the client,
// such as a TLS alert, has a second to arrive, and the session is over.
func (s *session) admit(f AdmitFunc) (ok bool) {
	e := &ending{EndCanceled, relay.ErrPanicked} // unless f returns
	defer func() {
		if isNil(s.conn.Client) {
			s.conn.Client = s.raw
			if ok {
				ok, e = false, &ending{EndNotAdmitted, errNoClient}
			}
		}
		if !ok {
			s.outcome.Err = s.conn.decide(e)
			relay.Linger(s.raw, s.ctx.Done())
			s.finish()
		}
	}()
	s.endCtx()
	if err := f(s.ctx, s.conn); err != nil {
		e = &ending{EndNotAdmitted, err}
		return false
	}
	return true
}

// serve asks the RateLimitManager, connects, and starts the relay. It returns when the session is
// over if wait is set, else when the relay has taken over.
func (s *session) serve(wait bool) {
	e := &ending{EndCanceled, relay.ErrPanicked} // unless the hooks return
	defer func() {
		if e != nil {
			s.giveUp(e)
		}
	}()
	s.hold()
	s.setState(ConnDialing, "") // also while the RateLimitManager is asked
	delay, chunk, failed := s.open()
	var server net.Conn
	if failed == nil {
		if failed = s.startRelay(chunk); failed == nil {
			s.pause(delay)
			server, failed = s.connect()
		}
	}
	if failed != nil {
		e = failed
		return
	}
	if wait {
		s.done = make(chan struct{})
	}
	s.relay.Connect(server) // which asks server for the connections below it
	e = nil
	if wait {
		<-s.done
		s.finish()
	}
}

// open asks the RateLimitManager whether the session may go on, after what delay, and how many
// bytes may move at first.
func (s *session) open() (delay time.Duration, chunk int, failed *ending) {
	limit := s.conn.RateLimit
	if limit == nil {
		return 0, 0, nil
	}
	if s.endCtx(); s.over() {
		return 0, 0, nil
	}
	d := limit.Report(s.ctx, s.event(EventOpen))
	if d.Exceeded {
		return 0, 0, d.refusal()
	}
	s.opened = true
	chunk = firstChunk
	if d.Chunk > 0 {
		chunk = min(chunk, d.Chunk)
	}
	return d.Wait, chunk, nil
}

// refusal is the ending that d, which has Exceeded set, asks for.
func (d *Decision) refusal() *ending {
	if d.Err != nil {
		return &ending{EndRateLimited, d.Err}
	}
	return &ending{EndRateLimited, ErrRateLimited}
}

// firstChunk bounds what moves before the RateLimitManager has been told of any bytes.
const firstChunk = 4 << 10

// startRelay starts to read from the client: nobody is dialed for one that has gone.
func (s *session) startRelay(chunk int) *ending {
	c := s.conn
	r := s.app.engine.New(s.client, s, chunk)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return c.cause
	}
	s.relay = r
	r.Start()
	return nil
}

// pause waits for d, or until the session is over.
func (s *session) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
}

// giveUp ends a session that is not connected, for e if there was no cause before.
func (s *session) giveUp(e *ending) {
	if s.relay == nil {
		e = s.conn.decide(e)
		s.outcome.Err = e
		if s.keep = s.reserveLastWord(e); !s.keep {
			relay.Reset(s.client)
		}
		s.finish()
		return
	}
	s.done = make(chan struct{})
	if s.reserveLastWord(e) {
		if s.keep = s.relay.Release(e); !s.keep {
			s.app.endLastWord(s)
		}
	} else {
		s.relay.Abort(e)
		s.relay.Connect(nil)
	}
	<-s.done
	s.finish()
}

// connect finds an upstream that answers.
func (s *session) connect() (net.Conn, *ending) {
	b := &s.app.balancer
	var search search
	var errs []error
	var none error
	for !s.over() {
		p, err := b.acquire(&search, time.Now())
		if err != nil {
			none = err
			break
		}
		s.upstream = p.u
		s.attempts++
		s.setState(ConnDialing, p.conf.Addr)
		server, changed, err := s.try(p)
		if err == nil {
			s.setState(ConnOpen, p.conf.Addr)
			if changed {
				s.app.log(slog.LevelInfo, "lbproxy: upstream works again", slog.String("upstream", p.conf.Addr))
			}
			if s.app.opts.CloseOnDown && p.lost != nil {
				s.unlost = after(p.lost, func() { s.conn.abort(&ending{EndUpstreamError, context.Cause(p.lost)}) })
			}
			return server, nil
		}
		s.upstream = nil
		b.release(p.u)
		if changed {
			s.app.log(slog.LevelWarn, "lbproxy: upstream failed and is skipped",
				slog.String("upstream", p.conf.Addr), slog.Duration("for", b.failTimeout),
				slog.String("err", err.Error()))
		}
		errs = append(errs, &DialError{App: s.app.id, Addr: p.conf.Addr, Err: err})
		if exhausted(err) {
			break
		}
		search.add(p.u)
	}
	if errs == nil {
		return nil, &ending{EndNoUpstream, none}
	}
	return nil, &ending{EndDialFailed, errors.Join(errs...)}
}

func (s *session) setState(state ConnState, addr string) {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	s.state, s.addr, s.undial = state, addr, nil
}

// try dials p once and tells the balancer how that went, also when the dialer panics.
func (s *session) try(p pick) (c net.Conn, changed bool, err error) {
	v := unknown
	defer func() { changed = s.app.balancer.settle(p.u, v, err, time.Now()) }()
	ctx, cancel := s.dialContext()
	defer cancel()
	if p.lost != nil {
		defer context.AfterFunc(p.lost, cancel)()
	}
	c, err = p.conf.dial(ctx, s.app.opts.DialContext, s.conn)
	v, err = p.judge(err)
	if v == fails && s.over() {
		v = unknown
	}
	return c, false, err
}

// dialContext returns the context of a dial, which ends when the session is over.
func (s *session) dialContext() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(s.base, s.app.opts.DialTimeout)
	s.conn.mu.Lock()
	s.undial = cancel
	over := s.isOver
	s.conn.mu.Unlock()
	if over {
		cancel()
	}
	return ctx, cancel
}

// Moved implements relay.Handler: it counts n bytes and asks the RateLimitManager.
func (s *session) Moved(d relay.Direction, n int) relay.Verdict {
	e := Event{Kind: EventData, Direction: Upload, Bytes: int64(n)}
	total := &s.upstream.sent
	if d == relay.Download {
		e.Direction, total = Download, &s.upstream.received
	}
	total.Add(uint64(n))
	limit := s.conn.RateLimit
	if limit == nil {
		return relay.Verdict{}
	}
	e.App, e.ClientID = s.app.id, s.conn.ClientID
	answer := limit.Report(s.ctx, e)
	if answer.Exceeded {
		return relay.Verdict{Err: answer.refusal()}
	}
	return relay.Verdict{Wait: answer.Wait, Chunk: answer.Chunk}
}

// Over implements relay.Handler: it ends the dial in progress and what waits for the session.
func (s *session) Over(cause error) { s.stop(cause) }

// Done implements relay.Handler.
func (s *session) Done(o relay.Outcome) {
	s.outcome = o
	if s.done != nil {
		close(s.done)
		return
	}
	defer s.logPanic()
	if o.Panic != nil {
		s.app.logPanic("serving a connection", o.Panic, "")
	}
	s.finish()
}

// finish takes the session out of all counts, then tells the hooks and the log. Each step is
// deferred, so that none is left out when a hook panics.
func (s *session) finish() {
	defer s.app.leave()
	defer s.log()
	defer s.report()
	defer func() {
		if s.opened {
			s.conn.RateLimit.Report(s.base, s.event(EventClose))
		}
	}()
	defer func() {
		s.app.exit(s)
		if s.keep {
			go s.lastWord()
		}
	}()
	defer func() {
		if s.upstream != nil {
			s.app.balancer.release(s.upstream)
		}
	}()
	if s.unlost != nil {
		s.unlost()
	}
	s.settle()
	if s.client == nil && !isSame(s.raw, s.conn.Client) {
		s.conn.Client.Close() // admit has wrapped what it rejected
	}
	if !s.keep && !isSame(s.raw, s.client) {
		s.raw.Close() // admit has replaced or wrapped it
	}
}

// reserveLastWord reports whether OnRefused is to be called for a session that ends with e. If so,
// the caller owes an endLastWord.
func (s *session) reserveLastWord(e *ending) bool {
	switch e.end {
	case EndRateLimited, EndNoUpstream, EndDialFailed:
		return s.conn.OnRefused != nil && s.app.reserveLastWord(s)
	}
	return false
}

// lastWord lets OnRefused write to the client, and closes it when that has arrived.
func (s *session) lastWord() {
	defer s.app.endLastWord(s)
	defer s.release()
	defer s.raw.Close()
	defer relay.LastWord(s.client)
	defer s.logPanic()
	// In all, not for each Write: a client that reads slowly holds a place. Both deadlines, as a
	// Write may begin with a TLS handshake.
	s.client.SetDeadline(time.Now().Add(time.Second))
	s.conn.OnRefused(refusedConn{s.client}, s.result.Err)
}

// A refusedConn is what an OnRefused writes to.
type refusedConn struct{ net.Conn }

func (c refusedConn) Read([]byte) (int, error) {
	return 0, errors.New("lbproxy: a refused client cannot be read from")
}

// settle decides what the Result is, and lets go of the connection.
func (s *session) settle() {
	c := s.conn
	s.stub() // if admit has rejected it
	end, err := s.verdict()
	c.mu.Lock()
	c.info = ConnInfo{
		Upstream: s.addr, Start: s.start, Sent: s.outcome.Sent, Received: s.outcome.Received, State: ConnOver,
	}
	c.session = nil
	c.mu.Unlock()
	s.result = Result{
		Conn: c, App: s.app.id, ClientID: c.ClientID, Attempts: s.attempts,
		Start: s.start, Duration: time.Since(s.start), Sent: s.outcome.Sent, Received: s.outcome.Received,
		End: end, Err: err,
	}
	if s.outcome.Connected {
		s.result.Upstream = s.addr
	}
	s.stop(err)
	c.tls = nil
	if !s.keep {
		s.release()
	}
	s.result.Client = c.clientAddr() // last: the method is somebody else's
}

// release lets go of what a Conn that is kept after the end must not hold.
func (s *session) release() {
	if t, ok := s.conn.Client.(*TLSConn); ok {
		t.release()
	}
}

// verdict names the outcome.
func (s *session) verdict() (EndReason, error) {
	o := &s.outcome
	if e, ok := o.Err.(*ending); ok {
		return e.end, e.err
	}
	switch {
	case o.Err == nil:
		return EndDone, nil
	case o.Failed == relay.Server:
		return EndUpstreamError, o.Err
	case o.Quiet:
		return EndClientClosed, o.Err
	case o.Failed == relay.Client:
		return EndClientError, o.Err
	}
	return EndCanceled, o.Err // a hook panicked
}

// report calls the OnDone hooks.
func (s *session) report() {
	if done := s.app.opts.OnDone; done != nil {
		defer done(s.result) // also if the connection's own panics
	}
	if done := s.conn.OnDone; done != nil {
		done(s.result)
	}
}

// log writes the line that Serve has for each connection.
func (s *session) log() {
	if !s.accepted {
		return
	}
	level := slog.LevelDebug
	switch s.result.End {
	case EndNoUpstream, EndDialFailed, EndUpstreamError:
		level = slog.LevelWarn
	}
	s.app.lines.Add(s.base, s.app.logger(), level, "lbproxy: connection ended", s.result.attrs)
}

func (s *session) event(kind EventKind) Event {
	return Event{Kind: kind, App: s.app.id, ClientID: s.conn.ClientID}
}

// hold takes what is to be relayed. It comes before anybody can get c from Conns.
func (s *session) hold() {
	s.client = s.conn.Client
	if t, ok := s.client.(interface{ ConnectionState() tls.ConnectionState }); ok {
		// Now, for PROXY headers: later a handshake in the relay would hold the question up.
		if state := t.ConnectionState(); state.HandshakeComplete {
			s.conn.tls = &state
		}
	}
	if t, ok := s.client.(*TLSConn); ok {
		s.client = t.hold()
	}
	s.stub()
}

// stub puts a stub in the place of a plain TCP connection that Serve has accepted, so that a kept
// Conn is small. Nobody else has seen Client yet; ServeConn's caller may be looking at it.
func (s *session) stub() {
	if c, ok := s.conn.Client.(*net.TCPConn); ok && s.accepted {
		s.conn.Client = &heldConn{c.LocalAddr(), c.RemoteAddr()}
	}
}

// A heldConn stands for a connection that the app holds.
type heldConn struct{ local, remote net.Addr }

func (c *heldConn) LocalAddr() net.Addr              { return c.local }
func (c *heldConn) RemoteAddr() net.Addr             { return c.remote }
func (c *heldConn) Read([]byte) (int, error)         { return 0, c.closed("read") }
func (c *heldConn) Write([]byte) (int, error)        { return 0, c.closed("write") }
func (c *heldConn) Close() error                     { return c.closed("close") }
func (c *heldConn) SetDeadline(time.Time) error      { return c.closed("set") }
func (c *heldConn) SetReadDeadline(time.Time) error  { return c.closed("set") }
func (c *heldConn) SetWriteDeadline(time.Time) error { return c.closed("set") }

func (c *heldConn) closed(op string) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: net.ErrClosed}
}

// AcceptProxy returns an AdmitFunc that reads a PROXY protocol header, version 1 or 2, from
// trusted peers and sets ClientAddr and ServerAddr by it, then asks next; a nil next admits
// everyone. A trusted peer must send a header, within 3 seconds: at most 536 bytes, and TLVs of
// up to 4 KiB, which are ignored. The addresses stay as they are if the header is LOCAL or
// UNKNOWN. Anybody else keeps their address, and their bytes are never taken for a header.
//
// AcceptProxy panics if trusted is empty or has a prefix of no bits, which would trust everyone.
func AcceptProxy(trusted []netip.Prefix, next AdmitFunc) AdmitFunc {
	trust, err := proxyproto.NewTrust(trusted)
	if err != nil {
		panic("lbproxy: AcceptProxy: " + err.Error())
	}
	return func(ctx context.Context, c *Conn) error {
		if trust.Contains(c.Client.RemoteAddr()) {
			if err := c.readProxyHeader(); err != nil {
				return err
			}
		}
		if next == nil {
			return nil
		}
		return next(ctx, c)
	}
}

func (c *Conn) readProxyHeader() error {
	c.Client.SetReadDeadline(time.Now().Add(3 * time.Second))
	h, err := proxyproto.Read(c.Client)
	if err != nil {
		return fmt.Errorf("lbproxy: client %v: %w", c.Client.RemoteAddr(), err)
	}
	c.Client.SetReadDeadline(time.Time{})
	if !h.Local && h.Source.IsValid() {
		c.ClientAddr = net.TCPAddrFromAddrPort(h.Source)
		c.ServerAddr = net.TCPAddrFromAddrPort(h.Dest)
	}
	return nil
}

// proxyHeader describes c to an upstream.
func (c *Conn) proxyHeader() proxyproto.Header {
	from, to := c.ClientAddr, c.ServerAddr
	if from == nil {
		from = c.Client.RemoteAddr()
	}
	if to == nil {
		to = c.Client.LocalAddr()
	}
	h := proxyproto.Header{
		Source: proxyproto.AddrPort(from), Dest: proxyproto.AddrPort(to), ClientID: c.ClientID,
	}
	if state := c.tls; state != nil {
		h.TLS = &proxyproto.TLS{Version: state.Version, Verified: c.Verified}
		if len(state.PeerCertificates) > 0 {
			h.TLS.CN = state.PeerCertificates[0].Subject.CommonName
		}
	}
	return h
}
