package lbproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

var (
	rateOpen    = Event{Kind: EventOpen, App: "app", ClientID: "ann"}
	rateData    = Event{Kind: EventData, App: "app", ClientID: "ann", Direction: Upload, Bytes: 1}
	rateClose   = Event{Kind: EventClose, App: "app", ClientID: "ann"}
	rateRefused = Event{Kind: EventClose, App: "app", ClientID: "ann", Refused: true}
)

// letsIn reports whether m allows an EventOpen.
func letsIn(m RateLimitManager) bool { return !m.Report(context.Background(), rateOpen).Exceeded }

// opens reports n EventOpens to m and returns how many it allows.
func opens(m RateLimitManager, n int) (in int) {
	for range n {
		if letsIn(m) {
			in++
		}
	}
	return in
}

func closes(m RateLimitManager) { m.Report(context.Background(), rateClose) }

// rateLater advances the clock of the test's bubble by d.
func rateLater(d time.Duration) { <-time.After(d) }

// rateDone fails the test if f deadlocks.
func rateDone(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("deadlock")
	}
}

// ratePanic returns the value that f panics with.
func ratePanic(f func()) (p any) {
	defer func() { p = recover() }()
	f()
	return nil
}

// A rateFake is a manager that records its events and returns preset answers.
type rateFake struct {
	name   string
	heard  *[]string
	answer func(Event) Decision
}

func (f *rateFake) Report(_ context.Context, e Event) Decision {
	word := map[EventKind]string{EventOpen: "open", EventData: "data", EventClose: "close"}[e.Kind]
	if e.Refused {
		word = "refused"
	}
	*f.heard = append(*f.heard, f.name+" "+word)
	if f.answer == nil {
		return Decision{}
	}
	return f.answer(e)
}

func rateRefuse(Event) Decision   { return Decision{Exceeded: true} }
func ratePanics(Event) Decision   { panic("store gone") }
func rateCut(e Event) Decision    { return Decision{Exceeded: e.Kind == EventData} }
func rateNeverIdle() *rateHasIdle { return &rateHasIdle{idle: func() bool { return false }} }

// A rateHasIdle limits nothing and has an Idle method.
type rateHasIdle struct {
	idle func() bool
}

func (*rateHasIdle) Report(context.Context, Event) Decision { return Decision{} }
func (i *rateHasIdle) Idle() bool                           { return i.idle() }

func TestEventsPrintReadably(t *testing.T) {
	for _, tt := range []struct {
		value any
		want  string
	}{
		{EventOpen, "open"},
		{EventData, "data"},
		{EventClose, "close"},
		{EventKind(0), "EventKind(0)"},
		{EventKind(-7), "EventKind(-7)"},
		{Upload, "upload"},
		{Download, "download"},
		{Direction(3), "Direction(3)"},
		{rateOpen, `open app="app" client="ann"`},
		{Event{Kind: EventData, App: "a", ClientID: "x\ny", Direction: Download, Bytes: 5},
			`data app="a" client="x\ny" download 5 bytes`},
		{&rateRefused, `close app="app" client="ann" refused`},
	} {
		if got := fmt.Sprint(tt.value); got != tt.want {
			t.Errorf("%s, want %s", got, tt.want)
		}
	}
}

func TestTokenBucketStepByStep(t *testing.T) {
	type step struct {
		at         time.Duration
		asked, got int
	}
	const s, ms = time.Second, time.Millisecond
	for _, tt := range []struct {
		name   string
		bucket *TokenBucket
		steps  []step
	}{
		{"a burst, then one by one", &TokenBucket{Burst: 3, Every: s},
			[]step{{0, 5, 3}, {999 * ms, 1, 0}, {1 * s, 2, 1}, {2*s - 1, 1, 0}, {2 * s, 2, 1},
				{4 * s, 5, 2}}},
		{"it fills up to the burst and no further", &TokenBucket{Burst: 3, Every: s},
			[]step{{0, 3, 3}, {100 * 365 * 24 * time.Hour, 9, 3}}},
		{"a full bucket gains nothing by waiting", &TokenBucket{Burst: 1, Every: s},
			[]step{{0, 0, 0}, {900 * ms, 1, 1}, {1 * s, 1, 0}, {1899 * ms, 1, 0},
				{1900 * ms, 2, 1}}},
		{"a bucket that filled up starts over", &TokenBucket{Burst: 2, Every: s},
			[]step{{0, 1, 1}, {1500 * ms, 3, 2}, {2499 * ms, 1, 0}, {2500 * ms, 2, 1}}},
		{"fractions of the time are not lost", &TokenBucket{Burst: 2, Every: s},
			[]step{{0, 2, 2}, {1500 * ms, 2, 1}, {2 * s, 2, 1}, {2700 * ms, 1, 0}, {3 * s, 2, 1}}},
		{"refused openings cost nothing", &TokenBucket{Burst: 1, Every: s},
			[]step{{0, 1000, 1}, {400 * ms, 1000, 0}, {800 * ms, 1000, 0}, {1 * s, 1000, 1},
				{2 * s, 1, 1}}},
		{"the zero value refuses all", &TokenBucket{},
			[]step{{0, 9, 0}, {time.Hour, 9, 0}}},
		{"without a burst there is nothing to regain", &TokenBucket{Every: 1},
			[]step{{0, 9, 0}, {time.Hour, 9, 0}}},
		{"nor with a negative one", &TokenBucket{Burst: -1, Every: 1},
			[]step{{0, 9, 0}, {time.Hour, 9, 0}}},
		{"without a time nothing is regained", &TokenBucket{Burst: 2},
			[]step{{0, 3, 2}, {1000 * time.Hour, 3, 0}}},
		{"nor with a negative one", &TokenBucket{Burst: 2, Every: -s},
			[]step{{0, 3, 2}, {1000 * time.Hour, 3, 0}, {-time.Hour, 3, 0}}},
		{"late clock readings cause neither a burst nor a freeze", &TokenBucket{Burst: 3, Every: s},
			[]step{{10 * s, 2, 2}, {9 * s, 1, 1}, {0, 9, 0}, {10 * s, 9, 0}, {11 * s, 9, 1},
				{9 * s, 9, 0},
				{12 * s, 9, 1}, {13 * s, 9, 1}}},
		{"the largest burst", &TokenBucket{Burst: math.MaxInt, Every: 1},
			[]step{{0, 9, 9}, {5, 9, 9}, {math.MaxInt64, 9, 9}}},
		{"the longest time", &TokenBucket{Burst: 2, Every: math.MaxInt64},
			[]step{{0, 3, 2}, {math.MaxInt64 - 1, 1, 0}, {math.MaxInt64, 2, 1}}},
		{"the shortest time", &TokenBucket{Burst: 2, Every: 1},
			[]step{{0, 3, 2}, {1, 3, 1}, {3, 3, 2}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, start := tt.bucket, time.Unix(0, 0)
			for i, step := range tt.steps {
				got := 0
				for range step.asked {
					if b.take(start.Add(step.at)) {
						got++
					}
				}
				if got != step.got {
					t.Fatalf("step %d, at %v: %d of %d let in, want %d", i, step.at, got,
						step.asked, step.got)
				}
			}
		})
	}
}

func TestTokenBucketRunsOnTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &TokenBucket{Burst: 2, Every: time.Minute}
		for i, want := range []int{2, 1, 1} {
			if got := opens(b, 5); got != want {
				t.Fatalf("minute %d: %d let in, want %d", i, got, want)
			}
			if b.Idle() {
				t.Fatal("idle with openings spent")
			}
			closes(b) // gives nothing back
			b.Report(t.Context(), rateData)
			rateLater(time.Minute)
		}
		rateLater(time.Minute - 1)
		if b.Idle() {
			t.Fatal("idle before it is full")
		}
		rateLater(1)
		if !b.Idle() {
			t.Fatal("not idle though it is full")
		}
	})
}

// Differences of times that have a monotonic reading ignore steps of the wall clock.
func TestLimitsKeepMonotonicTime(t *testing.T) {
	b := &TokenBucket{Burst: 2, Every: 1}
	opens(b, 3)
	w := &Bandwidth{BytesPerSecond: 1}
	w.Report(t.Context(), rateData)
	for _, at := range []time.Time{b.since, w.paid} {
		if !strings.Contains(at.String(), " m=") {
			t.Errorf("%v has no monotonic reading", at)
		}
	}
}

