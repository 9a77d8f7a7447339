package lbproxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Tests of HandshakeTLS and AcceptProxy, which talk to clients before admission, and of the PROXY
// headers that upstreams get.

// tlsDial connects, and returns when the handshake is done.
func tlsDial(addr string, config *tls.Config) (net.Conn, error) {
	c, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return nil, err // not a nil pointer in an interface
	}
	return c, nil
}

func TestHandshakeTLSCutsSilentClientsAfter10Seconds(t *testing.T) {
	serverTLS, _ := tlsConfigs(t)
	synctest.Test(t, func(t *testing.T) {
		a, results := newApp(t, Options{}, "u:1")
		c := comeFake(t, a, HandshakeTLS(serverTLS, func(context.Context, *Conn) error {
			t.Error("next was asked")
			return nil
		}))()
		r := <-results
		if r.End != EndNotAdmitted || !errors.Is(r.Err, os.ErrDeadlineExceeded) ||
			r.Duration != 10*time.Second {
			t.Errorf("%s after %v: %v", r.End, r.Duration, r.Err)
		}
		c.Close()
	})
}

func TestHandshakeTLSReadsAtMost16KiB(t *testing.T) {
	serverTLS, _ := tlsConfigs(t)
	a, results := newApp(t, Options{}, "u:1")
	c := dial(t, serve(t, a, HandshakeTLS(serverTLS, nil)))
	// crypto/tls would read this ClientHello of 60,000 bytes, which comes in records.
	hello := []byte{1, 0, 60_000 >> 8, 60_000 & 0xff}
	for sent := 0; sent < 64<<10; sent += 4 << 10 {
		record := append([]byte{22, 3, 1, 4 << 10 >> 8, 0}, make([]byte, 4<<10)...)
		if sent == 0 {
			copy(record[5:], hello)
		}
		c.Write(record)
	}
	if r := <-results; r.End != EndNotAdmitted || !errors.Is(r.Err, ErrHandshakeSize) {
		t.Errorf("%+v", r)
	}
}

func TestHandshakeTLSRejectsOtherProtocols(t *testing.T) {
	serverTLS, _ := tlsConfigs(t)
	a, results := newApp(t, Options{}, "u:1")
	c := dial(t, serve(t, a, HandshakeTLS(serverTLS, nil)))
	io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	if r := <-results; r.End != EndNotAdmitted || !errors.As(r.Err, new(tls.RecordHeaderError)) {
		t.Errorf("%+v", r)
	}
}

func TestHandshakeTLSErrorsNameTheCause(t *testing.T) {
	serverTLS, _ := tlsConfigs(t)
	a, results := newApp(t, Options{}, "u:1")
	dial(t, serve(t, a, HandshakeTLS(serverTLS, nil))).Close()
	if r := <-results; r.End != EndNotAdmitted || r.Err.Error() != "lbproxy: TLS handshake: EOF" {
		t.Errorf("%+v", r)
	}
}

func TestHandshakeTLSGivesNextATLSConnWithoutDeadline(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	a, results := newApp(t, Options{}, upstreamDoing(t, echo))
	rejection := errors.New("not this one")
	reject := false
	var deadlines deadlineConn
	handshake := HandshakeTLS(serverTLS, func(ctx context.Context, c *Conn) error {
		s, ok := c.Client.(*TLSConn)
		if !ok || !s.ConnectionState().HandshakeComplete || ConnFromContext(ctx) != c ||
			!deadlines.last.IsZero() {
			t.Errorf("next finds a %T, with a deadline at %v", c.Client, deadlines.last)
		}
		if reject {
			return rejection
		}
		return nil
	})
	addr := serve(t, a, func(ctx context.Context, c *Conn) error {
		deadlines = deadlineConn{Conn: c.Client}
		c.Client = &deadlines
		return handshake(ctx, c)
	})
	for range 2 {
		c, err := tlsDial(addr, clientTLS)
		if err != nil {
			t.Fatal(err)
		}
		if !reject {
			ping(t, c)
		}
		c.Close()
		if r := <-results; reject && (r.End != EndNotAdmitted || r.Err != rejection) ||
			!reject && r.End != EndDone {
			t.Errorf("%+v", r)
		}
		reject = true
	}
}

// A deadlineConn keeps the last deadline that was set.
type deadlineConn struct {
	net.Conn
	last time.Time
}

