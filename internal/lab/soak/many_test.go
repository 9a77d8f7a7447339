package soak

import (
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

// What is promised of many connections at once, beside what the soak does with each.

func TestAThousandStalledConnectionsAreGoneAfterTheIdleTimeout(t *testing.T) {
	const idle, grace = 500 * time.Millisecond, time.Second
	conns := 1000 // each has four descriptors here
	if testing.Short() {
		conns = 200
	}
	var seen atomic.Int64
	upstream := serverDoing(t, func(c *net.TCPConn) {
		seen.Add(1)
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err == nil && first[0] == endNow {
			c.CloseWrite()
		}
		io.Copy(io.Discard, c) // and it never ends what the client does not
		<-t.Context().Done()
	})
	var wrong, early atomic.Int64
	a, err := lbproxy.New("stalled", []lbproxy.Upstream{{Addr: upstream}}, &lbproxy.Options{
		IdleTimeout: idle, Logger: slog.New(slog.DiscardHandler), OnDone: func(r lbproxy.Result) {
			if r.End != lbproxy.EndIdleTimeout {
				wrong.Add(1)
			}
			if r.Duration < idle {
				early.Add(1)
			}
		},
	})
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	serve(t, a, l)
	var lag lag
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { lag.watch(stop) })
	defer watching.Wait()
	defer close(stop)

	said := uint64(0)
	for i := range conns {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		switch i % 4 { // else it says nothing
		case 1, 2:
			_, err = c.Write([]byte{[]byte{0, 0, endNow}[i%4]})
			said++
		case 3:
			err = c.(*net.TCPConn).CloseWrite()
		}
		must(t, err)
	}
	arrived := func() bool {
		s := a.Stats()
		return s.Accepted == uint64(conns) && seen.Load() == int64(conns) && s.Upstreams[0].Sent == said
	}
	if !eventually(patience, arrived) {
		t.Fatalf("not all have arrived: %d, %+v", seen.Load(), a.Stats())
	}
	last := time.Now() // nothing moves from here on
	open := a.Stats().Open
	for ; open > 0; open = a.Stats().Open {
		if now := time.Now(); now.Sub(last) > idle+grace+lag.between(last, now) {
			t.Fatalf("%d are open after %v", open, now.Sub(last))
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("all were gone after %v", time.Since(last))
	if wrong.Load() > 0 || early.Load() > 0 {
		t.Errorf("%d ended for another reason, %d too early", wrong.Load(), early.Load())
	}
}

// endNow is what a client says whose upstream is to end its stream.
const endNow = 'e'

func TestReadersOfAKilobyteASecondCostABoundedAmountOfMemory(t *testing.T) {
	const most = 2 * 64 << 10 // bytes for each
	readers, seconds := 200, 4
	if testing.Short() {
		readers, seconds = 50, 2
	}
	for kind, name := range []string{"TCP", "TLS"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addrs, pid := child(t)
			reader := func(n int64) net.Conn {
				c, err := reader(t, addrs, kind, n)
				must(t, err)
				return c
			}
			reader(1 << 20).Close() // what the first one makes it have
			before := residentMiB(pid)
			var reading sync.WaitGroup
			for i := range readers {
				c := reader(200_000) // enough to be taken for bulk
				reading.Go(func() {
					for range seconds {
						if _, err := io.ReadFull(c, make([]byte, 1<<10)); err != nil {
							t.Errorf("reader %d: %v", i, err)
						}
						time.Sleep(time.Second)
					}
				})
			}
			reading.Wait()
			grown := residentMiB(pid) - before
			t.Logf("%d slow readers: %d MiB, which is %d KiB for each", readers, grown, grown<<10/readers)
			if most := most * memoryFactor; grown<<20 > readers*most {
				t.Errorf("the child has grown by %d MiB: %d KiB for each of %d readers, want at most %d", grown, grown<<10/readers, readers, most>>10)
			}
		})
	}
}
