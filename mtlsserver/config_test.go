package mtlsserver

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// A Config built in Go has the same problems as one that was read, without line numbers.
func TestValidate(t *testing.T) {
	err := (&Config{
		TLS: Files{Cert: "no.pem", Key: "-----BEGIN PRIVATE KEY-----\nsecret", CA: []string{""}},
		Apps: []App{{ID: "web", Listen: ":0", IdleTimeout: -1, CloseNotify: "never",
			Upstreams: []Upstream{{Addr: "h:1", TLS: &UpstreamTLS{Cert: "no.pem"}}}}},
		Users: []User{
			{Name: "a", Serials: serials("0x10"), Apps: []string{"web"}, Limit: &Limit{}},
			{Name: "b", Serials: serials("dec:16"), Apps: []string{"web"},
				AppLimits: map[string]Limit{"web": {Every: time.Second}}},
		},
		Handshake: Handshake{MaxBytes: -1},
	}).Validate()
	want := []string{
		`tls.cert: "no.pem": `,
		"tls.key: want the name of a file",
		"tls.ca: missing",
		"apps[0].idleTimeout: -1ns: want more than 0",
		`apps[0].closeNotify: "never": want "required"`,
		`apps[0].upstreams[0].tls.cert: "no.pem": `,
		"apps[0].upstreams[0].tls.key: missing",
		"users[0].limit: limits nothing",
		`users[1].appLimits["web"]: burst and every go together`,
		`users[1].serials[0]: "dec:16" is the serial of users[0].serials[0] ("0x10") too`,
		"handshake.maxBytes: -1: want more than 0",
	}
	if err == nil {
		t.Fatal("it is valid")
	}
	got := strings.Split(err.Error(), "\n")
	if len(got) != len(want) {
		t.Fatalf("%d problems, want %d:\n%v", len(got), len(want), err)
	}
	for i, line := range got {
		if !strings.HasPrefix(line, want[i]) {
			t.Errorf("%s\nwant: %s", line, want[i])
		}
	}
}

// Each change of a valid configuration has one problem.
func TestValidateFindsASingleProblem(t *testing.T) {
	l := newLab(t, nil)
	short := filepath.Join(l.dir, "short")
	must(t, os.WriteFile(short, []byte("12345\n"), 0o600))
	must(t, l.config.Validate())
	for _, test := range []struct {
		change func(*Config)
		want   string // the beginning of the error
	}{
		{func(c *Config) { c.Apps[0].Listen = "web" }, `apps[0].listen: "web": want host:port`},
		{func(c *Config) { c.Apps[0].TLS = &AppTLS{ServerName: "db.example"} },
			`apps[0].tls.serverName: "db.example": the certificate in tls.cert is not for`},
		{func(c *Config) { c.TLS.CA, c.Users = []string{c.TLS.Cert}, nil },
			`tls.ca: "` + l.config.TLS.Cert + `": not a CA's certificate`},
		{func(c *Config) { c.AdminAnywhere = true }, "adminAnywhere: there is no admin"},
		{func(c *Config) { c.Apps[0].AcceptProxy = []string{"::/0"} },
			`apps[0].acceptProxy[0]: "::/0": want fewer than all addresses`},
		{func(c *Config) { c.Apps[0].AcceptProxy = []string{"::ffff:0.0.0.0/96"} },
			`apps[0].acceptProxy[0]: "::ffff:0.0.0.0/96": want fewer than all addresses`},
		{func(c *Config) {
			c.Apps[0].Listen, c.Admin = "127.0.0.1:9443", &Admin{Listen: "127.0.0.1:9443"}
		}, `admin.listen: "127.0.0.1:9443" is already used by apps[0].listen`},
		{func(c *Config) { c.Admin = &Admin{Listen: "127.0.0.1:0", Token: short} },
			`admin.token: "` + short + `": only 5 characters`},
		{func(c *Config) { c.Admin = &Admin{Listen: "127.0.0.1:0", Token: short + "er"} },
			`admin.token: "` + short + `er": no such file`},
	} {
		err := l.with(test.change).Validate()
		if err == nil || !strings.HasPrefix(err.Error(), test.want) ||
			strings.Contains(err.Error(), "\n") {
			t.Errorf("%v\nwant one line: %s", err, test.want)
		}
	}
}

