package mtlsserver

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

// These tests check, from a client, the configuration's requirements besides a certificate.

// wantReason fails unless the client's connection is refused or ended for reason.
func (l *lab) wantReason(t *testing.T, c net.Conn, reason string) entry {
	t.Helper()
	must(t, ended(c))
	e := l.log.of(t, c.LocalAddr())
	if e["reason"] != reason {
		t.Errorf("line %v, want reason %s", e, reason)
	}
	return e
}

func TestClientThatAsksForAnotherServerNameIsRefused(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.Apps[0].TLS = &AppTLS{ServerName: "localhost"} })
	l.in(t, "web", &l.alice).Close()
	raw, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer raw.Close()
	config := l.clientConfig(&l.alice)
	config.ServerName, config.InsecureSkipVerify = "db.example", true
	l.wantReason(t, tls.Client(raw, config), string(WrongServerName))
}

func TestTrustedPeerMustSendAProxyHeader(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.Apps[0].AcceptProxy = []string{"127.0.0.1/32"} })
	raw, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	_, err = io.WriteString(raw, "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n")
	must(t, err)
	c := tls.Client(raw, l.clientConfig(&l.alice))
	must(t, greeted(c, "web"))
	must(t, c.Close())
	e := l.log.of(t, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 56324})
	if e["user"] != "alice" {
		t.Errorf("line %v, want alice's", e)
	}
	l.wantReason(t, l.dial(t, "web", &l.alice), string(NoProxyHeader))
}

func TestSerialMayBeBoundToItsCertificate(t *testing.T) {
	l := newLab(t, func(l *lab) {
		sum := sha256.Sum256(l.alice.Certificate[0])
		l.config.Users[0].Serials[0].CertSHA256 = hex.EncodeToString(sum[:])
	})
	l.in(t, "web", &l.alice).Close()
	other := l.ca.issue(t, leafOf(0xa11ce)) // by mistake: the same serial
	e := l.wantReason(t, l.dial(t, "web", &other), string(OtherCertificate))
	if e["claimed_serial"] != "a11ce" || e["claimed_issuer"] == "" || e["claimed_subject"] == "" {
		t.Errorf("line %v does not say who that was", e)
	}
}

// A caller's store replaces the users of the configuration.
// The store of a caller does not know that a reload has removed an app.
func TestReloadThatRemovesAnAppEndsItsConnections(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.Users[0].Apps = []string{"web", "db"} })
	l.server.users = l.server.current.Load().auth.Users
	web, db := l.in(t, "web", &l.alice), l.in(t, "db", &l.alice)
	changes := l.reload(t, l.with(func(c *Config) { c.Users, c.Apps = nil, c.Apps[:1] }))
	if changes.Ended != 1 {
		t.Errorf("%d connections were ended, want 1", changes.Ended)
	}
	must(t, ended(db))
	if e := l.log.of(t, db.LocalAddr()); e["reason"] != string(Revoked) {
		t.Errorf("line %v, want reason %s", e, Revoked)
	}
	must(t, echoed(web))
}

func TestUsersOfAStore(t *testing.T) {
	l := newLab(t, nil)
	var removed atomic.Bool
	alice := &User{Name: "alice", Apps: []string{"web"}}
	log := &book{told: map[string]bool{}, more: make(chan struct{})}
	opts := &Options{Logger: slog.New(log), Users: lookup(func(c Claim) (*User, bool) {
		return alice, c.Serial == "a11ce" && !removed.Load()
	})}
	s, err := New(l.config, opts)
	if err == nil {
		s.Close()
		t.Fatal("users of the configuration are accepted besides")
	}
	if want := "users: the server has a store of its own"; !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %s", err, want)
	}
	s, err = New(l.with(func(c *Config) { c.Users = nil }), opts)
	must(t, err)
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	defer func() { cancel(); <-ran }()
	raw, err := net.Dial("tcp", s.Addrs()["web"].String())
	must(t, err)
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	c := tls.Client(raw, l.clientConfig(&l.alice))
	must(t, greeted(c, "web"))
	if n := s.Recheck(); n != 0 {
		t.Errorf("Recheck = %d, want 0", n)
	}
	must(t, echoed(c))
	removed.Store(true)
	if n := s.Recheck(); n != 1 {
		t.Errorf("Recheck = %d, want 1", n)
	}
	must(t, ended(c))
	if e := log.of(t, raw.LocalAddr()); e["reason"] != string(Revoked) {
		t.Errorf("line %v, want reason %s", e, Revoked)
	}
}

