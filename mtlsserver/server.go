package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy"
)

// ErrServerClosed is what Run and Reload return when the server has been stopped.
var ErrServerClosed = errors.New("mtlsserver: server closed")

// Options change how a server works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// Logger gets one line for each connection, when it is over, and what lbproxy has to say about upstreams. Of the
	// clients that were refused before they proved who they are, it gets the first 50 lines for each reason in a
	// second, and then one that counts the others. nil means slog.Default().
	Logger *slog.Logger
}

const failureLines = 50

// A Server authenticates the clients of its apps by certificate and forwards those that may reach them. All methods
// are safe for concurrent use.
type Server struct {
	log     *slog.Logger
	gate    gate
	current atomic.Pointer[snapshot]
	serving sync.WaitGroup // calls of Serve, and replaced apps until their last connection has ended
	closing chan struct{}  // closed when stopped is set

	accepts atomic.Uint64 // connections, ever

	reloading sync.Mutex // held by Reload

	mu       sync.Mutex // never held over a handshake, a hook or a line of log
	running  bool
	stopped  bool
	proxies  map[string]*proxy                // by app id; changes only while reloading is held as well
	apps     map[*lbproxy.LBProxyApp]struct{} // theirs, and those replaced until they are drained
	live     map[string]*session              // by connAddr
	failures map[Reason]int                   // refusals in this second; see refused
}

// A session is an authenticated connection, from before it is admitted until its Result is known.
type session struct {
	app    string
	addr   connAddr
	state  tls.ConnectionState
	id     *Identity
	cancel context.CancelCauseFunc
}

// New returns a server for c, which must not be changed afterwards. Its listeners are bound; Run serves them.
func New(c *Config, opts *Options) (*Server, error) {
	s := &Server{
		log:      slog.Default(),
		gate:     gate{from: map[netip.Prefix]int{}},
		closing:  make(chan struct{}),
		apps:     map[*lbproxy.LBProxyApp]struct{}{},
		live:     map[string]*session{},
		failures: map[Reason]int{},
	}
	if opts != nil && opts.Logger != nil {
		s.log = opts.Logger
	}
	s.current.Store(&snapshot{})
	if err := s.Reload(c); err != nil {
		return nil, err
	}
	return s, nil
}

// Addrs returns where each app listens, by its id.
func (s *Server) Addrs() map[string]net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	addrs := map[string]net.Addr{}
	for id, p := range s.proxies {
		addrs[id] = p.listener.Addr()
	}
	return addrs
}

// Run serves until ctx ends. Then it stops accepting, waits for connections to end by themselves, for no longer than
// Config.DrainTimeout, and breaks those that are left, which is an error. Close ends it at once. It can be called
// only once.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	switch {
	case s.stopped:
		s.mu.Unlock()
		return ErrServerClosed
	case s.running:
		s.mu.Unlock()
		return errors.New("mtlsserver: Run was called before")
	}
	s.running = true
	for _, p := range s.proxies {
		s.serve(p)
	}
	s.mu.Unlock()
	var watch sync.WaitGroup
	over := make(chan struct{})
	watch.Go(func() { s.watch(over) })
	defer watch.Wait()
	defer close(over)
	select {
	case <-ctx.Done():
	case <-s.closing:
	}
	drain, cancel := context.WithTimeout(context.Background(), s.current.Load().drain)
	defer cancel()
	var cut atomic.Int64
	s.stop(func(app *lbproxy.LBProxyApp) {
		if app.Shutdown(drain) != nil {
			cut.Add(int64(app.Stats().Open))
			app.Close()
		}
	})
	if n := cut.Load(); n > 0 {
		return fmt.Errorf("mtlsserver: %d connections were still open and have been cut", n)
	}
	return nil
}

// Close stops the server, breaks every connection without waiting for any peer, and returns when all is over. It
// returns nil.
func (s *Server) Close() error {
	s.stop(func(app *lbproxy.LBProxyApp) { app.Close() })
	return nil
}

// stop makes s take nothing more, and has end called for each app.
func (s *Server) stop(end func(*lbproxy.LBProxyApp)) {
	s.mu.Lock()
	if !s.stopped {
		s.stopped = true
		close(s.closing)
		for _, p := range s.proxies {
			p.listener.Close()
		}
	}
	var ending sync.WaitGroup
	for app := range s.apps {
		ending.Go(func() { end(app) })
	}
	s.mu.Unlock()
	ending.Wait()
	s.serving.Wait()
}

// watch ends the sessions whose certificate expires, by the wall clock, which may be set and goes on while the machine
// sleeps; and it counts the refusals that got no line.
func (s *Server) watch(over <-chan struct{}) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for open := true; open; {
		select {
		case <-t.C:
		case <-over:
			open = false
		}
		now := time.Now().Round(0)
		s.sweep(func(l *session) error {
			if now.After(l.id.Expires) {
				return &Refusal{Reason: Expired}
			}
			return nil
		})
		s.mu.Lock()
		failures := s.failures
		s.failures = map[Reason]int{}
		s.mu.Unlock()
		for reason, n := range failures {
			if n > failureLines {
				s.log.Warn("more connections refused", "reason", reason, "count", n-failureLines)
			}
		}
	}
}

