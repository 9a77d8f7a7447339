//go:build linux && !lbproxy_portable

package loop

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A Session is one client's connection and, in time, its upstream's. All of it belongs to the
// loop's goroutine, unless a field says otherwise.
type Session struct {
	handler Handler
	loop    atomic.Pointer[loop] // whose session it is; nil: it was not started
	moved   [2]atomic.Int64      // bytes from each side that were written; anybody may read them

	side   [2]side
	slot   int32 // in loop.sessions
	timer  int32 // in loop.timers; -1: not in it
	dials  uint32
	port   uint16 // of the server
	phase  phase
	failed int8  // whose side has failed; -1: neither
	queued bool  // in loop.again
	rests  uint8 // of a linger, so far
	linked bool  // there was a server

	at    int64 // clock of the timer
	late  int64 // clock at which lingering ends
	cause error // why it is over, or lingers; while choosing: how the last dial failed
	limit *limit
	idle  idleState
}

// A side is one of a session's two sockets.
type side struct {
	pending *pending // what it has yet to take; mostly nil
	fd      int32    // -1: none
	gen     uint32   // its events carry this; 0: it expects none
	state   sideState
	full    uint8 // reads in a row that filled more than half of the buffer
}

type sideState uint8

const (
	readable sideState = 1 << iota
	writable
	finished // its FIN is in the queue
	broken   // it has an error that is to be read
	urgent   // it has had urgent data: a short read says nothing any more
	ended    // there is nothing more to be read
	shut     // it was told that the other's stream has ended
)

const (
	client = 0
	server = 1
)

var sides = [...]relay.Side{client: relay.Client, server: relay.Server}

type phase uint8

const (
	choosing   phase = iota // asks the handler when its turn comes
	waiting                 // for Resume
	connecting              // to a server
	open                    // relaying
	moving                  // to another loop
	lingering               // a side has failed: what it sent is delivered, for a second at most
	over                    // closed when the batch is done
	left                    // the handler has its descriptors
)

// NewSession returns a session of fd, a client's socket, which it owns once it is started.
func NewSession(fd int, h Handler) *Session {
	s := &Session{handler: h, timer: -1, failed: -1}
	s.side[client] = side{fd: int32(fd), state: writable}
	s.side[server].fd = -1
	return s
}

// Counts returns the bytes that were written to the server and to the client.
func (s *Session) Counts() (sent, received int64) {
	return s.moved[client].Load(), s.moved[server].Load()
}

// Shut reports which sides were told that the other's stream has ended. It is called by Leave.
func (s *Session) Shut() (atClient, atServer bool) {
	return s.side[client].state&shut != 0, s.side[server].state&shut != 0
}

// Abort ends s with cause, and resets both sides. It may be called at any time, and does not wait.
func (s *Session) Abort(cause error) {
	s.post(func(l *loop) {
		if s.phase == lingering {
			cause = s.cause // the first counts
		}
		l.end(s, cause)
	})
}

// Resume has the handler asked again, after ErrWait. It may be called by anybody.
func (s *Session) Resume() {
	s.post(func(l *loop) {
		if s.phase == waiting {
			l.choose(s)
		}
	})
}

// Dials is the number of the dial in progress, for CancelDial. It is called by the handler.
func (s *Session) Dials() uint32 { return s.dials }

// CancelDial makes a dial fail with err, if it is still in progress. It may be called by anybody.
func (s *Session) CancelDial(n uint32, err error) {
	s.post(func(l *loop) {
		if s.phase == connecting && s.dials == n {
			l.dialFailed(s, err)
		}
	})
}

// post has the loop of s call f, unless s is over or has left by then.
func (s *Session) post(f func(*loop)) {
	l := s.loop.Load()
	if l == nil {
		return
	}
	l.post(func() {
		switch {
		case s.loop.Load() != l || s.phase == moving:
			s.post(f) // comes after takeOver
		case s.phase != over && s.phase != left:
			f(l)
		}
	})
}

func (s *Session) outcome() relay.Outcome {
	o := relay.Outcome{Connected: s.linked, Err: s.cause}
	o.Sent, o.Received = s.Counts()
	if s.failed >= 0 {
		o.Failed = sides[s.failed]
	}
	return o
}

