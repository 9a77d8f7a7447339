package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Example is the story that basic tells without flags.
func Example() {
	fmt.Println("exit code", run(nil, nil, os.Stdout, os.Stderr))

	// Output:
	// Three servers, red, green and blue, behind one lbproxy app, over real TCP.
	//
	// Three clients come one at a time, each when the one before has left.
	// Among servers with equally few connections, the first one is chosen:
	//   amy -> red, ben -> red, cho -> red
	//
	// Six clients come and stay. Each gets the server with the fewest connections.
	//   ann -> red, bob -> green, cat -> blue
	//   dan -> red, eve -> green, fay -> blue
	//
	// Bob and eve leave. The next two take their places, not the next in turn.
	//   gil -> green, hal -> green
	//
	// Everyone leaves, and green is stopped. The next clients do not notice.
	//   ida -> red, jon -> blue, kim -> red
	//   Jon took 2 dials: green did not answer, so blue was tried.
	//
	// A second listener allows each address two connections at once. Three come.
	//   lou -> red, mia -> blue, ned -> nobody (rate-limited)
	//
	// Everyone is gone. These are the app's counts:
	//   UPSTREAM   STATE     OPEN   TOTAL   FAILED   SENT   RECEIVED
	//   red        up        0      8       0        32 B   32 B
	//   green      cooling   0      5       1        16 B   24 B
	//   blue       up        0      4       0        16 B   20 B
	//   17 connections accepted, 1 refused, 0 failed: green's end cost no client.
	// exit code 0
}

// TestMain runs the command itself when a test starts this program as its child.
func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		main()
	}
	proxytest.Main(m)
}

const childVariable = "LBPROXY_BASIC_CHILD"

// A proxy is a call of run.
type proxy struct {
	addr    string
	args    []string
	signals chan os.Signal // unbuffered: a signal that is sent has been received
	stdout  *bufio.Reader
	ended   chan struct{} // closed when run has returned:
	code    int
	stderr  bytes.Buffer
}

// startProxy runs the proxy with args. It listens on a free port unless args say otherwise.
func startProxy(t *testing.T, args ...string) *proxy {
	t.Helper()
	stdout, w := io.Pipe()
	p := &proxy{
		args:    append([]string{"-listen", "127.0.0.1:0"}, args...),
		signals: make(chan os.Signal),
		stdout:  bufio.NewReader(stdout),
		ended:   make(chan struct{}),
	}
	go func() {
		defer close(p.ended)
		defer w.Close()
		p.code = run(p.args, p.signals, w, &p.stderr)
	}()
	t.Cleanup(func() {
		for p.interrupt() {
		}
	})
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		<-p.ended
		t.Fatalf("exit code %d: %s", p.code, &p.stderr)
	}
	m := regexp.MustCompile(`^listening on (127\.0\.0\.1:\d+), ` +
		`upstreams:\n$`).FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("stdout %q", line)
	}
	p.addr = m[1]
	return p
}

// interrupt sends a signal, and reports whether run was still there to receive it.
func (p *proxy) interrupt() bool {
	select {
	case p.signals <- os.Interrupt:
		return true
	case <-p.ended:
		return false
	}
}

// wait waits for run to return code.
func (p *proxy) wait(t *testing.T, code int) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatal("the proxy goes on")
	}
	if p.code != code {
		t.Errorf("exit code %d, want %d: %s", p.code, code, &p.stderr)
	}
}

func (p *proxy) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// served connects n clients, one after the other, which stay. It returns the servers they get.
func (p *proxy) served(t *testing.T, n int) (servers []string) {
	t.Helper()
	for range n {
		server := "none"
		if c, err := net.Dial("tcp", p.addr); err == nil { // Dial may fail for a refused client
			t.Cleanup(func() { c.Close() })
			if answer, err := ask(c, "hello"); err == nil {
				server = answer
			}
		}
		servers = append(servers, server)
	}
	return servers
}

