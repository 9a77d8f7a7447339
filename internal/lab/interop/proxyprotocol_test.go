//go:build linux

package interop

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// request is the clients' request to readers of PROXY headers, which answer with their content.
const request = "GET / HTTP/1.0\r\n\r\n"

// A reader of PROXY headers answers each client with the addresses and ports of the client and of
// the server it came to, and, if it sees TLS, its version and the certificate's common name.
type reader struct {
	addr     string
	versions []int
	tls      bool
	first    bool // it speaks first, and reads nothing
}

const nginxSeen = "$proxy_protocol_addr $proxy_protocol_port " +
	"$proxy_protocol_server_addr $proxy_protocol_server_port"

// startReaders starts third-party readers. The checks function returns the number of health checks
// in their logs, and fails the test for complaints in them.
func startReaders(t *testing.T) (readers map[string]reader, checks func() map[string]int) {
	t.Helper()
	dir := folder(t)
	readers = map[string]reader{}
	addr := func() string { return "127.0.0.1:" + freePort(t) }
	both := []int{1, 2}
	readers["nginx-http"] = reader{addr: addr(), versions: both}
	readers["nginx-stream"] = reader{addr: addr(), versions: both, first: true}
	readers["haproxy"] = reader{addr: addr(), versions: both}
	readers["varnish"] = reader{addr: addr(), versions: []int{2}, tls: true}

	streamLog := filepath.Join(dir, "stream.log")
	_, nginxLog := startNginxWithStream(t, dir,
		fmt.Sprintf("server { listen %s proxy_protocol; return 200 '%s'; }",
			readers["nginx-http"].addr, nginxSeen),
		fmt.Sprintf("log_format seen 'seen<$proxy_protocol_addr>'; access_log %s seen; "+
			"server { listen %s proxy_protocol; return '%s'; }",
			streamLog, readers["nginx-stream"].addr, nginxSeen))
	haproxy := startHAProxy(t, fmt.Sprintf(`
frontend web
	bind %s accept-proxy
	mode http
	log-format "received:%%[fc_rcvd_proxy] %%[src]"
	http-request return status 200 content-type text/plain lf-string "%s"
`, readers["haproxy"].addr, "%[src] %[src_port] %[dst] %[dst_port]"))
	vcl := write(t, dir, "seen.vcl", `vcl 4.1;
import proxy;
import std;
backend none none;
sub vcl_recv { return (synth(200)); }
sub vcl_synth {
	set resp.body = "" + client.ip + " " + std.port(client.ip) + " " + server.ip + " " +
		std.port(server.ip) + " " + proxy.ssl_version() + " " + proxy.client_cert_cn();
	return (deliver);
}`)
	varnish := start(t, command(t, need(t, "varnishd", "varnish"), "-F", "-j", "none", "-n",
		filepath.Join(dir, "varnish"), "-a", readers["varnish"].addr+",PROXY", "-f", vcl,
		"-T", "none", "-s", "malloc,10m", "-p", "thread_pool_min=10"))
	varnish.await(t, "(said Child starts)")
	return readers, func() map[string]int {
		text := func(path string) string { return string(readFile(t, path)) }
		wantNone(t, "nginx", text(nginxLog), `\[(error|crit|alert|emerg)\]`, "broken header")
		wantNone(t, "HAProxy", haproxy.text(), "PROXY protocol header", "error")
		wantNone(t, "Varnish", varnish.text(), "error", "panic", "died")
		return map[string]int{
			"nginx-stream": strings.Count(text(streamLog), "seen<->"),
			"haproxy":      strings.Count(haproxy.text(), "received:"),
		}
	}
}

// startHAProxy starts an HAProxy with sections beside those for all.
func startHAProxy(t *testing.T, sections string, addrs ...string) *daemon {
	t.Helper()
	config := write(t, folder(t), "haproxy.cfg", `global
	log stdout format raw local0
	nbthread 1
	ssl-server-verify none
defaults
	log global
	retries 0
	timeout connect 30s
	timeout client 60s
	timeout server 60s
`+sections)
	return start(t, command(t, need(t, "haproxy", "haproxy"), "-db", "-f", config), addrs...)
}

