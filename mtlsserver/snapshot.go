package mtlsserver

import (
	"cmp"
	"crypto/tls"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A snapshot is everything that a connection is judged by. It does not change.
type snapshot struct {
	auth    Authenticator
	configs map[string]*tls.Config // by app id
	limits  map[limitKey]lbproxy.RateLimitManager
	gate    *gate
	drain   time.Duration
}

// A limitKey is what managers are for. It has the Limit itself, so that a changed one begins anew.
type limitKey struct {
	user, app string // app is empty where all apps share it
	limit     Limit
}

// newSnapshot returns that of c, with what goes on of the old one.
func newSnapshot(c *Config, m *materials, old *snapshot) *snapshot {
	n := &snapshot{
		auth:    Authenticator{CA: m.ca, Users: m.users},
		configs: map[string]*tls.Config{},
		limits:  map[limitKey]lbproxy.RateLimitManager{},
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
	for _, app := range c.Apps {
		n.configs[app.ID] = &tls.Config{
			MinVersion:             tls.VersionTLS13,
			ClientAuth:             tls.RequireAndVerifyClientCert,
			ClientCAs:              poolOf(m.ca),
			Certificates:           []tls.Certificate{m.server},
			SessionTicketsDisabled: true, // a ticket would prove what was true when it was made, for ever

			DynamicRecordSizingDisabled: true, // small records cost more than the first byte gains on a link worth balancing
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
					n.limits[key] = key.limit.manager()
				}
			}
		}
	}
	return n
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

func (l Limit) manager() lbproxy.RateLimitManager {
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
