package mtlsserver

import (
	"bytes"
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A row is a client of the certificate table. It asks for web, which alice may reach.
type row struct {
	name    string
	cert    *tls.Certificate // nil: none
	app     string           // "": web
	client  func(net.Conn, *tls.Config) net.Conn
	reason  Reason // "": it is in
	openssl []string
	only    bool // for Go's client only
}

func certificateTable(t *testing.T, l *lab) []row {
	good := func(change func(*x509.Certificate), key ...crypto.Signer) *tls.Certificate {
		tmpl := leafOf(0xa11ce)
		if change != nil {
			change(tmpl)
		}
		cert := l.ca.issue(t, tmpl, key...)
		return &cert
	}
	by := func(a *authority, chain ...[]byte) *tls.Certificate {
		cert := a.issue(t, leafOf(0xa11ce))
		cert.Certificate = append(cert.Certificate, chain...)
		return &cert
	}
	serial := func(text string) *tls.Certificate {
		return good(func(c *x509.Certificate) { c.SerialNumber.SetString(text, 16) })
	}
	usage := func(usage x509.KeyUsage, extended ...x509.ExtKeyUsage) *tls.Certificate {
		return good(func(c *x509.Certificate) { c.KeyUsage, c.ExtKeyUsage = usage, extended })
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	rsa2048 := mustKey(rsa.GenerateKey(rand.Reader, 2048))
	sub, self := l.ca.sub(t), newAuthority(t, "self")
	selfSigned := self.issue(t, leafOf(0xa11ce), self.key)
	self.cert = selfSigned.Leaf // its issuer's name is its own
	negative := l.ca.issueNegative(t)
	stolen := l.alice
	stolen.PrivateKey = newKey(t)
	server, err := tls.LoadX509KeyPair(l.config.TLS.Cert, l.config.TLS.Key)
	must(t, err)
	big := *good(nil)
	for range 40 {
		big.Certificate = append(big.Certificate, sub.cert.Raw)
	}
	day := 24 * time.Hour
	sign, client := x509.KeyUsageDigitalSignature, x509.ExtKeyUsageClientAuth
	rows := []row{
		{name: "P-256", cert: good(nil)},
		{name: "P-384", cert: good(nil, mustKey(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)))},
		{name: "RSA-2048", cert: good(nil, rsa2048)},
		{name: "Ed25519", cert: good(nil, ed)},
		{name: "serial of 20 octets", cert: serial("7fffffffffffffffffffffffffffffffffffffff")},
		{name: "serial with leading zero octet", cert: serial("8000")},
		{name: "another serial of the user", cert: serial("b0b")},
		{name: "an unrelated certificate sent along", cert: by(l.ca, sub.cert.Raw)},
		{name: "hello in writes of 1 byte", cert: good(nil),
			client: func(c net.Conn, conf *tls.Config) net.Conn {
				return tls.Client(&bytewise{Conn: c}, conf)
			}, only: true},

		{name: "no certificate", reason: NoCertificate},
		{name: "self-signed", cert: &selfSigned, reason: UnknownCA},
		{name: "other CA", cert: by(newAuthority(t, "other")), reason: UnknownCA},
		{name: "other CA with the same subject", cert: by(newAuthority(t, "ca")),
			reason: UnknownCA},
		{name: "via a sub-CA with the same serial", cert: by(sub, sub.cert.Raw), reason: NotDirect},
		{name: "expired", cert: good(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*day), time.Now().Add(-day)
		}), reason: Expired},
		{name: "not yet valid", cert: good(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(day), time.Now().Add(2*day)
		}), reason: NotYetValid},
		{name: "no EKU", cert: usage(sign), reason: BadExtKeyUsage},
		{name: "any EKU", cert: usage(sign, x509.ExtKeyUsageAny), reason: BadExtKeyUsage},
		{name: "serverAuth only", cert: usage(sign, x509.ExtKeyUsageServerAuth),
			reason: BadExtKeyUsage},
		{name: "CA:TRUE leaf", cert: good(func(c *x509.Certificate) {
			c.IsCA = true
		}), reason: IsCA},
		// Go only: openssl itself refuses keyCertSign without CA:TRUE.
		{name: "keyCertSign leaf", cert: usage(sign|x509.KeyUsageCertSign, client),
			reason: IsCA, only: true},
		{name: "keyEncipherment only", cert: usage(x509.KeyUsageKeyEncipherment, client),
			reason: BadKeyUsage},
		{name: "the CA itself", cert: &tls.Certificate{Certificate: [][]byte{l.ca.cert.Raw},
			PrivateKey: l.ca.key}, reason: IsCA},
		{name: "our own server certificate", cert: &server, reason: BadExtKeyUsage},
		{name: "serial 0", cert: serial("0"), reason: BadSerial},
		{name: "26-octet serial", cert: serial(strings.Repeat("7f", 26)), reason: BadSerial},
		{name: "negative serial", cert: &negative, reason: BadCertificate, only: true},
		{name: "unknown serial", cert: serial("c0ffee"), reason: UnknownSerial},
		{name: "known serial but other app", cert: good(nil), app: "db", reason: AppNotAllowed},
		{name: "stolen certificate with another key", cert: &stolen, reason: NoProof, only: true},
		{name: "RSA-1024", cert: good(nil, mustKey(rsa.GenerateKey(rand.Reader, 1024))),
			reason: WeakKey, only: true},
		{name: "TLS 1.2", cert: good(nil), client: func(c net.Conn, conf *tls.Config) net.Conn {
			conf.MaxVersion = tls.VersionTLS12
			return tls.Client(c, conf)
		}, reason: OldTLS, openssl: []string{"-tls1_2"}},
		{name: "plaintext bytes", client: func(c net.Conn, _ *tls.Config) net.Conn {
			return c
		}, reason: NotTLS, only: true},
		{name: "more than the byte budget", cert: &big, reason: HandshakeTooLarge, only: true},
		{name: "client trusts another CA", cert: good(nil),
			client: func(c net.Conn, conf *tls.Config) net.Conn {
				conf.RootCAs = x509.NewCertPool()
				return tls.Client(c, conf)
			}, reason: ClientAlert, only: true},
		{name: "client trusts another CA and says so in the clear", cert: good(nil),
			client: func(c net.Conn, conf *tls.Config) net.Conn {
				conf.RootCAs = x509.NewCertPool()
				return tls.Client(clearAlert{c}, conf)
			}, reason: ClientAlert, only: true},
		{name: "gone in the handshake", client: func(c net.Conn, _ *tls.Config) net.Conn {
			c.(*net.TCPConn).CloseWrite()
			return c
		}, reason: ClientGone, only: true},
	}
	if !testing.Short() {
		rows = append(rows, row{name: "RSA-4096", cert: good(nil, rsa4096())})
	}
	return rows
}

