package lbproxy

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"time"

	"github.com/danielepagano/lbproxy/internal/loop"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// A session drives one Conn from when it is counted in until its Result is known. Its fields
// belong to one goroutine at a time: Serve's or ServeConn's until Connect, then the relay's (or its
// loop's: see loops.go), then the one that calls finish. Conn.mu guards the fields that others may
// read.
type session struct {
	app     *LBProxyApp
	conn    *Conn
	raw     net.Conn // what was accepted; admit may have wrapped it
	start   time.Time
	ctx     context.Context // ends with the session where a hook is there to see it
	element *list.Element   // of app.sessions; belongs to app.mu

	client   net.Conn       // what is relayed: conn.Client as admit left it
	finding  *finding       // while it looks for an upstream: a pick in it is to be settled
	upstream *upstream      // what it is counted on
	unlost   func()         // ends what CloseOnDown waits for; nil: nothing
	dialTime time.Duration  // of the attempt that succeeded
	done     chan struct{}  // closed by Done where a goroutine waits to finish the session
	outcome  *relay.Outcome // why it ended; nil before the end
	result   *Result        // set by settle

	attempts int32
	accepted bool // by Serve: it has a slot, its end is logged, and no caller waits for it
	opened   bool // the RateLimit is owed an EventClose
	keep     bool // client outlives the relay, for OnRefused
	reached  bool // an upstream, while it was on a loop

	isOver bool // guarded by conn.mu, like all that follows
	relay  *relay.Relay
	loop   *loop.Session // on which it is, or was before relay
	state  ConnState
	addr   string                  // of the upstream that was dialed last
	cancel context.CancelCauseFunc // of ctx; nil if that does not end
	undial context.CancelFunc      // ends the dial in progress, or one before; nil before any
}

