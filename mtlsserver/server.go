package mtlsserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// ErrServerClosed is returned by calls of Run and Reload that are made after Close, or after Run
// has begun to drain.
var ErrServerClosed = errors.New("mtlsserver: server closed")

// Options change how a server works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// Logger gets a line for each connection that has ended, lbproxy's lines about upstreams, and
	// warnings. A separate goroutine writes them, so that a Logger that blocks delays no
	// connection: up to 4,096 lines wait, more are dropped and counted. nil means slog.Default().
	Logger *slog.Logger

	// RefusalLines bounds the refused connections that get a line of their own, per second and
	// Reason. One more line counts the others. 0 means 10, negative means no bound.
	RefusalLines int

	// Users, if set, replaces Config.Users, which must be empty. Call Server.Recheck after users
	// have changed.
	Users Users

	// NewLimit returns the manager that enforces a user's limit for one app, or for all apps
	// together if app is empty; nil sets no bound. It is called once for each limit of a
	// configuration, and again only when the limit has changed. With Options.Users it is called
	// when a user connects, and again after the limit was idle. It must not call the Server. If
	// NewLimit is nil, limits are kept in memory.
	NewLimit func(user, app string, l Limit) lbproxy.RateLimitManager

	// Listen returns the listener for an app's address, at the start and when a reload has changed
	// the address. The Server closes it. The listener must have a SetDeadline method, as package
	// net's listeners have. Listen must not call the Server. nil means lbproxy.Listen.
	Listen func(app, addr string) (net.Listener, error)

	// Reload is called when an administrator asks for a reload (see Config.Admin). It should call
	// Server.Reload with a new Config. If it is nil, administrators cannot reload.
	Reload func() (Changes, error)

	// Sections returns more facts for administrators: on the status page, in /api/stats and as
	// metrics. It is called for each request and must not wait. nil means none.
	Sections func() []admin.Section
}

// A Server authenticates the clients of its apps by certificate and forwards those that may reach
// them. All methods are safe for concurrent use.
type Server struct {
	log      *slog.Logger
	lines    logqueue.Queue[line]
	refusals refusals
	users    Users // of Options; may be nil
	onReload func() (Changes, error)
	sections func() []admin.Section
	recorder admin.Recorder
	limits   limits
	bind     func(app, addr string) (net.Listener, error)
	current  atomic.Pointer[snapshot]
	started  context.Context // ends when Run is called
	start    func()          // ends started; called under mu
	closing  context.Context // ends when the server is stopped
	close    func()          // ends closing; called under mu
	wasReset atomic.Int64    // users' connections that a drain or Close has reset
	serving  sync.WaitGroup  // once closing has ended, only stop adds to it

	over     context.Context // ends when the server is stopped and every connection has ended
	end      func()          // ends over
	watching sync.WaitGroup

	reloading sync.Mutex // held by reload and drainUpstream, so that only one runs at a time

	mu      sync.Mutex          // guards proxies; not held over I/O or hooks
	proxies map[*proxy]struct{} // current ones, and replaced ones that still have connections

	liveMu sync.Mutex
	live   map[*session]struct{}
	open   map[userApp]int   // live sessions by user and app
	denied map[Reason]uint64 // connections ended by a Refusal
}

// New returns a server for c, which must not change afterwards. New binds the listeners and starts
// the health checks; Run serves. A server that is not run must be closed.
func New(c *Config, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s := &Server{
		log:      cmp.Or(opts.Logger, slog.Default()),
		refusals: refusals{most: cmp.Or(opts.RefusalLines, 10), seconds: map[Reason]*second{}},
		users:    opts.Users,
		onReload: opts.Reload,
		sections: opts.Sections,
		limits:   limits{make: opts.NewLimit, kept: map[limitKey]*keptLimit{}},
		proxies:  map[*proxy]struct{}{},
		bind:     opts.Listen,
		live:     map[*session]struct{}{},
		open:     map[userApp]int{},
		denied:   map[Reason]uint64{},
	}
	for _, reason := range allReasons {
		s.denied[reason] = 0
	}
	if s.limits.make == nil {
		s.limits.make = func(_, _ string, l Limit) lbproxy.RateLimitManager { return l.manager() }
	}
	if s.bind == nil {
		s.bind = func(_, addr string) (net.Listener, error) { return lbproxy.Listen(addr) }
	}
	s.lines.Write, s.lines.Dropped = s.write, s.writeDropped
	s.started, s.start = context.WithCancel(context.Background())
	s.closing, s.close = context.WithCancel(context.Background())
	s.over, s.end = context.WithCancel(context.Background())
	s.current.Store(&snapshot{config: &Config{}})
	if _, err := s.reload(c); err != nil {
		return nil, err
	}
	s.warnOfExpiry()
	return s, nil
}

// Addrs returns the address that each app listens on, by the app's id.
func (s *Server) Addrs() map[string]net.Addr {
	addrs := map[string]net.Addr{}
	for id, a := range s.current.Load().apps {
		addrs[id] = a.proxy.listener.Addr()
	}
	return addrs
}