// rsa4096 takes seconds to make.
var rsa4096 = sync.OnceValue(func() crypto.Signer {
	return mustKey(rsa.GenerateKey(rand.Reader, 4096))
})

// bytewise writes single bytes.
type bytewise struct{ net.Conn }

func (c *bytewise) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		_, err = c.Conn.Write(b[n : n+1])
		n++
	}
	return n, err
}

// clearAlert sends an unencrypted unknown_ca alert in place of encrypted records, as clients with
// OpenSSL do.
type clearAlert struct{ net.Conn }

func (c clearAlert) Write(b []byte) (int, error) {
	const changeCipherSpec = 20 // after it all is encrypted
	if b[0] != changeCipherSpec {
		return c.Conn.Write(b)
	}
	_, err := c.Conn.Write(append(slices.Clone(b[:6]), 21, 3, 3, 0, 2, 2, 48))
	return len(b), err
}

func TestABrokenHelloIsAnsweredByAnAlert(t *testing.T) {
	l := newLab(t, nil)
	c, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte{22, 3, 1, 0, 8, 1, 0, 0, 4, 'j', 'u', 'n', 'k'})
	must(t, err)
	c.SetDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, []byte{21, 3, 1, 0, 2, 2, 50}) {
		t.Errorf("the client reads %v, %v; want the alert decode_error, and the end", got, err)
	}
	c.Close()
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(HandshakeFailed) {
		t.Errorf("line %v, want reason %s", e, HandshakeFailed)
	}
}

// withSpend gives alice limits that remember every connection for good.
func withSpend(l *lab) {
	l.config.Users[0].Serials = append(l.config.Users[0].Serials,
		serials("0x8000", "0xb0b", "0x7fffffffffffffffffffffffffffffffffffffff")...)
	l.config.Users[0].Limit = &Limit{Burst: 1e6, Every: 1000 * time.Hour}
	l.config.Users[0].AppLimits = map[string]Limit{
		"web": {Burst: 1e6, Every: 1000 * time.Hour, Open: 1e6}}
}

func (l *lab) checkRow(t *testing.T, r row, e entry, dialled int64) {
	t.Helper()
	if e["app"] != or(r.app, "web") {
		t.Errorf("line %v, want the app it is about", e)
	}
	if r.reason == "" {
		if e["reason"] != "done" || e["user"] != "alice" || e["serial"] == "" ||
			e["upstream"] != l.web.Addr().String() || e["sent"] == "0" {
			t.Errorf("line %v, want reason done, and who it was", e)
		}
		return
	}
	if e["reason"] != string(r.reason) || e["user"] != "" || e["serial"] != "" {
		t.Errorf("line %v, want reason %s, and nobody's name", e, r.reason)
	}
	if n := l.web.dialled.Load() + l.db.dialled.Load(); n != dialled {
		t.Errorf("an upstream was dialed %d times", n-dialled)
	}
}

// silent are the reasons for which the server sends no alert.
var silent = map[Reason]bool{NotTLS: true, HandshakeTooLarge: true, ClientAlert: true,
	ClientGone: true}

// alerts are the alerts that crypto/tls itself sends, before it calls VerifyConnection.
var alerts = map[Reason]string{OldTLS: "protocol version", NoCertificate: "certificate required"}

func TestCertificateTable(t *testing.T) {
	l := newLab(t, withSpend)
	var in []row
	for _, r := range certificateTable(t, l) {
		if r.reason == "" {
			in = append(in, r)
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			c := l.connect(t, r)
			_, err := io.WriteString(c, "hello, this is no TLS")
			if err == nil { // an error shows only once
				_, err = io.Copy(io.Discard, c)
			}
			var op *net.OpError
			if told := errors.As(err, &op) && op.Op == "remote error"; err == nil ||
				told == silent[r.reason] {
				t.Errorf("it reads %v; want an alert: %v", err, !silent[r.reason])
			}
			if want := alerts[r.reason]; !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("it reads %v; want %q", err, want)
			}
			c.Close()
			l.checkRow(t, r, l.log.of(t, c.LocalAddr()), 0)
		})
	}
	if !l.untouched(t) {
		t.Error("a client that was refused has been charged for")
	}
	for _, r := range in {
		t.Run(r.name, func(t *testing.T) {
			c := l.connect(t, r)
			must(t, greeted(c, "web"))
			must(t, echoed(c))
			must(t, c.(*tls.Conn).CloseWrite())
			if _, err := io.ReadAll(c); err != nil {
				t.Errorf("at the end: %v", err)
			}
			l.checkRow(t, r, l.log.of(t, c.LocalAddr()), 0)
		})
	}
	if l.untouched(t) {
		t.Error("clients that were let in have not been charged for")
	}
	l.noSecrets(t)
}

func (l *lab) connect(t *testing.T, r row) net.Conn {
	raw, err := net.Dial("tcp", l.addr(or(r.app, "web")))
	must(t, err)
	t.Cleanup(func() { raw.Close() })
	raw.SetDeadline(time.Now().Add(patience))
	if r.client == nil {
		return tls.Client(raw, l.clientConfig(r.cert))
	}
	return r.client(raw, l.clientConfig(r.cert))
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func TestCertificateTableWithOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("there is no openssl")
	}
	l := newLab(t, withSpend)
	caFile := l.config.TLS.CA[0]
	for i, r := range certificateTable(t, l) {
		if r.only {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			args := append([]string{"s_client", "-quiet", "-verify_return_error", "-CAfile",
				caFile, "-connect", l.addr(or(r.app, "web"))}, r.openssl...)
			if r.cert != nil {
				certFile, keyFile := writePEM(t, l.dir, strconv.Itoa(i), *r.cert)
				args = append(args, "-cert", certFile, "-key", keyFile)
				if len(r.cert.Certificate) > 1 {
					args = append(args, "-cert_chain", certFile)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, openssl, args...)
			stdin, err := cmd.StdinPipe()
			must(t, err)
			stdout, err := cmd.StdoutPipe()
			must(t, err)
			before, dialled := len(l.log.all()), l.web.dialled.Load()+l.db.dialled.Load()
			must(t, cmd.Start())
			got := make([]byte, len("web\n"))
			_, readErr := io.ReadFull(stdout, got)
			stdin.Close()
			if readErr == nil {
				cmd.Process.Kill()
			}
			io.Copy(io.Discard, stdout)
			cmd.Wait()
			if in := readErr == nil && string(got) == "web\n"; in != (r.reason == "") {
				t.Errorf("the client got %q, %v; want it in: %v", got, readErr, r.reason == "")
			}
			var e entry
			l.log.await(t, "after the others", func(line entry) bool {
				lines := l.log.all()
				if len(lines) > before {
					e = lines[before]
				}
				return e != nil
			})
			if r.reason == "" {
				if e["user"] != "alice" || e["serial"] == "" {
					t.Errorf("line %v, want alice", e)
				}
				return
			}
			l.checkRow(t, r, e, dialled)
		})
	}
}

