package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// must runs a command that has to succeed, and returns its output.
func must(t *testing.T, args ...string) string {
	t.Helper()
	code, stdout, stderr := try(args...)
	if code != 0 || stderr != "" {
		t.Fatalf("mtlsserver %s: exit code %d\n%s", strings.Join(args, " "), code, stderr)
	}
	return stdout
}

// echo is an upstream that sends name and then echoes.
func echo(t *testing.T, name string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				io.WriteString(c, name+"\n")
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(conns.Wait)
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// setUp makes a folder by init, whose app web leads to an echo. Its port is any that is free.
func setUp(t *testing.T) (dir, config string) {
	t.Helper()
	return setUpIn(t, filepath.Join(t.TempDir(), "pki"))
}

func setUpIn(t *testing.T, folder string) (dir, config string) {
	t.Helper()
	dir = folder
	must(t, "init", dir)
	config = filepath.Join(dir, "config.json")
	replace(t, config, "127.0.0.1:9443", "127.0.0.1:0", "127.0.0.1:8001", echo(t, "web"),
		`, {"addr": "127.0.0.1:8002"}`, "")
	return dir, config
}

func replace(t *testing.T, path string, oldnew ...string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.NewReplacer(oldnew...).Replace(string(text))),
		0o600); err != nil {
		t.Fatal(err)
	}
}

// A client holds the files and values that a program needs to connect.
type client tls.Config

// loadClient returns the holder of a certificate, who trusts the first CA.
func loadClient(dir, stem string) (*client, error) {
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	return clientOf(dir, stem, ca)
}

// clientOf returns the holder of a certificate, who trusts the CAs in a text.
func clientOf(dir, stem string, ca []byte) (*client, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, stem+".pem"),
		filepath.Join(dir, stem+".key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &client{RootCAs: roots, Certificates: []tls.Certificate{cert}}, nil
}

// dial connects with the client's certificate and returns the first bytes of the upstream. A
// refused client notices that only when it reads.
func dial(dir, stem, addr string) (*tls.Conn, string, error) {
	c, err := loadClient(dir, stem)
	if err != nil {
		return nil, "", err
	}
	return c.dial(addr)
}

func (who *client) dial(addr string) (*tls.Conn, string, error) {
	c, err := tls.Dial("tcp", addr, (*tls.Config)(who))
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	greeting := make([]byte, 4)
	if _, err := io.ReadFull(c, greeting); err != nil {
		c.Close()
		return nil, "", err
	}
	return c, string(greeting), nil
}

func TestInitIssueRunConnect(t *testing.T) {
	dir, config := setUp(t)
	said := must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	if !strings.Contains(said, `user "alice"`) {
		t.Errorf("issue says %q", said)
	}
	must(t, "check", "-config", config)
	s := start(t, "run", "-config", config, "-v")
	c, greeting, err := dial(dir, "alice", s.addrs["web"])
	if err != nil || greeting != "web\n" {
		t.Fatalf("alice: %q, %v", greeting, err)
	}

	// A user who comes later is known from the reload on, and alice's connection does not notice.
	must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "web")
	if _, _, err := dial(dir, "bob", s.addrs["web"]); err == nil {
		t.Fatal("bob is in before the reload")
	}
	s.await(t, `"reason":"unknown-serial"`)
	s.signals <- syscall.SIGHUP
	s.await(t, `"msg":"reloaded"`)
	bob, _, err := dial(dir, "bob", s.addrs["web"])
	if err != nil {
		t.Fatalf("bob: %v", err)
	}
	bob.Close()
	s.await(t, `"reason":"done"`, `"user":"bob"`)
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "ping" {
		t.Fatalf("alice reads %q, %v", answer, err)
	}

	// The first signal waits for alice, the second does not; what came between does nothing.
	s.signals <- syscall.SIGTERM
	s.await(t, `"msg":"draining"`)
	s.signals <- syscall.SIGHUP
	s.signals <- syscall.SIGTERM
	if _, err := c.Read(answer); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("alice reads on: %v", err)
	}
	s.exit(t, 1)
	c.Close()
}

