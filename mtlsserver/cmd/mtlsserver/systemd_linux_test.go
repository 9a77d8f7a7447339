package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/systemd"
)

// A manager acts as systemd does: it holds listening sockets, starts services with them, and
// receives their states.
type manager struct {
	notify  *net.UnixConn
	names   []string
	sockets []*os.File
}

var managers atomic.Int64

func newManager(t *testing.T) *manager {
	t.Helper()
	addr := &net.UnixAddr{Name: fmt.Sprintf("@mtlsserver-test-%d-%d", os.Getpid(),
		managers.Add(1)), Net: "unixgram"}
	c, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &manager{notify: c}
}

// listen adds a socket and returns its address.
func (m *manager) listen(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // the manager has another descriptor of the socket
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err == nil {
		syscall.CloseOnExec(fd)
		err = syscall.SetNonblock(fd, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	// The unit's NonBlocking=yes does the same. Starting a process does not make a File blocking
	// that was non-blocking when it was made: the previous process still accepts from the same
	// socket.
	held := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { held.Close() })
	m.add(held, name)
	return l.Addr().String()
}

func (m *manager) add(f *os.File, name string) {
	m.sockets, m.names = append(m.sockets, f), append(m.names, name)
}

// A service is a server that a manager has started.
type service struct {
	*exec.Cmd
	errs *bytes.Buffer // read it when the process is over
	over chan error
}

func (m *manager) start(t *testing.T, config string) *service {
	t.Helper()
	s := &service{
		Cmd: exec.CommandContext(t.Context(), "sh", "-c",
			`LISTEN_PID=$$ exec "$0" run -config "$1"`, os.Args[0], config),
		errs: &bytes.Buffer{}, over: make(chan error, 1),
	}
	s.Env = append(os.Environ(), "MTLSSERVER_MAIN=1",
		"NOTIFY_SOCKET="+m.notify.LocalAddr().String(),
		fmt.Sprintf("LISTEN_FDS=%d", len(m.sockets)), "LISTEN_FDNAMES="+strings.Join(m.names, ":"))
	s.ExtraFiles, s.Stderr = m.sockets, s.errs
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.over <- s.Wait() }()
	return s
}

func (s *service) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.over:
		return err
	case <-time.After(40 * time.Second):
		s.Process.Kill()
		<-s.over
		t.Fatalf("it does not end\n%s", s.errs)
		return nil
	}
}

func (s *service) stop(t *testing.T) {
	t.Helper()
	s.Process.Signal(syscall.SIGTERM)
	if err := s.end(t); err != nil {
		t.Errorf("it ended with %v\n%s", err, s.errs)
	}
}

// await returns the next states that a service reports, which must begin with these.
func (m *manager) await(t *testing.T, want string) string {
	t.Helper()
	m.notify.SetReadDeadline(time.Now().Add(20 * time.Second))
	text := make([]byte, 4096)
	n, err := m.notify.Read(text)
	if err != nil || !strings.HasPrefix(string(text[:n]), want) {
		t.Fatalf("the manager hears %q, %v, want %q", text[:n], err, want)
	}
	return string(text[:n])
}

func TestServiceTellsItsStates(t *testing.T) {
	_, config := setUp(t)
	m := newManager(t)
	s := m.start(t, config)
	m.await(t, "READY=1\nSTATUS=serving")
	usec := func(states string) int {
		_, text, _ := strings.Cut(states, "MONOTONIC_USEC=")
		text, _, _ = strings.Cut(text, "\n")
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("%q: %v", states, err)
		}
		return n
	}
	for _, row := range []struct{ old, new, status string }{
		{"", "", "READY=1\nSTATUS=serving"},
		{`"web"`, `"web`, "READY=1\nSTATUS=serving; the last reload failed: " + config},
		{`"web`, `"web"`, "READY=1\nSTATUS=serving"},
	} {
		if row.old != "" {
			replace(t, config, row.old, row.new)
		}
		// systemd takes a reload for its own if it began after the signal.
		sent := usec(systemd.Reloading())
		s.Process.Signal(syscall.SIGHUP)
		if states := m.await(t, "RELOADING=1\nMONOTONIC_USEC="); usec(states) < sent {
			t.Errorf("%q, want a time from %d on", states, sent)
		}
		states, fails := m.await(t, row.status), strings.Contains(row.status, "failed")
		if strings.Contains(states, "failed") != fails || strings.Count(states, "\n") != 1 {
			t.Errorf("after the reload: %q", states)
		}
	}
	s.Process.Signal(syscall.SIGTERM)
	m.await(t, "STOPPING=1\nSTATUS=draining")
	if err := s.end(t); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// An app gets the socket with its id as name, or else the socket at its address. An app without a