func TestResumptionAttemptsGetFullHandshakes(t *testing.T) {
	l := newLab(t, nil)
	conf := l.clientConfig(&l.alice)
	cache := &ticketCounter{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	conf.ClientSessionCache = cache
	for range 3 {
		c, err := tls.Dial("tcp", l.addr("web"), conf)
		must(t, err)
		defer c.Close()
		must(t, greeted(c, "web"))
		must(t, echoed(c))
		if c.ConnectionState().DidResume {
			t.Error("the session was resumed")
		}
	}
	if cache.puts > 0 {
		t.Errorf("the server gave %d tickets", cache.puts)
	}
}

type ticketCounter struct {
	tls.ClientSessionCache
	puts int
}

func (c *ticketCounter) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		c.puts++
	}
	c.ClientSessionCache.Put(key, s)
}

func TestStolenCertificateDoesNotTouchTheVictimsBucket(t *testing.T) {
	l := newLab(t, withSpend)
	stolen := l.alice
	stolen.PrivateKey = newKey(t)
	const tries = 200
	errs := make(chan error, tries)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range tries / 8 {
				c, err := net.Dial("tcp", l.addr("web"))
				if err == nil {
					err = ended(tls.Client(c, l.clientConfig(&stolen)))
					c.Close()
				}
				errs <- err
			}
		})
	}
	wg.Wait()
	for range tries / 8 * 8 {
		must(t, <-errs)
	}
	if !l.untouched(t) {
		t.Error("the victim has been charged for")
	}
	l.stop()
	must(t, <-l.ran)
	l.ran <- nil
	lines := l.log.all()
	for _, e := range lines {
		if e["msg"] != "connection" || e["reason"] != string(NoProof) ||
			e["claimed_user"] != "alice" || e["claimed_serial"] != "a11ce" || e["user"] != "" {
			t.Errorf("line %v, want reason %s, and that alice is claimed", e, NoProof)
		}
	}
	if len(lines) != tries/8*8 {
		t.Errorf("%d lines, want one for each of %d", len(lines), tries/8*8)
	}
}

func TestRevokedWhileConnectingDoesNotSurvive(t *testing.T) {
	l := newLab(t, nil)
	without := l.with(func(c *Config) { c.Users = nil })
	for rounds := range 200 {
		raw, err := net.Dial("tcp", l.addr("web"))
		must(t, err)
		over := make(chan error, 1)
		half := make(chan struct{})
		go func() {
			c := tls.Client(&signal{Conn: raw, after: rounds % 4, reached: half},
				l.clientConfig(&l.alice))
			over <- ended(c)
		}()
		<-half
		l.reload(t, without)
		if err := <-over; err != nil {
			t.Fatalf("round %d: %v", rounds, err)
		}
		raw.Close()
		l.reload(t, l.config)
	}
	for _, e := range l.log.all() {
		if reason := Reason(e["reason"]); e["msg"] == "connection" && reason != Revoked &&
			reason != UnknownSerial {
			t.Errorf("line %v", e)
		}
	}
}

// The reload comes during a look-up of the user. At the first one after the handshake, the
// connection is not yet among those that a reload ends; at the second one, the look-up began before
// the reload.
func TestReloadBeforeTheConnectionIsRegisteredIsNotMissed(t *testing.T) {
	for _, during := range []int{1, 2} {
		l := newLab(t, withSpend)
		snap := *l.server.current.Load()
		users, lookups := snap.auth.Users, 0
		reloaded := make(chan error, 1)
		snap.auth.Users = lookup(func(c Claim) (*User, bool) {
			if lookups++; lookups == during {
				_, err := l.server.Reload(l.with(func(c *Config) { c.Users = nil }))
				reloaded <- err
			}
			return users.Lookup(c)
		})
		l.server.current.Store(&snap)
		c := l.dial(t, "web", &l.alice)
		must(t, ended(c))
		must(t, <-reloaded)
		if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(Revoked) ||
			e["user"] != "alice" || e["upstream"] != "" {
			t.Errorf("during lookup %d: line %v, want %s", during, e, Revoked)
		}
		if n := l.web.dialled.Load(); n > 0 {
			t.Errorf("during lookup %d: an upstream was dialed", during)
		}
	}
}

// The older snapshot is still judging a connection, for its admission or for Recheck, when a reload
// has judged it by the newer one. What the newer one says of the user and the CA holds.
func TestReloadWhileTheOlderSnapshotJudges(t *testing.T) {
	for _, test := range []struct {
		name   string
		during int // look-up of the user
		limit  Limit
	}{
		{"admission", 2, Limit{Open: 2}},
		{"Recheck", 3, Limit{Open: 1}}, // only new connections get new limits
	} {
		l := newLab(t, func(l *lab) { l.config.Users[0].Limit = &Limit{Open: 1} })
		renewed := l.ca.renewed(t, func(c *x509.Certificate) {
			c.NotAfter = time.Now().Add(20 * time.Minute)
		})
		file, _ := writePEM(t, l.dir, "new", tls.Certificate{Certificate: [][]byte{renewed.cert.Raw}})
		snap := *l.server.current.Load()
		users, lookups := snap.auth.Users, 0
		reloaded := make(chan error, 1)
		snap.auth.Users = lookup(func(c Claim) (*User, bool) {
			if lookups++; lookups == test.during {
				_, err := l.server.Reload(l.with(func(c *Config) {
					c.TLS.CA = []string{file}
					c.Users[0].Limit = &Limit{Open: 2}
				}))
				reloaded <- err
			}
			return users.Lookup(c)
		})
		l.server.current.Store(&snap)
		l.in(t, "web", &l.alice)
		if n := l.server.Recheck(); n != 0 {
			t.Errorf("%s: Recheck ended %d connections", test.name, n)
		}
		must(t, <-reloaded)
		l.server.liveMu.Lock()
		for session := range l.server.live {
			if id := session.id.Load(); !id.Expires.Equal(renewed.cert.NotAfter) {
				t.Errorf("%s: it expires at %v, want the new CA's %v", test.name, id.Expires,
					renewed.cert.NotAfter)
			}
		}
		l.server.liveMu.Unlock()
		l.server.limits.mu.Lock()
		for key, k := range l.server.limits.kept {
			want := 0
			if key.limit == test.limit {
				want++
			}
			if k.configured {
				want++
			}
			if k.refs != want {
				t.Errorf("%s: limit %v has %d references, want %d", test.name, key, k.refs, want)
			}
		}
		l.server.limits.mu.Unlock()
	}
}