// begin makes a session of c, or returns nil if c has had one.
func (a *LBProxyApp) begin(ctx context.Context, c *Conn) *session {
	s := &session{app: a, conn: c, raw: c.Client, start: time.Now(), state: ConnAdmitting}
	s.ctx = connContext{c}
	if ctx != context.Background() {
		s.ctx = context.WithValue(context.WithoutCancel(ctx), connKey{}, c)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session != nil || c.info != nil {
		return nil
	}
	c.session = s
	s.isOver = c.cause != nil // aborted before
	return s
}

// endCtx makes ctx end with the session, for hooks. A session that has none is spared the cost.
func (s *session) endCtx() {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.cancel == nil {
		s.ctx, s.cancel = context.WithCancelCause(s.ctx)
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
	defer s.app.logConnPanic()
	if admit == nil || s.admit(admit) {
		s.serve()
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
			defer s.finish() // also if a method of raw panics
			s.endBy(s.conn.decide(e))
			relay.Linger(s.ctx, s.raw)
		}
	}()
	s.endCtx()
	if err := f(s.ctx, s.conn); err != nil {
		e = &ending{EndNotAdmitted, err}
		return false
	}
	return true
}

// serve asks the RateLimitManager, connects, and starts the relay. It returns when the relay has
// taken over; for ServeConn, which waits, when the session is over.
func (s *session) serve() {
	e := &ending{EndCanceled, relay.ErrPanicked} // unless the hooks return
	defer func() {
		if e != nil {
			s.giveUp(e)
		}
	}()
	s.hold()
	s.setState(ConnDialing, "") // also while the RateLimitManager is asked
	delay, chunk, failed := s.open()
	if failed == nil && (!s.accepted || delay > 0 || !s.moveToLoop(chunk)) {
		failed = s.join(delay, chunk)
	}
	if e = failed; e == nil && !s.accepted {
		<-s.done
		s.finish()
	}
}

// join starts the relay and finds it a server.
func (s *session) join(delay time.Duration, chunk int) *ending {
	if failed := s.startRelay(chunk); failed != nil {
		return failed
	}
	s.pause(delay)
	server, failed := s.connect()
	if failed != nil {
		return failed
	}
	if !s.accepted {
		s.done = make(chan struct{})
	}
	s.relay.Connect(server) // which asks server for the connections below it
	return nil
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
	s.endFinding()
	if s.relay == nil {
		defer s.finish() // also if a method of client panics
		e = s.conn.decide(e)
		s.endBy(e)
		if s.keep = s.reserveLastWord(e); !s.keep {
			relay.Reset(s.client)
		}
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

// endBy notes why the session ends, if no relay and no loop says so.
func (s *session) endBy(e *ending) { s.outcome = &relay.Outcome{Err: e} }

func (s *session) setState(state ConnState, addr string) {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	s.state, s.addr, s.undial = state, addr, nil
}

// Moved implements relay.Handler: it counts n bytes from a side and asks the RateLimitManager.
func (s *session) Moved(from relay.Side, n int) relay.Verdict {
	way, total := Upload, &s.upstream.sent
	if from == relay.Server {
		way, total = Download, &s.upstream.received
	}
	total.Add(uint64(n))
	limit := s.conn.RateLimit
	if limit == nil {
		return relay.Verdict{}
	}
	e := s.event(EventData)
	e.Direction, e.Bytes = way, int64(n)
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
	s.outcome = &o
	if o.Panic != nil && s.accepted { // ServeConn passes it on
		s.app.logPanic("serving a connection", o.Panic, "")
	}
	if s.done != nil {
		close(s.done)
		return
	}
	defer s.app.logConnPanic()
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
			s.conn.RateLimit.Report(context.WithoutCancel(s.ctx), s.event(EventClose))
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
	defer s.app.logConnPanic() // of LastWord, too
	defer s.release()
	defer relay.LastWord(s.client)
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

// info describes s. The caller holds conn.mu.
func (s *session) info() ConnInfo {
	info := ConnInfo{Upstream: s.addr, Start: s.start, State: s.state}
	if s.loop != nil {
		info.Sent, info.Received = s.loop.Counts()
	}
	if s.relay != nil {
		sent, received := s.relay.Counts()
		info.Sent += sent
		info.Received += received
	}
	return info
}

// settle decides what the Result is, and lets go of the connection.
func (s *session) settle() {
	c := s.conn
	if !s.keep {
		defer s.release()
	}
	s.stub() // if admit has rejected it
	end, err := s.verdict()
	c.mu.Lock()
	info := s.info()
	info.State = ConnOver
	c.session, c.info = nil, &info
	c.mu.Unlock()
	s.result = &Result{
		Conn: c, App: s.app.id, ClientID: c.ClientID, Attempts: int(s.attempts), DialTime: s.dialTime,
		Start: s.start, Duration: time.Since(s.start), Sent: info.Sent, Received: info.Received,
		End: end, Err: err,
	}
	if s.outcome.Connected || s.reached {
		s.result.Upstream = info.Upstream
	}
	s.stop(err)
	c.tls = nil
	s.result.Client = c.clientAddr() // last: the method is somebody else's, and may panic
}

// release lets go of what a Conn that is kept after the end must not hold, and closes what the end
// has left open.
func (s *session) release() {
	c := s.conn.Client
	if t, ok := c.(*TLSConn); ok {
		t.release()
	}
	switch {
	case s.client == nil && !isSame(s.raw, c):
		c.Close() // admit has wrapped what it rejected
	case s.client != nil && !isSame(s.raw, s.client):
		s.raw.Close() // admit has replaced or wrapped it
	}
}

// verdict names the outcome.
func (s *session) verdict() (EndReason, error) {
	o := s.outcome
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
		defer done(*s.result) // also if the connection's own panics
	}
	if done := s.conn.OnDone; done != nil {
		done(*s.result)
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
	s.app.lines.Add(context.WithoutCancel(s.ctx), s.app.logger(), level,
		"lbproxy: connection ended", s.result.attrs)
}

func (s *session) event(kind EventKind) Event {
	return Event{Kind: kind, App: s.app.id, ClientID: s.conn.ClientID}
}

// hold takes the client from the Conn. It is called before anybody can get the Conn from Conns.
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
