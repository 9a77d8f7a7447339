package admin

import (
	"fmt"
	"net"
	"syscall"
)

// peerOf describes the user and process at the other end of a Unix socket.
func peerOf(c *net.UnixConn) (who string) {
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	_ = raw.Control(func(fd uintptr) {
		cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err == nil {
			who = fmt.Sprintf(", user %d, process %d", cred.Uid, cred.Pid)
		}
	})
	return who
}
