package mtlsserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"

	"github.com/danielepagano/lbproxy"
)

// ErrServerClosed is what Run and Reload return when the server has been stopped.
var ErrServerClosed = errors.New("mtlsserver: server closed")

// Options change how a server works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// Logger gets one line for each connection, when it is over, and what lbproxy has to say about upstreams. nil means
	// slog.Default().
	Logger *slog.Logger
}

// A Server authenticates the clients of its apps by certificate and forwards those that may reach them. All methods
// are safe for concurrent use.
type Server struct {
	log     *slog.Logger
	current atomic.Pointer[snapshot]
	running chan struct{}   // closed by Run
	closing context.Context // ends when the server is stopped,
	close   func()          // by this, which is called under mu
	serving sync.WaitGroup  // nothing is added when the server has been stopped, but by stop itself

	over     context.Context // ends when the server has been stopped and nothing is served any more,
	end      func()          // by this
	watching sync.WaitGroup

	mu      sync.Mutex // never held over a handshake, a hook or a line of log
	ran     bool
	proxies map[string]*proxy                // by app id
	apps    map[*lbproxy.LBProxyApp]struct{} // theirs, and those replaced until their last connection has ended

	liveMu sync.Mutex // may be held when mu is
	live   map[*session]struct{}
}

// New returns a server for c, which must not be changed afterwards. Its listeners are bound and its health checks have
// begun; Run serves. Close ends it if Run is not to be called.
func New(c *Config, opts *Options) (*Server, error) {
	s := &Server{
		log:     slog.Default(),
		running: make(chan struct{}),
		apps:    map[*lbproxy.LBProxyApp]struct{}{},
		live:    map[*session]struct{}{},
	}
	s.closing, s.close = context.WithCancel(context.Background())
	s.over, s.end = context.WithCancel(context.Background())
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
	var cut atomic.Int64
	s.stop(func(app *lbproxy.LBProxyApp) {
		if app.Shutdown(drain) != nil {
			cut.Add(int64(app.Stats().Open))
			app.Close()
		}
	})
	if n := cut.Load(); n > 0 {
		return fmt.Errorf("mtlsserver: connections still open at the drainTimeout, and cut: %d", n)
	}
	return nil
}

// Close stops the server, breaks every connection without waiting for any peer, and returns when all is over. It
// returns nil.
func (s *Server) Close() error {
	s.stop(func(app *lbproxy.LBProxyApp) { app.Close() })
	return nil
}

// stop makes s take nothing more, has end called for each app, and returns when all is over.
func (s *Server) stop(end func(*lbproxy.LBProxyApp)) {
	s.mu.Lock()
	s.close()
	for app := range s.apps {
		s.serving.Go(func() { end(app) })
	}
	s.mu.Unlock()
	s.serving.Wait()
	s.end()
	s.watching.Wait()
}
