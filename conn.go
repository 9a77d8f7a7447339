package lbproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
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
//	                             open                                the relay's two goroutines,
//	                               │                                 or a loop: docs/engine.md
//	                               │ both streams ended, or the first failure or Abort
//	                             over: counted out, EventClose, Result, OnDone, log
//
// The last part runs where the relay ends, or in ServeConn's caller, which waits for it.

// A Conn is one client connection: the caller's description of it, and a handle on it. It must not
// be copied after first use.
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
	// connection below a layer such as TLS. SetLinger(int) error, on the lowest connection, makes
	// Close send a reset. A wrapper around a TCP connection should have the first two: without them
	// its other end may lose the last bytes it was sent, and Result.Err says so. (A net.Pipe has
	// none of them.)
	//
	// crypto/tls reports a client's FIN without close_notify as the end of its stream. To have such
	// a stream treated as aborted, use a [TLSConn], whose Read returns io.ErrUnexpectedEOF then.
	Client net.Conn

	// ClientAddr is the client's address, for limits, logs and PROXY headers. nil means
	// Client.RemoteAddr(). AcceptProxy sets it.
	ClientAddr net.Addr

	// ServerAddr is the address that the client connected to. nil means Client.LocalAddr().
	ServerAddr net.Addr

	// ClientID names the client in events, results, logs and PROXY v2 headers. It may be empty.
	ClientID string

	// Verified says that ClientID was proved, by a certificate for example. PROXY v2 headers
	// tell the upstream.
	Verified bool

	// RateLimit receives the connection's events, the first before it is served. It may refuse,
	// reset or slow the connection. nil means no limit.
	RateLimit RateLimitManager

	// Value is the caller's own. The app does not look at it.
	Value any

	// OnRefused may send a final response, such as an HTTP 503, to a client that is over its rate
	// limit when it connects, or for whom there is no upstream. err is Result.Err: it matches
	// ErrRateLimited, ErrNoUpstream or *DialError. OnRefused is not called for a connection that
	// was aborted. nil means that such clients are reset.
	//
	// It runs on a goroutine of its own, after the connection has left the counts. c has a write
	// deadline of one second; reads fail. If Client is a TLSConn, its handshake must be complete,
	// and writes are encrypted. c is closed when OnRefused has returned and the client has ended
	// its stream, or after another second. At most 256 of them run at once per app; beyond that
	// clients are reset. Shutdown and Close do not wait for it; Close resets its c.
	OnRefused func(c net.Conn, err error)

	// OnDone is called once, when the connection is over and out of all counts, just before
	// Options.OnDone. nil means no call.
	OnDone func(Result)

	mu      sync.Mutex // guards what follows; held over no I/O, hook or foreign method
	session *session   // nil before Serve or ServeConn has taken it, and after the end
	info    *ConnInfo  // nil before the end
	cause   *ending    // of an Abort, a Close or a refusal; it counts until the relay begins

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

// Info returns a snapshot of c. After the end it no longer changes.
func (c *Conn) Info() ConnInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.session != nil:
		return c.session.info()
	case c.info != nil:
		return *c.info
	}
	return ConnInfo{}
}

// Abort ends c with cause; nil means context.Canceled. Both sides are reset. It may be called any
// number of times; the first cause counts and becomes Result.Err, with EndCanceled. It does not
// wait for the client, the upstream or a hook. During admit it resets the accepted connection and
// cancels admit's context with cause. A Conn that is aborted before ServeConn is not served:
// ServeConn resets Client and returns cause. After the end it does nothing.
func (c *Conn) Abort(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	c.abort(&ending{EndCanceled, cause})
}

