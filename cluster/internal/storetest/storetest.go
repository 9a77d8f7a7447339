// Package storetest gives tests a store: one in memory, and the real one where it is installed.
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

// Need skips a test for want of a program, or fails it where LBPROXY_INTEROP=all says that all are
// there.
func Need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil { // not in everybody's PATH
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

// A Server is a redis-server of the test's own, which keeps nothing on disk.
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

// Sentinel starts a Sentinel by a configuration, to which port and folder are added.
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

// URL is what cluster.Dial wants.
func (s *Server) URL() string { return "redis://" + s.Addr }

// Start starts it again, empty, on the same address, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	var out strings.Builder // it has nothing to say, unless something is wrong
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

// Kill is kill -9. It may be called for a server that is dead.
func (s *Server) Kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// Freeze is SIGSTOP: connections stay, and nothing is answered.
func (s *Server) Freeze() { stop(s.cmd.Process) }

// Thaw is SIGCONT.
func (s *Server) Thaw() { resume(s.cmd.Process) }

// Patience is more than anything takes that a test waits for.
const Patience = 20 * time.Second

// Await asks every 5 ms until there is no error, and fails the test when Patience is over.
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

// A Wire is a proxy between one side and the store, which can be cut.
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

// URL is what cluster.Dial wants.
func (w *Wire) URL() string { return "redis://" + w.Addr }

// Cut makes w a black hole: connections stay, new ones are accepted, and no byte gets through until
// Heal.
func (w *Wire) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.healed = make(chan struct{})
}

// Heal lets bytes through again, also those that were held.
func (w *Wire) Heal() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.healed)
}

// Reset ends the connections there are.
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

// Child runs the test's own program again, which finds what in CHILD, reads from in and writes to
// out. It is killed with the test.
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

// Errorf is for checks that Await asks.
func Errorf(format string, args ...any) error { return fmt.Errorf(format, args...) }

// Want returns an error, for Await, unless ok.
func Want(ok bool, what string) error {
	if ok {
		return nil
	}
	return errors.New(what)
}
