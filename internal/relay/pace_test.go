package relay_test

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/relay"
)

func TestPacerStepByStep(t *testing.T) {
	type step struct {
		n     int
		wait  time.Duration
		chunk int // what the limit says
		want  int // what may move next
	}
	const ms, KiB = time.Millisecond, 1 << 10
	for _, tt := range []struct {
		name  string
		first int
		steps []step
	}{
		{"what the limit says counts", 4 * KiB,
			[]step{{4 * KiB, time.Second, 100, 100}, {100, 0, 1 << 30, 1 << 30}, {1, 0, 512, 512}}},
		{"a chunk that nothing holds grows until it has no bound", 4 * KiB,
			[]step{{1, 0, 0, 8 * KiB}, {1, 0, 0, 16 * KiB}, {1, 0, 0, 32 * KiB},
				{1, 0, 0, 64 * KiB},
				{1, 0, 0, 128 * KiB}, {1, 0, 0, 256 * KiB}, {1, 0, 0, 512 * KiB},
				{1, 0, 0, 1024 * KiB},
				{1, 0, 0, math.MaxInt}, {1, 0, 0, math.MaxInt}}},
		{"a short wait changes nothing without a bound", 0,
			[]step{{1000, 20 * ms, 0, math.MaxInt}}},
		{"a longer one sets it to 20 ms' worth", 0,
			[]step{{21_000, 21 * ms, 0, 20_000}}},
		{"a long wait scales the chunk", 64 * KiB,
			[]step{{100_000, 200 * ms, 0, 10_000}}},
		{"between 20 and 40 ms it halves", 64 * KiB,
			[]step{{64 * KiB, 21 * ms, 0, 32 * KiB}, {1, 40 * ms, 0, 16 * KiB}}},
		{"below 20 ms it grows by 4 KiB, up to 1 MiB", 1020 * KiB,
			[]step{{1, 1, 0, 1024 * KiB}, {1, 20 * ms, 0, 1024 * KiB}}},
		{"512 bytes is the least", 64 * KiB,
			[]step{{1, time.Hour, 0, 512}, {512, 30 * ms, 0, 512}, {0, math.MaxInt64, 0, 512}}},
		{"a negative wait is none", 4 * KiB,
			[]step{{1, math.MinInt64, 0, 8 * KiB}}},
	} {
		p := relay.Pacer{Chunk: tt.first}
		for i, s := range tt.steps {
			p.Moved(s.n, s.wait, s.chunk)
			if got := p.Limit(math.MaxInt); got != s.want {
				t.Errorf("%s: step %d: at most %d bytes next, want %d", tt.name, i, got, s.want)
				break
			}
		}
		if got := p.Limit(7); got != 7 {
			t.Errorf("%s: %d of 7 bytes", tt.name, got)
		}
	}
}

func TestPacerKeepsAccountOfWaits(t *testing.T) {
	type step struct{ wait, pause, really time.Duration }
	const us, ms = time.Microsecond, time.Millisecond
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"what is less than a millisecond is added up",
			[]step{{400 * us, 0, 0}, {500 * us, 0, 0}, {100 * us, 1 * ms, 1 * ms},
				{999 * us, 0, 0}}},
		{"a late timer shortens the next pause",
			[]step{{5 * ms, 5 * ms, 6 * ms}, {5 * ms, 4 * ms, 7 * ms}, {3 * ms, 0, 0},
				{2 * ms, 2 * ms, 2 * ms}}},
		{"by 20 ms at most",
			[]step{{5 * ms, 5 * ms, time.Hour}, {25 * ms, 5 * ms, 5 * ms}}},
		{"a pause that was cut short goes on",
			[]step{{5 * ms, 5 * ms, 2 * ms}, {5 * ms, 8 * ms, 8 * ms}}},
		{"the longest wait there is does not overflow",
			[]step{{999 * us, 0, 0}, {math.MaxInt64, 1<<62 + 999*us, 0}}},
		{"a negative wait is none",
			[]step{{math.MinInt64, 0, 0}, {1 * ms, 1 * ms, 1 * ms}}},
	} {
		var p relay.Pacer
		for i, s := range tt.steps {
			got := p.Moved(1, s.wait, 0)
			if got != s.pause {
				t.Errorf("%s: step %d: pause %v, want %v", tt.name, i, got, s.pause)
				break
			}
			if got > 0 {
				p.Paused(s.really)
			}
		}
	}
}

