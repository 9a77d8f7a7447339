// Package relay joins two connections and copies bytes both ways until both streams have ended. It
// knows nothing of upstreams, limits, users or logs.
//
// A cut stream never looks complete: only an end that the source has declared is passed on, as a
// half-close. When one side fails, what it sent is delivered first, for at most a second, and then
// the other side is reset.
package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// A Direction says which way bytes go.
type Direction int

const (
	Upload   Direction = iota + 1 // client to server
	Download                      // server to client
)

// A Side is one of the two connections of a relay.
type Side int

const (
	NoSide Side = iota
	Client
	Server
)

// A Handler hears what a relay does. Its methods are called without locks.
type Handler interface {
	// Moved is called when n bytes have been written to the other side. It may block, which holds
	// this direction and keeps the relay from being idle. A panic in it aborts the relay.
	Moved(d Direction, n int) Verdict

	// Over is called once, before Done, as soon as the relay has a reason to end: with the first
	// cause, or with nil when both streams have ended well. It must not block.
	Over(cause error)

	// Done is called once, last. No goroutine of the relay is left but its caller, both sides are
	// closed, and Connect was called.
	Done(Outcome)
}

// A Verdict says how a direction goes on. The zero value lets it.
type Verdict struct {
	Wait  time.Duration // hold the direction for so long; not positive: do not
	Chunk int           // the most bytes to move at once from now on; 0: the relay chooses
	Err   error         // abort the relay with this cause; nil: do not
}

// An Outcome is how a relay has ended.
type Outcome struct {
	Sent, Received int64 // bytes written to the server, and to the client
	Connected      bool  // Connect was given a server in time
	Failed         Side  // whose side failed; NoSide if the cause is that of Abort or a Verdict
	Quiet          bool  // with Failed == Client: it left TLS without close_notify, nothing under way
	Err            error // the first cause; nil: both streams ended well
	Panic          any   // what Moved panicked with, and its stack; nil: nothing
}

var (
	ErrPanicked = errors.New("lbproxy: a hook panicked")
	errReset    = errors.New("lbproxy: connection reset by peer")
	errGone     = errors.New("lbproxy: client closed before an upstream was reached")
	errNoServer = errors.New("lbproxy: no upstream was reached")
	ErrBadCount = errors.New("lbproxy: conn returned an impossible count")
)

// lingerTime bounds how long a relay goes on to deliver what came from a side that has failed.
const lingerTime = time.Second

// longestWait is the longest time between two questions whether what was written has arrived.
const longestWait = 16 * time.Millisecond

// pollTime is how often an upload that waits for its server asks whether the client was reset.
const pollTime = 200 * time.Millisecond

// A Relay copies between a client and a server.
//
//	Start ──► dialing ──Connect(server)──► copying ──both streams ended──► closing ──► done
//	             │                            │                               ▲
//	             │                    a side failed                           │
//	             │                            ▼                               │
//	             │     lingering: its direction delivers, ≤ 1 s ──► hangUp ───┤
//	             └──Connect(nil), Abort: hangUp ──────────────────────────────┘
//
// Each goroutine that works on a relay holds a reference: the two directions, Abort, the linger
// timer, and whoever owes Connect. The one that gives back the last closes both sides, holding a
// reference anew, since Abort must be able to break that off; the last after that reports.
type Relay struct {
	engine   *Engine
	handler  Handler
	up, down direction
	client   end

	last     atomic.Int64 // clock at which bytes last moved
	released atomic.Bool  // client outlives the relay
	held     atomic.Int32 // directions that the handler holds; while there are any it is not idle
	swept

	// mu guards what follows. It is not held over I/O, the handler, or a method of a conn.
	mu       sync.Mutex
	refs     int
	stage    stage
	server   end // set once, if ever, by Connect
	over     bool
	cause    error // set once, and then over is; nil if over: both streams ended well
	failed   Side
	quiet    bool
	panicked any
	hungUp   bool          // both sides have been reset, or are being
	lingerer *direction    // hangs up once it has ended and all that it wrote has arrived
	politely bool          // and closes its destination before that
	timer    *time.Timer   // hangs up after lingerTime; set with lingerer
	settled  chan struct{} // closed when there is a server, or over; made by whoever waits for it
	gone     chan struct{} // closed when over; likewise
}

