package mtlsserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// A Config made in Go is judged as one that was read, but for the lines it does not have.
func TestValidate(t *testing.T) {
	err := (&Config{
		TLS:  Files{Cert: "no.pem", Key: "-----BEGIN PRIVATE KEY-----\nsecret", CA: ""},
		Apps: []App{{ID: "web", Listen: ":0", IdleTimeout: -1, Upstreams: []Upstream{{Addr: "h:1", TLS: &UpstreamTLS{Cert: "no.pem"}}}}},
		Users: []User{
			{Name: "a", Serials: []string{"0x10"}, Apps: []string{"web"}, Limit: &Limit{}},
			{Name: "b", Serials: []string{"dec:16"}, Apps: []string{"web"}, AppLimits: map[string]Limit{"web": {Every: time.Second}}},
		},
		Handshake: Handshake{MaxBytes: -1},
	}).Validate()
	want := []string{
		`tls.cert: "no.pem": `,
		"tls.key: want the name of a file",
		"tls.ca: missing",
		"apps[0].idleTimeout: -1ns: want more than 0",
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

// Paths are relative to the file, wherever the process is.
func TestLoadResolvesPaths(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	const text = `{"tls": {"cert": "a/../c.pem", "key": "/k", "ca": ""}, "apps": [{"upstreams": [{"tls": {"ca": "x"}}, {}]}], "users": []}`
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
		`sub/config.json:1: apps[0].upstreams[0].tls.ca: "` + filepath.Join(dir, "sub", "x") + `": no such file`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant: %s", err, want)
		}
	}
}

// A file that is wrong all over ends reading: each problem is compared with those before.
func TestProblemsEndAtAHundred(t *testing.T) {
	const wrong = 1000
	for text, want := range map[string]int{
		`{"users": [` + strings.Repeat("1,", wrong) + `1]}`:                                     maxProblems,
		`{"users": [` + strings.Repeat(`{"a": 1, "a": 2},`, wrong) + `1]}`:                      maxProblems,
		`{` + strings.Repeat(`"a": 1, `, wrong) + `"tls": 2, "apps": [], "users": []}`:          2,
		`{"tls": {}, "apps": [], "users": [` + strings.Repeat(`{"name": "a"},`, wrong) + `{}]}`: maxProblems,
	} {
		r := &report{config: &Config{source: source{file: "config.json", text: []byte(text)}}}
		if r.parse() && want != 2 {
			r.check()
		}
		if n := len(r.problems); n != want {
			t.Errorf("%.40s: %d problems, want %d", text, n, want)
		}
	}
}

// isWhatIsWritten reports whether v is what x says, which encoding/json has read; nil is what is not written.
func isWhatIsWritten(v reflect.Value, x any) bool {
	switch x := x.(type) {
	case nil:
		return v.IsZero()
	case string:
		if _, ok := v.Interface().(time.Duration); ok {
			d, err := time.ParseDuration(x)
			return err == nil && v.Int() == int64(d)
		}
		return v.String() == x
	case json.Number:
		return fmt.Sprint(v.Int()) == x.String() || v.Int() == 0 && x == "-0"
	case []any:
		for i := range x {
			if v.Len() != len(x) || !isWhatIsWritten(v.Index(i), x[i]) {
				return false
			}
		}
		return true
	}
	all, found := x.(map[string]any), 0
	if v.Kind() == reflect.Map {
		for key, x := range all {
			if in := v.MapIndex(reflect.ValueOf(key)); !in.IsValid() || !isWhatIsWritten(in, x) {
				return false
			}
		}
		return v.Len() == len(all)
	}
	for f, in := range reflect.Indirect(v).Fields() {
		if key, _, _ := strings.Cut(f.Tag.Get("json"), ","); key != "" {
			x, written := all[key]
			if written {
				found++
			}
			if !isWhatIsWritten(in, x) {
				return false
			}
		}
	}
	return found == len(all)
}

// Whatever a file holds, problems are told in a line each that begins with the file and shows no control characters,
// and what has none is JSON of which all has been read, each value to its place.
func FuzzLoad(f *testing.F) {
	for _, text := range []string{
		`{"tls": {"cert": "c", "key": "k", "ca": "a"}, "apps": [{"id": "web", "listen": ":0", "upstreams": [{"addr": "h:1", "tls": {}}]}],
		"users": [{"name": "a", "serials": ["1"], "apps": ["web"], "limit": {"open": 1}, "appLimits": {"web": {"burst": 1, "every": "1s"}}}],
		"handshake": {"timeout": "1s"}, "drainTimeout": "1m"}`,
		`{"tls": {"cert": "c"}, "apps": [{"id": "web", "listen": ":1", "idleTimeout": "1m", "healthCheck": {"interval": "1s", "timeout": "2s",
		"rise": 3, "fall": 4}, "upstreams": [{"addr": "h:1", "weight": 5, "maxConns": 6}, {"tls": {"ca": "a", "cert": "b", "key": "c",
		"serverName": "d"}}]}], "users": [{"limit": {"open": 7, "bytesPerSecond": 8}}], "handshake": {"maxConcurrent": 9, "maxPerAddress": 10,
		"maxBytes": 11}}`,
		`{"users": [], "users": null, "x": {"y": [1, {}]}}`, `[`, `{}x`, "{\"\\u000a\":\n1}", `{"apps": [1, "2", null, true, {}]}`, "\xff", `{"": 0}`,
		`{"users": [{"appLimits": {"a.b[": 1, "a.b[": {}}}]}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c := &Config{source: source{file: "config.json", text: text}}
		r := &report{config: c}
		if r.parse() {
			if len(r.problems) == 0 {
				var all any
				dec := json.NewDecoder(bytes.NewReader(text))
				dec.UseNumber()
				must(t, dec.Decode(&all))
				if !isWhatIsWritten(reflect.ValueOf(c), all) {
					t.Fatalf("%+v is not what is written", c)
				}
			}
			c.TLS, c.Apps = Files{}, slices.DeleteFunc(c.Apps, func(a App) bool {
				return slices.ContainsFunc(a.Upstreams, func(u Upstream) bool { return u.TLS != nil }) // reads files
			})
			r.check()
		}
		err := errors.Join(r.problems...)
		if err == nil {
			t.Fatal("it is valid, without certificates")
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) < len(r.problems) {
			t.Fatalf("%d problems in %d lines", len(r.problems), len(lines))
		}
		for _, line := range lines {
			if !strings.HasPrefix(line, "config.json:") || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) {
				t.Fatalf("%q", line)
			}
		}
	})
}
