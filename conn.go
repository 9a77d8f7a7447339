package lbproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Conn is a client's connection and what goes with it.
type Conn struct {
	// Client is the connection: a *net.TCPConn, a *tls.Conn, or any other. It is required. What it can do is found
	// out from its methods: CloseWrite() error, to be told that the upstream's stream has ended while its own goes on;
	// NetConn() net.Conn, if it is a layer over another conn, as TLS is; SetLinger(int) error, at the bottom, to be
	// reset. A wrapper of a TCP connection should have the first two: without, its peer may lose the end of what it was
	// sent, which Result.Err then tells. (A net.Pipe, as in tests, has no CloseWrite either: a session over one in which
	// only one side has ended its stream does not end as EndDone.) crypto/tls takes a client's FIN without close_notify
	// for the end of its stream; a Client whose Read returns io.ErrUnexpectedEOF then, as a TLSConn's does, has it taken
	// for cut.
	Client net.Conn

	// ClientID says who this is, in events, results and logs. It may be empty.
	ClientID string

	// RateLimit is told what the connection does and may refuse, cut or slow it. nil means no limit.
	RateLimit RateLimitManager

	// OnDone is called once, when everything about this connection is over, as that of Options is, and before it. It
	// saves those who keep something for each connection from having to find it by what the Result says. nil means no
	// call.
	OnDone func(Result)
}

// A Result is what became of one connection.
type Result struct {
	App, ClientID    string
	Client, Upstream string // addresses: the client's remote one, the upstream's Addr (empty if none was reached)
	Attempts         int    // dials tried
	Start            time.Time
	Duration         time.Duration
	Sent, Received   int64 // bytes client to upstream, upstream to client
	End              EndReason
	Err              error // what ended it, nil for a clean end; a context's cause where one ended it
}

func (r *Result) attrs() []slog.Attr {
	attrs := []slog.Attr{
		slog.String("app", r.App), slog.String("end", string(r.End)), slog.String("client", r.Client),
		slog.String("upstream", r.Upstream), slog.Int("attempts", r.Attempts), slog.Duration("duration", r.Duration),
		slog.Int64("sent", r.Sent), slog.Int64("received", r.Received),
	}
	if r.ClientID != "" {
		attrs = append(attrs, slog.String("client_id", r.ClientID))
	}
	if r.Err != nil {
		attrs = append(attrs, slog.Any("err", r.Err))
	}
	return attrs
}

// An EndReason says in a word why a connection ended.
type EndReason string

const (
	EndDone          EndReason = "done"           // both sides ended their streams
	EndRateLimited   EndReason = "rate-limited"   // refused (Attempts is 0) or cut by its RateLimitManager
	EndNoUpstream    EndReason = "no-upstream"    // every upstream is at its MaxConns, or down
	EndDialFailed    EndReason = "dial-failed"    // no upstream that might have served it could be reached
	EndClientError   EndReason = "client-error"   // the client's side failed
	EndUpstreamError EndReason = "upstream-error" // the upstream's side failed
	EndIdleTimeout   EndReason = "idle-timeout"   // no bytes either way for Options.IdleTimeout
	EndCanceled      EndReason = "canceled"       // its context ended, or a hook panicked while it was served
	EndClosed        EndReason = "closed"         // the app was closed
)

// ServeConn serves one client: it asks c.RateLimit, chooses an upstream, dials it, going on to the next one while
// that fails, and copies bytes both ways until both sides have ended. It blocks until everything about the
// connection is over, and always closes c.Client. The error is Result.Err.
//
// When one side ends its stream the other is told (CloseWrite) and may go on with its own. When a side fails, what
// was read from it is still delivered, within a second, and then the other side is reset rather than closed, so
// that nobody takes a cut stream for a whole one. Sessions ended early, and clients for which there is no upstream
// or that are over their rate, are reset at once. (Where there are no resets, as with Unix sockets, they are closed.)
//
// When ctx ends the connection is broken and Result.Err is ctx's cause. A panic in a hook is passed on to the
// caller, when the connection is closed and out of all counts.
func (a *LBProxyApp) ServeConn(ctx context.Context, c Conn) (Result, error) {
	if c.Client == nil {
		err := fmt.Errorf("lbproxy: app %q: ServeConn: Conn.Client is nil", a.id)
		return Result{App: a.id, ClientID: c.ClientID, Start: time.Now(), End: EndClientError, Err: err}, err
	}
	s := newSession(a, c)
	if !a.enter(s) { // nor does Close wait for this one
		s.abort(EndClosed, ErrAppClosed)
		s.closeConns()
		s.report()
	} else {
		defer a.leave()
		s.serve(cmp.Or(ctx, context.Background()))
	}
	return *s.result, s.err
}

