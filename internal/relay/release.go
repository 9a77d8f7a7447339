package relay

import (
	"context"
	"io"
	"net"
	"syscall"
	"time"
)

// Release takes the place of Connect for a client that gets a last word: it ends the relay with
// cause and leaves client open. The caller may use client once Done has been called. Release
// returns false if the relay was over already; then the relay closes client.
func (r *Relay) Release(cause error) bool {
	r.mu.Lock()
	first := r.endWith(cause, NoSide)
	if first {
		r.released.Store(true)
		r.hungUp = true // so that hangUp does not reset client
		// The upload runs, since it waits for a server. Its read ends by the deadline below, or by
		// this reset if the conn has no deadlines. As the lingerer it then stops the timer; it waits
		// for nobody, since it has no server.
		r.lingerer = &r.up
		r.refs++
		r.timer = time.AfterFunc(LingerTime, func() { r.reset(&r.client); r.release() })
	}
	r.mu.Unlock()
	if first {
		r.handler.Over(cause)
		r.setReadDeadline(time.Unix(1, 0))
	}
	r.releaseElsewhere()
	return first
}

// setReadDeadline sets the read deadline of a client that outlives the relay.
func (r *Relay) setReadDeadline(t time.Time) {
	defer r.recoverPanic()
	r.client.conn.SetReadDeadline(t)
}

// LastWord half-closes c and closes it when the peer has ended its own stream, at most a second
// later. It discards the bytes that come meanwhile: closing a connection with unread bytes resets
// it, and then the peer may lose the end of the stream. Nobody else may use c any more.
func LastWord(c net.Conn) {
	// Not every conn has deadlines.
	late := time.AfterFunc(LingerTime, func() {
		defer ignorePanic() // c.Close below meets it as well
		reset(Underlying(c))
	})
	defer late.Stop()
	defer c.Close()
	c.SetDeadline(time.Now().Add(LingerTime)) // replaces a deadline of the caller
	if h, ok := c.(halfCloser); ok {
		h.CloseWrite()
	}
	_, _ = io.Copy(io.Discard, c)
}

// Linger waits until what was written to c has arrived at the peer's system, at most a second and
// not longer than ctx, and resets c.
func Linger(ctx context.Context, c net.Conn) {
	stop := func() bool { return ctx.Err() != nil }
	awaitArrival(rawTCP(Underlying(c)), time.Now().Add(LingerTime), stop)
	Reset(c)
}

// awaitArrival waits until the peer's system has acknowledged what was written to a socket. It ends
// early when it is late, or when stop returns true.
func awaitArrival(raw syscall.RawConn, late time.Time, stop func() bool) {
	wait := time.Millisecond
	for unsent(raw) > 0 && !stop() && time.Now().Before(late) {
		time.Sleep(wait)
		wait = min(2*wait, 16*time.Millisecond)
	}
}
