//go:build linux && !lbproxy_portable

package loop

import (
	"sync/atomic"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// How loops share the sessions.
//
// Each loop that is awake costs wake-ups: with two, a short connection and a round trip cost a
// tenth more than with one. So new sessions go to the first loop that keeps up. A loop that was
// awake for most of a period is behind: others get what is new, and half of the sessions that are
// active on it.

const (
	// A period is short enough that clients hardly notice a loop that is behind, and long enough
	// that other processes, which take the processor away, seldom make a loop look busy.
	busyPeriod = 50 * time.Millisecond

	mostBusy = 80 // percent of a period
)

// busyness is how busy a loop is. All but behind belongs to the loop's goroutine.
type busyness struct {
	behind  atomic.Int64 // clock until which the loop is behind
	began   int64        // clock at which the period began
	slept   int64        // time in it that the loop has slept
	sleeper int64        // clock at which the loop fell asleep; 0: it has not
	cpu     int64        // CPU time of the process when the period began
}

func processTime() int64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}

func (b *busyness) isBehind(now int64) bool { return now < b.behind.Load() }

// awake is called when the loop is awake. It returns true if a period has ended in which the loop
// was behind.
func (b *busyness) awake(now int64) bool {
	if b.sleeper != 0 {
		b.slept += now - b.sleeper
		b.sleeper = 0
	}
	period := now - b.began
	if period < int64(busyPeriod) {
		return false
	}
	cpu := processTime()
	most := period * mostBusy / 100
	behind := period-b.slept > most && cpu-b.cpu > most
	if behind {
		b.behind.Store(now + 2*int64(busyPeriod))
	}
	b.began, b.slept, b.cpu = now, 0, cpu
	return behind
}

// asleep is called when the loop falls asleep, more than once if it wakes up for nothing.
func (b *busyness) asleep() {
	if b.sleeper == 0 {
		b.sleeper = relay.Clock()
	}
}

// place returns the loop for a new session: the first that keeps up, or else the one with the
// fewest sessions.
func (g *Group) place(now int64) *loop {
	if l := g.keepsUp(now); l != nil {
		return l
	}
	least := g.loops[0]
	for _, l := range g.loops[1:] {
		if l.load.Load() < least.load.Load() {
			least = l
		}
	}
	return least
}

// keepsUp returns the first loop that keeps up; nil if there is none.
func (g *Group) keepsUp(now int64) *loop {
	for _, l := range g.loops {
		if !l.busy.isBehind(now) {
			return l
		}
	}
	return nil
}

// shed hands half of the sessions that have events in this batch to a loop that keeps up.
func (l *loop) shed() {
	to := l.group.keepsUp(l.now)
	if to == nil {
		return
	}
	left := (l.n + 1) / 2
	for i := 0; i < l.n && left > 0; i++ {
		s, _ := l.sessionOf(&l.events[i])
		if s != nil && s.mayLeave() && !s.queued {
			l.handOver(s, to)
			left--
		}
	}
}

// handOver gives s, which is as mayLeave wants it, to another loop. No event is lost: epoll reports
// to that loop what is there when it registers the sockets.
func (l *loop) handOver(s *Session, to *loop) {
	l.forget(s)
	to.post(message{op: opTakeOver, s: s})
}

// takeOver goes on with a session that another loop has handed over.
func (l *loop) takeOver(s *Session) {
	l.enter(s)
	for i := range s.side {
		if err := l.register(s, i); err != nil {
			l.end(s, err)
			return
		}
	}
	l.sweep.mind(l)
}

// forget takes s, whose sockets are open, off the loop. Events of this batch for them are nobody's.
func (l *loop) forget(s *Session) {
	for i := range s.side {
		if fd := s.side[i].fd; fd >= 0 {
			syscall.EpollCtl(l.epfd, syscall.EPOLL_CTL_DEL, int(fd), &syscall.EpollEvent{})
		}
	}
	l.vacate(s)
	l.load.Add(-1)
}