// lingerTime bounds how long a session goes on after a side has failed, for what was read from it to be delivered.
const lingerTime = time.Second

var (
	errPanicked  = errors.New("lbproxy: a hook panicked")
	errReset     = errors.New("lbproxy: connection reset by peer")
	errGone      = errors.New("lbproxy: client closed before an upstream was reached")
	errBadCount  = errors.New("lbproxy: conn returned an impossible count")
	errNilDialed = errors.New("Options.DialContext returned neither a conn nor an error")
)

// A session is one client's connection, from when it is counted in until its Result is known. The goroutine that
// calls serve owns it and runs the download; it waits for the other goroutines, which are the upload, one of the crew
// that connects, and, when a side has failed, deliverThenReset.
type session struct {
	app      *LBProxyApp
	accepted bool // by Serve
	start    time.Time
	result   *Result // when all is over

	ctx       context.Context // the caller's, but it does not end with that; where there is a RateLimit, with the session
	unwatch   func()          // the caller's; nil if it is not watched
	opened    bool            // the RateLimit owes an EventClose
	completed bool            // serve has come to its end without a panic
	unlost    func()          // stops CloseOnDown; nil if there is nothing to stop
	upstream  *upstream       // what the connection is counted on, if anything
	addr      string          // of it
	attempts  int
	up, down  pump
	wg        sync.WaitGroup
	hanging   sync.WaitGroup // hangUp closes what there is
	connected chan struct{}  // closed when server is set, or will not be

	last    atomic.Int64 // when bytes last moved, since start
	waiting atomic.Int32 // directions that a RateLimitManager holds
	queued  int          // what checkIdle saw last

	mu       sync.Mutex
	conn     Conn
	server   net.Conn                // the upstream's; nil until dialled
	cancel   context.CancelCauseFunc // of ctx; nil if there is none
	undial   context.CancelFunc      // of the dial in progress, or one before it; nil before any
	end      EndReason               // the first reason to end; "" while there is none
	err      error                   // goes with end
	hungUp   bool
	panicked any       // a hook's panic in the upload goroutine
	changed  sync.Cond // on mu: a pump has ended, or hungUp is set
}

func newSession(a *LBProxyApp, c Conn) *session {
	s := &session{app: a, start: time.Now(), conn: c, connected: make(chan struct{})}
	s.changed.L = &s.mu
	s.up = pump{session: s, direction: Upload}
	s.down = pump{session: s, direction: Download}
	return s
}

// watch breaks the session when ctx ends. What it returns stops that, and when it returns it can no longer happen.
func (s *session) watch(ctx context.Context) (unwatch func()) {
	return after(ctx, func() { s.cut(ctx) })
}

// after calls f when ctx ends. What it returns stops that, and when it returns f is not running.
func after(ctx context.Context, f func()) (unwatch func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		f()
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}

// cut breaks the session because ctx has ended, or the app was closed, which may be why.
func (s *session) cut(ctx context.Context) {
	if s.app.ctx.Err() != nil {
		s.abort(EndClosed, ErrAppClosed)
	} else {
		s.abort(EndCanceled, context.Cause(ctx))
	}
}

// serve does what ServeConn says for a session that is counted in. What the goroutine waits on is kept small.
func (s *session) serve(ctx context.Context) {
	defer s.unwind()
	s.ctx = context.WithoutCancel(ctx)
	if s.conn.RateLimit != nil {
		s.limit()
	}
	if ctx.Done() != nil && ctx != s.app.ctx { // that one ends with Close, which breaks what is open
		s.unwatch = s.watch(ctx)
	}
	if ctx.Err() != nil {
		s.cut(ctx)
	} else if wait, ok := s.open(); ok {
		s.forward(wait)
	}
	s.completed = true
}

