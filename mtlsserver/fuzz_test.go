package mtlsserver

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// A client counts by its IPv4 address, however it is written, or by the first 64 bits of its IPv6
// address, whatever the other bits, the port and the zone are. The oracle uses masks, and compares
// two addresses.
func FuzzNetwork(f *testing.F) {
	four, six := net.ParseIP("192.0.2.1").To4(), net.ParseIP("2001:db8:1:2:3:4:5:6")
	for _, pair := range [][2]net.IP{
		{four, four}, {four, four.To16()}, {four, net.IPv4(192, 0, 2, 2)},
		{six, net.ParseIP("2001:db8:1:2::")},
		{six, net.ParseIP("2001:db8:1:3:3:4:5:6")}, {net.IPv6zero, net.IPv4zero},
		{net.ParseIP("::1"), net.ParseIP("::ffff:0:1")},
		{nil, nil}, {six[:8], six[:8]}, {nil, net.IPv6zero},
	} {
		f.Add([]byte(pair[0]), []byte(pair[1]), 1, 65535, "", "eth0")
	}
	key := func(ip net.IP) string { // "" for what is no address
		if four := ip.To4(); four != nil {
			return string(four)
		}
		if len(ip) == net.IPv6len {
			return string(ip.Mask(net.CIDRMask(64, 128))) // 16 octets
		}
		return ""
	}
	f.Fuzz(func(t *testing.T, a, b []byte, portA, portB int, zoneA, zoneB string) {
		got, wide := networksOf(addrOf(&net.TCPAddr{IP: a, Port: portA, Zone: zoneA}))
		switch want := key(a); len(want) {
		case 0:
			if got != (netip.Prefix{}) {
				t.Fatalf("network of %x, which is no address: %v", a, got)
			}
		case net.IPv4len:
			if got.Bits() != 32 || string(got.Addr().AsSlice()) != want || wide != got {
				t.Fatalf("network of %v: %v", net.IP(a), got)
			}
		default:
			if got.Bits() != 64 || string(got.Addr().AsSlice()) != want ||
				got.Addr().Zone() != "" ||
				wide.Bits() != 48 || !wide.Contains(got.Addr()) {
				t.Fatalf("network of %v: %v", net.IP(a), got)
			}
		}
		other, _ := networksOf(addrOf(&net.TCPAddr{IP: b, Port: portB, Zone: zoneB}))
		if alike := got == other; alike != (key(a) == key(b)) {
			t.Fatalf("%v and %v are %v and %v: alike is %v", net.IP(a), net.IP(b), got, other,
				alike)
		}
	})
}

// Each connection has one final line in the log, whatever a peer sends in any part of the
// connection. The line is complete and short, and bytes of the peer appear in it as values only.
// Every other record is a single line too.
func FuzzLogLine(f *testing.F) {
	for way := range byte(ways) {
		for _, text := range []string{
			"text", "a\nreason=done user=alice", `"} {"msg":"connection"`, "\x1b[2J\r\x00\x7f",
			"\u202e\u2028\ufeff", "\xff\xfe",
			strings.Repeat("long ", 300), "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
			"GET / HTTP/1.1\r\n\r\n",
		} {
			f.Add(way, text)
		}
	}
	l := newLogLab(f)
	f.Fuzz(func(t *testing.T, way byte, text string) {
		way %= byte(ways)
		asJSON, asText := l.connection(t, int(way), text)
		for _, line := range slices.Concat(asJSON, asText) {
			body, ok := strings.CutSuffix(line, "\n")
			if !ok || !utf8.ValidString(body) ||
				strings.ContainsFunc(body, func(r rune) bool { return r < ' ' }) {
				t.Fatalf("%q", line)
			}
		}
		for _, line := range asText {
			checkText(t, line)
		}
		final := 0
		for i, line := range asJSON {
			var e map[string]any
			must(t, json.Unmarshal([]byte(line), &e))
			if e["msg"] == "connection" {
				final++
				checkFinal(t, int(way), line, e)
				if len(asText[i]) > maxLine {
					t.Fatalf("%d bytes: %s", len(asText[i]), asText[i])
				}
			}
		}
		if final != 1 {
			t.Fatalf("%d final lines: %q", final, asJSON)
		}
	})
}

const maxLine = 2500 // bytes: 328 characters of a peer, quoted, and what is ours

// checkFinal checks the line of a connection, as it is in JSON.
func checkFinal(t *testing.T, way int, line string, e map[string]any) {
	if len(line) > maxLine {
		t.Fatalf("%d bytes: %s", len(line), line)
	}
	for _, key := range []string{"time", "app", "client", "reason", "duration"} {
		if text, _ := e[key].(string); text == "" && key != "duration" || e[key] == nil {
			t.Fatalf("%s is %q: %s", key, text, line)
		}
	}
	for key, value := range e {
		if text := fmt.Sprint(value); strings.ContainsFunc(text,
			func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("%s is %q", key, text)
		}
	}
	reason, _ := e["reason"].(string)
	if reason == "" || strings.Trim(reason, "abcdefghijklmnopqrstuvwxyz-0123456789") != "" {
		t.Fatalf("reason %q", reason)
	}
	if _, named := e["user"]; named != (way >= admitted) {
		t.Fatalf("a user is named: %v: %s", named, line)
	}
}

