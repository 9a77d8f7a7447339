//go:build linux && !lbproxy_portable

package loop

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A Listener accepts bare descriptors from a TCP listener, which spares each connection most of the
// system calls of package net. A loop accepts until there is an error, or a connection that it
// cannot take. Accept returns that one, and its next call lets the loop accept again. Only one loop
// accepts at a time: accepting is the smaller part of a connection's cost, and a connection wakes
// all loops that wait for its socket. The Listener moves to the loop that gets new sessions.
//
// The TCP listener owns the socket, and the Listener uses it only while the TCP listener is open.
// An epoll descriptor of the Listener's own watches the socket, so that no loop's epoll has an
// entry for it when it is closed.
type Listener struct {
	group    *Group
	loop     atomic.Pointer[loop] // the one that is to accept; it alone hands the Listener on
	raw      syscall.RawConn      // of the TCP listener
	local    net.Addr             // nil: to be asked for
	epfd     int
	take     func(Accepted) bool // takes a connection on a loop, or leaves it to Accept
	back     chan Accepted       // from the loop, which has stopped accepting
	closed   chan struct{}
	close    func() // closes closed, once
	watching sync.WaitGroup

	// These belong to Accept until it lets a loop accept, and then to the loop until it stops.
	accept  func(uintptr) // made once
	fd      int
	from    netip.AddrPort
	zone    uint32
	errno   syscall.Errno
	drained bool // the queue was empty after prepare
}

// Accepted is a connection that was accepted.
type Accepted struct {
	FD            int
	Local, Remote net.Addr

	group *Group
	near  *loop // that has accepted it; nil: none
	err   error // instead of all that
}

const (
	// goneTime is how long it takes, at most, to notice that somebody else has closed the TCP
	// listener: the system does not say. Each look wakes the runtime's monitor, which then looks
	// around for a while: every 50 ms it cost some percent of the CPU of short connections.
	goneTime = 500 * time.Millisecond

	accepts = 16 // for each event, before others have their turn
)

// NewListener returns a Listener for l. Its connections inherit TCP_NODELAY and keep-alive, which
// net sets on each connection. take is called on a loop: it must not block. The caller closes the
// Listener, and l.
func (g *Group) NewListener(l *net.TCPListener, take func(Accepted) bool) (*Listener, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	epfd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	a := &Listener{
		group: g, raw: raw, epfd: epfd, take: take, closed: make(chan struct{}),
		back: make(chan Accepted, 1), // is empty when Accept lets a loop accept, which sends once
	}
	if addr, ok := l.Addr().(*net.TCPAddr); ok && !addr.IP.IsUnspecified() {
		a.local = addr
	}
	controlErr := raw.Control(func(fd uintptr) { err = a.prepare(int(fd)) })
	if err = cmp.Or(controlErr, err); err != nil {
		syscall.Close(epfd)
		return nil, err
	}
	a.accept = a.acceptFD
	a.close = sync.OnceFunc(func() { close(a.closed) })
	a.loop.Store(g.loops[0])
	a.watching.Go(a.watch)
	return a, nil
}

// setOptions sets the options of a connection, or what a listener's connections inherit.
func setOptions(fd int) error {
	setLinger(fd, noLinger)
	if err := relay.KeepAliveFD(fd); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt",
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1))
}

// prepare sets what accepted sockets inherit, and has a's descriptor watch the listener's.
func (a *Listener) prepare(fd int) error {
	if err := setOptions(fd); err != nil {
		return err
	}
	ev := syscall.EpollEvent{Events: syscall.EPOLLIN}
	return os.NewSyscallError("epoll_ctl", syscall.EpollCtl(a.epfd, syscall.EPOLL_CTL_ADD, fd, &ev))
}

// watch waits until a is closed, or its TCP listener is.
func (a *Listener) watch() {
	t := time.NewTicker(goneTime)
	defer t.Stop()
	for a.raw.Control(func(uintptr) {}) == nil && !a.isClosed() {
		select {
		case <-a.closed:
		case <-t.C:
		}
	}
	a.close()
	done := make(chan struct{})
	if a.onLoop(func(l *loop) {
		l.unlisten(a)
		close(done)
	}) {
		<-done
	}
	syscall.Close(a.epfd)
	close(a.back)
	for c := range a.back { // nobody will ask for it
		if c.err == nil {
			Reset(c.FD)
		}
	}
}

// onLoop has the loop that accepts call f. It returns false if that loop has ended.
func (a *Listener) onLoop(f func(*loop)) bool {
	l := a.loop.Load()
	return l.post(func() {
		// If a has moved, its new loop gets this message after the one that makes it listen.
		if a.loop.Load() == l || !a.onLoop(f) {
			f(l)
		}
	})
}

func (a *Listener) isClosed() bool {
	select {
	case <-a.closed:
		return true
	default:
		return false
	}
}

// Close makes Accept fail with net.ErrClosed.
func (a *Listener) Close() {
	a.close()
	a.watching.Wait()
}

