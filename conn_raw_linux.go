//go:build !race && !msan && !asan

package lbproxy

import (
	"syscall"
	"unsafe"
)

// readFD and writeFD move at most a buffer, from or to a socket that does not block. The scheduler is not told
// (RawSyscall): telling it costs more than what it could do meanwhile, for it often takes the processor away in the
// middle, and gives it to another thread, which has to be woken. A round trip of 64 bytes takes a third less time on the
// processor like this. Such a call cannot be preempted while it copies, which is 10 µs for a whole buffer. Splices,
// which may take longer, do tell.
func readFD(fd uintptr, b []byte) (int, syscall.Errno) { return transfer(syscall.SYS_READ, fd, b) }

func writeFD(fd uintptr, b []byte) (int, syscall.Errno) { return transfer(syscall.SYS_WRITE, fd, b) }

func transfer(call, fd uintptr, b []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}
