// Package storetest gives tests a store in memory, and a real one where redis-server is installed.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Each runs f twice: on miniredis and on redis-server.
func Each(t *testing.T, f func(t *testing.T, url string)) {
	t.Helper()
	t.Run("miniredis", func(t *testing.T) { f(t, "redis://"+miniredis.RunT(t).Addr()) })
	t.Run("redis-server", func(t *testing.T) { f(t, Redis(t).URL()) })
}

// Need returns the path of a program. Without the program it skips the test, or fails it if
// LBPROXY_INTEROP is "all".
func Need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil { // sbin is not in every PATH
		path, err = exec.LookPath("/usr/sbin/" + program)
	}
	if err != nil {
		if os.Getenv("LBPROXY_INTEROP") == "all" {
			t.Fatalf("%s is not installed, and LBPROXY_INTEROP=all wants it: apt-get install it",
				program)
		}
		t.Skipf("%s is not installed", program)
	}
	return path
}

// A Server is a test's own redis-server, without files.
type Server struct {
	Addr string
	t    testing.TB
	args []string
	cmd  *exec.Cmd
}

// Redis starts a redis-server, with more arguments if there are any. It ends with the test.
func Redis(t testing.TB, args ...string) *Server {
	t.Helper()
	Need(t, "redis-server")
	s := &Server{Addr: proxytest.FreeAddr(t), t: t}
	s.args = append([]string{"--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir",
		t.TempDir(),
		"--port", s.Addr[strings.LastIndexByte(s.Addr, ':')+1:], "--loglevel", "warning"}, args...)
	t.Cleanup(s.Kill)
	s.Start()
	return s
}

// Sentinel starts a Sentinel with a configuration, to which it adds port and folder.
func Sentinel(t testing.TB, conf string) *Server {
	t.Helper()
	Need(t, "redis-server")
	s := &Server{Addr: proxytest.FreeAddr(t), t: t}
	conf += fmt.Sprintf("bind 127.0.0.1\nport %s\ndir %s\n",
		s.Addr[strings.LastIndexByte(s.Addr, ':')+1:], t.TempDir())
	s.args = []string{WriteFile(t, "sentinel.conf", conf), "--sentinel"}
	t.Cleanup(s.Kill)
	s.Start()
	return s
}

// URL returns the server's URL for cluster.Dial.
func (s *Server) URL() string { return "redis://" + s.Addr }

// Start starts it again, empty, on the same address, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	var out strings.Builder // empty, unless the start fails
	s.cmd = exec.Command("redis-server", s.args...)
	s.cmd.Stdout, s.cmd.Stderr = &out, &out
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	Await(s.t, "redis-server answers", func() error {
		c, err := net.Dial("tcp", s.Addr)
		if err == nil {
			c.Close()
		}
		return err
	})
	s.t.Cleanup(func() {
		if s.Kill(); s.t.Failed() {
			s.t.Log("redis-server: ", &out)
		}
	})
}

// Kill ends the server as kill -9 does. The server may be dead already.
func (s *Server) Kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// Freeze sends SIGSTOP: connections stay open, without any answer.
func (s *Server) Freeze() { stop(s.cmd.Process) }

// Thaw sends SIGCONT.
func (s *Server) Thaw() { resume(s.cmd.Process) }

// Patience is longer than any event that a test waits for should take.
const Patience = 20 * time.Second

// Await calls check every 5 ms until it returns nil, and fails the test after Patience.
func Await(t testing.TB, what string, check func() error) {
	t.Helper()
	end := time.Now().Add(Patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal("the test is over")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// A Wire is a proxy for the store that can be cut.
type Wire struct {
	Addr string
	to   string

	mu      sync.Mutex
	healed  chan struct{} // closed while bytes get through
	conns   []net.Conn
	running sync.WaitGroup
}

// NewWire returns a wire to addr. It ends with the test.
func NewWire(t testing.TB, addr string) *Wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &Wire{Addr: l.Addr().String(), to: addr, healed: make(chan struct{})}
	close(w.healed)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		l.Close()
		w.Reset()
		w.running.Wait()
	})
	w.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.running.Go(func() { w.join(ctx, c) })
		}
	})
	return w
}

// URL returns the wire's URL for cluster.Dial.
func (w *Wire) URL() string { return "redis://" + w.Addr }

// Cut makes w a black hole: it keeps connections and accepts new ones, but passes no byte until
// Heal.
func (w *Wire) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.healed = make(chan struct{})
}

// Heal passes bytes again, including the held ones.
func (w *Wire) Heal() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.healed)
}

// Reset ends all connections.
func (w *Wire) Reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

func (w *Wire) join(ctx context.Context, c net.Conn) {
	defer c.Close()
	up, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer up.Close()
	w.mu.Lock()
	w.conns = append(w.conns, c, up)
	w.mu.Unlock()
	if ctx.Err() != nil { // after Reset
		return
	}
	var both sync.WaitGroup
	both.Go(func() { w.pump(ctx, up, c) })
	both.Go(func() { w.pump(ctx, c, up) })
	both.Wait()
}

func (w *Wire) pump(ctx context.Context, to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		w.mu.Lock()
		healed := w.healed
		w.mu.Unlock()
		select {
		case <-healed:
		case <-ctx.Done():
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// Child runs the test binary as another process with what in CHILD, and returns its standard input
// and output. It is killed with the test.
func Child(t testing.TB, what string) (cmd *exec.Cmd, in io.Writer, out io.Reader) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CHILD="+what)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err == nil {
		out, err = cmd.StdoutPipe()
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, in, out
}

// WriteFile writes a file of the test's own and returns its path.
func WriteFile(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Errorf is fmt.Errorf, for the checks of Await.
func Errorf(format string, args ...any) error { return fmt.Errorf(format, args...) }

// Want returns an error, for Await, unless ok.
func Want(ok bool, what string) error {
	if ok {
		return nil
	}
	return errors.New(what)
}
