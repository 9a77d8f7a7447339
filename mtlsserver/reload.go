package mtlsserver

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"

	"github.com/danielepagano/lbproxy"
)

// Reload replaces the configuration by c, which must not change afterwards. If there is a problem
// with c or with a file that it names, or if an address cannot be bound, nothing changes. A
// certificate that is in force may have expired, as long as its file is the same: otherwise an
// expired certificate would keep a revocation from taking effect.
//
// Reload resets the connections that c does not allow. All other connections continue. Listeners
// with the same app and address stay open; unchanged limits and upstreams keep their state. Changed
// limits, timeouts and health checks apply to new connections; connections in their handshake get
// the new upstreams. Reload logs the changes and returns them.
func (s *Server) Reload(c *Config) (Changes, error) {
	changes, err := s.reload(c)
	if err == nil {
		s.say(slog.LevelInfo, "reloaded", changes.attrs()...)
		s.warnOfExpiry()
	}
	return changes, err
}

func (s *Server) reload(c *Config) (changes Changes, err error) {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	old := s.current.Load()
	r := &report{config: c}
	snap := r.check()
	r.dates(old.certificates)
	if s.users != nil {
		snap.auth.Users = s.users
		if len(c.Users) > 0 {
			r.add("users", "the server has a store of its own (Options.Users): remove them")
		}
	}
	if err := r.err(); err != nil {
		return changes, err
	}
	snap.keepDrains(old)
	snap.gate = gateFor(c.Handshake, old.gate)
	snap.admin = s.adminHandler(snap)
	installed := false // remains false also if a hook panics
	defer func() {
		if !installed {
			snap.discard(old)
		}
	}()
	configured := s.limits.configure(c.Users, c.DefaultLimit)
	defer func() { configured(installed) }()
	if snap.admins, err = s.adminsFor(r, old.admins); err != nil {
		return changes, err
	}
	for _, conf := range c.Apps {
		app := snap.apps[conf.ID]
		if app.proxy, err = s.proxyFor(app, old); err != nil {
			return changes, fmt.Errorf("mtlsserver: app %q: %w", conf.ID, err)
		}
	}
	if err := s.install(snap, old); err != nil {
		return changes, err
	}
	installed = true
	changes = changesOf(old, snap)
	changes.Ended = s.sweep(s.judge)
	return changes, nil
}

// install makes snap the current snapshot, starts new proxies, and closes the listeners of removed
// ones.
func (s *Server) install(snap, old *snapshot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return ErrServerClosed
	}
	for _, app := range snap.apps {
		s.setUpstreams(app) // before the snapshot admits anybody
	}
	s.current.Store(snap)
	for id, app := range snap.apps {
		if app.proxy != old.proxy(id) {
			s.proxies[app.proxy] = struct{}{}
			s.startProxy(app.proxy)
		}
	}
	for id, app := range old.apps {
		if app.proxy != snap.proxy(id) {
			app.proxy.listener.Close()
		}
	}
	// Do not wait: an old admin server may be answering the request for this reload.
	s.watching.Go(func() { closeAdmins(old.admins, snap.admins) })
	return nil
}

// setUpstreams gives an app's upstreams to its proxy, and to those that the proxy has replaced: a
// connection in its handshake there must not reach upstreams that are removed or drained. The
// caller holds s.mu.
func (s *Server) setUpstreams(app *appRules) {
	for p := range s.proxies {
		if p.conf.ID != app.conf.ID {
			continue
		}
		if err := p.app.SetUpstreams(app.upstreams); err != nil {
			panic(err) // check has validated them
		}
	}
}

// discard closes what a failed reload has made.
func (n *snapshot) discard(old *snapshot) {
	closeAdmins(n.admins, old.admins)
	for id, app := range n.apps {
		if p := app.proxy; p != nil && p != old.proxy(id) {
			p.listener.Close()
			p.app.Close()
		}
	}
}

// A proxy is an app and its listener. A reload that changes the app's options replaces the proxy.
type proxy struct {
	server   *Server
	conf     App // from proxyOptions
	app      *lbproxy.LBProxyApp
	listener *share
	served   chan struct{} // closed when Serve has returned
}

// drain closes p when its connections have ended, or at once when ctx ends. It waits for Serve
// first, because Shutdown resets a connection that is accepted but not yet served.
func (p *proxy) drain(ctx context.Context) {
	p.listener.Close()
	select {
	case <-p.served:
	case <-ctx.Done():
	}
	if p.app.Shutdown(ctx) != nil {
		p.app.Close()
	}
}

// proxyOptions returns a without the fields that a proxy looks up in the current snapshot: changing
// them needs no new proxy.
func (a App) proxyOptions() App {
	a.Upstreams, a.TLS, a.CloseNotify, a.AcceptProxy = nil, nil, "", nil
	return a
}

// proxyFor returns the proxy of an app: the old one if its options are the same, else a new one.
func (s *Server) proxyFor(app *appRules, old *snapshot) (*proxy, error) {
	conf := app.conf.proxyOptions()
	if p := old.proxy(conf.ID); p != nil && reflect.DeepEqual(p.conf, conf) {
		return p, nil
	}
	l, err := s.listen(conf, old)
	if err != nil {
		return nil, err
	}
	opts := s.recorder.Record(conf.ID, conf.options(s.log))
	lb, err := lbproxy.New(conf.ID, app.upstreams, opts)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &proxy{s, conf, lb, l, make(chan struct{})}, nil
}

func (a App) options(log *slog.Logger) *lbproxy.Options {
	opts := &lbproxy.Options{
		IdleTimeout: a.IdleTimeout,
		DialTimeout: a.DialTimeout,
		FailTimeout: a.FailTimeout,
		MaxConns:    a.MaxConns,
		Logger:      slog.New(appLog{log.Handler()}),
	}
	if hc := a.HealthCheck; hc != nil {
		opts.HealthCheck = &lbproxy.HealthCheck{
			Interval: hc.Interval,
			Timeout:  hc.Timeout,
			Rise:     hc.Rise,
			Fall:     hc.Fall,
		}
	}
	return opts
}

// lbproxy returns u as an lbproxy.Upstream without TLS, which upstreamTLS reads from files.
func (u *Upstream) lbproxy() lbproxy.Upstream {
	return lbproxy.Upstream{
		Addr:          u.Addr,
		Weight:        u.Weight,
		MaxConns:      u.MaxConns,
		Drain:         u.Drain,
		ProxyProtocol: u.ProxyProtocol,
	}
}

// listen returns a share of the port at conf's address. A port that the same app, or an app that
// gives up the address, has bound already is shared; otherwise listen binds a new one.
func (s *Server) listen(conf App, old *snapshot) (*share, error) {
	for id, app := range old.apps {
		if app.conf.Listen == conf.Listen && (id == conf.ID || portOf(conf.Listen) != 0) {
			return app.proxy.listener.port.share(), nil
		}
	}
	return bind(s.bind, conf.ID, conf.Listen)
}

// startProxy makes p serve as soon as the server runs, until p's listener is closed and its last
// connection has ended. The caller holds s.mu.
func (s *Server) startProxy(p *proxy) {
	if s.current.Load().admin != nil { // else nothing samples, and the recorder never forgets p.app
		s.recorder.Track(p.app)
	}
	s.serving.Go(func() {
		select {
		case <-s.started.Done():
		case <-s.closing.Done(): // Serve will close the listener and return
		}
		_ = p.app.Serve(p.listener, p.admit) // the error only says that p was stopped
		close(p.served)
		p.app.Shutdown(context.Background())
		s.mu.Lock()
		delete(s.proxies, p)
		s.mu.Unlock()
	})
}