func (c *deadlineConn) SetDeadline(at time.Time) error {
	c.last = at
	return c.Conn.SetDeadline(at)
}
func (c *deadlineConn) NetConn() net.Conn { return c.Conn }

func TestAdmitFuncsPanicOnNonsense(t *testing.T) {
	for what, f := range map[string]func(){
		"HandshakeTLS: config is nil": func() { HandshakeTLS(nil, nil) },
		"AcceptProxy: no prefix":      func() { AcceptProxy(nil, nil) },
		"would trust everybody": func() {
			AcceptProxy(prefixes("10.0.0.0/8", "0.0.0.0/0"), nil)
		},
		"prefix 0, ::/0":                func() { AcceptProxy(prefixes("::/0"), nil) },
		"prefix 0 is not valid":         func() { AcceptProxy(make([]netip.Prefix, 1), nil) },
		"prefix 0, ::ffff:0.0.0.0/96, ": func() { AcceptProxy(prefixes("::ffff:0.0.0.0/96"), nil) },
	} {
		if p := fmt.Sprint(ratePanic(f)); !strings.HasPrefix(p, "lbproxy: ") ||
			!strings.Contains(p, what) {
			t.Errorf("%s; want a panic with %q", p, what)
		}
	}
}

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// An addrConn says that it comes from elsewhere.
type addrConn struct {
	*duplexConn
	local, remote net.Addr
}

func (c addrConn) LocalAddr() net.Addr  { return c.local }
func (c addrConn) RemoteAddr() net.Addr { return c.remote }

func tcpAddr(text string) *net.TCPAddr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(text))
}

// admitFrom asks admit about a connection that remote has made, and that sends text.
func admitFrom(t *testing.T, admit AdmitFunc, remote net.Addr, text string) (c *Conn,
	rest string, err error) {
	t.Helper()
	client, ours := duplex()
	c = &Conn{Client: addrConn{ours, tcpAddr("10.0.0.1:80"), remote}}
	go func() { io.WriteString(client, text); client.CloseWrite() }()
	err = admit(t.Context(), c)
	if err == nil {
		left, _ := io.ReadAll(ours)
		rest = string(left)
	}
	ours.Close()
	client.Close()
	return c, rest, err
}

const (
	v2Signature = "\r\n\r\n\x00\r\nQUIT\n"
	v2Local     = v2Signature + "\x20\x00\x00\x00"
	// 192.0.2.1:9 to 198.51.100.2:443
	v2TCP4 = v2Signature + "\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x02\x00\x09\x01\xbb"
)

func TestAcceptProxySetsTheAddresses(t *testing.T) {
	admit := AcceptProxy(prefixes("10.0.0.0/8", "fd00::/8"), nil)
	values := strings.Repeat("\xe1\x00\xfd"+strings.Repeat("x", 253), 16) // 4 KiB
	long := []byte(v2TCP4)
	binary.BigEndian.PutUint16(long[14:], uint16(12+len(values)))
	for _, tc := range []struct{ name, header, client, server string }{
		{"v1", "PROXY TCP4 192.0.2.1 198.51.100.2 9 443\r\n", "192.0.2.1:9", "198.51.100.2:443"},
		{"v1, IPv6", "PROXY TCP6 2001:db8::1 2001:db8::2 9 443\r\n", "[2001:db8::1]:9",
			"[2001:db8::2]:443"},
		{"v1 UNKNOWN", "PROXY UNKNOWN\r\n", "", ""},
		{"v1 UNKNOWN with addresses", "PROXY UNKNOWN 192.0.2.1 198.51.100.2 9 443\r\n", "", ""},
		{"v2", v2TCP4, "192.0.2.1:9", "198.51.100.2:443"},
		{"v2 LOCAL", v2Local, "", ""},
		{"v2 with 4 KiB of values", string(long) + values, "192.0.2.1:9", "198.51.100.2:443"},
	} {
		for _, remote := range []string{"10.1.2.3:5", "[fd00::1]:5", "[::ffff:10.1.2.3]:5"} {
			c, rest, err := admitFrom(t, admit, tcpAddr(remote), tc.header+"PROXY TCP4 hello")
			if err != nil || rest != "PROXY TCP4 hello" {
				t.Errorf("%s from %s: %v, then %q", tc.name, remote, err, rest)
			}
			if tc.client == "" {
				if c.ClientAddr != nil || c.ServerAddr != nil {
					t.Errorf("%s: %v to %v, want neither", tc.name, c.ClientAddr, c.ServerAddr)
				}
			} else if c.ClientAddr.String() != tc.client || c.ServerAddr.String() != tc.server {
				t.Errorf("%s: %v to %v", tc.name, c.ClientAddr, c.ServerAddr)
			}
		}
	}
}

