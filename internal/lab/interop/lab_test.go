//go:build linux

package interop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// bin is where the commands are that the tests run.
var bin string

func TestMain(m *testing.M) {
	code := 1
	var err error
	if bin, err = os.MkdirTemp("", "lbproxy-interop"); err == nil {
		const module = "github.com/danielepagano/lbproxy/"
		build := exec.Command("go", "build", "-o", bin+"/",
			module+"examples/basic", module+"mtlsserver/cmd/mtlsserver")
		build.Stderr = os.Stderr
		if err = build.Run(); err == nil {
			code = m.Run()
		}
		os.RemoveAll(bin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// need returns the path of a program. Without it the test is skipped, or fails if everything has to
// be there.
func need(t *testing.T, name, debian string) string {
	t.Helper()
	for _, pattern := range []string{"/usr/sbin/" + name, "/usr/lib/postgresql/*/bin/" + name} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[len(found)-1]
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name, debian)
	}
	return path
}

// needFile is need for what is no program.
func needFile(t *testing.T, path, debian string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		missing(t, path, debian)
	}
}

func missing(t *testing.T, what, debian string) {
	t.Helper()
	if os.Getenv("LBPROXY_INTEROP") == "all" {
		t.Fatalf("%s is not installed: apt-get install %s", what, debian)
	}
	t.Skipf("%s is not installed: apt-get install %s", what, debian)
}

// folder returns a new folder that other users may enter.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lbproxy-interop")
	proxytest.Must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	proxytest.Must(t, os.Chmod(dir, 0o755))
	return dir
}

// write writes dir/name, and returns its path.
func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	proxytest.Must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// patternFile writes n bytes of a pattern, and returns them and the file's path.
func patternFile(t *testing.T, dir string, n int64) (path string, content []byte) {
	t.Helper()
	var b bytes.Buffer
	proxytest.Pattern(n).Send(&b, n)
	path = write(t, dir, fmt.Sprint("pattern-", n), b.String())
	proxytest.Must(t, os.Chmod(path, 0o644))
	return path, b.Bytes()
}

// freePort returns a port of loopback that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	_, port, _ := net.SplitHostPort(proxytest.FreeAddr(t))
	return port
}

// timeout bounds each command that ends by itself.
const timeout = 2 * time.Minute

// command returns a command that is killed after timeout, or with its test.
func command(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second
	return cmd
}

// output runs cmd and returns what it wrote. The test fails if cmd fails.
func output(t *testing.T, cmd *exec.Cmd) (stdout, stderr string) {
	t.Helper()
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, tail(o.String()), tail(e.String()))
	}
	return o.String(), e.String()
}

// quiet runs cmd and returns its standard output. The test fails if cmd fails or complains.
func quiet(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	stdout, stderr := output(t, cmd)
	if stderr != "" {
		t.Errorf("%s complains: %s", strings.Join(cmd.Args, " "), tail(stderr))
	}
	return stdout
}

func tail(s string) string { return s[max(0, len(s)-2000):] }

// A daemon is a program that runs until its test ends.
type daemon struct {
	*exec.Cmd
	log    *os.File // its standard output and standard error
	ended  chan struct{}
	err    error
	signal os.Signal // ends it
}

// start starts cmd, and waits until every addr accepts connections.
func start(t *testing.T, cmd *exec.Cmd, addrs ...string) *daemon {
	t.Helper()
	log, err := os.CreateTemp(folder(t), "log")
	proxytest.Must(t, err)
	d := &daemon{Cmd: cmd, log: log, ended: make(chan struct{}), signal: syscall.SIGTERM}
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.Cancel != nil {
		// A test's context ends before its cleanup. Killed, nginx would leave its workers behind.
		cmd.Cancel = func() error { return cmd.Process.Signal(d.signal) }
		cmd.WaitDelay = proxytest.Patience
	}
	proxytest.Must(t, cmd.Start())
	go func() {
		defer close(d.ended)
		d.err = cmd.Wait()
	}()
	t.Cleanup(func() { d.stop(t) })
	for _, addr := range addrs {
		proxytest.Eventually(t, cmd.Path+" listens on "+addr, func() bool {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
				return true
			}
			select {
			case <-d.ended:
				t.Fatalf("%s ended: %v\n%s", cmd.Path, d.err, d.text())
			case <-time.After(10 * time.Millisecond):
			}
			return false
		})
	}
	return d
}