// unwind undoes what serve has done, each thing by its own defer, so that no return and no panic in a hook can miss one.
func (s *session) unwind() {
	defer s.finish()
	defer func() {
		if s.opened {
			s.conn.RateLimit.Report(context.WithoutCancel(s.ctx), s.event(EventClose))
		}
	}()
	defer func() {
		if s.upstream != nil {
			s.app.balancer.release(s.upstream)
		}
	}()
	defer s.closeConns()
	defer func() {
		if s.unwatch != nil {
			s.unwatch()
		}
		if s.unlost != nil {
			s.unlost()
		}
	}()
	defer s.wg.Wait()
	if !s.completed {
		s.abort(EndCanceled, errPanicked) // which ends the upload, too
	}
}

// limit makes ctx end with the session, for the RateLimitManager and for what has to wait for it.
func (s *session) limit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ctx, s.cancel = context.WithCancelCause(s.ctx)
	if s.end != "" {
		s.cancel(s.err)
	}
}

// open asks the RateLimitManager whether the session may go on, and after what wait.
func (s *session) open() (wait time.Duration, ok bool) {
	if s.isOver() || s.conn.RateLimit == nil {
		return 0, !s.isOver()
	}
	d := s.conn.RateLimit.Report(s.ctx, s.event(EventOpen))
	if d.Exceeded {
		s.abort(EndRateLimited, ErrRateLimited)
	}
	s.opened = !d.Exceeded
	s.up.grain, s.down.grain = firstGrain, firstGrain
	return d.Wait, s.opened
}

// forward connects and copies. The upload starts before there is an upstream: nobody needs to be dialled for a
// client that is gone.
func (s *session) forward(wait time.Duration) {
	s.up.src = s.conn.Client
	s.wg.Go(s.upload)
	if s.reach(wait); s.isConnected() {
		s.down.src, s.down.dst = s.server, s.conn.Client
		s.down.run()
	}
}

// reach waits for the RateLimitManager and connects. Meanwhile it looks after the client now and then: once it has spoken,
// its going would be noticed only behind what else it has sent, which nobody reads yet.
func (s *session) reach(wait time.Duration) {
	const often = 200 * time.Millisecond
	s.wg.Add(1)
	look := time.AfterFunc(often, func() {
		defer s.wg.Done()
		for s.lookAfterClient() {
			select {
			case <-s.connected:
			case <-time.After(often):
			}
		}
	})
	defer func() {
		if look.Stop() {
			s.wg.Done()
		}
	}()
	s.pause(wait)
	s.deeply(s.connect)
}

// lookAfterClient ends the session if the client has reset it, and reports whether there is reason to look again.
func (s *session) lookAfterClient() bool {
	s.mu.Lock()
	waiting, reset := s.server == nil && s.end == "", false
	if waiting { // still, under mu: what both sides have ended looks the same
		reset, _ = wasReset(s.conn.Client)
	}
	s.mu.Unlock()
	if reset {
		s.broke(&s.up, errReset)
	}
	return waiting && !reset
}

// upload runs the pump from client to upstream. A hook's panic ends the session and is kept for its owner.
func (s *session) upload() {
	ok := false
	defer func() {
		if !ok {
			s.uploadPanicked(recover())
		}
	}()
	s.up.run()
	ok = true
}

func (s *session) uploadPanicked(p any) {
	if p == nil {
		p = "lbproxy: a hook called runtime.Goexit"
	} else {
		p = withStack(p)
	}
	s.mu.Lock()
	s.panicked = p
	s.mu.Unlock()
	s.abort(EndCanceled, errPanicked)
}

// connect finds an upstream that answers, or ends the session.
func (s *session) connect() {
	b := &s.app.balancer
	var search search
	var errs []error
	var none error
	for !s.isOver() {
		p, err := b.acquire(&search, time.Now())
		if err != nil {
			none = err
			break
		}
		s.upstream, s.addr = p.u, p.conf.Addr
		s.attempts++
		server, changed, err := s.try(p)
		if err == nil {
			s.connectedTo(server)
			if s.app.opts.CloseOnDown && p.lost != nil {
				s.unlost = after(p.lost, func() { s.abort(EndUpstreamError, context.Cause(p.lost)) })
			}
			if changed {
				s.app.log().Info("lbproxy: upstream works again", "app", s.app.id, "upstream", s.addr)
			}
			return
		}
		s.upstream = nil
		b.release(p.u)
		if changed {
			s.app.log().Warn("lbproxy: upstream failed and is passed over", "app", s.app.id, "upstream", s.addr,
				"for", b.failTimeout, "err", err)
		}
		errs = append(errs, &DialError{App: s.app.id, Addr: s.addr, Err: err})
		if exhausted(err) {
			break
		}
		search.add(p.u)
	}
	if errs == nil {
		s.abort(EndNoUpstream, none)
	} else {
		s.abort(EndDialFailed, errors.Join(errs...))
	}
}