type stage int

const (
	running stage = iota
	closing       // no direction is left
	done
)

// Start reads from client at once, before there is a server. chunk bounds the bytes that move
// before the first Verdict; 0: no bound. The relay owns client from now on. The caller owes exactly
// one call of Connect.
func (e *Engine) Start(client net.Conn, h Handler, chunk int) *Relay {
	r := e.New(client, h, chunk)
	r.Start()
	return r
}

// New returns a relay that has not started yet, and that may be forgotten. It asks client for the
// connections below it, so no lock may be held.
func (e *Engine) New(client net.Conn, h Handler, chunk int) *Relay {
	r := &Relay{engine: e, handler: h, client: newEnd(client), refs: 2} // the upload and Connect
	r.up = direction{relay: r, name: Upload, from: &r.client, pacer: Pacer{Chunk: chunk}}
	r.down = direction{relay: r, name: Download, to: &r.client, pacer: Pacer{Chunk: chunk}}
	return r
}

// Start makes a relay of New read from its client.
func (r *Relay) Start() { go r.up.run() }

// Connect gives the relay its server, which it owns from now on. It returns false if the relay was
// over already: then server has been reset. A nil server means that there will be none, and aborts
// the relay unless it is over.
func (r *Relay) Connect(server net.Conn) bool {
	if server == nil {
		r.Abort(errNoServer)
		r.releaseElsewhere()
		return false
	}
	e := newEnd(server)
	r.mu.Lock()
	over := r.over
	if !over {
		r.server = e
		r.down.from = &r.server
		r.touch()
		if r.settled != nil {
			close(r.settled)
		}
	}
	r.mu.Unlock()
	if over {
		Reset(server)
		r.releaseElsewhere()
		return false
	}
	r.engine.add(r)
	go r.down.run() // with the reference that was Connect's
	return true
}

// Abort ends the relay with cause (nil: context.Canceled) unless it has one, and resets both sides.
// It waits neither for a peer nor for a hook. It may be called at any time, from anywhere.
func (r *Relay) Abort(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	r.mu.Lock()
	if r.stage == done {
		r.mu.Unlock()
		return
	}
	r.refs++
	first := r.endWith(cause, NoSide)
	r.mu.Unlock()
	if first {
		r.handler.Over(cause)
	}
	r.hangUp()
	r.releaseElsewhere()
}

// Counts returns the bytes that have been written to the server and to the client. It may be called
// at any time.
func (r *Relay) Counts() (sent, received int64) { return r.up.moved.Load(), r.down.moved.Load() }

// endWith records why the relay ends, and reports whether that is the first reason. The caller
// holds mu, and calls Over when it no longer does.
func (r *Relay) endWith(cause error, failed Side) bool {
	if r.over {
		return false
	}
	r.over, r.cause, r.failed = true, cause, failed
	if r.settled != nil && r.server.conn == nil {
		close(r.settled)
	}
	if r.gone != nil {
		close(r.gone)
	}
	return true
}

// fail is called when a side has failed. From then on the relay is only there to deliver what that
// side has sent. The other direction, having nobody to write to, throws away what it reads: a peer
// that is busy sending might not come to read otherwise.
func (r *Relay) fail(side Side, err error, quiet bool) {
	d := &r.up
	if side == Server {
		d = &r.down
	}
	r.failLingering(side, err, quiet, d, false)
}

// failLingering is fail with the direction that has something to deliver.
func (r *Relay) failLingering(side Side, err error, quiet bool, d *direction, politely bool) {
	r.mu.Lock()
	if !r.endWith(err, side) {
		r.mu.Unlock()
		return
	}
	r.quiet, r.lingerer, r.politely = quiet, d, politely
	r.refs++ // the timer's
	r.timer = time.AfterFunc(lingerTime, func() { r.hangUp(); r.release() })
	ended := d.phase.Load() == ended
	if ended {
		r.refs++
	}
	r.mu.Unlock()
	r.handler.Over(err)
	if ended { // and so it cannot linger by itself
		go func() { d.linger(); r.release() }()
	}
}

