package mtlsserver

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"

	"github.com/danielepagano/lbproxy"
)

// Reload replaces the configuration by c, which must not be changed afterwards. If anything is
// wrong with c or with a file that it names, or an address cannot be bound, nothing changes. A
// certificate in force that has expired is no reason to refuse c, if its file is the same: users
// can always be removed.
//
// Connections that c does not allow are being reset when Reload returns. All others live on, and
// so do listeners whose app and address are the same, what users have spent of limits that are the
// same, and the counts of upstreams. Changed limits, timeouts and health checks are for
// connections that begin from now on; those in their handshake get the new upstreams. Reload logs
// what has changed and returns it.
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
	m := r.check()
	r.dates(old.certificates)
	users := s.users
	if users == nil {
		users = m.users
	} else if len(c.Users) > 0 {
		r.add("users", "the server has a store of its own (Options.Users): remove them")
	}
	if err := r.err(); err != nil {
		return changes, err
	}
	for i, app := range c.Apps {
		s.withDrains(app.ID, m.upstreams[i])
	}
	admins, err := s.adminsFor(r, old.admins)
	if err != nil {
		return changes, err
	}
	defer func() {
		if err != nil {
			closeAdmins(admins, old.admins)
		}
	}()
	configured := s.limits.configure(c.Users, c.DefaultLimit)
	defer func() { configured(err == nil) }()
	proxies := map[string]*proxy{}
	for i, conf := range c.Apps {
		p, err := s.proxyFor(conf, m.upstreams[i], old.proxies)
		if err != nil {
			discard(proxies, old.proxies)
			return changes, fmt.Errorf("mtlsserver: app %q: %w", conf.ID, err)
		}
		proxies[conf.ID] = p
	}
	snap := newSnapshot(c, m, users, proxies, old)
	snap.admins, snap.admin = admins, s.adminHandler(c, m)
	if err := s.install(snap, old, m.upstreams); err != nil {
		discard(proxies, old.proxies)
		return changes, err
	}
	changes = changesOf(old, snap)
	changes.Ended = s.sweep(snap.judge)
	return changes, nil
}

// install makes snap the snapshot in force, starts the proxies that are new, and closes the
// listeners of those that are gone.
func (s *Server) install(snap, old *snapshot, upstreams [][]lbproxy.Upstream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return ErrServerClosed
	}
	// Before any user of the new snapshot is let in, also for apps that were replaced: a connection
	// may still be in its handshake there, and must not get on to the old upstreams.
	byID := map[string][]lbproxy.Upstream{}
	for i, conf := range snap.config.Apps {
		byID[conf.ID] = upstreams[i]
	}
	for p := range s.proxies {
		if now := byID[p.conf.ID]; now != nil {
			if err := p.app.SetUpstreams(now); err != nil {
				panic(err) // check has found them valid
			}
		}
	}
	s.current.Store(snap)
	s.forgetDrains(snap)
	for id, p := range snap.proxies {
		if p != old.proxies[id] {
			s.proxies[p] = struct{}{}
			s.start(p)
		}
	}
	for id, p := range old.proxies {
		if p != snap.proxies[id] {
			p.listener.Close()
		}
	}
	// Nobody waits here: one of them may be answering the request that reloads.
	s.watching.Go(func() { closeAdmins(old.admins, snap.admins) })
	return nil
}

// discard closes the proxies that are not among the old ones.
func discard(proxies, old map[string]*proxy) {
	for id, p := range proxies {
		if p != old[id] {
			p.listener.Close()
			p.app.Close()
		}
	}
}

// A proxy is an app behind its listener. Another one takes over when its options change.
type proxy struct {
	server   *Server
	conf     App // what proxyOptions leaves of it
	app      *lbproxy.LBProxyApp
	listener *share
	served   chan struct{} // closed when no connection is accepted any more
}

// drain ends p when its connections have ended, or at once when ctx does. What has been accepted
// is served, so Shutdown, which resets what it finds in Serve's hands, comes after that.
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

// proxyOptions returns a without what a proxy looks up in the snapshot.
func (a App) proxyOptions() App {
	a.Upstreams, a.TLS, a.CloseNotify, a.AcceptProxy = nil, nil, "", nil
	return a
}

// proxyFor returns the proxy of an app: the old one if it can go on, else a new one.
func (s *Server) proxyFor(conf App, upstreams []lbproxy.Upstream, old map[string]*proxy) (*proxy, error) {
	conf = conf.proxyOptions()
	if p := old[conf.ID]; p != nil && reflect.DeepEqual(p.conf, conf) {
		return p, nil
	}
	l, err := s.listen(conf, old)
	if err != nil {
		return nil, err
	}
	app, err := lbproxy.New(conf.ID, upstreams, s.recorder.Record(conf.ID, conf.options(s.log)))
	if err != nil {
		l.Close()
		return nil, err
	}
	return &proxy{s, conf, app, l, make(chan struct{})}, nil
}

func (a App) options(log *slog.Logger) *lbproxy.Options {
	opts := &lbproxy.Options{
		IdleTimeout: a.IdleTimeout, DialTimeout: a.DialTimeout, FailTimeout: a.FailTimeout, MaxConns: a.MaxConns,
		Logger: slog.New(appLog{log.Handler()}),
	}
	if hc := a.HealthCheck; hc != nil {
		opts.HealthCheck = &lbproxy.HealthCheck{Interval: hc.Interval, Timeout: hc.Timeout, Rise: hc.Rise, Fall: hc.Fall}
	}
	return opts
}

// lbproxy returns u for an lbproxy.LBProxyApp, but for its TLS.
func (u *Upstream) lbproxy() lbproxy.Upstream {
	return lbproxy.Upstream{
		Addr: u.Addr, Weight: u.Weight, MaxConns: u.MaxConns, Drain: u.Drain, ProxyProtocol: u.ProxyProtocol,
	}
}

// listen returns a share of the port at conf's address: of one that is bound already, by the same
// app or one that gives it up, or of a new one.
func (s *Server) listen(conf App, old map[string]*proxy) (*share, error) {
	for id, p := range old {
		if p.conf.Listen == conf.Listen && (id == conf.ID || portOf(conf.Listen) != 0) {
			return p.listener.port.share(), nil
		}
	}
	return bind(s.bind, conf.ID, conf.Listen)
}

// start makes p serve as soon as the server runs, until p's listener is closed and its last
// connection has ended. The caller holds mu.
func (s *Server) start(p *proxy) {
	if s.current.Load().admin != nil { // else nobody would have the recorder forget it
		s.recorder.Track(p.app)
	}
	s.serving.Go(func() {
		select {
		case <-s.running:
		case <-s.closing.Done(): // then Serve closes the listener, and returns
		}
		_ = p.app.Serve(p.listener, p.admit) // its error only says that it was stopped
		close(p.served)
		p.app.Shutdown(context.Background())
		s.mu.Lock()
		delete(s.proxies, p)
		s.mu.Unlock()
	})
}