func TestAcceptProxyRejectsTrustedPeersWithoutAHeader(t *testing.T) {
	admit := AcceptProxy(prefixes("10.0.0.0/8"), func(context.Context, *Conn) error {
		t.Error("next was asked")
		return nil
	})
	tooLong := []byte(v2TCP4)
	binary.BigEndian.PutUint16(tooLong[14:], 5000)
	for _, text := range []string{
		"", "GET / HTTP/1.1\r\n\r\n", "PROXY TCP4 192.0.2.1 198.51.100.2 9\r\n",
		"PROXY TCP4 192.0.2.1",
		"PROXY " + strings.Repeat("x", 200), v2TCP4[:20], v2Signature + "\x31\x11\x00\x00",
		string(tooLong),
	} {
		c, _, err := admitFrom(t, admit, tcpAddr("10.1.2.3:5"), text)
		if err == nil || !strings.HasPrefix(err.Error(), "lbproxy: ") ||
			!strings.Contains(err.Error(), "10.1.2.3:5") || c.ClientAddr != nil {
			t.Errorf("%q: %v, and %v as the client", text, err, c.ClientAddr)
		}
	}
}

// An untrusted peer could claim any address.
func TestAcceptProxyTakesNoHeaderFromOthers(t *testing.T) {
	admit := AcceptProxy(prefixes("10.0.0.0/8"), func(ctx context.Context, c *Conn) error {
		c.ClientID = "asked"
		return nil
	})
	for _, remote := range []net.Addr{tcpAddr("11.1.2.3:5"), tcpAddr("[fd00::1]:5"),
		&net.UnixAddr{Name: "@", Net: "unix"}, nil} {
		for _, text := range []string{"PROXY TCP4 192.0.2.1 198.51.100.2 9 443\r\nhello",
			v2TCP4 + "hello"} {
			c, rest, err := admitFrom(t, admit, remote, text)
			if err != nil || rest != text || c.ClientAddr != nil || c.ClientID != "asked" {
				t.Errorf("from %v: %v, %q left, client %v", remote, err, rest, c.ClientAddr)
			}
		}
	}
}

func TestAcceptProxyWaits3Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		admit := AcceptProxy(prefixes("10.0.0.0/8"), nil)
		for _, drip := range []bool{false, true} {
			client, ours := duplex()
			start := time.Now()
			var dripping sync.WaitGroup
			if drip {
				dripping.Go(func() {
					for i := range v2TCP4 {
						if _, err := io.WriteString(client, v2TCP4[i:i+1]); err != nil {
							return
						}
						time.Sleep(500 * time.Millisecond)
					}
				})
			}
			err := admit(t.Context(), &Conn{Client: addrConn{ours, nil, tcpAddr("10.1.2.3:5")}})
			if took := time.Since(start); !errors.Is(err, os.ErrDeadlineExceeded) ||
				took != 3*time.Second {
				t.Errorf("%v after %v", err, took)
			}
			ours.Close()
			client.Close()
			dripping.Wait()
		}
	})
}

// AcceptProxy and HandshakeTLS work together. Limits, the log, the Result and the header to the
// upstream have the client's address.
func TestAcceptProxyThenTLS(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	got := make(chan string, 1)
	a, results := newAppOver(t, Options{},
		Upstream{ProxyProtocol: 1, Addr: upstreamDoing(t, func(c *net.TCPConn) {
			r := bufio.NewReader(c)
			line, _ := r.ReadString('\n')
			got <- line
			io.Copy(c, r)
		})})
	tcp := dial(t, serve(t, a, AcceptProxy(prefixes("127.0.0.0/8"), HandshakeTLS(serverTLS, nil))))
	io.WriteString(tcp, "PROXY TCP4 192.0.2.1 198.51.100.2 9 443\r\n")
	c := tls.Client(tcp, clientTLS)
	ping(t, c)
	if line := <-got; line != "PROXY TCP4 192.0.2.1 198.51.100.2 9 443\r\n" {
		t.Errorf("the upstream got %q", line)
	}
	c.Close()
	r := <-results
	if r.Client != "192.0.2.1:9" || r.Sent != 1 || r.Received != 1 || r.End != EndDone {
		t.Errorf("%+v: the header is not counted", r)
	}
	if s := a.Stats(); s.Sent != 1 || s.Upstreams[0].Sent != 1 {
		t.Errorf("%+v", s)
	}
}