// try dials p once and lets the balancer know how that went, even if the dialer panics.
func (s *session) try(p pick) (c net.Conn, changed bool, err error) {
	v := unknown
	defer func() { changed = s.app.balancer.settle(p.u, v, err, time.Now()) }()
	c, err = s.dial(p)
	v, err = p.judge(err)
	if v == fails && s.isOver() {
		v = unknown
	}
	return c, false, err
}

func (s *session) dial(p pick) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.app.opts.DialTimeout)
	defer cancel()
	if p.lost != nil {
		defer context.AfterFunc(p.lost, cancel)()
	}
	s.mu.Lock()
	s.undial = cancel
	if s.end != "" {
		cancel()
	}
	s.mu.Unlock()
	return p.conf.dial(ctx, s.app.opts.DialContext)
}

// connectedTo makes server the other side, unless the session is over: then it breaks server.
func (s *session) connectedTo(server net.Conn) {
	s.mu.Lock()
	over := s.end != ""
	if !over {
		s.touch()
		s.server, s.undial = server, nil
		close(s.connected)
	}
	s.mu.Unlock()
	if over {
		discard(server)
	}
}

// touch notes that bytes moved. Reading the clock takes 25 ns of a round trip's 20 µs, and buys an idle timeout
// that is exact without a timer being reset.
func (s *session) touch() { s.last.Store(int64(time.Since(s.start))) }

// checkIdle returns how long it takes until the session may have been idle for long enough; not positive if it has. It
// wants to be called more often than that, for what a slow reader takes out of its socket's queue is bytes that move, too.
func (s *session) checkIdle() time.Duration {
	timeout := s.app.opts.IdleTimeout
	s.mu.Lock()
	client, server, over := s.conn.Client, s.server, s.end != ""
	s.mu.Unlock()
	if server == nil || over {
		return timeout
	}
	queued := unsent(client) + unsent(server)
	if queued < s.queued {
		s.touch()
	}
	s.queued = queued
	if s.waiting.Load() > 0 { // what is held is not idle
		return timeout
	}
	return timeout - (time.Since(s.start) - time.Duration(s.last.Load()))
}

// pause waits for d, or until the session has a reason to end.
func (s *session) pause(d time.Duration) {
	if d <= 0 {
		return
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	defer s.touch()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
}

// endWith records why the session ends and reports whether that is the first reason, which is the one that counts.
// The caller holds mu.
func (s *session) endWith(end EndReason, err error) bool {
	if s.end != "" {
		return false
	}
	s.end, s.err = end, err
	if s.cancel != nil {
		s.cancel(err)
	}
	if s.undial != nil {
		s.undial()
	}
	if s.server == nil {
		close(s.connected)
	}
	return true
}

func (s *session) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end != ""
}

// abort ends the session now.
func (s *session) abort(end EndReason, err error) {
	s.mu.Lock()
	s.endWith(end, err)
	s.mu.Unlock()
	s.hangUp()
}

// hangUp resets both sides, without waiting for either, which ends whatever is going on on them.
func (s *session) hangUp() {
	s.mu.Lock()
	client, server, done := s.conn.Client, s.server, s.hungUp
	s.hungUp = true
	if !done {
		s.hanging.Add(1)
	}
	s.changed.Broadcast()
	s.mu.Unlock()
	if !done {
		defer s.hanging.Done()
		reset(client)
		reset(server)
	}
}

// broke is called when the side that from reads from has failed. From then on the session is only there to deliver
// what can still be read from that side.
func (s *session) broke(from *pump, err error) {
	s.mu.Lock()
	first := s.endWith(from.sourceError(), err)
	s.mu.Unlock()
	if first {
		s.wg.Go(func() { s.deliverThenReset(from, false) })
	}
}