// checkText parses a line of slog.TextHandler: key=value, with the value in quotes if it is
// ambiguous.
func checkText(t *testing.T, line string) {
	for rest := strings.TrimSuffix(line, "\n"); rest != ""; rest = strings.TrimPrefix(rest, " ") {
		key, value, ok := strings.Cut(rest, "=")
		if !ok || key == "" || strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") != "" {
			t.Fatalf("key %q in %q", key, line)
		}
		if quoted, err := strconv.QuotedPrefix(value); err == nil {
			rest = value[len(quoted):]
			continue
		}
		value, rest, _ = strings.Cut(value, " ")
		if strings.ContainsFunc(value,
			func(r rune) bool { return r == '"' || r == '=' || !unicode.IsPrint(r) }) {
			t.Fatalf("value %q in %q", value, line)
		}
	}
}

// The places in which a peer may put its bytes.
const (
	rawBytes      = iota // instead of a handshake
	protocolNames        // in the hello
	subjectOfLeaf        // of a certificate that is nobody's
	subjectOfCA          // of one from elsewhere
	afterHandshake
	nameOfUpstream // in the certificate of an upstream
	ways

	admitted = afterHandshake // from here on the client is alice
)

// A logLab holds the resources that the servers share; each server has one connection.
type logLab struct {
	ca, foreign    *authority
	alice          tls.Certificate
	config         Config
	client         *tls.Config
	plain, secured *upstream
	presents       atomic.Pointer[tls.Certificate] // by secured
}

func newLogLab(f *testing.F) *logLab {
	l := &logLab{ca: newAuthority(f, "ca")}
	l.foreign = &authority{key: newKey(f)}
	l.alice = l.ca.issue(f, leafOf(0xa11ce))
	l.plain = newUpstream(f, "web", nil)
	l.secured = newUpstream(f, "db",
		&tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return l.presents.Load(), nil
		}})
	dir := f.TempDir()
	caFile, _ := writePEM(f, dir, "ca", tls.Certificate{Certificate: [][]byte{l.ca.cert.Raw}})
	serverFile, keyFile := writePEM(f, dir, "server", l.ca.issue(f, serverOf(2)))
	l.config = Config{
		TLS: Files{Cert: serverFile, Key: keyFile, CA: []string{caFile}},
		Apps: []App{
			{ID: "web", Listen: "127.0.0.1:0",
				Upstreams: []Upstream{{Addr: l.plain.Addr().String()}}},
			{ID: "db", Listen: "127.0.0.1:0",
				Upstreams: []Upstream{{Addr: l.secured.Addr().String(),
					TLS: &UpstreamTLS{CA: caFile, ServerName: "localhost"}}}},
		},
		Users: []User{{Name: "alice", Serials: serials("0xa11ce"), Apps: []string{"web", "db"}}},
	}
	l.client = &tls.Config{InsecureSkipVerify: true}
	return l
}

// connection starts a server that serves one connection, whose client sends text, and returns the
// lines of its log.
func (l *logLab) connection(t *testing.T, way int, text string) (asJSON, asText []string) {
	cert, client, app := l.alice, l.client.Clone(), "web"
	subject := pkix.Name{CommonName: text, Organization: []string{text}}
	switch way {
	case protocolNames:
		client.NextProtos = []string{text[:min(len(text), 255)]}
		cert = tls.Certificate{}
	case subjectOfLeaf:
		tmpl := leafOf(0xb0b)
		tmpl.Subject = subject
		cert = l.issue(t, l.ca, tmpl)
	case subjectOfCA:
		l.foreign.cert = caOf("", 1)
		l.foreign.cert.Subject = subject
		cert = l.issue(t, l.foreign, leafOf(0xa11ce))
	case nameOfUpstream:
		tmpl := serverOf(3)
		tmpl.DNSNames, tmpl.IPAddresses, tmpl.Subject = []string{text}, nil, subject
		presented := l.issue(t, l.ca, tmpl)
		l.presents.Store(&presented)
		app = "db"
	}
	client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &cert, nil
	}

	var j, k lines
	s, err := New(&l.config,
		&Options{Logger: slog.New(slog.NewMultiHandler(slog.NewJSONHandler(&j, nil),
			slog.NewTextHandler(&k, nil)))})
	must(t, err)
	var running sync.WaitGroup
	running.Go(func() { s.Run(context.Background()) })
	defer running.Wait()
	defer s.Close()
	raw, err := net.Dial("tcp", s.Addrs()[app].String())
	must(t, err)
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	switch c := tls.Client(raw, client); {
	case way == rawBytes:
		io.WriteString(raw, text)
	case c.Handshake() != nil:
	case way == afterHandshake:
		io.WriteString(raw, text)
	default:
		io.Copy(io.Discard, c)
	}
	raw.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, raw) // until the server is done with it: Close is not to be what ends it
	s.Close()
	return j, k
}

// issue signs tmpl with a key made before. It skips templates that cannot become a certificate.
func (l *logLab) issue(t *testing.T, a *authority, tmpl *x509.Certificate) tls.Certificate {
	key := l.alice.PrivateKey.(crypto.Signer)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Skip(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// lines are the output of a slog handler, one line at a time.
type lines []string

func (l *lines) Write(b []byte) (int, error) {
	*l = append(*l, string(b))
	return len(b), nil
}
