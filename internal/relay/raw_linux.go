//go:build !race && !msan && !asan && !386 && !lbproxy_portable

package relay

import (
	"syscall"
	"unsafe"
)

// recvFD and sendFD move at most a buffer, from or to a socket, without blocking. The scheduler is
// not told (RawSyscall): telling it costs more than what it could do meanwhile, for it often takes
// the processor away in the middle, and gives it to another thread, which has to be woken. A round
// trip of 64 bytes takes a third less time on the processor like this. Such a call cannot be
// preempted while it copies, which is 10 µs for a whole buffer; splices, which may take longer, do
// tell. It must not block, since nothing could stop for the garbage collector: hence MSG_DONTWAIT,
// where read and write would block if somebody has made the socket do so (File().Fd()).
func recvFD(fd uintptr, b []byte, flags int) (int, syscall.Errno) {
	return transfer(syscall.SYS_RECVFROM, fd, b, uintptr(flags|syscall.MSG_DONTWAIT))
}

func sendFD(fd uintptr, b []byte) (int, syscall.Errno) {
	return transfer(syscall.SYS_SENDTO, fd, b, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
}

// shutdownFD ends a socket's stream. On loopback the peer's system does its part within the call.
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
