package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// setUpAdmin is setUp in a folder whose path is short enough for a socket everywhere.
func setUpAdmin(t *testing.T) (dir, config string) {
	t.Helper()
	short, err := os.MkdirTemp("", "lb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	return setUpIn(t, filepath.Join(short, "pki"))
}

func TestStatus(t *testing.T) {
	dir, config := setUpAdmin(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	text, err := os.ReadFile(config)
	if err != nil || !strings.Contains(string(text), `"admin": {"socket": "admin.sock"}`) {
		t.Fatalf("init wrote %s, %v", text, err)
	}
	s := start(t, "run", "-config", config)
	c, _, err := dial(dir, "alice", s.addrs["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	(&ended{c}).verify(t, false)
	said := must(t, "status", "-config", config)
	for _, want := range []string{
		"ready\n\nAPP …OPEN …TOTAL …REFUSED …FAILED …SENT …RECEIVED\nweb …",
		"\nAPP …UPSTREAM …STATE …FOR …OPEN …TOTAL …FAILED …WHY\nweb …127.0.0.1:…up …1 …1 …0\n",
		"\nUSER …APP …OPEN\nalice …web …1\n",
		"\nCERTIFICATE …FILE …EXPIRES …DAYS\n…server.pem …82",
	} {
		if !has(said, want) {
			t.Errorf("want %q in\n%s", want, said)
		}
	}

	if strings.Contains(said, "\nREFUSED") { // reasons without refusals are left out
		t.Errorf("nobody was refused:\n%s", said)
	}

	// A drained upstream leaves no other. A server that drains says so, and refuses to reload.
	replace(t, config, `"addr": "127`, `"drain": true, "addr": "127`)
	said = must(t, "reload", "-config", config)
	if !has(said, "Reloaded, and ended 0 connections.\n  upstreams  ~web/127.0.0.1:") {
		t.Errorf("reload says %q", said)
	}
	notReady := func(want string) {
		t.Helper()
		code, stdout, stderr := try("status", "-config", config)
		if code != 1 || stderr != "" || !has(stdout, want) {
			t.Errorf("exit code %d, want 1 and %q\n%s%s", code, want, stdout, stderr)
		}
	}
	notReady("not ready: app web: no upstream takes connections: 1 draining\n…up,drain")
	s.signals <- syscall.SIGTERM
	s.await(t, `"msg":"draining"`)
	proxytest.Eventually(t, "it is draining", func() bool {
		_, stdout, _ := try("status", "-config", config)
		return strings.HasPrefix(stdout, "not ready: draining\n")
	})
	notReady("not ready: draining\n")
	code, stdout, stderr := try("reload", "-config", config)
	if code != 1 || stdout != "" || stderr != "too late to reload: the server is stopping\n" {
		t.Errorf("reload during a drain: exit code %d, %q, %q", code, stdout, stderr)
	}
	(&ended{c}).verify(t, false)
	c.Close()
	s.exit(t, 0)
	for _, command := range []string{"status", "reload"} {
		code, stdout, stderr := try(command, "-config", config)
		if code != 2 || stdout != "" || !has(stderr, "mtlsserver "+command+": "+config+
			": no server answers at …admin.sock: …: start it, or send") ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s after the end: exit code %d, %q, %q", command, code, stdout, stderr)
		}
	}
}

func TestReload(t *testing.T) {
	dir, config := setUpAdmin(t)
	s := start(t, "run", "-config", config)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	reload := func(ended, change string) {
		t.Helper()
		want := fmt.Sprintf("Reloaded, and ended %s.\n  %s\n", ended, change)
		if said := must(t, "reload", "-config", config); said != want {
			t.Errorf("reload says %q, want %q", said, want)
		}
	}
	reload("0 connections", "users  +alice")
	c, _, err := dial(dir, "alice", s.addrs["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	must(t, "revoke", "-dir", dir, "-name", "alice")
	reload("1 connection", "users  -alice")
	proxytest.Eventually(t, "nobody is connected", func() bool {
		return !strings.Contains(must(t, "status", "-config", config), "\nalice ")
	})
	reload("0 connections", "nothing has changed")
	replace(t, config, `"apps":`, `"aps":`, `"id":`, `"\u001b[31mid":`)
	code, stdout, stderr := try("reload", "-config", config)
	if code != 1 || stdout != "" ||
		!has(stderr, "config.json:3: aps: unknown key…\n…config.json:1: apps: missing") ||
		strings.Contains(stderr, "\x1b") {
		t.Errorf("a bad configuration: exit code %d, %q\n%s", code, stdout, stderr)
	}
	s.stop(t, 0)
}

// SIGHUP and reload at the same time each get an answer, and a line in the log.
func TestReloadBesideSIGHUP(t *testing.T) {
	_, config := setUpAdmin(t)
	s := start(t, "run", "-config", config)
	const each = 8
	var reloads sync.WaitGroup
	for range each {
		reloads.Go(func() {
			code, stdout, stderr := try("reload", "-config", config)
			if code != 0 || !strings.HasPrefix(stdout, "Reloaded") {
				t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
			}
		})
		reloads.Go(func() { s.signals <- syscall.SIGHUP })
	}
	reloads.Wait()
	for range 2 * each {
		s.await(t, `"msg":"reloaded"`)
	}
	s.stop(t, 0)
	if rest := s.errs.all(); strings.Contains(rest, `"msg":"reloaded"`) {
		t.Errorf("more reloads than were asked for: %s", rest)
	}
}

// A malicious server's answer cannot control the terminal or widen the table.
func TestStatusIsCleanAndNarrow(t *testing.T) {
	const evil = "evil\x1b[2J\u202e\n" +
		"name that is much longer than any column of a table should ever be, and longer"
	stats := admin.Stats{
		Time: time.Now(),
		Apps: []admin.App{{
			ID: evil, Current: true, Accepted: 1 << 40, Sent: 1 << 63,
			Upstreams: []admin.Upstream{{
				Addr: evil, State: lbproxy.StateDown, Error: evil, Total: 1 << 30, Failed: 7,
				Since: time.Now().Add(-100 * time.Hour),
			}, {
				Addr: "10.0.0.1:80", State: lbproxy.StateCooling, Drain: true,
				Error: "dial tcp 10.0.0.1:80: connect: connection refused",
			}},
		}},
		Info: admin.Info{
			NotReady: evil, Refused: map[string]uint64{evil: 3},
			Certificates: []admin.Certificate{
				{Key: evil, File: evil, NotAfter: time.Now().Add(-time.Hour)},
				{Key: "tls.cert", File: "server.pem", NotAfter: time.Now().Add(10*day + time.Hour)},
			},
		},
	}
	for i := range 1000 {
		stats.Users = append(stats.Users,
			admin.User{Name: fmt.Sprint(i, evil), App: evil, Open: 1000 - i})
	}
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/stats" {
			json.NewEncoder(w).Encode(stats)
			return
		}
		w.WriteHeader(http.StatusUnprocessableEntity)
		json.NewEncoder(w).Encode(map[string]string{"error": evil})
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	config := filepath.Join(dir, "config.json")
	write(t, dir, "config.json",
		fmt.Appendf(nil, `{"admin": {"listen": %q, "token": "token"}}`, l.Addr()))
	write(t, dir, "token", []byte("0123456789abcdef\n"))

	code, stdout, stderr := try("status", "-config", config)
	if code != 1 || stderr != "" {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	for _, want := range []string{
		"not ready: evil?[2J??name …\nnot ready: app …\n", "cooling,drain …0 …connectio",
		"down …4d ", "8 EiB",
		"\nand 980 more users: see", "-1 …expired\n", "server.pem …10 …renew it\n",
	} {
		if !has(stdout, want) {
			t.Errorf("want %q in\n%s", want, stdout)
		}
	}
	_, reloadOut, reloadErr := try("reload", "-config", config)
	for line := range strings.Lines(stdout) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	for _, text := range []string{stdout, reloadOut, reloadErr} {
		for _, r := range text {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Fatalf("%q is in\n%s", r, text)
			}
		}
	}
}

func TestStatusThatCannotBeAsked(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.json")
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "<p>hello")
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go web.Serve(l)
	t.Cleanup(func() { web.Close() })
	for _, row := range []struct{ command, text, want string }{
		{"status", `{`,
			"config.json: unexpected end of JSON input: mtlsserver check -config …says where"},
		{"status", `{}`,
			`config.json: there is no admin: add "admin": {"socket": "admin.sock"}, then send`},
		{"reload", `{"admin": {}}`, "config.json: there is no admin"},
		{"reload", `{"admin": {"listen": "127.0.0.1:9"}}`,
			"admin.listen alone permits no changes: add admin.socket"},
		{"status", `{"admin": {"listen": "127.0.0.1:9", "token": "none"}}`, "none: "},
		{"status", fmt.Sprintf(`{"admin": {"listen": %q}}`, l.Addr()),
			": cannot read the answer from …: is it an mtlsserver of this version?"},
	} {
		write(t, dir, "config.json", []byte(row.text))
		code, stdout, stderr := try(row.command, "-config", config)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 ||
			!has(stderr, "mtlsserver "+row.command+": …"+row.want) {
			t.Errorf("%s of %s: exit code %d, %q, %q, want %q",
				row.command, row.text, code, stdout, stderr, row.want)
		}
	}
	a := &asker{config: config, addr: "admin.sock"}
	err = a.explain(&net.OpError{Op: "dial", Err: fs.ErrPermission})
	if !strings.HasSuffix(err.Error(), "run this as the server's user, or as root") {
		t.Error(err)
	}
}

// If the admin's socket cannot be in the folder, init leaves the admin out and prints the reason.
func TestInitWithoutAdmin(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("modes of folders mean nothing")
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o770)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		filepath.Join(t.TempDir(), strings.Repeat("long", 30)): "too long for a socket",
		open: "others may write the folder",
	} {
		if said := must(t, "init", dir); !has(said,
			"The configuration has no admin, as its socket cannot be there: …"+want) {
			t.Errorf("%s: init says %q", dir, said)
		}
		must(t, "check", "-config", filepath.Join(dir, "config.json"))
	}
}

// The status page writes the same; see TestPageCountsBytesBy1024 there.
func TestSizes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1536: "1.5 KiB", 1 << 20: "1 MiB",
		1 << 40: "1 TiB", 1<<64 - 1: "16 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}
