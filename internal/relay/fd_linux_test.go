//go:build !lbproxy_portable

package relay

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestConnectAndAcceptWithDescriptors(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("%s: %v", address, err) // there may be no IPv6
			continue
		}
		defer l.Close()
		raw, err := l.(*net.TCPListener).SyscallConn()
		proxytest.Must(t, err)
		accept := func() (fd int, from netip.AddrPort, errno syscall.Errno) {
			control(raw, func(l int) { fd, from, _, errno = AcceptFD(l) })
			return fd, from, errno
		}
		if _, _, errno := accept(); errno != syscall.EAGAIN {
			t.Errorf("%s: nobody is there: %v", address, errno)
		}
		family, addr := syscall.AF_INET, l.Addr().(*net.TCPAddr).AddrPort()
		if addr.Addr().Is6() {
			family = syscall.AF_INET6
		}
		kind := syscall.SOCK_STREAM | syscall.SOCK_NONBLOCK | syscall.SOCK_CLOEXEC
		fd, err := syscall.Socket(family, kind, 0)
		proxytest.Must(t, err)
		if errno := ConnectFD(fd, addr); errno != 0 && errno != syscall.EINPROGRESS {
			t.Errorf("%s: connecting: %v", address, errno)
		}
		epoll, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
		proxytest.Must(t, err)
		event := syscall.EpollEvent{Events: syscall.EPOLLOUT, Fd: int32(fd)}
		proxytest.Must(t, syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, fd, &event))
		events := make([]syscall.EpollEvent, 2)
		proxytest.Eventually(t, "it is connected", func() bool {
			n := EpollFD(epoll, events)
			return n == 1 && events[0].Fd == int32(fd)
		})
		CloseFD(epoll)
		if n := EpollFD(-1, events); n != 0 {
			t.Errorf("%d events of no descriptor", n)
		}
		var accepted int
		var from netip.AddrPort
		proxytest.Eventually(t, "it is accepted", func() bool {
			var errno syscall.Errno
			accepted, from, errno = accept()
			return errno == 0
		})
		var name netip.AddrPort
		switch sa, _ := syscall.Getsockname(fd); sa := sa.(type) {
		case *syscall.SockaddrInet4:
			name = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *syscall.SockaddrInet6:
			name = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		}
		if from != name || BlocksFD(accepted) {
			t.Errorf("accepted from %v, want %v; blocks: %v", from, name, BlocksFD(accepted))
		}
		CloseFD(fd)
		CloseFD(accepted)
	}
}

func TestAtMarkFD(t *testing.T) {
	peer, c := duplex(t)
	at := func() (is bool) {
		control(rawTCP(c), func(fd int) { is = AtMarkFD(fd) })
		return is
	}
	if at() {
		t.Error("nothing has come, and it is urgent")
	}
	sendUrgent(t, peer)
	proxytest.Eventually(t, "the urgent byte is next", at)
}

// A FileConn is a socket as a net.TCPConn is.
func TestFileConn(t *testing.T) {
	open := func() (*net.TCPConn, *FileConn) {
		peer, ours := duplex(t)
		fd := -1
		control(rawTCP(ours), func(old int) { fd, _ = syscall.Dup(old) })
		proxytest.Must(t, ours.Close())
		c := NewFileConn(fd, ours.LocalAddr(), ours.RemoteAddr())
		t.Cleanup(func() { c.Close() })
		return peer, c
	}
	peer, c := open()
	if e := newEnd(c); e.socket() == nil || !e.measured() || !e.canHalfClose() {
		t.Errorf("%+v", e)
	}
	for _, row := range []struct{ sec, want int }{{0, 1}, {-1, 0}, {7, 1}, {-1, 0}} {
		proxytest.Must(t, c.SetLinger(row.sec))
		got := -1
		control(rawTCP(c), func(fd int) {
			got, _ = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_LINGER) // Onoff
		})
		if got != row.want {
			t.Errorf("SetLinger(%d): on is %d, want %d", row.sec, got, row.want)
		}
	}
	proxytest.Must(t, c.CloseWrite())
	if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after CloseWrite the peer reads %v", err)
	}
	c.Close()
	if err := c.CloseWrite(); err == nil {
		t.Error("CloseWrite after Close: no error")
	}

	peer, c = open()
	Reset(c)
	proxytest.ReadReset(t, peer)
	peer, c = open()
	peer.SetLinger(0)
	peer.Close()
	c.Read(make([]byte, 1))
	if err := c.CloseWrite(); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("CloseWrite after a reset: %v", err)
	}
}