// stop ends d, once, and returns its log.
func (d *daemon) stop(t *testing.T) string {
	t.Helper()
	d.Process.Signal(d.signal)
	select {
	case <-d.ended:
	case <-time.After(proxytest.Patience):
		t.Errorf("%s does not end", d.Path)
		d.Process.Kill()
		<-d.ended
	}
	defer d.log.Close()
	return d.text()
}

func (d *daemon) text() string {
	text, _ := os.ReadFile(d.log.Name())
	return string(text)
}

// wantNone fails the test if a line of a log matches any of the expressions, ignoring case.
func wantNone(t *testing.T, whose, log string, expressions ...string) {
	t.Helper()
	bad := regexp.MustCompile("(?i)" + strings.Join(expressions, "|"))
	for line := range strings.Lines(log) {
		if bad.MatchString(line) {
			t.Errorf("%s complains: %s", whose, strings.TrimSpace(line))
		}
	}
}

// A proxy is a process of examples/basic or mtlsserver.
type proxy struct {
	*daemon
	addr string
}

// An end is what the proxy's log says about the end of one connection.
type end struct{ reason, detail string }

// startBasic starts examples/basic in front of upstreams.
func startBasic(t *testing.T, upstreams ...string) *proxy {
	t.Helper()
	return startBasicWith(t, []string{"-v"}, upstreams...)
}

func startBasicWith(t *testing.T, flags []string, upstreams ...string) *proxy {
	t.Helper()
	args := append([]string{"-listen", "127.0.0.1:0"}, flags...)
	for _, u := range upstreams {
		args = append(args, "-upstream", u)
	}
	p := &proxy{daemon: start(t, exec.Command(filepath.Join(bin, "basic"), args...))}
	p.addr = p.await(t, `listening on (\S+),`)
	return p
}

// await waits until d's log matches an expression, and returns what its group matches.
func (d *daemon) await(t *testing.T, expression string) (found string) {
	t.Helper()
	pattern := regexp.MustCompile(expression)
	proxytest.Eventually(t, d.Path+" says "+expression, func() bool {
		m := pattern.FindStringSubmatch(d.text())
		if m != nil {
			found = m[1]
		}
		return m != nil
	})
	return found
}

func (p *proxy) port() string {
	_, port, _ := net.SplitHostPort(p.addr)
	return port
}

// ends stops p, which must drain without cutting anything, and returns how its connections ended.
func (p *proxy) ends(t *testing.T) (ends []end) {
	t.Helper()
	log := p.stop(t)
	if p.err != nil {
		t.Errorf("%s: %v\n%s", p.Path, p.err, tail(log))
	}
	return parseEnds(t, log)
}

var basicEnd = regexp.MustCompile(` end=(\S+) .*?(?: err=(.*))?$`)

func parseEnds(t *testing.T, log string) (ends []end) {
	t.Helper()
	for line := range strings.Lines(log) {
		if !strings.HasSuffix(line, "\n") {
			break // the rest of it is still being written
		}
		line = strings.TrimSpace(line)
		var e end
		if strings.HasPrefix(line, "{") {
			var fields map[string]any
			if err := json.Unmarshal([]byte(line), &fields); err != nil {
				t.Errorf("the log has a line that is not JSON: %s", line)
			}
			if e.reason, _ = fields["reason"].(string); e.reason == "" {
				continue
			}
			e.detail = line
		} else if m := basicEnd.FindStringSubmatch(line); m != nil {
			e = end{m[1], line}
		} else {
			continue
		}
		ends = append(ends, e)
	}
	return ends
}

