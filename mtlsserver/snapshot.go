package mtlsserver

import (
	"cmp"
	"crypto/tls"
	"net/http"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// A snapshot is everything that a connection is judged by. It does not change.
type snapshot struct {
	config        *Config
	auth          Authenticator
	apps          map[string]*appRules
	proxies       map[string]*proxy // what serves each app
	certificates  []Certificate
	defaultLimit  *Limit
	logAdmissions bool
	gate          *gate
	drain         time.Duration
	upstreams     [][]lbproxy.Upstream // of each of config's apps
	admins        map[admin.Listen]*admin.Server
	admin         http.Handler // what they serve
}

// appRules are what connections to an app are judged by.
type appRules struct {
	tls         *tls.Config
	serverName  string
	closeNotify lbproxy.CloseNotify
	acceptProxy lbproxy.AdmitFunc // nil: no peer is trusted to send PROXY headers
}

// newSnapshot returns the snapshot of c, with what goes on of the old one.
func newSnapshot(c *Config, m *materials, users Users, proxies map[string]*proxy, old *snapshot) *snapshot {
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
			MinVersion: tls.VersionTLS13,
			ClientAuth: tls.RequireAnyClientCert, // Identify verifies it, for less
			ClientCAs:  poolOf(m.cas...),         // tells clients which of their certificates to present

			Certificates:           []tls.Certificate{m.server},
			SessionTicketsDisabled: true, // a ticket would prove for ever what was true when it was made

			DynamicRecordSizingDisabled: true, // small records cost more than the first byte gains on a link worth balancing
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

// judge returns an error if nobody may have l, which was let in earlier, any more. Otherwise l's
// Identity is as the snapshot has it.
func (n *snapshot) judge(l *session) error {
	was := l.id.Load()
	id, err := n.auth.recheck(was, l.app)
	if err != nil || id.User.Name != was.User.Name {
		return &Refusal{Reason: Revoked}
	}
	l.id.Store(id)
	return nil
}
