//go:build linux

package soak

import (
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// addrOf returns the address that client id connects from: all of 127.0.0.0/8 is loopback. Four
// million neighbouring ids have different addresses.
func addrOf(id uint64) *net.TCPAddr {
	return &net.TCPAddr{IP: net.IPv4(127, 64|byte(id>>16)&63, byte(id>>8), byte(id))}
}

// idOf is the inverse of addrOf, for ids of less than four million.
func idOf(addr net.Addr) (id uint64, ok bool) {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return 0, false
	}
	ip := tcp.IP.To4()
	if ip == nil || ip[0] != 127 || ip[1]&^63 != 64 {
		return 0, false
	}
	return uint64(ip[1]&63)<<16 | uint64(ip[2])<<8 | uint64(ip[3]), true
}

// unsent returns the number of bytes that c has sent and the peer's system has not acknowledged.
func unsent(c *net.TCPConn) int {
	var n int32
	control(c, func(fd int) {
		syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	})
	return int(n)
}

// wasReset reports whether c, which has read an end of stream and not ended its own, has been
// reset: a write may have taken the error, and then a read sees what looks like a clean end.
func wasReset(c *net.TCPConn) bool {
	const closed = 7 // TCP_CLOSE, the first octet of struct tcp_info
	reset := false
	control(c, func(fd int) {
		info, err := syscall.GetsockoptInet4Addr(fd, syscall.IPPROTO_TCP, syscall.TCP_INFO)
		reset = err == nil && info[0] == closed
	})
	return reset
}

func control(c syscall.Conn, f func(fd int)) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

// droppedSegments returns how many segments the system has dropped so far because a socket's queue
// had no room for them. Small ones take much more room than their bytes.
func droppedSegments() (n uint64) {
	b, _ := os.ReadFile("/proc/net/netstat")
	names, values, _ := strings.Cut(string(b), "\n")
	values, _, _ = strings.Cut(values, "\n")
	of := strings.Fields(values)
	for i, name := range strings.Fields(names) {
		if i < len(of) && (name == "TCPRcvQDrop" || name == "TCPBacklogDrop") {
			more, _ := strconv.ParseUint(of[i], 10, 64)
			n += more
		}
	}
	return n
}