func TestTokenBucketRefundsARefusedOpen(t *testing.T) {
	now := time.Unix(0, 0)
	b := &TokenBucket{Burst: 2, Every: time.Second}
	undo := func() { b.Report(t.Context(), rateRefused) }
	b.take(now)
	now = now.Add(time.Second / 2)
	for range 5 {
		if !b.take(now) {
			t.Fatal("what was taken had been given back, but is refused")
		}
		undo()
	}
	now = now.Add(time.Second/2 - 1)
	if !b.take(now) || b.take(now) {
		t.Fatal("want one left")
	}
	if now = now.Add(1); !b.take(now) || b.take(now) {
		t.Fatal("giving back has moved the time at which the next one is regained")
	}
	for range 9 {
		undo()
	}
	if got := []bool{b.take(now), b.take(now), b.take(now)}; !slices.Equal(got,
		[]bool{true, true, false}) {
		t.Fatalf("took %v: want it full, and no more than full", got)
	}
	b = &TokenBucket{Burst: 1}
	if undo(); !b.take(now) || b.take(now) {
		t.Fatal("what was never taken has been given back")
	}
}

// The oracle is a level of tokens that rises continuously and exactly: one each Every, up to Burst.
func FuzzTokenBucket(f *testing.F) {
	f.Add(int64(3), int64(time.Second),
		[]byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00"))
	f.Add(int64(math.MaxInt64), int64(math.MaxInt64),
		[]byte("\x04\xff\xff\xff\xff\xff\xff\xff\xff\x05\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add(int64(0), int64(0), []byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add(int64(math.MinInt64), int64(math.MinInt64),
		[]byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	random := rand.New(rand.NewPCG(3, 4))
	for _, burst := range []int64{1, 2, 10} {
		steps := make([]byte, 9*60)
		for i := range steps {
			steps[i] = byte(random.Uint32())
		}
		f.Add(burst, int64(time.Second), steps)
	}
	f.Fuzz(func(t *testing.T, burst, every int64, steps []byte) {
		b := &TokenBucket{Burst: int(burst), Every: time.Duration(every)}
		full := big.NewRat(max(int64(b.Burst), 0), 1)
		level, one := new(big.Rat).Set(full), big.NewRat(1, 1)
		rise := func(by *big.Rat) {
			if level.Add(level, by); level.Cmp(full) > 0 {
				level.Set(full)
			}
		}
		now := time.Unix(0, 0)
		for ; len(steps) >= 9; steps = steps[9:] {
			op, passed := steps[0], int64(binary.BigEndian.Uint64(steps[1:])>>2) // up to 146 years
			switch op >> 4 & 3 {
			case 0:
				passed = 0
			case 1:
				passed %= max(every/8, 1)
			case 2:
				passed %= max(every/8, 1) * 40
			}
			now = now.Add(time.Duration(passed))
			if every > 0 {
				rise(big.NewRat(passed, every))
			}
			b.mu.Lock()
			b.refill(now)
			fullNow := b.spent == 0
			b.mu.Unlock()
			if want := level.Cmp(full) == 0; fullNow != want {
				t.Fatalf("full: %v, want %v (level %v)", fullNow, want, level)
			}
			if op%8 == 0 {
				b.giveBack()
				rise(one)
				continue
			}
			want := level.Cmp(one) >= 0
			if got := b.take(now); got != want {
				t.Fatalf("take: %v, want %v (level %v)", got, want, level)
			}
			if want {
				level.Sub(level, one)
			}
			if b.spent < 0 || b.spent > max(b.Burst, 0) {
				t.Fatalf("spent %d", b.spent)
			}
		}
	})
}

func TestOpenLimitStepByStep(t *testing.T) {
	for _, tt := range []struct {
		name  string
		max   int
		steps string // + an open let in, - one refused, o a close, r one taken back, d data
	}{
		{"up to max", 2, "++--"},
		{"one closes, one gets in", 2, "++-o+-oo++-"},
		{"a refused open takes no place", 1, "+---o+-"},
		{"an undone open is closed", 1, "+-r+-"},
		{"data changes nothing", 1, "+ddd-do+"},
		{"the zero value refuses all", 0, "---"},
		{"so does a negative one", -1, "---"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &OpenLimit{Max: tt.max}
			for i, step := range tt.steps {
				switch step {
				case '+', '-':
					if got := letsIn(l); got != (step == '+') {
						t.Fatalf("step %d of %s: let in %v", i, tt.steps, got)
					}
				default:
					e := map[rune]Event{'o': rateClose, 'r': rateRefused, 'd': rateData}[step]
					if d := l.Report(t.Context(), e); d != (Decision{}) {
						t.Fatalf("step %d of %s: %+v", i, tt.steps, d)
					}
				}
			}
		})
	}
}

func TestOpenLimitPanicsOnExtraClose(t *testing.T) {
	l := &OpenLimit{Max: 1}
	for range 2 {
		if p := fmt.Sprint(ratePanic(func() {
			closes(l)
		})); !strings.Contains(p, "without EventOpen") {
			t.Errorf("panic: %v", p)
		}
		if opens(l, 2) != 1 {
			t.Error("the panic has changed the count")
		}
		closes(l)
	}
}

// owes charges n bytes to b and returns how long it takes until all is paid for, beyond the burst.
func owes(b *Bandwidth, now time.Time, n int64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	burst, _ := nanoseconds(max(b.Burst, 0), b.BytesPerSecond)
	return max(b.charge(now, n)-burst, 0)
}

func TestBandwidthStepByStep(t *testing.T) {
	type step struct {
		at    time.Duration
		bytes int64
		wait  time.Duration
	}
	const s, ms = time.Second, time.Millisecond
	const forever = 100 * 365 * 24 * time.Hour
	for _, tt := range []struct {
		name  string
		b     *Bandwidth
		steps []step
	}{
		{"bytes take their time", &Bandwidth{BytesPerSecond: 1000},
			[]step{{0, 1000, 1 * s}, {1 * s, 500, 500 * ms}, {1 * s, 500, 1 * s},
				{1900 * ms, 100, 200 * ms}}},
		{"a rest is no credit without a burst", &Bandwidth{BytesPerSecond: 1000},
			[]step{{0, 1, 1 * ms}, {time.Hour, 1, 1 * ms}}},
		{"a burst passes at once, the rest waits", &Bandwidth{BytesPerSecond: 1000, Burst: 2000},
			[]step{{0, 1500, 0}, {0, 500, 0}, {0, 1000, 1 * s}, {1 * s, 1, 1 * ms}}},
		{"a burst is regained at the rate, and once only",
			&Bandwidth{BytesPerSecond: 1000, Burst: 1000},
			[]step{{0, 1000, 0}, {500 * ms, 1000, 500 * ms}, {time.Hour, 1001, 1 * ms},
				{time.Hour, 1, 2 * ms}}},
		{"a third of a second three times is one", &Bandwidth{BytesPerSecond: 3},
			[]step{{0, 1, 333333333}, {0, 1, 666666666}, {0, 1, 1 * s}, {1 * s, 1, 333333333},
				{1333333333, 1, 333333333}, {1666666666, 1, 333333334}}},
		{"bytes that take less than a nanosecond add up", &Bandwidth{BytesPerSecond: 4e9},
			[]step{{0, 1, 0}, {0, 1, 0}, {0, 1, 0}, {0, 1, 1}, {1, 3, 0}, {1, 1, 1}}},
		{"and are paid for when it has passed", &Bandwidth{BytesPerSecond: 4e9},
			[]step{{0, 3, 0}, {1, 3, 0}, {2, 3, 0}, {2, 1, 1}}},
		{"no bytes cost nothing", &Bandwidth{BytesPerSecond: 1},
			[]step{{0, 0, 0}, {0, 1, 1 * s}}},
		{"a negative burst is none", &Bandwidth{BytesPerSecond: 1, Burst: -9},
			[]step{{0, 1, 1 * s}}},
		{"late clock readings lose nothing", &Bandwidth{BytesPerSecond: 1000},
			[]step{{10 * s, 1000, 1 * s}, {9 * s, 1000, 3 * s}, {11 * s, 0, 1 * s},
				{12 * s, 1, 1 * ms}}},
		{"a debt is bounded", &Bandwidth{BytesPerSecond: 1},
			[]step{{0, math.MaxInt64, forever}, {0, math.MaxInt64, forever}, {0, 1, forever},
				{forever, 1, 1 * s}}},
		{"so is a debt that fills 64 bits", &Bandwidth{BytesPerSecond: 1},
			[]step{{0, 15e9, forever}}},
		{"and one that overflows by a fraction", &Bandwidth{BytesPerSecond: 999_999_999},
			// 1<<63 - 1 ns, and 0.85 more
			[]step{{0, 2e8, 200 * ms}, {0, 9_223_372_027_631_403_771, forever}}},
		{"a burst that fills 64 bits", &Bandwidth{BytesPerSecond: 1, Burst: 15e9},
			[]step{{0, 9e9, 0}}},
		{"the largest rate", &Bandwidth{BytesPerSecond: math.MaxInt64},
			[]step{{0, math.MaxInt64, 1 * s}, {0, 1 << 20, 1 * s}, {1 * s, math.MaxInt64, 1 * s}}},
		{"the largest burst", &Bandwidth{BytesPerSecond: 1, Burst: math.MaxInt64},
			[]step{{0, 1 << 20, 0}, {0, math.MaxInt64, 0}}},
		{"the largest burst at a high rate", &Bandwidth{BytesPerSecond: 1e9, Burst: math.MaxInt64},
			[]step{{0, math.MaxInt64, 0}, {0, math.MaxInt64, 0}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Unix(0, 0)
			for i, step := range tt.steps {
				if got := owes(tt.b, start.Add(step.at), step.bytes); got != step.wait {
					t.Fatalf("step %d, %d bytes at %v: wait %v, want %v", i, step.bytes,
						step.at, got, step.wait)
				}
			}
		})
	}
}

func TestBandwidthAddsSmallPiecesExactly(t *testing.T) {
	const rate, pieces = 3_000_000_001, 100_000
	b, now := &Bandwidth{BytesPerSecond: rate}, time.Unix(0, 0)
	for n := int64(1); n <= pieces; n++ {
		if got, want := owes(b, now, 7), time.Duration(n*7*1e9/rate); got != want {
			t.Fatalf("after %d pieces: wait %d ns, want %d ns", n, got, want)
		}
	}
}

func TestBandwidthWithoutRateRefusesAll(t *testing.T) {
	for _, rate := range []int64{0, -1} {
		if b := (&Bandwidth{BytesPerSecond: rate, Burst: 1 << 20}); letsIn(b) {
			t.Errorf("let in at %d bytes per second", rate)
		}
	}
	b := &Bandwidth{BytesPerSecond: 1}
	owes(b, time.Now(), math.MaxInt64)
	if opens(b, 9) != 9 {
		t.Error("one that has a rate refused")
	}
}

func TestBandwidthIgnoresEventsWithoutBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, b := range []*Bandwidth{{BytesPerSecond: 1}, {}, {BytesPerSecond: -1}} {
			for _, n := range []int64{0, -5, math.MinInt64} {
				if d := b.Report(t.Context(), Event{Kind: EventData, Bytes: n}); d.Wait != 0 ||
					d.Exceeded {
					t.Errorf("%d bytes: %+v", n, d)
				}
			}
			if !b.Idle() {
				t.Errorf("%+v: not idle", b)
			}
		}
	})
}

