//go:build unix

package cluster

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Connections through a real proxy, from the dial to the first byte. The processor time includes
// client, proxy and upstream: the differences are the limits'.
func BenchmarkConnection(b *testing.B) {
	server := storetest.Redis(b)
	s, _ := dial(b, server.URL(), nil)
	upstream := proxytest.Upstream(b, func(c *net.TCPConn) {
		c.Write([]byte("x"))
		io.Copy(io.Discard, c)
	})
	for _, clients := range []int{1, 16} {
		for name, limit := range map[string]lbproxy.RateLimitManager{
			"off":    nil,
			"local":  &lbproxy.TokenBucket{Burst: 1 << 30, Every: 1},
			"leased": s.Limit("leased", Limit{Burst: 1 << 20, Every: time.Microsecond}),
			"exact":  s.Limit("exact", Limit{Burst: 1 << 20, Every: time.Microsecond, Exact: true}),
		} {
			b.Run(fmt.Sprintf("clients=%d/%s", clients, name), func(b *testing.B) {
				app, err := lbproxy.New("web", []lbproxy.Upstream{{Addr: upstream}}, nil)
				if err != nil {
					b.Fatal(err)
				}
				defer app.Close()
				l := proxytest.Listen(b)
				go app.Serve(l, func(_ context.Context, c *lbproxy.Conn) error {
					c.RateLimit = limit
					return nil
				})
				times := make([]time.Duration, b.N)
				var all sync.WaitGroup
				next := make(chan int)
				before := cpuTime()
				calls := s.Status().Calls
				b.ResetTimer()
				for range clients {
					all.Go(func() {
						for i := range next {
							times[i] = firstByte(b, l.Addr().String())
						}
					})
				}
				for i := range b.N {
					next <- i
				}
				close(next)
				all.Wait()
				b.StopTimer()
				slices.Sort(times)
				b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-µs/op")
				b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
				b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
				b.ReportMetric(float64(s.Status().Calls-calls)/float64(b.N), "calls/op")
			})
		}
	}
}

func firstByte(b *testing.B, addr string) time.Duration {
	began := time.Now()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Error(err)
		return 0
	}
	defer c.(*net.TCPConn).SetLinger(0)
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		b.Error(err)
	}
	return time.Since(began)
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
