package cluster

import (
	"sync"
	"time"
)

// A flusher settles the accounts of limiters with the store: all every 100 ms, urgent ones at once.
// It is one goroutine, with a few more while it makes calls.
type flusher struct {
	store *Store
	wake  chan struct{} // has an element when urgent is not empty
	quit  chan struct{}
	over  chan struct{}
	once  sync.Once

	mu     sync.Mutex // may be taken while a limiter's mu is held, never the other way round
	active []*limiter // limiters with active set that tick is not settling
	urgent []*limiter
}

func (f *flusher) init(s *Store) {
	f.store = s
	f.wake, f.quit, f.over = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
}

func (f *flusher) add(m *limiter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active = append(f.active, m)
}

// hurry makes the flusher settle m now, because others may wait for a place that m has freed.
func (f *flusher) hurry(m *limiter) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.urgent = append(f.urgent, m)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *flusher) run() {
	defer close(f.over)
	every := time.NewTicker(flushEvery)
	defer every.Stop()
	for {
		select {
		case <-every.C:
			f.tick((*limiter).tick)
		case <-f.wake:
			f.mu.Lock()
			urgent := f.urgent
			f.urgent = nil
			f.mu.Unlock()
			settle(urgent, (*limiter).due)
		case <-f.quit:
			f.tick((*limiter).last)
			return
		}
	}
}

// stop settles everything a last time, if the store is connected, and waits until that is done.
func (f *flusher) stop() {
	f.once.Do(func() { close(f.quit) })
	<-f.over
}

// tick settles all limiters and drops those without anything left to settle.
func (f *flusher) tick(plan func(*limiter, time.Time) *call) {
	f.mu.Lock()
	all := f.active
	f.active = nil
	f.mu.Unlock()
	settle(all, plan)
	kept := all[:0]
	for _, m := range all {
		if m.stays() {
			kept = append(kept, m)
		}
	}
	clear(all[len(kept):])
	f.mu.Lock()
	f.active = append(kept, f.active...)
	f.mu.Unlock()
}

// settle makes the calls that plan returns, at most 32 at once, and waits for them.
func settle(limiters []*limiter, plan func(*limiter, time.Time) *call) {
	var calls sync.WaitGroup
	defer calls.Wait()
	places := make(chan struct{}, 32)
	now := time.Now()
	for _, m := range limiters {
		places <- struct{}{}
		m.mu.Lock()
		c := plan(m, now)
		if c == nil {
			m.mu.Unlock()
			<-places
			continue
		}
		calls.Go(func() { // takes over the lock, so that plan's findings still hold
			m.ask(c) // after an error, a later call repeats it
			m.mu.Unlock()
			<-places
		})
	}
}

// tick begins a new interval and returns the call to make, if any. The caller holds mu.
func (m *limiter) tick(now time.Time) *call {
	m.settle(now)
	m.before, m.used, m.charged = m.used, 0, 0
	c := m.due(now)
	if m.before > 0 || m.lent == 0 || m.store.client.Load() == nil {
		return c
	}
	if c == nil {
		c = &call{}
	}
	c.given, m.lent = m.lent, 0 // not needed for a whole interval
	return c
}

// due returns the call to make, or nil if there is none or one in flight suffices. The caller holds
// mu.
func (m *limiter) due(now time.Time) *call {
	if m.store.client.Load() == nil {
		m.moved.Store(0)
		m.rate.Store(0) // the demand of the other proxies is no longer known
		return nil
	}
	news := m.change != 0 || m.heal || m.open > 0 && now.Sub(m.renewed) >= renewEvery
	if m.l.Open > 0 && news && m.inFlight == 0 {
		return &call{absolute: true, exclusive: true}
	}
	if m.moved.Load() > 0 || m.owed > 0 {
		return &call{}
	}
	return nil
}

// last is tick while the store is being closed.
func (m *limiter) last(now time.Time) *call {
	m.used = 0
	return m.tick(now)
}

// stays reports whether there will be something to settle. If not, it clears m.active.
func (m *limiter) stays() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.active = m.lent > 0 || m.used > 0 || m.before > 0 || m.owed > 0 || m.moved.Load() > 0 ||
		m.l.Open > 0 && (m.open > 0 || m.change != 0 || m.heal)
	return m.active
}