// enter gives s a slot.
func (l *loop) enter(s *Session) {
	if n := len(l.free); n > 0 {
		s.slot = l.free[n-1]
		l.free = l.free[:n-1]
	} else {
		s.slot = int32(len(l.sessions))
		l.sessions = append(l.sessions, nil)
	}
	l.sessions[s.slot] = s
}

// start gives s a slot, and then a turn to look for a server.
func (l *loop) start(s *Session) {
	l.started.Add(1)
	l.enter(s)
	if err := l.register(s, client); err != nil {
		l.end(s, err)
		return
	}
	l.later(s)
}

// step gives s a turn.
func (l *loop) step(s *Session) {
	switch s.phase {
	case choosing:
		l.choose(s)
	case open:
		l.relay(s)
	case lingering:
		l.linger(s)
	}
}

// event notes the events of a side of s, and gives s a turn.
func (l *loop) event(s *Session, i int, events uint32) {
	c := &s.side[i]
	const end = syscall.EPOLLHUP | syscall.EPOLLERR
	if events&(syscall.EPOLLIN|syscall.EPOLLPRI|syscall.EPOLLRDHUP|end) != 0 {
		c.state |= readable
	}
	if events&(syscall.EPOLLOUT|end) != 0 {
		c.state |= writable
	}
	if events&syscall.EPOLLRDHUP != 0 {
		c.state |= finished
	}
	if events&syscall.EPOLLERR != 0 {
		c.state |= broken
	}
	if events&syscall.EPOLLPRI != 0 {
		c.state |= urgent
	}
	switch {
	case s.phase == connecting && i == server:
		l.connected(s, events)
	case s.phase == choosing, s.phase == waiting, s.phase == connecting:
		l.checkClient(s)
	default:
		l.step(s)
	}
}

// checkClient ends s if its client was reset before there is a server.
func (l *loop) checkClient(s *Session) {
	if c := &s.side[client]; c.state&broken != 0 {
		if err := takeError(c.fd); err != nil {
			s.failed = client
			l.end(s, readError(err))
		}
	}
}

// choose asks the handler what to dial, and dials it. One dial a turn: many may fail at once.
func (l *loop) choose(s *Session) {
	s.phase = choosing
	failed := s.cause
	s.cause = nil
	t, err := s.handler.Next(failed)
	switch {
	case err == ErrWait:
		s.phase = waiting
	case err == ErrLeave:
		l.leave(s)
	case err != nil:
		l.end(s, err)
	default:
		s.dials++
		if err := l.dial(s, t.Addr); err != nil {
			l.dialFailed(s, err)
			return
		}
		s.phase = connecting
		l.setTimer(s, l.now+int64(min(max(t.Timeout, 1), forever)))
	}
}