func TestDefaultLimitIsForUsersWithoutOne(t *testing.T) {
	bob := leafOf(0xb0b)
	l := newLab(t, func(l *lab) {
		l.config.DefaultLimit = &Limit{Open: 1}
		l.config.Users = append(l.config.Users, User{
			Name: "bob", Serials: serials("0xb0b"), Apps: []string{"web"}, Limit: &Limit{Open: 2},
		})
	})
	cert := l.ca.issue(t, bob)
	l.in(t, "web", &l.alice)
	l.wantReason(t, l.dial(t, "web", &l.alice), string(lbproxy.EndRateLimited))
	l.in(t, "web", &cert)
	l.in(t, "web", &cert)
	l.wantReason(t, l.dial(t, "web", &cert), string(lbproxy.EndRateLimited))
}

func TestAppOptionsReachLBProxy(t *testing.T) {
	o := App{MaxConns: 1, IdleTimeout: 2, DialTimeout: 3, FailTimeout: 4,
		HealthCheck: &HealthCheck{Interval: 5, Timeout: 6, Rise: 7,
			Fall: 8}}.options(slog.Default())
	if o.MaxConns != 1 || o.IdleTimeout != 2 || o.DialTimeout != 3 || o.FailTimeout != 4 {
		t.Errorf("%+v", o)
	}
	if c := o.HealthCheck; c.Interval != 5 || c.Timeout != 6 || c.Rise != 7 || c.Fall != 8 {
		t.Errorf("%+v", c)
	}
}

// A CA is renewed, and then replaced by another one while both are trusted. Only connections of a
// CA that was removed are cut.
func TestCAsAreReplacedWithoutAFlagDay(t *testing.T) {
	l := newLab(t, nil)
	old := l.in(t, "web", &l.alice)
	write := func(name string, a *authority) string {
		file, _ := writePEM(t, l.dir, name, tls.Certificate{Certificate: [][]byte{a.cert.Raw}})
		return file
	}
	write("ca", l.ca.renewed(t, func(c *x509.Certificate) {
		c.NotAfter = c.NotAfter.Add(time.Hour)
	}))
	if changes := l.reload(t, l.config); changes.Ended != 0 {
		t.Errorf("renewing the CA ended %d connections", changes.Ended)
	}
	must(t, echoed(old))
	l.in(t, "web", &l.alice).Close()

	next := newAuthority(t, "ca")
	bob := next.issue(t, leafOf(0xa11ce)) // the same serial, by the other CA
	both := l.with(func(c *Config) {
		c.TLS.CA = append([]string{write("next", next)}, c.TLS.CA...)
		user := func(name string, ca *authority) User {
			serial := UserSerial{Serial: "0xa11ce", CA: KeyID(ca.cert)}
			return User{Name: name, Apps: []string{"web"}, Serials: []UserSerial{serial}}
		}
		c.Users = []User{user("alice", l.ca), user("bob", next)}
	})
	if changes := l.reload(t, both); changes.Ended != 0 {
		t.Errorf("another CA beside it ended %d connections", changes.Ended)
	}
	must(t, echoed(old))
	young := l.in(t, "web", &bob)
	without := *both
	without.TLS.CA, without.Users = both.TLS.CA[:1], both.Users[1:]
	l.reload(t, &without)
	if e := l.wantReason(t, old, string(Revoked)); e["user"] != "alice" {
		t.Errorf("line %v, want alice's", e)
	}
	must(t, echoed(young))
}

// Beyond 10 a second, for each reason, refusals are counted and not written.
func TestRefusalLinesAreBounded(t *testing.T) {
	l := newLab(t, nil)
	log := &book{told: map[string]bool{}, more: make(chan struct{})}
	s, err := New(l.config, &Options{Logger: slog.New(log)})
	must(t, err)
	defer s.Close()
	now, allowed := time.Now(), 0
	for i := range 50 {
		reason := []Reason{NotTLS, NoCertificate}[i%2]
		if s.refusals.allow(reason, now) {
			allowed++
		}
	}
	if allowed != 20 {
		t.Errorf("%d lines in a second for two reasons, want 20", allowed)
	}
	if !s.refusals.allow(NotTLS, now.Add(time.Second)) {
		t.Error("a second later there is still no line")
	}
	s.sayWithheld()
	for _, reason := range []Reason{NotTLS, NoCertificate} {
		e := log.await(t, "that counts", func(e entry) bool {
			return e["msg"] == "connections refused without a line each" &&
				e["reason"] == string(reason)
		})
		if e["connections"] != "15" {
			t.Errorf("line %v, want 15", e)
		}
	}
}
