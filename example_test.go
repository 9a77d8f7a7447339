package lbproxy_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
)

// The examples use upstreams that answer each line with their name, and clients that send one line.

// startUpstream listens on a free port of this machine. Close ends it.
func startUpstream(name string) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					fmt.Fprintf(c, "%s got %s", name, buf[:n])
				}
			}()
		}
	}()
	return l
}

// A client is a connection to a proxy.
type client struct{ net.Conn }

func connect(proxy net.Listener) client {
	c, err := net.Dial("tcp", proxy.Addr().String())
	if err != nil {
		return client{} // reset at once
	}
	return client{c}
}

func (c client) ask(line string) string {
	if c.Conn == nil {
		return "refused"
	}
	buf := make([]byte, 64)
	io.WriteString(c, line)
	n, err := c.Read(buf)
	if err != nil {
		return "refused"
	}
	return string(buf[:n])
}

func listen() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	return l
}

// Three clients, two upstreams. The third client goes where the first two are not both.
func Example() {
	red, green := startUpstream("red"), startUpstream("green")
	defer red.Close()
	defer green.Close()

	app, err := lbproxy.New("demo", []lbproxy.Upstream{
		{Addr: red.Addr().String()},
		{Addr: green.Addr().String()},
	}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	l := listen()
	go app.Serve(l, nil)

	for _, name := range []string{"ann", "bob", "cat"} {
		c := connect(l)
		defer c.Close()
		fmt.Println(c.ask(name))
	}
	// Output:
	// red got ann
	// green got bob
	// red got cat
}

func ExampleNew() {
	_, err := lbproxy.New("db", []lbproxy.Upstream{{Addr: "10.0.0.1:5432"}, {Addr: "10.0.0.2"}},
		nil)
	fmt.Println(err)

	app, err := lbproxy.New("db", []lbproxy.Upstream{
		{Addr: "10.0.0.1:5432", Weight: 2},     // gets two connections for each one of
		{Addr: "10.0.0.2:5432", MaxConns: 100}, // this, which never gets more than 100
	}, &lbproxy.Options{IdleTimeout: 10 * time.Minute})
	fmt.Println(app.Stats().Upstreams[0].State, err)
	// Output:
	// lbproxy: app "db": upstream 1: Addr "10.0.0.2": missing port in address: want host:port
	// up <nil>
}

// A DialContext of your own learns for whom it dials.
func ExampleOptions_dialContext() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}},
		&lbproxy.Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, network, addr)
				client := lbproxy.ConnFromContext(ctx) // nil for a health check
				if err == nil && client != nil {
					fmt.Fprintf(c, "for %s: ", client.ClientID) // if it fails, so does what follows
				}
				return c, err
			},
		})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	l := listen()
	go app.Serve(l, func(_ context.Context, c *lbproxy.Conn) error {
		c.ClientID = "ann"
		return nil
	})

	c := connect(l)
	defer c.Close()
	fmt.Println(c.ask(""))
	// Output:
	// red got for ann:
}

// Serve calls admit for each connection: to refuse it, to say who it is, to limit it. A TLS server
// would do its handshake there.
func ExampleLBProxyApp_Serve() {
	red := startUpstream("red")
	defer red.Close()
	results := make(chan lbproxy.Result, 2)
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}},
		&lbproxy.Options{
			OnDone: func(r lbproxy.Result) { results <- r },
		})
	if err != nil {
		fmt.Println(err)
		return
	}
	admit := func(_ context.Context, c *lbproxy.Conn) error {
		who := make([]byte, 4) // this protocol begins with a name
		if _, err := io.ReadFull(c.Client, who); err != nil {
			return err
		}
		c.ClientID = string(who[:3])
		if c.ClientID == "eve" {
			return errors.New("eve is not welcome")
		}
		return nil
	}
	l := listen()
	ended := make(chan error)
	go func() { ended <- app.Serve(l, admit) }()

	ann, eve := connect(l), connect(l)
	fmt.Println(ann.ask("ann:hello"))
	fmt.Println(eve.ask("eve:"))
	report := func(r lbproxy.Result) {
		fmt.Printf("%s: %s, %d bytes sent, %d received, %v\n", r.ClientID, r.End, r.Sent,
			r.Received,
			r.Err)
	}
	report(<-results)
	ann.Close()
	report(<-results)
	app.Close()
	fmt.Println(<-ended)
	// Output:
	// red got hello
	// refused
	// eve: not-admitted, 0 bytes sent, 0 received, eve is not welcome
	// ann: done, 5 bytes sent, 13 received, <nil>
	// lbproxy: app closed
}

