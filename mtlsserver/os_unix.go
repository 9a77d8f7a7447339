//go:build unix

package mtlsserver

import (
	"io/fs"
	"net"
	"syscall"
)

func ownedByRoot(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Uid == 0
}

// readOnly reports whether a folder is in a read-only file system, where its mode does not matter.
func readOnly(folder string) bool {
	const write = 2
	return syscall.Access(folder, write) == syscall.EROFS
}

// awaitByte waits until c has a byte, its end or an error to read, or until its deadline. It holds
// no buffer while it waits.
func awaitByte(c net.Conn) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil // not a socket: the handshake will wait
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var b [1]byte
	return raw.Read(func(fd uintptr) bool {
		for {
			// Peek before the first wait: data that came earlier causes no new event.
			_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK)
			if err != syscall.EINTR {
				return err != syscall.EAGAIN
			}
		}
	})
}