func TestDrainTimeout(t *testing.T) {
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	replace(t, config, `"users": [`, `"drainTimeout": "10ms", "users": [`)
	s := start(t, "run", "-config", config, "-log", "text")
	c, _, err := dial(dir, "alice", s.addrs["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s.stop(t, 1)
	if log := s.errs.all(); !has(log, "msg=draining…msg=stopped err=…have been reset: 1") {
		t.Errorf("log: %s", log)
	}
}

func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	s := start(t, "run", "-config", config)
	file := func(name string) string { return filepath.Join(dir, name) }
	cmd := exec.CommandContext(t.Context(), openssl, "s_client", "-quiet",
		"-verify_return_error", "-connect", s.addrs["web"],
		"-CAfile", file("ca.pem"), "-cert", file("alice.pem"), "-key", file("alice.key"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "ping\n")
	answer := make([]byte, len("web\nping\n"))
	if _, err := io.ReadFull(out, answer); err != nil || string(answer) != "web\nping\n" {
		t.Errorf("openssl reads %q, %v", answer, err)
	}
	in.Close()
	cmd.Process.Kill()
	cmd.Wait()
	s.await(t, `"user":"alice"`)
	s.stop(t, 0)

	// It prints the serial in a form that the user list takes, and so does the command serial.
	text, err := exec.Command(openssl, "x509", "-serial", "-noout", "-in",
		file("alice.pem")).Output()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := mtlsserver.ParseSerial(strings.TrimPrefix(strings.TrimSpace(string(text)),
		"serial="))
	if err != nil {
		theirs, err = mtlsserver.ParseSerial("0x" +
			strings.TrimPrefix(strings.TrimSpace(string(text)), "serial="))
	}
	ours := strings.TrimSpace(must(t, "serial", file("alice.pem")))
	if err != nil || ours != "0x"+string(theirs) {
		t.Errorf("serial: %s, openssl: %s, %v", ours, text, err)
	}
}

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	said := must(t, "init", "-host", "lb.example.org,192.0.2.1", dir, "-host", "other.example.org")
	for _, next := range []string{"issue -dir " + dir + " -name alice", "run -config " +
		filepath.Join(dir, "config.json")} {
		if !strings.Contains(said, next) {
			t.Errorf("init says %q, want %q in it", said, next)
		}
	}
	server, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.pem"),
		filepath.Join(dir, "server.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	for _, host := range []string{"localhost", "127.0.0.1", "::1", "lb.example.org",
		"192.0.2.1", "other.example.org"} {
		opts := x509.VerifyOptions{Roots: roots, DNSName: host}
		if _, err := server.Leaf.Verify(opts); err != nil {
			t.Errorf("as %s: %v", host, err)
		}
	}
	if !ca.Leaf.IsCA || !ca.Leaf.MaxPathLenZero {
		t.Error("the CA may issue other CAs")
	}
	for _, name := range []string{"ca.key", "server.key"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || runtime.GOOS != "windows" && info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", name, info.Mode(), err)
		}
	}
	must(t, "check", "-config", filepath.Join(dir, "config.json"))
	if c, err := mtlsserver.Load(filepath.Join(dir, "config.json")); err != nil ||
		c.Apps[0].HealthCheck == nil {
		t.Errorf("its upstreams are not checked: %v", err)
	}
}

