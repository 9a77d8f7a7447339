//go:build linux && !lbproxy_portable

package loop

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A Group is the loops of an app, which share the sessions.
type Group struct {
	loops   []*loop
	running sync.WaitGroup
}

// NewGroup starts n loops. It fails if the runtime or the system refuses what they need. Config's
// KeepAlive holds for all sessions.
func NewGroup(config relay.Config, n int) (*Group, error) {
	g := &Group{}
	var err error
	for range n {
		var l *loop
		if l, err = newLoop(config, g); err != nil {
			break
		}
		g.loops = append(g.loops, l)
	}
	for _, l := range g.loops {
		g.running.Go(l.run)
	}
	if err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// Close ends the loops and waits for them. No session may be open, and no Listener.
func (g *Group) Close() {
	for _, l := range g.loops {
		l.mu.Lock()
		l.closed = true
		l.push(func() { l.stopping = true })
		l.mu.Unlock()
	}
	g.running.Wait()
}

// Started returns how many sessions were ever started.
func (g *Group) Started() (n int64) {
	for _, l := range g.loops {
		n += l.started.Load()
	}
	return n
}

// Start starts s on a loop.
func (g *Group) Start(s *Session) { g.place(relay.Clock()).adopt(s, (*loop).start) }

// place returns the loop for a new session: the first that keeps up, or else the one with the
// fewest sessions.
func (g *Group) place(now int64) *loop {
	if l := g.keepsUp(now); l != nil {
		return l
	}
	return slices.MinFunc(g.loops, func(a, b *loop) int {
		return cmp.Compare(a.load.Load(), b.load.Load())
	})
}

// keepsUp returns the first loop that keeps up; nil if there is none.
func (g *Group) keepsUp(now int64) *loop {
	return g.first(func(l *loop) bool { return !l.busy.isBehind(now) })
}

// first returns the first loop for which ok is true; nil if there is none.
func (g *Group) first(ok func(*loop) bool) *loop {
	if i := slices.IndexFunc(g.loops, ok); i >= 0 {
		return g.loops[i]
	}
	return nil
}

// How loops share the sessions.
//
// Each loop that is awake costs wake-ups. So new sessions go to the first loop that keeps up. A
// loop that was awake for most of a period is busy. It hands half of the sessions that have
// something to do to a loop that is not. A loop that hardly slept is also behind: then new sessions
// go elsewhere.

const (
	// busyPeriod is so short that clients hardly notice a loop that is behind. Sessions that are
	// younger stay: they may soon be over, and to hand them over would cost more than it gains.
	busyPeriod = 50 * time.Millisecond

	// A loop is busy, or behind, if it was awake for more than so many percent of a period.
	busyAwake   = 80
	behindAwake = 98

	// leastUsed is a CPU time of the process, in percent of a period. A loop that is awake while
	// the process uses less is held up by other processes, and another loop would not help. The
	// bound is far below busyAwake because some systems do not count the network's work as the
	// process's.
	leastUsed = 50
)

// busyness is how busy a loop is. All but busy and behind belongs to the loop's goroutine.
type busyness struct {
	busy    atomic.Int64 // clock until which the loop is busy
	behind  atomic.Int64 // clock until which it is behind
	began   int64        // clock at which the period began
	cpu     int64        // CPU time of the process by then
	slept   int64        // time that the loop has slept since
	sleeper int64        // clock at which the loop fell asleep; 0: it is awake
}

func (b *busyness) begin(now int64) { b.began, b.cpu, b.slept = now, processTime(), 0 }

func (b *busyness) isBusy(now int64) bool   { return now < b.busy.Load() }
func (b *busyness) isBehind(now int64) bool { return now < b.behind.Load() }

// awake is called when the loop is awake. It returns true if a period has ended in which the loop
// was busy.
func (b *busyness) awake(now int64) bool {
	if b.sleeper != 0 {
		b.slept += now - b.sleeper
		b.sleeper = 0
	}
	period := now - b.began
	if period < int64(busyPeriod) {
		return false
	}
	awake, before := period-b.slept, b.cpu
	b.begin(now)
	used := b.cpu - before
	if 100*awake <= busyAwake*period || 100*used <= leastUsed*period {
		return false
	}
	b.busy.Store(now + 2*period)
	if 100*awake > behindAwake*period {
		b.behind.Store(now + 2*period)
	}
	return true
}

// asleep is called when the loop falls asleep, more than once if it wakes up for nothing.
func (b *busyness) asleep() {
	if b.sleeper == 0 {
		b.sleeper = relay.Clock()
	}
}

func processTime() int64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}

// shed hands every second session that has something to do to a loop that is not busy, if there is
// one. The first stays: if it is the only one, another loop would be as busy with it.
func (l *loop) shed() {
	to := l.group.first(func(other *loop) bool { return !other.busy.isBusy(l.now) })
	if to == nil {
		return
	}
	for i := range l.n {
		if s, _ := l.sessionOf(&l.events[i]); s != nil {
			l.later(s) // once, though both sides may have an event
		}
	}
	stay := l.again[:0]
	for i, s := range l.again {
		if i%2 == 1 && s.phase == open && l.now-s.idle.Since >= int64(busyPeriod) {
			s.queued = false
			l.handOver(s, to)
		} else {
			stay = append(stay, s)
		}
	}
	clear(l.again[len(stay):])
	l.again = stay
}

// handOver gives s, which is open, to another loop.
func (l *loop) handOver(s *Session, to *loop) {
	l.forget(s)
	s.phase = moving
	to.adopt(s, (*loop).takeOver)
}

// takeOver goes on with a session that another loop has handed over. No event was lost: epoll
// reports what there is when the sockets are registered.
func (l *loop) takeOver(s *Session) {
	s.phase = open
	l.enter(s)
	if s.limit != nil {
		l.setTimer(s, s.limit.next())
	}
	for i := range s.side {
		if err := l.register(s, i); err != nil {
			l.end(s, err)
			return
		}
	}
	l.sweepIn(forever)
	l.later(s) // it may have more to do though no event will say so
}

// forget takes s, whose sockets stay open, off the loop.
func (l *loop) forget(s *Session) {
	for i := range s.side {
		if fd := s.side[i].fd; fd >= 0 {
			syscall.EpollCtl(l.epfd, syscall.EPOLL_CTL_DEL, int(fd), &syscall.EpollEvent{})
		}
	}
	l.vacate(s)
}
