package lbproxy

import (
	"io"
	"net"
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

// Downloads share a Bandwidth equally, the first ones as well as later ones. Fake time counts only
// the waits that the limit causes, so the machine's speed has no part in the shares. How real
// sockets pay for what they move is the subject of TestBandwidthOverRealSockets.
func TestDownloadsShareABandwidthEqually(t *testing.T) {
	for _, rate := range []int64{1 << 20, 10 << 20, 50 << 20} {
		for _, n := range []struct{ first, all int }{{1, 2}, {2, 4}, {4, 16}} {
			synctest.Test(t, func(t *testing.T) {
				a, _ := newApp(t, Options{DialContext: dialFake(flood)}, "u:1")
				limit := &Bandwidth{BytesPerSecond: rate}
				counts := make([]counter, n.all)
				join := func(counts []counter) {
					for i := range counts {
						c := serveFake(t.Context(), a, &Conn{RateLimit: limit})
						go io.Copy(&counts[i], c)
					}
					time.Sleep(time.Second)
				}
				join(counts[:n.first])
				join(counts[n.first:])
				for i := range counts {
					counts[i].Store(0)
				}
				time.Sleep(2 * time.Second)
				fair := float64(2*rate) / float64(n.all)
				for i := range counts {
					if share := float64(counts[i].Load()) / fair; share < 0.9 || share > 1.1 {
						t.Errorf("%d B/s, stream %d of %d: %.3f of a fair share, want 0.9 to 1.1",
							rate, i, n.all, share)
					}
				}
				a.Close()
			})
		}
	}
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