// The table gives the Decision for each stream that has moved n bytes: the wait and the next chunk.
func TestBandwidthSharesATurn(t *testing.T) {
	const ms = time.Millisecond
	start := time.Unix(0, 0)
	for _, tt := range []struct {
		name    string
		b       *Bandwidth
		streams float64 // as counted; 0: after a rest
		debt    time.Duration
		n       int64
		want    Decision
	}{
		// 1,000,000 B/s are 20,000 in a turn.
		{"a quantum waits for the whole debt", &Bandwidth{BytesPerSecond: 1e6}, 1, 0, 20_000,
			Decision{Wait: 20 * ms, Chunk: 20_000}},
		{"and so does more", &Bandwidth{BytesPerSecond: 1e6}, 4, 0, 20_000,
			Decision{Wait: 20 * ms, Chunk: 5_000}},
		{"half of it waits half as long, and half of its own does not count",
			&Bandwidth{BytesPerSecond: 1e6}, 1, 30 * ms, 10_000,
			Decision{Wait: 17_500 * time.Microsecond, Chunk: 20_000}},
		{"a byte hardly waits", &Bandwidth{BytesPerSecond: 1e6}, 2, 39 * ms, 1,
			Decision{Wait: 3900 * time.Nanosecond, Chunk: 10_000}},
		{"a large debt makes the chunk smaller", &Bandwidth{BytesPerSecond: 1e6}, 1, 60 * ms,
			20_000,
			Decision{Wait: 80 * ms, Chunk: 10_000}},
		{"64 streams are assumed at first", &Bandwidth{BytesPerSecond: 64e6}, 0, 0, 64e6,
			Decision{Wait: time.Second, Chunk: 64e6 / 4096}},
		{"512 bytes is the least chunk", &Bandwidth{BytesPerSecond: 1000}, 1, 0, 20,
			Decision{Wait: 20 * ms, Chunk: 512}},
		{"1 MiB is the largest", &Bandwidth{BytesPerSecond: math.MaxInt64}, 1, 0, 1 << 20,
			Decision{Wait: 0, Chunk: 1 << 20}},
		{"in a burst a turn may pass at once", &Bandwidth{BytesPerSecond: 1e6, Burst: 1e9}, 0,
			0, 20_000,
			Decision{Chunk: 20_000}},
		{"towards its end a 128th of what is left",
			&Bandwidth{BytesPerSecond: 1e6, Burst: 1_000_000}, 0,
			360 * ms, 0,
			Decision{Chunk: 5_000}},
	} {
		b := tt.b
		if tt.streams != 0 {
			b.streams, b.since, b.paid = tt.streams, start, start.Add(tt.debt)
		} else if tt.debt > 0 {
			b.paid = start.Add(tt.debt)
		}
		got := b.move(start, tt.n)
		if off := got.Wait - tt.want.Wait; off < -1 || off > 1 || got.Chunk != tt.want.Chunk {
			t.Errorf("%s: %v and %d, want %v and %d", tt.name, got.Wait, got.Chunk, tt.want.Wait,
				tt.want.Chunk)
		}
	}
}

// A stream has its share from its first piece on: it is counted when it opens.
func TestBandwidthCountsAStreamWhenItOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Bandwidth{BytesPerSecond: 1e6} // 20,000 bytes in a turn
		b.streams, b.since, b.paid = 1, time.Now(), time.Now()
		b.Report(t.Context(), Event{Kind: EventOpen})
		d := b.Report(t.Context(), Event{Kind: EventData, Bytes: 10_000})
		if d.Chunk != 10_000 || d.Wait != 10*time.Millisecond {
			t.Errorf("beside another stream: %+v", d)
		}
	})
}

// Waits without an end do not overflow the count of streams.
func TestBandwidthCountsEndlessWaits(t *testing.T) {
	b, start := &Bandwidth{BytesPerSecond: 1}, time.Unix(0, 0)
	b.streams, b.since, b.paid = 1, start, start
	for range 4 {
		d := b.move(start, math.MaxInt64)
		if d.Wait <= 0 || b.streams < 1 || b.waits < 0 {
			t.Errorf("%+v, %v streams, waits of %v", d, b.streams, b.waits)
		}
	}
}

func TestBandwidthSpansDirectionsAndConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Bandwidth{BytesPerSecond: 1000}
		if !b.Idle() {
			t.Error("not idle when new")
		}
		for i, e := range []Event{
			{Kind: EventData, ClientID: "ann", Direction: Upload, Bytes: 1000},
			{Kind: EventData, ClientID: "ann", Direction: Download, Bytes: 1000},
			{Kind: EventOpen, ClientID: "bob"},
			{Kind: EventData, ClientID: "bob", Direction: Upload, Bytes: 1000},
			{Kind: EventClose, ClientID: "bob"},
		} {
			want := map[int]time.Duration{0: 1, 1: 2, 3: 3}[i] * time.Second
			d := b.Report(t.Context(), e)
			if chunk := min(d.Chunk, 512); e.Kind == EventClose && chunk != 0 ||
				e.Kind != EventClose && chunk != 512 {
				t.Errorf("event %d: chunk %d, want one unless it is a close", i, d.Chunk)
			}
			if d.Wait != want || d.Exceeded {
				t.Errorf("event %d: %+v, want to wait %v", i, d, want)
			}
		}
		rateLater(3*time.Second - 1)
		if b.Idle() {
			t.Error("idle before all is paid for")
		}
		rateLater(1)
		if !b.Idle() {
			t.Error("not idle when all is paid for")
		}
	})
}