// A connection has been accepted for an app when the reload removes it.
func TestReloadThatRemovesTheAppBeforeTheHandshake(t *testing.T) {
	l := newLab(t, nil)
	addr, snap := l.addr("web"), *l.server.current.Load()
	snap.apps = nil
	l.server.current.Store(&snap)
	// If Dial fails, the server has reset the connection already.
	if c, err := net.Dial("tcp", addr); err == nil {
		defer c.Close()
		must(t, ended(c))
	}
	if e := l.log.await(t, "of a connection",
		func(e entry) bool {
			return e["msg"] == "connection"
		}); e["reason"] != string(AppRemoved) || e["user"] != "" {
		t.Errorf("line %v, want %s", e, AppRemoved)
	}
}

// A reload replaces the app in the middle of a handshake, then an administrator drains an upstream.
func TestDrainDuringAHandshakeOfAReplacedApp(t *testing.T) {
	l := newLab(t, nil)
	snap := *l.server.current.Load()
	users, drained := snap.auth.Users, make(chan error, 1)
	snap.auth.Users = lookup(func(c Claim) (*User, bool) {
		web, db := l.web.Addr().String(), l.db.Addr().String()
		_, err := l.server.Reload(l.with(func(c *Config) {
			c.Apps[0].IdleTimeout = time.Minute
			c.Apps[0].Upstreams = []Upstream{{Addr: web}, {Addr: db}}
		}))
		drained <- errors.Join(err, l.server.drainUpstream("web", web, true))
		return users.Lookup(c)
	})
	l.server.current.Store(&snap)
	must(t, greeted(l.dial(t, "web", &l.alice), "db"))
	must(t, <-drained)
}

// Two reloads replace the app in the middle of a handshake. The client gets an upstream of the
// second one.
func TestReloadThatReplacesTheAppDuringAHandshake(t *testing.T) {
	l := newLab(t, nil)
	snap := *l.server.current.Load()
	users, reloaded := snap.auth.Users, make(chan error, 1)
	snap.auth.Users = lookup(func(c Claim) (*User, bool) {
		var errs []error
		for i, addr := range []string{"127.0.0.1:1", l.db.Addr().String()} {
			_, err := l.server.Reload(l.with(func(c *Config) {
				c.Apps[0].IdleTimeout = time.Minute * time.Duration(1+i)
				c.Apps[0].Upstreams = []Upstream{{Addr: addr}}
			}))
			errs = append(errs, err)
		}
		reloaded <- errors.Join(errs...)
		return users.Lookup(c)
	})
	before := snap.proxy("web")
	l.server.current.Store(&snap)
	c := l.dial(t, "web", &l.alice)
	must(t, greeted(c, "db"))
	must(t, <-reloaded)
	if l.server.current.Load().proxy("web") == before {
		t.Error("the app was not replaced")
	}
	if n := l.web.dialled.Load(); n > 0 {
		t.Error("the old upstream was dialed")
	}
}

type lookup func(Claim) (*User, bool)

func (f lookup) Lookup(c Claim) (*User, bool) { return f(c) }

func TestHandshakeTimeoutIsForTheHandshakeOnly(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(l *lab) { l.config.Handshake.Timeout = 2 * time.Second })
	c := l.in(t, "web", &l.alice)
	c.SetReadDeadline(time.Now().Add(2100 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Read = %d, %v, want nothing until its deadline", n, err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	must(t, echoed(c))
}

// A signal closes reached with the read after so many.
type signal struct {
	net.Conn
	after   int
	reached chan struct{}
}

func (s *signal) Read(b []byte) (int, error) {
	if s.after--; s.after == -1 {
		close(s.reached)
	}
	return s.Conn.Read(b)
}

func TestRevokingEndsLiveConnectionsAndNoOthers(t *testing.T) {
	bob := leafOf(0xb0b)
	for _, test := range []struct {
		name   string
		change func(*lab, *Config)
	}{
		{"the user is gone", func(_ *lab, c *Config) { c.Users = c.Users[1:] }},
		{"the serial is gone", func(_ *lab, c *Config) { c.Users[0].Serials = serials("0xa") }},
		{"the serial is another's", func(_ *lab, c *Config) { c.Users[0].Name = "mallory" }},
		{"the right is gone", func(_ *lab, c *Config) { c.Users[0].Apps = []string{"db"} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			var bobs tls.Certificate
			l := newLab(t, func(l *lab) {
				bobs = l.ca.issue(t, bob)
				l.config.Users = append(l.config.Users,
					User{Name: "bob", Serials: serials("0xb0b"), Apps: []string{"web"}})
			})
			victim, other := l.in(t, "web", &l.alice), l.in(t, "web", &bobs)
			start := time.Now()
			l.reload(t, l.with(func(c *Config) { test.change(l, c) }))
			if err := ended(victim); err != nil {
				t.Error(err)
			}
			if d := time.Since(start); d > time.Second {
				t.Errorf("it took %v", d)
			}
			if e := l.log.of(t, victim.LocalAddr()); e["reason"] != string(Revoked) ||
				e["user"] != "alice" || e["serial"] != "a11ce" {
				t.Errorf("line %v, want %s", e, Revoked)
			}
			must(t, echoed(other))
		})
	}
	t.Run("the app is gone", func(t *testing.T) {
		l := newLab(t, func(l *lab) { l.config.Users[0].Apps = []string{"web", "db"} })
		victim, other, addr := l.in(t, "db", &l.alice), l.in(t, "web", &l.alice), l.addr("db")
		start := time.Now()
		l.reload(t, l.with(func(c *Config) {
			c.Apps, c.Users[0].Apps = c.Apps[:1], []string{"web"}
		}))
		must(t, ended(victim))
		if d := time.Since(start); d > time.Second {
			t.Errorf("it took %v", d)
		}
		must(t, echoed(other))
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			t.Error("it still listens")
		}
	})
	t.Run("the CA is another one, with the same name and serials", func(t *testing.T) {
		l := newLab(t, nil)
		victim := l.in(t, "web", &l.alice)
		ca := newAuthority(t, "ca")
		caFile, _ := writePEM(t, l.dir, "new-ca",
			tls.Certificate{Certificate: [][]byte{ca.cert.Raw}})
		start := time.Now()
		l.reload(t, l.with(func(c *Config) { c.TLS.CA = []string{caFile} }))
		must(t, ended(victim))
		if d := time.Since(start); d > time.Second {
			t.Errorf("it took %v", d)
		}
		cert := ca.issue(t, leafOf(0xa11ce))
		l.in(t, "web", &cert)
	})
}

