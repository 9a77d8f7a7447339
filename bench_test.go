package lbproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// The cost of the whole path, over loopback TCP, its clients' and upstreams' included: they allocate nothing for a round
// trip or a MiB, and the same each time for a connection. What a proxy costs beside others is what internal/lab/bench
// measures; these are for seeing what a change does: go test -run '^$' -bench . -cpu 1,2 -count 10, and benchstat.
func BenchmarkRelay(b *testing.B) {
	limits := map[string]RateLimitManager{
		"": nil, "/limited": All(&OpenLimit{Max: 1e6}, &Bandwidth{BytesPerSecond: 1 << 50}),
	}
	for _, suffix := range []string{"", "/limited"} {
		admit := func(_ context.Context, c *Conn) error {
			c.RateLimit = limits[suffix]
			return nil
		}
		b.Run("round trip"+suffix, func(b *testing.B) {
			c := dial(b, benchServe(b, echo, admit))
			c.SetDeadline(time.Time{}) // -benchtime may be long
			msg := make([]byte, 64)
			b.ReportAllocs()
			for b.Loop() {
				if err := benchExchange(c, msg); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("MiB"+suffix, func(b *testing.B) {
			flood := func(c *net.TCPConn) {
				for buf := make([]byte, 256<<10); ; {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			}
			c := dial(b, benchServe(b, flood, admit))
			c.SetDeadline(time.Time{})
			buf := make([]byte, 1<<20)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("connection"+suffix, func(b *testing.B) {
			addr := benchServe(b, benchAnswer, admit)
			b.ReportAllocs()
			for b.Loop() {
				if err := benchConnect(addr); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("connection/parallel", func(b *testing.B) {
		addr := benchServe(b, benchAnswer, nil)
		b.ReportAllocs()
		b.SetParallelism(16)
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := benchConnect(addr); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// benchServe has an app serve on a loopback address, which it returns.
func benchServe(b *testing.B, upstream func(*net.TCPConn), admit AdmitFunc) string {
	a, err := New("bench", []Upstream{{Addr: upstreamDoing(b, upstream)}}, &Options{Logger: quiet})
	if err != nil {
		b.Fatal(err)
	}
	return serve(b, a, admit)
}

// benchAnswer sends one message back and closes.
func benchAnswer(c *net.TCPConn) {
	msg := make([]byte, 64)
	if _, err := io.ReadFull(c, msg); err == nil {
		c.Write(msg)
	}
}

// benchConnect is a client of benchAnswer.
func benchConnect(addr string) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	msg := make([]byte, 64)
	if err := benchExchange(c, msg); err != nil {
		return err
	}
	if n, err := c.Read(msg); n != 0 || err != io.EOF {
		return fmt.Errorf("after the answer: %d bytes, %v, want the end of the stream", n, err)
	}
	return nil
}

func benchExchange(c net.Conn, msg []byte) error {
	if _, err := c.Write(msg); err != nil {
		return err
	}
	_, err := io.ReadFull(c, msg)
	return err
}

func BenchmarkStats(b *testing.B) {
	for _, n := range []int{4, 10_000} {
		b.Run(fmt.Sprintf("upstreams=%d", n), func(b *testing.B) {
			ups := make([]Upstream, n)
			for i := range ups {
				ups[i].Addr = fmt.Sprintf("10.0.%d.%d:1", i/256, i%256)
			}
			a, err := New("bench", ups, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer a.Close()
			b.ReportAllocs()
			for b.Loop() {
				if got := len(a.Stats().Upstreams); got != n {
					b.Fatalf("%d upstreams, want %d", got, n)
				}
			}
		})
	}
}
