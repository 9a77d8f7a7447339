//go:build !lbproxy_portable

package relay

import (
	"cmp"
	"os"
	"syscall"
	"unsafe"
)

// These functions take bare descriptors, as internal/loop has them. None of them blocks, so most do
// not tell the scheduler: see RecvFD.

// UnsentFD returns how many written bytes a socket's peer has not acknowledged.
func UnsentFD(fd int) int {
	var queued int32
	// SIOCOUTQ, tcp(7); it has the number of TIOCOUTQ.
	syscall.Syscall(
		syscall.SYS_IOCTL, uintptr(fd), syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&queued)))
	if queued > 0 && tcpState(fd) == tcpClosed {
		return 0 // nobody is there to acknowledge them
	}
	return int(queued)
}

// BlocksFD reports whether a call on a descriptor may wait, as far as the system says.
func BlocksFD(fd int) bool {
	flags, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFL, 0)
	return errno != 0 || flags&syscall.O_NONBLOCK == 0
}

// AtMarkFD reports whether the next byte of a socket is the urgent one.
func AtMarkFD(fd int) bool {
	const siocatmark = 0x8905 // SIOCATMARK, sockatmark(3)
	var at int32
	syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(fd), siocatmark, uintptr(unsafe.Pointer(&at)))
	return at != 0
}

// pollFD returns which of events a descriptor has now, and EPOLLERR if it has an error, which it
// leaves there. If the system refuses to say, it returns events.
func pollFD(fd int, events int16) int16 {
	p := struct {
		fd           int32
		events, have int16
	}{int32(fd), events, 0}
	var wait syscall.Timespec
	for {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1,
			uintptr(unsafe.Pointer(&wait)), 0, 0, 0)
		switch errno {
		case 0:
			return p.have
		case syscall.EINTR:
		default:
			return events
		}
	}
}

// CloseFD closes a descriptor.
func CloseFD(fd int) { syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0) }

// EpollFD takes events without waiting.
func EpollFD(epfd int, events []syscall.EpollEvent) int {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(epfd),
		uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// KeepAliveFD sets the keep-alive that net sets by default.
func KeepAliveFD(fd int) error {
	for _, option := range []struct{ level, name, value int }{
		{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 15},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 9},
	} {
		if err := syscall.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

// CloseWrite implements what the relay needs for half-closes.
func (c *FileConn) CloseWrite() error {
	return c.control("shutdown", func(fd int) error { return syscall.Shutdown(fd, syscall.SHUT_WR) })
}

// SetLinger is [net.TCPConn.SetLinger].
func (c *FileConn) SetLinger(sec int) error {
	l := syscall.Linger{Onoff: 1, Linger: int32(sec)}
	if sec < 0 {
		l = syscall.Linger{}
	}
	return c.control("setsockopt", func(fd int) error {
		return syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &l)
	})
}

func (c *FileConn) control(call string, f func(fd int) error) (wrong error) {
	err := control(rawTCP(c), func(fd int) { wrong = os.NewSyscallError(call, f(fd)) })
	return cmp.Or(err, wrong)
}
