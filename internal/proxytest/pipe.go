package proxytest

import (
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// A PipeConn is one end of a connection in memory. Unlike a net.Pipe it can be half-closed and
// reset, and unlike a socket it works in a synctest bubble. It has no buffer: a Write returns when
// its bytes have been read.
type PipeConn struct {
	in, out net.Conn
	peer    *PipeConn
	reset   atomic.Bool
}

// Pipe returns both ends of a connection in memory.
func Pipe() (a, b *PipeConn) {
	a, b = new(PipeConn), new(PipeConn)
	a.peer, b.peer = b, a
	a.out, b.in = net.Pipe()
	b.out, a.in = net.Pipe()
	return a, b
}

// Read reads bytes that the peer has written. After a reset by the peer it returns ECONNRESET.
func (c *PipeConn) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	if err == io.EOF && c.peer.reset.Load() {
		err = syscall.ECONNRESET
	}
	return n, err
}

// Write waits until the peer has read b.
func (c *PipeConn) Write(b []byte) (int, error) { return c.out.Write(b) }

// CloseWrite ends the stream to the peer.
func (c *PipeConn) CloseWrite() error { return c.out.Close() }

// SetLinger makes Close a reset if sec is 0, as it does for a TCP connection.
func (c *PipeConn) SetLinger(sec int) error { c.reset.Store(sec == 0); return nil }

// Close ends both streams. Later writes by the peer fail.
func (c *PipeConn) Close() error { c.in.Close(); return c.out.Close() }

// LocalAddr returns an address that names no port.
func (c *PipeConn) LocalAddr() net.Addr { return c.in.LocalAddr() }

// RemoteAddr returns an address that names no port.
func (c *PipeConn) RemoteAddr() net.Addr { return c.in.RemoteAddr() }

func (c *PipeConn) SetDeadline(t time.Time) error {
	c.in.SetDeadline(t)
	return c.out.SetDeadline(t)
}
func (c *PipeConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *PipeConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
