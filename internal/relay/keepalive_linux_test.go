package relay

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// keepAliveOf returns the four keep-alive options.
func keepAliveOf(c *net.TCPConn) (got [4]int) {
	rawTCP(c).Control(func(s uintptr) {
		fd := int(s)
		got[0], _ = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
		for i, name := range []int{syscall.TCP_KEEPIDLE, syscall.TCP_KEEPINTVL,
			syscall.TCP_KEEPCNT} {
			got[1+i], _ = syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, name)
		}
	})
	return got
}

func accepted(t *testing.T, listen func() (net.Listener, error)) *net.TCPConn {
	l, err := listen()
	proxytest.Must(t, err)
	defer l.Close()
	proxytest.Dial(t, l.Addr().String())
	c, err := l.Accept()
	proxytest.Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestInheritKeepAlive(t *testing.T) {
	want := keepAliveOf(accepted(t,
		func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }))
	got := keepAliveOf(accepted(t, func() (net.Listener, error) {
		var lc net.ListenConfig
		InheritKeepAlive(&lc)
		return lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	}))
	if got != want || want[0] != 1 {
		t.Errorf("on, idle, interval, count are %v, want %v", got, want)
	}
}

// Servers get keep-alive when their relay has lasted 15 s, also without an idle time.
func TestServersGetKeepAlive(t *testing.T) {
	want := keepAliveOf(accepted(t,
		func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }))
	for _, idle := range []time.Duration{0, time.Hour} {
		_, server := duplex(t)
		server.SetKeepAlive(false)
		e := NewEngine(Config{Idle: idle, KeepAlive: true})
		r := &Relay{server: newEnd(server)}
		now := Clock()
		r.last.Store(now)
		r.idle.Since = now
		if e.look(r, now+int64(14*time.Second)); keepAliveOf(server)[0] != 0 {
			t.Error("set after 14 s")
		}
		e.look(r, now+int64(15*time.Second))
		if got := keepAliveOf(server); got != want {
			t.Errorf("on, idle, interval, count are %v, want %v", got, want)
		}
	}
}
