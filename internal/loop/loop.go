//go:build linux && !lbproxy_portable

package loop

import (
	"container/heap"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A loop is a goroutine that drives many sessions. It waits by its epoll descriptor, which the
// runtime polls like any socket: so no thread is locked, and no call blocks one.
type loop struct {
	config  relay.Config
	group   *Group
	epfd    int
	file    *os.File // of epfd
	raw     syscall.RawConn
	load    atomic.Int64 // sessions, those in the inbox included
	started atomic.Int64 // sessions ever
	busy    busyness

	mu     sync.Mutex // guards what follows; held over no system call
	inbox  []func()   // what other goroutines have the loop call
	spare  []func()   // is the inbox next; the loop's own
	closed bool       // the inbox takes nothing more

	// The fields below belong to the loop's goroutine.
	now       int64 // clock when the batch began
	alarm     *time.Timer
	armed     int64 // clock at which the alarm posts a message; 0: it does not
	stopping  bool
	events    [256]syscall.EpollEvent
	n         int        // of them
	sessions  []*Session // by slot; nil: free
	free      []int32    // slots
	lastGen   uint32
	again     []*Session          // have something to do, though no event will say so
	over      []*Session          // are reported when the batch is done
	closing   []int32             // descriptors, closed by then: no number is used anew in a batch
	listeners map[int32]*Listener // from which it accepts, by epfd
	timers    timers
	sweep     sweep
	buf       [bufferSize]byte
}

var (
	past = time.Unix(1, 0)

	errNotPollable = errors.New("lbproxy: the runtime does not poll epoll descriptors")
	setNonblock    = syscall.SetNonblock // tests make it fail
)

func newLoop(config relay.Config, g *Group) (*loop, error) {
	l := &loop{config: config, group: g, listeners: map[int32]*Listener{}}
	l.busy.begin(relay.Clock())
	var err error
	l.epfd, l.file, l.raw, err = newEpoll()
	if err == nil {
		ring := func() { l.armed = 0 }
		l.alarm = time.AfterFunc(forever, func() { l.post(ring) })
	}
	return l, err
}

// newEpoll returns an epoll descriptor that the runtime polls.
func newEpoll() (int, *os.File, syscall.RawConn, error) {
	epfd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return 0, nil, nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := setNonblock(epfd, true); err != nil {
		syscall.Close(epfd)
		return 0, nil, nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(epfd), "epoll")
	raw, err := file.SyscallConn()
	if err == nil && file.SetReadDeadline(time.Time{}) != nil {
		err = errNotPollable
	}
	if err != nil {
		file.Close()
		return 0, nil, nil, err
	}
	return epfd, file, raw, nil
}

// own makes s one of l's.
func (l *loop) own(s *Session) {
	l.load.Add(1)
	s.loop.Store(l)
}

// adopt makes s one of l's, and has the loop begin with it. It does both under the lock: what is
// posted for s from then on comes after that.
func (l *loop) adopt(s *Session, begin func(*loop, *Session)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.own(s)
	l.push(func() { begin(l, s) })
}

// post has the loop call f, or returns false if the loop has ended.
func (l *loop) post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.push(f)
	return true
}

// push has the loop call f, and wakes it if need be. The caller holds mu.
func (l *loop) push(f func()) {
	if l.inbox = append(l.inbox, f); len(l.inbox) == 1 {
		l.file.SetReadDeadline(past) // costs less than a descriptor to write to
	}
}

func (l *loop) run() {
	defer l.file.Close()
	defer l.alarm.Stop()
	ready := func(epfd uintptr) bool {
		if !l.poll(epfd) {
			l.busy.asleep()
			return false
		}
		return true
	}
	for !l.stopping {
		if len(l.again) > 0 || l.sweep.running { // no event announces that
			l.poll(uintptr(l.epfd))
		} else {
			l.wait(ready)
		}
		l.now = relay.Clock()
		busy := l.busy.awake(l.now)
		for i := range l.n {
			l.dispatch(&l.events[i])
		}
		if busy {
			l.shed()
		}
		l.receive()
		l.expire()
		l.resume()
		l.sweepSome()
		l.bury()
	}
}

// wait waits for events, or for messages: the alarm posts one when the next timer is due.
func (l *loop) wait(ready func(uintptr) bool) {
	l.n = 0
	next := l.sweep.next
	if len(l.timers) > 0 && (next == 0 || l.timers[0].at < next) {
		next = l.timers[0].at
	}
	if next != 0 && (l.armed == 0 || next < l.armed) {
		l.armed = next
		l.alarm.Reset(time.Duration(next - relay.Clock()))
	}
	if l.raw.Read(ready) != nil { // there is a message
		l.poll(uintptr(l.epfd)) // messages alone must not keep the loop from looking
	}
}