// Accept lets the loop accept, and returns the first error, or connection that the loop could not
// take. One goroutine may call it.
func (a *Listener) Accept() (Accepted, error) {
	if a.isClosed() { // a loop may be accepting
		return Accepted{}, net.ErrClosed
	}
	c, ok := a.try()
	if ok && c.err == nil && !a.drained {
		// It may have been in the queue before prepare. If it is gone, a read will say so.
		_ = setOptions(c.FD)
	}
	if !ok {
		a.drained = true
		a.onLoop(func(l *loop) { l.listen(a) })
		select {
		case c, ok = <-a.back:
		case <-a.closed:
		}
	}
	if !ok {
		return c, net.ErrClosed
	}
	return c, c.err
}

// Start starts a session of c.
func (c *Accepted) Start(s *Session) {
	if l := c.near; l != nil && l == c.group.place(l.now) {
		l.own(s)
		l.start(s)
	} else {
		c.group.Start(s)
	}
}

// try accepts a connection, or returns false if there is none.
func (a *Listener) try() (c Accepted, ok bool) {
	for {
		if a.raw.Control(a.accept) != nil {
			return Accepted{err: net.ErrClosed}, true
		}
		switch a.errno {
		case syscall.EAGAIN:
			return c, false
		case syscall.EINTR, syscall.ECONNABORTED: // as net does
			continue
		case 0:
			if a.zone != 0 {
				a.from = netip.AddrPortFrom(a.from.Addr().WithZone(zoneName(a.zone)), a.from.Port())
			}
			c = Accepted{
				FD: a.fd, Local: a.local, Remote: net.TCPAddrFromAddrPort(a.from),
				group: a.group,
			}
			if c.Local != nil {
				return c, true
			}
			sa, err := syscall.Getsockname(a.fd)
			if err != nil {
				Reset(a.fd)
				continue
			}
			c.Local = net.TCPAddrFromAddrPort(addrPort(sa))
			return c, true
		}
		err := &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", a.errno)}
		return Accepted{err: err}, true
	}
}

// acceptFD accepts. Another process that shares the socket, as after a socket activation, may have
// made it block. An accept that waits would hold up the loop, and the garbage collector.
func (a *Listener) acceptFD(fd uintptr) {
	if relay.BlocksFD(int(fd)) {
		syscall.SetNonblock(int(fd), true)
	}
	a.fd, a.from, a.zone, a.errno = relay.AcceptFD(int(fd))
}

// listen makes the loop accept from a, unless a was closed meanwhile.
func (l *loop) listen(a *Listener) {
	if a.isClosed() {
		return
	}
	ev := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: listenerEvent, Pad: int32(a.epfd)}
	if err := syscall.EpollCtl(l.epfd, syscall.EPOLL_CTL_ADD, a.epfd, &ev); err != nil {
		a.back <- Accepted{err: os.NewSyscallError("epoll_ctl", err)}
		return
	}
	l.listeners[int32(a.epfd)] = a
}

// unlisten makes the loop stop accepting from a.
func (l *loop) unlisten(a *Listener) {
	delete(l.listeners, int32(a.epfd))
	syscall.EpollCtl(l.epfd, syscall.EPOLL_CTL_DEL, a.epfd, &syscall.EpollEvent{})
}

const listenerEvent = -1 // in place of a slot and a side

// acceptSome accepts, and leaves it to Accept when it meets an error or a connection is not taken.
// If another loop gets new sessions now, it hands a to that loop instead.
func (l *loop) acceptSome(a *Listener) {
	if to := l.group.keepsUp(l.now); to != nil && to != l {
		l.unlisten(a)
		a.loop.Store(to)
		a.onLoop(func(l *loop) { l.listen(a) })
		return
	}
	for range accepts {
		c, ok := a.try()
		if !ok {
			return
		}
		c.near = l
		if c.err != nil || !a.take(c) {
			l.unlisten(a)
			c.near = nil
			a.back <- c
			return
		}
	}
}

// Duplicate returns a duplicate of a connection's descriptor, which the caller owns. It fails if
// calls on the descriptor may wait.
func Duplicate(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd = -1
	controlErr := raw.Control(func(old uintptr) {
		if relay.BlocksFD(int(old)) {
			err = errBlocks
			return
		}
		setLinger(int(old), noLinger)
		n, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, old, syscall.F_DUPFD_CLOEXEC, 0)
		if errno != 0 {
			err = os.NewSyscallError("fcntl", errno)
			return
		}
		fd = int(n)
	})
	return fd, cmp.Or(controlErr, err)
}

var errBlocks = errors.New("lbproxy: the socket was made to block")

var (
	// With a time to linger, the close of a socket waits, and its loop with it.
	noLinger     = syscall.Linger{}
	resetOnClose = syscall.Linger{Onoff: 1}
)

func setLinger(fd int, l syscall.Linger) {
	syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &l)
}

// Reset resets and closes a socket.
func Reset(fd int) {
	setLinger(fd, resetOnClose)
	relay.CloseFD(fd)
}
