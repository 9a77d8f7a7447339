package lbproxy

import (
	"cmp"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// platform is what a pump needs to move bytes from a TCP socket without holding a buffer or a pipe while it waits for
// them. A stream that fills buffers, from TCP to TCP, goes through a pipe by splice(2) instead of through us.
type platform struct {
	started  bool
	from     syscall.RawConn // src, or what TLS is spoken over; nil if that is not TCP
	tls      *TLSConn        // src, if it is one
	to       *tcpWriter      // dst, once it is needed; nil if it is not TCP
	notTCP   bool            // dst is not
	noSplice bool            // the system refused

	// What is called with the descriptors. They are made once, for each allocates. One returns false to be called
	// again when its descriptor is ready.
	readReady, fillReady, drainReady func(fd uintptr) bool

	n     int           // what the last one moved
	errno syscall.Errno // or met
	err   error         // or, in TLS, met
	pipe  *pipe
	held  int // bytes in pipe
	full  int // reads in a row that filled a large buffer: at two of them splicing begins
	small int // splices in a row of less than a quarter of one: at two of them it ends
}

// move waits for bytes from src and writes them to dst.
func (p *pump) move() (n int, readErr, writeErr error) {
	if !p.started {
		if err := p.begin(); err != nil {
			return 0, err, nil
		}
	}
	switch {
	case p.from == nil:
		return p.copyChunk()
	case p.full >= 2 && !p.noSplice && p.toTCP():
		return p.splice()
	}
	if err := p.from.Read(p.readReady); err != nil {
		return 0, err, nil
	}
	defer p.dropBuffer()
	switch {
	case p.tls != nil && p.n == 0:
		return 0, p.err, nil
	case p.errno != 0 || p.n == 0:
		return 0, p.readError("read"), nil
	}
	if p.full++; p.n < largeBuffer || p.tls != nil {
		p.full = 0
	}
	n, writeErr = p.write((*p.buf)[:p.n])
	return n, nil, writeErr
}

// begin finds out how to read from src.
func (p *pump) begin() error {
	p.started = true
	p.readReady, p.fillReady, p.drainReady = p.readNow, p.fillNow, p.drainNow
	c, ok := p.src.(*TLSConn)
	if !ok {
		p.from = rawTCP(p.src)
		return nil
	}
	if below, ok := c.wire.direct.(*directTCP); ok && c.resumable {
		p.tls, p.from, p.readReady = c, below.in.raw, p.readTLSNow
	}
	return c.Handshake()
}

func rawTCP(c net.Conn) syscall.RawConn {
	if tcp, ok := c.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

func (p *pump) readNow(fd uintptr) bool {
	p.buf = newBuffer(largeBuffer)
	for {
		p.n, p.errno = readFD(fd, p.limit(*p.buf))
		switch p.errno {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			p.dropBuffer()
			return false
		}
		return true
	}
}

// send writes b to dst.
func (p *pump) send(b []byte) (int, error) {
	if !p.toTCP() {
		return p.dst.Write(b)
	}
	return p.to.Write(b)
}

// closeWrite ends the stream to dst, which is c.
func (p *pump) closeWrite(c closeWriter) error {
	if !p.toTCP() {
		return c.CloseWrite()
	}
	return p.to.CloseWrite()
}

// readTLSNow is readNow for a TLSConn. crypto/tls goes on where it was after an error that is temporary, such as that of
// a deadline, so it is told that one has passed when there are no bytes now.
func (p *pump) readTLSNow(fd uintptr) bool {
	const record = 16 << 10
	in := p.tls.wire.direct.(*directTCP).in
	in.fd, in.now = fd, true
	defer func() { in.now = false }()
	p.buf = newBuffer(bufferSize(p.lastRead))
	b := p.limit(*p.buf)
	p.n, p.err = p.tls.Read(b)
	for n := p.n; n == record && p.err == nil && len(b)-p.n >= record; p.n += n { // there may be more of them
		n, p.err = p.tls.Read(b[p.n:])
	}
	if p.n == 0 && errors.Is(p.err, os.ErrDeadlineExceeded) {
		p.dropBuffer()
		return false
	}
	p.lastRead = p.n
	return true // an error that comes after bytes comes again
}

// readError is what n and errno say when reading, or the call instead of it, came to nothing.
func (p *pump) readError(call string) error {
	if p.errno == 0 {
		return io.EOF
	}
	return opError("read", call, p.src, p.errno)
}

func opError(op, call string, c net.Conn, errno syscall.Errno) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: os.NewSyscallError(call, errno)}
}

// A tcpReader reads from a TCP connection by readFD, a tcpWriter writes to one by writeFD.
type (
	tcpReader struct {
		tcpSide
		now bool    // do not wait: it is within a call of raw.Read, for which the descriptor is
		fd  uintptr // this
	}
	tcpWriter struct{ tcpSide }
	tcpSide   struct {
		net.Conn
		raw   syscall.RawConn
		ready func(fd uintptr) bool // called until it has moved what it can; made once
		b     []byte                // what to read into, or is left to write
		n     int                   // read
		errno syscall.Errno
	}
)