// dial begins to connect to addr.
func (l *loop) dial(s *Session, addr netip.AddrPort) error {
	family := syscall.AF_INET6
	if addr.Addr().Unmap().Is4() {
		family = syscall.AF_INET
	}
	fd, err := syscall.Socket(
		family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	s.side[server], s.port = side{fd: int32(fd)}, addr.Port()
	relay.NoDelayFD(fd)
	if errno := relay.ConnectFD(fd, addr); errno != 0 && errno != syscall.EINPROGRESS {
		return os.NewSyscallError("connect", errno)
	}
	return l.register(s, server)
}

// dialFailed gives up the server that s was connecting to. The handler is told in the next batch.
func (l *loop) dialFailed(s *Session, err error) {
	l.setTimer(s, 0)
	c := &s.side[server]
	if c.fd >= 0 {
		l.closing = append(l.closing, c.fd)
		*c = side{fd: -1}
	}
	s.phase, s.cause = choosing, err
	l.later(s)
}

// connected is called with the events of a server that s connects to.
func (l *loop) connected(s *Session, events uint32) {
	c := &s.side[server]
	switch {
	case events&(syscall.EPOLLERR|syscall.EPOLLHUP) != 0:
		err := takeError(c.fd)
		if err == nil {
			err = syscall.ECONNRESET
		}
		l.dialFailed(s, os.NewSyscallError("connect", err))
		return
	case events&syscall.EPOLLOUT == 0:
		return
	case s.port >= firstRandomPort() && isSelf(int(c.fd), s.port):
		l.dialFailed(s, os.NewSyscallError("connect", syscall.ECONNREFUSED))
		return
	}
	if h := s.handler.Header(); len(h) > 0 {
		n, errno := relay.SendFD(int(c.fd), h, 0)
		if errno == 0 && n < len(h) {
			errno = syscall.EAGAIN // the queue of a new socket has room for far more
		}
		if errno != 0 {
			l.dialFailed(s, fmt.Errorf("PROXY header: %w", os.NewSyscallError("send", errno)))
			return
		}
	}
	l.setTimer(s, 0)
	s.phase, s.linked = open, true
	s.idle.Since, s.idle.last = l.now, l.now
	l.sweepIn(forever)
	s.handler.Connected()
	l.relay(s)
}

// fail is called when side i of s has failed. What it has sent is delivered first.
func (l *loop) fail(s *Session, i int, err error) {
	s.phase, s.failed, s.cause, s.late = lingering, int8(i), err, l.now+int64(relay.LingerTime)
	s.side[i].state |= readable | broken // until a read says that there is no more
	l.drop(&s.side[i])
	l.linger(s)
}

// linger delivers what came from the side that has failed, and ends s when the peer's system has
// all of it. What the other side sends is thrown away: a peer that is busy sending might not come
// to read otherwise.
func (l *loop) linger(s *Session) {
	from, to := int(s.failed), 1-int(s.failed)
	l.discard(s, to)
	done := l.pump(s, from)
	switch c := &s.side[to]; {
	case s.phase != lingering:
	case l.now >= s.late, done && relay.UnsentFD(int(c.fd)) == 0:
		l.end(s, s.cause)
	case done:
		rest := int64(time.Millisecond) << min(s.rests, 4)
		s.rests++
		l.setTimer(s, min(l.now+rest, s.late))
	default:
		l.setTimer(s, s.late)
	}
}

// end makes s over, and resets its sides unless both streams have ended well.
func (l *loop) end(s *Session, cause error) {
	s.phase, s.cause = over, cause
	l.vacate(s)
	for i := range s.side {
		c := &s.side[i]
		l.drop(c)
		if c.fd >= 0 {
			if cause != nil {
				setLinger(int(c.fd), resetOnClose)
			}
			l.closing = append(l.closing, c.fd)
		}
	}
	l.over = append(l.over, s)
}

// vacate takes s off the loop. Events for it are nobody's: the sides of a session that gets its
// slot meanwhile have other generations.
func (l *loop) vacate(s *Session) {
	l.load.Add(-1)
	l.setTimer(s, 0)
	l.sessions[s.slot] = nil
	l.free = append(l.free, s.slot)
}

// leave gives the descriptors of s to the handler. No event for them is left: those of this batch
// are nobody's.
func (l *loop) leave(s *Session) {
	l.forget(s)
	s.phase = left
	s.handler.Leave(int(s.side[client].fd), int(s.side[server].fd))
}

// takeError returns the error that a socket has, and clears it.
func takeError(fd int32) error {
	errno, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
	if err == nil && errno != 0 {
		err = syscall.Errno(errno)
	}
	return err
}

func readError(err error) error {
	return &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", err)}
}

func writeError(call string, err error) error {
	return &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError(call, err)}
}

// isSelf reports whether a socket is connected to itself: the port that it was given at random is
// the one it has dialed, where nobody listens.
func isSelf(fd int, port uint16) bool {
	from, err := syscall.Getsockname(fd)
	if err != nil || addrPort(from).Port() != port {
		return false
	}
	to, err := syscall.Getpeername(fd)
	return err == nil && addrPort(from) == addrPort(to)
}

var firstRandomPort = sync.OnceValue(func() uint16 {
	b, _ := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	first, _, _ := strings.Cut(string(b), "\t")
	port, err := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
	if err != nil {
		return 1024
	}
	return uint16(port)
})

func addrPort(sa syscall.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		a := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.ZoneId != 0 {
			a = a.WithZone(zoneName(sa.ZoneId))
		}
		return netip.AddrPortFrom(a, uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func zoneName(id uint32) string {
	if i, err := net.InterfaceByIndex(int(id)); err == nil {
		return i.Name
	}
	return strconv.Itoa(int(id))
}