// deliverThenReset ends a session when what was read from the source of from, which has failed, has been delivered or
// lingerTime is over. Meanwhile the other pump, finding nobody to write to, throws away what it reads: a peer that is
// busy sending might not come to read otherwise. If politely is set the destination is closed, not reset.
func (s *session) deliverThenReset(from *pump, politely bool) {
	defer time.AfterFunc(lingerTime, s.hangUp).Stop()
	s.mu.Lock()
	for !from.ended && !s.hungUp {
		s.changed.Wait()
	}
	s.mu.Unlock()
	for wait := time.Millisecond; !s.isHungUp() && unsent(from.dst) > 0; wait = min(2*wait, 16*time.Millisecond) {
		time.Sleep(wait)
	}
	if politely && !s.isHungUp() {
		from.dst.Close()
	}
	s.hangUp()
}

func (s *session) isHungUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hungUp
}

// closeConns closes both sides: politely, unless they have been reset.
func (s *session) closeConns() {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.endWith(EndDone, nil) // and nothing that happens from here on is the reason
	}()
	if s.server != nil {
		s.server.Close()
	}
	s.conn.Client.Close()
}

// finish takes the session out of the counts, reports it, and passes on a hook's panic in the upload.
func (s *session) finish() {
	s.mu.Lock()
	s.hungUp = true // nothing is left to be
	s.mu.Unlock()
	s.hanging.Wait()
	s.app.exit(s, s.end == EndRateLimited && s.attempts == 0, s.end == EndNoUpstream || s.end == EndDialFailed)
	s.report()
	if s.panicked != nil {
		panic(s.panicked)
	}
}

// report makes the Result known.
func (s *session) report() {
	r := Result{
		App: s.app.id, ClientID: s.conn.ClientID, Client: remoteAddr(s.conn.Client), Attempts: s.attempts,
		Start: s.start, Duration: time.Since(s.start), Sent: s.up.moved, Received: s.down.moved, End: s.end, Err: s.err,
	}
	if s.server != nil {
		r.Upstream = s.addr
	}
	s.result = &r
	if done := s.app.opts.OnDone; done != nil {
		defer done(r) // also if the connection's own panics
	}
	if done := s.conn.OnDone; done != nil {
		done(r)
	}
}

func (s *session) isConnected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server != nil
}

func (s *session) event(kind EventKind) Event {
	return Event{Kind: kind, App: s.app.id, ClientID: s.conn.ClientID}
}

// A pump carries the bytes of one direction. Its fields are its goroutine's own until ended is set.
type pump struct {
	session   *session
	direction Direction
	src, dst  net.Conn // dst is nil in an upload that has had nothing to write yet
	moved     int64    // bytes written to dst
	grain     int      // most bytes to move at once, where a RateLimitManager makes it wait; 0: no limit
	buf       *buffer  // what read uses
	lastRead  int      // bytes the last read returned
	platform           // how conns are moved here; see move

	writing atomic.Bool // it is in a write to dst
	ending  atomic.Bool // or in what ends the stream to dst, which may write, too
	atEnd   bool        // src has ended its stream; belongs to session.mu
	ended   bool        // run has come to its end; belongs to session.mu
}

// run moves bytes until src has ended or something is broken.
func (p *pump) run() {
	s := p.session
	defer func() {
		p.buf.free()
		s.mu.Lock()
		p.ended = true
		s.changed.Broadcast()
		s.mu.Unlock()
	}()
	for {
		n, readErr, writeErr := p.move()
		switch { // first, for a RateLimitManager may take its time
		case writeErr != nil:
			s.broke(p.other(), writeErr)
			p.writing.Store(false)
		case readErr != nil && readErr != io.EOF:
			s.broke(p, readErr)
		}
		if n > 0 {
			p.account(n)
		}
		switch {
		case writeErr != nil:
			p.discard()
			return
		case readErr == io.EOF:
			p.finish()
			return
		case readErr != nil:
			return
		}
	}
}

func (p *pump) other() *pump {
	if p.direction == Upload {
		return &p.session.down
	}
	return &p.session.up
}

// sourceError is what it is called when the side that p reads from fails.
func (p *pump) sourceError() EndReason {
	if p.direction == Upload {
		return EndClientError
	}
	return EndUpstreamError
}

