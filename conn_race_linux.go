//go:build race || msan || asan || 386

package lbproxy

import "syscall"

// Here readFD and writeFD are such that the detectors know what is read, and that what is read was written before: else
// whoever tests with both ends in one process would be told of races that are none. (And 386 has other system calls for
// sockets.)
func readFD(fd uintptr, b []byte) (int, syscall.Errno) { return told(syscall.Read(int(fd), b)) }

func writeFD(fd uintptr, b []byte) (int, syscall.Errno) { return told(syscall.Write(int(fd), b)) }

func shutdownFD(fd uintptr) syscall.Errno {
	_, errno := told(0, syscall.Shutdown(int(fd), syscall.SHUT_WR))
	return errno
}

func told(n int, err error) (int, syscall.Errno) {
	errno, _ := err.(syscall.Errno)
	return n, errno
}
