//go:build (race || msan || asan || 386) && !lbproxy_portable

package relay

import (
	"net/netip"
	"syscall"
)

// These variants of RecvFD and SendFD tell the race detector that received bytes were sent before,
// as syscall.Read and syscall.Write do. Otherwise a test with both ends in one process would report
// false races. Read and Write of the bytes themselves would block on a blocking socket. A Read of
// no bytes and a Write to an invalid descriptor do not block, and still inform the detector. (386
// is here because it has other system calls for sockets.)
func RecvFD(fd int, b []byte, flags int) (int, syscall.Errno) {
	n, _, err := syscall.Recvfrom(fd, b, flags|syscall.MSG_DONTWAIT)
	if err == nil {
		syscall.Read(fd, nil) // acquires
	}
	return told(n, err)
}

func SendFD(fd int, b []byte, flags int) (int, syscall.Errno) {
	syscall.Write(-1, nil) // releases
	return told(syscall.SendmsgN(fd, b, nil, nil, flags|syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL))
}

func ShutdownFD(fd int) syscall.Errno {
	_, errno := told(0, syscall.Shutdown(fd, syscall.SHUT_WR))
	return errno
}

func told(n int, err error) (int, syscall.Errno) {
	if err != nil {
		return 0, err.(syscall.Errno)
	}
	return n, 0
}

func ConnectFD(fd int, addr netip.AddrPort) syscall.Errno {
	port := int(addr.Port())
	var sa syscall.Sockaddr = &syscall.SockaddrInet6{Port: port, Addr: addr.Addr().As16()}
	if ip := addr.Addr().Unmap(); ip.Is4() {
		sa = &syscall.SockaddrInet4{Port: port, Addr: ip.As4()}
	}
	_, errno := told(0, syscall.Connect(fd, sa))
	return errno
}

func AcceptFD(l int) (fd int, from netip.AddrPort, zone uint32, errno syscall.Errno) {
	fd, sa, err := syscall.Accept4(l, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		zone = sa.ZoneId
	}
	_, errno = told(0, err)
	return fd, from, zone, errno
}

func NoDelayFD(fd int) { syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1) }