// account counts n bytes that were moved and does what the RateLimitManager says.
func (p *pump) account(n int) {
	s := p.session
	p.moved += int64(n)
	s.touch()
	total := &s.upstream.sent
	if p.direction == Download {
		total = &s.upstream.received
	}
	total.Add(uint64(n))
	if s.conn.RateLimit == nil {
		return
	}
	e := s.event(EventData)
	e.Direction, e.Bytes = p.direction, int64(n)
	s.waiting.Add(1) // it may block
	d := s.conn.RateLimit.Report(s.ctx, e)
	s.touch()
	s.waiting.Add(-1)
	if d.Exceeded {
		s.abort(EndRateLimited, ErrRateLimited)
		return
	}
	p.pace(n, d.Wait)
	s.pause(d.Wait)
}

// pace chooses the grain such that waits are short: a stream held to a rate is to flow, not to come in lumps.
func (p *pump) pace(n int, wait time.Duration) {
	const short = 20 * time.Millisecond
	switch {
	case wait > short:
		p.grain = max(int(int64(n)*int64(short)/int64(wait)), 512)
	case p.grain > 0 && wait < short/2:
		if p.grain *= 2; p.grain > maxGrain {
			p.grain = 0
		}
	}
}

const (
	firstGrain = 4 << 10 // until a RateLimitManager has been heard
	maxGrain   = 1 << 20 // the most that one EventData is about
)

// limit is the part of b that may be filled at once.
func (p *pump) limit(b []byte) []byte {
	if p.grain > 0 && p.grain < len(b) {
		return b[:p.grain]
	}
	return b
}

// finish passes the clean end of src on to dst.
func (p *pump) finish() {
	s, q := p.session, p.other()
	for n := 0; n < 10 && (q.writing.Load() || q.ending.Load()); n++ {
		reset, known := wasReset(p.src)
		if reset && q.writing.Load() { // still: a socket that both of us have ended since looks the same
			s.broke(p, errReset) // q's write took the error, and left us what looks like an end
			return
		}
		if known && !reset {
			break
		}
		time.Sleep(time.Millisecond) // for q to come back with the error, if there is one
	}
	if p.dst == nil {
		if _, ok := p.src.(closeWriter); !ok && !s.isConnected() {
			s.broke(p, errGone) // having no half-close, this client has closed
			return
		}
		if !p.awaitServer() {
			return
		}
	}
	s.mu.Lock()
	p.atEnd = true
	over, last, both := s.end != "", q.ended, q.atEnd
	s.mu.Unlock()
	_, isLayer := p.dst.(layer)
	if over || last && !isLayer {
		return // closing comes next, and says the same
	}
	if c, ok := p.dst.(closeWriter); ok {
		if h, ok := p.dst.(interface{ Handshake() error }); ok { // of TLS, in which no stream ends before that is done
			if err := h.Handshake(); err != nil {
				s.broke(q, err)
				return
			}
		}
		if isLayer {
			// crypto/tls gives its goodbye 5 s, CloseWrite as well as Close, and breaks the stream if a slow reader's
			// buffers are full for so long. This takes that deadline away again.
			defer time.AfterFunc(time.Second, func() { bottom(p.dst).SetWriteDeadline(time.Time{}) }).Stop()
		}
		p.ending.Store(true)
		if err := p.closeWrite(c); err != nil {
			s.broke(q, err)
		}
		p.ending.Store(false)
		return
	}
	if both {
		return
	}
	s.mu.Lock()
	first := s.endWith(q.sourceError(), fmt.Errorf("lbproxy: a %T has no CloseWrite, so its peer cannot be told that the other side has ended its stream, and go on", p.dst))
	s.mu.Unlock()
	if first {
		reset(p.src) // what it was sent is cut; what it sent is whole
		s.wg.Go(func() { s.deliverThenReset(p, true) })
	}
}

type closeWriter interface{ CloseWrite() error }

type layer interface{ NetConn() net.Conn }

// awaitServer sets an upload's dst when there is one, or returns false if there will be none.
func (p *pump) awaitServer() bool {
	s := p.session
	<-s.connected
	s.mu.Lock()
	defer s.mu.Unlock()
	p.dst = s.server
	return s.server != nil
}

// discard reads src until it ends or is closed.
func (p *pump) discard() {
	for {
		if _, err := p.read(); err != nil {
			return
		}
	}
}

