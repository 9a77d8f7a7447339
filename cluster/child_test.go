package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
)

// A job is the task of a child process: one proxy of several that share a limit.
type job struct {
	URL     string
	Peers   int
	Timeout time.Duration
	Limit   Limit
	For     time.Duration // how long it lasts
	Rate    float64       // connections a second that ask to be admitted
	Streams int           // move bytes as fast as they may
	Hold    int           // connections it wants to have open, for ever

	begin time.Time // the parent says
}

// A share is the part of the limit that a proxy got.
type share struct {
	In      []int         // let in, by quarter of a second
	Last    time.Duration // when the last one was, from Start
	Longest time.Duration // that one had to wait
	Bytes   int64
	Late    time.Duration // for how long the machine held the process up, at worst
	Held    time.Duration // and in all, for what cannot be made up
	Status  Status
}

func child(what string) {
	var j job
	if err := json.Unmarshal([]byte(what), &j); err != nil {
		panic(err)
	}
	s, err := Dial(j.URL, &Options{Peers: j.Peers, Timeout: j.Timeout})
	if err != nil {
		panic(err)
	}
	m := s.Limit("shared", j.Limit)
	ctx := context.Background()
	if err := s.Ping(context.Background()); err != nil {
		panic(err)
	}
	out := json.NewEncoder(os.Stdout)
	out.Encode("ready")
	if err := json.NewDecoder(os.Stdin).Decode(&j.begin); err != nil {
		panic(err)
	}
	time.Sleep(time.Until(j.begin))
	switch {
	case j.Rate > 0:
		out.Encode(j.opens(ctx, m, s))
	case j.Streams > 0:
		out.Encode(j.streams(ctx, m, s))
	}
	for n := 0; j.Hold > 0; {
		if n < j.Hold && !m.Report(ctx, lbproxy.Event{Kind: lbproxy.EventOpen}).Exceeded {
			n++
			fmt.Println(n)
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.Close()
}

// opens asks at a steady rate. Each connection is one goroutine: a slow answer does not slow the
// others.
func (j job) opens(ctx context.Context, m lbproxy.RateLimitManager, s *Store) share {
	got := share{In: make([]int, int(j.For/(250*time.Millisecond))+80)}
	var mu sync.Mutex
	var all sync.WaitGroup
	late := time.Duration(0)
	for n := 0; ; n++ {
		due := time.Duration(float64(n) / j.Rate * float64(time.Second))
		if due >= j.For {
			break
		}
		time.Sleep(due - time.Since(j.begin))
		was := late
		if late = time.Since(j.begin) - due; late-was > 20*time.Millisecond {
			got.Late, got.Held = max(got.Late, late), got.Held+late-was
		}
		all.Go(func() {
			began := time.Now()
			in := !m.Report(ctx, lbproxy.Event{Kind: lbproxy.EventOpen}).Exceeded
			now := time.Now()
			mu.Lock()
			defer mu.Unlock()
			got.Longest = max(got.Longest, now.Sub(began))
			if at := now.Sub(j.begin); in {
				got.In[min(int(at/(250*time.Millisecond)), len(got.In)-1)]++
				got.Last = max(got.Last, at)
			}
		})
	}
	all.Wait()
	got.Status = s.Status()
	return got
}

func (j job) streams(ctx context.Context, m lbproxy.RateLimitManager, s *Store) share {
	var bytes, held atomic.Int64
	var all sync.WaitGroup
	for range j.Streams {
		all.Go(func() {
			chunk, due, missed := 32<<10, time.Now(), time.Duration(0)
			for time.Since(j.begin) < j.For {
				d := m.Report(ctx, lbproxy.Event{Kind: lbproxy.EventData, Bytes: int64(chunk)})
				bytes.Add(int64(chunk))
				if chunk = 32 << 10; d.Chunk > 0 {
					chunk = min(chunk, d.Chunk)
				}
				// As in the relay, the excess of one wait shortens the next.
				if earliest := time.Now().Add(-50 * time.Millisecond); due.Before(earliest) {
					missed += earliest.Sub(due)
					due = earliest
				}
				due = due.Add(d.Wait)
				time.Sleep(min(time.Until(due), j.For-time.Since(j.begin)))
			}
			held.Add(int64(missed) / int64(j.Streams))
		})
	}
	all.Wait()
	return share{Bytes: bytes.Load(), Held: time.Duration(held.Load()), Status: s.Status()}
}

// A proxy is a child process at a job.
type proxy struct {
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

// start starts a proxy, which waits for begin.
func start(t *testing.T, j job) proxy {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	cmd, in, out := storetest.Child(t, string(text))
	return proxy{cmd, in, bufio.NewScanner(out)}
}

// begin has proxies begin together, once all of them are connected.
func begin(t *testing.T, all ...proxy) time.Time {
	t.Helper()
	for _, p := range all {
		p.line(t)
	}
	at := time.Now().Add(50 * time.Millisecond)
	for _, p := range all {
		if err := json.NewEncoder(p.in).Encode(at); err != nil {
			t.Fatal(err)
		}
	}
	return at
}

// line waits for what p writes next.
func (p proxy) line(t *testing.T) []byte {
	t.Helper()
	if !p.out.Scan() {
		t.Fatal("a child has died: ", p.out.Err())
	}
	return p.out.Bytes()
}

func (p proxy) share(t *testing.T) (got share) {
	t.Helper()
	if err := json.Unmarshal(p.line(t), &got); err != nil {
		t.Fatal(err)
	}
	return got
}