func TestExpiryEndsTheConnection(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	tmpl := leafOf(0xa11ce)
	tmpl.NotAfter = time.Now().Add(3 * time.Second).Truncate(time.Second)
	cert := l.ca.issue(t, tmpl)
	c, other := l.in(t, "web", &cert), l.in(t, "web", &l.alice)
	must(t, ended(c))
	// half of it for a machine that is busy
	if now := time.Now(); now.Before(tmpl.NotAfter.Add(-50*time.Millisecond)) ||
		now.After(tmpl.NotAfter.Add(time.Second+time.Second/2)) {
		t.Errorf("ended %v after the certificate did", now.Sub(tmpl.NotAfter))
	}
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(Expired) || e["user"] != "alice" {
		t.Errorf("line %v, want %s", e, Expired)
	}
	must(t, echoed(other))
}

// A drain may take long. A certificate that expires during it ends its connection as usual.
func TestExpiryEndsTheConnectionDuringADrain(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(l *lab) { l.config.DrainTimeout = time.Hour })
	tmpl := leafOf(0xa11ce)
	tmpl.NotAfter = time.Now().Add(3 * time.Second).Truncate(time.Second)
	cert := l.ca.issue(t, tmpl)
	c, other := l.in(t, "web", &cert), l.in(t, "web", &l.alice)
	l.stop()
	<-l.server.closing.Done()
	must(t, ended(c))
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(Expired) || e["user"] != "alice" {
		t.Errorf("line %v, want %s", e, Expired)
	}
	must(t, echoed(other))
}

func TestReloadsUnderLoad(t *testing.T) {
	l := newLab(t, nil)
	broken := []*Config{
		l.with(func(c *Config) { c.TLS.CA = []string{filepath.Join(l.dir, "missing")} }),
		l.with(func(c *Config) { c.Apps[1].Listen = l.web.Addr().String() }), // taken
		l.with(func(c *Config) { c.Users[0].Serials = serials("1234") }),
	}
	var wg sync.WaitGroup
	var echoes atomic.Int64
	stop, errs := make(chan struct{}), make(chan error, 4)
	for i := range cap(errs) {
		wg.Go(func() {
			for {
				c, err := tls.Dial("tcp", l.addr("web"), l.clientConfig(&l.alice))
				if err == nil {
					err = greeted(c, "web")
				}
				// the first one keeps its connection
				for round := 0; err == nil && (i == 0 || round < 3); round++ {
					err = echoed(c)
					echoes.Add(1)
					select {
					case <-stop:
						c.Close()
						errs <- err
						return
					default:
					}
				}
				if err != nil {
					errs <- err
					return
				}
				c.Close()
			}
		})
	}
	addrs := fmt.Sprint(l.server.Addrs())
	reloads := 200
	if testing.Short() {
		reloads = 50
	}
	for i := range reloads {
		c := l.config
		if i%3 == 2 {
			c = broken[i/3%len(broken)]
		} else if i%2 == 1 {
			c = l.with(func(c *Config) {
				c.Apps[0].Upstreams = []Upstream{{Addr: l.web.Addr().String(), Weight: 2}}
			})
		}
		if _, err := l.server.Reload(c); (err != nil) != (i%3 == 2) {
			t.Errorf("reload %d: %v", i, err)
		}
		// Let connections move data between two reloads.
		for before := echoes.Load(); echoes.Load() < before+4 && len(errs) == 0; {
			time.Sleep(100 * time.Microsecond)
		}
	}
	close(stop)
	wg.Wait()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if now := fmt.Sprint(l.server.Addrs()); now != addrs {
		t.Errorf("addresses were %s and are %s", addrs, now)
	}
}

func TestReloadKeepsWhatIsTheSame(t *testing.T) {
	l := newLab(t, func(l *lab) {
		l.config.Users[0].Apps = []string{"web", "db"}
		for i := range l.config.Apps {
			l.config.Apps[i].Listen = proxytest.FreeAddr(t)
		}
	})
	web, db := l.addr("web"), l.addr("db")
	old := l.in(t, "web", &l.alice)

	// Another idle timeout: another app behind the same listener.
	l.reload(t, l.with(func(c *Config) { c.Apps[0].IdleTimeout = time.Minute }))
	if l.addr("web") != web || l.addr("db") != db {
		t.Errorf("web is at %s, db at %s; they were at %s, %s", l.addr("web"), l.addr("db"),
			web, db)
	}
	must(t, echoed(old))
	second := l.in(t, "web", &l.alice)
	must(t, ended2(old))
	l.log.of(t, old.LocalAddr())

	// Other upstreams: for new connections.
	l.reload(t, l.with(func(c *Config) {
		c.Apps[0].IdleTimeout, c.Apps[0].Upstreams = time.Minute, c.Apps[1].Upstreams
	}))
	must(t, echoed(second))
	c := l.dial(t, "web", &l.alice)
	must(t, greeted(c, "db"))

	// An address of its own for web, and its old one for db.
	l.reload(t, l.with(func(c *Config) {
		c.Apps[0].IdleTimeout = time.Minute
		c.Apps[0].Listen, c.Apps[1].Listen = db, web
	}))
	if l.addr("web") != db || l.addr("db") != web {
		t.Errorf("web is at %s, db at %s; want them to have changed places: %s, %s",
			l.addr("web"), l.addr("db"), db, web)
	}
	must(t, echoed(second))
	l.in(t, "web", &l.alice)
	l.in(t, "db", &l.alice)

	// A name of its own for a listener.
	l.reload(t, l.with(func(c *Config) {
		c.Apps = []App{{ID: "www", Listen: db, Upstreams: c.Apps[0].Upstreams}}
		c.Users[0].Apps = []string{"www"}
	}))
	must(t, ended(second))
	must(t, greeted(l.dial(t, "www", &l.alice), "web"))
}

