package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// TestMain acts as a service when a test starts the program as a process: it prints the sockets
// passed to it, and accepts a connection from each socket, twice.
func TestMain(m *testing.M) {
	if os.Getenv("SYSTEMD_TEST_SERVICE") == "" {
		proxytest.Main(m)
	}
	sockets, err := Sockets()
	fmt.Println("error:", err)
	for _, s := range sockets {
		fmt.Println("socket:", s.Descriptor, s.Name, s.Addr)
	}
	for range 2 {
		for _, s := range sockets {
			l, err := s.Listen()
			if err != nil {
				panic(err)
			}
			c, err := l.Accept()
			if err != nil {
				panic(err)
			}
			fmt.Fprintf(c, "%s\n", s.Name)
			c.Close()
			l.Close()
		}
	}
	again, err := Sockets()
	fmt.Println("again:", len(again), err, os.Getenv("LISTEN_FDS"))
	os.Exit(0)
}

// service runs this program as a service that is handed files.
func service(t *testing.T, fds, names string, files ...*os.File) (stdout func() string) {
	t.Helper()
	exe, err := os.Executable()
	proxytest.Must(t, err)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0"`, exe)
	cmd.Env = append(os.Environ(), "SYSTEMD_TEST_SERVICE=1", "LISTEN_FDS="+fds,
		"LISTEN_FDNAMES="+names)
	cmd.ExtraFiles = files
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	proxytest.Must(t, cmd.Start())
	return func() string {
		if err := cmd.Wait(); err != nil {
			t.Errorf("the service: %v\n%s", err, &out)
		}
		return out.String()
	}
}

func fileOf(t *testing.T, l interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := l.File()
	proxytest.Must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestSocketsOfARealProcess(t *testing.T) {
	a, b := proxytest.Listen(t), proxytest.Listen(t)
	out := service(t, "2", "web:db", fileOf(t, a), fileOf(t, b))
	for range 2 { // a listener is closed, the socket is not
		for i, l := range []*net.TCPListener{a, b} {
			want := []string{"web\n", "db\n"}[i]
			c := proxytest.Dial(t, l.Addr().String())
			got := make([]byte, 10)
			n, err := c.Read(got)
			if err != nil || string(got[:n]) != want {
				t.Errorf("%v: %q, %v, want %q", l.Addr(), got[:n], err, want)
			}
		}
	}
	want := fmt.Sprintf("error: <nil>\nsocket: 3 web %v\nsocket: 4 db %v\nagain: 0 <nil> \n",
		a.Addr(), b.Addr())
	if got := out(); got != want {
		t.Errorf("the service says\n%s\nwant\n%s", got, want)
	}
}

func TestBadSockets(t *testing.T) {
	l := proxytest.Listen(t)
	_, accepted := proxytest.Duplex(t)
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	proxytest.Must(t, err)
	defer unix.Close()
	packets, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	proxytest.Must(t, err)
	defer packets.Close()
	text, err := os.Open(os.DevNull)
	proxytest.Must(t, err)
	defer text.Close()
	for _, row := range []struct {
		fds, names string
		file       *os.File
		want       string
	}{
		{"0", "", nil, "error: <nil>\n"},
		{"x", "", nil, `LISTEN_FDS "x": want the number`},
		{"-1", "", nil, `LISTEN_FDS "-1": want the number`},
		{"1", "a:b", fileOf(t, l), `LISTEN_FDNAMES "a:b": want 1 names`},
		{"1", "web", nil, `descriptor 3 ("web"): getsockopt: `},
		{"1", "web", text,
			`descriptor 3 ("web"): getsockopt: socket operation on non-socket: want ListenStream=`},
		{"1", "web", fileOf(t, accepted),
			`descriptor 3 ("web"): not a listening socket: want ListenStream=`},
		{"1", "web", fileOf(t, packets),
			`descriptor 3 ("web"): not a listening socket: want ListenStream=`},
		{"1", "web", fileOf(t, unix.(*net.UnixListener)),
			`descriptor 3 ("web"): a unix socket: want ListenStream=`},
	} {
		var files []*os.File
		if row.file != nil {
			files = append(files, row.file)
		}
		got := service(t, row.fds, row.names, files...)()
		if !strings.Contains(got, row.want) || strings.Contains(got, "\nsocket: ") {
			t.Errorf("LISTEN_FDS=%s: the service says\n%s\nwant %s", row.fds, got, row.want)
		}
	}
}

// A parent may have left its own variables in the environment.
func TestSocketsOfAnotherProcess(t *testing.T) {
	t.Setenv("LISTEN_PID", fmt.Sprint(os.Getppid()))
	t.Setenv("LISTEN_FDS", "1")
	if sockets, err := Sockets(); len(sockets) > 0 || err != nil {
		t.Errorf("%v, %v, want none", sockets, err)
	}
}

func TestNotify(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	proxytest.Must(t, Notify(Ready))
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"),
		fmt.Sprintf("@lbproxy-test-%d", os.Getpid())} {
		manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		proxytest.Must(t, err)
		defer manager.Close()
		t.Setenv("NOTIFY_SOCKET", name)
		proxytest.Must(t, Notify(Ready, "STATUS=serving"))
		proxytest.Must(t, manager.SetReadDeadline(time.Now().Add(proxytest.Patience)))
		got := make([]byte, 100)
		n, err := manager.Read(got)
		if err != nil || string(got[:n]) != "READY=1\nSTATUS=serving" {
			t.Errorf("%s: %q, %v", name, got[:n], err)
		}
	}
	for _, name := range []string{"relative", "vsock:2:1234", filepath.Join(t.TempDir(), "none")} {
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify(Ready); err == nil || !strings.Contains(err.Error(), "NOTIFY_SOCKET") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNotifyDoesNotWaitForADeafManager(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	proxytest.Must(t, err)
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	for {
		if err := Notify(Ready); errors.Is(err, os.ErrDeadlineExceeded) {
			return // else it waits until the test's time is over
		} else if err != nil && !errors.Is(err, syscall.ENOBUFS) {
			t.Fatal(err)
		}
	}
}

// The time is CLOCK_MONOTONIC's, which starts with the machine and stands still while it sleeps.
func TestReloadingHasTheTime(t *testing.T) {
	var last int64
	for range 10 {
		var usec int64
		if n, err := fmt.Sscanf(Reloading(), "RELOADING=1\nMONOTONIC_USEC=%d", &usec); n != 1 ||
			err != nil {
			t.Fatalf("%q: %v", Reloading(), err)
		}
		text, err := os.ReadFile("/proc/uptime")
		proxytest.Must(t, err)
		var up float64
		_, err = fmt.Sscan(string(text), &up)
		proxytest.Must(t, err)
		if usec <= last || float64(usec) > (up+0.02)*1e6 {
			t.Errorf("it is %d µs after %d, and the machine is up for %v s", usec, last, up)
		}
		last = usec
		time.Sleep(time.Millisecond)
	}
}
