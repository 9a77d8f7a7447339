package relay

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// A direction carries the bytes of one way. Its fields are its goroutine's own unless they say
// otherwise.
type direction struct {
	relay    *Relay
	name     Direction
	from, to *end         // to is nil in an upload that has not needed its server yet
	moved    atomic.Int64 // bytes written to to
	before   int64        // bytes that the other direction had moved when to was last written to
	phase    atomic.Int32 // set to ended under Relay.mu; may be read by anybody
	atEnd    bool         // from has ended its stream, which is being passed on; guarded by Relay.mu

	pacer     Pacer
	buf       *buffer // what try has read into: n bytes, and then err
	n         int
	err       error
	lastRead  int
	fullReads int      // reads in a row that filled a large buffer: after two of them splicing begins
	splicer   *splicer // nil: not splicing
	noSplice  bool     // it is refused between these two
}

// What a direction is doing.
const (
	copying int32 = iota // reading, or waiting for the handler
	writing              // in a write to to
	ending               // in a half-close of to, which may write as well
	ended                // its goroutine does nothing more with from and to
)

const (
	// writePiece is the most that is written at once to a conn of which the system does not say how
	// much is still queued: then each write that returns is a sign that a slow reader is not idle.
	writePiece = 16 << 10

	// quietTime without an answer is enough for a connection to be quiet: see isQuiet.
	quietTime = 200 * time.Millisecond
)

// run copies until from has ended or something has failed.
func (d *direction) run() {
	returned := false
	defer func() {
		if !returned {
			d.relay.panicking(recover())
		}
		d.end()
	}()
	d.copy()
	returned = true
}

// end is the last that the direction's goroutine does.
func (d *direction) end() {
	r := d.relay
	r.mu.Lock()
	d.phase.Store(ended)
	linger := r.lingerer == d
	releasing := d.name == Upload && r.released.Load()
	r.mu.Unlock()
	if linger {
		d.linger()
	}
	if releasing && r.timer.Stop() {
		r.drop() // the timer's reference
	}
	r.release()
}

// linger waits until what was written has arrived, and hangs up. The relay's timer bounds that.
func (d *direction) linger() {
	r := d.relay
	if d.to != nil {
		late := time.Now().Add(lingerTime)
		if !d.to.measured {
			// Nobody says when it has arrived, so it gets its second from when it was written: a
			// connection that was quiet for longer is reset at once.
			late = late.Add(-time.Duration(clock() - r.last.Load()))
			if r.politely {
				late = late.Add(-lingerTime / 2) // to close takes time, too
			}
		}
		wait := time.Millisecond
		for d.to.unsent() > 0 && !r.isHungUp() && time.Now().Before(late) {
			time.Sleep(wait)
			wait = min(2*wait, longestWait)
		}
		if r.politely && !r.isHungUp() {
			d.to.conn.Close()
		}
	}
	r.hangUp()
	if r.timer.Stop() {
		r.drop() // the timer's reference; the caller has another
	}
}

func (d *direction) copy() {
	r := d.relay
	if t, ok := d.from.stream.(*TLS); ok {
		if err := t.Handshake(); err != nil { // here, not in await, whose reads must not wait
			r.fail(d.source(), err, false)
			return
		}
	}
	for {
		n, readErr, writeErr := d.move()
		if readErr != nil && readErr != io.EOF {
			readErr = d.judge(readErr)
		}
		if writeErr != nil { // before the handler is asked, which may take its time
			r.fail(d.destination(), writeErr, false)
			d.phase.Store(copying)
		}
		if n > 0 {
			d.account(n)
		}
		switch {
		case writeErr != nil:
			d.discard()
			return
		case readErr == io.EOF:
			d.passEnd()
			return
		case readErr != nil:
			return
		}
	}
}

func (d *direction) source() Side {
	if d.name == Upload {
		return Client
	}
	return Server
}

func (d *direction) destination() Side {
	if d.name == Upload {
		return Server
	}
	return Client
}

func (d *direction) other() *direction {
	if d.name == Upload {
		return &d.relay.down
	}
	return &d.relay.up
}

// move carries one chunk.
func (d *direction) move() (n int, readErr, writeErr error) {
	if d.fullReads >= 2 && !d.noSplice {
		if d.splicer == nil {
			d.splicer = newSplicer(d)
			d.noSplice = d.splicer == nil
		}
		if d.splicer != nil {
			return d.splicer.move()
		}
	}
	n, readErr = d.read()
	if n > 0 {
		n, writeErr = d.write(n)
	}
	return n, readErr, writeErr
}

// read waits for bytes and reads them into buf, which it holds only while there are any.
func (d *direction) read() (int, error) {
	if err := d.from.stream.await(d); err != nil {
		return 0, err
	}
	if d.n == 0 {
		d.freeBuffer()
	}
	if d.fullReads++; d.n < largeBuffer {
		d.fullReads = 0
	}
	d.lastRead = d.n
	return d.n, d.err
}

// try reads what there is, or returns false if that is nothing.
func (d *direction) try() bool {
	d.buf = newBuffer(d.bufferSize())
	d.n, d.err = d.from.stream.read((*d.buf)[:d.pacer.Limit(len(*d.buf))])
	if d.err == errWait {
		d.freeBuffer()
		return false
	}
	return true
}

// bufferSize is the size for the next read. Large buffers are for streams that hold none while they
// wait, and for reads that a small one was too small for. While there is no server, somebody has to
// wait with what was read, for as long as the dial takes.
func (d *direction) bufferSize() int {
	if d.to != nil && (d.from.isSocket || d.lastRead >= smallBuffer) {
		return largeBuffer
	}
	return smallBuffer
}

