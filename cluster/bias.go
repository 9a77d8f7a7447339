package cluster

import (
	"maps"
	"math"

	"github.com/danielepagano/lbproxy"
)

// A bias corrects a lasting imbalance between upstreams that an app's own connections do not show,
// for example if proxies have different upstreams. It follows slowly. Adding the other proxies'
// counts to one's own would do harm: by the time the counts are known here, all proxies have chosen
// the upstream that had the least.
type bias map[string]float64 // connections, by address

const (
	biasGain = 0.3  // of the imbalance beyond the band, a second
	biasLeak = 0.02 // of the bias, a second, while there is no imbalance
	biasFade = 0.2  // of the bias, a beat, while the store is away
)

// follow corrects b for a step of so many seconds, by the totals of n proxies. An upstream that is
// not up should have fewer connections, so its bias stays.
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
		if math.Abs(over) > band { // less is the noise of small numbers
			b[u.Addr] += biasGain * seconds * (over - math.Copysign(band, over)) / float64(n)
		} else {
			b[u.Addr] *= 1 - biasLeak*seconds
		}
	}
	maps.DeleteFunc(b, func(addr string, _ float64) bool { return !known[addr] })
}

// judged reports whether an upstream gets new connections, so that its open ones show an imbalance.
func judged(u lbproxy.UpstreamStats) bool {
	return u.State == lbproxy.StateUp && !u.Drain && !u.Removed
}

// fade reduces b while the store is away.
func (b bias) fade() {
	for addr := range b {
		b[addr] *= 1 - biasFade
	}
}

// steps returns b in quarters of a connection, with 0 as the least. Rounding makes nearly equal
// upstreams tie, so that the proxies' different places decide between them.
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
