package relay

import (
	"io"
	"net"
	"time"
)

// Release takes the place of Connect for a client that gets a last word: it ends the relay with
// cause, and leaves client open for the caller, who may use it when Done has been called. It
// returns false if the relay was over already; then client has been closed, or will be.
func (r *Relay) Release(cause error) bool {
	r.mu.Lock()
	first := r.endWith(cause, NoSide)
	if first {
		r.released.Store(true)
		r.hungUp = true // so nobody resets it
		if r.up.phase.Load() != ended {
			// Its read ends by the deadline below, or by this, if the conn has no deadlines.
			r.refs++
			r.timer = time.AfterFunc(lingerTime, func() { r.client.reset(); r.release() })
		}
	}
	r.mu.Unlock()
	if first {
		r.handler.Over(cause)
		r.client.conn.SetReadDeadline(time.Unix(1, 0))
	}
	r.releaseElsewhere()
	return first
}

// LastWord ends the stream to c, of which nobody reads or writes any more, and closes it when the
// peer has ended its own stream, at most a second later. Until then it discards what comes: to
// close a connection with bytes unread resets it, and the peer may lose what it was sent.
func LastWord(c net.Conn) {
	late := time.AfterFunc(lingerTime, func() { reset(Underlying(c)) }) // not every conn has deadlines
	defer late.Stop()
	defer c.Close()
	c.SetDeadline(time.Now().Add(lingerTime)) // in place of whatever is set
	if h, ok := c.(halfCloser); ok {
		h.CloseWrite()
	}
	_, _ = io.Copy(io.Discard, c)
}
