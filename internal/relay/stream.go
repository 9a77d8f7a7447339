package relay

import (
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// A stream is how a relay reads and writes one connection. One goroutine reads it and one writes.
type stream interface {
	// await calls d.try each time there may be something to read, until it returns true. A stream
	// that cannot wait without reading calls it once.
	await(d *direction) error

	// read is called by d.try. Within the await of a stream that can wait it returns errWait rather
	// than wait.
	read(b []byte) (int, error)

	// write writes all of p, which is in b unless b is nil, and frees b as soon as it can.
	write(p []byte, b *Buffer) (int, error)

	closeWrite() error
}

// errWait means that there is nothing to read yet. It is temporary, as the error of a deadline is,
// so that crypto/tls goes on later where it was.
var errWait error = waitError{}

type waitError struct{}

func (waitError) Error() string   { return "lbproxy: nothing to read yet" }
func (waitError) Timeout() bool   { return true }
func (waitError) Temporary() bool { return true }

// An end is one of the two connections of a relay, with what is known of it. The conn below is
// looked up once: NetConn is somebody else's method, and is not to be called under a lock or by
// the idle sweep.
type end struct {
	conn   net.Conn // as it was given; nil: there is none
	below  net.Conn // under all its layers
	stream stream
	raw    syscall.RawConn // of below, if that is TCP
}

func newEnd(c net.Conn) end {
	e := end{conn: c, below: Underlying(c), stream: plain{c}}
	e.raw = rawTCP(e.below)
	if t, ok := c.(*TLS); ok {
		e.stream = t
	} else if !e.layered() && e.measured() {
		e.stream = newSocket(c, e.raw)
	}
	return e
}

// layered reports whether there are layers above below.
func (e *end) layered() bool {
	_, ok := e.conn.(netConner)
	return ok
}

// measured reports whether the system says how much is unsent, and whether it was reset.
func (e *end) measured() bool { return canMeasure && e.raw != nil }

// socket returns what the bytes to e are written to, if that is a socket.
func (e *end) socket() *socket {
	switch s := e.stream.(type) {
	case *socket:
		return s
	case *TLS:
		return s.wire.socket
	}
	return nil
}

func (e *end) unsent() int { return unsent(e.raw) }

func (e *end) canHalfClose() bool {
	_, ok := e.conn.(halfCloser)
	return ok
}

// closeWrite ends the stream to e. It waits for as long as a slow reader takes.
func (e *end) closeWrite() error {
	if h, ok := e.conn.(interface{ Handshake() error }); ok { // before that no stream of TLS can end
		if err := h.Handshake(); err != nil {
			return err
		}
	}
	if e.layered() {
		// crypto/tls gives its close_notify 5 s, and breaks the stream if the peer's buffers are
		// full for so long. This takes that deadline away.
		defer time.AfterFunc(time.Second, func() {
			defer ignorePanic() // the deadline stays
			e.below.SetWriteDeadline(time.Time{})
		}).Stop()
	}
	return e.stream.closeWrite()
}

// ignorePanic ends a panic of the caller's conn on a timer's goroutine, where it would end the
// process. Callers defer it.
func ignorePanic() { _ = recover() }

// reset closes c at once, by a reset where it is TCP. c is below all layers. The layers are left
// alone: one of them might want to say goodbye first, and wait for its peer.
func reset(c net.Conn) {
	defer c.Close() // also if SetLinger panics
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(0)
	}
}

type (
	netConner  interface{ NetConn() net.Conn }
	halfCloser interface{ CloseWrite() error }
)

// Underlying returns the conn below all layers of c, as their NetConn methods say.
func Underlying(c net.Conn) net.Conn {
	for {
		l, ok := c.(netConner)
		if !ok {
			return c
		}
		below := l.NetConn()
		if below == nil {
			return c
		}
		c = below
	}
}

// Reset resets the connection below c, without waiting for its peer, and closes the layers above.
func Reset(c net.Conn) {
	reset(Underlying(c))
	if _, layered := c.(netConner); layered {
		c.Close()
	}
}

func rawTCP(c net.Conn) syscall.RawConn {
	switch c := c.(type) {
	case *net.TCPConn:
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	case *FileConn:
		if raw, err := c.File.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

// plain is the stream of any conn, which can be waited for only by reading, with a buffer in hand.
type plain struct{ net.Conn }

func (plain) await(d *direction) error {
	d.try()
	return nil
}

func (p plain) read(b []byte) (int, error) {
	for range 100 {
		n, err := p.Read(b)
		if n < 0 || n > len(b) {
			return 0, errBadCount
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, io.ErrNoProgress
}

func (p plain) write(b []byte, buf *Buffer) (int, error) {
	defer buf.Free()
	n, err := p.Write(b)
	switch {
	case n < 0 || n > len(b):
		return 0, errBadCount
	case n < len(b) && err == nil:
		err = io.ErrShortWrite
	}
	return n, err
}

func (p plain) closeWrite() error { return p.Conn.(halfCloser).CloseWrite() }

// A Buffer is pooled memory that bytes pass through.
type Buffer []byte

// Sizes of buffers.
const (
	SmallBuffer = 4 << 10
	LargeBuffer = 64 << 10
	tlsBuffer   = 66 << 10 // has room for the records of a large one
)

var (
	smallBuffers = bufferPool(SmallBuffer)
	largeBuffers = bufferPool(LargeBuffer)
	tlsBuffers   = bufferPool(tlsBuffer)
)

func bufferPool(size int) *sync.Pool {
	return &sync.Pool{New: func() any { b := make(Buffer, size); return &b }}
}

// NewBuffer returns a buffer of one of these sizes, with old bytes in it.
func NewBuffer(size int) *Buffer { return poolOf(size).Get().(*Buffer) }

// Free gives b back. b may be nil.
func (b *Buffer) Free() {
	if b != nil {
		poolOf(len(*b)).Put(b)
	}
}

func poolOf(size int) *sync.Pool {
	switch size {
	case LargeBuffer:
		return largeBuffers
	case tlsBuffer:
		return tlsBuffers
	}
	return smallBuffers
}
