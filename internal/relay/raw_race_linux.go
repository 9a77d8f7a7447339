//go:build (race || msan || asan || 386) && !lbproxy_portable

package relay

import "syscall"

// These variants of recvFD and sendFD tell the race detector that received bytes were sent before,
// as syscall.Read and syscall.Write do. Otherwise a test with both ends in one process would report
// false races. Read and Write of the bytes themselves would block on a blocking socket. A Read of
// no bytes and a Write to an invalid descriptor do not block, and still inform the detector. (386
// is here because it has other system calls for sockets.)
func recvFD(fd uintptr, b []byte, flags int) (int, syscall.Errno) {
	n, _, err := syscall.Recvfrom(int(fd), b, flags|syscall.MSG_DONTWAIT)
	if err == nil {
		syscall.Read(int(fd), nil) // acquires
	}
	return told(n, err)
}

func sendFD(fd uintptr, b []byte) (int, syscall.Errno) {
	syscall.Write(-1, nil) // releases
	return told(syscall.SendmsgN(int(fd), b, nil, nil, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL))
}

func shutdownFD(fd uintptr) syscall.Errno {
	_, errno := told(0, syscall.Shutdown(int(fd), syscall.SHUT_WR))
	return errno
}

func told(n int, err error) (int, syscall.Errno) {
	if err != nil {
		return 0, err.(syscall.Errno)
	}
	return n, 0
}
