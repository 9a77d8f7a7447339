package mtlsserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

// Reload replaces the configuration by c, which must not be changed afterwards. If anything is wrong with it or with a
// file it names, or an address cannot be bound, nothing changes. Else connections that c does not allow are ended
// before Reload returns. All others live on, and so do listeners whose app and address are the same, what users have
// spent of limits that are the same, and the counts of upstreams. A changed limit or idleTimeout is for connections
// that begin from now on.
func (s *Server) Reload(c *Config) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	m, err := c.materials()
	if err != nil {
		return err
	}
	next := newSnapshot(c, m, s.current.Load())
	proxies, opened, err := s.prepare(c, m)
	if err == nil {
		err = s.swap(next, proxies, c, m)
	}
	if err != nil {
		for _, d := range opened {
			d.Close()
		}
		return err
	}
	s.sweep(func(l *session) error {
		_, err := next.allows(l)
		return err
	})
	return nil
}

// A snapshot is everything that a connection is judged by. It does not change.
type snapshot struct {
	auth      Authenticator
	configs   map[string]*tls.Config // by app id
	limits    map[limitKey]lbproxy.RateLimitManager
	handshake Handshake
	drain     time.Duration
}

// A limitKey is what managers are for. It has the Limit itself, so that a changed one begins anew.
type limitKey struct {
	user, app string // app is empty where all apps share it
	limit     Limit
}

func newSnapshot(c *Config, m *materials, old *snapshot) *snapshot {
	n := &snapshot{
		auth:      Authenticator{CA: m.ca, Users: StaticUsers(m.users)},
		configs:   map[string]*tls.Config{},
		limits:    map[limitKey]lbproxy.RateLimitManager{},
		handshake: c.Handshake.orDefaults(),
		drain:     cmp.Or(c.DrainTimeout, 30*time.Second),
	}
	pool := x509.NewCertPool()
	pool.AddCert(m.ca)
	for _, app := range c.Apps {
		n.configs[app.ID] = &tls.Config{
			MinVersion:             tls.VersionTLS13,
			ClientAuth:             tls.RequireAndVerifyClientCert,
			ClientCAs:              pool,
			Certificates:           []tls.Certificate{m.server},
			SessionTicketsDisabled: true, // a ticket would prove what was true when it was made, for ever
			VerifyConnection: func(cs tls.ConnectionState) error {
				_, err := n.auth.Identify(cs, app.ID)
				return err
			},
		}
	}
	for _, u := range c.Users {
		for _, app := range u.Apps {
			for _, key := range limitKeys(&u, app) {
				if n.limits[key] = old.limits[key]; n.limits[key] == nil {
					n.limits[key] = newLimit(key.limit)
				}
			}
		}
	}
	return n
}

func newLimit(l Limit) lbproxy.RateLimitManager {
	var each []lbproxy.RateLimitManager
	if l.Open > 0 {
		each = append(each, &lbproxy.OpenLimit{Max: l.Open})
	}
	if l.Burst > 0 {
		each = append(each, &lbproxy.TokenBucket{Burst: l.Burst, Every: l.Every})
	}
	if l.BytesPerSecond > 0 {
		each = append(each, &lbproxy.Bandwidth{BytesPerSecond: l.BytesPerSecond})
	}
	return lbproxy.All(each...)
}

func limitKeys(u *User, app string) (keys []limitKey) {
	if l, ok := u.AppLimits[app]; ok {
		keys = append(keys, limitKey{u.Name, app, l})
	}
	if u.Limit != nil {
		keys = append(keys, limitKey{u.Name, "", *u.Limit})
	}
	return keys
}

// limit returns what bounds u's connections to app; nil if nothing does.
func (n *snapshot) limit(u *User, app string) lbproxy.RateLimitManager {
	var each []lbproxy.RateLimitManager
	for _, key := range limitKeys(u, app) {
		each = append(each, n.limits[key])
	}
	if each == nil {
		return nil
	}
	return lbproxy.All(each...)
}