func (c *Conn) abort(e *ending) {
	c.mu.Lock()
	s := c.session
	if c.cause == nil && c.info == nil {
		c.cause = e
	}
	switch {
	case s == nil:
		c.mu.Unlock()
	case s.relay != nil: // which has a cause of its own
		c.mu.Unlock()
		s.relay.Abort(e)
	case s.loop != nil: // or is about to go on by a relay, which looks for a cause first
		c.mu.Unlock()
		s.stop(e)
		s.loop.Abort(e)
	default: // also after admit has rejected it, while what admit wrote is on its way
		raw := s.raw
		c.mu.Unlock()
		defer s.app.logConnPanic() // of raw's methods
		defer relay.Reset(raw)
		defer s.stop(e)
		if l, ok := relay.Underlying(raw).(interface{ SetLinger(int) error }); ok {
			l.SetLinger(0) // first: a TLS handshake closes it when its context ends
		}
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

// A connContext is a context that has its Conn as a value. Most sessions need no other.
type connContext struct{ conn *Conn }

func (connContext) Deadline() (t time.Time, ok bool) { return t, false }
func (connContext) Done() <-chan struct{}            { return nil }
func (connContext) Err() error                       { return nil }

func (c connContext) Value(key any) any {
	if key == (connKey{}) {
		return c.conn
	}
	return nil
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

// A Result reports how one connection ended.
type Result struct {
	Conn           *Conn
	App, ClientID  string
	Client         string        // the client's address
	Upstream       string        // the upstream's Addr; empty if none was reached
	Attempts       int           // dials tried
	DialTime       time.Duration // of the dial that succeeded, PROXY header and TLS included, or 0
	Start          time.Time     // when it was accepted or given to ServeConn
	Duration       time.Duration // since Start, so with Serve the time in admit is in it
	Sent, Received int64         // bytes client to upstream, upstream to client
	End            EndReason
	Err            error // why it ended, such as the cause of its context or Abort; nil: cleanly
}

// LogValue implements [slog.LogValuer], so slog.Info("connection", "", result) in an OnDone is an
// access log. The value is a group of app, end, client, upstream, attempts, duration, sent and
// received, and of client_id and err unless they are empty. With an empty key, as here, the fields
// are not nested. duration is a [time.Duration]: nanoseconds in JSON.
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
	EndClientClosed  EndReason = "client-closed"  // idle TLS connection closed without close_notify
	EndNotAdmitted   EndReason = "not-admitted"   // admit returned an error
	EndRateLimited   EndReason = "rate-limited"   // refused (Attempts is 0) or reset by a limit
	EndNoUpstream    EndReason = "no-upstream"    // every upstream is full, down or draining
	EndDialFailed    EndReason = "dial-failed"    // each upstream that was tried failed: see Err
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

// ServeConn serves one client: it asks c.RateLimit, chooses an upstream, dials it, goes on to the
// next one while that fails, and copies bytes both ways until both sides have ended. It blocks
// until the connection is over and always closes c.Client. The error is Result.Err. A Conn can be
// served once; a second call returns [ErrConnUsed] and touches nothing.
//
// When one side ends its stream, the other is told (CloseWrite) and may go on with its own. When a
// side fails, what was read from it is still delivered, for at most a second, and then the other
// side is reset rather than closed, so that nobody takes an aborted stream for a whole one. Clients
// for whom there is no upstream, or that are over their rate limit, are reset unless c.OnRefused is
// set. Unix sockets have no reset; they are closed.
//
// After Shutdown or Close, ServeConn resets the client at once. The Result has EndClosed, the
// OnDone hooks are called, and Stats does not count the connection.
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
		s.endBy(&ending{EndClosed, ErrAppClosed})
		s.settle()
		s.report()
		return *s.result, s.result.Err
	}
	if ctx.Err() != nil {
		c.abort(&ending{EndCanceled, context.Cause(ctx)})
	} else if ctx.Done() != nil {
		defer after(ctx, func() { c.abort(&ending{EndCanceled, context.Cause(ctx)}) })()
	}
	s.serve()
	if p := s.outcome.Panic; p != nil {
		panic(p)
	}
	return *s.result, s.result.Err
}

// AcceptProxy returns an AdmitFunc that reads a PROXY protocol header, version 1 or 2, from clients
// at trusted addresses, which are other proxies. It sets ClientAddr and ServerAddr by the header,
// then asks next; a nil next admits everyone. A trusted client must send a header within 3 seconds,
// or it is rejected. The TLVs of a header of version 2, up to 4 KiB, are ignored. The addresses
// stay unset if the header is LOCAL or UNKNOWN. The read deadline is cleared before next is asked.
// Anybody else keeps their address, and their bytes are never taken for a header.
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
