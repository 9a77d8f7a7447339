package relay

import (
	"math"
	"sync"
	"time"
)

// Config is the configuration of an engine's relays.
type Config struct {
	// Idle is the time without a moving byte after which a relay is aborted with IdleErr. Zero or
	// less means never. Bytes that a slow reader takes out of the system's queue count as moving.
	Idle    time.Duration
	IdleErr error

	// KeepAlive says that servers are dialed without keep-alive. The engine then sets it (after
	// 15 s of silence, every 15 s, 9 times) on the servers of relays that have lasted 15 s. Short
	// relays are spared the system calls.
	KeepAlive bool
}

// An Engine holds the resources that relays share: pipes, and the timer of the sweep, which looks
// for relays that are idle or were reset.
type Engine struct {
	config Config
	pipes  pipePool

	mu       sync.Mutex
	relays   []*Relay    // the connected ones, each at its index
	timer    *time.Timer // runs the sweep; nil if there is nothing to sweep for
	closed   bool
	sweeping sync.WaitGroup // counts timer if there is one, and the goroutines that sweeps start
}

// Idleness is a sweep's state for a pair of connections. Only the sweep uses it.
type Idleness struct {
	Since     int64 // clock when the pair was connected
	asked     int64 // clock when the system was last asked for unsent
	unsent    int   // the answer
	keptAlive bool  // keep-alive was set on the server
}

// LacksKeepAlive reports whether the server of the pair is yet to get keep-alive.
func (i *Idleness) LacksKeepAlive(c *Config) bool { return c.KeepAlive && !i.keptAlive }

// KeepAliveDue returns true once, when the pair is old enough for its server to get keep-alive.
func (i *Idleness) KeepAliveDue(c *Config, now int64) bool {
	if !i.LacksKeepAlive(c) {
		return false
	}
	i.keptAlive = now-i.Since >= int64(keepAliveAge)
	return i.keptAlive
}

// Ask calls unsent, which returns how many bytes the queues of the pair hold, if that may have
// changed. last is the clock when a byte of the pair last moved. taken means that a slow reader has
// taken bytes since the last answer.
func (i *Idleness) Ask(c *Config, last, now int64, unsent func() int) (asked, taken bool) {
	// Only writes after the last question can have made the queues longer. So skip the system calls
	// for a pair that was silent since, and whose queues were empty then.
	changed := i.unsent > 0 || last > i.asked
	silent := now - max(last, i.asked)
	if !changed || silent < int64(c.Idle/4) && now-last < int64(c.Idle) {
		return false, false
	}
	n := unsent()
	taken = canMeasure && n < i.unsent && last <= i.asked
	i.unsent, i.asked = n, now
	return true, taken
}

const (
	// keepAliveAge is the age of a relay at which its server gets keep-alive.
	keepAliveAge = 15 * time.Second

	// sweepBatch is the number of relays that a sweep copies each time it takes the lock.
	sweepBatch = 256

	// sweepRest bounds the cost of sweeps: after each one the engine rests 19 times as long, so
	// that they use at most a twentieth of a processor.
	sweepRest = 19
)

// NewEngine returns an engine with no relays. It has nothing to close until one is started.
func NewEngine(config Config) *Engine { return &Engine{config: config} }

// Close waits for the engine's goroutines and closes its pipes. The caller calls it when the last
// relay is done.
func (e *Engine) Close() {
	e.mu.Lock()
	e.closed = true
	if e.timer != nil && e.timer.Stop() {
		e.timer = nil
		e.sweeping.Done()
	}
	e.mu.Unlock()
	e.sweeping.Wait()
	e.pipes.close()
}

// add makes the sweep look at r.
func (e *Engine) add(r *Relay) {
	r.idle.Since = r.last.Load()
	e.mu.Lock()
	defer e.mu.Unlock()
	r.index = len(e.relays)
	e.relays = append(e.relays, r)
	if e.timer == nil && !e.closed && (e.config.Idle > 0 || e.config.KeepAlive) {
		e.sweeping.Add(1)
		e.timer = time.AfterFunc(e.config.SweepPeriod(), e.sweep)
	}
}

// remove takes r, which is done, out of the sweep.
func (e *Engine) remove(r *Relay) {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := len(e.relays) - 1
	e.relays[r.index] = e.relays[last]
	e.relays[r.index].index = r.index
	e.relays[last] = nil
	e.relays = e.relays[:last]
	if cap(e.relays) > 1024 && last < cap(e.relays)/4 {
		e.relays = append(make([]*Relay, 0, cap(e.relays)/2), e.relays...)
	}
}

// SweepPeriod returns the longest time between two sweeps. A quarter of the timeout lets a sweep
// ask the system about a slow reader more than once.
func (c *Config) SweepPeriod() time.Duration {
	if c.Idle <= 0 {
		return keepAliveAge
	}
	if c.KeepAlive {
		return min(c.Idle/4+1, keepAliveAge)
	}
	return c.Idle/4 + 1
}

// sweep looks at every relay and aborts those that have been idle for too long. The next sweep
// comes when the first of the others may have been.
func (e *Engine) sweep() {
	began, next := Clock(), e.config.SweepPeriod()
	var batch [sweepBatch]*Relay
	// Go backwards: the last relay takes the place of a removed one, and has been seen by then.
	for at := math.MaxInt; at > 0; {
		e.mu.Lock()
		high := min(at, len(e.relays))
		at = max(high-sweepBatch, 0)
		n := copy(batch[:], e.relays[at:high])
		e.mu.Unlock()
		now := Clock()
		for _, r := range batch[:n] {
			next = min(next, e.look(r, now))
		}
	}
	took := time.Duration(Clock() - began)
	next = max(next, min(sweepRest*took, e.config.SweepPeriod()), 100*time.Microsecond)
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.relays) > 0 && !e.closed {
		e.timer.Reset(next)
		return
	}
	e.timer = nil
	e.sweeping.Done()
}

// look checks r, and aborts it if it has been idle for too long. It returns the time after which r
// may be.
func (e *Engine) look(r *Relay, now int64) (left time.Duration) {
	idle := e.config.Idle
	r.up.checkReset()
	r.down.checkReset()
	if r.idle.KeepAliveDue(&e.config, now) {
		keepAlive(&r.server)
	}
	if idle <= 0 || r.condemned {
		return e.config.SweepPeriod()
	}
	last := r.last.Load()
	if r.held.Load() > 0 {
		return idle
	}
	unsent := func() int { return r.client.unsent() + r.server.unsent() }
	if _, taken := r.idle.Ask(&e.config, last, now, unsent); taken {
		r.last.CompareAndSwap(last, now)
		last = now
	}
	// last may be later than now, which must not overflow the longest timeout.
	if left = idle - time.Duration(max(now-last, 0)); left <= 0 {
		r.condemned = true
		e.sweeping.Go(func() { r.Abort(e.config.IdleErr) }) // may block in a conn's Close
	}
	return max(left, 0)
}