// The oracle is a debt in exact nanoseconds: bytes add to it, time takes from it.
func FuzzBandwidth(f *testing.F) {
	f.Add(int64(1000), int64(0),
		[]byte("\x00\x00\x00\x00\x00\x00\x00\x03\xe8\x10\x00\x00\x00\x00\x00\x00\x03\xe8"))
	f.Add(int64(math.MaxInt64), int64(math.MaxInt64),
		[]byte("\x00\x7f\xff\xff\xff\xff\xff\xff\xff\x30\x7f\xff\xff\xff\xff\xff\xff\xff"))
	f.Add(int64(1), int64(1),
		[]byte("\x00\x7f\xff\xff\xff\xff\xff\xff\xff\x30\x7f\xff\xff\xff\xff\xff\xff\xff"))
	f.Add(int64(0), int64(math.MinInt64), []byte("\x00\x00\x00\x00\x00\x00\x00\x03\xe8"))
	random := rand.New(rand.NewPCG(5, 6))
	for _, rate := range []int64{3, 1e6 + 3, 3e9 + 1, 1e18 + 9} {
		steps := make([]byte, 9*60)
		for i := range steps {
			steps[i] = byte(random.Uint32())
		}
		f.Add(rate, rate/3, steps)
	}
	f.Fuzz(func(t *testing.T, rate, burst int64, steps []byte) {
		const forever = 100 * 365 * 24 * time.Hour
		floor := func(r *big.Rat) *big.Int { return new(big.Int).Quo(r.Num(), r.Denom()) }
		nanoseconds := func(n int64) *big.Rat {
			return new(big.Rat).Mul(big.NewRat(n, 1), big.NewRat(int64(time.Second), rate))
		}
		b := &Bandwidth{BytesPerSecond: rate, Burst: burst}
		shared := &Bandwidth{BytesPerSecond: rate, Burst: burst}
		now, debt, slack := time.Unix(0, 0), new(big.Rat), int64(0)
		for ; len(steps) >= 9; steps = steps[9:] {
			op, n := steps[0], int64(binary.BigEndian.Uint64(steps[1:]))
			switch op & 3 {
			case 0:
				n >>= 44 // as events have them
			case 1:
				n >>= 56
			}
			if n <= 0 || rate <= 0 {
				continue // Report does not charge that
			}
			passed := int64(0)
			switch op >> 4 & 3 {
			case 1: // about as long as they take
				passed = int64(min(float64(n)/float64(rate)*1e9, 1e18)) * int64(op>>6)
			case 2:
				passed = int64(op >> 6)
			case 3:
				passed = n
			}
			now = now.Add(time.Duration(passed))
			if debt.Sub(debt, big.NewRat(passed, 1)); debt.Sign() < 0 {
				debt.SetInt64(0)
			}
			debt.Add(debt, nanoseconds(n))
			if floor(debt).Cmp(big.NewInt(int64(forever))) > 0 {
				debt.SetInt64(int64(forever))
				slack = 1 // what is less than a nanosecond is not followed there
			}
			want := floor(debt)
			if want.Sub(want, floor(nanoseconds(max(burst, 0)))); want.Sign() < 0 {
				want.SetInt64(0)
			}
			got := owes(b, now, n)
			if off := int64(got) - want.Int64(); got < 0 || off < -slack || off > slack {
				t.Fatalf("%d bytes at rate %d, burst %d, after %d ns: wait %d, want %v", n,
					rate, burst, passed,
					got, want)
			}
			// move keeps the same account. It lets small pieces wait for a part of the debt only.
			shared.mu.Lock()
			d := shared.move(now, n)
			shared.mu.Unlock()
			if shared.paid != b.paid || d.Exceeded || d.Wait < 0 || d.Wait > got ||
				(d.Wait == 0) != (got == 0) && n >= rate {
				t.Fatalf("%d bytes at rate %d, burst %d, after %d ns: %+v with a debt of %v", n,
					rate, burst,
					passed, d, got)
			}
			if d.Chunk < 512 || d.Chunk > 1<<20 || shared.streams < 1 ||
				math.IsNaN(shared.streams) {
				t.Fatalf("%d bytes at rate %d, burst %d, after %d ns: %+v for %v streams", n,
					rate, burst,
					passed, d, shared.streams)
			}
		}
	})
}

func TestAllAllowsIfEveryManagerDoes(t *testing.T) {
	yes, no := &OpenLimit{Max: 9}, &OpenLimit{}
	for _, tt := range []struct {
		managers []RateLimitManager
		want     bool
	}{
		{nil, true},
		{[]RateLimitManager{nil, nil}, true},
		{[]RateLimitManager{yes}, true},
		{[]RateLimitManager{yes, nil, yes}, true},
		{[]RateLimitManager{no}, false},
		{[]RateLimitManager{yes, no}, false},
		{[]RateLimitManager{no, yes}, false},
		{[]RateLimitManager{yes, All(yes, nil, no)}, false},
	} {
		if got := letsIn(All(tt.managers...)); got != tt.want {
			t.Errorf("%v: let in %v, want %v", tt.managers, got, tt.want)
		}
	}
}

func TestAllRefundsAfterALaterRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bucket, limit, last := &TokenBucket{Burst: 3,
			Every: time.Hour}, &OpenLimit{Max: 3}, &OpenLimit{Max: 1}
		all := All(bucket, limit, last)
		if got := opens(all, 100); got != 1 {
			t.Fatalf("%d let in, want 1", got)
		}
		if bucket.spent != 1 || limit.open != 1 || last.open != 1 {
			t.Fatalf("after 99 refused: %d tokens spent, %d and %d open, want 1, 1 and 1",
				bucket.spent,
				limit.open, last.open)
		}
		closes(all)
		if bucket.spent != 1 || limit.open != 0 || last.open != 0 {
			t.Fatalf("after the close: %d tokens spent, %d and %d open, want 1, 0 and 0",
				bucket.spent,
				limit.open, last.open)
		}
	})
}

// An open that a later manager refuses adds no stream, so the existing ones keep their share.
func TestRefusedOpensDoNotCountAsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		band := &Bandwidth{BytesPerSecond: 1 << 20}
		all := All(band, &OpenLimit{Max: 1})
		opens(all, 1)
		var d Decision
		for range 100 { // one stream, until it has been counted
			d = all.Report(t.Context(), Event{Kind: EventData, Bytes: 64 << 10})
			time.Sleep(d.Wait)
		}
		if got := opens(all, 1000); got != 0 {
			t.Fatalf("%d let in, want none", got)
		}
		after := all.Report(t.Context(), Event{Kind: EventData, Bytes: 64 << 10})
		if after.Chunk < d.Chunk*9/10 {
			t.Errorf("a stream may move %d bytes at once after 1,000 refused opens, %d before",
				after.Chunk, d.Chunk)
		}
	})
}