// headerOf serves one connection from and to these addresses, and returns the first bytes that an
// upstream is sent.
func headerOf(t *testing.T, version int, c *Conn, from, to net.Addr) string {
	t.Helper()
	got := make(chan string, 1)
	a, _ := newAppOver(t, Options{DialContext: dialFake(func(c net.Conn) {
		b, _ := io.ReadAll(c)
		got <- string(b)
	})}, Upstream{Addr: "u:1", ProxyProtocol: version})
	client, ours := duplex()
	c.Client = addrConn{ours, to, from}
	go func() {
		io.WriteString(client, "hello")
		client.CloseWrite()
		io.ReadAll(client)
		client.Close()
	}()
	r, err := a.ServeConn(t.Context(), c)
	if err != nil || r.Sent != 5 {
		t.Errorf("%+v", r)
	}
	header, ok := strings.CutSuffix(<-got, "hello")
	if !ok {
		t.Errorf("%q lacks what the client sent", header)
	}
	return header
}

func TestProxyHeaderTellsTheAddresses(t *testing.T) {
	four, six := tcpAddr("192.0.2.1:9"), tcpAddr("[2001:db8::1]:9")
	server4, server6 := tcpAddr("198.51.100.2:443"), tcpAddr("[2001:db8::2]:443")
	unix := &net.UnixAddr{Name: "@", Net: "unix"}
	for _, tc := range []struct {
		name     string
		from, to net.Addr
		v1, v2   string // v2 without its signature
	}{
		{"IPv4", four, server4, "PROXY TCP4 192.0.2.1 198.51.100.2 9 443\r\n", v2TCP4[12:]},
		{"IPv6", six, server6, "PROXY TCP6 2001:db8::1 2001:db8::2 9 443\r\n", "\x21\x21\x00\x24" +
			"\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01\x20\x01\x0d\xb8" +
			strings.Repeat("\x00", 11) + "\x02\x00\x09\x01\xbb"},
		{"mixed", six, server4, "PROXY UNKNOWN\r\n", "\x21\x21\x00\x24" +
			"\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01" +
			strings.Repeat("\x00", 10) + "\xff\xff\xc6\x33\x64\x02\x00\x09\x01\xbb"},
		{"no TCP", unix, unix, "PROXY UNKNOWN\r\n", v2Local[12:]},
		{"none", nil, nil, "PROXY UNKNOWN\r\n", v2Local[12:]},
	} {
		if got := headerOf(t, 1, new(Conn), tc.from, tc.to); got != tc.v1 {
			t.Errorf("%s: v1 %q, want %q", tc.name, got, tc.v1)
		}
		if got := headerOf(t, 2, new(Conn), tc.from, tc.to); got != v2Signature+tc.v2 {
			t.Errorf("%s: v2 %q, want %q", tc.name, got, v2Signature+tc.v2)
		}
	}
	// What admit says counts, not where the connection comes from.
	claimed := &Conn{ClientAddr: four, ServerAddr: server4, ClientID: "ann", RateLimit: nil}
	if got := headerOf(t, 2, claimed, six, server6); !strings.HasPrefix(got[14:],
		"\x00\x12"+v2TCP4[16:]) ||
		!strings.HasSuffix(got, "\xe0\x00\x03ann") {
		t.Errorf("with ClientAddr, ServerAddr and ClientID: %q", got)
	}
	if got := headerOf(t, 2, &Conn{ClientID: strings.Repeat("a", 1<<10+1)}, four,
		server4); got != v2TCP4 {
		t.Errorf("with an id that is too long: %q", got)
	}
}

