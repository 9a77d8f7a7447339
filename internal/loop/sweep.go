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

	// After a sweep that took several turns the loop rests this many times as long. Otherwise many
	// sessions that become idle one by one would keep it sweeping.
	sweepRest = 19
)

// A sweep looks at all sessions of a loop now and then, a few a turn, for those that are idle.
type sweep struct {
	next    int64 // clock at which the next one is due; 0: nobody needs it
	running bool
	began   int64 // clock
	slot    int   // to be looked at next
}

// idleState is what the sweep knows of a session.
type idleState struct {
	relay.Idleness
	last int64 // clock at which bytes last moved
}

// sweepIn has a sweep begin in d, or after the longest time between two if that is shorter.
func (l *loop) sweepIn(d time.Duration) {
	at := l.now + int64(min(d, l.config.SweepPeriod()))
	if w := &l.sweep; w.next == 0 || at < w.next {
		w.next = at
	}
}

// sweepSome goes on with the sweep, or begins it when it is time.
func (l *loop) sweepSome() {
	w := &l.sweep
	if !w.running {
		if w.next == 0 || l.now < w.next {
			return
		}
		*w = sweep{running: true, began: l.now}
	}
	for work := 0; work < sweepTurn && w.slot < len(l.sessions); w.slot++ {
		work++
		if s := l.sessions[w.slot]; s != nil && s.phase == open && l.look(s) {
			work += sweepAsk
		}
	}
	if w.slot >= len(l.sessions) {
		w.running = false
		if w.next != 0 {
			rest := min(sweepRest*(l.now-w.began), int64(l.config.SweepPeriod()))
			w.next = max(w.next, l.now+rest, l.now+int64(100*time.Microsecond))
		}
	}
}

// look ends s if it is idle, and says when to look again. It reports whether the system was asked.
func (l *loop) look(s *Session) (asked bool) {
	i, idle := &s.idle, l.config.Idle
	if i.KeepAliveDue(&l.config, l.now) {
		relay.KeepAliveFD(int(s.side[server].fd))
		asked = true
	}
	if idle <= 0 {
		if i.LacksKeepAlive(&l.config) {
			l.sweepIn(forever)
		}
		return asked
	}
	queued, taken := i.Ask(&l.config, i.last, l.now, func() int {
		return relay.UnsentFD(int(s.side[client].fd)) + relay.UnsentFD(int(s.side[server].fd))
	})
	asked = asked || queued
	if taken || s.isHeld(client) || s.isHeld(server) {
		i.last = l.now
	}
	left := idle - time.Duration(max(l.now-i.last, 0)) // another loop's clock may have been later
	if left <= 0 {
		l.end(s, l.config.IdleErr)
		return asked
	}
	l.sweepIn(left)
	return asked
}
