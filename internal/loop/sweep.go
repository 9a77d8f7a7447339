//go:build linux && !lbproxy_portable

package loop

import (
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

const (
	// keepAliveAge is how long a session is open, at least, before its server gets keep-alive.
	keepAliveAge = 15 * time.Second

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
	last      int64 // clock at which bytes last moved
	since     int64 // clock when it was connected
	asked     int64 // clock when the system was last asked for unsent
	unsent    int   // and what it said
	keptAlive bool  // keep-alive was set on its server
}

func (w *sweep) isRunning() bool { return w.running }

// opened has the sweep look at s.
func (w *sweep) opened(l *loop, s *Session) {
	s.idle.since = l.now
	w.again = true
	if w.next == 0 && (l.config.Idle > 0 || l.config.KeepAlive) {
		w.next = l.now + l.sweepPeriod()
	}
}

// sweepPeriod is the longest time between two sweeps: a quarter of the timeout, so that the system
// is asked more than once about a reader that is slow.
func (l *loop) sweepPeriod() int64 {
	period := int64(keepAliveAge)
	if l.config.Idle > 0 {
		quarter := int64(l.config.Idle/4 + 1)
		if !l.config.KeepAlive || quarter < period {
			return quarter
		}
	}
	return period
}

// sweepSome goes on with the sweep, or begins it when it is time.
func (l *loop) sweepSome() {
	w := &l.sweep
	if !w.running {
		if w.next == 0 || l.now < w.next {
			return
		}
		*w = sweep{running: true, left: l.sweepPeriod()}
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
	if l.config.KeepAlive && !i.keptAlive {
		if i.keptAlive = l.now-i.since >= int64(keepAliveAge); i.keptAlive {
			relay.KeepAliveFD(int(s.side[server].fd))
			asked = true
		}
		w.again = w.again || !i.keptAlive
	}
	if idle <= 0 {
		return asked
	}
	w.again = true
	// Only what was written after the last question can have made the queues longer. So there is
	// nothing to ask about a session that was silent since, and had nothing in them.
	silent := l.now - max(i.last, i.asked)
	if (i.unsent > 0 || i.last > i.asked) && (silent >= idle/4 || l.now-i.last >= idle) {
		asked = true
		unsent := relay.UnsentFD(int(s.side[client].fd)) + relay.UnsentFD(int(s.side[server].fd))
		if unsent < i.unsent && i.last <= i.asked {
			i.last = l.now // a slow reader has taken something
		}
		i.unsent, i.asked = unsent, l.now
	}
	left := idle - (l.now - i.last)
	if left <= 0 {
		l.end(s, l.config.IdleErr)
		return asked
	}
	w.left = min(w.left, left)
	return asked
}