func TestAllAsksInOrderAndUndoesAtOnce(t *testing.T) {
	var heard []string
	fake := func(name string, answer func(Event) Decision) RateLimitManager {
		return &rateFake{name, &heard, answer}
	}
	for _, tt := range []struct {
		name   string
		all    RateLimitManager
		events []Event
		want   string
	}{
		{"let in", All(fake("a", nil), fake("b", nil)), []Event{rateOpen, rateData, rateClose},
			"a open, b open, a data, b data, a close, b close"},
		{"the last refuses", All(fake("a", nil), fake("b", nil), fake("c", rateRefuse)),
			[]Event{rateOpen},
			"a open, b open, c open, a refused, b refused"},
		{"the first refuses", All(fake("a", rateRefuse), fake("b", nil)), []Event{rateOpen},
			"a open"},
		{"one inside refuses",
			All(fake("a", nil), All(fake("b", nil), fake("c", rateRefuse)),
				fake("d", nil)), []Event{rateOpen},
			"a open, b open, c open, b refused, a refused"},
		{"one after those inside refuses",
			All(All(fake("a", nil), nil, fake("b", nil)), fake("c", rateRefuse)), []Event{rateOpen},
			"a open, b open, c open, a refused, b refused"},
		{"the last panics", All(fake("a", nil), fake("b", nil), fake("c", ratePanics)),
			[]Event{rateOpen},
			"a open, b open, c open, a refused, b refused"},
		{"data is told to all, though one cuts", All(fake("a", rateCut), fake("b", nil)),
			[]Event{rateOpen, rateData},
			"a open, b open, a data, b data"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			heard = nil
			for _, e := range tt.events {
				ratePanic(func() { tt.all.Report(t.Context(), e) })
			}
			if got := strings.Join(heard, ", "); got != tt.want {
				t.Errorf("heard:\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestAllReportsCloseToEveryManagerDespitePanic(t *testing.T) {
	var heard []string
	fake := func(name string) RateLimitManager {
		return &rateFake{name, &heard, func(e Event) Decision {
			if e.Kind == EventClose && name != "c" {
				panic("store gone: " + name)
			}
			return Decision{}
		}}
	}
	for _, tt := range []struct {
		all   RateLimitManager
		event Event
		want  string
	}{
		{All(fake("a"), fake("b"), fake("c")), rateClose, "a close, b close, c close"},
		{All(fake("a"), All(fake("b"), fake("c"))), rateRefused, "a refused, b refused, c refused"},
		{All(fake("a"), fake("c"), &OpenLimit{}), rateOpen, "a open, c open, a refused, c refused"},
	} {
		heard = nil
		if p := ratePanic(func() { tt.all.Report(t.Context(), tt.event) }); p == nil {
			t.Errorf("%+v: the panic was not passed on", tt.event)
		}
		if got := strings.Join(heard, ", "); got != tt.want {
			t.Errorf("heard:\n got %s\nwant %s", got, tt.want)
		}
	}
}

func TestAllForwardsEventsAndPanics(t *testing.T) {
	type key struct{}
	ctx := context.WithValue(t.Context(), key{}, 1)
	var got []Event
	see := rateFunc(func(ctx context.Context, e Event) Decision {
		if ctx.Value(key{}) == nil {
			t.Error("it is another context")
		}
		got = append(got, e)
		return Decision{}
	})
	all := All(see, &OpenLimit{})
	all.Report(ctx, rateOpen)
	All(see).Report(ctx, rateData)
	if want := []Event{rateOpen, rateRefused, rateData}; !slices.Equal(got, want) {
		t.Errorf("heard %+v, want %+v", got, want)
	}
	panics := rateFunc(func(context.Context, Event) Decision { panic("store gone") })
	if p := ratePanic(func() { All(see, panics).Report(ctx, rateOpen) }); p != "store gone" {
		t.Errorf("panic: %v", p)
	}
}

type rateFunc func(context.Context, Event) Decision

func (f rateFunc) Report(ctx context.Context, e Event) Decision { return f(ctx, e) }

func TestAllCombinesDecisions(t *testing.T) {
	errA, errB := errors.New("a"), errors.New("b")
	says := func(d Decision) RateLimitManager {
		return rateFunc(func(_ context.Context, e Event) Decision {
			if e.Kind == EventOpen {
				d.Exceeded = false
			}
			return d
		})
	}
	for _, tt := range []struct {
		managers []RateLimitManager
		want     Decision // on data
	}{
		{nil, Decision{}},
		{[]RateLimitManager{says(Decision{Wait: 1}), says(Decision{Wait: 3}),
			says(Decision{Wait: 2})},
			Decision{Wait: 3}},
		{[]RateLimitManager{says(Decision{}), All(says(Decision{Wait: 5}), nil),
			says(Decision{Wait: 4})},
			Decision{Wait: 5}},
		{[]RateLimitManager{says(Decision{}), says(Decision{Chunk: 7}),
			All(says(Decision{Chunk: 5}), says(Decision{})), says(Decision{Chunk: 6})},
			Decision{Chunk: 5}},
		{[]RateLimitManager{says(Decision{Chunk: 7}), says(Decision{Chunk: -1})},
			Decision{Chunk: 7}},
		{[]RateLimitManager{says(Decision{Exceeded: true}), says(Decision{})},
			Decision{Exceeded: true}},
		{[]RateLimitManager{says(Decision{}), says(Decision{Exceeded: true})},
			Decision{Exceeded: true}},
		{[]RateLimitManager{says(Decision{}),
			All(says(Decision{Exceeded: true, Err: errA}),
				says(Decision{Exceeded: true, Err: errB}))},
			Decision{Exceeded: true, Err: errA}},
	} {
		all := All(tt.managers...)
		if got := all.Report(t.Context(), rateData); got != tt.want {
			t.Errorf("data: %+v, want %+v", got, tt.want)
		}
		if got, want := all.Report(t.Context(),
			rateOpen), (Decision{Wait: tt.want.Wait, Chunk: tt.want.Chunk}); got != want {
			t.Errorf("open: %+v, want %+v", got, want)
		}
	}
	refuses := rateFunc(func(context.Context, Event) Decision {
		return Decision{Exceeded: true, Err: errB}
	})
	if got := All(says(Decision{Wait: 1}), refuses).Report(t.Context(), rateOpen); !got.Exceeded ||
		got.Err != errB {
		t.Errorf("refused: %+v", got)
	}
}

func TestAllIsIdleIfEveryManagerIs(t *testing.T) {
	now := time.Now()
	spent, owing := &TokenBucket{Burst: 1}, &Bandwidth{BytesPerSecond: 1}
	spent.take(now)
	owes(owing, now, 1<<20)
	for _, tt := range []struct {
		all  RateLimitManager
		want bool
	}{
		{All(), true},
		{All(&TokenBucket{Burst: 1}, &OpenLimit{}, &Bandwidth{}), true},
		{All(&OpenLimit{}, spent), false},
		{All(owing, &OpenLimit{}), false},
		{All(All(nil, All(spent)), &OpenLimit{}), false},
	} {
		if got := idle(tt.all); got != tt.want {
			t.Errorf("%v: idle %v, want %v", tt.all, got, tt.want)
		}
	}
}

func TestDecisionsReachTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errMine := fmt.Errorf("no more today: %w", ErrRateLimited)
		a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		full := NewClientLimits(0, rateOpenLimits(1)).For("ann")
		c := serveFake(t.Context(), a, &Conn{RateLimit: full})
		if r := <-c.result; r.End != EndRateLimited || r.Err != ErrTooManyClients {
			t.Errorf("ended as %s by %v, want ErrTooManyClients", r.End, r.Err)
		}
		var sizes []int64
		c = serveFake(t.Context(), a,
			&Conn{RateLimit: rateFunc(func(_ context.Context, e Event) Decision {
				switch {
				case e.Kind == EventOpen:
					return Decision{Chunk: 1000}
				case e.Kind == EventClose || e.Direction == Download:
					return Decision{}
				}
				if sizes = append(sizes, e.Bytes); len(sizes) == 4 {
					return Decision{Exceeded: true, Err: errMine}
				}
				return Decision{Chunk: 100 * len(sizes)}
			})})
		go io.Copy(io.Discard, c)
		c.Write(make([]byte, 4000))
		if r := <-c.result; r.End != EndRateLimited || r.Err != errMine {
			t.Errorf("ended as %s by %v, want %v", r.End, r.Err, errMine)
		}
		if want := []int64{1000, 100, 200, 300}; !slices.Equal(sizes, want) {
			t.Errorf("chunks of %d bytes, want %d", sizes, want)
		}
	})
}

func TestEventsDoNotAllocate(t *testing.T) {
	m := All(&OpenLimit{Max: math.MaxInt}, &Bandwidth{BytesPerSecond: 1000})
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() { m.Report(ctx, rateData) }); n != 0 {
		t.Errorf("%v allocations for EventData", n)
	}
	n := testing.AllocsPerRun(100, func() {
		m.Report(ctx, rateOpen)
		m.Report(ctx, rateClose)
	})
	if n != 0 {
		t.Errorf("%v allocations for EventOpen and EventClose", n)
	}
}

// A rateQuota is a manager as a user might write it: a number of bytes per client, for good.
type rateQuota struct {
	mu   sync.Mutex
	left map[string]int64
}

