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
	}
	r.mu.Unlock()
	if first {
		r.handler.Over(cause)
		if r.client.conn.SetReadDeadline(time.Unix(1, 0)) != nil { // which ends the read in progress
			r.client.reset() // so that it ends
		}
	}
	r.releaseElsewhere()
	return first
}

// LastWord ends the stream to c, of which nobody reads or writes any more, and closes it when the
// peer has ended its own stream, at most a second later. Until then it discards what comes: to
// close a connection with bytes unread resets it, and the peer may lose what it was sent.
func LastWord(c net.Conn) {
	c.SetDeadline(time.Now().Add(lingerTime))
	if h, ok := c.(halfCloser); ok {
		h.CloseWrite()
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		reset(Underlying(c))
	}
	c.Close()
}