// Port 0 can be written in several ways. Two apps with port 0 never share a port.
func TestReloadKeepsAppsWithAnyPortApart(t *testing.T) {
	for _, port := range []string{"0", "00", "+0"} {
		l := newLab(t, func(l *lab) {
			l.config.Apps[0].Listen, l.config.Apps[1].Listen = "127.0.0.1:"+port, "127.0.0.1:"+port
		})
		before := l.server.Addrs()
		for i := range 16 { // maps have no order
			l.reload(t, l.with(func(c *Config) {
				c.Apps[1].IdleTimeout = time.Duration(i+1) * time.Minute
			}))
			after := l.server.Addrs()
			for id, addr := range before {
				if after[id].String() != addr.String() {
					t.Fatalf("port %q: %s listens on %v, did on %v", port, id, after[id], addr)
				}
			}
		}
	}
}

func TestReloadKeepsTheCountsOfUpstreams(t *testing.T) {
	l := newLab(t, nil)
	l.in(t, "web", &l.alice)
	l.in(t, "web", &l.alice)
	l.reload(t, l.with(func(c *Config) {
		c.Apps[0].Upstreams = []Upstream{{Addr: l.db.Addr().String()},
			{Addr: l.web.Addr().String()}}
	}))
	stats := l.server.Apps()["web"].Stats()
	if up := stats.Upstreams; len(up) != 2 || up[0].Open != 0 || up[1].Open != 2 ||
		up[1].Total != 2 {
		t.Errorf("%+v, want the two connections on the second", up)
	}
	must(t, greeted(l.dial(t, "web", &l.alice), "db"))
}

// ended2 ends c with a clean end of the stream.
func ended2(c *tls.Conn) error {
	err := c.CloseWrite()
	if err == nil {
		_, err = io.ReadAll(c)
	}
	return err
}

// A resetHook is a connection that calls reset before it is reset.
type resetHook struct {
	net.Conn
	reset func()
}

func (c resetHook) SetLinger(int) error {
	c.reset()
	return nil
}

// The new snapshot judges a client that connects while a reload ends sessions: otherwise no reload
// would end its session.
func TestReloadIsInForceBeforeItEndsSessions(t *testing.T) {
	l := newLab(t, nil)
	old := l.server.current.Load()
	var inForce atomic.Bool
	dialing := make(chan struct{})
	app, err := lbproxy.New("never", []lbproxy.Upstream{{Addr: "u:1"}}, &lbproxy.Options{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			close(dialing)
			<-ctx.Done()
			return nil, ctx.Err()
		},
	})
	must(t, err)
	defer app.Close()
	ours, theirs := net.Pipe()
	defer theirs.Close()
	conn := &lbproxy.Conn{Client: resetHook{ours, func() {
		inForce.Store(l.server.current.Load() != old)
	}}}
	served := make(chan struct{})
	go func() { defer close(served); app.ServeConn(t.Context(), conn) }()
	<-dialing
	revoked := &session{app: "web", conn: conn}
	revoked.id.Store(&Identity{User: &User{Name: "alice"}, ca: l.ca.cert,
		claim: Claim{Cert: l.alice.Leaf}, Expires: time.Now().Add(time.Hour)})
	l.server.liveMu.Lock()
	l.server.live[revoked] = struct{}{}
	l.server.liveMu.Unlock()
	l.reload(t, l.with(func(c *Config) { c.Users = nil }))
	<-served
	if !inForce.Load() {
		t.Error("the session was ended, or not, before the new snapshot was in force")
	}
	l.server.liveMu.Lock()
	delete(l.server.live, revoked)
	l.server.liveMu.Unlock()
}

// A sweep may meet a session that another sweep is ending.
func TestOverlappingSweepsCountASessionOnce(t *testing.T) {
	l := newLab(t, nil)
	c := l.in(t, "web", &l.alice)
	defer c.Close()
	again := 0
	ended := l.server.sweep(func(*session) error {
		again += l.server.sweep(func(*session) error { return &Refusal{Reason: Revoked} })
		return &Refusal{Reason: Revoked}
	})
	if ended+again != 1 {
		t.Errorf("%d and %d sessions were ended, want one in all", ended, again)
	}
}

func TestEachAppHasItsOwnIdleTimeout(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.Apps[0].IdleTimeout = 200 * time.Millisecond })
	c := l.dial(t, "web", &l.alice)
	must(t, ended(c))
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(lbproxy.EndIdleTimeout) {
		t.Errorf("line %v, want %s", e, lbproxy.EndIdleTimeout)
	}
}

func TestReloadThatFailsChangesNothing(t *testing.T) {
	l := newLab(t, nil)
	c := l.in(t, "web", &l.alice)
	free := proxytest.FreeAddr(t)
	_, err := l.server.Reload(l.with(func(c *Config) {
		c.Users = nil
		c.Apps = append([]App{{ID: "new", Listen: free,
			HealthCheck: &HealthCheck{}, Upstreams: c.Apps[0].Upstreams}}, c.Apps...)
		c.Apps[1].Listen = l.web.Addr().String()
	}))
	if err == nil || !strings.Contains(err.Error(), `app "web"`) {
		t.Errorf("Reload = %v, want an error about web's address", err)
	}
	must(t, echoed(c))
	l.in(t, "web", &l.alice)
	if _, ok := l.server.Addrs()["new"]; ok {
		t.Error("the new app is there")
	}
	proxytest.ListenAgain(t, free).Close()
}

// Package net/http recovers a panic during the reload that an administrator asks for.
func TestReloadThatPanicsChangesNothing(t *testing.T) {
	limit := &Limit{Open: 1}
	l := newLab(t, func(l *lab) { l.config.Users[0].Limit = limit })
	free, page, bind := proxytest.FreeAddr(t), proxytest.FreeAddr(t), l.server.bind
	l.server.bind = func(app, addr string) (net.Listener, error) {
		if app == "bad" {
			panic("Listen")
		}
		return bind(app, addr)
	}
	if panicOf(func() {
		l.server.Reload(l.with(func(c *Config) {
			c.Users[0].Limit = nil
			c.Admin = &Admin{Listen: page}
			c.Apps = append(c.Apps,
				App{ID: "new", Listen: free, Upstreams: c.Apps[0].Upstreams},
				App{ID: "bad", Listen: "127.0.0.1:0", Upstreams: c.Apps[0].Upstreams})
		}))
	}) != "Listen" {
		t.Error("no panic")
	}
	proxytest.ListenAgain(t, free).Close()
	proxytest.ListenAgain(t, page).Close()
	if k := l.server.limits.kept[limitKey{"alice", "", *limit}]; k == nil || !k.configured {
		t.Errorf("limit %v, want it configured", k)
	}
	l.in(t, "web", &l.alice)
}