func upstream(t *testing.T, name string) string {
	t.Helper()
	s, err := startServer(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	return s.addr()
}

func echo(t *testing.T) (addr string) { return proxytest.Upstream(t, proxytest.Echo) }

func TestEcho(t *testing.T) {
	up := echo(t)
	p := startProxy(t, "-upstream", up)
	c := p.dial(t)
	sent := bytes.Repeat([]byte("over and over again, "), 1<<15)
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
		wrote <- err
	}()
	received, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(received, sent) {
		t.Errorf("received %d bytes (%v), want the %d that were sent", len(received), err,
			len(sent))
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	p.interrupt()
	p.wait(t, 0)
	rest, _ := io.ReadAll(p.stdout)
	if want := "  " + up + ", weight 1\n"; string(rest) != want {
		t.Errorf("after the first line of stdout: %q, want %q", rest, want)
	}
	log := p.stderr.String()
	const stopped = "msg=stopped accepted=1 refused=0 failed=0 reset=0"
	if !strings.Contains(log, stopped) || strings.Contains(log, up) {
		t.Errorf("log:\n%swant what was counted, and nothing about a connection", log)
	}
}

func TestVerbose(t *testing.T) {
	up := echo(t)
	p := startProxy(t, "-v", "-upstream", up)
	c := p.dial(t)
	c.(*net.TCPConn).CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Error(err)
	}
	p.interrupt()
	p.wait(t, 0)
	if log := p.stderr.String(); !strings.Contains(log, "upstream="+up) {
		t.Errorf("log:\n%swant a line about the connection", log)
	}
}

func TestWeight(t *testing.T) {
	p := startProxy(t, "-upstream", upstream(t, "small"), "-upstream",
		upstream(t, "big")+",weight=3")
	want := []string{"big", "big", "small", "big", "big", "big", "small", "big"}
	if got := p.served(t, len(want)); !slices.Equal(got, want) {
		t.Errorf("served by %v, want %v", got, want)
	}
}

func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		flags  string
		served int // of 4 clients
	}{
		{"-rate 0", 4},
		{"-rate 1000", 4},
		{"-rate 0.001", 1},
		{"-rate 0.001 -burst 3", 3},
		{"-open 2", 2},
		{"-rate 0.001 -burst 3 -open 2", 2},
		{"-rate 0.001 -burst 2 -open 3", 2},
		{"-bandwidth 1000000", 4},
	} {
		t.Run(tt.flags, func(t *testing.T) {
			p := startProxy(t,
				append(strings.Fields(tt.flags), "-upstream", upstream(t, "server"))...)
			want := slices.Repeat([]string{"server"}, tt.served)
			want = append(want, slices.Repeat([]string{"none"}, 4-tt.served)...)
			if got := p.served(t, 4); !slices.Equal(got, want) {
				t.Errorf("served by %v, want %v", got, want)
			}
		})
	}
}

// A connFrom is a connection from an address.
type connFrom struct {
	net.Conn
	addr string
}

func (c connFrom) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.addr))
}

