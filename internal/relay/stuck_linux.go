//go:build !lbproxy_portable

package relay

import "time"

// stuckTime is how often a write that waits for its reader asks whether its source was reset.
const stuckTime = time.Second

// stuck is called when a write of d has to wait. Meanwhile nobody reads from d's source, and maybe
// nobody writes to it, so only a question tells of a reset.
func (d *direction) stuck() {
	if d != nil && d.watched.CompareAndSwap(false, true) {
		// Nobody stops the timer: that would cost each write of a stream that its reader slows.
		time.AfterFunc(stuckTime, d.watch)
	}
}

// watch fails the relay if d is still, or again, in a write and its source was reset.
func (d *direction) watch() {
	d.watched.Store(false) // first: a write that begins now starts the next timer
	r := d.relay
	r.mu.Lock()
	if d.phase.Load() != writing {
		r.mu.Unlock()
		return
	}
	r.refs++ // not from zero: the goroutine of d has one until it has ended
	r.mu.Unlock()
	// Not wasReset, which is also true after both streams have ended.
	if hasError(d.from.raw) && d.phase.Load() == writing {
		d.sourceFailed(errReset)
	} else {
		d.stuck()
	}
	r.release()
}
