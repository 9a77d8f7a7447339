package admin_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func addrs(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("10.%d.%d.%d:80", i>>16, i>>8&255, i&255))
	}
	return all
}

// crowd returns an app with connections that are being dialled until the test ends.
func crowd(t testing.TB, upstreams, conns int) *lbproxy.LBProxyApp {
	ended := make(chan bool, conns)
	app := newApp(t, "web", &lbproxy.Options{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
		DialTimeout: time.Hour,
	}, addrs(upstreams)...)
	for i := range conns {
		_, accepted := net.Pipe()
		go func() {
			c := &lbproxy.Conn{Client: accepted, ClientID: fmt.Sprint("user", i)}
			_, _ = app.ServeConn(context.Background(), c)
			ended <- true
		}()
	}
	t.Cleanup(func() {
		app.Close()
		for range conns {
			<-ended
		}
	})
	proxytest.Eventually(t, "all connections are there", func() bool {
		n := 0
		for range app.Conns() {
			n++
		}
		return n == conns
	})
	return app
}

func BenchmarkStatusPage500Upstreams10000Conns(b *testing.B) {
	h := admin.Handler(listOf(crowd(b, 500, 10_000)), &admin.Options{Info: fullInfo("alice")})
	for b.Loop() {
		get(b, h, "/")
	}
}

func BenchmarkConnsPage500Upstreams10000Conns(b *testing.B) {
	h := admin.Handler(listOf(crowd(b, 500, 10_000)), nil)
	for b.Loop() {
		get(b, h, "/conns?user=user9999")
	}
}

func BenchmarkMetrics10000Upstreams(b *testing.B) {
	h := admin.Handler(listOf(newApp(b, "web", nil, addrs(10_000)...)), nil)
	for b.Loop() {
		get(b, h, "/metrics")
	}
}

// BenchmarkConnection shows what a Recorder costs a connection. Compare the two by benchstat.
func BenchmarkConnection(b *testing.B) {
	for _, name := range []string{"plain", "recorded"} {
		b.Run(name, func(b *testing.B) {
			opts := &lbproxy.Options{}
			if name == "recorded" {
				opts = new(admin.Recorder).Record("web", opts)
			}
			app := newApp(b, "web", opts, proxytest.Upstream(b, func(c *net.TCPConn) {
				_, _ = io.WriteString(c, "x")
			}))
			addr := serve(b, app)
			for b.Loop() {
				c, err := net.Dial("tcp", addr)
				proxytest.Must(b, err)
				_, err = io.ReadAll(c)
				proxytest.Must(b, err)
				c.Close()
			}
		})
	}
}

func BenchmarkRecord(b *testing.B) {
	opts := new(admin.Recorder).Record("web", &lbproxy.Options{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, nil },
	})
	ctx := context.Background()
	for b.Loop() {
		_, _ = opts.DialContext(ctx, "tcp", "")
		opts.OnDone(lbproxy.Result{Duration: time.Second})
	}
}

// The bounds are ten times what is promised: tests of other packages run at the same time.
func TestPagesOfManyAreQuick(t *testing.T) {
	h := admin.Handler(listOf(crowd(t, 500, 10_000)), &admin.Options{Info: fullInfo("alice")})
	large := admin.Handler(listOf(newApp(t, "web", nil, addrs(10_000)...)), nil)
	for _, row := range []struct {
		name string
		most time.Duration
		do   func() string
	}{
		{"/", 500 * time.Millisecond, func() string { return get(t, h, "/") }},
		{"/conns", 500 * time.Millisecond, func() string { return get(t, h, "/conns") }},
		{"/metrics", time.Second, func() string { return get(t, large, "/metrics") }},
	} {
		best, size := time.Hour, 0
		for range 3 {
			began := time.Now()
			size = len(row.do())
			best = min(best, time.Since(began))
		}
		if best > row.most && !proxytest.Race {
			t.Errorf("%s took %v, want at most %v", row.name, best, row.most)
		}
		if row.name != "/metrics" && size > 200<<10 {
			t.Errorf("%s has %d bytes: it is to be paged", row.name, size)
		}
	}
}
