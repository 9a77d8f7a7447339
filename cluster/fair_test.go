package cluster

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A proxy's part of a shared bandwidth is like a Bandwidth of that size: the same waits, and chunks
// of the same size.
func TestPartOfABandwidthIsLikeABandwidth(t *testing.T) {
	s, _ := dial(t, "redis://"+miniredis.RunT(t).Addr(), &Options{Peers: 4})
	stopFlusher(s) // so that it stays an even part
	shared := s.Limit("k", Limit{BytesPerSecond: 16 << 20})
	local := &lbproxy.Bandwidth{BytesPerSecond: 4 << 20}
	e := lbproxy.Event{Kind: lbproxy.EventOpen}
	for i := range 200 {
		got, want := shared.Report(t.Context(), e), local.Report(t.Context(), e)
		if want.Chunk == 0 || got.Chunk < want.Chunk*9/10 || got.Chunk > want.Chunk*11/10 {
			t.Fatalf("event %d: chunks of %d, want %d", i, got.Chunk, want.Chunk)
		}
		if d := (got.Wait - want.Wait).Abs(); d > want.Wait/10+100*time.Millisecond {
			t.Fatalf("event %d: wait %v, want %v", i, got.Wait, want.Wait)
		}
		e = lbproxy.Event{Kind: lbproxy.EventData, Direction: lbproxy.Download,
			Bytes: int64(want.Chunk)}
	}
}

// Two proxies share a bandwidth. On each, downloads get equal shares, whenever they began, and a
// small request does not wait for them.
func TestSharedBandwidthIsFair(t *testing.T) {
	if testing.Short() {
		t.Skip("it measures over real sockets, which needs a machine that is not too busy")
	}
	t.Parallel()
	const rate, proxies, each = 512 << 10, 2, 4
	server := storetest.Redis(t)
	upstream := proxytest.Upstream(t, func(c *net.TCPConn) {
		kind := make([]byte, 1)
		if io.ReadFull(c, kind); kind[0] == 'p' {
			io.Copy(c, c)
			return
		}
		for b := make([]byte, 64<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	var addrs [proxies]string
	var served atomic.Int64 // the last one is not limited
	for i := range addrs {
		s, _ := dial(t, server.URL(), &Options{Timeout: storetest.Patience, Peers: proxies})
		app, err := lbproxy.New("web", []lbproxy.Upstream{{Addr: upstream}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		limit := s.Limit("k", Limit{BytesPerSecond: rate})
		addrs[i] = serveApp(t, app, func(_ context.Context, c *lbproxy.Conn) error {
			if served.Add(1) <= proxies*(each+1) {
				c.RateLimit = limit
			}
			return nil
		})
	}
	var counts [proxies][each]atomic.Int64
	var downloads sync.WaitGroup
	t.Cleanup(downloads.Wait) // after those of the connections
	join := func(p, i int) {
		c := proxytest.Dial(t, addrs[p])
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, "d")
		downloads.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := c.Read(buf)
				if counts[p][i].Add(int64(n)); err != nil {
					return
				}
			}
		})
	}
	for i := range each {
		for p := range proxies {
			join(p, i)
		}
		time.Sleep(length() / 10) // each joins the earlier ones
	}
	time.Sleep(500 * time.Millisecond)

	var pings [3][]time.Duration
	var pinging [len(pings)]net.Conn // one at each proxy, and one that shows what the machine can do
	for i := range pinging {
		c := proxytest.Dial(t, addrs[i%proxies])
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, "p")
		if err := proxytest.Ping(c); err != nil {
			t.Fatal(err)
		}
		pinging[i] = c
	}
	var marked [proxies][each]int64
	for p := range counts {
		for i := range counts[p] {
			marked[p][i] = counts[p][i].Load()
		}
	}
	for began := time.Now(); time.Since(began) < length(); time.Sleep(10 * time.Millisecond) {
		for i, c := range pinging {
			at := time.Now()
			if err := proxytest.Ping(c); err != nil {
				t.Fatal(err)
			}
			pings[i] = append(pings[i], time.Since(at))
		}
	}
	for p := range counts {
		var got []float64
		sum := 0.0
		for i := range counts[p] {
			got = append(got, float64(counts[p][i].Load()-marked[p][i]))
			sum += got[i]
		}
		least, most := slices.Min(got)*each/sum, slices.Max(got)*each/sum
		t.Logf("proxy %d: %.3f of the rate, shares from %.3f to %.3f", p,
			sum/length().Seconds()/rate, least, most)
		if least < 0.8 || most > 1.2 {
			t.Errorf("proxy %d: shares from %.3f to %.3f, want 0.8 to 1.2", p, least, most)
		}
	}
	var medians [len(pings)]time.Duration
	for i := range pings {
		slices.Sort(pings[i])
		medians[i] = pings[i][len(pings[i])/2]
	}
	t.Logf("%d pings, medians %v, of one without a limit %v", len(pings[0]), medians[:proxies],
		medians[proxies])
	for _, median := range medians[:proxies] {
		if median > 50*time.Millisecond+4*medians[proxies] {
			t.Errorf("a ping takes %v", median)
		}
	}
}
