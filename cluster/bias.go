package cluster

import (
	"maps"
	"math"

	"github.com/danielepagano/lbproxy"
)

// A bias corrects what an app's own connections do not show: a lasting imbalance between upstreams,
// such as where proxies know different ones. It follows slowly. Adding the others' counts to one's
// own does harm: by the time they are known here, all proxies have gone where they were least.
type bias map[string]float64 // connections, by address

const (
	biasGain = 0.3  // of the imbalance beyond the band, a second
	biasLeak = 0.02 // of the bias, a second, while there is no imbalance
	biasFade = 0.2  // of the bias, a beat, while the store is away
)

// follow takes a step of so many seconds, by what n proxies together have open. An upstream that is
// not up is expected to have less, so its bias stays.
func (b bias) follow(upstreams []lbproxy.UpstreamStats, total func(addr string) int, n int,
	seconds float64) {
	var all, weights float64
	for _, u := range upstreams {
		if judged(u) {
			all += float64(total(u.Addr))
			weights += float64(u.Weight)
		}
	}
	known := map[string]bool{}
	for _, u := range upstreams {
		known[u.Addr] = true
		if !judged(u) {
			continue
		}
		fair := all * float64(u.Weight) / weights
		over, band := float64(total(u.Addr))-fair, math.Sqrt(fair)
		if math.Abs(over) > band { // else it is the noise of small numbers
			b[u.Addr] += biasGain * seconds * (over - math.Copysign(band, over)) / float64(n)
		} else {
			b[u.Addr] *= 1 - biasLeak*seconds
		}
	}
	maps.DeleteFunc(b, func(addr string, _ float64) bool { return !known[addr] })
}

// judged reports whether an upstream gets new connections, so that what it has open says something.
func judged(u lbproxy.UpstreamStats) bool {
	return u.State == lbproxy.StateUp && !u.Drain && !u.Removed
}

// fade lets go of what is no longer known to be so.
func (b bias) fade() {
	for addr := range b {
		b[addr] *= 1 - biasFade
	}
}

// steps returns b in quarters of a connection, the least of them 0. Equal ones have to be equal:
// ties are what the proxies' different places decide.
func (b bias) steps(upstreams []lbproxy.UpstreamStats) map[string]float64 {
	least := math.Inf(1)
	for _, u := range upstreams {
		least = min(least, math.Round(b[u.Addr]*4)/4)
	}
	steps := map[string]float64{}
	for _, u := range upstreams {
		if q := math.Round(b[u.Addr]*4)/4 - least; q > 0 {
			steps[u.Addr] = q
		}
	}
	return steps
}
