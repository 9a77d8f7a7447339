package relay

import (
	"runtime"
	"sync/atomic"
	"time"
)

// Small traffic beside bulk.
//
// A goroutine that moves bulk never waits while both its ends are ready, and Go looks at the
// network only when a processor has nothing to run. With as many busy streams as processors nobody
// looks for up to 10 ms, and small messages take as long. So, while there are small messages, at
// most GOMAXPROCS-1 large moves go on at once, and at least one: whoever waits for a turn leaves
// its processor to look. Without small messages turns would only cost, up to a quarter of the rate.

const (
	smallChunk  = 4 << 10                // less than that is a small message
	sharedChunk = 256 << 10              // the most that is spliced at once while there are any
	bulkChunk   = 16 << 10               // that much or more, and a large move needs a turn
	smallRecent = 100 * time.Millisecond // for so long after one, turns are taken
	smallGrain  = time.Millisecond       // how often the stamp is written, which all processors share
)

var (
	turns     = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))
	lastSmall atomic.Int64 // clock of a small message
)

// epoch is the zero of Clock.
var epoch = time.Now()

// Clock returns the monotonic time since epoch, in nanoseconds.
func Clock() int64 { return int64(time.Since(epoch)) }

// NoteChunk is called when n bytes have moved, in a relay or elsewhere in the process. now is a
// recent Clock.
func NoteChunk(n int, now int64) {
	// Unsigned, so that a stamp from the fake time of a test, which is later, does not stay for
	// ever.
	if n < smallChunk && uint64(now-lastSmall.Load()) > uint64(smallGrain) {
		lastSmall.Store(now)
	}
}

// smallAbout reports whether there are small messages.
func smallAbout(now int64) bool { return uint64(now-lastSmall.Load()) <= uint64(smallRecent) }

// takeTurn waits for a turn if there are small messages. The caller gives back what it has got when
// its move, which must not wait for anything, is done.
func takeTurn() (taken bool) {
	if !smallAbout(Clock()) {
		return false
	}
	turns <- struct{}{}
	return true
}

func giveTurn(taken bool) {
	if taken {
		<-turns
	}
}
