//go:build linux && !lbproxy_portable

package loop

import (
	"syscall"

	"github.com/danielepagano/lbproxy/internal/relay"
)

const (
	bufferSize = relay.LargeBuffer

	// budget is how many reads of a side there are in a turn, before others have theirs.
	budget = 2

	// bulkReads in a row that fill more than half of the buffer make a session leave for the
	// relay's pumps. They splice, which costs less than half, and do not keep others waiting.
	bulkReads = 4
)

// pending holds the bytes that a slow reader has yet to take. The last few move to a small buffer,
// since the reader may be slow for long.
type pending struct {
	buf  *relay.Buffer
	left []byte // of buf
}

// newPending keeps a copy of b, which is not longer than bufferSize.
func newPending(b []byte) *pending {
	size := bufferSize
	if len(b) <= relay.SmallBuffer {
		size = relay.SmallBuffer
	}
	p := &pending{buf: relay.NewBuffer(size)}
	p.left = (*p.buf)[:copy(*p.buf, b)]
	return p
}

// drop frees what c has yet to take.
func (l *loop) drop(c *side) {
	if p := c.pending; p != nil {
		c.pending = nil
		p.buf.Free()
	}
}

// relay moves what can be moved.
func (l *loop) relay(s *Session) {
	down := l.pump(s, server)
	if s.phase == open && l.pump(s, client) && down && s.phase == open {
		l.end(s, nil)
	}
}

// pump moves what can be moved from side i to the other. It returns true if side i has ended and
// the other has taken all of it.
func (l *loop) pump(s *Session, i int) bool {
	from, to := &s.side[i], &s.side[1-i]
	for left := budget; ; left-- {
		if to.pending != nil && !l.flush(s, i) {
			l.checkReset(s, i) // nothing is read meanwhile, which would tell
			return false
		}
		if s.isHeld(i) {
			l.checkReset(s, i)
			return false
		}
		if from.state&ended != 0 {
			return l.passEnd(s, i)
		}
		switch {
		case from.state&readable == 0:
			return false
		case from.full >= bulkReads && s.mayLeave():
			l.leave(s)
			return false
		case left == 0:
			l.later(s)
			return false
		}
		n, errno := l.read(from, s.room(i))
		switch errno {
		case 0:
			if n > 0 && !l.write(s, i, l.buf[:n]) {
				return false
			}
		case syscall.EAGAIN:
		default:
			if s.phase == open {
				l.fail(s, i, readError(errno))
				return false
			}
		}
	}
}

// read reads from c into the loop's buffer, most bytes at most. At an urgent byte a pending signal
// makes the system say that there is nothing, although bytes may follow for which no event comes.
// Then read tries again.
func (l *loop) read(c *side, most int) (n int, errno syscall.Errno) {
	for range relay.UrgentReads {
		n, errno = relay.RecvFD(int(c.fd), l.buf[:most], 0)
		if errno != syscall.EAGAIN || c.state&urgent == 0 || !relay.AtMarkFD(int(c.fd)) {
			break
		}
	}
	l.noteRead(c, n, most, errno)
	return n, errno
}

// noteRead notes what a read of c for most bytes that returned n and errno says of the next one.
//
// After a FIN was announced, a read that returns less than it might has met it. Without one there
// is nothing left, and an event will tell of more. Neither holds for a side that has an error,
// which only a read tells, nor for one with urgent data, at which a read stops short.
func (l *loop) noteRead(c *side, n, most int, errno syscall.Errno) {
	if c.full++; n <= bufferSize/2 {
		c.full = 0
	}
	switch {
	case errno == syscall.EAGAIN:
		c.state &^= readable
	case errno != 0, n == 0:
		c.state |= ended
	case n == most, c.state&(broken|urgent) != 0:
	case c.state&finished != 0:
		c.state |= ended
	default:
		c.state &^= readable
	}
}

