package cluster

import (
	"container/heap"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/danielepagano/lbproxy"
)

var simulate = flag.String("simulate", "",
	"simulate so many proxies and upstreams, such as 1000x10000, with and without the bias")

// A sim makes n proxies choose among m upstreams as lbproxy does: the least (open+bias), and among
// equals the first from the proxy's own place on. Connections come as a Poisson process; their
// durations have a bounded Pareto distribution (alpha 1.5, mean 5 s, at most 1,000 s). Every second
// each proxy learns the totals, and its bias follows.
type sim struct {
	n, m     int
	load     float64 // mean open connections of an upstream
	lopsided bool    // every second proxy has only half of the upstreams
	biased   bool
	rotated  bool

	rng   *rand.Rand
	open  []int   // by upstream
	own   [][]int // by proxy and upstream
	steps [][]int // biases, in quarters
	known []int   // by proxy: the number of upstreams it has
}

type departure struct {
	at   float64
	p, u int
}

type departures []departure

func (h departures) Len() int           { return len(h) }
func (h departures) Less(i, j int) bool { return h[i].at < h[j].at }
func (h departures) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *departures) Push(x any)        { *h = append(*h, x.(departure)) }
func (h *departures) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

const simMean, simMost, simAlpha = 5.0, 1000.0, 1.5

// lasting returns the duration of a connection.
func (s *sim) lasting() float64 {
	const lo = 1.7786 // which makes the mean 5
	return lo * math.Pow(1-s.rng.Float64()*(1-math.Pow(lo/simMost, simAlpha)), -1/simAlpha)
}

func (s *sim) choose(p int) int {
	known, first := s.known[p], 0
	if s.rotated {
		first = known * p / s.n
	}
	best, at := math.MaxInt, 0
	for i := range known {
		u := first + i
		if u >= known {
			u -= known
		}
		load := 4*s.own[p][u] + s.steps[p][u]
		if load < best {
			best, at = load, u
			if load == 0 {
				break
			}
		}
	}
	return at
}

// run returns the highest load of an upstream by the mean, as a mean over half a minute after a
// minute.
func (s *sim) run(seed uint64) float64 {
	s.rng = rand.New(rand.NewPCG(seed, 1))
	s.open = make([]int, s.m)
	biases := make([]bias, s.n)
	stats := make([]lbproxy.UpstreamStats, s.m)
	index := map[string]int{}
	for u := range stats {
		stats[u] = lbproxy.UpstreamStats{Addr: fmt.Sprint(u), Weight: 1, State: lbproxy.StateUp}
		index[stats[u].Addr] = u
	}
	for p := range s.n {
		s.own, s.steps = append(s.own, make([]int, s.m)), append(s.steps, make([]int, s.m))
		s.known = append(s.known, s.m)
		if biases[p] = (bias{}); s.lopsided && p%2 == 0 {
			s.known[p] = s.m / 2
		}
	}
	total := func(addr string) int { return s.open[index[addr]] }
	rate := s.load * float64(s.m) / simMean
	var leaving departures
	arrival, sample, beat, turn := 0.0, 60.0, 0.0, 0
	ratios, samples := 0.0, 0
	for {
		now := min(arrival, sample, beat)
		if len(leaving) > 0 {
			now = min(now, leaving[0].at)
		}
		switch {
		case now > 90:
			return ratios / float64(samples)
		case now == beat:
			if p := turn % s.n; s.biased {
				biases[p].follow(stats[:s.known[p]], total, s.n, 1)
				steps := biases[p].steps(stats[:s.known[p]])
				for u := range s.known[p] {
					s.steps[p][u] = int(4 * steps[stats[u].Addr])
				}
			}
			turn++
			beat += 1 / float64(s.n) // one after the other
		case now == sample:
			sum := 0
			for _, n := range s.open {
				sum += n
			}
			ratios += float64(slices.Max(s.open)) * float64(s.m) / float64(sum)
			samples++
			sample += 0.5
		case len(leaving) > 0 && now == leaving[0].at:
			d := heap.Pop(&leaving).(departure)
			s.open[d.u]--
			s.own[d.p][d.u]--
		default:
			p := s.rng.IntN(s.n)
			u := s.choose(p)
			s.open[u]++
			s.own[p][u]++
			heap.Push(&leaving, departure{now + s.lasting(), p, u})
			arrival = now + s.rng.ExpFloat64()/rate
		}
	}
}

// The bias does nothing if all proxies have the same upstreams, and helps if they do not.
func TestBiasInSimulation(t *testing.T) {
	t.Parallel()
	mean := func(s sim) (m float64) {
		seeds := 1
		if *simulate != "" {
			seeds = 3
		}
		for seed := range seeds {
			s := s
			m += s.run(uint64(seed)) / float64(seeds)
		}
		return m
	}
	base := sim{n: 20, m: 200, load: 10, rotated: true}
	if *simulate != "" {
		if _, err := fmt.Sscanf(*simulate, "%dx%d", &base.n, &base.m); err != nil {
			t.Fatal(err)
		}
	}
	slice := base
	slice.rotated = false
	biased := base
	biased.biased = true
	alone, with, herd := mean(base), mean(biased), mean(slice)
	t.Logf("%dx%d, load %g: in slice order %.2f, rotated %.2f, rotated with bias %.2f", base.n,
		base.m, base.load, herd, alone, with)
	if with > alone*1.06 || alone > 1.45 || *simulate == "" && herd < 1.8 {
		t.Errorf("in slice order %.2f, rotated %.2f, with bias %.2f", herd, alone, with)
	}
	base.lopsided, base.load = true, 60
	if *simulate != "" {
		base.load = 10
	}
	biased = base
	biased.biased = true
	alone, with = mean(base), mean(biased)
	t.Logf("the same, load %g, each second proxy knows half: rotated %.2f, with bias %.2f",
		base.load, alone, with)
	if with > alone*0.95 {
		t.Errorf("where each second proxy knows half: rotated %.2f, with bias %.2f", alone, with)
	}
}