// ServeConn serves one connection that the caller has accepted, and returns its Result.
func ExampleLBProxyApp_ServeConn() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	l := listen()
	defer l.Close()

	c := connect(l)
	var wg sync.WaitGroup
	wg.Go(func() {
		fmt.Println(c.ask("hello"))
		c.Close()
	})
	accepted, err := l.Accept()
	if err != nil {
		fmt.Println(err)
		return
	}
	r, err := app.ServeConn(context.Background(), &lbproxy.Conn{Client: accepted, ClientID: "ann"})
	wg.Wait()
	fmt.Println(r.ClientID, r.End, r.Upstream == red.Addr().String(), r.Attempts, r.Sent,
		r.Received,
		err)
	// Output:
	// red got hello
	// ann done true 1 5 13 <nil>
}

// workingHours is a RateLimitManager in a few lines: it refuses those who come when it is closed.
type workingHours struct{ hour func() int }

func (w workingHours) Report(_ context.Context, e lbproxy.Event) lbproxy.Decision {
	closed := w.hour() < 9 || w.hour() >= 17
	return lbproxy.Decision{Exceeded: e.Kind == lbproxy.EventOpen && closed}
}

func ExampleRateLimitManager() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("office", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	hours := make(chan int, 3)
	// time.Now().Hour, really
	limit := workingHours{hour: func() int { h := <-hours; hours <- h; return h }}
	admit := func(_ context.Context, c *lbproxy.Conn) error {
		c.RateLimit = limit
		return nil
	}
	l := listen()
	go app.Serve(l, admit)

	hours <- 16
	fmt.Println(connect(l).ask("at four"))
	<-hours
	hours <- 17
	fmt.Println(connect(l).ask("at five"))
	// Output:
	// red got at four
	// refused
}

// open shows what a manager says to a connection that opens.
func open(m lbproxy.RateLimitManager) string {
	d := m.Report(context.Background(), lbproxy.Event{Kind: lbproxy.EventOpen})
	return map[bool]string{true: "refused", false: "let in"}[d.Exceeded]
}

func close1(m lbproxy.RateLimitManager) {
	m.Report(context.Background(), lbproxy.Event{Kind: lbproxy.EventClose})
}

func ExampleTokenBucket() {
	limit := &lbproxy.TokenBucket{Burst: 2, Every: time.Hour} // two at once, then one an hour
	fmt.Println(open(limit), open(limit), open(limit))
	// Output: let in let in refused
}

// A client may open ten connections an hour and have two at once. An open that the second manager
// refuses costs nothing at the first.
func ExampleAll() {
	limit := lbproxy.All(
		&lbproxy.TokenBucket{Burst: 10, Every: time.Hour / 10},
		&lbproxy.OpenLimit{Max: 2},
	)
	fmt.Println(open(limit), open(limit), open(limit))
	close1(limit) // one leaves
	fmt.Println(open(limit))
	// Output:
	// let in let in refused
	// let in
}

// One limit for each client, however many connections and apps it uses. A client of IPv6 may use
// every address of its /64, so the network is the client.
func ExampleClientLimits() {
	limits := lbproxy.NewClientLimits(10_000, func(client string) lbproxy.RateLimitManager {
		if strings.HasPrefix(client, "10.") {
			return nil // our own: no limit
		}
		return &lbproxy.OpenLimit{Max: 1}
	})
	of := func(addr string) lbproxy.RateLimitManager {
		ip := netip.MustParseAddr(addr).Unmap()
		network, _ := ip.Prefix(min(ip.BitLen(), 64))
		return limits.For(network.String()) // such as 192.0.2.1/32 or 2001:db8::/64
	}
	fmt.Println(of("10.0.0.7") == nil)
	fmt.Println(open(of("192.0.2.1")), open(of("192.0.2.1")), open(of("192.0.2.2")))
	fmt.Println(open(of("2001:db8::1")), open(of("2001:db8::2")), open(of("2001:db8:0:1::1")))
	// Output:
	// true
	// let in refused let in
	// let in refused let in
}

// SetUpstreams replaces the upstreams while connections are open. A removed upstream keeps its
// connections until they end.
func ExampleLBProxyApp_SetUpstreams() {
	red, green := startUpstream("red"), startUpstream("green")
	defer red.Close()
	defer green.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	l := listen()
	go app.Serve(l, nil)

	ann := connect(l)
	defer ann.Close()
	fmt.Println(ann.ask("ann"))
	if err := app.SetUpstreams([]lbproxy.Upstream{{Addr: green.Addr().String()}}); err != nil {
		fmt.Println(err)
	}
	bob := connect(l)
	defer bob.Close()
	fmt.Println(bob.ask("bob"))
	fmt.Println(ann.ask("ann again"))
	for _, u := range app.Stats().Upstreams {
		fmt.Println("open:", u.Open, "removed:", u.Removed)
	}
	// Output:
	// red got ann
	// green got bob
	// red got ann again
	// open: 1 removed: false
	// open: 1 removed: true
}