// write writes b, which came from side i, and keeps what the other side does not take. It returns
// false if that has failed. The last bytes of a stream wait for passEnd if that half-closes the
// other side, so that they and the FIN leave in one segment.
func (l *loop) write(s *Session, i int, b []byte) bool {
	to, flags := &s.side[1-i], 0
	if s.phase == open && s.side[i].state&ended != 0 && to.state&ended == 0 {
		flags = syscall.MSG_MORE
	}
	n, errno := relay.SendFD(int(to.fd), b, flags)
	if errno != 0 && errno != syscall.EAGAIN {
		l.writeFailed(s, i, writeError("write", errno))
		return false
	}
	if n < len(b) {
		to.pending = newPending(b[n:]) // to be tried at once: a signal, too, makes a send short
	}
	ok := n == 0 || l.account(s, i, n)
	if flags != 0 && (!ok || s.isHeld(i)) {
		relay.NoDelayFD(int(to.fd)) // sends b, because its FIN has to wait
	}
	return ok
}

// flush writes what came from side i and is kept for the other. It returns true if all is written.
func (l *loop) flush(s *Session, i int) bool {
	to := &s.side[1-i]
	for p := to.pending; len(p.left) > 0; {
		if to.state&writable == 0 {
			if len(p.left) <= relay.SmallBuffer && len(*p.buf) > relay.SmallBuffer {
				small := newPending(p.left)
				l.drop(to)
				to.pending = small
			}
			return false
		}
		n, errno := relay.SendFD(int(to.fd), p.left, 0)
		switch errno {
		case 0:
			p.left = p.left[n:]
			if !l.account(s, i, n) {
				return false
			}
		case syscall.EAGAIN:
			to.state &^= writable
		default:
			l.writeFailed(s, i, writeError("write", errno))
			return false
		}
	}
	l.drop(to)
	return true
}

// account notes that n bytes from side i were written. It returns false if that ends s.
func (l *loop) account(s *Session, i, n int) bool {
	s.moved[i].Add(int64(n))
	s.idle.last = l.now
	relay.NoteChunk(n, l.now)
	v := s.handler.Moved(sides[i], n)
	if v.Err != nil {
		if s.phase == open {
			s.cause = v.Err
		}
		l.end(s, s.cause)
		return false
	}
	l.obey(s, i, n, v)
	return true
}

// writeFailed is called when what came from side i cannot be written.
func (l *loop) writeFailed(s *Session, i int, err error) {
	if s.phase == open {
		l.fail(s, 1-i, err)
	} else { // nobody is left to deliver to
		l.end(s, s.cause)
	}
}

// passEnd passes the end of side i's stream on, once. All that came before it was written. When
// both have ended, closing says the same.
func (l *loop) passEnd(s *Session, i int) bool {
	from, to := &s.side[i], &s.side[1-i]
	if s.phase != open {
		return true
	}
	if l.checkReset(s, i) { // after its end
		return false
	}
	if to.state&shut != 0 || to.state&ended != 0 && from.pending == nil {
		return true
	}
	to.state |= shut
	switch errno := relay.ShutdownFD(int(to.fd)); errno {
	case 0:
		return true
	case syscall.ENOTCONN:
		l.fail(s, 1-i, readError(syscall.ECONNRESET)) // as a read would have said
	default:
		l.fail(s, 1-i, writeError("shutdown", errno))
	}
	return false
}

// checkReset reports whether side i has an error, by which s fails.
func (l *loop) checkReset(s *Session, i int) bool {
	c := &s.side[i]
	if s.phase != open || c.state&broken == 0 {
		return false
	}
	if err := takeError(c.fd); err != nil {
		if err == syscall.EPIPE {
			err = syscall.ECONNRESET // by a peer that had ended its stream
		}
		l.fail(s, i, readError(err))
		return true
	}
	c.state &^= broken
	return false
}

// discard throws away what side i sends.
func (l *loop) discard(s *Session, i int) {
	c := &s.side[i]
	for left := budget; c.state&readable != 0 && c.state&ended == 0; left-- {
		if left == 0 {
			l.later(s)
			return
		}
		l.read(c, bufferSize)
	}
}

// mayLeave reports whether a relay finds all that it needs to go on with s in the sockets.
func (s *Session) mayLeave() bool {
	a, b := &s.side[client], &s.side[server]
	held := s.limit != nil && s.limit.next() != 0
	return s.phase == open && !held && a.pending == nil && b.pending == nil &&
		(a.state|b.state)&(broken|urgent) == 0
}