// Each reader understands mtlsserver's headers for clients and for health checks.
func TestPROXYHeadersAreUnderstood(t *testing.T) {
	readers, checks := startReaders(t)
	var apps []object
	for name, r := range readers {
		for _, v := range r.versions {
			apps = append(apps, object{
				"id": fmt.Sprint(name, "-", v), "listen": "[::]:0",
				"upstreams":   []object{{"addr": r.addr, "proxyProtocol": v}},
				"healthCheck": object{"interval": "50ms", "timeout": "10s"},
			})
		}
	}
	m := startApps(t, nil, apps...)
	for name, r := range readers {
		for _, v := range r.versions {
			id := fmt.Sprint(name, "-", v)
			_, port, _ := net.SplitHostPort(m.addrOf(t, id))
			for _, host := range []string{"127.0.0.1", "::1"} {
				t.Run(id+" "+host, func(t *testing.T) {
					raw := proxytest.Dial(t, net.JoinHostPort(host, port))
					want := seenBy(raw.LocalAddr(), raw.RemoteAddr())
					if r.tls {
						want += " TLSv1.3 alice"
					}
					if got := ask(t, m.client(t, raw), r.first); got != want {
						t.Errorf("%s has seen %q, want %q", name, got, want)
					}
				})
			}
		}
	}
	proxytest.Eventually(t, "health checks come, without an address", func() bool {
		n := checks()
		return n["nginx-stream"] >= 10 && n["haproxy"] >= 10
	})
	wantNone(t, "mtlsserver", m.text(), "upstream is down", "upstream failed")
	checks()
	m.wantEnds(t, len(apps)*2, "done")
}

// seenBy returns a reader's answer for a connection between two addresses.
func seenBy(client, server net.Addr) string {
	c, s := client.(*net.TCPAddr), server.(*net.TCPAddr)
	return fmt.Sprint(c.IP, " ", c.Port, " ", s.IP, " ", s.Port)
}

// ask returns a reader's answer, without the head of an HTTP answer.
func ask(t *testing.T, c net.Conn, first bool) string {
	t.Helper()
	if !first {
		_, err := io.WriteString(c, request)
		proxytest.Must(t, err)
	}
	answer, err := io.ReadAll(c)
	proxytest.Must(t, err)
	c.Close()
	if _, body, ok := strings.Cut(string(answer), "\r\n\r\n"); ok {
		return body
	}
	return string(answer)
}

// senders are ways to put a PROXY header before a connection from %[1]s to %[2]s. HAProxy has
// health checks of its own, nginx has none. Those that speak TLS do so on both sides.
var senders = []struct{ name, nginx, haproxy string }{
	{"nginx", "listen %[1]s; proxy_pass %[2]s; proxy_protocol on;", ""},
	{"send-proxy", "", "\tbind %[1]s\n\tserver s %[2]s send-proxy check inter 100ms\n"},
	{"send-proxy-v2", "", "\tbind %[1]s\n\tserver s %[2]s send-proxy-v2 check inter 100ms\n"},
	{"send-proxy-v2-ssl-cn", "",
		"\tbind %[1]s ssl crt %[3]s/both.pem ca-file %[3]s/ca.pem verify required\n" +
			"\tserver s %[2]s send-proxy-v2-ssl-cn ssl crt %[3]s/alice-both.pem check inter 100ms\n"},
}

// startSenders starts all of senders in front of m. It returns their addresses for a host of
// loopback.
func startSenders(t *testing.T, m *mtls, host string) (addrs map[string]string, haproxy *daemon) {
	t.Helper()
	pem := func(name, of string) {
		cert, key := readFile(t, m.file(of+".pem")), readFile(t, m.file(of+".key"))
		write(t, m.dir, name, string(cert)+string(key))
	}
	pem("both.pem", "server")
	pem("alice-both.pem", "alice")
	stream, proxies := "", ""
	addrs = map[string]string{}
	for _, s := range senders {
		addr := net.JoinHostPort(host, freePort(t))
		addrs[s.name] = addr
		if s.nginx != "" {
			stream += "server {" + fmt.Sprintf(s.nginx, addr, m.addr) + "}\n"
		} else {
			haproxyAddr := strings.NewReplacer("[", "", "]", "").Replace(addr)
			proxies += "listen " + s.name + "\n" + fmt.Sprintf(s.haproxy, haproxyAddr, m.addr, m.dir)
		}
	}
	startNginxWithStream(t, folder(t), "", stream)
	haproxy = startHAProxy(t, proxies)
	for _, addr := range addrs {
		waitFor(t, addr)
	}
	return addrs, haproxy
}

