// Package loop serves TCP connections on event loops: a few goroutines that each drive thousands of
// sessions, without a goroutine or a buffer for each. It dials what its handler chooses and copies
// bytes both ways, as package relay does and with the same outcomes. It knows nothing of upstreams
// or limits. docs/engine.md explains it. It exists on Linux; elsewhere NewGroup fails.
package loop

import (
	"errors"
	"net/netip"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A Handler decides for one session, and hears what happens to it. A loop calls its methods, one at
// a time. None of them may block, or call what others wrote: all sessions of the loop wait.
type Handler interface {
	// Next chooses what to dial. failed is the error of the last dial, nil before the first. An error
	// other than ErrWait and ErrLeave ends the session.
	Next(failed error) (Target, error)

	// Header is what a new server is sent first. It is not counted.
	Header() []byte

	// Connected is called when the dial has worked and the header was sent.
	Connected()

	// Moved is called when n bytes from a side were written to the other. The waits and chunks of a
	// Verdict are for sessions with a Limit.
	Moved(from relay.Side, n int) relay.Verdict

	// Leave gives the sockets away, because the session moves bulk, or because Next returned
	// ErrLeave; then server is -1. A stream that has ended ends again when it is read. It is the
	// last call.
	Leave(client, server int)

	// Done is called last, unless Leave was. Both sides are closed.
	Done(relay.Outcome)
}

// A Target is what to dial.
type Target struct {
	Addr    netip.AddrPort // without a zone
	Timeout time.Duration
}

var (
	ErrWait  = errors.New("lbproxy: Resume will be called")
	ErrLeave = errors.New("lbproxy: the session leaves its loop")
)