// A serial belongs to a CA of this server: to the one that it names, or else to the only one.
func TestValidateTheCAOfASerial(t *testing.T) {
	l := newLab(t, nil)
	next := newAuthority(t, "next")
	nextFile, _ := writePEM(t, l.dir, "next",
		tls.Certificate{Certificate: [][]byte{next.cert.Raw}})
	one := l.config.TLS.CA
	two, none := append(slices.Clone(one), nextFile), []string{filepath.Join(l.dir, "none")}
	id, nextID := KeyID(l.ca.cert), KeyID(next.cert)
	var colons []string
	for octet := range slices.Chunk([]byte(strings.ToUpper(nextID)), 2) {
		colons = append(colons, string(octet))
	}
	for _, test := range []struct {
		cas  []string
		ca   string
		want string // the beginning of the error
		key  string // the CA of the serial
	}{
		{one, "", "", id},
		{one, id, "", id},
		{one, nextID, `users[0].serials[0].ca: "` + nextID + `": no CA in tls.ca has that key`, ""},
		{two, id, "", id},
		{two, strings.Join(colons, ":"), "", nextID},
		{two, "", `users[0].serials[0]: "0xa11ce": its CA is missing, and there are 2`, ""},
		{two, id[:63], "users[0].serials[0].ca: " + `"` + id[:63] + `": want the 64 hex digits`, ""},
		{none, id, "tls.ca: ", ""}, // that is the only problem
	} {
		r := &report{config: l.with(func(c *Config) {
			c.TLS.CA = test.cas
			c.Users[0].Serials = []UserSerial{{Serial: "0xa11ce", CA: test.ca}}
		})}
		snap, err := r.check(), r.err()
		users := snap.auth.Users.(listed)
		if _, ok := users[certKey{test.key, "a11ce"}]; err == nil && (test.want != "" || !ok) {
			t.Errorf("%v, CA %q: users %v", test.cas, test.ca, users)
		}
		if err != nil && (test.want == "" || !strings.HasPrefix(err.Error(), test.want) ||
			strings.Contains(err.Error(), "\n")) {
			t.Errorf("%v, CA %q: %v, want %q", test.cas, test.ca, err, test.want)
		}
	}
}

// Paths are relative to the file, not to the folder of the process.
func TestLoadResolvesPaths(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	const text = `{"tls": {"cert": "a/../c.pem", "key": "/k", "ca": ""}, "apps": ` +
		`[{"upstreams": [{"tls": {"ca": "x"}}, {}]}], "users": []}`
	if err := os.WriteFile("sub/config.json", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Load("sub/config.json")
	if err == nil {
		t.Fatal("it is valid")
	}
	for _, want := range []string{
		`sub/config.json:1: tls.cert: "` + filepath.Join(dir, "sub", "c.pem") + `": no such file`,
		`sub/config.json:1: tls.key: "/k": no such file`,
		`sub/config.json:1: tls.ca: missing`,
		`sub/config.json:1: apps[0].upstreams[0].tls.ca: "` + filepath.Join(dir, "sub", "x") +
			`": no such file`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant: %s", err, want)
		}
	}
}

