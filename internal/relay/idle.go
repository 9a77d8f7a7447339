package relay

import (
	"sync"
	"time"
)

// Config is what the relays of an engine have in common.
type Config struct {
	// Idle is how long a relay may be without a byte that moves before it is aborted with IdleErr.
	// Not positive: for ever. What a slow reader takes out of the system's queue moves, too.
	Idle    time.Duration
	IdleErr error

	// KeepAlive says that servers were dialled without keep-alive: it is set (after 15 s of
	// silence, each 15 s, 9 times) on those of relays that have lasted 15 s. That spares short ones
	// the cost.
	KeepAlive bool
}

// An Engine is what relays share: pipes, and one timer that sweeps over all of them.
type Engine struct {
	config Config
	pipes  pipePool

	mu       sync.Mutex
	relays   []*Relay // those connected, each at its index
	timer    *time.Timer
	armed    bool // the timer runs, or a sweep does
	added    bool // a relay has been, since the last sweep began
	closed   bool
	sweeping sync.WaitGroup // the sweep, and what it has started
}

// swept is what the sweep keeps of a relay. It belongs to the sweep, but for index.
type swept struct {
	index     int   // in Engine.relays; guarded by Engine.mu
	since     int64 // clock when it was connected
	asked     int64 // clock when the system was last asked for unsent
	unsent    int   // and what it said
	keptAlive bool  // keep-alive was set on its server
	condemned bool  // it was found idle
}

const (
	// keepAliveAge is how long a relay lasts, at least, before its server gets keep-alive.
	keepAliveAge = 15 * time.Second

	// sweepBatch is how many relays are looked at for each time that the lock is held.
	sweepBatch = 256

	// sweepRest is how much longer the sweep rests than it took: with 19, a twentieth of a
	// processor.
	sweepRest = 19
)

// NewEngine returns an engine with no relays. It has nothing to close until one is started.
func NewEngine(config Config) *Engine { return &Engine{config: config} }

// Close waits for what the engine still does and frees what it keeps. It is called when the last
// relay is done.
func (e *Engine) Close() {
	e.mu.Lock()
	e.closed = true
	if e.timer != nil && e.timer.Stop() {
		e.armed = false
		e.sweeping.Done()
	}
	e.mu.Unlock()
	e.sweeping.Wait()
	e.pipes.close()
}

// add makes the sweep look at r.
func (e *Engine) add(r *Relay) {
	r.since = r.last.Load()
	e.mu.Lock()
	defer e.mu.Unlock()
	r.index = len(e.relays)
	e.relays = append(e.relays, r)
	e.added = true
	if !e.armed && !e.closed && (e.config.Idle > 0 || e.config.KeepAlive) {
		e.arm(e.period())
	}
}

// remove is called when r is done.
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

// arm runs the sweep after d. The caller holds mu.
func (e *Engine) arm(d time.Duration) {
	e.armed = true
	e.sweeping.Add(1)
	if e.timer == nil {
		e.timer = time.AfterFunc(d, e.sweep)
	} else {
		e.timer.Reset(d)
	}
}

// period is the longest time between two sweeps: a quarter of the timeout, so that the system is
// asked more than once about a reader that is slow.
func (e *Engine) period() time.Duration {
	if e.config.Idle <= 0 {
		return keepAliveAge
	}
	if e.config.KeepAlive {
		return min(e.config.Idle/4+1, keepAliveAge)
	}
	return e.config.Idle/4 + 1
}

// sweep looks at every relay, aborts those that have been idle for too long, and has itself run
// again when the next may have been.
func (e *Engine) sweep() {
	defer e.sweeping.Done()
	began, next, more := clock(), e.period(), false
	var batch [sweepBatch]*Relay
	// Backwards: when a relay is removed the last one takes its place, which has been seen then.
	for at := int(^uint(0) >> 1); at > 0; {
		e.mu.Lock()
		if at > len(e.relays) {
			e.added = false // from here on
		}
		high := min(at, len(e.relays))
		at = max(high-sweepBatch, 0)
		n := copy(batch[:], e.relays[at:high])
		e.mu.Unlock()
		now := clock()
		for _, r := range batch[:n] {
			left, again := e.look(r, now)
			next, more = min(next, left), more || again
		}
	}
	took := time.Duration(clock() - began)
	next = max(next, min(sweepRest*took, e.period()), 100*time.Microsecond)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.armed = (more || e.added) && !e.closed; e.armed {
		e.arm(next)
	}
}

// look returns how long it takes until r may have been idle for long enough, and whether it has to
// be looked at again.
func (e *Engine) look(r *Relay, now int64) (left time.Duration, again bool) {
	idle := e.config.Idle
	if e.config.KeepAlive && !r.keptAlive {
		if r.keptAlive = now-r.since >= int64(keepAliveAge); r.keptAlive {
			keepAlive(r.server.raw)
		}
	}
	if idle <= 0 || r.condemned {
		return e.period(), idle > 0 || e.config.KeepAlive && !r.keptAlive
	}
	last := r.last.Load()
	if r.held.Load() > 0 {
		return idle, true
	}
	// Only what was written after the last question can have made the queues longer. So there is
	// nothing to ask about a relay that was silent since, and had nothing in them.
	silent := now - max(last, r.asked)
	if (r.unsent > 0 || last > r.asked) && (silent >= int64(idle/4) || now-last >= int64(idle)) {
		unsent := r.client.unsent() + r.server.unsent()
		if canMeasure && unsent < r.unsent && last <= r.asked {
			r.last.CompareAndSwap(last, now)
			last = now
		}
		r.unsent, r.asked = unsent, now
	}
	if left = idle - time.Duration(now-last); left <= 0 {
		r.condemned = true
		e.sweeping.Go(func() { r.Abort(e.config.IdleErr) }) // closing may take a while
	}
	return max(left, 0), true
}
