//go:build !lbproxy_portable

package relay

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"syscall"
)

const canMeasure = true

// UrgentReads bounds the reads at an urgent byte: a signal may disturb some, but not all of them.
const UrgentReads = 100

// A socket is a TCP connection that is waited for without a buffer, and then read and written
// without waiting. TLS is spoken over one, too.
type socket struct {
	net.Conn
	raw syscall.RawConn

	// raw calls these when the descriptor is ready, until they return true. They are made once,
	// since a closure for each call would be an allocation for each.
	onReadable, onWritable func(fd uintptr) bool

	reader *direction // in await
	fd     uintptr    // in await
	in     []byte     // what to read into
	n      int        // read
	inErr  syscall.Errno

	writer *direction // is told when a write waits; nil: nobody
	out    []byte     // what is left to write
	outBuf *Buffer    // that out is in; nil: the caller's
	outErr syscall.Errno

	promised bool // an event or a full buffer has promised the next receive bytes
	busy     bool // the last receive without such a promise found bytes
}

// newSocket returns a socket for c, whose RawConn is raw. It returns nil if raw is nil.
func newSocket(c net.Conn, raw syscall.RawConn) *socket {
	if raw == nil {
		return nil
	}
	s := &socket{Conn: c, raw: raw}
	s.onReadable, s.onWritable = s.readReady, s.writeReady
	return s
}

// writtenBy says whose writes go to s, which may be nil.
func (s *socket) writtenBy(d *direction) {
	if s != nil {
		s.writer = d
	}
}

func (s *socket) await(d *direction) error {
	s.reader = d
	err := s.raw.Read(s.onReadable)
	s.reader = nil
	return err
}

func (s *socket) readReady(fd uintptr) bool {
	if s.reader != nil {
		s.fd = fd
		return s.reader.try()
	}
	return s.receive(fd)
}

// receive reads into in, or returns false if there is nothing.
//
// At an urgent byte a pending signal makes the system say that there is nothing, although bytes may
// follow for which no event comes. Only poll knows of them. It takes the place of a receive that
// would most likely find nothing, as between two messages, so that it costs no call there.
func (s *socket) receive(fd uintptr) bool {
	promised := s.promised
	found := s.tryReceive(fd, !promised && !s.busy)
	if !promised {
		s.busy = found
	}
	s.promised = !found || s.n == len(s.in)
	return found
}

func (s *socket) tryReceive(fd uintptr, poll bool) (found bool) {
	for range UrgentReads {
		if poll && pollFD(int(fd), syscall.EPOLLIN) == 0 {
			break
		}
		turn := s.n >= bulkChunk && takeTurn()
		s.n, s.inErr = RecvFD(int(fd), s.in, 0)
		giveTurn(turn)
		switch s.inErr {
		case syscall.EINTR:
		case syscall.EAGAIN:
			poll = true
		default:
			return true
		}
	}
	s.n = 0
	return false
}

// Read waits for bytes, except within await: there it returns errWait.
func (s *socket) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	s.in = b
	var err error
	if s.reader == nil {
		err = s.raw.Read(s.onReadable)
	} else if !s.receive(s.fd) {
		err = errWait
	}
	s.in = nil
	switch {
	case err != nil:
		return 0, plainOp(err, "read")
	case s.inErr != 0:
		return 0, s.opError("read", "read", s.inErr)
	case s.n == 0:
		return 0, io.EOF
	}
	return s.n, nil
}

func (s *socket) read(b []byte) (int, error) { return s.Read(b) }

func (s *socket) Write(b []byte) (int, error) { return s.write(b, nil) }

func (s *socket) write(b []byte, buf *Buffer) (int, error) {
	s.out, s.outBuf, s.outErr = b, buf, 0
	err := s.raw.Write(s.onWritable)
	n := len(b) - len(s.out)
	s.outBuf.Free()
	s.out, s.outBuf = nil, nil
	if err == nil && s.outErr != 0 {
		err = s.opError("write", "write", s.outErr)
	}
	return n, plainOp(err, "write")
}

