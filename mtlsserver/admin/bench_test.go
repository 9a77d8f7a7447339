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

// crowd returns an app with connections that are being dialed until the test ends.
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
	opts := new(admin.Recorder).Record("web", nil)
	for b.Loop() {
		opts.OnDone(lbproxy.Result{Duration: time.Second, DialTime: time.Millisecond})
	}
}

// The size of a page is bounded. BenchmarkStatusPage… and the other benchmarks measure pages.
func TestPagesOfManyAreBounded(t *testing.T) {
	t.Parallel()
	h := admin.Handler(listOf(crowd(t, 500, 10_000)), &admin.Options{Info: fullInfo("alice")})
	for _, path := range []string{"/", "/conns"} {
		if size := len(get(t, h, path)); size > 200<<10 {
			t.Errorf("%s has %d bytes, want at most 200 KiB", path, size)
		}
	}
}
