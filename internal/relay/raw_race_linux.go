//go:build (race || msan || asan || 386) && !lbproxy_portable

package relay

import "syscall"

// Here recvFD and sendFD tell the race detector that what is received was sent before, as syscall's
// Read and Write do: else whoever tests with both ends in one process would hear of races that are
// none. Read and Write themselves cannot be used, since they block if the socket does; of no bytes,
// Read never does, and Write of a descriptor that there is not does nothing else. (And 386 has
// other system calls for sockets.)
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