// allows returns who may have a session that was let in earlier, or why nobody may.
func (n *snapshot) allows(l *session) (*User, error) {
	id, err := n.auth.Identify(l.state, l.app)
	if err != nil || id.User.Name != l.id.User.Name {
		return nil, &Refusal{Reason: Revoked}
	}
	return id.User, nil
}

// A proxy is an app behind its listener. When either changes another one takes over.
type proxy struct {
	server   *Server
	conf     App
	app      *lbproxy.LBProxyApp
	listener *net.TCPListener
	served   chan struct{} // closed when Serve has returned; nil until it is called
}

// prepare makes the proxies for c. Those of which at most the upstreams have changed are the same as before. What it
// opened is to be closed if it does not come into use.
func (s *Server) prepare(c *Config, m *materials) (proxies map[string]*proxy, opened []net.Listener, err error) {
	proxies = map[string]*proxy{}
	for i, conf := range c.Apps {
		p, old := &proxy{server: s, conf: conf}, s.proxies[conf.ID]
		if old != nil && old.conf.IdleTimeout == conf.IdleTimeout {
			if p.app = old.app; old.conf.Listen == conf.Listen {
				proxies[conf.ID] = old
				continue
			}
		} else if p.app, err = lbproxy.New(conf.ID, m.upstreams[i], &lbproxy.Options{
			IdleTimeout: conf.IdleTimeout, Logger: slog.New(appLog{s.log.Handler()}), OnDone: s.done,
		}); err != nil {
			return nil, opened, err
		}
		if p.listener, err = s.listen(conf); err != nil {
			return nil, opened, fmt.Errorf("mtlsserver: app %q: %w", conf.ID, err)
		}
		opened = append(opened, p.listener)
		proxies[conf.ID] = p
	}
	return proxies, opened, nil
}

// listen binds conf's address. If that is bound already, by the same app or one that gives it up, it is not bound
// again: what waits in its queue is not lost.
func (s *Server) listen(conf App) (*net.TCPListener, error) {
	for id, p := range s.proxies {
		if p.conf.Listen != conf.Listen || id != conf.ID && strings.HasSuffix(conf.Listen, ":0") {
			continue
		}
		f, err := p.listener.File() // a second descriptor, so that each proxy can close its own
		if err != nil {
			return nil, err
		}
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			return nil, err
		}
		return l.(*net.TCPListener), nil
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // what is known here of splicing and resets is known of TCP
	l, err := lc.Listen(context.Background(), "tcp", conf.Listen)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// swap brings next and proxies into use. It fails only if the server has been stopped.
func (s *Server) swap(next *snapshot, proxies map[string]*proxy, c *Config, m *materials) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return ErrServerClosed
	}
	old := s.proxies
	s.proxies = proxies
	s.current.Store(next)
	for i, conf := range c.Apps {
		p := proxies[conf.ID]
		if err := p.app.SetUpstreams(m.upstreams[i]); err != nil {
			panic(err) // materials has found them valid
		}
		s.apps[p.app] = struct{}{}
		if s.running && p.served == nil {
			s.serve(p)
		}
	}
	for id, p := range old {
		if p != proxies[id] {
			p.listener.Close()
			if proxies[id] == nil || p.app != proxies[id].app {
				s.serving.Go(func() { s.drain(p) })
			}
		}
	}
	return nil
}

// serve starts p. The caller holds mu.
func (s *Server) serve(p *proxy) {
	p.served = make(chan struct{})
	s.serving.Go(func() {
		defer close(p.served)
		p.app.Serve(p.listener, p.admit) // its error only says that it was stopped
	})
}

// drain forgets the app of p, which was replaced, when its last connection has ended.
func (s *Server) drain(p *proxy) {
	if p.served != nil {
		<-p.served // what was accepted is in now; Shutdown would turn it away
	}
	p.app.Shutdown(context.Background())
	s.mu.Lock()
	delete(s.apps, p.app)
	s.mu.Unlock()
}
