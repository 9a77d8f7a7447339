package mtlsserver

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"time"

	"github.com/danielepagano/lbproxy"
)

// Reload replaces the configuration by c, which must not be changed afterwards. If anything is wrong with it or with a
// file it names, or an address cannot be bound, nothing changes: that includes a server certificate that has expired
// meanwhile, so renew it in time. Else connections that c does not allow are being reset when Reload returns. All others
// live on, and so do listeners whose app and address are the same, what users have spent of limits that are the same, and
// the counts of upstreams of apps that are otherwise the same. A changed limit, idleTimeout or healthCheck is for
// connections that begin from now on.
func (s *Server) Reload(c *Config) error {
	m, err := c.materials()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return ErrServerClosed
	}
	old, next := s.proxies, map[string]*proxy{}
	for i, conf := range c.Apps {
		p, err := s.proxyFor(conf, m.upstreams[i])
		if err != nil {
			for _, p := range next {
				if p != old[p.conf.ID] {
					p.listener.Close()
					p.app.Close()
				}
			}
			return fmt.Errorf("mtlsserver: app %q: %w", conf.ID, err)
		}
		next[conf.ID] = p
	}
	snap := newSnapshot(c, m, s.current.Load())
	s.current.Store(snap)
	s.proxies = next
	for i, conf := range c.Apps {
		p := next[conf.ID]
		if p != old[conf.ID] {
			s.apps[p.app] = struct{}{}
			s.start(p)
		} else if err := p.app.SetUpstreams(m.upstreams[i]); err != nil {
			panic(err) // materials has found them valid
		}
	}
	for id, p := range old {
		if p != next[id] {
			p.listener.Close()
		}
	}
	s.sweep(func(l *session) error {
		_, err := snap.allows(l)
		return err
	})
	return nil
}

// A proxy is an app behind its listener. If anything about it but the upstreams changes another one takes over.
type proxy struct {
	server   *Server
	conf     App // without upstreams
	app      *lbproxy.LBProxyApp
	listener *share
}

// proxyFor returns the proxy there is for an app, or a new one if there is none that can go on. The caller holds mu.
func (s *Server) proxyFor(conf App, upstreams []lbproxy.Upstream) (*proxy, error) {
	conf.Upstreams = nil
	if old := s.proxies[conf.ID]; old != nil && reflect.DeepEqual(old.conf, conf) {
		return old, nil
	}
	opts := lbproxy.Options{IdleTimeout: conf.IdleTimeout, Logger: slog.New(appLog{s.log.Handler()})}
	if hc := conf.HealthCheck; hc != nil {
		opts.HealthCheck = &lbproxy.HealthCheck{Interval: hc.Interval, Timeout: hc.Timeout, Rise: hc.Rise, Fall: hc.Fall}
	}
	l, err := s.listen(conf)
	if err != nil {
		return nil, err
	}
	app, err := lbproxy.New(conf.ID, upstreams, &opts)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &proxy{s, conf, app, l}, nil
}

// listen returns a share of what listens on conf's address: of what is bound already, by the same app or one that gives
// it up, or of what it binds.
func (s *Server) listen(conf App) (*share, error) {
	for id, p := range s.proxies {
		if p.conf.Listen == conf.Listen && (id == conf.ID || portOf(conf.Listen) != 0) {
			return p.listener.port.share(), nil
		}
	}
	return bind(conf.Listen)
}

// start has p serve as soon as the server runs, until p's listener is closed and its last connection has ended.
func (s *Server) start(p *proxy) {
	s.serving.Go(func() {
		select {
		case <-s.running:
		case <-s.closing.Done(): // then Serve closes the listener, and returns
		}
		p.app.Serve(p.listener, p.admit) // its error only says that it was stopped
		p.app.Shutdown(context.Background())
		s.mu.Lock()
		delete(s.apps, p.app)
		s.mu.Unlock()
	})
}

// sweep ends the sessions that verdict has something against.
func (s *Server) sweep(verdict func(*session) error) {
	s.liveMu.Lock()
	defer s.liveMu.Unlock()
	for l := range s.live {
		if err := verdict(l); err != nil {
			l.cancel(err)
		}
	}
}

// watch ends the sessions whose certificate expires, until there are none any more. It goes by the wall clock, which may be
// set, and which goes on while the machine sleeps.
func (s *Server) watch() {
	every := time.NewTicker(time.Second / 2)
	defer every.Stop()
	for {
		select {
		case <-every.C:
		case <-s.over.Done():
			return
		}
		now := time.Now().Round(0)
		s.sweep(func(l *session) error {
			if now.After(l.id.Expires) {
				return &Refusal{Reason: Expired}
			}
			return nil
		})
	}
}

// An appLog passes on what lbproxy says about an app, and not what it says about connections: that it does at level
// Debug, or with the context of the session.
type appLog struct{ slog.Handler }

func (h appLog) Enabled(ctx context.Context, level slog.Level) bool {
	return ctx.Done() == nil && level > slog.LevelDebug && h.Handler.Enabled(ctx, level)
}