// The header comes before TLS, and tells of the client's.
func TestProxyHeaderComesBeforeTLSAndTellsOfTheClients(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	ca := proxytest.NewAuthority()
	clients := ca.ServerConfig()
	clients.ClientAuth, clients.ClientCAs = tls.RequireAndVerifyClientCert, ca.Pool()
	cert := ca.Client(proxytest.Name("ann"))
	got := make(chan string, 1)
	a, results := newAppOver(t, Options{},
		Upstream{ProxyProtocol: 2, TLS: clientTLS, Addr: upstreamDoing(t, func(c *net.TCPConn) {
			head := make([]byte, 16)
			io.ReadFull(c, head)
			rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
			io.ReadFull(c, rest)
			got <- string(rest[12:])
			tc := tls.Server(c, serverTLS)
			io.Copy(tc, tc)
			tc.Close()
		})})
	c, err := tlsDial(serve(t, a, HandshakeTLS(clients, func(_ context.Context, c *Conn) error {
		c.ClientID, c.Verified = "id", true
		return nil
	})), ca.ClientConfig(&cert))
	if err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	// PP2_TYPE_SSL: TLS and a certificate (7), verified (0), version and common name; then ours.
	want := "\x20\x00\x15\x07\x00\x00\x00\x00" + "\x21\x00\x07TLSv1.3" + "\x22\x00\x03ann" +
		"\xe0\x00\x02id"
	if tlvs := <-got; tlvs != want {
		t.Errorf("got\n%s, want\n%s", hex.Dump([]byte(tlvs)), hex.Dump([]byte(want)))
	}
	c.Close()
	if r := <-results; r.End != EndDone || r.Sent != 1 {
		t.Errorf("%+v", r)
	}
}

// A health check speaks for the app itself.
func TestHealthChecksSendALocalHeader(t *testing.T) {
	for version, want := range map[int]string{1: "PROXY UNKNOWN\r\n", 2: v2Local} {
		got := make(chan string, 8)
		addr := upstreamDoing(t, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			got <- string(b)
		})
		up := Upstream{Addr: addr, ProxyProtocol: version}
		a, _ := newAppOver(t, Options{
			HealthCheck: &HealthCheck{Interval: 10 * time.Millisecond}}, up)
		if text := <-got; text != want {
			t.Errorf("v%d: a check sends %q", version, text)
		}
		a.Close()
		c, err := up.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		for range 8 { // checks may have come, too
			if text := <-got; text == want {
				break
			} else {
				t.Errorf("v%d: Dial sends %q", version, text)
			}
		}
	}
}

// An upstream that takes no header has failed, and the next one gets a header of its own.
func TestRejectedProxyHeaderIsAFailedDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got bytes.Buffer
		a, _ := newAppOver(t, Options{DialTimeout: time.Second,
			DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
				ours, theirs := duplex()
				if addr == "v:1" {
					go func() { io.Copy(&got, theirs); theirs.Close() }()
				} // u does not read
				return ours, nil
			}}, Upstream{Addr: "u:1", ProxyProtocol: 1}, Upstream{Addr: "v:1", ProxyProtocol: 1})
		s := serveFake(t.Context(), a, new(Conn))
		s.CloseWrite()
		r := <-s.result
		took := r.Duration.Round(50 * time.Millisecond) // ends that cross take some ms
		if r.End != EndDone || r.Attempts != 2 || took != time.Second ||
			got.String() != "PROXY UNKNOWN\r\n" {
			t.Errorf("%+v, and %q", r, got.String())
		}
		if u := a.Stats().Upstreams[0]; u.State != StateCooling ||
			!strings.Contains(u.Err.Error(), "PROXY header") {
			t.Errorf("%+v", u)
		}
		s.Close()
	})
}

// Where admit leaves the handshake to the relay, the dial does not wait for it.
func TestProxyHeaderDoesNotWaitForAHandshake(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	for name, side := range map[string]func(net.Conn) net.Conn{
		"TLSServer": func(c net.Conn) net.Conn { return TLSServer(c, serverTLS, 0) },
		"tls.Conn":  func(c net.Conn) net.Conn { return tls.Server(c, serverTLS) },
	} {
		t.Run(name, func(t *testing.T) {
			headers := make(chan string, 2)
			a, results := newAppOver(t, Options{},
				Upstream{ProxyProtocol: 2, Addr: upstreamDoing(t, func(c *net.TCPConn) {
					head := make([]byte, 16)
					io.ReadFull(c, head)
					rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
					io.ReadFull(c, rest)
					headers <- string(rest)
					io.Copy(c, c)
				})})
			addr := serve(t, a, func(_ context.Context, c *Conn) error {
				c.Client = side(c.Client)
				return nil
			})
			silent := dial(t, addr)
			if h := <-headers; len(h) != 12 {
				t.Errorf("the header has %q, want addresses only", h)
			}
			silent.Close()
			if r := <-results; r.End != EndClientError || r.Attempts != 1 {
				t.Errorf("%+v", r)
			}
			c, err := tlsDial(addr, clientTLS)
			if err != nil {
				t.Fatal(err)
			}
			ping(t, c)
			c.Close()
		})
	}
}
