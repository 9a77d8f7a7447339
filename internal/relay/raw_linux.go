//go:build !race && !msan && !asan && !386 && !lbproxy_portable

package relay

import (
	"net/netip"
	"syscall"
	"unsafe"
)

// RecvFD and SendFD move at most a buffer from or to a socket without blocking. They use
// RawSyscall, which does not inform the scheduler: an informed scheduler often gives the processor
// to another thread in the middle of the call, and waking that thread costs more than it gains. A
// round trip of 64 bytes takes a third less CPU time this way.
//
// A RawSyscall cannot be preempted: copying a whole buffer takes 10 µs. Splices may take longer and
// therefore inform the scheduler. A RawSyscall that blocks would hold up the garbage collector, so
// the calls have MSG_DONTWAIT. Plain read and write would block if the caller has made the socket
// blocking, as File().Fd() does.
func RecvFD(fd int, b []byte, flags int) (int, syscall.Errno) {
	return transfer(syscall.SYS_RECVFROM, fd, b, flags|syscall.MSG_DONTWAIT)
}

// SendFD writes to a socket as much of b as it takes. Flags are those of send(2).
func SendFD(fd int, b []byte, flags int) (int, syscall.Errno) {
	return transfer(syscall.SYS_SENDTO, fd, b, flags|syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
}

// ShutdownFD half-closes a socket. On loopback the call includes the work of the peer's system.
func ShutdownFD(fd int) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, uintptr(fd), syscall.SHUT_WR, 0)
	return errno
}

func transfer(call uintptr, fd int, b []byte, flags int) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(call, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// The rest is for internal/loop. To tell the scheduler would cost more there, too: each call that
// does wakes the runtime's monitor where that is asleep, which then looks every 20 µs for a while.
// One such call for each connection is enough.

// ConnectFD begins to connect a socket to addr, which has no zone.
func ConnectFD(fd int, addr netip.AddrPort) syscall.Errno {
	port := [2]byte{byte(addr.Port() >> 8), byte(addr.Port())}
	var sa syscall.RawSockaddrInet6
	size := uintptr(syscall.SizeofSockaddrInet6)
	if ip := addr.Addr().Unmap(); ip.Is4() {
		v4 := (*syscall.RawSockaddrInet4)(unsafe.Pointer(&sa))
		v4.Family, v4.Addr = syscall.AF_INET, ip.As4()
		size = syscall.SizeofSockaddrInet4
	} else {
		sa.Family, sa.Addr = syscall.AF_INET6, ip.As16()
	}
	*(*[2]byte)(unsafe.Pointer(&sa.Port)) = port
	_, _, errno := syscall.RawSyscall(
		syscall.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), size)
	return errno
}

// AcceptFD accepts from a listener.
func AcceptFD(l int) (fd int, from netip.AddrPort, zone uint32, errno syscall.Errno) {
	var sa syscall.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	r, _, errno := syscall.RawSyscall6(syscall.SYS_ACCEPT4, uintptr(l), uintptr(unsafe.Pointer(&sa)),
		uintptr(unsafe.Pointer(&size)), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return 0, from, 0, errno
	}
	ip := netip.AddrFrom16(sa.Addr).Unmap()
	if sa.Family == syscall.AF_INET {
		ip = netip.AddrFrom4((*syscall.RawSockaddrInet4)(unsafe.Pointer(&sa)).Addr)
	}
	p := (*[2]byte)(unsafe.Pointer(&sa.Port))
	return int(r), netip.AddrPortFrom(ip, uint16(p[0])<<8|uint16(p[1])), sa.Scope_id, 0
}

// NoDelayFD sets TCP_NODELAY.
func NoDelayFD(fd int) {
	on := int32(1)
	syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, uintptr(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY,
		uintptr(unsafe.Pointer(&on)), unsafe.Sizeof(on), 0)
}
