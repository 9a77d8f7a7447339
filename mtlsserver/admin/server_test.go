package admin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func start(t testing.TB, at admin.Listen, h http.Handler) *admin.Server {
	t.Helper()
	s, err := admin.Serve(at, h)
	proxytest.Must(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// folder returns a folder with a short name that nobody else may write.
func folder(t testing.TB) string {
	dir, err := os.MkdirTemp("", "admin")
	proxytest.Must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// curl sends a request to a Unix socket.
func curl(t testing.TB, socket, method, path string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	r, err := http.NewRequest(method, "http://any.name"+path, nil)
	proxytest.Must(t, err)
	answer, err := client.Do(r)
	proxytest.Must(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	proxytest.Must(t, err)
	return answer.StatusCode, string(body)
}

func TestSocketMayChangeThings(t *testing.T) {
	h, log := changeable(newApp(t, "web", nil, "127.0.0.1:1"))
	socket := filepath.Join(folder(t), "admin.sock")
	s := start(t, admin.Listen{Socket: socket}, h)
	if code, body := curl(t, socket, "POST", "/api/drain?app=web&upstream=127.0.0.1:1"); code != 200 {
		t.Errorf("drain: %d %s", code, body)
	}
	awaitLine(t, log, "change=drain", `by="unix socket`)
	if runtime.GOOS == "linux" {
		awaitLine(t, log, fmt.Sprintf("user %d, process %d", os.Getuid(), os.Getpid()))
	}
	if code, body := curl(t, socket, "GET", "/metrics"); code != 200 ||
		!strings.Contains(body, "lbproxy_build_info") {
		t.Errorf("metrics: %d %s", code, body)
	}
	info, err := os.Stat(socket)
	proxytest.Must(t, err)
	if mode := info.Mode().Perm(); mode != 0o600 && runtime.GOOS != "windows" {
		t.Errorf("the socket's mode is %#o, want 0600", mode)
	}
	if _, err := admin.Serve(admin.Listen{Socket: socket}, h); err == nil ||
		!strings.Contains(err.Error(), "another server answers there") {
		t.Errorf("a second server: %v", err)
	}
	s.Close()
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

func TestStaleSocketIsReplacedAndAForeignOneStays(t *testing.T) {
	h, _ := changeable()
	socket := filepath.Join(folder(t), "admin.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	proxytest.Must(t, err)
	l.SetUnlinkOnClose(false)
	l.Close() // as after a crash
	s := start(t, admin.Listen{Socket: socket}, h)
	if code, _ := curl(t, socket, "GET", "/healthz"); code != 200 {
		t.Errorf("after a crash: %d", code)
	}
	proxytest.Must(t, os.Remove(socket))
	proxytest.Must(t, os.WriteFile(socket, nil, 0o600))
	s.Close()
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("Close removed what is not its own: %v", err)
	}
}

// A server that is too busy to accept does not count as crashed.
func TestBusySocketIsNotReplaced(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("what a full queue answers is known of Linux alone")
	}
	socket := filepath.Join(folder(t), "admin.sock")
	l, err := net.Listen("unix", socket)
	proxytest.Must(t, err)
	defer l.Close()
	for err == nil { // nobody accepts
		var c net.Conn
		if c, err = net.DialTimeout("unix", socket, time.Second); err == nil {
			defer c.Close()
		}
	}
	if _, err := admin.Serve(admin.Listen{Socket: socket}, http.NotFoundHandler()); err == nil ||
		!strings.Contains(err.Error(), "another server answers there") {
		t.Errorf("beside a busy server: %v", err)
	}
}

func TestSocketThatCannotBeMade(t *testing.T) {
	socket := filepath.Join(folder(t), "admin.sock")
	proxytest.Must(t, os.MkdirAll(filepath.Join(socket+"~", "full"), 0o700)) // its temporary name
	_, err := admin.Serve(admin.Listen{Socket: socket}, http.NotFoundHandler())
	if err == nil || !strings.HasSuffix(err.Error(), "where this user may make a socket") {
		t.Errorf("it says %v", err)
	}
}

func TestListenSaysWhatIsWrong(t *testing.T) {
	dir := folder(t)
	open, shared := filepath.Join(dir, "open"), filepath.Join(dir, "shared")
	proxytest.Must(t, os.Mkdir(open, 0o700))
	proxytest.Must(t, os.Mkdir(shared, 0o700))
	proxytest.Must(t, os.Chmod(open, 0o777|os.ModeSticky))
	proxytest.Must(t, os.Chmod(shared, 0o770))
	file := filepath.Join(dir, "file")
	proxytest.Must(t, os.WriteFile(file, nil, 0o600))
	for _, row := range []struct {
		at   admin.Listen
		want string // the text's parts, separated by "…"; empty: nothing is wrong
	}{
		{admin.Listen{Addr: "127.0.0.1:0", Socket: filepath.Join(dir, "sock")}, ""},
		{admin.Listen{Addr: "[::1]:9090"}, ""},
		{admin.Listen{Addr: "localhost:http"}, ""},
		{admin.Listen{Addr: ":9090", Anywhere: true}, ""},
		{admin.Listen{Addr: "192.0.2.1:9090", Anywhere: true}, ""},
		{admin.Listen{Addr: ":9090"},
			`listen: ":9090": not loopback…: use 127.0.0.1, or set Listen.Anywhere`},
		{admin.Listen{Addr: "0.0.0.0:9090"}, "listen: …not loopback"},
		{admin.Listen{Addr: "[::]:9090"}, "listen: …not loopback"},
		{admin.Listen{Addr: "10.0.0.1:9090"}, "listen: …not loopback"},
		{admin.Listen{Addr: "9090"}, `listen: "9090": want an IP address or localhost, and a port`},
		{admin.Listen{Addr: "127.0.0.1:"}, "listen: …want an IP address"},
		{admin.Listen{Addr: "127.0.0.1:99999"}, "listen: …want an IP address"},
		{admin.Listen{Addr: "my.name:9090", Anywhere: true}, "listen: …want an IP address"},
		{admin.Listen{Socket: filepath.Join(dir, "no", "sock")},
			"socket: …no such file…: make the folder"},
		{admin.Listen{Socket: file}, "socket: …something else is there: remove it"},
		{admin.Listen{Socket: filepath.Join(open, "sock")},
			"socket: …others may write the folder …0777"},
		{admin.Listen{Socket: filepath.Join(shared, "sock")},
			"socket: …others may write the folder …0770"},
		{admin.Listen{Socket: filepath.Join(dir, strings.Repeat("x", 100))}, "socket: …too long"},
	} {
		if runtime.GOOS == "windows" && strings.Contains(row.want, "others may write") {
			continue
		}
		var texts []string
		for _, err := range row.at.Check() {
			texts = append(texts, err.Error())
		}
		text := strings.Join(texts, "\n")
		if row.want == "" && text != "" || row.want != "" && (len(texts) != 1 || !has(text, row.want)) {
			t.Errorf("%+v: %q, want %q", row.at, text, row.want)
		}
	}
	taken := proxytest.Listen(t)
	_, err := admin.Serve(admin.Listen{Addr: taken.Addr().String()}, http.NotFoundHandler())
	if listen := (&admin.ListenError{}); !errors.As(err, &listen) || listen.Field != "listen" {
		t.Errorf("an address in use: %v", err)
	}
}

func has(text, parts string) bool {
	for part := range strings.SplitSeq(parts, "…") {
		_, after, ok := strings.Cut(text, part)
		if !ok {
			return false
		}
		text = after
	}
	return true
}

// Silent and dripping clients are cut. Many of them take all places of their listener, but of no
// other, and Close does not wait for them.
func TestSlowClientsAreCutAndBounded(t *testing.T) {
	t.Parallel()
	h, _ := changeable()
	socket := filepath.Join(folder(t), "admin.sock")
	s := start(t, admin.Listen{Addr: "127.0.0.1:0", Socket: socket}, h)
	dripping := proxytest.Dial(t, s.Addr().String())
	dripping.SetDeadline(time.Time{})
	began := time.Now()
	cut := make(chan time.Duration, 1)
	go func() {
		_, _ = io.WriteString(dripping, "GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
		for err := error(nil); err == nil; time.Sleep(100 * time.Millisecond) {
			_, err = io.WriteString(dripping, "x")
		}
		cut <- time.Since(began)
	}()
	var silent []net.Conn
	for range 100 {
		c := proxytest.Dial(t, s.Addr().String())
		c.SetDeadline(time.Time{})
		silent = append(silent, c)
	}
	closed := make(chan bool, len(silent))
	for _, c := range silent {
		go func() {
			_, err := c.Read(make([]byte, 1))
			closed <- err != nil
		}()
	}
	for range 37 { // beyond 64, of which the dripping one has one
		proxytest.Receive(t, "the end of a connection too many", closed)
	}
	if code, _ := curl(t, socket, "GET", "/healthz"); code != 200 {
		t.Errorf("by the socket meanwhile: %d", code)
	}
	// A kept connection of a client that has been answered is not cut with the others.
	if d := proxytest.Receive(t, "the end of the client that drips", cut); d < time.Second {
		t.Errorf("it was cut after %v already", d)
	}
	for range 63 {
		proxytest.Receive(t, "the end of a silent client", closed)
	}
}

func TestCloseDoesNotWaitForARequest(t *testing.T) {
	t.Parallel()
	asked, end := make(chan bool), make(chan bool)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		select {
		case <-end:
		case <-r.Context().Done():
		}
	})
	s := start(t, admin.Listen{Addr: "127.0.0.1:0"}, h)
	c := proxytest.Dial(t, s.Addr().String())
	_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
	proxytest.Must(t, err)
	<-asked
	done := make(chan bool)
	go func() {
		s.Close()
		close(done)
	}()
	proxytest.Receive(t, "the end of Close", done)
	close(end)
}

// Other machines see only health and metrics, even with a token.
func TestOtherMachinesSeeHealthAndMetricsAlone(t *testing.T) {
	h, _ := changeable(newApp(t, "web", nil, "127.0.0.1:1"))
	ip := ownAddress(t)
	s := start(t, admin.Listen{Addr: net.JoinHostPort(ip, "0"), Anywhere: true}, h)
	for path, want := range map[string]int{
		"/healthz": 200, "/readyz": 200, "/metrics": 200,
		"/": 403, "/conns": 403, "/api/stats": 403, "/api/conns": 403,
		"//metrics": 403, "/static/style.css": 403,
	} {
		r, err := http.NewRequest("GET", "http://"+s.Addr().String()+path, nil)
		proxytest.Must(t, err)
		withToken(r)
		answer, err := http.DefaultTransport.RoundTrip(r)
		proxytest.Must(t, err)
		answer.Body.Close()
		if answer.StatusCode != want {
			t.Errorf("GET %s: %d, want %d", path, answer.StatusCode, want)
		}
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
}

// ownAddress returns an address of this machine that is not loopback.
func ownAddress(t testing.TB) string {
	addrs, err := net.InterfaceAddrs()
	proxytest.Must(t, err)
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && ip.IP.IsGlobalUnicast() {
			return ip.IP.String()
		}
	}
	t.Skip("this machine has no address but loopback")
	return ""
}