// copyChunk moves one chunk by Read and Write, which any conn has.
func (p *pump) copyChunk() (n int, readErr, writeErr error) {
	b, readErr := p.read()
	if len(b) > 0 {
		n, writeErr = p.write(b)
	}
	return n, readErr, writeErr
}

// read reads into a buffer that is large only while reads fill a small one. What it returns is valid until it is
// called again.
func (p *pump) read() ([]byte, error) {
	for range 100 {
		if size := bufferSize(p.lastRead); p.buf == nil || len(*p.buf) != size {
			p.buf.free()
			p.buf = newBuffer(size)
		}
		b := p.limit(*p.buf)
		n, err := p.src.Read(b)
		if n < 0 || n > len(b) {
			return nil, errBadCount
		}
		p.lastRead = n
		if n > 0 || err != nil {
			return b[:n], err
		}
	}
	return nil, io.ErrNoProgress
}

// write writes all of b to dst, which an upload may have to wait for.
func (p *pump) write(b []byte) (int, error) {
	if p.dst == nil && !p.awaitServer() {
		return 0, net.ErrClosed
	}
	p.writing.Store(true)
	var n int
	var err error
	if c, ok := p.dst.(*TLSConn); ok {
		n, err = c.write(b, p)
	} else {
		n, err = p.send(b)
	}
	switch {
	case n < 0 || n > len(b):
		return 0, errBadCount
	case n < len(b) && err == nil:
		err = io.ErrShortWrite
	}
	if err == nil {
		p.writing.Store(false) // else run does that, when the error is known
	}
	return n, err
}

func (p *pump) dropBuffer() {
	p.buf.free()
	p.buf = nil
}

// A buffer is what bytes pass through. It is pooled, small or large.
type buffer []byte

const (
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
	tlsBuffer   = 66 << 10 // has room for what a large one is in TLS
)

var smallBuffers, largeBuffers, tlsBuffers = bufferPool(smallBuffer), bufferPool(largeBuffer), bufferPool(tlsBuffer)

func bufferPool(size int) *sync.Pool {
	return &sync.Pool{New: func() any { b := make(buffer, size); return &b }}
}

// bufferSize is the size for the next read when the last one returned n bytes.
func bufferSize(n int) int {
	if n >= smallBuffer {
		return largeBuffer
	}
	return smallBuffer
}

func newBuffer(size int) *buffer { return poolOf(size).Get().(*buffer) }

func (b *buffer) free() {
	if b != nil {
		poolOf(len(*b)).Put(b)
	}
}

func poolOf(size int) *sync.Pool {
	switch size {
	case largeBuffer:
		return largeBuffers
	case tlsBuffer:
		return tlsBuffers
	}
	return smallBuffers
}

// A TLSConn is a TLS connection with what a proxy needs besides. crypto/tls takes the end of the connection below for the
// end of the stream; here the peer has to have said so (close_notify, RFC 8446 section 6.1), else the stream was cut, and
// Read returns io.ErrUnexpectedEOF. What one large Write sends goes out in few system calls. Until the handshake is done
// no more than a given number of bytes is read.
type TLSConn struct {
	*tls.Conn
	wire      *wire
	resumable bool // a Read or Write can stop and go on later: once done, there is no other handshake in it
}

// ErrHandshakeSize is the error of a handshake that takes more bytes than [TLSServer] was told.
var ErrHandshakeSize = errors.New("lbproxy: more bytes than a TLS handshake may take")

// TLSServer speaks TLS over raw, as tls.Server does, and is to be a [Conn]'s Client. At most maxHandshake bytes are read
// before the handshake is done; 0 means any number.
func TLSServer(raw net.Conn, config *tls.Config, maxHandshake int) *TLSConn {
	return newTLSConn(tls.Server, raw, config, maxHandshake)
}

func newTLSConn(side func(net.Conn, *tls.Config) *tls.Conn, raw net.Conn, config *tls.Config, maxHandshake int) *TLSConn {
	w := &wire{Conn: raw, direct: direct(raw), left: maxHandshake}
	w.bounded.Store(maxHandshake > 0)
	return &TLSConn{side(w, config), w, config == nil || config.Renegotiation == tls.RenegotiateNever}
}

// Handshake is HandshakeContext without a context.
func (c *TLSConn) Handshake() error { return c.HandshakeContext(context.Background()) }