// A stream is one direction of a relay in virtual time: it moves what its Pacer allows, reports
// that, and pauses.
type stream struct {
	limit   lbproxy.RateLimitManager
	most    int        // bytes it can move at once
	late    *rand.Rand // timers fire up to a millisecond late; nil: on time
	bytes   atomic.Int64
	longest time.Duration // pause
	pacer   relay.Pacer
}

func newStream(limit lbproxy.RateLimitManager, most int) *stream {
	s := &stream{limit: limit, most: most}
	s.pacer.Chunk = 4 << 10
	d := limit.Report(context.Background(), lbproxy.Event{Kind: lbproxy.EventOpen})
	if d.Chunk > 0 {
		s.pacer.Chunk = min(s.pacer.Chunk, d.Chunk)
	}
	return s
}

// move moves as much as it can, at 2 GB/s and 10 µs a call.
func (s *stream) move() {
	n := s.pacer.Limit(s.most)
	time.Sleep(10*time.Microsecond + time.Duration(n)/2)
	e := lbproxy.Event{Kind: lbproxy.EventData, Bytes: int64(n)}
	d := s.limit.Report(context.Background(), e)
	s.bytes.Add(int64(n))
	pause := s.pacer.Moved(n, d.Wait, d.Chunk)
	s.longest = max(s.longest, pause)
	if pause > 0 {
		if s.late != nil {
			pause += time.Duration(s.late.Int64N(int64(time.Millisecond)))
		}
		time.Sleep(pause)
		s.pacer.Paused(pause)
	}
}

// run moves bytes until stop is called.
func run(streams ...*stream) (stop func()) {
	var wg sync.WaitGroup
	var over atomic.Bool
	for _, s := range streams {
		wg.Go(func() {
			for !over.Load() {
				s.move()
			}
		})
	}
	return func() {
		over.Store(true)
		wg.Wait()
	}
}

// rates returns what each stream moves per second during the next two.
func rates(streams []*stream) (each []float64, all float64) {
	for _, s := range streams {
		each = append(each, -float64(s.bytes.Load())/2)
	}
	time.Sleep(2 * time.Second)
	for i, s := range streams {
		each[i] += float64(s.bytes.Load()) / 2
		all += each[i]
	}
	return each, all
}

// debtor is a limit as a user might write it. It says how long to wait, and nothing of chunks.
type debtor struct {
	mu   sync.Mutex
	rate int64
	paid time.Time
}

func (b *debtor) Report(_ context.Context, e lbproxy.Event) lbproxy.Decision {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); b.paid.Before(now) {
		b.paid = now
	}
	b.paid = b.paid.Add(time.Duration(e.Bytes * int64(time.Second) / b.rate))
	return lbproxy.Decision{Wait: time.Until(b.paid)}
}

