package relay

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// A direction copies the bytes one way. Its fields belong to its goroutine unless stated otherwise.
type direction struct {
	relay    *Relay
	from, to *end         // to is nil in an upload that has not needed its server yet
	moved    atomic.Int64 // bytes written to to
	before   int64        // the other direction's moved at the last write to to
	phase    atomic.Int32 // set to ended under Relay.mu; any goroutine may read it
	watched  atomic.Bool  // a timer runs watch
	source   Side         // that from is
	atEnd    bool         // from has ended its stream, and to is being told; guarded by Relay.mu
	noSplice bool         // the system refuses to splice between from and to
	small    bool         // the last chunk was smaller than smallChunk

	fullReads int32 // reads in a row that filled a large buffer; two start splicing
	pacer     Pacer
	buf       *Buffer  // what try has read is in its first n bytes; nil while there is nothing
	n         int      // of the last read
	err       error    // of the last read
	splicer   *splicer // nil: not splicing
}

// The phases of a direction.
const (
	copying int32 = iota // reading, or waiting for the handler
	writing              // in a write to to
	ending               // in a half-close of to, which may write too
	ended                // its goroutine does not use from and to any more
)

const (
	// writePiece bounds a write to a conn whose send queue the system cannot report. There only a
	// write that returns shows that a slow reader is not idle.
	writePiece = 16 << 10

	// quietTime without moving bytes makes a connection quiet: see isQuiet.
	quietTime = 200 * time.Millisecond
)

// run copies until from has ended its stream or one side has failed.
func (d *direction) run() {
	returned := false
	defer func() {
		if !returned {
			p := recover()
			if p == nil {
				p = "lbproxy: a hook called runtime.Goexit"
			}
			d.relay.notePanic(p)
			d.relay.Abort(ErrPanicked)
		}
		d.end()
	}()
	d.copy()
	returned = true
}

// end is the last call of the direction's goroutine.
func (d *direction) end() {
	r := d.relay
	r.mu.Lock()
	d.phase.Store(ended)
	linger := r.lingerer == d
	r.mu.Unlock()
	if linger {
		d.linger()
	}
	r.release()
}

// linger waits until the peer has acknowledged every byte, and hangs up. The relay's timer bounds
// the wait.
func (d *direction) linger() {
	r := d.relay
	if d.to != nil {
		complete := r.failed != d.source // but to has no half-close: see passEnd
		late := time.Now().Add(LingerTime)
		if !d.to.measured() {
			// The system cannot report when the bytes have arrived, so allow a second from the
			// last write. A connection that was quiet for longer is reset at once.
			late = late.Add(-time.Duration(Clock() - r.last.Load()))
			if complete {
				late = late.Add(-LingerTime / 2) // leave time for closing
			}
		}
		awaitArrival(d.to.raw, late, r.isHungUp)
		if complete && !r.isHungUp() {
			r.close(d.to)
		}
	}
	r.hangUp()
	if r.timer.Stop() {
		r.drop() // the reference of the stopped timer; the caller has another
	}
}

