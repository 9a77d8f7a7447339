//go:build unix

package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// blocks returns the shell commands of a page of docs/, a block each.
func blocks(t *testing.T, page string) (all []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../../docs", page))
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range strings.Split(string(text), "```") {
		if code, ok := strings.CutPrefix(part, "sh\n"); ok && i%2 == 1 {
			all = append(all, code)
		}
	}
	return all
}

// installed returns a PATH on which this program is mtlsserver.
func installed(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	exe, err := os.Executable()
	if err == nil {
		err = os.Symlink(exe, filepath.Join(bin, "mtlsserver"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return bin + string(filepath.ListSeparator) + os.Getenv("PATH")
}

// The test runs every command of docs/rotate-ca.md beside a server with connections. Open
// connections stay open, and new ones are admitted at every step: with the old certificate until
// the old CA is dropped, and with the new one as soon as it exists.
func TestRotateTheCA(t *testing.T) {
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "web")
	path := installed(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "-config", config)
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	errs := make(lines, 10_000)
	cmd.Stderr = errs
	addr := startProcess(t, cmd)
	p := &process{errs: errs}
	shell := func(text string, logged ...string) string {
		t.Helper()
		pid := fmt.Sprint(cmd.Process.Pid)
		text = strings.NewReplacer("/etc/mtlsserver", dir, "$PID", pid).Replace(text)
		sh := exec.CommandContext(t.Context(), "sh", "-euc", text)
		sh.Env = append(os.Environ(), "MTLSSERVER_MAIN=1", "PATH="+path)
		said, err := sh.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", text, err, said)
		}
		if strings.Contains(text, "kill -HUP") {
			p.await(t, append(logged, `"msg":"reloaded"`)...)
		}
		return string(said)
	}
	var open []*ended
	connect := func(stem, roots string) {
		t.Helper()
		c, err := dialTrusting(dir, stem, roots, addr)
		if err != nil {
			t.Fatalf("%s, who trusts %s: %v", stem, roots, err)
		}
		t.Cleanup(func() { c.Close() })
		open = append(open, &ended{c})
	}
	allOpen := func(step string) {
		t.Helper()
		for _, c := range open {
			c.verify(t, false)
		}
		if t.Failed() {
			t.Fatalf("after %s", step)
		}
	}

	steps := blocks(t, "rotate-ca.md")
	if len(steps) != 6 {
		t.Fatalf("docs/rotate-ca.md has %d blocks of commands, want 6", len(steps))
	}
	connect("alice", "ca.pem")
	shell(steps[0], `"certificates":"+tls.ca:ca-2.pem"`) // add the new CA
	connect("alice", "ca.pem")
	allOpen("step 1")
	shell(steps[1]) // make clients trust both
	connect("bob", "trust.pem")
	shell(steps[2]) // new certificates
	connect("alice", "trust.pem")
	connect("alice-2", "trust.pem")
	allOpen("step 3")
	shell(steps[3]) // the server's
	connect("alice", "trust.pem")
	connect("alice-2", "ca-2.pem")
	if _, err := dialTrusting(dir, "alice-2", "ca.pem", addr); err == nil {
		t.Error("the server's certificate is still by the old CA")
	}
	allOpen("step 4")

	// Bob has been forgotten. The table shows it, and the old CA is not dropped.
	table := shell(steps[4])
	if !has(table, "alice…ca.pem…alice…ca-2.pem…bob…ca.pem") ||
		strings.Count(table, "ca-2.pem") != 1 {
		t.Errorf("users prints\n%s", table)
	}
	before := contents(t, dir)
	code, _, stderr := try("rotate", "-dir", dir, "-drop", "ca.pem")
	problem := `-drop "ca.pem": 1 user would have no certificate left: ["bob"]: issue`
	if code != 2 || !has(stderr, problem) || !equal(before, contents(t, dir)) {
		t.Errorf("with bob left: exit code %d, %s", code, stderr)
	}
	shell(strings.ReplaceAll(steps[2], "alice", "bob"))
	for _, c := range open { // clients leave in their own time
		c.Close()
	}
	open = nil
	connect("alice-2", "trust.pem")
	connect("bob-2", "ca-2.pem")
	last, err := dialTrusting(dir, "alice", "trust.pem", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	said := shell(steps[5], `"certificates":"-tls.ca:ca.pem"`) // drop the old one
	if !has(said, "Removed the CA \"ca.pem\" and 2 serials from ") {
		t.Errorf("step 5 says %q", said)
	}
	allOpen("step 5")
	(&ended{last}).verify(t, true)
	connect("alice-2", "ca-2.pem")
	if _, err := dialTrusting(dir, "alice", "ca-2.pem", addr); err == nil {
		t.Error("a certificate of the CA that was dropped is let in")
	}
	for _, c := range open {
		c.Close()
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}

	// Another rotation finds another name, and keeps the earlier CAs.
	must(t, "rotate", "-dir", dir)
	if text := contents(t, dir)["config.json"]; !has(text, `"ca": ["ca-2.pem","ca-3.pem"]`) {
		t.Errorf("config.json is\n%s", text)
	}
	must(t, "check", "-config", config)
}

// startProcess starts a server with a single app and returns the app's address.
func startProcess(t *testing.T, cmd *exec.Cmd) (addr string) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	return ready(t, stdout)
}

// ready waits until a server with a single app is ready, and returns the app's address.
func ready(t *testing.T, stdout io.Reader) (addr string) {
	t.Helper()
	text := make([]byte, 0, 200)
	for !strings.HasSuffix(string(text), "\n") {
		n, err := stdout.Read(text[len(text):cap(text)])
		if err != nil {
			t.Fatalf("ready: %q, %v", text, err)
		}
		text = text[:len(text)+n]
	}
	return strings.TrimSpace(strings.TrimPrefix(string(text), `app "web" listens on`))
}

// dialTrusting is dial for a client that trusts the CAs in a file.
func dialTrusting(dir, stem, roots, addr string) (*tls.Conn, error) {
	text, err := os.ReadFile(filepath.Join(dir, roots))
	if err != nil {
		return nil, err
	}
	who, err := clientOf(dir, stem, text)
	if err != nil {
		return nil, err
	}
	c, _, err := who.dial(addr)
	return c, err
}

func TestRotateThatFails(t *testing.T) {
	for _, row := range []struct {
		args  []string
		spoil func(dir string)
		want  string
	}{
		{[]string{"-drop", "other.pem"}, nil, `-drop "other.pem": want one of ["ca.pem"], which `},
		{[]string{"-drop", "ca.pem"}, nil, `-drop "ca.pem": it is the only CA: ` +
			`add another first, by mtlsserver rotate -dir `},
		{nil, func(dir string) {
			os.Remove(filepath.Join(dir, "config.json"))
		}, "config.json\": no such file"},
		{nil, func(dir string) {
			os.WriteFile(filepath.Join(dir, "config.json"), []byte("{"), 0o600)
		}, "config.json:1: "},
		{nil, func(dir string) {
			was := patience
			patience = 0
			t.Cleanup(func() { patience = was })
			os.WriteFile(filepath.Join(dir, "config.json.new"), nil, 0o600)
		}, "config.json.new: file exists: another command is editing"},
		{nil, func(dir string) { // a link to a file whose name has no room for .new
			path, long := filepath.Join(dir, "config.json"), strings.Repeat("c", 253)
			os.Rename(path, filepath.Join(dir, long))
			os.Symlink(long, path)
		}, "c.new: file name too long: the new configuration is written there first"},
	} {
		dir := folder(t)
		if row.spoil != nil {
			row.spoil(dir)
		}
		before := contents(t, dir)
		code, stdout, stderr := try(append([]string{"rotate", "-dir", dir}, row.args...)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, row.want) ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%v: exit code %d, %q, %q, want %q", row.args, code, stdout, stderr, row.want)
		}
		if !equal(before, contents(t, dir)) {
			t.Errorf("%v: the folder has changed", row.args)
		}
	}
}
