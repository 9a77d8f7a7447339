package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// good is a configuration without problems. The tests below count its lines.
const good = `{
  "tls": {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"},
  "apps": [
    {"id": "web", "listen": "127.0.0.1:0", "idleTimeout": "10m",
     "upstreams": [{"addr": "127.0.0.1:8001", "weight": 2, "maxConns": 100},
                   {"addr": "127.0.0.1:8002", "tls": {"ca": "ca.pem", ` +
	`"serverName": "web.internal", "cert": "client.pem", "key": "client.key"}}]},
    {"id": "db", "listen": "127.0.0.1:0", "upstreams": [{"addr": "127.0.0.1:5432"}]}
  ],
  "users": [
    {"name": "alice", "serials": ["3A:0F", "dec:4660"], "apps": ["web", "db"],
     "limit": {"burst": 20, "every": "50ms", "open": 100, "bytesPerSecond": 10485760},
     "appLimits": {"web": {"open": 10}}},
    {"name": "bob", "serials": ["0b"], "apps": ["web"]}
  ],
  "handshake": {"timeout": "10s", "maxConcurrent": 256, "maxPerAddress": 16, "maxBytes": 16384},
  "drainTimeout": "30s"
}
`

// authority is the CA that signs the tests' certificates. It and pems are made once, as making keys
// takes time.
var authority = sync.OnceValue(func() *signed {
	return mustSign(&x509.Certificate{IsCA: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign}, nil)
})

var pems = sync.OnceValue(func() map[string][]byte {
	server := mustSign(serverCert(), authority())
	client := mustSign(clientTemplate(), authority())
	return map[string][]byte{
		"ca.pem": authority().cert, "ca.key": authority().key, "server.pem": server.cert,
		"server.key": server.key,
		"client.pem": client.cert, "client.key": client.key, "config.json": []byte(good),
	}
})