// wantEnds stops p. All of its connections, at least so many, must have ended for one of reasons.
func (p *proxy) wantEnds(t *testing.T, least int, reasons ...string) {
	t.Helper()
	ends := p.ends(t)
	if len(ends) < least {
		t.Errorf("%d connections ended, want at least %d", len(ends), least)
	}
	for _, e := range ends {
		if !slices.Contains(reasons, e.reason) {
			t.Errorf("a connection ended as %q, want %q: %s", e.reason, reasons, e.detail)
		}
	}
}

// as makes cmd run in dir, and as a user who is made its owner if the tests run as root, which some
// software refuses.
func as(t *testing.T, name, dir string, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	cmd.Dir = dir
	if os.Getuid() != 0 {
		return cmd
	}
	u, err := user.Lookup(name)
	proxytest.Must(t, err)
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	proxytest.Must(t, os.Chown(dir, uid, gid))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
	}
	return cmd
}

// An origin is an upstream that speaks HTTP. It answers GET /N with N bytes of a pattern, and POST
// with the number of bytes that came, if they were those of a pattern. It knows how each of its
// connections ended. A request with the header X-Wait is answered when its stream has ended.
type origin struct {
	addr    string
	waiting chan struct{} // receives a value for each request with X-Wait
	mu      sync.Mutex
	ends    []string // "end" or "reset"
}

func newOrigin(t *testing.T) *origin {
	t.Helper()
	o := &origin{waiting: make(chan struct{}, 1)}
	o.addr = proxytest.Upstream(t, func(c *net.TCPConn) {
		err := o.serve(c)
		o.mu.Lock()
		defer o.mu.Unlock()
		switch {
		case err == nil:
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			o.ends = append(o.ends, "end")
		default:
			o.ends = append(o.ends, "reset")
		}
	})
	return o
}

// serve returns how the stream of requests ended.
func (o *origin) serve(c *net.TCPConn) error {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		method, rest, _ := strings.Cut(line, " ")
		path, _, _ := strings.Cut(rest, " ")
		length, keep, wait := int64(0), !strings.Contains(line, "HTTP/1.0"), false
		for {
			if line, err = r.ReadString('\n'); err != nil {
				return err
			}
			name, value, ok := strings.Cut(strings.TrimSpace(line), ":")
			value = strings.ToLower(strings.TrimSpace(value))
			if !ok {
				break
			}
			switch strings.ToLower(name) {
			case "content-length":
				length, _ = strconv.ParseInt(value, 10, 64)
			case "connection":
				keep = value != "close"
			case "x-wait":
				wait = true
			}
		}
		if wait {
			o.waiting <- struct{}{}
			if _, err := r.ReadByte(); err != io.EOF {
				return err
			}
		}
		var body []byte
		if method == "GET" {
			n, _ := strconv.ParseInt(strings.TrimPrefix(path, "/"), 10, 64)
			var b bytes.Buffer
			proxytest.Pattern(n).Send(&b, n)
			body = b.Bytes()
		} else {
			got, err := proxytest.Pattern(length).Receive(io.LimitReader(r, length))
			if err != nil {
				return err
			}
			if got < length {
				return io.ErrUnexpectedEOF
			}
			body = fmt.Append(nil, got)
		}
		if _, err = fmt.Fprintf(c, "%s%s", answerHead(int64(len(body))), body); err != nil {
			return err
		}
		if !keep {
			c.CloseWrite()
			_, err := r.ReadByte()
			return err
		}
	}
}

func answerHead(size int64) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
}

// take returns how connections ended since the last call.
func (o *origin) take() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	ends := o.ends
	o.ends = nil
	return ends
}

// waitFor waits until addr accepts connections.
func waitFor(t *testing.T, addr string) {
	t.Helper()
	proxytest.Eventually(t, addr+" accepts connections", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	proxytest.Must(t, err)
	return b
}