func TestStreamsShareARateEqually(t *testing.T) {
	const KiB, MiB = 1 << 10, 1 << 20
	bandwidth := func(rate int64) lbproxy.RateLimitManager {
		return &lbproxy.Bandwidth{BytesPerSecond: rate, Burst: rate / 2}
	}
	for _, tt := range []struct {
		name   string
		limit  func(rate int64) lbproxy.RateLimitManager
		pieces []int // that the streams move at most
		rates  []int64
		off    float64 // from the fair share, at most
	}{
		{"Bandwidth", bandwidth, []int{512 * KiB}, []int64{1 * MiB, 10 * MiB, 50 * MiB}, 0.1},
		{"Bandwidth, various buffers", bandwidth, []int{512 * KiB, 64 * KiB, 16 * KiB},
			[]int64{1 * MiB, 10 * MiB, 50 * MiB}, 0.1},
		{"a limit that does not set Chunk", func(rate int64) lbproxy.RateLimitManager {
			return &debtor{rate: rate}
		}, []int{512 * KiB}, []int64{10 * MiB}, 0.3}, // at other rates it takes longer
	} {
		for _, rate := range tt.rates {
			for _, n := range []int{1, 2, 4, 16} {
				synctest.Test(t, func(t *testing.T) {
					limit, random := tt.limit(rate), rand.New(rand.NewPCG(1, uint64(n)))
					var streams []*stream
					for i := range n { // the second comes after 2 s, the others soon after it
						s := newStream(limit, tt.pieces[i%len(tt.pieces)])
						s.late = rand.New(rand.NewPCG(2, uint64(i)))
						streams = append(streams, s)
						defer run(s)()
						if i == 0 {
							time.Sleep(2 * time.Second)
						}
						time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond))))
					}
					time.Sleep(3 * time.Second)
					each, all := rates(streams)
					fair := float64(rate) / float64(n)
					least, most := slices.Min(each)/fair, slices.Max(each)/fair
					if least < 1-tt.off || most > 1+tt.off {
						t.Errorf("%s, %d MiB/s, %d streams: %.2f to %.2f of a fair share",
							tt.name, rate/MiB, n, least, most)
					}
					if math.Abs(all/float64(rate)-1) > 0.05 {
						t.Errorf("%s, %d MiB/s, %d streams: %.0f B/s together", tt.name,
							rate/MiB, n, all)
					}
				})
			}
		}
	}
}

// Bulk streams spend a burst and go on at the rate. A ping, which is a byte up and a byte down,
// is to pass them all the time, and they are to flow.
func TestPingPassesBulk(t *testing.T) {
	const KiB, MiB = 1 << 10, 1 << 20
	for _, tt := range []struct {
		rate, burst        int64
		bulk               int
		most, longestPause time.Duration // for a ping; of bulk
	}{
		{10 * MiB, 0, 1, 20 * time.Millisecond, 50 * time.Millisecond},
		{10 * MiB, 0, 50, 20 * time.Millisecond, 50 * time.Millisecond},
		{1 * MiB, 1 * MiB, 1, 20 * time.Millisecond, 50 * time.Millisecond},
		{1 * MiB, 1 * MiB, 50, 20 * time.Millisecond, 50 * time.Millisecond},
		{100 * KiB, 1 * MiB, 1, 20 * time.Millisecond, 50 * time.Millisecond},
		{100 * KiB, 1 * MiB, 50, 100 * time.Millisecond, 300 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			limit := &lbproxy.Bandwidth{BytesPerSecond: tt.rate, Burst: tt.burst}
			var bulk []*stream
			for range tt.bulk {
				bulk = append(bulk, newStream(limit, 512*KiB))
			}
			stop := run(bulk...)
			up, down := newStream(limit, 1), newStream(limit, 1)
			var worst time.Duration
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
				time.Sleep(time.Millisecond)
				start := time.Now()
				up.move()
				down.move()
				worst = max(worst, time.Since(start))
			}
			stop()
			var longest time.Duration
			for _, s := range bulk {
				longest = max(longest, s.longest)
			}
			t.Logf("%d B/s, burst %d, %d bulk streams: worst ping %v, longest pause of bulk %v",
				tt.rate, tt.burst, tt.bulk, worst, longest)
			if worst > tt.most || longest > tt.longestPause {
				t.Errorf("want at most %v and %v", tt.most, tt.longestPause)
			}
		})
	}
}

// 50 streams that come at once find a limit that one had for itself, which moved large chunks.
func TestNewStreamsHaveNoLongPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := &lbproxy.Bandwidth{BytesPerSecond: 1 << 20}
		defer run(newStream(limit, 1<<20))()
		time.Sleep(2 * time.Second)
		var streams []*stream
		for range 50 {
			streams = append(streams, newStream(limit, 1<<20))
		}
		stop := run(streams...)
		time.Sleep(5 * time.Second)
		stop()
		for _, s := range streams {
			if s.longest > 150*time.Millisecond {
				t.Fatalf("a pause of %v", s.longest)
			}
		}
	})
}