func serverCert() *x509.Certificate {
	return &x509.Certificate{DNSNames: []string{"localhost"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
}

func clientTemplate() *x509.Certificate {
	return &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
}

// A signed is a certificate with its key, and the texts of both files.
type signed struct {
	*tls.Certificate
	cert, key []byte
}

func mustSign(template *x509.Certificate, ca *signed) *signed {
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(day)
	}
	var issuer *tls.Certificate
	if ca != nil {
		issuer = ca.Certificate
	}
	pair, files, err := sign("", template, issuer)
	if err != nil {
		panic(err)
	}
	return &signed{pair, files[1].text, files[0].text}
}

// folder returns a new folder that holds the good configuration and its files.
func folder(t testing.TB) string {
	dir := t.TempDir()
	for name, text := range pems() {
		write(t, dir, name, text)
	}
	return dir
}

func write(t testing.TB, dir, name string, text []byte) {
	t.Helper()
	path := filepath.Join(dir, name)
	os.Remove(path)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// try runs a command that ends by itself.
func try(args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = run(args, nil, &out, &err)
	return code, out.String(), err.String()
}

func TestConfigurationInDocsIsGood(t *testing.T) {
	docs, err := os.ReadFile("../../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(docs), "```json\n")
	text, _, found := strings.Cut(text, "```")
	if !found {
		t.Fatal("docs/config.md has no JSON")
	}
	dir := folder(t)
	write(t, dir, "proxy.pem", pems()["client.pem"])
	write(t, dir, "proxy.key", pems()["client.key"])
	write(t, dir, "config.json", []byte(text))
	if code, _, stderr := try("check", "-config", filepath.Join(dir, "config.json")); code != 0 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

func TestGoodConfiguration(t *testing.T) {
	config := filepath.Join(folder(t), "config.json")
	if code, stdout, stderr := try("check", "-config", config); code != 0 || stderr != "" ||
		!strings.Contains(stdout, "no problems") {
		t.Fatalf("check: exit code %d\n%s%s", code, stdout, stderr)
	}
	s := start(t, "run", "-config", config)
	if s.addrs["web"] == "" || s.addrs["db"] == "" {
		t.Fatalf("ready: %v, want web and db", s.addrs)
	}
	s.stop(t, 0)
}

// Each bad configuration is tried four times: by check, by run, by Load, and by the reload of a
// server that serves the good one.
func TestBadConfigurations(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() }) // when the parallel tests are over
	swap := func(name string, text []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) { write(t, dir, name, text) }
	}
	cut := func(text []byte) []byte { return text[:len(text)-40] }
	expired := func(template *x509.Certificate) *x509.Certificate {
		template.NotBefore = time.Now().Add(-48 * time.Hour)
		template.NotAfter = time.Now().Add(-24 * time.Hour)
		return template
	}
	other := mustSign(serverCert(), authority())
	badCA := func(template *x509.Certificate) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			write(t, dir, "ca.pem", mustSign(template, nil).cert)
		}
	}
	badServer := func(template *x509.Certificate) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			p := mustSign(template, authority())
			write(t, dir, "server.pem", p.cert)
			write(t, dir, "server.key", p.key)
		}
	}
	noNames, clientOnly, noUsage := serverCert(), clientTemplate(), serverCert()
	noNames.DNSNames, clientOnly.DNSNames, noUsage.ExtKeyUsage = nil, []string{"localhost"}, nil
	mixed := bytes.Replace(append(bytes.Clone(authority().cert), other.cert...),
		[]byte("\nMII"), []byte("\n*II"), 1)

	rows := []struct {
		name  string
		edit  string
		spoil func(t *testing.T, dir string)
		want  []string // in the order of the lines; parts of a line are separated by "…"
	}{
		// The file as such.
		{name: "no such file", spoil: func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "config.json"))
		},
			want: []string{`config.json": no such file…: name a file that can be read`}},
		{name: "a folder", spoil: func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "config.json"))
			if err := os.Mkdir(filepath.Join(dir, "config.json"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, want: []string{`config.json": not a file: name one`}},
		{name: "too large", spoil: swap("config.json", make([]byte, 9<<20)),
			want: []string{`config.json": larger than 8 MiB`}},
		{name: "empty", spoil: swap("config.json", nil),
			want: []string{"config.json:1: not JSON: unexpected end"}},
		{name: "cut", spoil: swap("config.json", cut([]byte(good))), want: []string{
			"config.json:15: not JSON: unexpected end…: correct it there or shortly before"}},
		{name: "trailing garbage", spoil: swap("config.json", []byte(good+"x")), want: []string{
			"config.json:18: not JSON: invalid character 'x' after top-level value"}},
		{name: "two objects", spoil: swap("config.json", []byte(good+good)),
			want: []string{"config.json:18: not JSON: invalid character '{' after"}},
		{name: "trailing comma", edit: `"30s">"30s",`,
			want: []string{"config.json:17: not JSON: invalid character '}'"}},
		{name: "comment", edit: `"apps": [>// apps`,
			want: []string{"config.json:3: not JSON: invalid character '/'"}},
		{name: "not UTF-8", edit: `alice>al` + "\xff" + `ce`,
			want: []string{"config.json:1: not UTF-8: save it as that"}},
		{name: "a list", spoil: swap("config.json", []byte("[]")),
			want: []string{"config.json:1: want an object in { }, got ["}},
		{name: "null", spoil: swap("config.json", []byte("null")),
			want: []string{"config.json:1: want an object in { }, got null"}},
		{name: "deep",
			spoil: swap("config.json",
				[]byte(strings.Repeat("[", 20000)+strings.Repeat("]", 20000))),
			want: []string{"config.json:1: not JSON: invalid character…exceeded max depth"}},
		{name: "nothing in it", spoil: swap("config.json", []byte("{}")), want: []string{
			"config.json:1: tls: missing: it is required", "config.json:1: apps: missing",
			"config.json:1: users: missing"}},
		// Keys and types.
		{name: "unknown key", edit: `"drainTimeout">"drainTimeOut"`, want: []string{
			"config.json:16: drainTimeOut: unknown key: " +
				"want one of tls, apps, users, defaultLimit, handshake, drainTimeout, " +
				"logAdmissions, admin, adminAnywhere"}},
		{name: "unknown keys further down",
			edit: `"weight": 2>"wait": {"a": [1, {}]}, "Weight": 2`, want: []string{
				"config.json:5: apps[0].upstreams[0].wait: unknown key: " +
					"want one of addr, weight, maxConns, drain, proxyProtocol, tls",
				"config.json:5: apps[0].upstreams[0].Weight: unknown key"}},
		{name: "unknown key that plays tricks", edit: `"drainTimeout">"a\n\u001b[2J"`,
			want: []string{`config.json:16: ["a\n\x1b[2J"]: unknown key`}},
		{name: "unknown key of health checks",
			edit: `"idleTimeout": "10m">"healthCheck": {"intervall": "5s"}`,
			want: []string{
				"config.json:4: apps[0].healthCheck.intervall: unknown key: " +
					"want one of interval, timeout, rise, fall"}},
		{name: "health checks that are switched on",
			edit: `"idleTimeout": "10m">"healthCheck": true`, want: []string{
				"config.json:4: apps[0].healthCheck: want an object in { }, got true"}},
		{name: "bad health checks",
			edit: `"idleTimeout": "10m">"healthCheck": {"interval": "0s", "timeout": ` +
				`"-2s", "rise": 0, "fall": -3}`, want: []string{
				"config.json:4: apps[0].healthCheck.interval: 0s: want more than 0",
				"healthCheck.timeout: -2s: want", "healthCheck.rise: 0: want",
				"healthCheck.fall: -3: want"}},
		{name: "zero weight", edit: `"weight": 2>"weight": 0`,
			want: []string{
				"config.json:5: apps[0].upstreams[0].weight: 0: " +
					"want more than 0, or leave it out for the default"}},
		{name: "duplicate key", edit: `"drainTimeout": "30s">"tls": {}`,
			want: []string{"config.json:2: tls: given twice, here and in line 16: keep one of the two"}},
		{name: "duplicate key further down", edit: `"maxConns": 100>"addr": ["127.0.0.1:8009"]`,
			want: []string{
				"config.json:5: apps[0].upstreams[0].addr: given twice, in this line: keep one"}},
		{name: "duplicate key in a map",
			edit: `"appLimits": {>"appLimits": {"web": {"open": 5}, `, want: []string{
				`config.json:12: users[0].appLimits["web"]: given twice, in this line: keep one`}},
		{name: "number in quotes", edit: `"weight": 2>"weight": "2"`, want: []string{
			`config.json:5: apps[0].upstreams[0].weight: want a whole number, got "2"`}},
		{name: "null for a number", edit: `"weight": 2>"weight": null`, want: []string{
			`config.json:5: apps[0].upstreams[0].weight: want a whole number, got null`}},
		{name: "fraction", edit: `"weight": 2>"weight": 2.5`, want: []string{
			`config.json:5: apps[0].upstreams[0].weight: want a whole number, got 2.5`}},
		{name: "exponent", edit: `: 10485760>: 1e7`, want: []string{
			`config.json:11: users[0].limit.bytesPerSecond: want a whole number, got 1e7`}},
		{name: "too large a number", edit: `: 10485760>: 99999999999999999999`, want: []string{
			`users[0].limit.bytesPerSecond: want a whole number, got 99999999999999999999`}},
		{name: "byte order mark", edit: "{\n  \"tls\">\uFEFF{\n  \"tls\"",
			want: []string{"config.json:1: it begins with a byte order mark: save it without"}},
		{name: "text without quotes", edit: `"127.0.0.1:8001">8001`, want: []string{
			`config.json:5: apps[0].upstreams[0].addr: want a text in quotes, got 8001`}},
		{name: "null for a list", edit: `["web"]}>null}`,
			want: []string{`config.json:13: users[1].apps: want a list in [ ], got null`}},
		{name: "text for a list", edit: `["web"]}>"web"}`,
			want: []string{`config.json:13: users[1].apps: want a list in [ ], got "web"`}},
		{name: "list for an object", edit: `{"web": {"open": 10}}>[1, [2], {"a": 3}]`,
			want: []string{`config.json:12: users[0].appLimits: want an object in { }, got [`}},
		{name: "null for an object", edit: `{"web": {"open": 10}}>{"web": null}`,
			want: []string{
				`config.json:12: users[0].appLimits["web"]: want an object in { }, got null`}},
		{name: "true",
			edit: `"tls": {"ca": "ca.pem", "serverName": "web.internal", "cert": ` +
				`"client.pem", "key": "client.key"}>"tls": true`, want: []string{
				`config.json:6: apps[0].upstreams[1].tls: want an object in { }, got true`}},
		{name: "duration without unit", edit: `"50ms">"50"`, want: []string{
			`config.json:11: users[0].limit.every: want a duration such as "10s", got "50"`}},
		{name: "duration as number", edit: `"30s">30`, want: []string{
			`config.json:16: drainTimeout: want a duration such as "10s", got 30`}},
		{name: "negative durations", edit: `"30s">"-30s"`,
			want: []string{
				`config.json:16: drainTimeout: -30s: ` +
					`want more than 0, or leave it out for the default`}},
		{name: "zero idleTimeout", edit: `"10m">"0s"`,
			want: []string{`config.json:4: apps[0].idleTimeout: 0s: want more than 0`}},
		// Apps.
		{name: "no apps", edit: `"apps": […
  ],>"apps": [],`, want: []string{"config.json:3: apps: none: give at least one",
			`users[0].apps[0]: there is no app "web"`, `users[0].apps[1]`, `users[1].apps[0]`}},
		{name: "app without id", edit: `"id": "db"`, want: []string{
			"config.json:7: apps[1].id: missing: give one",
			`config.json:10: users[0].apps[1]: there is no app "db": want one of ["web"]`}},
		{name: "duplicate app", edit: `"id": "db">"id": "web"`, want: []string{
			`config.json:7: apps[1].id: "web" is already used by apps[0].id: change one`,
			`users[0].apps[1]: there is no app "db"`}},
		{name: "no listen", edit: `"listen": "127.0.0.1:0"`, want: []string{
			`config.json:4: apps[0].listen: "": want host:port, such as "127.0.0.1:9443"`}},
		{name: "listen without port", edit: `"127.0.0.1:0">"127.0.0.1"`,
			want: []string{`config.json:4: apps[0].listen: "127.0.0.1": want host:port`}},
		{name: "listen on port 99999", edit: `"127.0.0.1:0">"127.0.0.1:99999"`,
			want: []string{
				`config.json:4: apps[0].listen: "127.0.0.1:99999": ` +
					`want host:port, such as "127.0.0.1:9443", port 0 for any`}},
		{name: "listen on an empty port", edit: `"127.0.0.1:0">"127.0.0.1:"`,
			want: []string{`config.json:4: apps[0].listen: "127.0.0.1:": want host:port`}},
		{name: "listen with a space", edit: `"127.0.0.1:0">" 127.0.0.1:9443"`,
			want: []string{`config.json:4: apps[0].listen: " 127.0.0.1:9443": want host:port`}},
		{name: "same listen twice",
			edit: `127.0.0.1:0…127.0.0.1:0>127.0.0.1:9443…127.0.0.1:9443`, want: []string{
				`config.json:7: apps[1].listen: ` +
					`"127.0.0.1:9443" is already used by apps[0].listen: change one`}},
		{name: "no upstreams", edit: `[{"addr": "127.0.0.1:5432"}]>[]`, want: []string{
			`config.json:7: apps[1].upstreams: no upstreams: give at least one`}},
		{name: "upstreams left out", edit: `, "upstreams": [{"addr": "127.0.0.1:5432"}]`,
			want: []string{`config.json:7: apps[1].upstreams: no upstreams: give at least one`}},
		{name: "upstream without port", edit: `127.0.0.1:5432>127.0.0.1`,
			want: []string{
				`config.json:7: apps[1].upstreams[0].addr: "127.0.0.1": missing port in address: ` +
					`want host:port`}},
		{name: "upstream without host", edit: `127.0.0.1:5432>:5432`,
			want: []string{`config.json:7: apps[1].upstreams[0].addr: ":5432": missing host`}},
		{name: "upstream with a space", edit: `127.0.0.1:5432> 127.0.0.1:5432`,
			want: []string{
				`config.json:7: apps[1].upstreams[0].addr: " 127.0.0.1:5432": ` +
					`a space in the host`}},
		{name: "upstreams that are the same", edit: `127.0.0.1:8002>127.0.0.1:8001`,
			want: []string{
				`config.json:6: apps[0].upstreams[1].addr: "127.0.0.1:8001" is already used by ` +
					`apps[0].upstreams[0].addr: change one of the two`}},
		{name: "upstream without address", edit: `"addr": "127.0.0.1:5432"`,
			want: []string{"config.json:7: apps[1].upstreams[0].addr: missing: give one"}},
		{name: "two bad upstreams", edit: `2, "maxConns": 100>-2},
			{"addr": "127.0.0.1:8009", "maxConns": -1`, want: []string{
			`config.json:5: apps[0].upstreams[0].weight: -2: want more than 0`,
			`config.json:6: apps[0].upstreams[1].maxConns: -1: want more than 0, ` +
				`or leave it out for no bound`}},
		{name: "too large a weight", edit: `"weight": 2>"weight": 2000000`,
			want: []string{
				`config.json:5: apps[0].upstreams[0].weight: 2000000: want 1 to 1000000`}},
		{name: "upstream's CA missing", edit: `{"ca": "ca.pem">{"ca": "no.pem"`, want: []string{
			`config.json:6: apps[0].upstreams[1].tls.ca: "…no.pem": no such file`}},
		{name: "upstream's CA empty", edit: `{"ca": "ca.pem">{"ca": ""`, want: []string{
			`config.json:6: apps[0].upstreams[1].tls.ca: missing: name its file`}},
		{name: "upstream's certificate and key empty",
			edit: `"cert": "client.pem", "key": "client.key">"cert": "", "key": ""`, want: []string{
				`config.json:6: apps[0].upstreams[1].tls.cert: missing: name its file`,
				`config.json:6: apps[0].upstreams[1].tls.key: missing: name its file`}},
		{name: "upstream's key alone and empty",
			edit: `"cert": "client.pem", "key": "client.key">"key": ""`, want: []string{
				`config.json:6: apps[0].upstreams[1].tls.cert: missing: name its file`,
				`config.json:6: apps[0].upstreams[1].tls.key: missing: name its file`}},
		{name: "upstream's name empty", edit: `"web.internal">""`,
			want: []string{
				`config.json:6: apps[0].upstreams[1].tls.serverName: empty: ` +
					`give a name, or leave it out for the host of addr`}},
		{name: "upstream's key missing", edit: `, "key": "client.key"`, want: []string{
			`config.json:6: apps[0].upstreams[1].tls.key: missing: name its file`}},
		{name: "server certificate for an upstream",
			edit: `"client.pem", "key": "client.key">"server.pem", "key": "server.key"`,
			want: []string{
				`config.json:6: apps[0].upstreams[1].tls.cert: "…server.pem": ` +
					`its extended key usage lacks clientAuth: make one that has it`}},
		// Users.
		{name: "user without name", edit: `"name": "bob"`,
			want: []string{"config.json:13: users[1].name: missing: give one"}},
		{name: "same user twice", edit: `"bob">"alice"`,
			want: []string{
				`config.json:13: users[1].name: ` +
					`"alice" is already used by users[0].name: change one`}},
		{name: "user without serials", edit: `["0b"]>[]`,
			want: []string{
				"config.json:13: users[1].serials: none: " +
					"give the serial of the user's certificate, or remove the user"}},
		{name: "user without apps", edit: `["web"]}>[]}`,
			want: []string{"config.json:13: users[1].apps: none: give the id of one at least"}},
		{name: "unknown app", edit: `["web"]}>["web", "mail"]}`,
			want: []string{
				`config.json:13: users[1].apps[1]: there is no app "mail": ` +
					`want one of ["db" "web"]`}},
		{name: "same app twice", edit: `["web"]}>["web", "web"]}`,
			want: []string{
				`config.json:13: users[1].apps[1]: ` +
					`"web" is already used by users[1].apps[0]: change one`}},
		{name: "same serial, as hex", edit: `"0b">"3a0f"`,
			want: []string{
				`config.json:13: users[1].serials[0]: ` +
					`"3a0f" is the serial of users[0].serials[0] ("3A:0F") too: remove one`}},
		{name: "same serial, with zeros", edit: `"0b">"0x003A0F"`,
			want: []string{
				`config.json:13: users[1].serials[0]: ` +
					`"0x003A0F" is the serial of users[0].serials[0] ("3A:0F") too`}},
		{name: "same serial, in decimal", edit: `"0b">"dec:14863"`,
			want: []string{
				`config.json:13: users[1].serials[0]: ` +
					`"dec:14863" is the serial of users[0].serials[0] ("3A:0F") too`}},
		{name: "same serial, of the same user", edit: `"dec:4660">"dec:4660", "12:34"`,
			want: []string{
				`config.json:10: users[0].serials[2]: ` +
					`"12:34" is the serial of users[0].serials[1] ("dec:4660") too`}},
		{name: "ambiguous serial", edit: `"0b">"1234"`,
			want: []string{
				`config.json:13: users[1].serials[0]: serial "1234": ` +
					`write 0x1234 if it is hex, dec:1234 (which is 0x4d2) if`}},
		{name: "serial zero", edit: `"0b">"00:00"`,
			want: []string{`config.json:13: users[1].serials[0]: serial "00:00": zero`}},
		{name: "negative serial", edit: `"0b">"-0b"`, want: []string{
			`config.json:13: users[1].serials[0]: serial "-0b": want hex as in`}},
		{name: "long serial", edit: `"0b">"` + strings.Repeat("0b", 26) + `"`,
			want: []string{
				`config.json:13: users[1].serials[0]: serial "0b…too long: ` +
					`want at most 20 octets`}},
		{name: "empty limit", edit: `{"open": 10}>{}`, want: []string{
			`config.json:12: users[0].appLimits["web"]: limits nothing: set burst and every`}},
		{name: "zero limit", edit: `{"open": 10}>{"open": 0}`, want: []string{
			`config.json:12: users[0].appLimits["web"].open: 0: want more than 0`}},
		{name: "negative limits",
			edit: `20, "every": "50ms", "open": 100, "bytesPerSecond": ` +
				`10485760>-20, "every": "-50ms", "open": -1, "bytesPerSecond": -1`, want: []string{
				`config.json:11: users[0].limit.burst: -20: want more than 0`,
				`limit.every: -50ms: want`,
				`limit.open: -1: want more than 0, or leave it out for no bound`,
				`limit.bytesPerSecond: -1: want`}},
		{name: "burst alone", edit: `, "every": "50ms"`,
			want: []string{
				`config.json:11: users[0].limit: burst and every go together: ` +
					`set both or neither`}},
		{name: "every alone", edit: `"burst": 20, `,
			want: []string{`config.json:11: users[0].limit: burst and every go together`}},
		{name: "limit for an app out of reach",
			edit: `["web"]}>["web"], "appLimits": {"db": {"open": 1}}}`, want: []string{
				`config.json:13: users[1].appLimits["db"]: the user may not reach this app: ` +
					`add it to apps, or remove the limit`}},
		// Handshakes.
		{name: "zero handshakes",
			edit: `"10s", "maxConcurrent": 256, "maxPerAddress": 16, "maxBytes": ` +
				`16384>"0s", "maxConcurrent": 0, "maxPerAddress": -1, "maxBytes": 0`,
			want: []string{
				`config.json:15: handshake.timeout: 0s: want more than 0`,
				`handshake.maxConcurrent: 0: want`, `handshake.maxPerAddress: -1: want`,
				`handshake.maxBytes: 0: want`}},
		// Files.
		{name: "no certificate named", edit: `"cert": "server.pem", `,
			want: []string{"config.json:2: tls.cert: missing: name its file"}},
		{name: "no CA named", edit: `, "ca": "ca.pem"`,
			want: []string{"config.json:2: tls.ca: missing: name its file"}},
		{name: "empty CA named", edit: `"ca": "ca.pem">"ca": ""`,
			want: []string{"config.json:2: tls.ca: missing: name its file"}},
		{name: "no such CA", edit: `"ca": "ca.pem">"ca": "no.pem"`, want: []string{
			`config.json:2: tls.ca: "…no.pem": no such file…: name a file that can be read`}},
		{name: "CA that may not be read", spoil: func(t *testing.T, dir string) {
			if runtime.GOOS == "windows" || os.Getuid() == 0 {
				t.Skip("everything may be read")
			}
			if err := os.Chmod(filepath.Join(dir, "ca.pem"), 0); err != nil {
				t.Fatal(err)
			}
		}, want: []string{
			`config.json:2: tls.ca: "…ca.pem": permission denied: name a file that can be read`,
			"config.json:6: "}},
		{name: "CA that is broken",
			spoil: swap("ca.pem",
				pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})),
			want: []string{
				`config.json:2: tls.ca: "…ca.pem": x509: malformed certificate: make a new one`,
				"config.json:6: "}},
		{name: "no such key", edit: `"server.key">"no.key"`,
			want: []string{`config.json:2: tls.key: "…no.key": no such file`}},
		{name: "the key itself", edit: `"server.key">` +
			fmt.Sprintf("%q", pems()["server.key"]), want: []string{
			`config.json:2: tls.key: want the name of a file, got its content`}},
		{name: "a folder for a key", edit: `"server.key">"."`,
			want: []string{`config.json:2: tls.key: "…": not a file: name one`}},
		{name: "key for all to read", spoil: func(t *testing.T, dir string) {
			if runtime.GOOS == "windows" {
				t.Skip("no mode bits")
			}
			if err := os.Chmod(filepath.Join(dir, "server.key"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, want: []string{
			`config.json:2: tls.key: "…server.key": mode 0644 gives others access: ` +
				`chmod 600 it`}},
		{name: "key of another certificate", spoil: swap("server.key", other.key), want: []string{
			`config.json:2: tls.key: "…server.key": tls: ` +
				`private key does not match public key: ` +
				`want the key of the certificate in "…server.pem"`}},
		{name: "broken key", spoil: swap("server.key", cut(other.key)),
			want: []string{`config.json:2: tls.key: "…server.key": tls: failed to find`}},
		{name: "encrypted key", spoil: swap("server.key", pem.EncodeToMemory(&pem.Block{
			Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("secret")})), want: []string{
			`config.json:2: tls.key: "…server.key": tls: failed…not encrypted`}},
		{name: "key for a certificate", edit: `"server.pem">"server.key"`, want: []string{
			`config.json:2: tls.cert: "…server.key": want a certificate in PEM`}},
		{name: "broken certificate",
			spoil: swap("server.pem",
				pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})),
			want: []string{
				`config.json:2: tls.cert: "…server.pem": x509: malformed certificate: ` +
					`make a new one, or copy it again`}},
		{name: "expired certificate", spoil: badServer(expired(serverCert())), want: []string{
			`config.json:2: tls.cert: "…server.pem": expired at 20…Z: make a new one`}},
		{name: "empty certificate", spoil: swap("server.pem", nil), want: []string{
			`config.json:2: tls.cert: "…server.pem": want a certificate in PEM`}},
		{name: "certificate without usage", spoil: badServer(noUsage),
			want: []string{
				`config.json:2: tls.cert: "…server.pem": ` +
					`its extended key usage lacks serverAuth: make one`}},
		{name: "client certificate", spoil: badServer(clientOnly),
			want: []string{
				`config.json:2: tls.cert: "…server.pem": ` +
					`its extended key usage lacks serverAuth: make one`}},
		{name: "certificate without names", spoil: badServer(noNames),
			want: []string{`config.json:2: tls.cert: "…server.pem": it names no host`}},
		{name: "empty CA", spoil: swap("ca.pem", nil),
			want: []string{
				`config.json:2: tls.ca: "…ca.pem": want exactly one CERTIFICATE block`,
				"config.json:6: apps[0].upstreams[1].tls.ca"}},
		{name: "two CAs",
			spoil: swap("ca.pem", append(bytes.Clone(authority().cert), authority().cert...)),
			want:  []string{`tls.ca: "…ca.pem": want exactly one`, "config.json:6: "}},
		{name: "a broken CA and a whole one", spoil: swap("ca.pem", mixed),
			want: []string{`tls.ca: "…ca.pem": want exactly one`, "config.json:6: "}},
		{name: "CA and garbage", spoil: swap("ca.pem", append(bytes.Clone(authority().cert),
			'x')), want: []string{`tls.ca: "…ca.pem": want exactly one`, "config.json:6: "}},
		{name: "CA and its key",
			spoil: swap("ca.pem", append(bytes.Clone(authority().cert), authority().key...)),
			want:  []string{`tls.ca: "…ca.pem": want exactly one`, "config.json:6: "}},
		{name: "server certificate for a CA", spoil: swap("ca.pem", other.cert),
			want: []string{
				`tls.ca: "…ca.pem": not a CA's certificate: want CA:TRUE and key usage keyCertSign`,
				"config.json:6: "}},
		{name: "CA that may not sign",
			spoil: badCA(&x509.Certificate{IsCA: true,
				KeyUsage: x509.KeyUsageDigitalSignature}),
			want: []string{`tls.ca: "…ca.pem": not a CA's certificate`, "config.json:6: "}},
		{name: "signer that is no CA",
			spoil: badCA(&x509.Certificate{KeyUsage: x509.KeyUsageCertSign}),
			want:  []string{`tls.ca: "…ca.pem": not a CA's certificate`, "config.json:6: "}},
		{name: "expired CA",
			spoil: badCA(expired(&x509.Certificate{IsCA: true,
				KeyUsage: x509.KeyUsageCertSign})),
			want: []string{`tls.ca: "…ca.pem": expired at`, "config.json:6: "}},
		// The admin.
		{name: "admin nowhere", edit: `"drainTimeout">"admin": {}, "drainTimeout"`, want: []string{
			`config.json:16: admin: it listens nowhere: set listen or socket, or remove it`}},
		{name: "admin with unknown key",
			edit: `"drainTimeout">"admin": {"addr": ":1"}, "drainTimeout"`, want: []string{
				`config.json:16: admin.addr: unknown key: ` +
					`want one of listen, socket, token, hosts`}},
		{name: "admin for everybody",
			edit: `"drainTimeout">"admin": {"listen": ":9090"}, "drainTimeout"`, want: []string{
				`config.json:16: admin.listen: ":9090": not loopback…: ` +
					`use 127.0.0.1, or set adminAnywhere`}},
		{name: "anywhere without admin",
			edit: `"drainTimeout">"adminAnywhere": true, "drainTimeout"`, want: []string{
				`config.json:16: adminAnywhere: there is no admin: add it, or remove this`}},
		{name: "admin by a name",
			edit: `"drainTimeout">"admin": {"listen": "my.name:9090"}, "adminAnywhere": ` +
				`true, "drainTimeout"`, want: []string{
				`config.json:16: admin.listen: "my.name:9090": ` +
					`want an IP address or localhost, and a port`}},
		{name: "admin at an app's address",
			edit: `127.0.0.1:0…"drainTimeout">127.0.0.1:9443…"admin": {"listen": ` +
				`"127.0.0.1:9443"}, "drainTimeout"`, want: []string{
				`config.json:16: admin.listen: ` +
					`"127.0.0.1:9443" is already used by apps[0].listen: change one`}},
		{name: "admin host with a port",
			edit: `"drainTimeout">"admin": {"listen": "127.0.0.1:0", "hosts": ` +
				`["lb", "lb:80"]}, "drainTimeout"`, want: []string{
				`config.json:16: admin.hosts[1]: "lb:80": want a name without port`}},
		{name: "admin socket that is a file",
			edit: `"drainTimeout">"admin": {"socket": "ca.pem"}, "drainTimeout"`, want: []string{
				`config.json:16: admin.socket: "…ca.pem": something else is there: ` +
					`remove it, or use another name`}},
		{name: "admin socket in no folder",
			edit: `"drainTimeout">"admin": {"socket": "no/sock"}, "drainTimeout"`, want: []string{
				`config.json:16: admin.socket: "…no/sock": no such file…: make the folder`}},
		{name: "admin socket where others may write",
			edit: `"drainTimeout">"admin": {"socket": "open/sock"}, "drainTimeout"`,
			spoil: func(t *testing.T, dir string) {
				if runtime.GOOS == "windows" {
					t.Skip("no mode bits")
				}
				open := filepath.Join(dir, "open")
				if err := os.Mkdir(open, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(open, 0o770); err != nil {
					t.Fatal(err)
				}
			}, want: []string{
				`config.json:16: admin.socket: "…open/sock": ` +
					`others may write the folder "…open", which has mode 0770: use one`}},
		{name: "no admin token",
			edit: `"drainTimeout">"admin": {"listen": "127.0.0.1:0", "token": ` +
				`""}, "drainTimeout"`, want: []string{
				`config.json:16: admin.token: missing: name its file`}},
		{name: "short admin token",
			edit: `"drainTimeout">"admin": {"listen": "127.0.0.1:0", "token": ` +
				`"token"}, "drainTimeout"`,
			spoil: swap("token", []byte("short\n")), want: []string{
				`config.json:16: admin.token: "token": only 5 characters: make one of 16 or more`}},
		{name: "admin token for all to read",
			edit: `"drainTimeout">"admin": {"listen": "127.0.0.1:0", "token": ` +
				`"token"}, "drainTimeout"`,
			spoil: func(t *testing.T, dir string) {
				if runtime.GOOS == "windows" {
					t.Skip("no mode bits")
				}
				swap("token", []byte("0123456789abcdef"))(t, dir)
				if err := os.Chmod(filepath.Join(dir, "token"), 0o640); err != nil {
					t.Fatal(err)
				}
				if os.Getuid() == 0 { // a group may read the files of root
					if err := os.Chmod(filepath.Join(dir, "token"), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}, want: []string{
				`config.json:16: admin.token: "…token": mode 06…gives others access: ` +
					`chmod 600 it`}},
		{name: "admin's port in use", edit: `"drainTimeout">"admin": {"listen": "` +
			taken.Addr().String() + `"}, "drainTimeout"`, want: []string{
			`config.json:16: admin.listen: …` + taken.Addr().String() +
				`…bind: …in use: change it, or end the program that uses it`}},
		// Listening.
		{name: "port in use", edit: `"127.0.0.1:0">"` + taken.Addr().String() + `"`,
			want: []string{`config.json: …app "web": …` + taken.Addr().String() +
				`…in use: change that app's listen, or end the program that uses the address`}},
		{name: "address of another machine", edit: `"127.0.0.1:0">"192.0.2.1:9443"`,
			want: []string{
				`config.json: …app "web": …192.0.2.1:9443…: ` +
					`change that app's listen to an address of this machine`}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			config := filepath.Join(dir, "config.json")
			s := start(t, "run", "-config", config)
			if row.edit != "" {
				write(t, dir, "config.json", []byte(edited(t, row.edit)))
			}
			if row.spoil != nil {
				row.spoil(t, dir)
			}
			s.signals <- syscall.SIGHUP
			s.await(t, "reload failed", row.want[0])
			s.stop(t, 0)

			code, stdout, stderr := try("run", "-config", config)
			if code != 2 || stdout != "" {
				t.Errorf("run: exit code %d, %q, want 2 and no listeners", code, stdout)
			}
			verify(t, stderr, row.want)
			if strings.Contains(stderr, "bind: ") { // check and Load bind nothing
				return
			}
			code, stdout, again := try("check", "-config", config)
			if code != 2 || stdout != "" || again != stderr {
				t.Errorf("check: exit code %d, %q, want 2 and what run says: %q", code, stdout,
					again)
			}
			if strings.Contains(stderr, "expired at") { // Load leaves dates to New and Reload
				return
			}
			if c, err := mtlsserver.Load(config); c != nil || err == nil ||
				err.Error()+"\n" != stderr {
				t.Errorf("Load: %v, %v, want nil and what run says", c, err)
			}
		})
	}
}

// edited returns the good configuration after an edit "old>new", which replaces the first old by
// new. A "…" in both stands for any text and keeps it.
func edited(t *testing.T, edit string) string {
	old, new, _ := strings.Cut(edit, ">")
	text := good
	from, to, rest := 0, 0, new
	for i, part := range strings.Split(old, "…") {
		n := strings.Index(text[to:], part)
		if n < 0 {
			t.Fatalf("%q is not in the good configuration", part)
		}
		if i == 0 {
			from = n
		}
		between := text[to : to+n]
		if i > 0 {
			rest = strings.Replace(rest, "…", between, 1)
		}
		to += n + len(part)
	}
	changed := text[:from] + rest + text[to:]
	return strings.NewReplacer(", ,", ",", "{, ", "{", ", }", "}").Replace(changed)
}

// remedy matches the part of an error that says what to do.
var remedy = regexp.MustCompile(`: (add|change|chmod|correct|give|it is required|keep|make|` +
	`name|remove|save|set|use|want|write) ?`)

// verify checks that text has one line for each element of want, with its parts and a remedy, and
// that it gives no secret away.
func verify(t *testing.T, text string, want []string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != len(want) {
		t.Errorf("%d lines, want %d:\n%s", len(lines), len(want), text)
		return
	}
	for i, line := range lines {
		if !has(line, want[i]) {
			t.Errorf("line %d: %s\nwant: %s", i+1, line, want[i])
		}
		if !remedy.MatchString(line) {
			t.Errorf("line %d does not say what to do: %s", i+1, line)
		}
	}
	noSecrets(t, text)
}

func noSecrets(t *testing.T, text string) {
	t.Helper()
	for name, secret := range pems() {
		if filepath.Ext(name) == ".key" &&
			strings.Contains(text, strings.Split(string(secret), "\n")[1][:20]) {
			t.Errorf("%s is in the output", name)
		}
	}
}

// has reports whether line has all parts in order.
func has(line, parts string) bool {
	for part := range strings.SplitSeq(parts, "…") {
		_, after, ok := strings.Cut(line, part)
		if !ok {
			return false
		}
		line = after
	}
	return true
}