// A client of IPv6 may have a whole /64, so another address of it must not be another client.
func TestAddressesOfOneNetworkShareALimit(t *testing.T) {
	for _, tt := range []struct {
		first, second string
		shared        bool
	}{
		{"192.0.2.1:1", "192.0.2.1:2", true},
		{"192.0.2.1:1", "[::ffff:192.0.2.1]:1", true},
		{"192.0.2.1:1", "192.0.2.2:1", false},
		{"[2001:db8::1]:1", "[2001:db8::ffff:2]:1", true},
		{"[2001:db8::1]:1", "[2001:db8:0:1::1]:1", false},
		{"[fe80::1%eth0]:1", "[fe80::2%eth0]:1", true},
	} {
		admit := limits{open: 1}.admit()
		for _, addr := range []string{tt.first, tt.second} {
			c := &lbproxy.Conn{Client: connFrom{addr: addr}}
			if err := admit(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			d := c.RateLimit.Report(t.Context(), lbproxy.Event{Kind: lbproxy.EventOpen})
			if want := addr == tt.second && tt.shared; d.Exceeded != want {
				t.Errorf("%s of %s and %s: refused is %t, want %t", addr, tt.first, tt.second,
					d.Exceeded, want)
			}
			if ip := netip.MustParseAddrPort(addr).Addr().Unmap().String(); c.ClientID != ip {
				t.Errorf("%s is called %q, want %q", addr, c.ClientID, ip)
			}
		}
	}
}

func TestBandwidth(t *testing.T) {
	p := startProxy(t, "-bandwidth", "100000", "-upstream", echo(t))
	c := p.dial(t)
	start := time.Now()
	c.Write(make([]byte, 10_000))
	if _, err := io.ReadFull(c, make([]byte, 10_000)); err != nil {
		t.Fatal(err)
	}
	// 20,000 bytes take 200 ms, less the time for the last piece: a limit delays the next one.
	if d := time.Since(start); d < 100*time.Millisecond {
		t.Errorf("20000 bytes at 100000 per second took %v", d)
	}
}

func TestIdle(t *testing.T) {
	p := startProxy(t, "-idle", "200ms", "-upstream", upstream(t, "server"))
	if _, err := p.dial(t).Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("Read: %v, want to be reset", err)
	}
}

func TestInterruptDrains(t *testing.T) {
	p := startProxy(t, "-upstream", upstream(t, "server"))
	c := p.dial(t)
	if _, err := ask(c, "hello"); err != nil {
		t.Fatal(err)
	}
	p.interrupt()
	proxytest.Eventually(t, "no more is accepted", func() bool {
		late, err := net.Dial("tcp", p.addr)
		if err == nil {
			late.Close()
		}
		return err != nil
	})
	if server, err := ask(c, "still there?"); err != nil || server != "server" {
		t.Errorf("while draining: %q, %v", server, err)
	}
	select {
	case <-p.ended:
		t.Error("ended with a connection open")
	default:
	}
	c.Close()
	p.wait(t, 0)
}

func TestSecondInterruptCloses(t *testing.T) {
	p := startProxy(t, "-upstream", upstream(t, "server"))
	c := p.dial(t)
	if _, err := ask(c, "hello"); err != nil {
		t.Fatal(err)
	}
	p.interrupt()
	p.interrupt()
	p.wait(t, 1)
	const want = "basic: connections were still open and have been reset: 1"
	if log := p.stderr.String(); !strings.Contains(log, want) {
		t.Errorf("log:\n%swant how many connections were reset", log)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("Read: %v, want to be reset", err)
	}
}