// Each problem of a file has one line, which begins with the file's name and has no control
// characters, whatever bytes the file holds.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		`{"tls": {"cert": "c", "key": "k", "ca": "a"},
		"apps": [{"id": "web", "listen": ":0", "upstreams": [{"addr": "h:1", "tls": {}}]}],
		"users": [{"name": "a", "serials": ["1"], "apps": ["web"], "limit": {"open": 1},
		"appLimits": {"web": {"burst": 1, "every": "1s"}}}],
		"handshake": {"timeout": "1s"}, "drainTimeout": "1m"}`,
		`{"tls": {"cert": "c"}, "apps": [{"id": "web", "listen": ":1", "idleTimeout": "1m",
		"healthCheck": {"interval": "1s", "timeout": "2s", "rise": 3, "fall": 4},
		"upstreams": [{"addr": "h:1", "weight": 5, "maxConns": 6},
		{"tls": {"ca": "a", "cert": "b", "key": "c", "serverName": "d"}}]}],
		"users": [{"limit": {"open": 7, "bytesPerSecond": 8}}],
		"handshake": {"maxConcurrent": 9, "maxPerAddress": 10, "maxBytes": 11}}`,
		`{"users": [], "users": null, "x": {"y": [1, {}]}}`, `[`, `{}x`, "{\"\\u000a\":\n1}",
		`{"apps": [1, "2", null, true, {}]}`, "\xff", `{"": 0}`,
		`{"users": [{"appLimits": {"a.b[": 1, "a.b[": {}}}]}`,
		`{"tls": {"ca": ["a", "b"]}, "users": [{"serials": [{"serial": "1", "ca": ` +
			`"x", "certSHA256": "y"}]}], "defaultLimit": {}, "logAdmissions": true}`,
		`{"apps": [{"closeNotify": "idle", "acceptProxy": ["10.0.0.0/8", "x"],
		"maxConns": 1, "tls": {"serverName": "a"},
		"upstreams": [{"proxyProtocol": 3, "drain": true}]}]}`,
	} {
		f.Add([]byte(text))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		if bytes.ContainsAny(text, "/") {
			return // reads files of this machine
		}
		c, err := Parse("config.json", dir, text)
		if err == nil || c != nil {
			t.Fatal("it is valid, without certificates")
		}
		for line := range strings.SplitSeq(err.Error(), "\n") {
			if !strings.HasPrefix(line, "config.json:") ||
				strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) {
				t.Fatalf("%q", line)
			}
		}
	})
}

// A Config that was loaded can be marshalled, and Parse returns an equal one.
func TestConfigCanBeMarshalled(t *testing.T) {
	l := newLab(t, nil)
	dir := l.dir
	text := `{"tls": {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"},
	"apps": [{"id": "web", "listen": "127.0.0.1:0", "maxConns": 5,
		"idleTimeout": "1m30s", "dialTimeout": "2s", "failTimeout": "3s",
		"closeNotify": "idle", "acceptProxy": ["10.0.0.0/8"], "tls": {"serverName": "localhost"},
		"healthCheck": {"interval": "5s", "rise": 2},
		"upstreams": [{"addr": "h:1", "weight": 2, "proxyProtocol": 2},
			{"addr": "h:2", "drain": true, "tls": {"ca": "ca.pem"}}]}],
	"users": [{"name": "alice", "serials": ["0xa11ce",
		{"serial": "dec:4660", "certSHA256": "` + strings.Repeat("0A:", 31) + `0a"}],
		"apps": ["web"], "limit": {"burst": 1, "every": "50ms"},
		"appLimits": {"web": {"open": 3}}}],
	"defaultLimit": {"open": 100}, "handshake": {"timeout": "5s"},
	"drainTimeout": "1h0m0.5s", "logAdmissions": true}`
	first, err := Parse("config.json", dir, []byte(text))
	must(t, err)
	written, err := json.Marshal(first)
	must(t, err)
	again, err := Parse("config.json", dir, written)
	must(t, err)
	first.source, again.source = source{}, source{}
	if !reflect.DeepEqual(first, again) {
		t.Errorf("%+v\nis read again as\n%+v\nof %s", first, again, written)
	}
	if want := `"idleTimeout":"1m30s"`; !bytes.Contains(written, []byte(want)) ||
		bytes.Contains(written, []byte("null")) {
		t.Errorf("%s, want %s in it", written, want)
	}
	user, err := json.Marshal(first.Users[0])
	must(t, err)
	if !bytes.Contains(written, user) {
		t.Errorf("by itself a user is %s, in %s", user, written)
	}
}