// HandshakeContext is that of tls.Conn.
func (c *TLSConn) HandshakeContext(ctx context.Context) error {
	err := c.Conn.HandshakeContext(ctx)
	if err == nil && c.wire.bounded.Load() {
		c.wire.bounded.Store(false)
	}
	return err
}

// NetConn returns the connection that TLS is spoken over.
func (c *TLSConn) NetConn() net.Conn { return c.wire.Conn }

// Read is that of tls.Conn, except that it tells a cut from an end.
func (c *TLSConn) Read(b []byte) (int, error) {
	if c.wire.bounded.Load() {
		if err := c.Handshake(); err != nil {
			return 0, err
		}
	}
	n, err := c.Conn.Read(b)
	if err == io.EOF && c.wire.ended {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Write is that of tls.Conn. If one of more than 16 KiB fails, how many bytes of b have left is not known, and 0 is
// returned.
func (c *TLSConn) Write(b []byte) (int, error) { return c.write(b, nil) }

// write is Write, but that p drops its buffer, which b is in, before a wait for the peer to take what is large.
func (c *TLSConn) write(b []byte, p *pump) (int, error) {
	const record = 16 << 10 // the most that one holds
	if len(b) <= record || !c.resumable {
		return c.Conn.Write(b)
	}
	if err := c.Handshake(); err != nil { // what it says to the peer is not to be kept back
		return 0, err
	}
	c.wire.gather()
	n, err := c.Conn.Write(b)
	if p != nil {
		p.dropBuffer()
	}
	if e := c.wire.flush(); e != nil {
		err = e
	}
	if err != nil {
		n = 0
	}
	return n, err
}

// A wire is what TLS is spoken over.
type wire struct {
	net.Conn
	direct io.ReadWriter // the same, by the shortest way

	bounded atomic.Bool // what is read is, until the handshake is done
	left    int         // bytes that may be read while bounded
	ended   bool        // belongs to the reader

	mu      sync.Mutex
	writers int     // calls of TLSConn.Write that gather
	held    *buffer // what they have gathered, to the length of full; nil: nothing
	full    int
	err     error // of a write of what was gathered
}

func (w *wire) NetConn() net.Conn { return w.Conn }

func (w *wire) Read(b []byte) (int, error) {
	if w.bounded.Load() {
		if w.left == 0 {
			return 0, ErrHandshakeSize
		}
		b = b[:min(len(b), w.left)]
	}
	n, err := w.direct.Read(b)
	w.left -= n
	if n == 0 && err == io.EOF { // with bytes, what they say comes first
		w.ended = true
	}
	return n, err
}

// Write is given a whole record, or several small ones.
func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.writers == 0 && w.err == nil {
		return w.direct.Write(b)
	}
	if w.full+len(b) > tlsBuffer {
		w.send()
	}
	if w.held == nil {
		w.held = newBuffer(tlsBuffer)
	}
	n := copy((*w.held)[w.full:], b)
	w.full += n
	return n, w.err
}

// gather has records kept back until flush, or until there are many.
func (w *wire) gather() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writers++
}

func (w *wire) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writers--
	w.send()
	return w.err
}

// send writes what has been gathered. The caller holds mu.
func (w *wire) send() {
	if w.full > 0 && w.err == nil {
		var n int
		if n, w.err = w.direct.Write((*w.held)[:w.full]); n < w.full && w.err == nil {
			w.err = io.ErrShortWrite
		}
	}
	w.held.free()
	w.held, w.full = nil, 0
}

// bottom returns the conn below all layers of c.
func bottom(c net.Conn) net.Conn {
	if l, ok := c.(layer); ok {
		if below := l.NetConn(); below != nil {
			return bottom(below)
		}
	}
	return c
}

// reset closes c at once: by a reset where it is TCP, and below any layer that would want to say goodbye first
// (tls.Conn.Close may wait for its peer).
func reset(c net.Conn) {
	if c == nil {
		return
	}
	c = bottom(c)
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(0)
	}
	c.Close()
}

// discard closes a conn that nothing is going on on: it resets it, then closes the layers above.
func discard(c net.Conn) {
	reset(c)
	c.Close()
}

// remoteAddr is the text of c's remote address, if it has one.
func remoteAddr(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil {
		return a.String()
	}
	return ""
}