// hangUp resets both sides, which ends whatever is going on on them. It does not wait for a peer.
func (r *Relay) hangUp() {
	r.mu.Lock()
	if r.hungUp {
		r.mu.Unlock()
		return
	}
	r.hungUp = true
	server := r.server.conn != nil
	r.mu.Unlock()
	r.client.reset()
	if server { // which does not change any more
		r.server.reset()
	}
}

func (r *Relay) isHungUp() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hungUp
}

// awaitServer returns the server, or nil if the relay is over. Meanwhile it asks now and then
// whether the client was reset: with its bytes unread, or in hand, no read would tell.
func (r *Relay) awaitServer() *end {
	for {
		r.mu.Lock()
		over, server := r.over, r.server.conn != nil
		if r.settled == nil {
			r.settled = make(chan struct{})
			if over || server {
				close(r.settled)
			}
		}
		if server {
			r.settled = nil
		}
		r.mu.Unlock()
		switch {
		case server:
			return &r.server
		case over:
			return nil
		case !r.client.measured:
			<-r.settled
		case !waitFor(r.settled, pollTime):
			r.pollClient()
		}
	}
}

// pollClient fails the relay if its client was reset while there is no server. With one, both sides
// may have ended their streams, and a socket in which that is so looks reset, too; so the server is
// looked for after the question.
func (r *Relay) pollClient() {
	if reset, _ := r.client.wasReset(); reset && !r.isSettled() {
		r.fail(Client, errReset, false)
	}
}

func (r *Relay) isSettled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.over || r.server.conn != nil
}

// pause returns after d, or when the relay is over.
func (r *Relay) pause(d time.Duration) {
	r.mu.Lock()
	if r.gone == nil {
		r.gone = make(chan struct{})
		if r.over {
			close(r.gone)
		}
	}
	r.mu.Unlock()
	waitFor(r.gone, d)
}

// waitFor returns when c is closed or d has passed, and reports which.
func waitFor(c <-chan struct{}, d time.Duration) (closed bool) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

// touch notes that bytes have moved.
func (r *Relay) touch() { r.last.Store(clock()) }

// panicking records the panic of a hook, or of a conn, and ends the relay. A nil p is Goexit's.
func (r *Relay) panicking(p any) {
	switch err := p.(type) {
	case nil:
		p = "lbproxy: a hook called runtime.Goexit"
	case error:
		p = fmt.Errorf("%w\n\n%s", err, debug.Stack())
	default:
		p = fmt.Sprintf("%v\n\n%s", p, debug.Stack())
	}
	r.mu.Lock()
	if r.panicked == nil {
		r.panicked = p
	}
	r.mu.Unlock()
	r.Abort(ErrPanicked)
}

// close closes e, unless it was reset, which leaves only the layers open. A panic of somebody's
// conn is recorded: it must not end the process.
func (r *Relay) close(e *end) {
	if !e.layered && r.isHungUp() {
		return
	}
	defer func() {
		if p := recover(); p != nil && r.panicked == nil {
			r.panicked = fmt.Sprintf("%v\n\n%s", p, debug.Stack())
		}
	}()
	e.conn.Close()
}

// drop gives back a reference, and reports whether the caller has to call finish.
func (r *Relay) drop() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refs--; r.refs > 0 {
		return false
	}
	if r.stage++; r.stage == closing {
		r.refs = 1
	}
	return true
}

func (r *Relay) release() {
	if r.drop() {
		r.finish()
	}
}

// releaseElsewhere is release for a goroutine that is not the relay's, and must not wait.
func (r *Relay) releaseElsewhere() {
	if r.drop() {
		go r.finish()
	}
}

// finish closes both sides, politely unless they have been reset, and reports.
func (r *Relay) finish() {
	if r.stage == closing { // nobody changes it while there are references, of which one is ours
		if r.server.conn != nil {
			r.close(&r.server)
		}
		if r.released.Load() {
			r.client.conn.SetReadDeadline(time.Time{})
		} else {
			r.close(&r.client)
		}
		if !r.drop() {
			return // Abort came
		}
	}
	if r.server.conn != nil {
		r.engine.remove(r)
	}
	if r.cause == nil {
		r.handler.Over(nil)
	}
	sent, received := r.Counts()
	r.handler.Done(Outcome{
		sent, received, r.server.conn != nil, r.failed, r.quiet, r.cause, r.panicked,
	})
}
