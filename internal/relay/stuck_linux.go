//go:build !lbproxy_portable

package relay

import "time"

// stuckTime is how often a write that waits for its reader asks whether its source was reset.
const stuckTime = time.Second

// stuck is called when a write of d has to wait.
func (d *direction) stuck() {
	if d != nil && d.watched.CompareAndSwap(false, true) {
		// Nobody stops the timer: that would cost each write of a stream that its reader slows.
		time.AfterFunc(stuckTime, d.watch)
	}
}

// watch fails the relay if d is still, or again, in a write and its source was reset.
func (d *direction) watch() {
	d.watched.Store(false) // first: a write that begins now starts the next timer
	if d.phase.Load() == writing {
		d.checkReset()
		d.stuck()
	}
}