func TestWrongFlags(t *testing.T) {
	const (
		wantListen   = "want an address of this machine, such as 127.0.0.1:8080 or :8080"
		wantUpstream = "want host:port or host:port,weight=N, where N is 1 or more"
		wantRate     = "want connections per second, 0.001 to 1000000, or 0 for no limit"
		wantBurst    = "want a whole number of connections, or 0 for the default"
		wantOpen     = "want a whole number of connections, or 0 for no limit"
		wantBytes    = "want whole bytes per second, or 0 for no limit"
		wantConns    = "want a whole number of connections, or 0 for no limit"
		wantIdle     = "want a duration such as 90s or 10m, or 0 for never"
	)
	for _, tt := range []struct{ args, want string }{
		{
			"-upstream 127.0.0.1:1",
			"-listen is missing: say where clients come in, such as -listen 127.0.0.1:8080",
		},
		{
			"-listen 127.0.0.1:0",
			"-upstream is missing: say where to send clients, such as -upstream 10.0.0.1:80",
		},
		{"-v", "-listen is missing: say where clients come in, such as -listen 127.0.0.1:8080"},
		{
			"-admin :9090",
			`invalid value ":9090" for flag -admin: ` +
				`want a loopback address, such as 127.0.0.1:9090`,
		},
		{"start", `unexpected argument "start": there are only flags`},
		{"-fast", "flag provided but not defined: -fast"},
		{"-rate", "flag needs an argument: -rate"},
		{"-v=loud", `invalid boolean value "loud" for -v: want true or false, or nothing`},
		{
			"-listen 8080",
			`invalid value "8080" for flag -listen: address 8080: missing port in address: ` +
				`` + wantListen,
		},
		{
			"-listen 127.0.0.1:65536",
			`invalid value "127.0.0.1:65536" for flag -listen: address 65536: invalid port: ` +
				`` + wantListen,
		},
		{
			"-upstream b:1,weight=heavy",
			`invalid value "b:1,weight=heavy" for flag -upstream: ` + wantUpstream,
		},
		{
			"-upstream b:1,weight=0",
			`invalid value "b:1,weight=0" for flag -upstream: ` + wantUpstream,
		},
		{"-upstream b:1,2", `invalid value "b:1,2" for flag -upstream: ` + wantUpstream},
		{"-upstream b:1,", `invalid value "b:1," for flag -upstream: ` + wantUpstream},
		{
			"-listen 127.0.0.1:0 -upstream b",
			`-upstream: lbproxy: app "basic": upstream 0: Addr "b": missing port in ` +
				`address: want host:port`,
		},
		{
			"-listen 127.0.0.1:0 -upstream b:1 -upstream b:1",
			`-upstream: lbproxy: app "basic": upstream 1: Addr "b:1": upstream 0 has it ` +
				`already: give it once`,
		},
		{"-rate -1", `invalid value "-1" for flag -rate: ` + wantRate},
		{"-rate NaN", `invalid value "NaN" for flag -rate: ` + wantRate},
		{"-rate 1e-9", `invalid value "1e-9" for flag -rate: ` + wantRate},
		{"-burst 1.5", `invalid value "1.5" for flag -burst: ` + wantBurst},
		{
			"-listen 127.0.0.1:0 -upstream b:1 -burst 3",
			"-burst 3 without -rate: say how fast it is refilled, such as -rate 10",
		},
		{"-open many", `invalid value "many" for flag -open: ` + wantOpen},
		{"-bandwidth 1MB", `invalid value "1MB" for flag -bandwidth: ` + wantBytes},
		{"-idle -1s", `invalid value "-1s" for flag -idle: ` + wantIdle},
		{"-max-conns -1", `invalid value "-1" for flag -max-conns: ` + wantConns},
		{
			"-dial-timeout 5",
			`invalid value "5" for flag -dial-timeout: ` +
				`want a duration such as 2s, or 0 for the default`,
		},
		{
			"-fail-timeout -1s",
			`invalid value "-1s" for flag -fail-timeout: want a duration such as 10s, or 0 ` +
				`for the default`,
		},
		{
			"-check often",
			`invalid value "often" for flag -check: want a duration such as 1s, or 0 for never`,
		},
	} {
		var stdout, stderr bytes.Buffer
		if code := run(strings.Fields(tt.args), nil, &stdout, &stderr); code != 2 ||
			stdout.Len() > 0 {
			t.Errorf("basic %s: exit code %d, want 2; stdout %q, want none", tt.args, code, &stdout)
		}
		if got, want := stderr.String(), "basic: "+tt.want+": run with -h for help\n"; got != want {
			t.Errorf("basic %s\n got %s\nwant %s", tt.args, got, want)
		}
	}
}

func TestHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run([]string{"-h"}, nil, &stdout, &stderr); code != 0 || stderr.Len() > 0 {
		t.Errorf("exit code %d, want 0; stderr %q, want none", code, &stderr)
	}
	if stdout.String() != usage {
		t.Errorf("stdout:\n%swant the usage", &stdout)
	}
	new(config).flags().VisitAll(func(f *flag.Flag) {
		if !strings.Contains(usage, "\n  -"+f.Name+" ") {
			t.Errorf("usage says nothing about -%s", f.Name)
		}
	})
}

