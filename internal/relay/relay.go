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

// A Side is one of the two connections of a relay.
type Side int8

const (
	NoSide Side = iota
	Client
	Server
)

// A Handler is told about the events of a relay. No lock is held over its methods.
type Handler interface {
	// Moved is called when n bytes from a side have been written to the other. It may block, which
	// holds this direction and keeps the relay from being idle. A panic in it aborts the relay.
	Moved(from Side, n int) Verdict

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
	Failed         Side  // the side that failed; NoSide after Abort or the Err of a Verdict
	Quiet          bool  // the client left TLS without close_notify, with no bytes under way
	Err            error // the first cause; nil: both streams ended well
	Panic          any   // the value of a panic in Moved, with its stack; nil: none
}

var (
	ErrPanicked = errors.New("lbproxy: a hook panicked")
	errReset    = errors.New("lbproxy: connection reset by peer")
	errGone     = errors.New("lbproxy: client closed before an upstream was reached")
	errNoServer = errors.New("lbproxy: no upstream was reached")
	errBadCount = errors.New("lbproxy: conn returned an impossible count")
)

// LingerTime bounds how long a relay goes on to deliver bytes from a side that has failed.
const LingerTime = time.Second

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
// Each goroutine that works on a relay holds a reference: the two directions, Abort, fail, the
// linger timer, and the caller until it calls Connect. The goroutine that drops the last reference
// takes a new one and closes both sides, which Abort may interrupt. When that reference and any of
// Abort are dropped, the relay calls Done.
type Relay struct {
	engine   *Engine
	handler  Handler
	up, down direction
	client   end

	last      atomic.Int64 // clock at which bytes last moved
	released  atomic.Bool  // client outlives the relay
	held      atomic.Int32 // directions in the handler or a pause; such a relay is not idle
	index     int          // in Engine.relays; guarded by Engine.mu
	idle      Idleness
	condemned bool // by the sweep, for being idle; only the sweep uses it

	// mu guards the fields below. It is not held over I/O, the handler, or a method of a conn.
	mu       sync.Mutex
	refs     int32
	server   end   // set once, if ever, by Connect
	cause    error // set once; nil: the relay is not over, or both streams have ended well
	panicked any
	stage    stage
	hungUp   bool // both sides have been reset or are being reset
	quiet    bool
	failed   Side
	lingerer *direction    // calls hangUp once it has ended and its bytes have arrived
	timer    *time.Timer   // calls hangUp after LingerTime; set with lingerer
	changed  chan struct{} // see change; nil unless awaited
}

type stage int8

const (
	running stage = iota
	closing       // no direction runs; both sides are being closed
	done
)

// New returns a relay that has not started, and that the caller may drop. chunk bounds the bytes
// that move before the first Verdict; 0 means no bound. New calls methods of client, so the caller
// must hold no lock.
func (e *Engine) New(client net.Conn, h Handler, chunk int) *Relay {
	r := &Relay{engine: e, handler: h, client: newEnd(client), refs: 2} // the upload and Connect
	r.up = direction{relay: r, source: Client, from: &r.client, pacer: Pacer{Chunk: chunk}}
	r.down = direction{relay: r, source: Server, to: &r.client, pacer: Pacer{Chunk: chunk}}
	r.client.socket().writtenBy(&r.down)
	return r
}

// Start makes the relay read from its client at once, before there is a server. The relay owns the
// client from now on. The caller must call Connect or Release exactly once.
func (r *Relay) Start() { go r.up.run() }

// Connect gives the relay its server, which the relay owns from now on. If the relay was over
// already, Connect resets server and returns false. A nil server means that there will be none, and
// aborts the relay unless it is over.
func (r *Relay) Connect(server net.Conn) bool {
	if server == nil {
		r.Abort(errNoServer)
		r.releaseElsewhere()
		return false
	}
	e := newEnd(server)
	e.socket().writtenBy(&r.up)
	r.mu.Lock()
	over := r.cause != nil
	if !over {
		r.server = e
		r.down.from = &r.server
		r.touch()
		r.wake()
	}
	r.mu.Unlock()
	if over {
		Reset(server)
		r.releaseElsewhere()
		return false
	}
	r.engine.add(r)
	go r.down.run() // takes over the reference for Connect
	return true
}

// Abort ends the relay and resets both sides. The relay's cause becomes cause (context.Canceled if
// nil) unless it has one. Abort waits neither for a peer nor for a hook. Any goroutine may call it
// at any time.
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

// Counts returns the number of bytes written to the server and to the client. Any goroutine may
// call it at any time.
func (r *Relay) Counts() (sent, received int64) { return r.up.moved.Load(), r.down.moved.Load() }