func newTCPReader(c net.Conn, raw syscall.RawConn) *tcpReader {
	r := &tcpReader{tcpSide: tcpSide{Conn: c, raw: raw}}
	r.ready = r.readNow
	return r
}

func newTCPWriter(c net.Conn, raw syscall.RawConn) *tcpWriter {
	w := &tcpWriter{tcpSide{Conn: c, raw: raw}}
	w.ready = w.writeNow
	return w
}

func (r *tcpReader) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	r.b, r.n = b, 0
	var err error
	if !r.now {
		err = r.raw.Read(r.ready)
	} else if !r.ready(r.fd) {
		err = os.ErrDeadlineExceeded
	}
	r.b = nil
	switch {
	case err != nil:
		return 0, err
	case r.errno != 0:
		return 0, opError("read", "read", r.Conn, r.errno)
	case r.n == 0:
		return 0, io.EOF
	}
	return r.n, nil
}

func (r *tcpReader) readNow(fd uintptr) bool {
	for r.errno = syscall.EINTR; r.errno == syscall.EINTR; {
		r.n, r.errno = readFD(fd, r.b)
	}
	return r.errno != syscall.EAGAIN
}

func (w *tcpWriter) Write(b []byte) (int, error) {
	w.b, w.errno = b, 0
	err := w.raw.Write(w.ready)
	n := len(b) - len(w.b)
	w.b = nil
	if err == nil && w.errno != 0 {
		err = opError("write", "write", w.Conn, w.errno)
	}
	return n, err
}

func (w *tcpWriter) writeNow(fd uintptr) bool {
	for len(w.b) > 0 {
		n, errno := writeFD(fd, w.b)
		switch w.errno = errno; errno {
		case 0:
			w.b = w.b[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			return true
		}
	}
	return true
}

func (w *tcpWriter) CloseWrite() error {
	err := w.raw.Control(func(fd uintptr) { w.errno = shutdownFD(fd) })
	if err != nil || w.errno == 0 {
		return err
	}
	return opError("close", "shutdown", w.Conn, w.errno)
}

// direct is c by readFD and writeFD, if it is TCP. There may be one reader and one writer at a time.
func direct(c net.Conn) io.ReadWriter {
	raw := rawTCP(c)
	if raw == nil {
		return c
	}
	return &directTCP{newTCPReader(c, raw), newTCPWriter(c, raw)}
}

type directTCP struct {
	in  *tcpReader
	out *tcpWriter
}

func (d *directTCP) Read(b []byte) (int, error)  { return d.in.Read(b) }
func (d *directTCP) Write(b []byte) (int, error) { return d.out.Write(b) }

// toTCP reports whether dst is TCP, which is looked at when it is first needed.
func (p *pump) toTCP() bool {
	if p.to == nil && !p.notTCP {
		if raw := rawTCP(p.dst); raw != nil {
			p.to = newTCPWriter(p.dst, raw)
		}
		p.notTCP = p.to == nil
	}
	return p.to != nil
}

// splice moves one chunk through a pipe, which it holds only while there is something in it.
func (p *pump) splice() (n int, readErr, writeErr error) {
	if err := p.from.Read(p.fillReady); err != nil {
		return 0, err, nil
	}
	if p.pipe == nil { // there is none to be had
		p.full = 0
		return 0, nil, nil
	}
	pipes := &p.session.app.pipes
	switch {
	case p.errno == syscall.EINVAL || p.errno == syscall.ENOSYS: // not with this kind of socket, or kernel
		pipes.put(p.pipe)
		p.noSplice, p.full = true, 0
		return 0, nil, nil
	case p.errno != 0 || p.n == 0:
		pipes.put(p.pipe)
		return 0, p.readError("splice"), nil
	}
	if p.small++; p.n >= largeBuffer/4 {
		p.small = 0
	}
	if p.small >= 2 {
		p.small, p.full = 0, 0
	}
	n, p.held = p.n, p.n
	p.writing.Store(true)
	for p.held > 0 && writeErr == nil {
		if writeErr = p.to.raw.Write(p.drainReady); writeErr == nil && p.errno != 0 {
			writeErr = opError("write", "splice", p.dst, p.errno)
		}
	}
	if writeErr != nil { // run says when it is no longer writing
		pipes.drop(p.pipe)
		return n - p.held, nil, writeErr
	}
	p.writing.Store(false)
	pipes.put(p.pipe)
	return n, nil, nil
}

const (
	spliceMove     = 1 // SPLICE_F_MOVE
	spliceNonblock = 2 // SPLICE_F_NONBLOCK
)

func (p *pump) fillNow(fd uintptr) bool {
	if p.pipe = p.session.app.pipes.get(); p.pipe == nil {
		return true
	}
	p.spliceFD(int(fd), p.pipe.w, p.pacer.Limit(maxGrain))
	if p.errno == syscall.EAGAIN {
		p.session.app.pipes.put(p.pipe)
		return false
	}
	return true
}

func (p *pump) drainNow(fd uintptr) bool {
	for p.held > 0 {
		p.spliceFD(p.pipe.r, int(fd), p.held)
		if p.errno != 0 {
			return p.errno != syscall.EAGAIN
		}
		p.held -= p.n
		p.session.touch()
	}
	return true
}

func (p *pump) spliceFD(from, to, most int) {
	for {
		n, err := syscall.Splice(from, nil, to, nil, most, spliceMove|spliceNonblock)
		p.n = int(n)
		if p.errno, _ = err.(syscall.Errno); p.errno != syscall.EINTR {
			return
		}
	}
}

// A pipe is where spliced bytes pass through.
type pipe struct{ r, w int }

func (p *pipe) close() {
	syscall.Close(p.r)
	syscall.Close(p.w)
}

// A pipePool keeps empty pipes for as long as they are needed now and then: those that were not for a second are
// closed, so that an app at rest holds none.
type pipePool struct {
	mu     sync.Mutex
	free   []*pipe
	all    int         // those in free and those in use
	spare  int         // the fewest there were in free since trim last ran
	timer  *time.Timer // runs trim; nil if there is nothing to trim
	closed bool
}

const (
	// At 512 KiB bulk takes a fifth less time on the processor than at 256 KiB, and 1 MiB is no better.
	pipeSize = 512 << 10
	maxPipes = 128 // in use at once: with this size, as much as the system lets an unprivileged user have
)

// get returns an empty pipe, or nil if there is none to be had.
func (pp *pipePool) get() *pipe {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	if last := len(pp.free) - 1; last >= 0 {
		p := pp.free[last]
		pp.free = pp.free[:last]
		pp.spare = min(pp.spare, last)
		return p
	}
	var fds [2]int
	if pp.all >= maxPipes || syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		return nil
	}
	pp.all++
	// Best effort: beyond their share of memory (pipe-user-pages-soft) users have to do with small ones.
	const setPipeSize = 1031 // F_SETPIPE_SZ
	syscall.Syscall(syscall.SYS_FCNTL, uintptr(fds[1]), setPipeSize, pipeSize)
	return &pipe{r: fds[0], w: fds[1]}
}

