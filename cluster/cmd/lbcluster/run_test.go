package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A pki is a folder of certificates, and a client.
type pki struct {
	dir    string
	client *tls.Config
}

func newPKI(t *testing.T) pki {
	t.Helper()
	ca := proxytest.NewAuthority()
	dir := t.TempDir()
	proxytest.WritePEM(t, dir, "ca", tls.Certificate{Certificate: [][]byte{ca.Cert.Raw}})
	proxytest.WritePEM(t, dir, "server", ca.Server())
	alice := ca.Client(proxytest.Serial(0xa11ce))
	return pki{dir, ca.ClientConfig(&alice)}
}

// config is a configuration with an app on any free port.
func config(upstream, limit string) string {
	return fmt.Sprintf(`{
  "tls": {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"},
  "apps": [{"id": "web", "listen": "192.0.2.1:0", "upstreams": [{"addr": %q, "maxConns": 100}]}],
  "users": [{"name": "alice", "serials": ["0xa11ce"], "apps": ["web"]%s}],
  "drainTimeout": "1s"
}
`, upstream, limit)
}

// named is an upstream that sends its name and holds the connection.
func named(t *testing.T, name string) string {
	return proxytest.Upstream(t, func(c *net.TCPConn) {
		fmt.Fprintln(c, name)
		io.Copy(io.Discard, c)
	})
}

var listens = regexp.MustCompile(`app "web" listens on (\S+)`)

// startProxy runs the command run, and returns where the app listens.
func startProxy(t *testing.T, env map[string]string, p pki, args ...string) (*process, string) {
	t.Helper()
	all := append([]string{"run", "-dir", p.dir, "-host", "127.0.0.1", "-timeout", "20s"}, args...)
	proc := begin(t, env, all...)
	var addr string
	storetest.Await(t, "the proxy listens", func() error {
		select {
		case code := <-proc.code:
			t.Fatalf("exit %d: %s", code, &proc.log)
		default:
		}
		m := listens.FindStringSubmatch(proc.stdout.String())
		if m == nil {
			return storetest.Errorf("%s%s", &proc.stdout, &proc.log)
		}
		addr = m[1]
		return nil
	})
	t.Cleanup(func() {
		proc.signals <- syscall.SIGTERM
		proc.signals <- syscall.SIGTERM
	})
	return proc, addr
}

// enter connects alice, and returns the upstream's name.
func enter(p pki, addr string) (net.Conn, string, error) {
	raw, err := net.DialTimeout("tcp", addr, storetest.Patience)
	if err != nil {
		return nil, "", err
	}
	c := tls.Client(raw, p.client)
	c.SetDeadline(time.Now().Add(storetest.Patience))
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimSpace(string(buf[:n])), nil
}

func visit(p pki, addr string) (string, error) {
	c, name, err := enter(p, addr)
	if err == nil {
		c.Close()
	}
	return name, err
}

func comesTo(p pki, addr, want string) func() error {
	return func() error {
		name, err := visit(p, addr)
		if err == nil && name != want {
			err = fmt.Errorf("alice comes to %s, not %s", name, want)
		}
		return err
	}
}

func putConfig(t *testing.T, env map[string]string, text string, args ...string) {
	t.Helper()
	args = append(append([]string{"put"}, args...), storetest.WriteFile(t, "config.json", text))
	if code, _, stderr := lbcluster(t, env, args...); code != 0 {
		t.Fatal(stderr)
	}
}

func lsHas(t *testing.T, env map[string]string, want ...string) {
	t.Helper()
	storetest.Await(t, "ls shows it", func() error {
		_, stdout, stderr := lbcluster(t, env, "ls")
		for _, w := range want {
			if !strings.Contains(stdout, w) {
				return fmt.Errorf("no %q in %s%s", w, stdout, stderr)
			}
		}
		return nil
	})
}