// init overwrites no file, and if one exists it makes no other.
func TestInitNeverOverwrites(t *testing.T) {
	for _, name := range []string{"ca.pem", "ca.key", "server.pem", "server.key", "config.json"} {
		dir := t.TempDir()
		write(t, dir, name, []byte("mine"))
		code, stdout, stderr := try("init", dir)
		if code != 2 || stdout != "" || !has(stderr, name+"…exists…overwrites no file") ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q, %q", name, code, stdout, stderr)
		}
		if all := contents(t, dir); len(all) != 1 || all[name] != "mine" {
			t.Errorf("%s: the folder has %v", name, all)
		}
	}
}

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Type() == fs.ModeSocket {
			return err
		}
		text, err := os.ReadFile(filepath.Join(dir, path))
		all[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestIssueKeepsTheRest(t *testing.T) {
	const before = "{\r\n\t\"users\" :[ {\"apps\": " +
		"[\"web\", \"db\"],\"serials\":[\n\"3a:0f\"\n], \"name\":\"alice\"}\t ],\n" +
		`"drainTimeout":"5s",  "tls": {"key": "server.key", "cert": "server.pem", "ca": "ca.pem"},
"apps": [{"id": "web", "listen": ":0", "upstreams": [{"addr": "users:1"}]},` +
		`{"id":"db","listen":":0","upstreams":[{"addr":"h:2"}]}]}`
	dir := folder(t)
	config := filepath.Join(dir, "config.json")
	write(t, dir, "config.json", []byte(before))
	if err := os.Chmod(config, 0o660); err != nil {
		t.Fatal(err)
	}
	serial := func(stem string) string {
		return strings.TrimSpace(must(t, "serial", filepath.Join(dir, stem+".pem")))
	}

	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "db,web")
	alice, err := tls.LoadX509KeyPair(filepath.Join(dir, "alice.pem"),
		filepath.Join(dir, "alice.key"))
	if err != nil || alice.Leaf.NotAfter.After(authority().Leaf.NotAfter) {
		t.Errorf("alice's certificate: %v, valid for longer than the CA's", err)
	}
	after := strings.Replace(before, `"3a:0f"`, `"3a:0f", "`+serial("alice")+`"`, 1)
	must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "db", "-apps", "web")
	after = strings.Replace(after, `"name":"alice"}`, `"name":"alice"},`+"\n    "+
		`{"name":"bob","serials":["`+serial("bob")+`"],"apps":["db","web"]}`, 1)
	must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "web,db")
	after = strings.Replace(after, serial("bob")+`"`, serial("bob")+`", "`+serial("bob-2")+`"`, 1)
	if got := contents(t, dir)["config.json"]; got != after {
		t.Errorf("config.json is\n%s\nwant\n%s", got, after)
	}
	if info, err := os.Stat(config); err != nil || runtime.GOOS != "windows" &&
		info.Mode() != 0o660 {
		t.Errorf("mode %v, %v, want what it was", info.Mode(), err)
	}
	must(t, "check", "-config", config)

	// The output is the entry, and no file changes.
	code, entry, made := try("issue", "-dir", dir, "-name", "carol", "-apps", "web", "-print")
	if code != 0 || !has(made, "Made …carol.pem and …carol.key.") {
		t.Errorf("issue -print: exit code %d, %q", code, made)
	}
	var user struct {
		Name          string
		Serials, Apps []string
	}
	if err := json.Unmarshal([]byte(entry), &user); err != nil || user.Name != "carol" ||
		len(user.Serials) != 1 ||
		user.Serials[0] != serial("carol") || len(user.Apps) != 1 || user.Apps[0] != "web" {
		t.Errorf("issue -print: %s, %v", entry, err)
	}
	if got := contents(t, dir)["config.json"]; got != after {
		t.Error("issue -print changed config.json")
	}
}

// The configuration may be a link to a file elsewhere. Then that file changes, and the paths in it
// are still relative to the folder of the link, as they are for Load.
func TestIssueFollowsALink(t *testing.T) {
	dir, other := folder(t), t.TempDir()
	config, real := filepath.Join(dir, "config.json"), filepath.Join(other, "real.json")
	write(t, other, "real.json", []byte(contents(t, dir)["config.json"]))
	if err := os.Remove(config); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, config); err != nil {
		t.Skip(err)
	}
	must(t, "check", "-config", config)
	must(t, "issue", "-dir", dir, "-name", "carol", "-apps", "web")
	if c, err := mtlsserver.Load(config); err != nil || c.Users[len(c.Users)-1].Name != "carol" {
		t.Errorf("carol is not in: %v", err)
	}
	if to, err := os.Readlink(config); err != nil || to != real {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if files := contents(t, other); len(files) != 1 ||
		!strings.Contains(files["real.json"], "carol") {
		t.Errorf("where it leads there are %d files", len(files))
	}
}

