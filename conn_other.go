//go:build !linux

package lbproxy

import (
	"io"
	"net"
)

// platform is what a pump needs to move bytes here: nothing.
type platform struct{}

func (p *pump) move() (n int, readErr, writeErr error) { return p.copyChunk() }

func direct(c net.Conn) io.ReadWriter { return c }

func (p *pump) send(b []byte) (int, error) { return p.dst.Write(b) }

func (p *pump) closeWrite(c closeWriter) error { return c.CloseWrite() }

// inheritKeepAlive does nothing: net sets it on each connection.
func inheritKeepAlive(*net.ListenConfig) {}

// pipePool is for splicing, which there is none of here.
type pipePool struct{}

func (*pipePool) close() {}

// unsent is how many bytes c has to send that have not arrived. There is no portable way to ask; one stands for any.
func unsent(c net.Conn) int {
	if _, ok := bottom(c).(*net.TCPConn); ok {
		return 1
	}
	return 0
}

// wasReset cannot be known.
func wasReset(net.Conn) (reset, known bool) { return false, false }
