//go:build !linux || lbproxy_portable

package relay

import (
	"net"
	"syscall"
)

// canMeasure is false: no portable system call tells the length of a socket's send queue.
const canMeasure = false

// socket is unused: without Linux's calls a TCP connection is read like any other.
type socket struct{ plain }

func newSocket(net.Conn, syscall.RawConn) *socket { return nil }

func (*socket) writtenBy(*direction) {}

// splicer is unused.
type splicer struct{}

func newSplicer(*direction) *splicer                    { return nil }
func (*splicer) move() (n int, readErr, writeErr error) { panic("lbproxy: no splicing here") }

type pipePool struct{}

func (*pipePool) close() {}

// unsent returns 1 for a socket: its peer may not have acknowledged all that was written.
func unsent(raw syscall.RawConn) int {
	if raw != nil {
		return 1
	}
	return 0
}

func wasReset(syscall.RawConn) bool { return false }

func readable(syscall.RawConn) bool { return false }

func hasError(syscall.RawConn) bool { return false }

// keepAlive sets what net does by default.
func keepAlive(e *end) {
	if c, ok := e.below.(*net.TCPConn); ok {
		c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true})
	}
}

func quickAck(syscall.RawConn) {}

// InheritKeepAlive does nothing here: net sets keep-alive on each connection.
func InheritKeepAlive(*net.ListenConfig) {}