// socket binds its own.
func TestSocketsFindTheirApps(t *testing.T) {
	dir, config := setUp(t)
	m := newManager(t)
	byName, byAddr := m.listen(t, "web"), m.listen(t, "mtlsserver.socket")
	web := contents(t, dir)["config.json"]
	_, app, _ := strings.Cut(web, "[\n    {")
	app, _, _ = strings.Cut(app, "\n  ],")
	more := func(id, listen string) string {
		return ",\n    {" +
			strings.NewReplacer(`"web"`, `"`+id+`"`, "127.0.0.1:0", listen).Replace(app)
	}
	write(t, dir, "config.json",
		[]byte(strings.Replace(web, app, app+more("db", byAddr)+more("own", "127.0.0.1:0"), 1)))
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web,db,own")
	s := m.start(t, config)
	m.await(t, "READY=1")
	for _, addr := range []string{byName, byAddr} {
		c, _, err := dial(dir, "alice", addr)
		if err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		c.Close()
	}
	// A reload may take an app away, and may bring it back.
	with := contents(t, dir)["config.json"]
	for _, text := range []string{
		strings.NewReplacer(more("db", byAddr), "", `"db",`, "").Replace(with), with} {
		write(t, dir, "config.json", []byte(text))
		s.Process.Signal(syscall.SIGHUP)
		m.await(t, "RELOADING=1")
		m.await(t, "READY=1\nSTATUS=serving")
	}
	c, _, err := dial(dir, "alice", byAddr)
	if err != nil {
		t.Fatalf("the app that came back: %v", err)
	}
	c.Close()
	s.stop(t)
	if !strings.Contains(s.errs.String(),
		`"msg":"a socket is not used","err":"no app for descriptor 4`) {
		t.Errorf("the log does not tell of the socket that was of no app\n%s", s.errs)
	}
}