// plainOp changes an error of a RawConn, such as "raw-read tcp …: i/o timeout", into the error that
// the conn itself would return.
func plainOp(err error, op string) error {
	if e, ok := err.(*net.OpError); ok {
		e.Op = op
	}
	return err
}

func (s *socket) writeReady(fd uintptr) bool {
	for len(s.out) > 0 {
		turn := len(s.out) >= bulkChunk && takeTurn()
		n, errno := SendFD(int(fd), s.out, 0)
		giveTurn(turn)
		switch s.outErr = errno; errno {
		case 0:
			s.out = s.out[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			s.shrink()
			s.writer.stuck()
			return false
		default:
			return true
		}
	}
	return true
}

// shrink moves a short rest into a small buffer, since the wait for the reader may be long.
func (s *socket) shrink() {
	if s.outBuf != nil && len(*s.outBuf) > SmallBuffer && len(s.out) <= SmallBuffer {
		small := NewBuffer(SmallBuffer)
		s.out = (*small)[:copy(*small, s.out)]
		s.outBuf.Free()
		s.outBuf = small
	}
}

func (s *socket) closeWrite() error {
	if c, ok := s.Conn.(*FileConn); ok && c.Shut {
		return nil // another shutdown fails if the peer has ended its stream, too
	}
	var errno syscall.Errno
	err := s.raw.Control(func(fd uintptr) { errno = ShutdownFD(int(fd)) })
	if err != nil || errno == 0 {
		return err
	}
	return s.opError("close", "shutdown", errno)
}

func (s *socket) opError(op, call string, errno syscall.Errno) error {
	return &net.OpError{
		Op: op, Net: "tcp", Source: s.LocalAddr(), Addr: s.RemoteAddr(),
		Err: os.NewSyscallError(call, errno),
	}
}

// InheritKeepAlive makes the connections of a listener inherit the keep-alive that net sets on
// each, which saves each of them four system calls.
func InheritKeepAlive(lc *net.ListenConfig) {
	lc.KeepAlive = -1 // not on each
	lc.Control = func(_, _ string, c syscall.RawConn) error { return ask(c, KeepAliveFD) }
}

// keepAlive sets what net does by default.
func keepAlive(e *end) { ask(e.raw, KeepAliveFD) }

// quickAck acknowledges at once what has come so far. Later bytes may wait again.
func quickAck(raw syscall.RawConn) {
	control(raw, func(fd int) {
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_QUICKACK, 1)
	})
}

// unsent returns how many written bytes a socket's peer has not acknowledged, or 0 if that is not
// known.
func unsent(raw syscall.RawConn) int { return ask(raw, UnsentFD) }

// wasReset reports whether a socket has been reset, as far as that is known. One in which both
// sides have ended their streams looks the same.
func wasReset(raw syscall.RawConn) bool {
	return ask(raw, func(fd int) bool { return tcpState(fd) == tcpClosed })
}

// readable reports whether there is something to read.
func readable(raw syscall.RawConn) bool {
	return ask(raw, func(fd int) bool {
		var b [1]byte
		n, _ := RecvFD(fd, b[:], syscall.MSG_PEEK)
		return n > 0
	})
}

// hasError reports whether a socket has an error, and leaves it for the next read.
func hasError(raw syscall.RawConn) bool {
	return ask(raw, func(fd int) bool { return pollFD(fd, 0)&syscall.EPOLLERR != 0 })
}

const tcpClosed = 7 // TCP_CLOSE

// tcpState is the first octet of struct tcp_info.
func tcpState(fd int) int {
	v, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_INFO)
	if err != nil {
		return 0
	}
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], uint32(v))
	return int(b[0])
}

// ask returns what f answers about a socket, or the zero value if it is none, or closed.
func ask[T any](raw syscall.RawConn, f func(fd int) T) (answer T) {
	control(raw, func(fd int) { answer = f(fd) })
	return answer
}

// control calls f with the descriptor of a socket, if it is one and open.
func control(raw syscall.RawConn, f func(fd int)) error {
	if raw == nil {
		return net.ErrClosed
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}
