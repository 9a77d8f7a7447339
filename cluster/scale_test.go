package cluster

import (
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

var scale = flag.Duration("scale", 0,
	"measure 20 real proxies and 200 upstreams for so long, such as 2m, after a minute")

// Twenty real apps, each with its own store, and two hundred upstreams over loopback. The
// simulation has 1.25 rotated, 2.08 in slice order.
func TestAtScale(t *testing.T) {
	if *scale == 0 {
		t.Log("it takes minutes: run it with -scale 2m")
		return
	}
	const proxies, upstreams, load, mean = 20, 200, 10, simMean
	server := storetest.Redis(t)
	var all []lbproxy.Upstream
	for range upstreams {
		all = append(all, lbproxy.Upstream{Addr: proxytest.Upstream(t,
			func(c *net.TCPConn) { io.Copy(io.Discard, c) })})
	}
	var apps []*lbproxy.LBProxyApp
	var addrs []string
	var stores []*Store
	for range proxies {
		app, err := lbproxy.New("web", all, nil)
		if err != nil {
			t.Fatal(err)
		}
		l := proxytest.Listen(t)
		served := make(chan struct{})
		go func() {
			defer close(served)
			app.Serve(l, nil)
		}()
		t.Cleanup(func() {
			app.Close()
			<-served
		})
		s, _ := dial(t, server.URL(), nil)
		own := map[string]*lbproxy.LBProxyApp{"web": app}
		m, err := s.Join(Self{Apps: func() map[string]*lbproxy.LBProxyApp { return own }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Leave)
		apps, addrs, stores = append(apps, app), append(addrs, l.Addr().String()), append(stores, s)
	}

	rng := rand.New(rand.NewPCG(1, 1))
	lasting := sim{rng: rng}
	begin := time.Now()
	end := begin.Add(time.Minute + *scale)
	var clients sync.WaitGroup
	defer clients.Wait()
	over := make(chan struct{})
	defer close(over)
	var ratios []float64
	for arrival, sample := begin, begin.Add(time.Minute); ; {
		next := arrival
		if sample.Before(next) {
			next = sample
		}
		if next.After(end) {
			break
		}
		time.Sleep(time.Until(next))
		if next.Equal(sample) {
			open := map[string]int{}
			for _, app := range apps {
				for _, u := range app.Stats().Upstreams {
					open[u.Addr] += u.Open
				}
			}
			most, sum := 0, 0
			for _, n := range open {
				most, sum = max(most, n), sum+n
			}
			ratios = append(ratios, float64(most)*upstreams/float64(sum))
			sample = sample.Add(time.Second)
			continue
		}
		addr, d := addrs[rng.IntN(proxies)], time.Duration(lasting.lasting()*float64(time.Second))
		clients.Go(func() {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			select {
			case <-time.After(d):
			case <-over:
			}
		})
		pause := rng.ExpFloat64() * mean / (load * upstreams)
		arrival = arrival.Add(time.Duration(pause * float64(time.Second)))
	}
	ratio := 0.0
	for _, r := range ratios {
		ratio += r / float64(len(ratios))
	}
	slices.Sort(ratios)
	calls := uint64(0)
	for _, s := range stores {
		calls += s.Status().Calls
		if n := s.Status().Failures; n > 0 {
			t.Logf("%d calls failed", n)
		}
	}
	t.Logf("max/mean %.2f (median %.2f, %d samples), of the simulation 1.25; "+
		"%.1f calls a second by each proxy",
		ratio, ratios[len(ratios)/2], len(ratios),
		float64(calls)/time.Since(begin).Seconds()/proxies)
	if ratio > 1.4 {
		t.Error("the simulation says 1.25, in slice order 2.08")
	}
}