func TestLimitsAreSharedByAppsAndKeptByReloads(t *testing.T) {
	l := newLab(t, func(l *lab) {
		l.config.Users[0].Apps = []string{"web", "db"}
		l.config.Users[0].Limit = &Limit{Open: 2}
		l.config.Users[0].AppLimits = map[string]Limit{"db": {Open: 1}}
	})
	refused := func(app string) {
		t.Helper()
		c := l.dial(t, app, &l.alice)
		must(t, ended(c))
		if e := l.log.of(t, c.LocalAddr()); e["reason"] != "rate-limited" || e["user"] != "alice" {
			t.Errorf("line %v, want rate-limited", e)
		}
	}
	l.in(t, "db", &l.alice)
	refused("db")
	web := l.in(t, "web", &l.alice)
	refused("web")
	l.reload(t, l.with(func(c *Config) {
		c.Users[0].Limit = &Limit{Open: 2} // another pointer, the same limit
	}))
	refused("web")
	must(t, ended2(web))
	l.log.of(t, web.LocalAddr())
	l.in(t, "web", &l.alice)
	l.reload(t, l.with(func(c *Config) { c.Users[0].Limit = &Limit{Open: 100} }))
	refused("db")
	l.in(t, "web", &l.alice)
}

func TestEachPartOfALimitCounts(t *testing.T) {
	open := lbproxy.Event{Kind: lbproxy.EventOpen}
	data := lbproxy.Event{Kind: lbproxy.EventData, Bytes: 1000}
	for _, l := range []Limit{{Burst: 1, Every: time.Hour}, {Open: 1}, {BytesPerSecond: 1}} {
		m := l.manager()
		first := m.Report(t.Context(), open)
		held := m.Report(t.Context(), data)
		second := m.Report(t.Context(), open)
		if first.Exceeded || second.Exceeded != (l.BytesPerSecond == 0) ||
			(held.Wait > 0) != (l.BytesPerSecond > 0) {
			t.Errorf("%+v: %+v, %+v, %+v", l, first, held, second)
		}
	}
}

func TestDefaults(t *testing.T) {
	snap := newLab(t, nil).server.current.Load()
	want := Handshake{Timeout: 10 * time.Second, MaxConcurrent: 256, MaxPerAddress: 16,
		MaxBytes: 16 << 10}
	if got := snap.gate.Handshake; got != want || snap.drainTimeout() != 30*time.Second {
		t.Errorf("%+v, drain %v; want %+v, 30s", got, snap.drainTimeout(), want)
	}
}

func TestReloadWithOtherHandshakeBoundsMakesANewGate(t *testing.T) {
	l := newLab(t, nil)
	gate := l.server.current.Load().gate
	l.reload(t, l.with(func(c *Config) { c.Handshake.MaxPerAddress = 16 })) // the default
	if l.server.current.Load().gate != gate {
		t.Error("the same bounds, and another gate")
	}
	silent, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer silent.Close()
	silent.Write([]byte{22})
	for l.server.gated() == 0 {
		time.Sleep(time.Millisecond)
	}
	l.reload(t, l.with(func(c *Config) {
		c.Handshake = Handshake{MaxPerAddress: 1, MaxConcurrent: 1}
	}))
	l.in(t, "web", &l.alice).Close()
}

func TestUpstreamTLSAuthenticatesBothSides(t *testing.T) {
	ca := newAuthority(t, "upstream CA")
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	secure := newUpstream(t, "secure", &tls.Config{
		Certificates: []tls.Certificate{ca.issue(t, serverOf(3))},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool,
	})
	l := newLab(t, func(l *lab) {
		caFile, _ := writePEM(t, l.dir, "upstream-ca",
			tls.Certificate{Certificate: [][]byte{ca.cert.Raw}})
		certFile, keyFile := writePEM(t, l.dir, "proxy", ca.issue(t, leafOf(4)))
		l.config.Apps[0].Upstreams = []Upstream{{Addr: secure.Addr().String(), TLS: &UpstreamTLS{
			CA: caFile, Cert: certFile, Key: keyFile, ServerName: "localhost",
		}}}
	})
	c := l.dial(t, "web", &l.alice)
	must(t, greeted(c, "secure"))
	must(t, echoed(c))

	wrong := *l.config.Apps[0].Upstreams[0].TLS
	wrong.ServerName = "elsewhere"
	l.reload(t, l.with(func(c *Config) {
		c.Apps[0].Upstreams = []Upstream{{Addr: secure.Addr().String(), TLS: &wrong}}
	}))
	must(t, echoed(c))
	c = l.dial(t, "web", &l.alice)
	must(t, ended(c))
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != "dial-failed" || e["detail"] == "" {
		t.Errorf("line %v, want dial-failed", e)
	}
}

func TestCutStreamDoesNotLookComplete(t *testing.T) {
	l := newLab(t, nil)
	c := l.in(t, "web", &l.alice)
	must(t, c.NetConn().(*net.TCPConn).CloseWrite()) // without close_notify
	if err := <-l.web.ends; err == nil {
		t.Error("the upstream saw a clean end")
	}
	// it was quiet
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(lbproxy.EndClientClosed) {
		t.Errorf("line %v, want %s", e, lbproxy.EndClientClosed)
	}
}

func TestCloseDoesNotWaitForAClientThatDoesNotRead(t *testing.T) {
	l := newLab(t, nil)
	c := l.in(t, "web", &l.alice)
	c.NetConn().(*net.TCPConn).SetReadBuffer(4096)
	over := make(chan struct{})
	go func() {
		defer close(over)
		for chunk := bytes.Repeat([]byte("x"), 64<<10); ; {
			c.SetWriteDeadline(time.Now().Add(time.Second / 2))
			if _, err := c.Write(chunk); err != nil {
				return // nothing moves any more
			}
		}
	}()
	<-over
	start := time.Now()
	l.server.Close()
	if d := time.Since(start); d > time.Second {
		t.Errorf("Close took %v", d)
	}
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != "closed" {
		t.Errorf("line %v, want closed", e)
	}
}