// Upstreams in a JSON file are reloaded without a restart, when the program gets a signal for
// example.
func ExampleLBProxyApp_SetUpstreams_json() {
	reload := func(app *lbproxy.LBProxyApp, path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		decoder := json.NewDecoder(f)
		decoder.DisallowUnknownFields() // such as a misspelled key
		var upstreams []lbproxy.Upstream
		if err := decoder.Decode(&upstreams); err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
		return app.SetUpstreams(upstreams)
	}

	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: "10.0.0.1:80"}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "upstreams.json")
	for _, text := range []string{
		`[{"addr": "10.0.0.2:80", "weight": 3}, {"addr": "10.0.0.3:80", "drain": true}]`,
		`[{"addr": "10.0.0.4:80", "wieght": 3}]`, // changes nothing
	} {
		os.WriteFile(path, []byte(text), 0o600)
		fmt.Println(reload(app, path))
		for _, u := range app.Stats().Upstreams {
			fmt.Println(u.Addr, u.Weight, u.Drain)
		}
	}
	// Output:
	// <nil>
	// 10.0.0.2:80 3 false
	// 10.0.0.3:80 1 true
	// upstreams.json: json: unknown field "wieght"
	// 10.0.0.2:80 3 false
	// 10.0.0.3:80 1 true
}

// Upstreams are checked by a function of ours. A dial would find nothing wrong with red, which is
// under maintenance.
func ExampleHealthCheck() {
	red, green := startUpstream("red"), startUpstream("green")
	defer red.Close()
	defer green.Close()
	maintained := red.Addr().String()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{
		{Addr: red.Addr().String()},
		{Addr: green.Addr().String()},
	}, &lbproxy.Options{
		Logger: slog.New(slog.DiscardHandler),
		HealthCheck: &lbproxy.HealthCheck{
			Interval: time.Millisecond, // 5 seconds is more usual
			Check: func(_ context.Context, u lbproxy.Upstream) error {
				if u.Addr == maintained {
					return errors.New("under maintenance")
				}
				return nil
			},
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	l := listen()
	go app.Serve(l, nil)

	for app.Stats().Upstreams[0].State == "up" { // three checks
		time.Sleep(time.Millisecond)
	}
	fmt.Println(connect(l).ask("hello"))
	for _, u := range app.Stats().Upstreams {
		fmt.Println(u.State)
	}
	// Output:
	// green got hello
	// down
	// up
}

// A web server is well if it answers a request for /healthz with 200.
func ExampleHealthCheck_http() {
	red := httptest.NewServer(http.NotFoundHandler())
	defer red.Close()
	green := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer green.Close()

	check := func(ctx context.Context, u lbproxy.Upstream) error {
		transport := &http.Transport{
			DisableKeepAlives: true, // each check makes a new connection, as clients do
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				return u.Dial(ctx) // not the context given here, which may outlive the request
			},
		}
		r, err := http.NewRequestWithContext(ctx, "GET", "http://"+u.Addr+"/healthz", nil)
		if err != nil {
			return err
		}
		answer, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return errors.New("GET /healthz: " + answer.Status)
		}
		return nil
	}

	app, err := lbproxy.New("demo", []lbproxy.Upstream{
		{Addr: red.Listener.Addr().String()},
		{Addr: green.Listener.Addr().String()},
	}, &lbproxy.Options{
		Logger: slog.New(slog.DiscardHandler),
		HealthCheck: &lbproxy.HealthCheck{
			Interval: time.Millisecond, // 5 seconds is more usual
			Check:    check,
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	for app.Stats().Upstreams[0].State == lbproxy.StateUp { // three checks
		time.Sleep(time.Millisecond)
	}
	for _, u := range app.Stats().Upstreams {
		fmt.Println(u.State, u.Err)
	}
	// Output:
	// down GET /healthz: 404 Not Found
	// up <nil>
}

// Shutdown waits for connections to end; Close cuts those that take too long.
func ExampleLBProxyApp_Shutdown() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	l := listen()
	go app.Serve(l, nil)
	ann := connect(l)
	fmt.Println(ann.ask("ann"))

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	fmt.Println(app.Shutdown(ctx))
	fmt.Println(app.Stats().Open, ann.ask("still here?"))
	app.Close()
	fmt.Println(app.Stats().Open, ann.ask("and now?"))
	// Output:
	// red got ann
	// context deadline exceeded
	// 1 red got still here?
	// 0 refused
}

// serverCertificate makes one for localhost, and the roots by which clients know it.
func serverCertificate() (server, client *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{DNSNames: []string{"localhost"},
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "localhost"}
}

// Clients speak TLS. The handshake is over before an upstream is dialed, and a client that closes
// without close_notify is not mistaken for one that ended its stream.
func ExampleHandshakeTLS() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	server, roots := serverCertificate()
	l := listen()
	go app.Serve(l, lbproxy.HandshakeTLS(server, func(_ context.Context, c *lbproxy.Conn) error {
		c.ClientID = c.Client.(*lbproxy.TLSConn).ConnectionState().ServerName
		return nil
	}))

	c, err := tls.Dial("tcp", l.Addr().String(), roots)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	fmt.Println(client{c}.ask("ann"))
	for c := range app.Conns() {
		fmt.Println(c.ClientID, c.Info().State)
	}
	// Output:
	// red got ann
	// localhost open
}

// The config must not change while it is used, but its GetCertificate is called in each handshake:
// a renewed certificate is served without a restart.
func ExampleHandshakeTLS_getCertificate() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}},
		&lbproxy.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	var current atomic.Pointer[tls.Certificate]
	l := listen()
	go app.Serve(l, lbproxy.HandshakeTLS(&tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return current.Load(), nil
		},
	}, nil))

	for range 2 {
		server, roots := serverCertificate()
		current.Store(&server.Certificates[0]) // as of tls.LoadX509KeyPair
		c, err := tls.Dial("tcp", l.Addr().String(), roots)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(client{c}.ask("ann"))
		c.Close()
	}
	// Output:
	// red got ann
	// red got ann
}