func TestIssueThatFails(t *testing.T) {
	for _, row := range []struct {
		name  string
		args  []string
		spoil func(t *testing.T, dir string)
		want  string
	}{
		{"no such app", []string{"-name", "carol", "-apps", "web,mail"}, nil,
			`config.json:14: users[2].apps[1]: there is no app "mail": want one of ["db" "web"]`},
		{"other apps", []string{"-name", "alice", "-apps", "web"}, nil,
			`-apps: user "alice" has apps ["db" "web"], not ["web"]`},
		{"a path", []string{"-name", "../carol", "-apps", "web"}, nil,
			`-name "../carol": want letters`},
		{"a flag", []string{"-name", "-carol", "-apps", "web"}, nil,
			`-name "-carol": want letters`},
		{"text that plays tricks", []string{"-name", "ca\nrol", "-apps", "web"}, nil,
			`-name "ca\nrol": want letters`},
		{"another issue at work", []string{"-name", "carol", "-apps", "web"},
			func(t *testing.T, dir string) {
				was := patience
				patience = 0
				t.Cleanup(func() { patience = was })
				write(t, dir, "config.json.new", []byte("theirs"))
			}, "config.json.new: file exists: another command is editing"},
		{"a configuration with problems", []string{"-name", "carol", "-apps", "web"},
			func(t *testing.T, dir string) {
				write(t, dir, "config.json", []byte(strings.Replace(good, `"30s"`, `30`, 1)))
			}, "config.json:16: drainTimeout: want a duration"},
		{"no configuration", []string{"-name", "carol", "-apps", "web"},
			func(t *testing.T, dir string) {
				os.Remove(filepath.Join(dir, "config.json"))
			}, "config.json: no such file"},
		{"no CA", []string{"-name", "carol", "-apps", "web"}, func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "ca.key"))
		}, "ca.key: no such file or directory: name a folder that mtlsserver init made"},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := folder(t)
			if row.spoil != nil {
				row.spoil(t, dir)
			}
			before := contents(t, dir)
			code, stdout, stderr := try(append([]string{"issue", "-dir", dir}, row.args...)...)
			if code != 2 || stdout != "" || !strings.HasPrefix(stderr, "mtlsserver issue: ") ||
				!strings.Contains(stderr, row.want) {
				t.Errorf("exit code %d, %q, %q, want %q", code, stdout, stderr, row.want)
			}
			after := contents(t, dir)
			for name, text := range before {
				if after[name] != text {
					t.Errorf("%s has changed", name)
				}
			}
			if len(after) != len(before) {
				t.Errorf("there are %d files, there were %d", len(after), len(before))
			}
		})
	}
}

// A reader of the configuration always finds a complete one, and concurrent changes all take
// effect.
func TestIssueIsAtomic(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	config := filepath.Join(dir, "config.json")
	var issuing, reading sync.WaitGroup
	over := make(chan struct{})
	reading.Go(func() {
		for {
			if _, err := mtlsserver.Load(config); err != nil {
				t.Errorf("in between: %v", err)
				return
			}
			select {
			case <-over:
				return
			default:
			}
		}
	})
	names := []string{"u1", "u2", "u3", "u4"}
	done := make([]int, len(names))
	for i, name := range names {
		issuing.Go(func() {
			for range 10 {
				code, _, stderr := try("issue", "-dir", dir, "-name", name, "-apps", "web")
				if code == 0 {
					done[i]++
				} else {
					t.Errorf("%s: %s", name, stderr)
				}
			}
		})
	}
	issuing.Wait()
	close(over)
	reading.Wait()
	c, err := mtlsserver.Load(config)
	if err != nil {
		t.Fatal(err)
	}
	serials := map[string]int{}
	for _, user := range c.Users {
		serials[user.Name] = len(user.Serials)
	}
	for i, name := range names {
		if serials[name] != done[i] {
			t.Errorf("%s has %d serials, was issued %d", name, serials[name], done[i])
		}
		if files, _ := filepath.Glob(filepath.Join(dir, name+"*.key")); len(files) != done[i] {
			t.Errorf("%s has %d keys, was issued %d", name, len(files), done[i])
		}
	}
}