// sweep ends the sessions that verdict has something against.
func (s *Server) sweep(verdict func(*session) error) {
	s.mu.Lock()
	live := slices.Collect(maps.Values(s.live))
	s.mu.Unlock()
	for _, l := range live {
		if err := verdict(l); err != nil {
			l.cancel(err)
		}
	}
}

// admit is each connection's way in.
func (p *proxy) admit(ctx context.Context, raw net.Conn) (context.Context, lbproxy.Conn, error) {
	s, start := p.server, time.Now()
	addr := connAddr{raw.RemoteAddr(), s.accepts.Add(1)}
	c, err := p.handshake(ctx, raw)
	var l *session
	if err == nil { // and only now it is the client who says so
		l = &session{app: p.conf.ID, addr: addr, state: c.ConnectionState()}
		l.id, err = s.current.Load().auth.Identify(l.state, l.app)
	}
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
			err = &Refusal{Reason: Reason(lbproxy.EndClosed)}
		}
		s.refused(p.conf.ID, addr, time.Since(start), err)
		return nil, lbproxy.Conn{}, err
	}
	c.addr = addr
	ctx, l.cancel = context.WithCancelCause(ctx)
	s.mu.Lock()
	s.live[addr.String()] = l
	s.mu.Unlock()
	// A reload that came before this could not end the session, so it is judged by the snapshot that is current now;
	// one that comes after it can.
	snap := s.current.Load()
	conn := lbproxy.Conn{Client: c, ClientID: l.id.User.Name}
	if user, err := snap.allows(l); err != nil {
		l.cancel(err)
	} else {
		conn.RateLimit = snap.limit(user, l.app)
	}
	return ctx, conn, nil
}

// handshake lets raw through the gate, by the rules of the current snapshot.
func (p *proxy) handshake(ctx context.Context, raw net.Conn) (*clientConn, error) {
	snap, from := p.server.current.Load(), network(raw.RemoteAddr())
	config := snap.configs[p.conf.ID]
	if config == nil {
		return nil, &Refusal{Reason: AppRemoved}
	}
	deadline := time.Now().Add(snap.handshake.Timeout) // for waiting, too
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	if err := p.server.gate.enter(ctx, from, snap.handshake); err != nil {
		return nil, err
	}
	defer p.server.gate.leave(from, snap.handshake)
	return handshake(raw, config, snap.handshake, deadline)
}

// refused writes the line of a connection that was not admitted.
func (s *Server) refused(app string, addr connAddr, d time.Duration, err error) {
	refusal := &Refusal{Reason: HandshakeFailed, Err: err}
	errors.As(err, &refusal)
	s.mu.Lock()
	s.failures[refusal.Reason]++
	n := s.failures[refusal.Reason]
	s.mu.Unlock()
	if n > failureLines {
		return
	}
	attrs := line(app, addr, refusal.Reason, d)
	if refusal.Serial != "" {
		attrs = append(attrs, slog.String("claimed_serial", string(refusal.Serial)))
	}
	if refusal.Err != nil {
		attrs = append(attrs, slog.String("detail", clean(refusal.Err)))
	}
	s.log.LogAttrs(context.Background(), slog.LevelInfo, "connection", attrs...)
}

// done writes the line of a connection that was admitted.
func (s *Server) done(r lbproxy.Result) {
	s.mu.Lock()
	l := s.live[r.Client]
	delete(s.live, r.Client)
	s.mu.Unlock()
	l.cancel(nil)
	reason, level := Reason(r.End), slog.LevelInfo
	var refusal *Refusal
	switch {
	case r.End == lbproxy.EndNoUpstream, r.End == lbproxy.EndDialFailed, r.End == lbproxy.EndUpstreamError:
		level = slog.LevelWarn
	case errors.As(r.Err, &refusal):
		reason = refusal.Reason
	}
	attrs := append(line(l.app, l.addr, reason, r.Duration),
		slog.String("user", l.id.User.Name), slog.String("serial", string(l.id.Serial)),
		slog.String("upstream", r.Upstream), slog.Int64("sent", r.Sent), slog.Int64("received", r.Received))
	if r.Err != nil && refusal == nil {
		attrs = append(attrs, slog.String("detail", clean(r.Err)))
	}
	s.log.LogAttrs(context.Background(), level, "connection", attrs...)
}

// line is what the lines of all connections have in common.
func line(app string, addr connAddr, reason Reason, d time.Duration) []slog.Attr {
	return []slog.Attr{
		slog.String("app", app), slog.String("client", addr.Addr.String()), slog.Uint64("conn", addr.number),
		slog.String("reason", string(reason)), slog.Duration("duration", d),
	}
}

// clean is err's text as far as a log can bear it: a peer may have had a word in it.
func clean(err error) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, fmt.Sprintf("%.200s", err.Error()))
}

// An appLog passes on what lbproxy says about an app, and not what it says about connections: that it does at level
// Debug, or with the context of the session.
type appLog struct{ slog.Handler }

func (h appLog) Enabled(ctx context.Context, level slog.Level) bool {
	return ctx.Done() == nil && level > slog.LevelDebug && h.Handler.Enabled(ctx, level)
}
