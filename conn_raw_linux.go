//go:build !race && !msan && !asan && !386

package lbproxy

import (
	"syscall"
	"unsafe"
)

// readFD and writeFD move at most a buffer, from or to a socket, without blocking. The scheduler is not told
// (RawSyscall): telling it costs more than what it could do meanwhile, for it often takes the processor away in the
// middle, and gives it to another thread, which has to be woken. A round trip of 64 bytes takes a third less time on the
// processor like this. Such a call cannot be preempted while it copies, which is 10 µs for a whole buffer; splices,
// which may take longer, do tell. It must not block: nothing could stop for the garbage collector. So it is not read and
// write, which do if somebody has made the socket block (by TCPConn.File and then File.Fd).
func readFD(fd uintptr, b []byte) (int, syscall.Errno) {
	return transfer(syscall.SYS_RECVFROM, fd, b, syscall.MSG_DONTWAIT)
}

func writeFD(fd uintptr, b []byte) (int, syscall.Errno) {
	return transfer(syscall.SYS_SENDTO, fd, b, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
}

// shutdownFD ends a socket's stream, which on a loopback interface has the peer's system do its part as well.
func shutdownFD(fd uintptr) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, fd, syscall.SHUT_WR, 0)
	return errno
}

func transfer(call, fd uintptr, b []byte, flags uintptr) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
	return int(n), errno
}
