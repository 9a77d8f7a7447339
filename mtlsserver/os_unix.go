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

// readOnly reports whether a folder is in a read-only file system. Its mode does not matter then.
func readOnly(folder string) bool {
	const write = 2
	return syscall.Access(folder, write) == syscall.EROFS
}

// awaitByte waits until c has a byte, its end or an error to read, or until its deadline. A client
// that sends nothing costs no buffer meanwhile.
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
			// What was there before the first wait causes no event any more, so it must be looked
			// for.
			_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK)
			if err != syscall.EINTR {
				return err != syscall.EAGAIN
			}
		}
	})
}