// Apps returns the lbproxy app that serves each App, by its id. A reload may replace it. The map is
// the caller's, but the apps are the server's: the caller may read them and abort their
// connections, and must not change or close them.
func (s *Server) Apps() map[string]*lbproxy.LBProxyApp {
	apps := map[string]*lbproxy.LBProxyApp{}
	for id, a := range s.current.Load().apps {
		apps[id] = a.proxy.app
	}
	return apps
}

// Certificates returns the certificates in force: the server's, the CAs, and those for upstreams.
func (s *Server) Certificates() []Certificate {
	return append([]Certificate(nil), s.current.Load().certificates...)
}

// Run serves until ctx ends. Then it drains: it stops accepting, waits up to Config.DrainTimeout
// for connections to end, and resets the rest. Close ends Run at once. Run returns nil if neither
// the drain nor Close has reset a user's connection; otherwise the error says how many. Run can be
// called only once.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	ran, closed := s.started.Err() != nil, s.closing.Err() != nil
	if !ran && !closed {
		s.watching.Go(s.watch)
		s.start()
	}
	s.mu.Unlock()
	switch {
	case closed:
		return ErrServerClosed
	case ran:
		return errors.New("mtlsserver: Run was called before")
	}
	select {
	case <-ctx.Done():
	case <-s.closing.Done():
	}
	patience := s.current.Load().drainTimeout()
	drain, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.stop(func(p *proxy) { p.drain(drain) })
	if n := s.wasReset.Load(); n > 0 {
		return fmt.Errorf("mtlsserver: connections were still open and have been reset: %d", n)
	}
	return nil
}

// Close stops the server and resets every connection without waiting for clients or upstreams. It
// returns when all connections have ended and the log is written, or a second later if the Logger
// blocks. The error is always nil.
func (s *Server) Close() error {
	s.stop(func(p *proxy) { p.app.Close() })
	return nil
}

// stop makes s reject new proxies, calls end for each proxy, and returns when all connections have
// ended and the log is written.
func (s *Server) stop(end func(*proxy)) {
	s.mu.Lock()
	s.close()
	for p := range s.proxies {
		s.serving.Go(func() { end(p) })
	}
	s.mu.Unlock()
	s.serving.Wait()
	s.end()
	s.watching.Wait()
	for _, a := range s.current.Load().admins {
		a.Close()
	}
	s.sayWithheld()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.lines.Flush(ctx)
}

// Recheck looks up the user of every live connection again and ends the connections that are no
// longer allowed. It returns their number.
func (s *Server) Recheck() int { return s.sweep(s.judge) }

// judge returns an error if the current snapshot does not allow l. Otherwise it updates l's
// Identity.
func (s *Server) judge(l *session) error {
	for {
		snap := s.current.Load()
		if err := snap.judge(l); err != nil {
			return err
		}
		// A reload meanwhile may have judged l before snap replaced its Identity.
		if s.current.Load() == snap {
			return nil
		}
	}
}

// sweep ends the sessions for which verdict returns an error. It returns their number, without the
// sessions that an overlapping sweep has ended.
func (s *Server) sweep(verdict func(*session) error) (ended int) {
	s.liveMu.Lock()
	live := slices.AppendSeq(make([]*session, 0, len(s.live)), maps.Keys(s.live))
	s.liveMu.Unlock()
	for _, l := range live {
		if err := verdict(l); err != nil && l.end(err) {
			ended++
		}
	}
	return ended
}

// watch does the periodic work until every connection has ended. It compares wall clock times, as
// certificates do: the monotonic clock may stop while the machine sleeps.
func (s *Server) watch() {
	every := time.NewTicker(time.Second / 2)
	defer every.Stop()
	tomorrow := time.Now().Round(0).Add(24 * time.Hour)
	for tick := 0; ; tick++ {
		select {
		case <-every.C:
		case <-s.over.Done():
			return
		}
		now := time.Now().Round(0)
		s.sweep(func(l *session) error { return l.expired(now) })
		s.sayWithheld()
		if tick%4 == 0 {
			s.sampleForAdmins()
		}
		if tick%120 == 0 {
			s.limits.forgetIdle()
		}
		if now.After(tomorrow) {
			s.warnOfExpiry()
			tomorrow = now.Add(24 * time.Hour)
		}
	}
}

// warnOfExpiry logs each certificate in force that has expired or expires within 30 days.
func (s *Server) warnOfExpiry() {
	for _, c := range s.current.Load().certificates {
		left := time.Until(c.NotAfter)
		if left > 30*24*time.Hour {
			continue
		}
		text := "certificate expires soon"
		if left < 0 {
			text = "certificate has expired"
		}
		s.say(slog.LevelWarn, text,
			slog.String("key", c.Key),
			slog.String("file", c.File),
			slog.String("subject", clean(c.Subject, 200)),
			slog.Time("not_after", c.NotAfter),
			slog.Int("days_left", int(left.Hours()/24)))
	}
}
