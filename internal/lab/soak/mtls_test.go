//go:build linux

package soak

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// revocableUsers are revoked at times. All other users stay.
const revocableUsers = 4

// The others' names. The stranger has a certificate, and is in no list.
const (
	steadyUser  = "steady"
	limitedUser = "limited"
	nobodyUser  = "stranger"
)

func revocableUser(i int) string { return fmt.Sprintf("revocable-%d", i) }

// A pki is an authority and the certificates it has made.
type pki struct {
	*proxytest.Authority
	server  tls.Certificate
	files   mtlsserver.Files
	serials map[string]string
	clients map[string]*tls.Config
}

func newPKI(t testing.TB) *pki {
	p := &pki{Authority: proxytest.NewAuthority(), serials: map[string]string{},
		clients: map[string]*tls.Config{}}
	p.server = p.Server()
	dir := t.TempDir()
	p.files.Cert, p.files.Key = proxytest.WritePEM(t, dir, "server", p.server)
	ca, _ := proxytest.WritePEM(t, dir, "ca", p.TLS())
	p.files.CA = []string{ca}
	names := []string{steadyUser, limitedUser, nobodyUser}
	for i := range revocableUsers {
		names = append(names, revocableUser(i))
	}
	for _, name := range names {
		cert := p.Client(proxytest.Name(name))
		p.serials[name] = fmt.Sprintf("dec:%d", cert.Leaf.SerialNumber)
		p.clients[name] = p.ClientConfig(&cert)
		// The default curve costs more, and the soak does not test curves.
		p.clients[name].CurvePreferences = []tls.CurveID{tls.X25519}
	}
	return p
}

// An mtlsFront is an mtlsserver.
type mtlsFront struct {
	run    *run
	server *mtlsserver.Server
	addrs  map[string]string
	end    context.CancelFunc
	ran    chan error

	// The configuration that reload changes, in its goroutine.
	web   []*server
	idle  time.Duration
	apart int // the user who is revoked; -1 if there is none

	mu      sync.Mutex
	revokes [revocableUsers][]*revocation
}

// A revocation is when a user was out of the list: from between begun and done until shortly before
// restored. Those to come are zero.
type revocation struct{ begun, done, restored time.Time }

func newMTLSFront(t testing.TB, r *run) *mtlsFront {
	f := &mtlsFront{run: r, addrs: map[string]string{}, ran: make(chan error, 1), web: r.web,
		idle: time.Minute, apart: -1}
	var err error
	f.server, err = mtlsserver.New(f.config(), &mtlsserver.Options{
		Logger: slog.New(resultLog{panicLog{r}}), RefusalLines: -1, // each refusal has its line
	})
	proxytest.Must(t, err)
	for app, addr := range f.server.Addrs() {
		f.addrs[app] = addr.String()
	}
	var ctx context.Context
	ctx, f.end = context.WithCancel(context.Background())
	go func() { f.ran <- f.server.Run(ctx) }()
	return f
}

func (f *mtlsFront) config() *mtlsserver.Config {
	c := &mtlsserver.Config{
		TLS: f.run.pki.files, DrainTimeout: 5 * time.Second,
		Handshake: mtlsserver.Handshake{Timeout: giveUp}, // on a busy machine ten seconds may not do
	}
	for _, app := range []struct {
		id      string
		servers []*server
		idle    time.Duration
	}{
		{"web", f.web, f.idle},
		{"greet", f.run.greeting, time.Minute},
		{"tls", f.run.overTLS, time.Minute},
		{"slow", f.run.slow, time.Minute},
		{"idle", f.run.web, idleTimeout},
		{"kill", f.run.mortal, time.Minute},
	} {
		conf := mtlsserver.App{ID: app.id, Listen: "127.0.0.1:0", IdleTimeout: app.idle}
		for _, s := range app.servers {
			u := mtlsserver.Upstream{Addr: s.addr}
			if s.tls != nil {
				u.TLS = &mtlsserver.UpstreamTLS{CA: f.run.pki.files.CA[0]}
			}
			conf.Upstreams = append(conf.Upstreams, u)
		}
		c.Apps = append(c.Apps, conf)
	}
	user := func(name string, limit *mtlsserver.Limit) {
		serials := []mtlsserver.UserSerial{{Serial: f.run.pki.serials[name]}}
		u := mtlsserver.User{Name: name, Serials: serials, Limit: limit}
		for _, app := range c.Apps {
			u.Apps = append(u.Apps, app.ID)
		}
		c.Users = append(c.Users, u)
	}
	user(steadyUser, nil)
	user(limitedUser, &mtlsserver.Limit{Open: 1, BytesPerSecond: 100 << 20})
	for i := range revocableUsers {
		if i != f.apart {
			user(revocableUser(i), nil)
		}
	}
	return c
}

