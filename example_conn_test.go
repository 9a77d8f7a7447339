package lbproxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/danielepagano/lbproxy"
)

// demoApp serves upstreams on a listener until stop is called.
func demoApp(opts *lbproxy.Options, admit lbproxy.AdmitFunc, upstreams ...lbproxy.Upstream) (
	app *lbproxy.LBProxyApp, l net.Listener, stop func(),
) {
	app, err := lbproxy.New("demo", upstreams, opts)
	if err != nil {
		panic(err)
	}
	l = listen()
	go app.Serve(l, admit)
	return app, l, func() { app.Close() }
}

// Any holder of a Conn can end it: an administrator, a reload that takes away a right, a timer.
func ExampleConn_Abort() {
	red := startUpstream("red")
	defer red.Close()
	results := make(chan lbproxy.Result, 1)
	app, l, stop := demoApp(&lbproxy.Options{OnDone: func(r lbproxy.Result) { results <- r }},
		func(_ context.Context, c *lbproxy.Conn) error {
			c.ClientID = "ann"
			return nil
		}, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	ann := connect(l)
	defer ann.Close()
	fmt.Println(ann.ask("hello"))
	for c := range app.Conns() {
		if c.ClientID == "ann" {
			c.Abort(errors.New("ann has left the company"))
		}
	}
	r := <-results
	fmt.Println(r.End, r.Err)
	// Output:
	// red got hello
	// canceled ann has left the company
}

// Conns lists the open connections, the oldest first.
func ExampleLBProxyApp_Conns() {
	red := startUpstream("red")
	defer red.Close()
	names := make(chan string, 2)
	app, l, stop := demoApp(nil, func(_ context.Context, c *lbproxy.Conn) error {
		c.ClientID = <-names
		return nil
	}, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	for _, name := range []string{"ann", "bob"} {
		names <- name
		c := connect(l)
		defer c.Close()
		c.ask("hello")
	}
	for c := range app.Conns() {
		info := c.Info()
		fmt.Println(c.ClientID, info.State, info.Upstream == red.Addr().String())
	}
	// Output:
	// ann open true
	// bob open true
}

// Value holds a program's own data about a connection, for its hooks and for Conns.
func ExampleConn_value() {
	red := startUpstream("red")
	defer red.Close()
	type request struct{ room string }
	done := make(chan string, 1)
	_, l, stop := demoApp(&lbproxy.Options{
		OnDone: func(r lbproxy.Result) { done <- r.Conn.Value.(request).room },
	}, func(_ context.Context, c *lbproxy.Conn) error {
		c.Value = request{room: "kitchen"}
		return nil
	}, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	c := connect(l)
	fmt.Println(c.ask("ann"))
	c.Close()
	fmt.Println(<-done)
	// Output:
	// red got ann
	// kitchen
}

// A web client that cannot be served gets a 503 response.
func ExampleConn_onRefused() {
	quiet := &lbproxy.Options{Logger: slog.New(slog.DiscardHandler)}
	_, l, stop := demoApp(quiet, func(_ context.Context, c *lbproxy.Conn) error {
		c.OnRefused = func(c net.Conn, err error) {
			status, text := 503, "Service Unavailable"
			if errors.Is(err, lbproxy.ErrRateLimited) {
				status, text = 429, "Too Many Requests"
			}
			fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
				status, text)
		}
		return nil
	}, lbproxy.Upstream{Addr: "127.0.0.1:1", Drain: true}) // nobody gets to this one
	defer stop()

	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: demo\r\n\r\n")
	line := make([]byte, 32)
	io.ReadFull(c, line)
	fmt.Printf("%q\n", line)
	// Output:
	// "HTTP/1.1 503 Service Unavailable"
}

// A Result is a slog.LogValuer: an access log is a line of code. With the key "" its fields are not
// nested.
func ExampleResult_LogValue() {
	red := startUpstream("red")
	defer red.Close()
	access := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr { // what differs from run to run
			switch a.Key {
			case slog.TimeKey, "client", "upstream", "duration":
				return slog.Attr{}
			}
			return a
		},
	}))
	logged := make(chan bool, 1)
	_, l, stop := demoApp(&lbproxy.Options{
		OnDone: func(r lbproxy.Result) {
			access.Info("connection", "", r)
			logged <- true
		},
	}, func(_ context.Context, c *lbproxy.Conn) error {
		c.ClientID = "ann"
		return nil
	}, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	c := connect(l)
	c.ask("hello")
	c.Close()
	<-logged
	// Output:
	// level=INFO msg=connection app=demo end=done attempts=1 sent=5 received=13 client_id=ann
}

