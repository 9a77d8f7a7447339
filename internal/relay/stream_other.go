//go:build !linux || lbproxy_portable

package relay

import (
	"net"
	"syscall"
)

// canMeasure is false: there is no portable way to ask the system about a socket.
const canMeasure = false

// socket is not used: here a TCP connection is read as any other.
type socket struct{ plain }

func newSocket(net.Conn) *socket { return nil }

// splicer is not used.
type splicer struct{}

func newSplicer(*direction) *splicer                    { return nil }
func (*splicer) move() (n int, readErr, writeErr error) { panic("lbproxy: no splicing here") }

type pipePool struct{}

func (*pipePool) close() {}

// unsent is how many bytes have not arrived, of which nothing is known: 1 stands for any number.
func unsent(raw syscall.RawConn) int {
	if raw != nil {
		return 1
	}
	return 0
}

func wasReset(syscall.RawConn) (reset, known bool) { return false, false }

func readable(syscall.RawConn) bool { return false }

func keepAlive(syscall.RawConn) error { return nil }

func quickAck(syscall.RawConn) {}

// InheritKeepAlive does nothing here: net sets keep-alive on each connection.
func InheritKeepAlive(*net.ListenConfig) {}
