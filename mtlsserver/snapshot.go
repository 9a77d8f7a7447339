package mtlsserver

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"slices"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// A snapshot is a configuration with the contents of its files. Once it is in force it does not
// change, except for upstreams; a reload replaces it.
type snapshot struct {
	config       *Config
	certificates []Certificate
	auth         Authenticator
	tls          *tls.Config
	apps         map[string]*appRules // by id
	adminToken   string

	// reload adds these.
	gate   *gate
	admins map[admin.Listen]*admin.Server
	admin  http.Handler // served by admins; nil if config has no Admin
}

// appRules are an App with its proxy, and decide about connections to it.
type appRules struct {
	conf        *App // a copy, as a caller may change its Config in spite of what Reload says
	configured  []lbproxy.Upstream
	acceptProxy lbproxy.AdmitFunc  // nil: no peer is trusted to send PROXY headers
	upstreams   []lbproxy.Upstream // as configured, but Drain; guarded by Server.reloading
	proxy       *proxy             // added by reload
}

// clientTLS returns the configuration of TLS with clients, apart from VerifyConnection.
func clientTLS(server tls.Certificate, cas []*x509.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ClientAuth:   tls.RequireAnyClientCert, // Identify verifies it at less cost
		ClientCAs:    poolOf(cas...),           // helps clients choose their certificate
		Certificates: []tls.Certificate{server},

		// A ticket would keep a client authenticated after its user was removed.
		SessionTicketsDisabled: true,

		// Small records make the first byte arrive sooner on a slow link, but on the links of a
		// load balancer they only cost more.
		DynamicRecordSizingDisabled: true,
	}
}

// gateFor returns old, with the handshakes in progress, if it is a gate with the bounds of h, else
// a new gate.
func gateFor(h Handshake, old *gate) *gate {
	h = Handshake{
		Timeout:       cmp.Or(h.Timeout, 10*time.Second),
		MaxConcurrent: cmp.Or(h.MaxConcurrent, 256),
		MaxPerAddress: cmp.Or(h.MaxPerAddress, 16),
		MaxBytes:      cmp.Or(h.MaxBytes, 16<<10),
	}
	if old != nil && old.Handshake == h {
		return old
	}
	return newGate(h)
}

func (n *snapshot) drainTimeout() time.Duration {
	return cmp.Or(n.config.DrainTimeout, 30*time.Second)
}

// proxy returns the proxy of an app; nil if there is no such app.
func (n *snapshot) proxy(app string) *proxy {
	if a := n.apps[app]; a != nil {
		return a.proxy
	}
	return nil
}

// upstream returns an app with the index of its upstream at addr; -1 if there is none.
func (n *snapshot) upstream(app, addr string) (*appRules, int) {
	a := n.apps[app]
	if a == nil {
		return nil, -1
	}
	return a, slices.IndexFunc(a.upstreams, func(u lbproxy.Upstream) bool { return u.Addr == addr })
}

// keepDrains makes upstreams keep the drain that an administrator has set: one that differs from
// the old configuration.
func (n *snapshot) keepDrains(old *snapshot) {
	for id, was := range old.apps {
		for i, u := range was.upstreams {
			if u.Drain == was.configured[i].Drain {
				continue
			}
			if app, j := n.upstream(id, u.Addr); j >= 0 {
				app.upstreams[j].Drain = u.Drain
			}
		}
	}
}

// judge returns an error if n does not allow l, which an earlier snapshot admitted. Otherwise it
// updates l's Identity.
func (n *snapshot) judge(l *session) error {
	was := l.id.Load()
	id, err := n.auth.recheck(was, l.app)
	if err != nil || id.User.Name != was.User.Name || n.apps[l.app] == nil {
		return &Refusal{Reason: Revoked}
	}
	l.id.Store(id)
	return nil
}