// Behind another proxy, the client's address comes in a header. Only that proxy is believed.
func ExampleAcceptProxy() {
	red := startUpstream("red")
	defer red.Close()
	trusted := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"),
		netip.MustParsePrefix("::1/128")}
	_, l, stop := demoApp(nil,
		lbproxy.AcceptProxy(trusted, func(_ context.Context, c *lbproxy.Conn) error {
			fmt.Println("client:", c.ClientAddr)
			return nil
		}), lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	c := connect(l) // in place of the other proxy
	defer c.Close()
	io.WriteString(c, "PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n")
	fmt.Println(c.ask("ann"))
	// Output:
	// client: 192.0.2.1:50000
	// red got ann
}

// A PROXY protocol header tells the upstream the client's address.
func ExampleUpstream_proxyProtocol() {
	l := listen()
	defer l.Close()
	header := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		line := make([]byte, 128)
		n, _ := c.Read(line)
		header <- string(line[:n])
	}()
	_, proxy, stop := demoApp(nil, func(_ context.Context, c *lbproxy.Conn) error {
		// or as AcceptProxy sets it
		c.ClientAddr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 50000}
		c.ServerAddr = &net.TCPAddr{IP: net.IPv4(198, 51, 100, 2), Port: 443}
		return nil
	}, lbproxy.Upstream{Addr: l.Addr().String(), ProxyProtocol: 1})
	defer stop()

	defer connect(proxy).Close()
	fmt.Printf("%q\n", <-header)
	// Output:
	// "PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n"
}

// A draining upstream keeps its connections and gets no new ones.
func ExampleUpstream_drain() {
	red, green := startUpstream("red"), startUpstream("green")
	defer red.Close()
	defer green.Close()
	upstreams := []lbproxy.Upstream{{Addr: red.Addr().String()}, {Addr: green.Addr().String()}}
	app, l, stop := demoApp(nil, nil, upstreams...)
	defer stop()

	ann := connect(l)
	defer ann.Close()
	fmt.Println(ann.ask("ann"))
	upstreams[0].Drain = true
	if err := app.SetUpstreams(upstreams); err != nil {
		fmt.Println(err)
	}
	for range 2 {
		bob := connect(l)
		defer bob.Close()
		fmt.Println(bob.ask("bob"))
	}
	fmt.Println(ann.ask("ann again"))
	s := app.Stats().Upstreams[0]
	fmt.Println("drained:", s.Drain && s.Open == 0)
	// Output:
	// red got ann
	// green got bob
	// green got bob
	// red got ann again
	// drained: false
}

// Changes of upstreams, for an alarm or a metric.
func ExampleOptions_onUpstream() {
	const gone = "127.0.0.1:1" // nobody listens there
	red := startUpstream("red")
	defer red.Close()
	changes := make(chan lbproxy.UpstreamChange, 10)
	app, l, stop := demoApp(&lbproxy.Options{
		OnUpstream: func(c lbproxy.UpstreamChange) { changes <- c },
		Logger:     slog.New(slog.DiscardHandler),
	}, nil, lbproxy.Upstream{Addr: gone},
		lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	c := connect(l)
	defer c.Close()
	fmt.Println(c.ask("ann"))
	change := <-changes
	fmt.Println(change.App, change.From, "to", change.To, change.Err != nil)
	app.SetUpstreams([]lbproxy.Upstream{{Addr: red.Addr().String()}})
	change = <-changes
	fmt.Println(change.Addr == gone, "removed:", change.Removed)
	slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr { // other each time
			if a.Key == slog.TimeKey || a.Key == "upstream" {
				return slog.Attr{}
			}
			return a
		},
	})).Info("upstream", "", change)
	// Output:
	// red got ann
	// demo up to cooling true
	// true removed: true
	// level=INFO msg=upstream app=demo from=cooling to=up removed=true
}