// endWith records the cause of the relay's end, and reports whether it is the first one. The caller
// holds mu, and calls Over after it has released mu.
func (r *Relay) endWith(cause error, failed Side) bool {
	if r.cause != nil {
		return false
	}
	r.cause, r.failed = cause, failed
	r.wake()
	return true
}

// wake tells those who wait of a change. The caller holds mu.
func (r *Relay) wake() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// fail records that a side has failed. From then on the relay only delivers the bytes that its
// lingerer d has. The other direction has nowhere to write to and discards the bytes that it reads,
// because a peer that is blocked in sending might not read. Any goroutine may call fail at any
// time.
func (r *Relay) fail(side Side, err error, d *direction, quiet bool) {
	r.mu.Lock()
	if r.stage != running || !r.endWith(err, side) {
		r.mu.Unlock()
		return
	}
	r.quiet, r.lingerer = quiet, d
	r.refs += 2 // for the timer, and until Over has returned, which comes before Done
	r.timer = time.AfterFunc(LingerTime, func() { r.hangUp(); r.release() })
	ended := d.phase.Load() == ended
	r.mu.Unlock()
	r.handler.Over(err)
	if ended { // its goroutine is gone, so another one lingers
		go func() { d.linger(); r.release() }()
	} else {
		r.releaseElsewhere()
	}
}

// hangUp resets both sides, which interrupts all reads and writes. It does not wait for a peer.
func (r *Relay) hangUp() {
	r.mu.Lock()
	if r.hungUp {
		r.mu.Unlock()
		return
	}
	r.hungUp = true
	server := r.server.conn != nil
	r.mu.Unlock()
	r.reset(&r.client)
	if server { // r.server does not change once it is set
		r.reset(&r.server)
	}
}

func (r *Relay) isHungUp() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hungUp
}

// awaitServer waits for the server and returns nil if the relay is over. Meanwhile it polls for a
// reset by the client: nobody reads from the client then, so no read reports one.
func (r *Relay) awaitServer() *end {
	for c := r.change(true); c != nil && !waitFor(c, pollTime); c = r.change(true) {
		r.pollClient()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server.conn == nil {
		return nil
	}
	return &r.server
}

// pollClient fails the relay if its client was reset while there was no server. With a server, both
// sides may have ended their streams, and then a socket looks reset too; so pollClient looks for
// the server after it has asked for the reset.
func (r *Relay) pollClient() {
	if wasReset(r.client.raw) && !r.isSettled() {
		r.up.sourceFailed(errReset)
	}
}

func (r *Relay) isSettled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cause != nil || r.server.conn != nil
}

// pause returns after d, or when the relay is over.
func (r *Relay) pause(d time.Duration) {
	if c := r.change(false); c != nil {
		waitFor(c, d)
	}
}

// change returns a channel that is closed when the relay is over or gets its server. It returns nil
// if the relay is over, or if it has a server and forServer is set. The caller waits, not change:
// one more frame above the wait would make a stack of 2 KiB grow.
func (r *Relay) change(forServer bool) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cause != nil || forServer && r.server.conn != nil {
		return nil
	}
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.changed
}

// waitFor waits until c is closed or d has passed, and reports which.
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

// touch records that bytes have moved now.
func (r *Relay) touch() { r.last.Store(Clock()) }

// close closes e. After a reset only the layers above the socket are still open.
func (r *Relay) close(e *end) {
	if e.layered() || !r.isHungUp() {
		defer r.recoverPanic()
		e.conn.Close()
	}
}

func (r *Relay) reset(e *end) {
	defer r.recoverPanic()
	reset(e.below)
}

// recoverPanic records a panic of the caller's conn, which must not end the process. Callers defer
// it.
func (r *Relay) recoverPanic() {
	if p := recover(); p != nil {
		r.notePanic(p)
	}
}

// notePanic records the value of a panic, with its stack.
func (r *Relay) notePanic(p any) {
	if err, ok := p.(error); ok {
		p = fmt.Errorf("%w\n\n%s", err, debug.Stack())
	} else {
		p = fmt.Sprintf("%v\n\n%s", p, debug.Stack())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.panicked == nil {
		r.panicked = p
	}
}

// drop drops a reference, and reports whether the caller must call finish.
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

// releaseElsewhere is release for a goroutine of the caller, which must not wait for finish.
func (r *Relay) releaseElsewhere() {
	if r.drop() {
		go r.finish()
	}
}

// finish closes both sides, without a reset unless hangUp has reset them, and calls Done.
func (r *Relay) finish() {
	if r.stage == closing { // does not change while this goroutine holds a reference
		if r.server.conn != nil {
			r.close(&r.server)
		}
		if r.released.Load() {
			r.setReadDeadline(time.Time{})
		} else {
			r.close(&r.client)
		}
		if !r.drop() {
			return // Abort holds a reference and will call finish
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