// drop is put for a pipe that is not empty.
func (pp *pipePool) drop(p *pipe) {
	p.close()
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.all--
}

func (pp *pipePool) put(p *pipe) {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	if pp.closed {
		p.close()
		return
	}
	pp.free = append(pp.free, p)
	if pp.timer == nil {
		pp.timer = time.AfterFunc(time.Second, pp.trim)
	}
}

func (pp *pipePool) trim() {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	for _, p := range pp.free[:pp.spare] {
		p.close()
	}
	pp.all -= pp.spare
	pp.free = pp.free[:copy(pp.free, pp.free[pp.spare:])]
	if pp.spare = len(pp.free); pp.spare == 0 || pp.closed {
		pp.timer = nil
		return
	}
	pp.timer.Reset(time.Second)
}

func (pp *pipePool) close() {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.closed = true
	for _, p := range pp.free {
		p.close()
	}
	pp.free, pp.spare = nil, 0
	if pp.timer != nil {
		pp.timer.Stop()
	}
}

// inheritKeepAlive has connections get net's keep-alive from their listener.
func inheritKeepAlive(lc *net.ListenConfig) {
	lc.KeepAlive = -1 // not for each
	lc.Control = func(_, _ string, c syscall.RawConn) error {
		var wrong error
		err := c.Control(func(fd uintptr) {
			for _, option := range []struct{ level, name, value int }{
				{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 15},
				{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 9},
			} {
				if wrong == nil {
					wrong = os.NewSyscallError("setsockopt", syscall.SetsockoptInt(int(fd), option.level, option.name, option.value))
				}
			}
		})
		return cmp.Or(err, wrong)
	}
}

// unsent is how many bytes c has to send that its peer's system has not acknowledged, as far as that is known.
func unsent(c net.Conn) int {
	var queued int32
	control(c, func(fd int) {
		if tcpState(fd) != tcpClosed { // else nobody is there to acknowledge them
			// SIOCOUTQ, tcp(7); it has the number of TIOCOUTQ
			syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TIOCOUTQ, uintptr(unsafe.Pointer(&queued)))
		}
	})
	return int(queued)
}

// wasReset reports whether c has been reset, if it is TCP. After an end of stream proper it waits for being closed.
func wasReset(c net.Conn) (reset, known bool) {
	known = control(c, func(fd int) { reset = tcpState(fd) == tcpClosed })
	return reset, known
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

// control calls f with the descriptor below c, if it is TCP and open.
func control(c net.Conn, f func(fd int)) bool {
	raw := rawTCP(bottom(c))
	return raw != nil && raw.Control(func(fd uintptr) { f(int(fd)) }) == nil
}
