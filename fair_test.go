package lbproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// flood sends until the connection breaks.
func flood(c net.Conn) {
	for b := make([]byte, 256<<10); ; {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// Downloads over real sockets share a Bandwidth equally, the first one as well as later ones. All
// groups run at once, each with its own limit.
func TestDownloadsShareABandwidthEqually(t *testing.T) {
	settle, measure := time.Second, 2*time.Second
	rates, sizes := []int64{1, 10, 50}, []int{1, 2, 4, 16}
	if testing.Short() {
		settle, measure, rates, sizes = time.Second/2, time.Second, []int64{10}, []int{1, 4}
	}
	up := upstreamDoing(t, func(c *net.TCPConn) { flood(c) })
	var groups []*downloads
	for _, rate := range rates {
		for i, n := range sizes[1:] {
			limit := &Bandwidth{BytesPerSecond: rate << 20}
			a, _ := newApp(t, Options{}, up)
			d := &downloads{rate: rate << 20, joined: n}
			d.addr = serve(t, a, func(_ context.Context, c *Conn) error {
				c.RateLimit = limit
				return nil
			})
			d.join(t, sizes[i])
			groups = append(groups, d)
		}
	}
	time.Sleep(settle)
	for _, d := range groups {
		d.join(t, d.joined)
	}
	time.Sleep(settle)
	unfair := measureShares(t, groups, measure)
	for tries := 1; unfair != "" && tries < 3; tries++ { // a busy machine may pause for some time
		unfair = measureShares(t, groups, measure)
	}
	if unfair != "" {
		t.Error(unfair)
	}
}

// measureShares returns which group does not share equally, or "".
func measureShares(t *testing.T, groups []*downloads, during time.Duration) (unfair string) {
	for _, d := range groups {
		d.mark()
	}
	start := time.Now()
	time.Sleep(during)
	for _, d := range groups {
		least, most, sum := d.shares()
		reached := sum / time.Since(start).Seconds() / float64(d.rate)
		result := fmt.Sprintf("%d MiB/s: %.3f reached, shares of %d streams from %.3f to %.3f",
			d.rate>>20, reached, len(d.counts), least, most)
		t.Log(result)
		// If the rate was not reached, the machine divided its time, not the limit.
		if reached > 0.95 && (least < 0.9 || most > 1.1) {
			unfair = result + ", want 0.9 to 1.1"
		}
	}
	return unfair
}

// downloads are streams that share a limit.
type downloads struct {
	rate   int64 // of the limit, in bytes per second
	joined int   // how many there are in the end
	addr   string
	counts []*counter
	marked []int64
}

// join starts downloads until there are n.
func (d *downloads) join(t *testing.T, n int) {
	for len(d.counts) < n {
		c := new(counter)
		d.counts = append(d.counts, c)
		from := dial(t, d.addr)
		from.SetDeadline(time.Now().Add(time.Minute))
		go io.Copy(c, from)
	}
}

// mark begins a measurement.
func (d *downloads) mark() {
	d.marked = nil
	for _, c := range d.counts {
		d.marked = append(d.marked, c.Load())
	}
}

// shares returns the bytes since mark, and the smallest and largest share of them; 1 is fair.
func (d *downloads) shares() (least, most, sum float64) {
	var got []float64
	for i, c := range d.counts {
		got = append(got, float64(c.Load()-d.marked[i]))
		sum += got[i]
	}
	fair := sum / float64(len(got))
	return slices.Min(got) / fair, slices.Max(got) / fair, sum
}

// A counter is a writer that counts bytes.
type counter struct{ atomic.Int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.Add(int64(len(b)))
	return len(b), nil
}

// pings sends bytes back and forth for so long and returns the longest round trip.
func pings(c net.Conn, during time.Duration) (worst time.Duration, err error) {
	b := []byte("p")
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(time.Millisecond) {
		start := time.Now()
		if _, err := c.Write(b); err != nil {
			return worst, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return worst, err
		}
		worst = max(worst, time.Since(start))
	}
	return worst, nil
}

// Fake time counts only the waits that the limit causes.
func TestPingBesideBulkIsQuick(t *testing.T) {
	for _, tt := range []struct {
		rate, burst int64
		bulk        int
	}{
		{10 << 20, 0, 1}, {10 << 20, 0, 50},
		{1 << 20, 1 << 20, 1}, {1 << 20, 1 << 20, 50},
		{100 << 10, 1 << 20, 1}, {100 << 10, 1 << 20, 50},
	} {
		synctest.Test(t, func(t *testing.T) {
			a, _ := newApp(t, Options{DialContext: dialFake(func(c net.Conn) {
				b := make([]byte, 1)
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				if b[0] == 'b' {
					flood(c)
				}
				c.Write(b)
				io.Copy(c, c)
			})}, "u:1")
			limit := &Bandwidth{BytesPerSecond: tt.rate, Burst: tt.burst}
			all := []served{serveFake(t.Context(), a, &Conn{RateLimit: limit})}
			ping(t, all[0])
			for range tt.bulk {
				c := serveFake(t.Context(), a, &Conn{RateLimit: limit})
				all = append(all, c)
				c.Write([]byte("b"))
				go io.Copy(io.Discard, c)
			}
			worst, err := pings(all[0], 15*time.Second) // the burst takes 10
			t.Logf("%d B/s, burst %d, %d bulk streams: worst ping %v", tt.rate, tt.burst,
				tt.bulk, worst)
			if worst > 100*time.Millisecond || err != nil {
				t.Errorf("%v, want 100 ms at most; %v", worst, err)
			}
			a.Close()
			for _, c := range all {
				<-c.result
				c.Close()
			}
		})
	}
}