func TestSerial(t *testing.T) {
	dir := t.TempDir()
	for _, row := range []struct {
		text []byte
		want string
	}{
		{nil, "want a certificate in PEM"},
		{pems()["client.key"], "want a certificate in PEM"},
		{[]byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"),
			"x509: malformed"},
	} {
		write(t, dir, "c.pem", row.text)
		code, stdout, stderr := try("serial", filepath.Join(dir, "c.pem"))
		if code != 2 || stdout != "" || !has(stderr, "mtlsserver serial: …c.pem…"+row.want) ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%.20q: exit code %d, %q, %q, want %q", row.text, code, stdout, stderr,
				row.want)
		}
		noSecrets(t, stderr)
	}
	// A CA has an id that serials name it by.
	write(t, dir, "ca.pem", pems()["ca.pem"])
	if got, want := must(t, "serial", filepath.Join(dir, "ca.pem")),
		mtlsserver.KeyID(authority().Leaf)+"\n"; got != want {
		t.Errorf("of a CA: %q, want %q", got, want)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range []string{"-h", "--help", "help", "init -h", "init dir -h", "issue -h",
		"renew -h", "revoke -h", "rotate -h", "users -h", "status -h", "reload -h", "version -h",
		"serial -help", "check -h", "run -config x -h"} {
		if code, stdout, stderr := try(strings.Fields(args)...); code != 0 || stdout != usage ||
			stderr != "" {
			t.Errorf("%s: exit code %d, %q, %q", args, code, stdout, stderr)
		}
	}
	for _, row := range []struct{ args, want string }{
		{"", "mtlsserver: no command: mtlsserver -h lists them"},
		{"serve", `mtlsserver: unknown command "serve": mtlsserver -h lists them`},
		{"-config x", `mtlsserver: unknown command "-config"`},
		{"init", "mtlsserver init: DIR is missing: mtlsserver -h helps"},
		{"init a b", `mtlsserver init: unexpected argument "b"`},
		{"init a -hots b", "mtlsserver init: flag provided but not defined: -hots"},
		{"init a -host", "mtlsserver init: flag needs an argument: -host"},
		{"init a -host https://x",
			`mtlsserver init: -host "https://x": want host names or addresses`},
		{"init a -host x,", `mtlsserver init: -host "": want host names`},
		{"issue -name n -apps web", "mtlsserver issue: -dir is missing"},
		{"issue -dir d -apps web", "mtlsserver issue: -name is missing"},
		{"issue -dir d -name n", "mtlsserver issue: -apps is missing"},
		{"issue -dir d -name n -apps web more", `mtlsserver issue: unexpected argument "more"`},
		{"renew", "mtlsserver renew: -dir is missing"},
		{"renew -dir d -days x", `mtlsserver renew: invalid value "x" for flag -days`},
		{"revoke -dir d", "mtlsserver revoke: -name is missing"},
		{"revoke -name n", "mtlsserver revoke: -dir is missing"},
		{"rotate", "mtlsserver rotate: -dir is missing"},
		{"rotate -dir d now", `mtlsserver rotate: unexpected argument "now"`},
		{"users", "mtlsserver users: -config is missing"},
		{"status", "mtlsserver status: -config is missing"},
		{"status -config no.json", "mtlsserver status: open no.json: "},
		{"reload", "mtlsserver reload: -config is missing"},
		{"reload -config no.json now", `mtlsserver reload: unexpected argument "now"`},
		{"version 2", `mtlsserver version: unexpected argument "2"`},
		{"serial", "mtlsserver serial: CERT.pem is missing"},
		{"serial no.pem", "mtlsserver serial: "},
		{"check", "mtlsserver check: -config is missing"},
		{"check -config", "mtlsserver check: flag needs an argument: -config"},
		{"run", "mtlsserver run: -config is missing"},
		{"run -config x -log xml", `mtlsserver run: -log "xml": want json or text`},
		{"run -config x -v=maybe", `mtlsserver run: invalid boolean value "maybe"`},
	} {
		code, stdout, stderr := try(strings.Fields(row.args)...)
		if code != 2 || stdout != "" || !strings.HasPrefix(stderr, row.want) ||
			strings.Count(stderr, "\n") != 1 || strings.Contains(row.args, "\n") {
			t.Errorf("%q: exit code %d, %q, %q, want %q", row.args, code, stdout, stderr, row.want)
		}
	}
	if bytes.Contains([]byte(usage), []byte("\t")) {
		t.Error("the usage has tabs")
	}
}