// Two proxies follow the configuration in the store, through failures of the store and of a proxy.
func TestRun(t *testing.T) {
	server := storetest.Redis(t)
	env := map[string]string{"LBPROXY_STORE": server.URL()}
	p := newPKI(t)
	other := pki{t.TempDir(), p.client}
	if err := os.CopyFS(other.dir, os.DirFS(p.dir)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server.key"} { // CopyFS makes it readable by others
		if err := os.Chmod(filepath.Join(other.dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	red, blue := named(t, "red"), named(t, "blue")

	code, _, stderr := lbcluster(t, env, "run", "-dir", p.dir)
	if code != 2 || !strings.Contains(stderr, "no configuration") ||
		!strings.Contains(stderr, "config.last-good.json") {
		t.Error("with nothing to run by:", code, stderr)
	}

	putConfig(t, env, config(red, ""), "-dir", p.dir)
	east, eastAddr := startProxy(t, env, p, "-id", "east", "-lame", "10ms")
	west, westAddr := startProxy(t, env, other, "-id", "west", "-lame", "10ms")
	lsHas(t, env, "2 proxies, configuration 1", "east", "west", "web "+eastAddr, "web "+westAddr)
	for _, addr := range []string{eastAddr, westAddr} {
		storetest.Await(t, "alice is served", comesTo(p, addr, "red"))
	}

	// A limit holds over both.
	putConfig(t, env, config(blue, `, "limit": {"burst": 5, "every": "1h"}`), "-dir", p.dir)
	lsHas(t, env, "configuration 2")
	storetest.Await(t, "both run by it", func() error {
		_, stdout, _ := lbcluster(t, env, "ls")
		return storetest.Want(strings.Count(stdout, "  2 ") == 2, stdout)
	})
	in := 0
	for range 10 {
		for _, addr := range []string{eastAddr, westAddr} {
			if name, err := visit(p, addr); err == nil {
				in++
				if name != "blue" {
					t.Error("alice comes to", name)
				}
			}
		}
	}
	storetest.Await(t, "what was borrowed is given back", func() error {
		if _, err := visit(p, eastAddr); err == nil {
			in++
		}
		return storetest.Want(in >= 5, fmt.Sprint(in))
	})
	if in != 5 {
		t.Errorf("alice was let in %d times, of 5", in)
	}

	// A configuration that does not load changes nothing, and ls says why.
	putConfig(t, env, config(blue, `, "limt": {}`), "-unchecked")
	lsHas(t, env, "configuration 3", `2 (version 3: configuration 3:4: users[0].limt`)
	putConfig(t, env, config(red, ""), "-dir", p.dir)
	for _, addr := range []string{eastAddr, westAddr} {
		storetest.Await(t, "alice is served by the next one", comesTo(p, addr, "red"))
	}
	lsHas(t, env, "configuration 4")

	// The store dies. No client notices, and a proxy that starts now runs by the last good
	// configuration.
	held, _, err := enter(p, eastAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	storetest.Await(t, "it is the last good one", func() error {
		text, err := os.ReadFile(filepath.Join(other.dir, "config.last-good.json"))
		return errors.Join(err, storetest.Want(strings.Contains(string(text), red), string(text)))
	})
	server.Kill()
	for _, addr := range []string{eastAddr, westAddr} {
		storetest.Await(t, "alice is served without the store", comesTo(p, addr, "red"))
	}
	third, thirdAddr := startProxy(t, env, other, "-id", "third", "-lame", "10ms")
	if !strings.Contains(third.log.String(), "last good") {
		t.Error("it does not say by what it runs:", third.log.String())
	}
	storetest.Await(t, "alice is served by it", comesTo(p, thirdAddr, "red"))
	server.Start() // empty
	lsHas(t, env, "3 proxies, configuration 0", "east", "west", "third")
	for _, addr := range []string{eastAddr, westAddr, thirdAddr} {
		storetest.Await(t, "an empty store changes nothing", comesTo(p, addr, "red"))
	}

	// A drain waits for connections; its exit code shows that it had to cut one.
	east.signals <- syscall.SIGTERM
	if code := east.end(t); code != 1 {
		t.Error("with a connection open at the drainTimeout: exit", code, &east.log)
	}
	for _, p := range []*process{west, third} {
		p.signals <- syscall.SIGTERM
		if code := p.end(t); code != 0 {
			t.Error("a drain without connections: exit", code, &p.log)
		}
	}
	lsHas(t, env, "0 proxies")
}

func TestAdapt(t *testing.T) {
	for n, want := range map[int]int{1: 100, 3: 33, 1000: 1} {
		c := &mtlsserver.Config{Apps: []mtlsserver.App{{Listen: "[::]:9443",
			Upstreams: []mtlsserver.Upstream{{MaxConns: 100}, {}}}}}
		adapt(c, "10.0.0.5", n)
		app := c.Apps[0]
		if app.Listen != "10.0.0.5:9443" || app.Upstreams[0].MaxConns != want ||
			app.Upstreams[1].MaxConns != 0 {
			t.Errorf("one of %d proxies: %+v", n, app)
		}
	}
}