// With CloseOnDown no connection stays on a server that its checks have given up.
func ExampleOptions_closeOnDown() {
	red := startUpstream("red")
	defer red.Close()
	sick := make(chan bool)
	ends := make(chan lbproxy.EndReason, 1)
	_, l, stop := demoApp(&lbproxy.Options{
		CloseOnDown: true,
		HealthCheck: &lbproxy.HealthCheck{
			Interval: 10 * time.Millisecond,
			Fall:     1,
			Check: func(context.Context, lbproxy.Upstream) error {
				select {
				case <-sick:
					return errors.New("replication is broken")
				default:
					return nil
				}
			},
		},
		OnDone: func(r lbproxy.Result) { ends <- r.End },
		Logger: slog.New(slog.DiscardHandler),
	}, nil, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()

	c := connect(l)
	defer c.Close()
	fmt.Println(c.ask("ann"))
	close(sick)
	fmt.Println(<-ends)
	// Output:
	// red got ann
	// upstream-error
}

// A health check speaks the upstream's protocol over a connection like a client's, with TLS and a
// PROXY header if the upstream has them.
func ExampleUpstream_Dial() {
	red := startUpstream("red")
	defer red.Close()
	checked := make(chan string, 100)
	_, _, stop := demoApp(&lbproxy.Options{HealthCheck: &lbproxy.HealthCheck{
		Interval: 100 * time.Millisecond,
		Check: func(ctx context.Context, u lbproxy.Upstream) error {
			c, err := u.Dial(ctx)
			if err != nil {
				return err
			}
			defer c.Close()
			if deadline, ok := ctx.Deadline(); ok {
				c.SetDeadline(deadline)
			}
			answer := client{c}.ask("are you well?")
			checked <- answer
			if answer != "red got are you well?" {
				return errors.New("it answers " + answer)
			}
			return nil
		},
	}}, nil, lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()
	fmt.Println(<-checked)
	// Output:
	// red got are you well?
}

// Two proxies with few connections each do not both begin with the first upstream.
func ExampleLBProxyApp_SetPeers() {
	red, green := startUpstream("red"), startUpstream("green")
	defer red.Close()
	defer green.Close()
	upstreams := []lbproxy.Upstream{{Addr: red.Addr().String()}, {Addr: green.Addr().String()}}
	for i := range 2 {
		app, l, stop := demoApp(nil, nil, upstreams...)
		defer stop()
		if err := app.SetPeers(lbproxy.Peers{Index: i, Count: 2}); err != nil {
			fmt.Println(err)
		}
		c := connect(l)
		defer c.Close()
		fmt.Println("proxy", i, c.ask("ann"))
	}
	// Output:
	// proxy 0 red got ann
	// proxy 1 green got ann
}

// Stats are counters for whatever collects metrics. Package mtlsserver/admin has an http.Handler that
// serves these and more to Prometheus.
func ExampleLBProxyApp_Stats() {
	red := startUpstream("red")
	defer red.Close()
	ended := make(chan bool, 1)
	app, l, stop := demoApp(&lbproxy.Options{OnDone: func(lbproxy.Result) { ended <- true }}, nil,
		lbproxy.Upstream{Addr: red.Addr().String()})
	defer stop()
	ann := connect(l)
	ann.ask("ann")
	ann.Close()
	<-ended
	bob := connect(l)
	defer bob.Close()
	bob.ask("bob")

	s := app.Stats()
	fmt.Printf("connections_open{app=%q} %d\n", s.App, s.Open)
	fmt.Printf("connections_accepted_total{app=%q} %d\n", s.App, s.Accepted)
	fmt.Printf("connections_ended_total{app=%q,end=\"done\"} %d\n", s.App, s.Ends[lbproxy.EndDone])
	for _, u := range s.Upstreams {
		fmt.Printf("upstream_up{app=%q} %v\n", s.App, u.State == lbproxy.StateUp)
	}
	// Output:
	// connections_open{app="demo"} 1
	// connections_accepted_total{app="demo"} 2
	// connections_ended_total{app="demo",end="done"} 1
	// upstream_up{app="demo"} true
}
