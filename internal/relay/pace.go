package relay

import "time"

const (
	maxChunk = 1 << 20 // the most that one call of Moved is about
	minChunk = 512
)

// A Pacer decides how much one direction of a relay moves at once and how long it pauses in
// between, so that a throttled stream flows instead of coming in lumps. It is used by the
// goroutine of its direction only.
//
// A Verdict comes after the bytes have moved. Large chunks therefore mean long waits, for this
// direction and for all that share its limit. A limit that knows its rate says how large a chunk
// may be. For one that only says how long to wait, the Pacer looks for a chunk that is worth 20 ms.
type Pacer struct {
	Chunk int // most bytes to move at once; 0: no bound

	// owed is what the direction was told to wait and has not waited. It is negative when timers
	// fired late: then the next wait is shorter. Without this, a stream that comes in small pieces
	// would lose more to late timers than one with large pieces.
	owed time.Duration
}

// Limit returns how many of n bytes may move at once.
func (p *Pacer) Limit(n int) int {
	if p.Chunk > 0 {
		return min(n, p.Chunk)
	}
	return n
}

// Moved takes the answer to n bytes having moved: to wait, and to move at most chunk bytes next (0:
// the Pacer chooses). It returns how long to pause now. Waits of less than a millisecond are added
// up until they are worth a timer.
func (p *Pacer) Moved(n int, wait time.Duration, chunk int) (pause time.Duration) {
	if chunk > 0 {
		p.Chunk = chunk
	} else {
		p.adapt(n, wait)
	}
	const forever = 1 << 62
	p.owed += min(max(wait, 0), forever)
	if p.owed < time.Millisecond {
		return 0
	}
	return p.owed
}

// Paused takes how long the pause that Moved asked for has really been.
func (p *Pacer) Paused(d time.Duration) {
	const mostCredit = 20 * time.Millisecond // a machine that slept owes nothing
	p.owed = max(p.owed-d, -mostCredit)
}

// adapt chooses the chunk by the wait that n bytes led to. Streams that share a limit see the same
// waits. If all scaled their chunks by the same factor, unequal shares would stay unequal for good.
// Halving and adding, as TCP's congestion control does, makes them equal.
func (p *Pacer) adapt(n int, wait time.Duration) {
	const short, step = 20 * time.Millisecond, 4 << 10
	switch {
	case wait > 2*short || wait > short && p.Chunk == 0:
		p.Chunk = int(float64(n) * float64(short) / float64(wait))
	case wait > short:
		p.Chunk /= 2
	case p.Chunk == 0:
		return
	case wait > 0:
		p.Chunk = min(p.Chunk+step, maxChunk)
	default:
		if p.Chunk *= 2; p.Chunk > maxChunk {
			p.Chunk = 0 // nothing holds it
			return
		}
	}
	p.Chunk = max(p.Chunk, minChunk)
}