// client is how the client of c speaks TLS.
func (f *mtlsFront) client(c *conn) *tls.Config {
	name := steadyUser
	switch c.kind {
	case stranger:
		name = nobodyUser
	case someLimit:
		name = limitedUser
	case revoked:
		name = revocableUser(c.user)
	}
	return f.run.pki.clients[name]
}

// reload revokes a user and enters them again, and changes the upstreams of the app web. It does
// not replace the app: that would refuse clients in their handshake (app-removed).
func (f *mtlsFront) reload(round int) {
	user := round % revocableUsers
	f.web = slices.Clone(f.run.web)
	rand.Shuffle(len(f.web), func(i, j int) { f.web[i], f.web[j] = f.web[j], f.web[i] })
	f.web = f.web[:1+rand.IntN(len(f.web))]
	r := &revocation{begun: time.Now()}
	f.mu.Lock()
	f.revokes[user] = append(f.revokes[user], r)
	f.mu.Unlock()
	note := func(at *time.Time) {
		f.mu.Lock()
		defer f.mu.Unlock()
		*at = time.Now()
	}
	f.apart = user
	f.apply()
	note(&r.done)
	time.Sleep(20 * time.Millisecond)
	f.apart = -1
	f.apply()
	note(&r.restored)
}

func (f *mtlsFront) apply() {
	if _, err := f.server.Reload(f.config()); err != nil {
		f.run.fail("Reload: %v", err)
	}
	f.run.count(reload)
}

// judge checks that c, whose user is revoked now and then, was cut soon after that, and only then.
func (f *mtlsFront) judge(c *conn) (wrong faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	cause := false
	for _, r := range f.revokes[c.user] {
		if !r.begun.After(c.ended) && (r.restored.IsZero() || r.restored.After(c.started)) {
			cause = true
		}
		held := !c.holding.IsZero() && c.holding.Before(r.begun)
		if took := c.ended.Sub(r.done); held && !r.done.IsZero() &&
			took > time.Second+f.run.lag.between(r.done, c.ended) {
			return faults{fmt.Sprintf("still there %v after its user was revoked", took)}
		}
	}
	if !cause {
		wrong.add("cut or refused though its user was not revoked")
	}
	return wrong
}

func (f *mtlsFront) stop() {
	f.end()
	if err := <-f.ran; err != nil {
		f.run.fail("Run: %v", err)
	}
	f.server.Close()
}

// A resultLog is the server's log handler: the line for each connection has its outcome.
type resultLog struct{ panicLog }

func (l resultLog) Enabled(context.Context, slog.Level) bool { return true }

func (l resultLog) Handle(ctx context.Context, line slog.Record) error {
	var o outcome
	var client string
	line.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "client":
			client = a.Value.String()
		case "reason":
			o.end = a.Value.String()
		case "sent":
			o.sent = a.Value.Int64()
		case "received":
			o.received = a.Value.Int64()
		case "detail":
			o.err = fmt.Errorf("%s", a.Value)
		}
		return true
	})
	if client == "" { // it is about something else
		return l.panicLog.Handle(ctx, line)
	}
	l.run.report(client, o)
	return nil
}
