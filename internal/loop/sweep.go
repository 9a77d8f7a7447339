//go:build linux && !lbproxy_portable

package loop

import (
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

const (
	// A turn of the sweep ends when this much was done: looking at a slot costs 1, asking the
	// system about a session sweepAsk.
	sweepTurn = 256
	sweepAsk  = 16
)

// A sweep looks at all sessions of a loop now and then, a few a turn, for those that are idle.
type sweep struct {
	next    int64 // clock of the next one; 0: there is nobody to look at
	running bool
	slot    int   // to be looked at next
	left    int64 // until the first session that was looked at may be idle
	again   bool  // somebody has to be looked at again
}

// idleState is what the sweep knows of a session.
type idleState struct {
	relay.Idleness
	last int64 // clock at which bytes last moved
}

// include makes sure that a sweep is due.
func (w *sweep) include(l *loop) {
	w.again = true
	if w.next == 0 && (l.config.Idle > 0 || l.config.KeepAlive) {
		w.next = l.now + int64(l.config.SweepPeriod())
	}
}

// sweepSome goes on with the sweep, or begins it when it is time.
func (l *loop) sweepSome() {
	w := &l.sweep
	if !w.running {
		if w.next == 0 || l.now < w.next {
			return
		}
		*w = sweep{running: true, left: int64(l.config.SweepPeriod())}
	}
	for work := 0; work < sweepTurn && w.slot < len(l.sessions); w.slot++ {
		work++
		if s := l.sessions[w.slot]; s != nil && s.phase == open && l.look(s) {
			work += sweepAsk
		}
	}
	if w.slot >= len(l.sessions) {
		w.running, w.next = false, 0
		if w.again {
			w.next = l.now + max(w.left, int64(100*time.Microsecond))
		}
	}
}

// look ends s if it is idle, and says when to look again. It reports whether the system was asked.
func (l *loop) look(s *Session) (asked bool) {
	w, i, idle := &l.sweep, &s.idle, int64(l.config.Idle)
	if i.KeepAliveDue(&l.config, l.now) {
		relay.KeepAliveFD(int(s.side[server].fd))
		asked = true
	}
	w.again = w.again || idle > 0 || i.LacksKeepAlive(&l.config)
	if idle <= 0 {
		return asked
	}
	queued, taken := i.Ask(&l.config, i.last, l.now, func() int {
		return relay.UnsentFD(int(s.side[client].fd)) + relay.UnsentFD(int(s.side[server].fd))
	})
	asked = asked || queued
	if taken || s.isHeld(client) || s.isHeld(server) {
		i.last = l.now
	}
	left := idle - max(l.now-i.last, 0) // another loop's clock may have been later
	if left <= 0 {
		l.end(s, l.config.IdleErr)
		return asked
	}
	w.left = min(w.left, left)
	return asked
}
