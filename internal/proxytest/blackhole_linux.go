package proxytest

import (
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"
)

// BlackHole returns a loopback address where no dial is answered: its queue is full.
func BlackHole(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	Must(t, err)
	t.Cleanup(func() { syscall.Close(fd) })
	Must(t, syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	Must(t, syscall.Listen(fd, 0))
	sa, err := syscall.Getsockname(fd)
	Must(t, err)
	addr := fmt.Sprint("127.0.0.1:", sa.(*syscall.SockaddrInet4).Port)
	for {
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { c.Close() })
	}
}