func (q *rateQuota) Report(_ context.Context, e Event) Decision {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.left[e.ClientID] -= e.Bytes
	return Decision{Exceeded: q.left[e.ClientID] <= 0}
}

func TestCustomManagerWorksInAll(t *testing.T) {
	quota := &rateQuota{left: map[string]int64{"ann": 100, "bob": 1000}}
	limit := &OpenLimit{Max: 2}
	all := All(limit, quota)
	report := func(kind EventKind, client string, n int64) bool {
		return !all.Report(t.Context(), Event{Kind: kind, ClientID: client, Bytes: n}).Exceeded
	}
	got := []bool{
		report(EventOpen, "ann", 0), report(EventOpen, "bob", 0),
		report(EventData, "ann", 99), report(EventData, "bob", 99),
		report(EventData, "ann", 1), // cut
	}
	report(EventClose, "ann", 0)
	got = append(got, report(EventOpen, "ann", 0), report(EventOpen, "eve", 0),
		report(EventOpen, "bob", 0))
	if want := []bool{true, true, true, true, false, false, false, true}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if limit.open != 2 {
		t.Errorf("%d open, want bob's 2", limit.open)
	}
}

// rateCheck fails the test unless each client of l is either in use or in the list of quiet ones.
func rateCheck(t *testing.T, l *ClientLimits, open int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	sum, quiet := 0, 0
	for name, c := range l.clients {
		sum += c.open
		if c.open < 0 || (c.open == 0) != (c.quiet != nil) || c.client != name || c.known != c {
			t.Errorf("client %s: %+v", name, c)
		}
		if c.quiet != nil {
			quiet++
			if c.quiet.Value != c {
				t.Errorf("client %s is in another one's place", name)
			}
		}
	}
	if sum != open || l.quiet.Len() != quiet || len(l.clients) > max(l.max, 0) {
		t.Errorf("%d open, want %d; %d quiet, %d in the list of %d clients, at most %d",
			sum, open, quiet, l.quiet.Len(), len(l.clients), l.max)
	}
}

func rateOpenLimits(most int) func(string) RateLimitManager {
	return func(string) RateLimitManager { return &OpenLimit{Max: most} }
}

func TestEachClientHasItsOwnLimit(t *testing.T) {
	made := map[string]int{}
	l := NewClientLimits(10, func(client string) RateLimitManager {
		made[client]++
		return &OpenLimit{Max: 2}
	})
	ann := l.For("ann")
	if !letsIn(ann) || !letsIn(l.For("ann")) || letsIn(l.For("ann")) || letsIn(ann) {
		t.Error("ann's connections do not share her limit")
	}
	if !letsIn(l.For("bob")) {
		t.Error("bob is refused for ann's connections")
	}
	rateCheck(t, l, 3)
	closes(l.For("ann"))
	if opens(ann, 2) != 1 {
		t.Error("a close by way of another For is not ann's")
	}
	rateCheck(t, l, 3)
	if made["ann"] != 1 || made["bob"] != 1 {
		t.Errorf("limits made: %v, want one for each", made)
	}
}

func TestNilClientLimitMeansUnlimited(t *testing.T) {
	l := NewClientLimits(0, func(string) RateLimitManager { return nil })
	if m := l.For("ann"); m != nil {
		t.Errorf("For returned %v", m)
	}
}

func TestClientLimitsWithoutNewLimitRefuseAll(t *testing.T) {
	for _, l := range []*ClientLimits{new(ClientLimits), NewClientLimits(9, nil)} {
		if letsIn(l.For("ann")) {
			t.Error("ann was let in")
		}
	}
}

func TestClientIsRememberedFromItsFirstOpen(t *testing.T) {
	l := NewClientLimits(2, rateOpenLimits(1))
	early, twin := l.For("ann"), l.For("ann")
	l.For("bob")
	rateCheck(t, l, 0)
	if len(l.clients) != 0 {
		t.Errorf("%d remembered before any open", len(l.clients))
	}
	if !letsIn(early) || letsIn(twin) {
		t.Error("two made before the first open do not act as one")
	}
	if l.For("ann") != early {
		t.Error("the one remembered is not the one that opened")
	}
	closes(early)
	if !letsIn(twin) || letsIn(early) {
		t.Error("two made before the first open do not act as one")
	}
	rateCheck(t, l, 1)
	closes(twin)
	rateCheck(t, l, 0)
}

func TestRefusalsNameTheirLimit(t *testing.T) {
	for want, m := range map[string]RateLimitManager{
		"TokenBucket: too many new connections": All(&OpenLimit{Max: 1}, &TokenBucket{}),
		"OpenLimit: too many open connections":  All(&TokenBucket{Burst: 1}, &OpenLimit{}),
		"Bandwidth: BytesPerSecond is not set":  &Bandwidth{},
	} {
		a, _ := newApp(t, Options{}, "u:1")
		r := <-serveFake(t.Context(), a, &Conn{RateLimit: m}).result
		if !errors.Is(r.Err, ErrRateLimited) || !strings.HasSuffix(r.Err.Error(), ": "+want) {
			t.Errorf("%v, want ErrRateLimited and %q", r.Err, want)
		}
	}
}

func TestClientLimitsWithoutRoomRefuseAll(t *testing.T) {
	for _, most := range []int{0, -1, math.MinInt} {
		l := NewClientLimits(most, rateOpenLimits(9))
		if d := l.For("ann").Report(t.Context(), rateOpen); !d.Exceeded ||
			d.Err != ErrTooManyClients {
			t.Errorf("max %d: %+v, want ErrTooManyClients", most, d)
		}
		rateCheck(t, l, 0)
	}
}

func TestFullClientLimitsSaySo(t *testing.T) {
	l := NewClientLimits(2, rateOpenLimits(1))
	for i, step := range []struct {
		client string
		err    error
		length int
	}{{"ann", nil, 1}, {"bob", nil, 2}, {"eve", ErrTooManyClients, 2}, {"ann", errTooManyOpen, 2}} {
		d := l.For(step.client).Report(t.Context(), rateOpen)
		var err error
		if d.Exceeded {
			err = d.Err
		}
		if err != step.err || l.Len() != step.length {
			t.Errorf("step %d: %s: %v with %d clients, want %v with %d", i, step.client, err,
				l.Len(),
				step.err, step.length)
		}
	}
	if !errors.Is(ErrTooManyClients, ErrRateLimited) ||
		errors.Is(ErrRateLimited, ErrTooManyClients) {
		t.Error("ErrTooManyClients is not an ErrRateLimited, or the other way round")
	}
	closes(l.For("bob"))
	if !letsIn(l.For("eve")) || l.Len() != 2 {
		t.Errorf("eve is refused, or has not taken bob's place: %d clients", l.Len())
	}
	if n := new(ClientLimits).Len(); n != 0 {
		t.Errorf("the zero value has %d clients", n)
	}
}

func TestClientLimitReportsNoCloseOfRefusedOpen(t *testing.T) {
	var heard []string
	refuse := false
	l := NewClientLimits(1, func(string) RateLimitManager {
		return &rateFake{"ann", &heard,
			func(e Event) Decision {
				return Decision{Exceeded: refuse && e.Kind == EventOpen, Wait: 5}
			}}
	})
	ann := l.For("ann")
	if d := ann.Report(t.Context(), rateOpen); d != (Decision{Wait: 5}) {
		t.Errorf("open: %+v", d)
	}
	if d := ann.Report(t.Context(), rateData); d != (Decision{Wait: 5}) {
		t.Errorf("data: %+v", d)
	}
	refuse = true
	if d := ann.Report(t.Context(), rateOpen); !d.Exceeded {
		t.Errorf("second open: %+v", d)
	}
	rateCheck(t, l, 1)
	closes(ann)
	rateCheck(t, l, 0)
	if got, want := strings.Join(heard, ", "),
		"ann open, ann data, ann open, ann close"; got != want {
		t.Errorf("heard %s, want %s", got, want)
	}
}

func TestClientLimitInAllIsRefunded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewClientLimits(1,
			func(string) RateLimitManager { return &TokenBucket{Burst: 3, Every: time.Hour} })
		all := All(l.For("ann"), &OpenLimit{})
		if opens(all, 100) != 0 {
			t.Fatal("let in")
		}
		rateCheck(t, l, 0)
		if got := opens(l.For("ann"), 9); got != 3 {
			t.Errorf("after 100 refused by another: %d let in, want 3", got)
		}
	})
}

func TestOnlyIdleClientsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewClientLimits(2,
			func(string) RateLimitManager { return &TokenBucket{Burst: 2, Every: time.Minute} })
		open := func(client string) bool { return letsIn(l.For(client)) }
		if !open("ann") || !open("bob") || !open("bob") {
			t.Fatal("refused with tokens left")
		}
		if open("eve") {
			t.Fatal("eve got in while both were connected")
		}
		closes(l.For("ann"))
		closes(l.For("bob"))
		closes(l.For("bob"))
		rateCheck(t, l, 0)
		if open("eve") {
			t.Fatal("eve got in where a client with tokens spent would have had to be forgotten")
		}
		rateLater(time.Minute) // ann's bucket is full, bob's is not
		if !open("eve") || !open("bob") || open("bob") {
			t.Fatal("want eve in ann's place, and bob with the token he regained")
		}
		if open("ann") {
			t.Fatal("ann got in where there is no room")
		}
		closes(l.For("eve"))
		rateLater(time.Minute)
		if got := []bool{open("ann"), open("ann"), open("ann")}; !slices.Equal(got,
			[]bool{true, true, false}) {
			t.Fatalf("ann got in %v: her bucket was full when she was forgotten: "+
				"want two tokens", got)
		}
		rateCheck(t, l, 3) // bob's one and ann's two
	})
}

func TestOpenConnectionsPinTheirClient(t *testing.T) {
	l := NewClientLimits(1, rateOpenLimits(2))
	ann, bob := l.For("ann"), l.For("bob")
	opens(ann, 2)
	closes(ann)
	if letsIn(bob) {
		t.Fatal("a client with a connection was forgotten")
	}
	ann.Report(t.Context(), rateData)
	closes(ann)
	if !letsIn(bob) || letsIn(ann) {
		t.Fatal("want bob in ann's place when her last connection is over")
	}
	rateCheck(t, l, 1)
}

func TestBandwidthDebtPinsTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewClientLimits(1,
			func(string) RateLimitManager { return &Bandwidth{BytesPerSecond: 1, Burst: 99} })
		ann := l.For("ann")
		letsIn(ann)
		ann.Report(t.Context(), rateData)
		closes(ann)
		if letsIn(l.For("bob")) {
			t.Error("ann's debt was forgotten")
		}
		rateLater(time.Second)
		if !letsIn(l.For("bob")) {
			t.Error("ann was not forgotten though she has paid")
		}
	})
}

func TestLongestQuietClientIsForgottenFirst(t *testing.T) {
	l := NewClientLimits(3, rateOpenLimits(1))
	for _, client := range []string{"ann", "bob", "cid", "ann"} {
		letsIn(l.For(client))
		closes(l.For(client))
	}
	for _, step := range []struct{ comes, left string }{{"dan", "ann cid dan"},
		{"eve", "ann dan eve"},
		{"fay", "dan eve fay"}} {
		letsIn(l.For(step.comes))
		closes(l.For(step.comes))
		var left []string
		for client := range l.clients {
			left = append(left, client)
		}
		slices.Sort(left)
		if got := strings.Join(left, " "); got != step.left {
			t.Errorf("%s came, left are %s, want %s", step.comes, got, step.left)
		}
	}
}

func TestForgettingAsksEightClientsAtMost(t *testing.T) {
	const clients = 100
	asked := 0
	l := NewClientLimits(clients, func(client string) RateLimitManager {
		return &rateHasIdle{idle: func() bool { asked++; return client == "77" }}
	})
	for i := range clients {
		letsIn(l.For(strconv.Itoa(i)))
		closes(l.For(strconv.Itoa(i)))
	}
	refused := 0
	for ; !letsIn(l.For("newcomer")); refused++ {
		if asked > 8*(refused+1) {
			t.Fatalf("%d newcomers have made it ask %d clients", refused+1, asked)
		}
		if refused > clients {
			t.Fatal("the idle client is never found")
		}
	}
	if refused != 9 || asked != 78 || l.clients["77"] != nil {
		t.Errorf("%d refused, %d asked, want 9, all up to 77, and that one forgotten", refused,
			asked)
	}
}

func TestNewLimitMayUseTheSameClientLimits(t *testing.T) {
	var l *ClientLimits
	l = NewClientLimits(2, func(client string) RateLimitManager {
		if parent, _, ok := strings.Cut(client, "/"); ok {
			return All(l.For(parent), &OpenLimit{Max: 1})
		}
		return &OpenLimit{Max: 3}
	})
	rateDone(t, func() {
		if !letsIn(l.For("net/ann")) {
			t.Error("refused")
		}
		closes(l.For("net/ann"))
		rateCheck(t, l, 0)
	})
}

func TestIdleMayUseTheSameClientLimits(t *testing.T) {
	var l *ClientLimits
	l = NewClientLimits(2, func(client string) RateLimitManager {
		return &rateHasIdle{idle: func() bool {
			// a manager in use while it is asked is not forgotten, whatever it says
			letsIn(l.For("ann"))
			return true
		}}
	})
	rateDone(t, func() {
		for _, client := range []string{"ann", "bob"} {
			letsIn(l.For(client))
			closes(l.For(client))
		}
		if !letsIn(l.For("eve")) {
			t.Error("eve is refused, though bob is idle")
		}
		if l.clients["ann"] == nil || l.clients["bob"] != nil {
			t.Error("ann was forgotten, with connections open")
		}
		rateCheck(t, l, 3)
	})
}

func TestClientThatReturnsDuringIdleIsKept(t *testing.T) {
	var l *ClientLimits
	asked := 0
	l = NewClientLimits(1, func(string) RateLimitManager {
		return &rateHasIdle{idle: func() bool {
			if asked++; asked == 1 {
				letsIn(l.For("bob")) // ann is asked once more, and forgotten
				closes(l.For("bob"))
				letsIn(l.For("ann"))
			}
			return true
		}}
	})
	rateDone(t, func() {
		letsIn(l.For("ann"))
		closes(l.For("ann"))
		if letsIn(l.For("eve")) || l.clients["ann"] == nil {
			t.Error("eve got in where ann has a connection open")
		}
		rateCheck(t, l, 1)
	})
}

func TestClientIsKeptUntilItsCloseReturns(t *testing.T) {
	var l *ClientLimits
	l = NewClientLimits(1, func(client string) RateLimitManager {
		return rateFunc(func(_ context.Context, e Event) Decision {
			if client == "ann" && e.Kind == EventClose && letsIn(l.For("bob")) {
				t.Error("bob got in while ann was closing")
			}
			return Decision{}
		})
	})
	rateDone(t, func() {
		letsIn(l.For("ann"))
		closes(l.For("ann"))
		rateCheck(t, l, 0)
	})
}

func TestOldLimitOfForgottenClientJoinsTheNewOne(t *testing.T) {
	l := NewClientLimits(1, rateOpenLimits(1))
	old := l.For("ann")
	letsIn(old)
	closes(old)
	letsIn(l.For("bob")) // ann is forgotten
	closes(l.For("bob"))
	renewed := l.For("ann")
	if renewed == old {
		t.Fatal("ann was not forgotten")
	}
	if !letsIn(renewed) || letsIn(old) {
		t.Error("the old one does not count what the new one let in")
	}
	rateCheck(t, l, 1)
	closes(renewed)
	if !letsIn(old) || letsIn(renewed) {
		t.Error("the new one does not count what the old one let in")
	}
	rateCheck(t, l, 1)
	closes(old)
	rateCheck(t, l, 0)

	letsIn(l.For("bob")) // forgotten once more
	closes(l.For("bob"))
	if !letsIn(old) || letsIn(renewed) || l.For("ann") != old {
		t.Error("the old one is not the remembered one when it is the first to open")
	}
	closes(old)
	rateCheck(t, l, 0)
}

func TestClientLimitsPanicOnExtraClose(t *testing.T) {
	l := NewClientLimits(1, func(string) RateLimitManager { return &TokenBucket{Burst: 9} })
	ann := l.For("ann")
	for range 2 {
		if p := fmt.Sprint(ratePanic(func() {
			closes(ann)
		})); !strings.Contains(p, "without EventOpen") {
			t.Errorf("panic: %v", p)
		}
		rateCheck(t, l, 0)
		letsIn(ann)
		closes(ann)
	}
}

