//go:build !race && !msan && !asan && !386 && !lbproxy_portable

package relay

import (
	"syscall"
	"unsafe"
)

// recvFD and sendFD move at most a buffer from or to a socket without blocking. They use
// RawSyscall, which does not inform the scheduler: an informed scheduler often gives the processor
// to another thread in the middle of the call, and waking that thread costs more than it gains. A
// round trip of 64 bytes takes a third less CPU time this way.
//
// A RawSyscall cannot be preempted: copying a whole buffer takes 10 µs. Splices may take longer and
// therefore inform the scheduler. A RawSyscall that blocks would hold up the garbage collector, so
// the calls have MSG_DONTWAIT. Plain read and write would block if the caller has made the socket
// blocking, as File().Fd() does.
func recvFD(fd uintptr, b []byte, flags int) (int, syscall.Errno) {
	return transfer(syscall.SYS_RECVFROM, fd, b, uintptr(flags|syscall.MSG_DONTWAIT))
}

func sendFD(fd uintptr, b []byte) (int, syscall.Errno) {
	return transfer(syscall.SYS_SENDTO, fd, b, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
}

// shutdownFD half-closes a socket. On loopback the call includes the work of the peer's system.
func shutdownFD(fd uintptr) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, fd, syscall.SHUT_WR, 0)
	return errno
}

func transfer(call, fd uintptr, b []byte, flags uintptr) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(
		call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
