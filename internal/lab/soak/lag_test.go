//go:build linux

package soak

import (
	"sync"
	"time"
)

// A lag records the times at which this process did not run because others had the processors.
// Deadlines are extended by them.
type lag struct {
	mu    sync.Mutex
	times []late
	most  time.Duration
}

type late struct{ from, to time.Time }

// watch looks until stop is closed.
func (l *lag) watch(stop <-chan struct{}) {
	const nap, tolerable = 5 * time.Millisecond, 50 * time.Millisecond
	for {
		due := time.Now().Add(nap)
		select {
		case <-stop:
			return
		case <-time.After(nap):
		}
		now := time.Now()
		if by := now.Sub(due); by > tolerable {
			l.mu.Lock()
			l.times = append(l.times, late{due, now})
			l.most = max(l.most, by)
			l.mu.Unlock()
		}
	}
}

// between returns for how long this process was late from one time to another.
func (l *lag) between(from, to time.Time) (sum time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.times) - 1; i >= 0 && l.times[i].to.After(from); i-- {
		if t := l.times[i]; t.from.Before(to) {
			sum += t.to.Sub(t.from)
		}
	}
	return sum
}