// mtlsserver accepts the headers of trusted senders: its log and its own headers have the client's
// address. A health check is a connection of the sender itself.
func TestPROXYHeadersAreBelieved(t *testing.T) {
	nginx := "127.0.0.1:" + freePort(t)
	startNginx(t, folder(t), fmt.Sprintf("server { listen %s proxy_protocol; return 200 '%s'; }",
		nginx, nginxSeen), nginx)
	for _, host := range []string{"127.0.0.1", "::1"} {
		m := startApps(t, nil, object{
			"id": "web", "listen": "127.0.0.1:0", "acceptProxy": []string{"127.0.0.0/8", "::1/128"},
			"upstreams": []object{{"addr": nginx, "proxyProtocol": 2}},
		})
		clients := map[string]bool{} // those of the test, not of HAProxy
		addrs, haproxy := startSenders(t, m, host)
		for name, addr := range addrs {
			t.Run(name+" "+host, func(t *testing.T) {
				raw := proxytest.Dial(t, addr)
				want := seenBy(raw.LocalAddr(), raw.RemoteAddr())
				if got := ask(t, m.client(t, raw), false); got != want {
					t.Errorf("the upstream has seen %q, want %q", got, want)
				}
				clients[raw.LocalAddr().String()] = true
			})
		}
		proxytest.Eventually(t, "clients and checks are in the log", func() bool {
			known, checks := 0, 0
			for _, e := range parseEnds(t, m.text()) {
				if client := clientOf(e); clients[client] {
					known++
				} else if strings.HasPrefix(client, "127.0.0.1:") { // mtlsserver's own family
					checks++
				}
			}
			return known == len(senders) && checks > 10
		})
		wantNone(t, "HAProxy", haproxy.text(), " is DOWN", "layer")
		for _, e := range m.ends(t) {
			if clients[clientOf(e)] && e.reason != "done" {
				t.Errorf("a client's connection ended as %q: %s", e.reason, e.detail)
			}
			// HAProxy resets its checks, at any time.
			if slices.Contains([]string{"no-proxy-header", "not-tls", "handshake-failed"}, e.reason) {
				t.Errorf("a header was not understood: %s", e.detail)
			}
		}
	}
}

// clientOf returns the address in a line of mtlsserver's log.
func clientOf(e end) string {
	_, rest, _ := strings.Cut(e.detail, `"client":"`)
	addr, _, _ := strings.Cut(rest, `"`)
	return addr
}

// From an untrusted peer a header is ordinary data.
func TestPROXYHeadersOfOthersAreBytes(t *testing.T) {
	received := make(chan string, 1)
	upstream := proxytest.Upstream(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		received <- string(b)
	})
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	front, _ := serveApp(t, lbproxy.Upstream{Addr: upstream}, lbproxy.AcceptProxy(trusted, nil))
	m := startApps(t, nil, object{
		"id": "web", "listen": "127.0.0.1:0", "acceptProxy": []string{"10.0.0.0/8"},
		"upstreams": []object{{"addr": upstream}},
	})
	plain, mutual := "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
	startHAProxy(t, fmt.Sprintf(`
listen plain
	bind %s
	server s %s send-proxy
listen mutual
	bind %s
	server s %s send-proxy-v2
`, plain, front, mutual, m.addr))
	waitFor(t, mutual)
	c := proxytest.Dial(t, plain)
	io.WriteString(c, "hello")
	c.CloseWrite()
	client, server := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
	want := fmt.Sprintf("PROXY TCP4 %v %v %d %d\r\nhello",
		client.IP, server.IP, client.Port, server.Port)
	if got := proxytest.Receive(t, "the bytes", received); got != want {
		t.Errorf("the upstream has received %q, want %q", got, want)
	}
	raw := proxytest.Dial(t, mutual)
	if err := m.client(t, raw).Handshake(); err == nil {
		t.Error("a handshake behind a header that is not believed succeeded")
	}
	m.wantEnds(t, 1, "not-tls")
	if text := m.text(); strings.Contains(text, raw.LocalAddr().String()) {
		t.Errorf("the log has the address of a header that is not believed: %s", text)
	}
}

// serveApp serves an app before upstream, in this process.
func serveApp(
	t *testing.T, upstream lbproxy.Upstream, admit lbproxy.AdmitFunc,
) (addr string, a *lbproxy.LBProxyApp) {
	t.Helper()
	a, err := lbproxy.New("test", []lbproxy.Upstream{upstream}, nil)
	proxytest.Must(t, err)
	l := proxytest.Listen(t)
	served := make(chan error, 1)
	go func() { served <- a.Serve(l, admit) }()
	t.Cleanup(func() {
		a.Close()
		<-served
	})
	return l.Addr().String(), a
}