// crypto/tls answers no KeyUpdate while it writes, and does not close while a client leaves its
// answer unread.
func TestRevokingDoesNotWaitForAClientThatFloodsKeyUpdatesAndDoesNotRead(t *testing.T) {
	l := newLab(t, nil)
	raw, flood := l.records(t)
	var err error
	for text := make([]byte, 8<<10); err == nil; {
		raw.SetWriteDeadline(time.Now().Add(time.Second))
		err = flood.write(23, text)
		if err == nil {
			err = flood.write(22, []byte{24, 0, 0, 1, 1}) // KeyUpdate, update_requested
			flood.update(t)
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("flooding: %v, want that nothing moves any more", err)
	}
	start := time.Now()
	l.reload(t, l.with(func(c *Config) { c.Users = nil }))
	e := l.log.of(t, raw.LocalAddr())
	if d := time.Since(start); e["reason"] != string(Revoked) || d > time.Second {
		t.Errorf("after %v: line %v, want %s", d, e, Revoked)
	}
}

// A client cannot keep the server busy with KeyUpdates only, or with several in a record.
func TestAFloodOfKeyUpdatesEndsTheConnection(t *testing.T) {
	l := newLab(t, nil)
	for _, at := range []int{1, 2, 100} { // in a record
		raw, flood := l.records(t)
		go io.Copy(io.Discard, raw) // it does read
		raw.SetDeadline(time.Now().Add(patience))
		for err := error(nil); err == nil; {
			err = flood.write(22, bytes.Repeat([]byte{24, 0, 0, 1, 0}, at)) // update_not_requested
			for range at {
				flood.update(t)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d in a record are taken without end", at)
			}
		}
		e := l.log.of(t, raw.LocalAddr())
		// it was no KeyUpdate
		if e["reason"] != "client-error" || e["user"] != "alice" ||
			strings.Contains(e["detail"], "MAC") {

			t.Errorf("%d in a record: line %v, want client-error", at, e)
		}
	}
	l.in(t, "web", &l.alice)
}

// records makes a connection as alice and returns it with the writer of its next records.
func (l *lab) records(t *testing.T) (net.Conn, *records) {
	var secrets bytes.Buffer
	raw, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	t.Cleanup(func() { raw.Close() })
	raw.(*net.TCPConn).SetReadBuffer(4096)
	conf := l.clientConfig(&l.alice)
	conf.KeyLogWriter = &secrets
	c := tls.Client(raw, conf)
	must(t, greeted(c, "web"))
	if suite := c.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("no records are written here for %s", tls.CipherSuiteName(suite))
	}
	_, secret, _ := strings.Cut(secrets.String(), "CLIENT_TRAFFIC_SECRET_0 ")
	_, secret, _ = strings.Cut(secret, " ")
	secret, _, _ = strings.Cut(secret, "\n")
	key, err := hex.DecodeString(secret)
	must(t, err)
	r := &records{Writer: raw}
	r.use(t, key)
	return raw, r
}

// Records are written as TLS 1.3 with TLS_AES_128_GCM_SHA256 has them.
type records struct {
	io.Writer
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	number uint64
}

func (r *records) use(t *testing.T, secret []byte) {
	r.secret, r.number = secret, 0
	block, err := aes.NewCipher(r.expand(t, "key", 16))
	must(t, err)
	r.aead, err = cipher.NewGCM(block)
	must(t, err)
	r.iv = r.expand(t, "iv", 12)
}

// update advances to the next secret, as after a KeyUpdate.
func (r *records) update(t *testing.T) { r.use(t, r.expand(t, "traffic upd", sha256.Size)) }

// expand is HKDF-Expand-Label (RFC 8446, section 7.1).
func (r *records) expand(t *testing.T, label string, size byte) []byte {
	info := string([]byte{0, size, byte(len("tls13 " + label))}) + "tls13 " + label + "\x00"
	key, err := hkdf.Expand(sha256.New, r.secret, info, int(size))
	must(t, err)
	return key
}

func (r *records) write(kind byte, text []byte) error {
	nonce := bytes.Clone(r.iv)
	binary.BigEndian.PutUint64(nonce[4:], binary.BigEndian.Uint64(nonce[4:])^r.number)
	r.number++
	size := len(text) + 1 + r.aead.Overhead()
	header := []byte{23, 3, 3, byte(size >> 8), byte(size)}
	_, err := r.Write(r.aead.Seal(header, nonce, append(bytes.Clone(text), kind), header))
	return err
}

func TestCloseEndsHandshakes(t *testing.T) {
	l := newLab(t, nil)
	c, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer c.Close()
	c.Write([]byte{22})
	for l.server.gated() == 0 { // it takes a connection a moment to get there
		l.in(t, "web", &l.alice).Close()
	}
	start := time.Now()
	l.server.Close()
	if d := time.Since(start); d > time.Second {
		t.Errorf("Close took %v", d)
	}
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != "closed" {
		t.Errorf("line %v, want closed", e)
	}
}

func (s *Server) gated() int {
	g := s.current.Load().gate
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting.Len() + g.inside.Len()
}

func TestRunDrains(t *testing.T) {
	l := newLab(t, nil)
	c, addr := l.in(t, "web", &l.alice), l.addr("web")
	if err := l.server.Run(t.Context()); err == nil || errors.Is(err, ErrServerClosed) {
		t.Errorf("Run while it runs = %v", err)
	}
	l.stop()
	for { // until it does not listen any more
		d, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		d.Close()
	}
	must(t, echoed(c))
	if _, err := l.server.Reload(l.config); !errors.Is(err, ErrServerClosed) {
		t.Errorf("Reload during a drain = %v, want ErrServerClosed", err)
	}
	must(t, echoed(c))
	must(t, ended2(c))
	must(t, <-l.ran)
	l.ran <- nil
	if err := l.server.Run(t.Context()); !errors.Is(err, ErrServerClosed) {
		t.Errorf("Run again = %v, want ErrServerClosed", err)
	}
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != "done" {
		t.Errorf("line %v, want done", e)
	}
}

func TestRunResetsConnectionsAfterTheDrainTimeout(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.DrainTimeout = time.Millisecond })
	c := l.in(t, "web", &l.alice)
	l.stop()
	must(t, ended(c))
	err := <-l.ran
	l.ran <- nil
	if err == nil || !strings.Contains(err.Error(), "reset: 1") {
		t.Errorf("Run = %v, want it to tell of 1 connection", err)
	}
}

func TestServerThatDoesNotRunCanBeClosed(t *testing.T) {
	l := newLab(t, nil)
	s, err := New(l.config, nil)
	must(t, err)
	addr := s.Addrs()["web"].String()
	_, err = s.Reload(l.with(func(c *Config) {
		c.Apps[0].IdleTimeout = time.Second
		c.Apps = c.Apps[:1]
	}))
	must(t, err)
	must(t, s.Close())
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("it still listens")
	}
	if err := s.Run(t.Context()); !errors.Is(err, ErrServerClosed) {
		t.Errorf("Run = %v, want ErrServerClosed", err)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("peer\ntext \x1b[31m \u202e\xff")
	f.Fuzz(func(t *testing.T, text string) {
		got := clean(text, 200)
		if strings.ContainsAny(got, "\n\r\x1b\u202e\u2028") || len(got) > 3*len(text) {
			t.Errorf("clean(%q) = %q", text, got)
		}
	})
}
