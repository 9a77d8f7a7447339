package main

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// latencies counts durations in 16 steps from each power of two to the next, so that a quantile is
// less than 7 % too large. The zero value is empty. It is safe for concurrent use.
type latencies [64 << 4]atomic.Int64

// step returns the index of d's counter.
func step(d time.Duration) int {
	n := uint64(max(d, 16))
	exponent := bits.Len64(n) - 1
	return exponent<<4 | int(n>>(exponent-4)&15)
}

// above returns the shortest duration that is too long for counter i.
func above(i int) time.Duration {
	exponent, part := i>>4, i&15
	return time.Duration((16 + uint64(part) + 1) << (exponent - 4))
}

func (l *latencies) add(d time.Duration) { l[step(d)].Add(1) }

func (l *latencies) reset() {
	for i := range l {
		l[i].Store(0)
	}
}

// quantile returns a duration longer than the fraction q of all; 0 if there are none.
func (l *latencies) quantile(q float64) time.Duration {
	total := int64(0)
	for i := range l {
		total += l[i].Load()
	}
	rank := int64(q * float64(total))
	for i := range l {
		if n := l[i].Load(); n > 0 {
			if rank -= n; rank < 0 {
				return above(i)
			}
		}
	}
	return 0
}