// Behind a trusted balancer all clients come from one address. Limits go by the header's.
func TestLimitsGoByThePROXYHeadersAddress(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	limits := lbproxy.NewClientLimits(100, func(string) lbproxy.RateLimitManager {
		return &lbproxy.OpenLimit{Max: 1}
	})
	o := newOrigin(t)
	front, app := serveApp(t, lbproxy.Upstream{Addr: o.addr}, lbproxy.AcceptProxy(trusted,
		func(_ context.Context, c *lbproxy.Conn) error {
			c.RateLimit = limits.For(c.ClientAddr.(*net.TCPAddr).IP.String())
			return nil
		}))
	m := startApps(t, object{"handshake": object{"maxPerAddress": 1, "timeout": "1m"}}, object{
		"id": "web", "listen": "127.0.0.1:0", "acceptProxy": []string{"127.0.0.1/32"},
		"upstreams": []object{{"addr": o.addr}},
	})
	plain, mutual := "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
	startHAProxy(t, fmt.Sprintf(`
listen plain
	bind %s
	server s %s send-proxy-v2
listen mutual
	bind %s
	server s %s send-proxy
`, plain, front, mutual, m.addr))
	waitFor(t, mutual)

	t.Run("ClientLimits", func(t *testing.T) {
		ann, bob := dialFrom(t, "127.0.0.2", plain), dialFrom(t, "127.0.0.3", plain)
		for _, c := range []net.Conn{ann, bob} {
			io.WriteString(c, "GET /1 HTTP/1.1\r\n\r\n")
			readAnswer(t, c, 1)
		}
		second := dialFrom(t, "127.0.0.2", plain)
		io.WriteString(second, "GET /1 HTTP/1.1\r\n\r\n")
		if n, err := second.Read(make([]byte, 1)); n > 0 {
			t.Errorf("a second connection of one client is served, %v", err)
		}
		proxytest.Eventually(t, "the refusal is counted", func() bool {
			return app.Stats().Ends[lbproxy.EndRateLimited] == 1
		})
	})
	// One handshake of an address may be in progress here, and four wait.
	t.Run("places for handshakes", func(t *testing.T) {
		for range 6 {
			io.WriteString(dialFrom(t, "127.0.0.2", mutual), "\x16")
		}
		m.await(t, `"client":"127.0.0.2:\d+","reason":"(too-many-from-address)"`)
		c := m.client(t, dialFrom(t, "127.0.0.3", mutual))
		io.WriteString(c, "GET /1 HTTP/1.1\r\n\r\n")
		readAnswer(t, c, 1)
	})
}

// The headers cost the bytes behind them nothing: they are spliced, for which the app makes a pipe.
// The control hides the client's socket from the relay.
func TestBulkBehindPROXYHeadersIsSpliced(t *testing.T) {
	const size = 100 << 20
	curl := need(t, "curl", "curl")
	dir := folder(t)
	path := write(t, dir, "bulk", "")
	proxytest.Must(t, os.Truncate(path, size))
	proxytest.Must(t, os.Chmod(path, 0o644))
	nginx := "127.0.0.1:" + freePort(t)
	startNginx(t, dir, fmt.Sprintf("server { listen %s proxy_protocol; root %s; }", nginx, dir), nginx)
	trusted := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	for _, hidden := range []bool{false, true} {
		front, _ := serveApp(t, lbproxy.Upstream{Addr: nginx, ProxyProtocol: 2},
			lbproxy.AcceptProxy(trusted, func(_ context.Context, c *lbproxy.Conn) error {
				if hidden {
					c.Client = struct{ net.Conn }{c.Client}
				}
				return nil
			}))
		addr := "127.0.0.1:" + freePort(t)
		startHAProxy(t, fmt.Sprintf("listen l\n\tbind %s\n\tserver s %s send-proxy-v2\n", addr, front),
			addr)
		before := pipes()
		got := quiet(t, command(t, curl, "-sS", "--fail", "-o", "/dev/null",
			"-w", "%{size_download}", "http://"+addr+"/bulk"))
		if got != fmt.Sprint(size) {
			t.Errorf("curl has received %s bytes, want %d", got, size)
		}
		if spliced := pipes() > before; spliced == hidden {
			t.Errorf("hidden %v: spliced %v", hidden, spliced)
		}
	}
}

// pipes returns how many ends of pipes this process has open.
func pipes() (n int) {
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		if name, _ := os.Readlink(fd); strings.HasPrefix(name, "pipe:") {
			n++
		}
	}
	return n
}

// dialFrom connects from an address of loopback.
func dialFrom(t *testing.T, from, to string) *net.TCPConn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: proxytest.Patience}
	c, err := dialer.Dial("tcp", to)
	proxytest.Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}