// An AdmitFunc around HandshakeTLS limits handshakes, which cost more than connections. It reports
// to a RateLimitManager itself: an EventOpen and, if that is allowed, an EventClose.
func ExampleHandshakeTLS_limited() {
	red := startUpstream("red")
	defer red.Close()
	results := make(chan lbproxy.Result, 2)
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}},
		&lbproxy.Options{OnDone: func(r lbproxy.Result) { results <- r }})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	server, roots := serverCertificate()
	handshake := lbproxy.HandshakeTLS(server, nil)
	limits := lbproxy.NewClientLimits(100_000, func(string) lbproxy.RateLimitManager {
		return lbproxy.All(
			&lbproxy.TokenBucket{Burst: 1, Every: time.Hour}, // in all; 10 a second is more usual
			&lbproxy.OpenLimit{Max: 5},                       // in progress
		)
	})
	l := listen()
	go app.Serve(l, func(ctx context.Context, c *lbproxy.Conn) error {
		addr, err := netip.ParseAddrPort(c.Client.RemoteAddr().String())
		if err != nil {
			return err
		}
		limit := limits.For(addr.Addr().String())
		if d := limit.Report(ctx, lbproxy.Event{Kind: lbproxy.EventOpen}); d.Exceeded {
			return errors.New("too many handshakes")
		}
		defer limit.Report(context.WithoutCancel(ctx), lbproxy.Event{Kind: lbproxy.EventClose})
		return handshake(ctx, c)
	})

	for range 2 {
		c, err := tls.Dial("tcp", l.Addr().String(), roots)
		if err != nil {
			fmt.Println("refused")
		} else {
			fmt.Println(client{c}.ask("ann"))
			c.Close()
		}
		r := <-results
		fmt.Println(r.End, r.Err)
	}
	// Output:
	// red got ann
	// done <nil>
	// refused
	// not-admitted too many handshakes
}

// TLSServer allows other bounds than HandshakeTLS, and another CloseNotify.
func ExampleTLSServer() {
	red := startUpstream("red")
	defer red.Close()
	app, err := lbproxy.New("demo", []lbproxy.Upstream{{Addr: red.Addr().String()}}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer app.Close()
	server, roots := serverCertificate()
	l := listen()
	go app.Serve(l, func(ctx context.Context, c *lbproxy.Conn) error {
		raw := c.Client
		raw.SetDeadline(time.Now().Add(time.Second)) // for clients that stall
		t := lbproxy.TLSServer(raw, server, 4<<10)   // and for those that flood
		t.CloseNotify = lbproxy.CloseNotifyIdle
		if err := t.HandshakeContext(ctx); err != nil {
			return err
		}
		c.Client = t
		return raw.SetDeadline(time.Time{})
	})

	c, err := tls.Dial("tcp", l.Addr().String(), roots)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	fmt.Println(client{c}.ask("ann"))
	// Output:
	// red got ann
}