func TestPanickingClientLimitKeepsCountsRight(t *testing.T) {
	for _, when := range []EventKind{EventOpen, EventData, EventClose} {
		l := NewClientLimits(1, func(client string) RateLimitManager {
			return rateFunc(func(_ context.Context, e Event) Decision {
				if client == "ann" && e.Kind == when {
					panic("store gone")
				}
				return Decision{}
			})
		})
		ann := l.For("ann")
		panics := 0
		for _, e := range []Event{rateOpen, rateData, rateClose} {
			if panics > 0 && when == EventOpen {
				break // it was not let in
			}
			if ratePanic(func() { ann.Report(t.Context(), e) }) != nil {
				panics++
			}
		}
		if panics != 1 {
			t.Errorf("%d panics passed on, want 1", panics)
		}
		rateCheck(t, l, 0)
		if !letsIn(l.For("bob")) {
			t.Error("ann's place is lost")
		}
	}
	l := NewClientLimits(1,
		func(string) RateLimitManager {
			return &rateHasIdle{idle: func() bool { panic("store gone") }}
		})
	letsIn(l.For("ann"))
	closes(l.For("ann"))
	if ratePanic(func() { letsIn(l.For("bob")) }) == nil {
		t.Error("Idle's panic was not passed on")
	}
	rateCheck(t, l, 0)
}

func TestMillionClientsAreBoundedByMax(t *testing.T) {
	const clients, most = 1_000_000, 1000
	l := NewClientLimits(most, func(string) RateLimitManager {
		return &rateHasIdle{idle: func() bool { return true }}
	})
	name := make([]byte, 0, 20)
	come := func(from, to int64) {
		for i := from; i < to; i++ {
			name = strconv.AppendInt(name[:0], i, 10)
			m := l.For(string(name))
			if m.Report(t.Context(), rateOpen).Exceeded {
				t.Fatalf("client %d refused", i)
			}
			m.Report(t.Context(), rateClose)
		}
	}
	come(0, 10*most)
	before := proxytest.HeapInUse()
	come(10*most, clients)
	if grown := proxytest.HeapInUse() - before; grown > 1<<20 {
		t.Errorf("%d clients in all have made it grow by %d bytes", clients, grown)
	}
	rateCheck(t, l, 0)
	runtime.KeepAlive(l)
}

// A rateAudit makes limits and checks that each client uses one of them at a time.
type rateAudit struct {
	t       *testing.T
	clients [200]struct {
		mu   sync.Mutex
		used *rateAudited
		open int
	}
	opened, closed atomic.Int64
}

type rateAudited struct {
	*rateAudit
	client int
	limit  OpenLimit
}

func (a *rateAudited) Report(ctx context.Context, e Event) Decision {
	c := &a.clients[a.client]
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open > 0 && c.used != a {
		a.t.Errorf("client %d has two limits in use", a.client)
	}
	d := a.limit.Report(ctx, e) // panics on a close too many
	switch {
	case e.Kind == EventOpen && !d.Exceeded:
		a.opened.Add(1)
		c.open++
		c.used = a
	case e.Kind == EventClose:
		a.closed.Add(1)
		c.open--
	}
	return d
}

func TestConcurrentClientsGetOneClosePerOpen(t *testing.T) {
	const goroutines, rounds = 64, 400
	audit := &rateAudit{t: t}
	l := NewClientLimits(100, func(client string) RateLimitManager {
		n, _ := strconv.Atoi(client)
		return &rateAudited{rateAudit: audit, client: n, limit: OpenLimit{Max: 2}}
	})
	var in, refused atomic.Int64
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(g), 7))
			kept := map[int]RateLimitManager{} // some go on with what For returned long ago
			for range rounds {
				client := random.IntN(len(audit.clients))
				if random.IntN(3) == 0 {
					client /= 20 // a few are busy
				}
				m := kept[client]
				if m == nil || random.IntN(2) == 0 {
					m = l.For(strconv.Itoa(client))
					kept[client] = m
				}
				if !letsIn(m) {
					refused.Add(1)
					continue
				}
				in.Add(1)
				m.Report(t.Context(), rateData)
				runtime.Gosched()
				closes(m)
			}
		})
	}
	wg.Wait()
	rateCheck(t, l, 0)
	if o, c := audit.opened.Load(), audit.closed.Load(); o != in.Load() || c != o {
		t.Errorf("%d let in: %d opens, %d closes heard", in.Load(), o, c)
	}
	if in.Load() == 0 || refused.Load() == 0 {
		t.Errorf("%d let in, %d refused: want some of both", in.Load(), refused.Load())
	}
	for i := range audit.clients {
		if audit.clients[i].open != 0 {
			t.Errorf("client %d: %d open", i, audit.clients[i].open)
		}
	}
}

func TestConcurrentUseAddsUp(t *testing.T) {
	bucket, limit := &TokenBucket{Burst: 60 + 64}, &OpenLimit{Max: 60}
	bandwidth := &Bandwidth{BytesPerSecond: 1e9}
	all := All(bucket, limit)
	now := time.Unix(0, 0)
	var in atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for range 10 {
				if letsIn(all) {
					in.Add(1)
				}
				owes(bandwidth, now, 10)
			}
		})
	}
	wg.Wait()
	if in.Load() != 60 || limit.open != 60 || bucket.spent != 60 {
		t.Errorf("%d let in, %d open, %d spent, want 60", in.Load(), limit.open, bucket.spent)
	}
	if got := bandwidth.paid.Sub(now); got != 6400 {
		t.Errorf("6400 bytes cost %v, want 6400 ns", got)
	}
}

func BenchmarkTokenBucket(b *testing.B) {
	bucket, now := &TokenBucket{Burst: 100, Every: time.Microsecond}, time.Now()
	b.Run("take", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			now = now.Add(time.Microsecond)
			bucket.take(now)
		}
	})
	b.Run("refuse", func(b *testing.B) {
		b.ReportAllocs()
		empty := &TokenBucket{Burst: 1}
		empty.take(now)
		for b.Loop() {
			empty.take(now)
		}
	})
	b.Run("report", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			bucket.Report(context.Background(), rateOpen)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				bucket.Report(context.Background(), rateOpen)
			}
		})
	})
}

func BenchmarkBandwidth(b *testing.B) {
	bandwidth, now := &Bandwidth{BytesPerSecond: 3e9 + 1, Burst: 1 << 20}, time.Now()
	b.Run("move", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			now = now.Add(5 * time.Microsecond)
			bandwidth.move(now, 16<<10)
		}
	})
	b.Run("report", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			bandwidth.Report(context.Background(), rateData)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				bandwidth.Report(context.Background(), rateData)
			}
		})
	})
}

// One operation is a For, an EventOpen and an EventClose.
func BenchmarkClientLimits(b *testing.B) {
	const clients = 100_000
	names := make([]string, 2*clients)
	for i := range names {
		names[i] = "client-" + strconv.Itoa(i)
	}
	full := func() *ClientLimits {
		l := NewClientLimits(clients, rateOpenLimits(1000))
		for _, name := range names[:clients] {
			letsIn(l.For(name))
			closes(l.For(name))
		}
		return l
	}
	visit := func(l *ClientLimits, i int, of []string) {
		m := l.For(of[i*7919%len(of)])
		letsIn(m)
		closes(m)
	}
	b.Run("known", func(b *testing.B) {
		l := full()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			visit(l, i, names[:clients])
		}
	})
	b.Run("half of them forgotten", func(b *testing.B) {
		l := full()
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			visit(l, i, names)
		}
	})
	b.Run("full", func(b *testing.B) {
		l := NewClientLimits(clients, func(string) RateLimitManager { return rateNeverIdle() })
		for _, name := range names[:clients] {
			letsIn(l.For(name))
			closes(l.For(name))
		}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			letsIn(l.For(names[clients+i%clients]))
		}
	})
	b.Run("parallel", func(b *testing.B) {
		l := full()
		var at atomic.Int64
		b.ReportAllocs()
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for i := int(at.Add(1)) * clients / 2; pb.Next(); i++ {
				visit(l, i, names[:clients])
			}
		})
	})
}
