package main

import (
	"crypto/x509"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestUsers(t *testing.T) {
	dir := folder(t)
	config := filepath.Join(dir, "config.json")
	must(t, "issue", "-dir", dir, "-name", "carol", "-apps", "web", "-days", "20")
	serial := strings.TrimSpace(must(t, "serial", filepath.Join(dir, "carol.pem")))
	until := certificateIn(t, filepath.Join(dir, "carol.pem")).NotAfter.UTC().Format(time.DateOnly)
	// A certificate of another CA says nothing about a user, although the serial is the same.
	stranger := mustSign(serverCert(),
		mustSign(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign}, nil))
	write(t, dir, "stranger.pem", stranger.cert)
	replace(t, config, `"bob", "serials": ["0b"]`,
		`"bo\tb", "serials": ["0x`+stranger.Leaf.SerialNumber.Text(16)+`"]`)
	got := must(t, "users", "-config", config)
	want := []string{
		`^USER +SERIAL +CA +EXPIRES +APPS +LIMITS$`,
		`^alice +0x3a0f +ca.pem +\? +web,db +burst=20/50ms open=100 bytes=10485760/s web:open=10$`,
		`^alice +0x1234 +ca.pem +\? +web,db +burst=20/50ms open=100 bytes=10485760/s web:open=10$`,
		`^"bo\\tb" +0x` + stranger.Leaf.SerialNumber.Text(16) + ` +ca.pem +\? +web +none$`,
		`^carol +` + serial + ` +ca.pem +` + until + ` +web +none$`,
	}
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if len(lines) != len(want) {
		t.Fatalf("%d lines, want %d:\n%s", len(lines), len(want), got)
	}
	for i, line := range lines {
		if !regexp.MustCompile(want[i]).MatchString(line) {
			t.Errorf("line %d is %q, want %s", i+1, line, want[i])
		}
	}
	replace(t, config, `"handshake"`, `"defaultLimit": {"open": 7}, "handshake"`)
	if got := must(t, "users", "-config", config); !has(got, "bo\\tb…open=7\n") ||
		!has(got, "alice…burst") {
		t.Errorf("with a default limit:\n%s", got)
	}
	replace(t, config, `"web",`, `"wob",`)
	if code, stdout, stderr := try("users", "-config", config); code != 2 || stdout != "" ||
		!has(stderr, `config.json:…there is no app "web"`) {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
}

func TestVersion(t *testing.T) {
	said := must(t, "version")
	if want := "^mtlsserver \\S+ " +
		regexp.QuoteMeta(runtime.Version()+" "+runtime.GOOS+"/"+runtime.GOARCH) +
		"( [0-9a-f]{40})?( \\(modified\\))?\n$"; !regexp.MustCompile(want).MatchString(said) {
		t.Errorf("version says %q, want %s", said, want)
	}
	_, config := setUp(t)
	s := start(t, "run", "-config", config)
	first := s.await(t) // the first line of the log
	if !has(first, `"msg":"starting","version":"…"go":"`+runtime.Version()+`"`) {
		t.Errorf("the log begins with %q", first)
	}
	s.stop(t, 0)
}