func (d *direction) freeBuffer() {
	d.buf.free()
	d.buf = nil
}

// write writes the n bytes in buf, which an upload may have to wait for, and gives the buffer away.
func (d *direction) write(n int) (int, error) {
	b := d.buf
	d.buf = nil
	if d.to == nil {
		if d.to = d.relay.awaitServer(); d.to == nil {
			b.free()
			return 0, net.ErrClosed
		}
	}
	d.before = d.other().moved.Load()
	d.phase.Store(writing)
	n, err := d.writePieces((*b)[:n], b)
	if err == nil {
		d.phase.Store(copying) // else copy does, when the failure is known
	}
	return n, err
}

func (d *direction) writePieces(p []byte, b *buffer) (written int, err error) {
	for !d.to.measured && len(p) > writePiece {
		n, err := d.to.stream.write(p[:writePiece], nil)
		n, err = checkCount(n, writePiece, err)
		written += n
		if err != nil {
			b.free()
			return written, err
		}
		p = p[writePiece:]
		d.relay.touch()
	}
	n, err := d.to.stream.write(p, b)
	n, err = checkCount(n, len(p), err)
	return written + n, err
}

// checkCount makes an error of what a write of size bytes must not return.
func checkCount(n, size int, err error) (int, error) {
	switch {
	case n < 0 || n > size:
		return 0, ErrBadCount
	case n < size && err == nil:
		err = io.ErrShortWrite
	}
	return n, err
}

// account counts n bytes that were moved, and does what the handler says.
func (d *direction) account(n int) {
	r := d.relay
	d.moved.Add(int64(n))
	r.held.Add(1)
	v := r.handler.Moved(d.name, n)
	if v.Err != nil {
		r.Abort(v.Err)
		return
	}
	if wait := d.pacer.Moved(n, v.Wait, v.Chunk); wait > 0 {
		began := clock()
		r.pause(wait)
		d.pacer.Paused(time.Duration(clock() - began))
	}
	now := clock()
	r.last.Store(now) // before it is no longer held, or it might look idle for a moment
	r.held.Add(-1)
	noteChunk(n, now)
}

// judge decides what the error of a read means, and records the failure unless it is to be taken
// for the end of the stream: a TLS peer may have left without close_notify.
func (d *direction) judge(err error) error {
	quiet := false
	if t, ok := d.from.stream.(*TLS); ok && t.atBoundary {
		// The peer may have got what the other direction has written before that came to know.
		for n := 0; n < 10 && !quiet; n++ {
			if quiet = d.isQuiet(); !quiet {
				time.Sleep(time.Millisecond)
			}
		}
		if t.wire.end == io.EOF && (t.CloseNotify == Optional || t.CloseNotify == Idle && quiet) {
			return io.EOF
		}
	}
	d.relay.fail(d.source(), err, quiet && d.name == Upload)
	return err
}

// isQuiet reports whether nothing is under way: the other direction has nothing to deliver, both
// peers' systems have acknowledged everything, and d's last bytes had an answer, or nothing has
// moved for some time. Without that, an upload whose client is killed would look quiet.
func (d *direction) isQuiet() bool {
	q := d.other()
	d.relay.mu.Lock()
	connected := d.relay.server.conn != nil
	d.relay.mu.Unlock()
	if !connected {
		return false
	}
	switch q.phase.Load() {
	case writing, ending:
		return false
	case copying:
		if q.from.readable() {
			return false
		}
	}
	answered := q.moved.Load() > d.before || clock()-d.relay.last.Load() > int64(quietTime)
	return answered && q.from.unsent() == 0 && d.from.unsent() == 0
}

// passEnd passes the end of the stream from from on to to.
func (d *direction) passEnd() {
	r, q := d.relay, d.other()
	for n := 0; n < 10; n++ {
		// If a write of q's has met a reset, it took the error, and left d what looks like an end.
		phase := q.phase.Load()
		if phase != writing && phase != ending {
			break
		}
		reset, known := d.from.wasReset()
		if reset && q.phase.Load() == writing { // still: what both sides have ended looks the same
			r.fail(d.source(), errReset, false)
			return
		}
		if known && !reset {
			break
		}
		time.Sleep(time.Millisecond) // for q to come back with the error, if there is one
	}
	if d.to == nil {
		if !d.from.canHalfClose() && !r.isSettled() {
			r.fail(d.source(), errGone, false) // an end is all that it can say, so it has left
			return
		}
		if d.to = r.awaitServer(); d.to == nil {
			return
		}
	}
	r.mu.Lock()
	d.atEnd = true
	over, last, both := r.over, q.phase.Load() == ended, q.atEnd
	r.mu.Unlock()
	switch {
	case over || last && !d.to.layered:
		// Closing comes next, and says the same.
	case d.to.canHalfClose():
		d.phase.Store(ending)
		if err := d.to.closeWrite(); err != nil {
			r.fail(d.destination(), err, false)
		}
	case !both:
		// What from sent is whole, and closing to says so. What from was sent is cut.
		err := fmt.Errorf("lbproxy: a %T has no CloseWrite, so its peer cannot be told that the other "+
			"side has ended its stream, and go on", d.to.conn)
		r.failLingering(d.destination(), err, false, d, true)
		d.from.reset()
	}
}

// discard reads from until it ends or is closed.
func (d *direction) discard() {
	for !d.relay.released.Load() {
		_, err := d.read()
		d.freeBuffer()
		if err != nil {
			return
		}
	}
}