func (d *direction) copy() {
	if t, ok := d.from.stream.(*TLS); ok {
		if err := t.Handshake(); err != nil { // not in await, whose reads must not wait
			d.sourceFailed(err)
			return
		}
	}
	for {
		n, readErr, writeErr := d.move()
		if readErr != nil && readErr != io.EOF {
			readErr = d.judge(readErr)
		}
		if writeErr != nil { // before account, whose handler may block
			d.other().sourceFailed(writeErr)
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

// sourceFailed records that the side that d reads from has failed. What it has sent is delivered.
func (d *direction) sourceFailed(err error) { d.relay.fail(d.source, err, d, false) }

func (d *direction) other() *direction {
	if d.source == Client {
		return &d.relay.down
	}
	return &d.relay.up
}

// move moves one chunk from from to to.
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

// read waits for bytes and reads them into buf. It holds no buffer while it waits.
func (d *direction) read() (int, error) {
	if err := d.from.stream.await(d); err != nil {
		return 0, err
	}
	if d.n == 0 {
		d.freeBuffer()
	}
	if d.fullReads++; d.n < LargeBuffer {
		d.fullReads = 0
	}
	return d.n, d.err
}

// try reads the bytes that are available, and returns false if there are none.
func (d *direction) try() bool {
	d.buf = NewBuffer(d.bufferSize())
	n, err := d.from.stream.read((*d.buf)[:d.pacer.Limit(len(*d.buf))])
	if err == errWait {
		d.freeBuffer()
		return false
	}
	d.n, d.err = n, err
	return true
}

// bufferSize returns the size of the buffer for the next read. It is large for streams that hold no
// buffer while they wait, and after a read that has filled a small one. It is small during the
// dial, because the bytes read then wait in their buffer for the server.
func (d *direction) bufferSize() int {
	_, isSocket := d.from.stream.(*socket)
	if d.to != nil && (isSocket || d.n >= SmallBuffer) {
		return LargeBuffer
	}
	return SmallBuffer
}

func (d *direction) freeBuffer() {
	d.buf.Free()
	d.buf = nil
}

// write writes the n bytes in buf and gives the buffer away. An upload may have to wait for its
// server first.
func (d *direction) write(n int) (int, error) {
	b := d.buf
	d.buf = nil
	if d.to == nil {
		if d.to = d.relay.awaitServer(); d.to == nil {
			b.Free()
			return 0, net.ErrClosed
		}
	}
	d.before = d.other().moved.Load()
	d.phase.Store(writing)
	n, err := d.writePieces((*b)[:n], b)
	if err == nil {
		d.phase.Store(copying) // after an error copy does that, once it has recorded the failure
	}
	return n, err
}

func (d *direction) writePieces(p []byte, b *Buffer) (written int, err error) {
	for !d.to.measured() && len(p) > writePiece {
		n, err := d.to.stream.write(p[:writePiece], nil)
		written += n
		if err != nil {
			b.Free()
			return written, err
		}
		p = p[writePiece:]
		d.relay.touch()
	}
	n, err := d.to.stream.write(p, b)
	return written + n, err
}

// account counts n bytes that were moved, and obeys the handler's Verdict.
func (d *direction) account(n int) {
	r := d.relay
	d.moved.Add(int64(n))
	r.held.Add(1)
	v := r.handler.Moved(d.source, n)
	if v.Err != nil {
		r.Abort(v.Err)
		return
	}
	if wait := d.pacer.Moved(n, v.Wait, v.Chunk); wait > 0 {
		began := Clock()
		r.pause(wait)
		d.pacer.Paused(time.Duration(Clock() - began))
	}
	now := Clock()
	r.last.Store(now) // before held drops, or the relay might look idle for a moment
	r.held.Add(-1)
	if small := n < smallChunk; small && d.small { // one among larger ones is the rest of bulk
		NoteChunk(n, now)
	} else {
		d.small = small
	}
	d.rest(n, now)
}

// judge returns io.EOF for the error of a read that CloseNotify accepts as the end of the stream: a
// TLS peer may have left without close_notify. It records any other error as a failure.
func (d *direction) judge(err error) error {
	quiet := false
	if t, ok := d.from.stream.(*TLS); ok && t.atBoundary {
		// The peer may have acknowledged a write before the write has returned in the other
		// direction, so look several times.
		for n := 0; n < 10 && !quiet; n++ {
			if quiet = d.isQuiet(); !quiet {
				time.Sleep(time.Millisecond)
			}
		}
		if t.wire.end == io.EOF && (t.CloseNotify == Optional || t.CloseNotify == Idle && quiet) {
			return io.EOF
		}
	}
	d.relay.fail(d.source, err, d, quiet && d.source == Client)
	return err
}

// isQuiet reports whether no bytes are under way: the other direction has nothing to deliver, both
// peers' systems have acknowledged every byte, and either d's last bytes had an answer or no byte
// has moved for quietTime. Without the last condition, an upload whose client is killed would look
// quiet.
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
		if readable(q.from.raw) {
			return false
		}
	}
	answered := q.moved.Load() > d.before || Clock()-d.relay.last.Load() > int64(quietTime)
	return answered && q.from.unsent() == 0 && d.from.unsent() == 0
}

// passEnd passes the end of the stream from from on to to.
func (d *direction) passEnd() {
	r, q := d.relay, d.other()
	for n := 0; n < 10; n++ {
		// A write of q that meets a reset consumes the error, and then d reads io.EOF.
		phase := q.phase.Load()
		if phase != writing && phase != ending {
			break
		}
		reset := wasReset(d.from.raw)
		// A socket that both sides have ended looks reset too, but then q is not writing any more.
		if reset && q.phase.Load() == writing {
			d.sourceFailed(errReset)
			return
		}
		if d.from.measured() && !reset {
			break
		}
		time.Sleep(time.Millisecond) // give q time to return the error, if there is one
	}
	if d.to == nil {
		if !d.from.canHalfClose() && !r.isSettled() {
			d.sourceFailed(errGone) // it cannot half-close, so its end means it has left
			return
		}
		if d.to = r.awaitServer(); d.to == nil {
			return
		}
	}
	r.mu.Lock()
	d.atEnd = true
	over, last, both := r.cause != nil, q.phase.Load() == ended, q.atEnd
	r.mu.Unlock()
	switch {
	case over || last && !d.to.layered():
		// The relay closes to next, which ends the stream as well.
	case d.to.canHalfClose():
		d.phase.Store(ending)
		if err := d.to.closeWrite(); err != nil {
			d.other().sourceFailed(err)
		}
	case !both:
		// The stream from from is complete, so close to. The stream to from is cut.
		err := fmt.Errorf("lbproxy: a %T has no CloseWrite, so its peer cannot be told "+
			"that the other side has ended its stream, and go on", d.to.conn)
		r.fail(q.source, err, d, false)
		r.reset(d.from)
	}
}

// checkReset fails the relay if from was reset and neither a read nor a write may ever tell. Any
// goroutine may call it at any time.
func (d *direction) checkReset() {
	// Not wasReset, which is also true after both streams have ended.
	if d.isDeaf() && hasError(d.from.raw) && d.isDeaf() {
		d.sourceFailed(errReset)
	}
}

// isDeaf reports whether d does not read from from, and maybe nobody writes to it, although the
// relay goes on.
func (d *direction) isDeaf() bool {
	phase := d.phase.Load()
	return phase == writing || phase == ended && d.other().phase.Load() != ended
}

// discard reads from until it ends or is closed. No limit holds for bytes that nobody gets.
func (d *direction) discard() {
	d.pacer.Chunk = 0
	for !d.relay.released.Load() {
		_, err := d.read()
		d.freeBuffer()
		if err != nil {
			return
		}
	}
}