func TestSocketsOfNoApp(t *testing.T) {
	for _, row := range []struct {
		names  string
		listen string // of web; empty: the address of the first socket
		want   string
	}{
		{"wob", "127.0.0.1:0", `no app for descriptor 3 ("wob", 127.0.0.1:`},
		{"wob", "127.0.0.1:0", `set FileDescriptorName= of its socket unit to one of ["web"]`},
		{"web:web", "127.0.0.1:0", `no app for descriptor 4 ("web", `},
		{"web:db", "", `no app for descriptor 4 ("db", `},
	} {
		_, config := setUp(t)
		m := newManager(t)
		for name := range strings.SplitSeq(row.names, ":") {
			addr := m.listen(t, name)
			if row.listen == "" {
				row.listen = addr
			}
		}
		replace(t, config, "127.0.0.1:0", row.listen)
		s := m.start(t, config)
		exit, ok := errors.AsType[*exec.ExitError](s.end(t))
		if !ok || exit.ExitCode() != 2 || !strings.Contains(s.errs.String(), row.want) {
			t.Errorf("%s: %v, want status 2\n%s\nwant %s", row.names, exit, s.errs, row.want)
		}
	}

	// Descriptors that are not listening sockets.
	_, config := setUp(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	m := newManager(t)
	m.add(null, "web")
	s := m.start(t, config)
	if err := s.end(t); err == nil ||
		!strings.Contains(s.errs.String(), `descriptor 3 ("web"): getsockopt: `) {
		t.Errorf("not a socket: %v\n%s", err, s.errs)
	}
}

func TestListensAt(t *testing.T) {
	for _, row := range []struct {
		at, addr string
		want     bool
	}{
		{"127.0.0.1:9443", "127.0.0.1:9443", true},
		{"127.0.0.1:9443", "127.0.0.1:9444", false},
		{"127.0.0.1:9443", "127.0.0.2:9443", false},
		{"127.0.0.1:9443", "[::ffff:127.0.0.1]:9443", true},
		{"127.0.0.1:9443", ":9443", false},
		{"127.0.0.1:443", "127.0.0.1:https", true},
		{"[::]:9443", ":9443", true},
		{"[::]:9443", "[::]:9443", true},
		{"[::]:9443", "0.0.0.0:9443", true},
		{"0.0.0.0:9443", ":9443", true},
		{"[::]:9443", "127.0.0.1:9443", false},
		{"[::]:9443", "127.0.0.1:0", false},
		{"[::1]:9443", "nonsense", false},
	} {
		at, err := net.ResolveTCPAddr("tcp", row.at)
		if err != nil {
			t.Fatal(err)
		}
		if got := listensAt(at, row.addr); got != row.want {
			t.Errorf("%s for %q: %v", row.at, row.addr, got)
		}
	}
}

// Clients connect without a pause while the server is replaced ten times. None is refused or reset.
// In every second upgrade the old process ends before the new one starts, as when systemd restarts
// a service, and clients wait in the listen queue.
func TestTenUpgradesCutNobody(t *testing.T) {
	dir, config := setUp(t)
	replace(t, config, firstAdmin, "") // its socket is one server's at a time
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	m := newManager(t)
	addr := m.listen(t, "web")
	old := m.start(t, config)
	m.await(t, "READY=1")

	var clients sync.WaitGroup
	var stop atomic.Bool
	var served atomic.Int64
	for range 4 {
		clients.Go(func() {
			for !stop.Load() {
				c, _, err := dial(dir, "alice", addr)
				if err == nil {
					_, err = c.Write([]byte("ping"))
				}
				answer := make([]byte, 4)
				if err == nil {
					_, err = c.Read(answer)
				}
				if err == nil {
					err = c.Close()
				}
				if err != nil || string(answer) != "ping" {
					t.Errorf("after %d connections: %q, %v", served.Load(), answer, err)
					return
				}
				served.Add(1)
			}
		})
	}
	more := func() {
		t.Helper()
		for n, late := served.Load()+20, time.Now().Add(20*time.Second); served.Load() < n &&
			!t.Failed(); {
			if time.Now().After(late) {
				t.Fatalf("no connections are served: %d in all", served.Load())
			}
			time.Sleep(time.Millisecond)
		}
	}
	for i := range 10 {
		more()
		next := old
		if i%2 == 0 {
			next = m.start(t, config)
			m.await(t, "READY=1")
			more() // by both
		}
		old.Process.Signal(syscall.SIGTERM)
		m.await(t, "STOPPING=1")
		if err := old.end(t); err != nil {
			t.Errorf("upgrade %d: the old process ended with %v\n%s", i, err, old.errs)
		}
		if i%2 == 1 {
			next = m.start(t, config)
			m.await(t, "READY=1")
		}
		old = next
	}
	more()
	stop.Store(true)
	clients.Wait()
	old.stop(t)
	t.Logf("%d connections", served.Load())
}

// The test uses the units that an administrator copies, with another path of the program.
func TestUnitsAreValid(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	said, err := exec.Command(analyze, "--version").Output()
	var version int
	if _, scanErr := fmt.Sscanf(string(said), "systemd %d", &version); err != nil ||
		scanErr != nil {
		t.Fatalf("%s --version: %q, %v", analyze, said, err)
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	oldnew := []string{"/usr/local/bin/mtlsserver", exe}
	if version < 253 { // as the unit says
		oldnew = append(oldnew, "Type=notify-reload",
			"Type=notify\nExecReload=/bin/kill -HUP $MAINPID")
	}
	args := []string{"verify"}
	for _, name := range []string{"mtlsserver.service", "mtlsserver.socket"} {
		text, err := os.ReadFile(filepath.Join("../../../docs/systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, dir, name, []byte(strings.NewReplacer(oldnew...).Replace(string(text))))
		args = append(args, filepath.Join(dir, name))
	}
	if said, err := exec.Command(analyze, args...).CombinedOutput(); err != nil || len(said) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, said)
	}
	if version >= 250 {
		said, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20",
			args[1]).CombinedOutput()
		if err != nil {
			t.Errorf("its exposure is more than 2.0 of 10: %v\n%s", err, said)
		}
	}
}