func TestAddressInUse(t *testing.T) {
	taken := echo(t)
	var stdout, stderr bytes.Buffer
	code := run([]string{"-listen", taken, "-upstream", "127.0.0.1:1"}, nil, &stdout, &stderr)
	if code != 1 || stdout.Len() > 0 {
		t.Errorf("exit code %d, want 1; stdout %q, want none", code, &stdout)
	}
	got := stderr.String()
	if !strings.Contains(got, taken) || !strings.HasSuffix(got, ": choose another -listen\n") {
		t.Errorf("stderr %q", got)
	}
}

func TestStatusPage(t *testing.T) {
	p := startProxy(t, "-upstream", upstream(t, "server"), "-admin", "127.0.0.1:0")
	if got := p.served(t, 2); !slices.Equal(got, []string{"server", "server"}) {
		t.Fatalf("served by %v", got)
	}
	p.stdout.ReadString('\n')
	line, err := p.stdout.ReadString('\n')
	url, ok := strings.CutPrefix(strings.TrimSpace(line), "status page at ")
	if !ok {
		t.Fatalf("stdout %q, %v", line, err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]string{
		"":        `<dt>Accepted</dt><dd><data value="2">`,
		"metrics": `lbproxy_accepted_connections_total{app="basic"} 2`,
	} {
		answer, err := client.Get(url + path)
		proxytest.Must(t, err)
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || !strings.Contains(string(body), want) {
			t.Errorf("%s: %v, %s; want %s in it", path, err, body, want)
		}
	}

	taken := proxytest.Listen(t).Addr().String()
	var stderr bytes.Buffer
	code := run([]string{"-listen", "127.0.0.1:0", "-upstream", "b:1", "-admin", taken}, nil,
		io.Discard, &stderr)
	if code != 1 || !strings.HasSuffix(stderr.String(), ": choose another -admin\n") {
		t.Errorf("an address in use: exit code %d, %q", code, &stderr)
	}
}

// A remoteConn is a connection that only has a remote address, which is all that admit uses.
type remoteConn struct {
	net.Conn
	remote net.Addr
}

func (c remoteConn) RemoteAddr() net.Addr { return c.remote }

func TestClientIsAddress(t *testing.T) {
	admit := limits{open: 1}.admit()
	for _, tt := range []struct {
		remote net.Addr
		want   string
	}{
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1).To4(), Port: 1}, "10.0.0.1"},
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1).To16(), Port: 2}, "10.0.0.1"},
		{&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 3}, "2001:db8::1"},
		{&net.UnixAddr{Name: "a.sock"}, ""},
		{nil, ""},
	} {
		c := &lbproxy.Conn{Client: remoteConn{remote: tt.remote}}
		err := admit(t.Context(), c)
		if c.ClientID != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("client at %v: %q, %v, want %q", tt.remote, c.ClientID, err, tt.want)
		}
	}
}

func TestNoLimits(t *testing.T) {
	if (limits{}).admit() != nil {
		t.Error("connections are looked at, with nothing to hold them to")
	}
}

func TestFlagsReachTheApp(t *testing.T) {
	const args = "-listen :0 -upstream b:1 -max-conns 3 -idle 5s " +
		"-dial-timeout 1s -fail-timeout 2s -check 4s"
	c, err := parse(strings.Fields(args))
	proxytest.Must(t, err)
	got := c.options()
	check := *got.HealthCheck
	if got.MaxConns != 3 || got.IdleTimeout != 5*time.Second || got.DialTimeout != time.Second ||
		got.FailTimeout != 2*time.Second || check.Interval != 2*time.Second ||
		check.Timeout != 2*time.Second || check.Fall != 2 {
		t.Errorf("%s: %+v, %+v", args, got, check)
	}
	c, err = parse(strings.Fields("-listen :0 -upstream b:1 -idle 0"))
	proxytest.Must(t, err)
	if got := c.options(); got.IdleTimeout >= 0 || got.HealthCheck != nil || got.DialTimeout != 0 {
		t.Errorf("without flags: %+v", got)
	}
}

