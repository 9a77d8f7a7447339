package mtlsserver

import (
	"cmp"
	"crypto/tls"
	"net/http"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// A snapshot is the configuration in force. It is immutable; a reload replaces it.
type snapshot struct {
	config        *Config
	auth          Authenticator
	apps          map[string]*appRules
	proxies       map[string]*proxy // by app id
	certificates  []Certificate
	defaultLimit  *Limit
	logAdmissions bool
	gate          *gate
	drain         time.Duration
	upstreams     [][]lbproxy.Upstream // by index of config.Apps
	admins        map[admin.Listen]*admin.Server
	admin         http.Handler // served by admins
}

// appRules decide about connections to an app.
type appRules struct {
	tls         *tls.Config
	serverName  string
	closeNotify lbproxy.CloseNotify
	acceptProxy lbproxy.AdmitFunc // nil: no peer is trusted to send PROXY headers
}

// newSnapshot returns the snapshot of c. It keeps old's gate, with the handshakes in progress, if
// c has the same Handshake.
func newSnapshot(
	c *Config, m *materials, users Users, proxies map[string]*proxy, old *snapshot,
) *snapshot {
	n := &snapshot{
		config:        c,
		auth:          Authenticator{CAs: m.cas, Users: users},
		apps:          map[string]*appRules{},
		proxies:       proxies,
		certificates:  m.certificates,
		upstreams:     m.upstreams,
		defaultLimit:  c.DefaultLimit,
		logAdmissions: c.LogAdmissions,
		gate: newGate(Handshake{
			Timeout:       cmp.Or(c.Handshake.Timeout, 10*time.Second),
			MaxConcurrent: cmp.Or(c.Handshake.MaxConcurrent, 256),
			MaxPerAddress: cmp.Or(c.Handshake.MaxPerAddress, 16),
			MaxBytes:      cmp.Or(c.Handshake.MaxBytes, 16<<10),
		}),
		drain: cmp.Or(c.DrainTimeout, 30*time.Second),
	}
	if old.gate != nil && old.gate.Handshake == n.gate.Handshake {
		n.gate = old.gate
	}
	for i, app := range c.Apps {
		rules := &appRules{tls: &tls.Config{
			MinVersion:   tls.VersionTLS13,
			ClientAuth:   tls.RequireAnyClientCert, // Identify verifies it at less cost
			ClientCAs:    poolOf(m.cas...),         // helps clients choose their certificate
			Certificates: []tls.Certificate{m.server},

			// A ticket would keep a client authenticated after its user was removed.
			SessionTicketsDisabled: true,

			// Small records make the first byte arrive sooner on a slow link, but on the links
			// of a load balancer they only cost more.
			DynamicRecordSizingDisabled: true,
		}}
		if app.TLS != nil {
			rules.serverName = app.TLS.ServerName
		}
		rules.closeNotify = closeNotifies[app.CloseNotify]
		if trusted := m.proxies[i]; len(trusted) > 0 {
			rules.acceptProxy = lbproxy.AcceptProxy(trusted, nil)
		}
		n.apps[app.ID] = rules
	}
	return n
}

// judge returns an error if n does not allow l, which an earlier snapshot admitted. Otherwise it
// updates l's Identity.
func (n *snapshot) judge(l *session) error {
	was := l.id.Load()
	id, err := n.auth.recheck(was, l.app)
	if err != nil || id.User.Name != was.User.Name {
		return &Refusal{Reason: Revoked}
	}
	l.id.Store(id)
	return nil
}