// poll takes the events there are. The runtime calls it again when the descriptor has events.
func (l *loop) poll(epfd uintptr) bool {
	l.n = relay.EpollFD(int(epfd), l.events[:])
	return l.n > 0
}

// dispatch hands an event to its session.
func (l *loop) dispatch(ev *syscall.EpollEvent) {
	if ev.Fd == listenerEvent {
		if a := l.listeners[ev.Pad]; a != nil {
			l.acceptSome(a)
		}
		return
	}
	if s, i := l.sessionOf(ev); s != nil {
		l.event(s, i, ev.Events)
	}
}

// sessionOf returns the session and side of an event. It returns nil if, since the batch began, the
// session has ended or gone elsewhere.
func (l *loop) sessionOf(ev *syscall.EpollEvent) (s *Session, side int) {
	if ev.Fd == listenerEvent {
		return nil, 0
	}
	side = int(ev.Fd & 1)
	if s = l.sessions[ev.Fd>>1]; s == nil || s.side[side].gen != uint32(ev.Pad) {
		return nil, 0
	}
	return s, side
}

// register makes epoll report events of a side of s, which gets a new generation.
func (l *loop) register(s *Session, i int) error {
	c := &s.side[i]
	if l.lastGen++; l.lastGen == 0 {
		l.lastGen++ // 0 is for sides that expect none
	}
	c.gen = l.lastGen
	const edges = 1 << 31 // EPOLLET, which syscall has as an int32 on some machines
	const events = syscall.EPOLLIN | syscall.EPOLLPRI | syscall.EPOLLOUT | syscall.EPOLLRDHUP | edges
	ev := syscall.EpollEvent{Events: events, Fd: s.slot<<1 | int32(i), Pad: int32(c.gen)}
	err := syscall.EpollCtl(l.epfd, syscall.EPOLL_CTL_ADD, int(c.fd), &ev)
	return os.NewSyscallError("epoll_ctl", err)
}

// receive does what others have asked for.
func (l *loop) receive() {
	l.mu.Lock()
	inbox := l.inbox
	l.inbox = l.spare[:0]
	if len(inbox) > 0 {
		l.file.SetReadDeadline(time.Time{})
	}
	l.mu.Unlock()
	for _, f := range inbox {
		f()
	}
	clear(inbox)
	l.spare = inbox[:0]
}

// later gives s a turn, behind the others.
func (l *loop) later(s *Session) {
	if !s.queued {
		s.queued = true
		l.again = append(l.again, s)
	}
}

func (l *loop) resume() {
	n := len(l.again) // who comes again meanwhile has to wait for the next batch
	for i := range n {
		s := l.again[i]
		s.queued = false
		l.step(s)
	}
	rest := copy(l.again, l.again[n:])
	clear(l.again[rest:])
	l.again = l.again[:rest]
}

// bury closes what is to be closed, and reports the sessions that are over.
func (l *loop) bury() {
	for _, fd := range l.closing {
		relay.CloseFD(int(fd))
	}
	l.closing = l.closing[:0]
	for i, s := range l.over {
		l.over[i] = nil
		s.handler.Done(s.outcome())
	}
	l.over = l.over[:0]
}

// setTimer gives s a turn at a time, once; 0: never. It takes the place of an earlier one.
func (l *loop) setTimer(s *Session, at int64) {
	switch s.at = at; {
	case at == 0 && s.timer >= 0:
		heap.Remove(&l.timers, int(s.timer))
	case at != 0 && s.timer >= 0:
		heap.Fix(&l.timers, int(s.timer))
	case at != 0:
		heap.Push(&l.timers, s)
	}
}

// expire gives a turn to the sessions whose time has come.
func (l *loop) expire() {
	for len(l.timers) > 0 && l.timers[0].at <= l.now {
		s := l.timers[0]
		l.setTimer(s, 0)
		switch s.phase {
		case connecting:
			l.dialFailed(s, os.ErrDeadlineExceeded)
		case open:
			l.letGo(s)
		case lingering:
			l.linger(s)
		}
	}
}

// timers is a heap of sessions, the next one in front.
type timers []*Session

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at < t[j].at }
func (t timers) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].timer, t[j].timer = int32(i), int32(j)
}

func (t *timers) Push(x any) {
	s := x.(*Session)
	s.timer = int32(len(*t))
	*t = append(*t, s)
}

func (t *timers) Pop() any {
	last := len(*t) - 1
	s := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	s.timer = -1
	return s
}