func TestMaxConns(t *testing.T) {
	p := startProxy(t, "-max-conns", "1", "-upstream", upstream(t, "server"))
	first, second := p.dial(t), p.dial(t)
	if _, err := ask(first, "hello"); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		_, err := ask(second, "hello")
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("a second client is served, or refused: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	first.Close()
	proxytest.Must(t, proxytest.Receive(t, "the second client is served", answered))
}

// The reader of "basic -v ... 2>&1 | head -1" is gone after the first line.
func TestServesOnWhenNobodyReadsItsOutput(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there are no signals on Windows")
	}
	r, w, err := os.Pipe()
	proxytest.Must(t, err)
	cmd := exec.Command(os.Args[0], "-v", "-listen", "127.0.0.1:0", "-upstream",
		upstream(t, "server"))
	cmd.Env = append(os.Environ(), childVariable+"=1")
	cmd.Stdout, cmd.Stderr = w, w
	proxytest.Must(t, cmd.Start())
	w.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	line, err := bufio.NewReaderSize(r, 16).ReadString('\n')
	r.Close()
	proxytest.Must(t, err)
	addr, _, _ := strings.Cut(strings.TrimPrefix(line, "listening on "), ",")
	for range 3 { // each leaves a line in the log
		c := proxytest.Dial(t, addr)
		if server, err := ask(c, "hello"); server != "server" {
			t.Fatalf("answered %q, %v", server, err)
		}
		c.Close()
	}
	cmd.Process.Signal(os.Interrupt)
	if err := proxytest.Receive(t, "the command ends", ended); err != nil {
		t.Errorf("the command ended by %v", err)
	}
}

// A standard error that nobody reads delays neither clients nor signals.
func TestEndsAlthoughNobodyReadsItsLog(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there are no signals on Windows")
	}
	_, full, _ := proxytest.FullPipe(t)
	for _, second := range []bool{false, true} {
		cmd := exec.Command(os.Args[0], "-v", "-listen", "127.0.0.1:0", "-upstream",
			upstream(t, "server"))
		cmd.Env = append(os.Environ(), childVariable+"=1")
		stdout, err := cmd.StdoutPipe()
		proxytest.Must(t, err)
		cmd.Stderr = full
		proxytest.Must(t, cmd.Start())
		line, err := bufio.NewReader(stdout).ReadString('\n')
		proxytest.Must(t, err)
		addr, _, _ := strings.Cut(strings.TrimPrefix(line, "listening on "), ",")
		var c net.Conn
		for range 10 { // each leaves a line in the log
			c = proxytest.Dial(t, addr)
			if server, err := ask(c, "hello"); server != "server" {
				t.Fatalf("answered %q, %v", server, err)
			}
			if !second {
				c.Close()
			}
		}
		cmd.Process.Signal(syscall.SIGTERM)
		if second { // the connections are still open
			cmd.Process.Signal(os.Interrupt)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		err = proxytest.Receive(t, "the command ends", ended)
		if exit, ok := errors.AsType[*exec.ExitError](err); second != (ok && exit.ExitCode() == 1) {
			t.Errorf("second signal %v: the command ended by %v", second, err)
		}
	}
}

func TestOutputFitsATerminal(t *testing.T) {
	var demo, help bytes.Buffer
	run(nil, nil, &demo, os.Stderr)
	run([]string{"-h"}, nil, &help, os.Stderr)
	for line := range strings.Lines(demo.String() + help.String()) {
		if line = strings.TrimSuffix(line, "\n"); len(line) > 79 {
			t.Errorf("%d columns, want at most 79: %s", len(line), line)
		}
	}
}
