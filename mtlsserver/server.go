package mtlsserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// ErrServerClosed is the error of a Server that has been stopped.
var ErrServerClosed = errors.New("mtlsserver: server closed")

// Options change how a server works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// Logger gets one line for each connection, when it is over, what lbproxy says about
	// upstreams, and warnings. Lines are written by a goroutine of their own, so a Logger that
	// blocks holds nothing up: 4,096 lines wait, more are dropped and counted. nil means
	// slog.Default().
	Logger *slog.Logger

	// RefusalLines is how many refused connections a second, for each Reason, have a line of their
	// own. The others are counted in one. 0 means 10, negative means all of them.
	RefusalLines int

	// Users, if set, takes the place of Config.Users, which must be empty. Call Server.Recheck
	// when users have changed.
	Users Users

	// NewLimit returns what bounds a user's connections to one app, or to all of them together
	// (app is empty); nil sets no bound. It is called once for each limit of a configuration, and
	// again only when the limit has changed. For users of a store of your own it is called when
	// they connect, and again after their limit was idle. It must not call the Server. A nil
	// NewLimit keeps limits in memory.
	NewLimit func(user, app string, l Limit) lbproxy.RateLimitManager

	// Listen returns the listener of an app whose address is addr, also when a reload has changed
	// that. The Server closes it. It must have the method SetDeadline, as listeners of package net
	// have. It must not call the Server. nil means lbproxy.Listen.
	Listen func(app, addr string) (net.Listener, error)

	// Reload is called when an administrator asks for a reload (see Config.Admin). It is expected
	// to call Server.Reload with a new Config. nil means that this is not offered.
	Reload func() (Changes, error)
}

// A Server authenticates the clients of its apps by certificate and forwards those that may reach
// them. All methods are safe for concurrent use.
type Server struct {
	log      *slog.Logger
	lines    logqueue.Queue[line]
	refusals refusals
	users    Users // of Options; may be nil
	onReload func() (Changes, error)
	recorder admin.Recorder
	limits   limits
	bind     func(app, addr string) (net.Listener, error)
	current  atomic.Pointer[snapshot]
	running  chan struct{}   // closed by Run
	closing  context.Context // ends when the server is stopped,
	close    func()          // by this, which is called under mu
	cut      atomic.Int64    // connections of users that a drain or Close had to cut
	serving  sync.WaitGroup  // nothing is added when the server has been stopped, but by stop itself

	over     context.Context // ends when the server has been stopped and nothing is served any more,
	end      func()          // by this
	watching sync.WaitGroup

	reloading sync.Mutex              // held by Reload: one at a time
	drains    map[appUpstreamKey]bool // what administrators have set; guarded by reloading

	mu      sync.Mutex // guards what follows; held over no I/O and no hook
	ran     bool
	proxies map[*proxy]struct{} // those current, and those replaced until their last connection has ended

	liveMu sync.Mutex
	live   map[*session]struct{}
	open   map[userApp]int   // of live
	denied map[Reason]uint64 // connections ended by a Refusal
}

// New returns a server for c, which must not be changed afterwards. Its listeners are bound and its
// health checks have begun; Run serves. If Run is not called, Close must be.
func New(c *Config, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s := &Server{
		log:      cmp.Or(opts.Logger, slog.Default()),
		refusals: refusals{most: cmp.Or(opts.RefusalLines, 10), seconds: map[Reason]*second{}},
		users:    opts.Users,
		onReload: opts.Reload,
		limits:   limits{make: opts.NewLimit, kept: map[limitKey]*keptLimit{}},
		running:  make(chan struct{}),
		proxies:  map[*proxy]struct{}{},
		bind:     opts.Listen,
		drains:   map[appUpstreamKey]bool{},
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
	s.closing, s.close = context.WithCancel(context.Background())
	s.over, s.end = context.WithCancel(context.Background())
	s.current.Store(&snapshot{})
	if _, err := s.reload(c); err != nil {
		return nil, err
	}
	s.warnOfExpiry()
	return s, nil
}

// Addrs returns where each app listens, by its id.
func (s *Server) Addrs() map[string]net.Addr {
	addrs := map[string]net.Addr{}
	for id, p := range s.current.Load().proxies {
		addrs[id] = p.listener.Addr()
	}
	return addrs
}

// Apps returns what serves each app now, by its id. A reload may replace one.
func (s *Server) Apps() map[string]*lbproxy.LBProxyApp {
	apps := map[string]*lbproxy.LBProxyApp{}
	for id, p := range s.current.Load().proxies {
		apps[id] = p.app
	}
	return apps
}

// Certificates returns the certificates in force: the server's, the CAs, and those for upstreams.
func (s *Server) Certificates() []Certificate {
	return append([]Certificate(nil), s.current.Load().certificates...)
}

// Run serves until ctx ends. Then it stops accepting and waits for connections to end by
// themselves, for Config.DrainTimeout at most, and cuts those that are left. Close ends it at once.
// It returns nil if no connection was cut, else an error. It can be called only once.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	ran, closed := s.ran, s.closing.Err() != nil
	if !ran && !closed {
		s.ran = true
		s.watching.Go(s.watch)
	}
	s.mu.Unlock()
	switch {
	case closed:
		return ErrServerClosed
	case ran:
		return errors.New("mtlsserver: Run was called before")
	}
	close(s.running)
	select {
	case <-ctx.Done():
	case <-s.closing.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), s.current.Load().drain)
	defer cancel()
	s.stop(func(p *proxy) { p.drain(drain) })
	if n := s.cut.Load(); n > 0 {
		return fmt.Errorf("mtlsserver: connections were still open and have been cut: %d", n)
	}
	return nil
}

// Close stops the server, cuts every connection without waiting for any peer, and returns when all
// is over and the log is written, or after a second if that blocks. It returns nil.
func (s *Server) Close() error {
	s.stop(func(p *proxy) { p.app.Close() })
	return nil
}

// stop makes s take nothing more, calls end for each proxy, and returns when all is over.
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

// Recheck judges all live connections again, by the users that there are now, and ends those that
// are not allowed any more. It returns how many.
func (s *Server) Recheck() int { return s.sweep(s.current.Load().judge) }

// sweep ends the sessions for which verdict returns an error.
func (s *Server) sweep(verdict func(*session) error) (ended int) {
	s.liveMu.Lock()
	live := make([]*session, 0, len(s.live))
	for l := range maps.Keys(s.live) {
		live = append(live, l)
	}
	s.liveMu.Unlock()
	for _, l := range live {
		if err := verdict(l); err != nil {
			l.conn.Abort(err)
			ended++
		}
	}
	return ended
}

// watch does what has to be done now and then, until nothing is served any more. It goes by the
// wall clock, which may be set, and which goes on while the machine sleeps.
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
		s.endExpired(now)
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

// endExpired ends the sessions whose certificates have expired.
func (s *Server) endExpired(now time.Time) {
	var expired []*session
	s.liveMu.Lock()
	for l := range s.live {
		if now.After(l.id.Load().Expires) {
			expired = append(expired, l)
		}
	}
	s.liveMu.Unlock()
	for _, l := range expired {
		l.conn.Abort(&Refusal{Reason: Expired})
	}
}

// warnOfExpiry writes which certificates in force expire within 30 days, or have expired.
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
		s.say(slog.LevelWarn, text, slog.String("key", c.Key), slog.String("file", c.File),
			slog.String("subject", clean(c.Subject, 200)), slog.Time("not_after", c.NotAfter), slog.Int("days_left", int(left.Hours()/24)))
	}
}
