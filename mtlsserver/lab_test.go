package mtlsserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

// patience bounds how long a test waits for an expected event.
const patience = 20 * time.Second

// An authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, caOf(name, 1), caOf(name, 1), key.Public(), key)
	return &authority{parse(t, der, err), key}
}

// sub returns an authority that a certified.
func (a *authority) sub(t testing.TB) *authority {
	return a.certify(t, "sub of "+a.cert.Subject.CommonName)
}

func (a *authority) certify(t testing.TB, name string) *authority {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, caOf(name, 2), a.cert, key.Public(), a.key)
	return &authority{parse(t, der, err), key}
}

// renewed returns a with a new certificate for its key.
func (a *authority) renewed(t testing.TB, change func(*x509.Certificate)) *authority {
	t.Helper()
	tmpl := caOf(a.cert.Subject.CommonName, 3)
	change(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	return &authority{parse(t, der, err), a.key}
}

func caOf(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
}

// leafOf returns the template of a valid client certificate.
func leafOf(serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "peer text\nreason=done"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
}

// issue signs tmpl for a key, by default a new one.
func (a *authority) issue(t testing.TB, tmpl *x509.Certificate,
	key ...crypto.Signer) tls.Certificate {
	t.Helper()
	if key == nil {
		key = []crypto.Signer{newKey(t)}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key[0].Public(), a.key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key[0], Leaf: parse(t, der, err)}
}

// issueNegative signs a client certificate with a negative serial, which x509.CreateCertificate
// refuses.
func (a *authority) issueNegative(t testing.TB) tls.Certificate {
	t.Helper()
	cert := a.issue(t, leafOf(0xa11ce))
	var outer struct {
		TBS       []asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	_, err := asn1.Unmarshal(cert.Certificate[0], &outer)
	must(t, err)
	negative, err := asn1.Marshal(big.NewInt(-0xa11ce))
	must(t, err)
	outer.TBS[1] = asn1.RawValue{FullBytes: negative}
	tbs, err := asn1.Marshal(outer.TBS)
	must(t, err)
	digest := sha256.Sum256(tbs)
	signature, err := a.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	must(t, err)
	outer.Signature = asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	der, err := asn1.Marshal(outer)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: cert.PrivateKey, Leaf: cert.Leaf}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func parse(t testing.TB, der []byte, err error) *x509.Certificate {
	t.Helper()
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// writePEM writes cert and key into dir and returns their paths.
func writePEM(t testing.TB, dir, name string, cert tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	var text []byte
	for _, der := range cert.Certificate {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	must(t, os.WriteFile(certFile, text, 0o600))
	if cert.PrivateKey != nil {
		der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		must(t, err)
		must(t, os.WriteFile(keyFile,
			pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	}
	return certFile, keyFile
}

// A book is a slog.Handler that keeps all lines in the form of a text handler.
type book struct {
	mu    sync.Mutex
	lines []entry
	told  map[string]bool // the numbers of those that of has returned
	more  chan struct{}   // closed when there is another line
}

// An entry is a line's attributes, its message under "msg" and its level under "level".
type entry map[string]string

func (b *book) Enabled(context.Context, slog.Level) bool { return true }
func (b *book) WithAttrs([]slog.Attr) slog.Handler       { panic("not used") }
func (b *book) WithGroup(string) slog.Handler            { panic("not used") }

func (b *book) Handle(_ context.Context, r slog.Record) error {
	e := entry{"msg": r.Message, "level": r.Level.String()}
	r.Attrs(func(a slog.Attr) bool {
		e[a.Key] = a.Value.String()
		return true
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	e["number"] = strconv.Itoa(len(b.lines))
	b.lines = append(b.lines, e)
	close(b.more)
	b.more = make(chan struct{})
	return nil
}

func (b *book) all() []entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

// await returns the first line, logged before or after the call, that match accepts.
func (b *book) await(t testing.TB, what string, match func(entry) bool) entry {
	t.Helper()
	late := time.After(patience)
	for {
		b.mu.Lock()
		lines, more := b.lines, b.more
		b.mu.Unlock()
		if i := slices.IndexFunc(lines, match); i >= 0 {
			return lines[i]
		}
		select {
		case <-more:
		case <-late:
			t.Fatalf("no line in the log %s; there are\n%v", what, b.all())
		}
	}
}

// of awaits the final line of the connection from addr to app. An earlier connection to another app
// may have used the same addr.
func (b *book) of(t testing.TB, addr net.Addr) entry {
	t.Helper()
	e := b.await(t, "of "+addr.String(), func(e entry) bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return e["msg"] == "connection" && e["client"] == addr.String() && !b.told[e["number"]]
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.told[e["number"]] = true
	return e
}

// An upstream sends its name and a newline on each connection, and then echoes.
type upstream struct {
	net.Listener
	name    string
	dialled atomic.Int64
	wg      sync.WaitGroup
	ends    chan error // how the streams of clients ended; what nobody wants to know is dropped
}

func newUpstream(t testing.TB, name string, conf *tls.Config) *upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	u := &upstream{Listener: l, name: name, ends: make(chan error, 1)}
	if conf != nil {
		u.Listener = tls.NewListener(l, conf)
	}
	u.wg.Go(func() {
		for {
			c, err := u.Accept()
			if err != nil {
				return
			}
			u.dialled.Add(1)
			u.wg.Go(func() {
				defer c.Close()
				if _, err := io.WriteString(c, name+"\n"); err != nil {
					return
				}
				_, err := io.Copy(c, c)
				select {
				case u.ends <- err:
				default:
				}
			})
		}
	})
	t.Cleanup(func() { // after the server's, whose connections are closed by then
		l.Close()
		u.wg.Wait()
	})
	return u
}

// A lab is a running server with the apps web and db, and its surroundings. Alice may reach web
// with the certificate alice.
type lab struct {
	ca      *authority
	dir     string
	alice   tls.Certificate
	log     *book
	web, db *upstream
	config  *Config
	server  *Server
	roots   *x509.CertPool
	stop    context.CancelFunc // ends Run's context
	ran     chan error         // what Run returns
}

// newLab starts a server. If change is not nil, it changes the configuration first.
func newLab(t testing.TB, change func(*lab)) *lab {
	t.Helper()
	l := &lab{ca: newAuthority(t, "ca"), dir: t.TempDir(), log: &book{told: map[string]bool{},
		more: make(chan struct{})}, ran: make(chan error, 1)}
	l.web, l.db = newUpstream(t, "web", nil), newUpstream(t, "db", nil)
	l.alice = l.ca.issue(t, leafOf(0xa11ce))
	l.roots = x509.NewCertPool()
	l.roots.AddCert(l.ca.cert)
	caFile, _ := writePEM(t, l.dir, "ca", tls.Certificate{Certificate: [][]byte{l.ca.cert.Raw}})
	serverFile, keyFile := writePEM(t, l.dir, "server", l.ca.issue(t, serverOf(2)))
	l.config = &Config{
		TLS: Files{Cert: serverFile, Key: keyFile, CA: []string{caFile}},
		Apps: []App{
			{ID: "web", Listen: "127.0.0.1:0",
				Upstreams: []Upstream{{Addr: l.web.Addr().String()}}},
			{ID: "db", Listen: "127.0.0.1:0", Upstreams: []Upstream{{Addr: l.db.Addr().String()}}},
		},
		Users: []User{{Name: "alice", Serials: serials("0xa11ce"), Apps: []string{"web"}}},
	}
	if change != nil {
		change(l)
	}
	var err error
	l.server, err = New(l.config, &Options{Logger: slog.New(l.log), RefusalLines: -1})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	go func() { l.ran <- l.server.Run(ctx) }()
	<-l.server.started.Done()
	t.Cleanup(func() {
		l.server.Close()
		cancel()
		<-l.ran
		if n := l.server.gated(); len(l.server.live) > 0 || len(l.server.proxies) > 0 || n > 0 {
			t.Errorf("after Close: %d live, %d apps, %d at the gate", len(l.server.live),
				len(l.server.proxies), n)
		}
	})
	return l
}

// reload reloads c, which must succeed.
func (l *lab) reload(t testing.TB, c *Config) Changes {
	t.Helper()
	changes, err := l.server.Reload(c)
	must(t, err)
	return changes
}

func serials(texts ...string) (all []UserSerial) {
	for _, text := range texts {
		all = append(all, UserSerial{Serial: text})
	}
	return all
}

func serverOf(serial int64) *x509.Certificate {
	tmpl := leafOf(serial)
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	tmpl.NotAfter = time.Now().Add(60 * 24 * time.Hour)
	tmpl.DNSNames, tmpl.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	return tmpl
}

// with returns a copy of the configuration, changed by change.
func (l *lab) with(change func(*Config)) *Config {
	c := *l.config
	c.Apps, c.Users = slices.Clone(c.Apps), slices.Clone(c.Users)
	change(&c)
	return &c
}

func (l *lab) addr(app string) string { return l.server.Addrs()[app].String() }

// clientConfig returns the configuration of a client that always presents cert.
func (l *lab) clientConfig(cert *tls.Certificate) *tls.Config {
	c := &tls.Config{RootCAs: l.roots, ServerName: "localhost"}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		}
	}
	return c
}

// dial connects to app and performs the handshake. A refused client notices that only when it
// reads.
func (l *lab) dial(t testing.TB, app string, cert *tls.Certificate) *tls.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", l.addr(app))
	must(t, err)
	raw.SetDeadline(time.Now().Add(patience))
	c := tls.Client(raw, l.clientConfig(cert))
	t.Cleanup(func() { raw.Close() })
	return c
}

// in connects and checks that app's upstream answers.
func (l *lab) in(t testing.TB, app string, cert *tls.Certificate) *tls.Conn {
	t.Helper()
	c := l.dial(t, app, cert)
	must(t, greeted(c, app))
	must(t, echoed(c))
	return c
}

// greeted reads the name that an upstream sends first.
func greeted(c net.Conn, name string) error {
	got := make([]byte, len(name)+1)
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("reading what %s says first: %w", name, err)
	}
	if string(got) != name+"\n" {
		return fmt.Errorf("%q answered, want %q", got, name)
	}
	return nil
}

func echoed(c net.Conn) error {
	const text = "hello"
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("reading the echo: %w", err)
	}
	if string(got) != text {
		return fmt.Errorf("echo of %q: %q", text, got)
	}
	return nil
}

// ended reads until the connection ends, which must happen soon and must not look like a clean end.
func ended(c net.Conn) error {
	c.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, c)
	switch {
	case err == nil:
		return errors.New("the connection ended as if it were complete")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the connection was still open")
	}
	return nil
}

// untouched reports whether limits, with a bucket that never refills, were never charged.
func (l *lab) untouched(t testing.TB) bool {
	t.Helper()
	limits := l.server.limits.kept
	if len(limits) == 0 {
		t.Fatal("there are no limits")
	}
	for _, m := range limits {
		if !m.RateLimitManager.(interface{ Idle() bool }).Idle() {
			return false
		}
	}
	return true
}

// noSecrets fails if the log has key material, or bytes of a peer that are not quoted.
func (l *lab) noSecrets(t testing.TB) {
	t.Helper()
	for _, e := range l.log.all() {
		for key, value := range e {
			said := strings.Contains(value, "peer text")
			if quoted, err := strconv.Unquote(value); said &&
				strings.HasPrefix(key, "claimed_") && err == nil && len(quoted) <= 64 {
				said = false
			}
			if said || strings.Contains(value, "PRIVATE") ||
				strings.ContainsAny(value, "\n\r") && key != "stack" {
				t.Errorf("line %v: %s has what it should not", e, key)
			}
		}
	}
}
