package relay

import "time"

const (
	maxChunk = 1 << 20 // the most bytes that one call of Moved reports
	minChunk = 512
)

// A Pacer decides how many bytes one direction of a relay moves at once and how long it pauses in
// between, so that a throttled stream flows instead of coming in lumps. Only the goroutine of its
// direction may use it.
//
// A Verdict comes after the bytes have moved. Large chunks therefore mean long waits, for this
// direction and for all that share its limit. A limit that knows its rate bounds the chunk itself.
// For a limit that only returns a wait, the Pacer adapts the chunk until it is worth 20 ms.
type Pacer struct {
	Chunk int // most bytes to move at once; 0: no bound

	// owed is the wait that the direction still owes. It is negative when timers fired late, and
	// then shortens the next wait. Otherwise a stream in small pieces would lose more to late
	// timers than one in large pieces.
	owed time.Duration
}

// Limit returns the number of bytes, at most n, that may move at once.
func (p *Pacer) Limit(n int) int {
	if p.Chunk > 0 {
		return min(n, p.Chunk)
	}
	return n
}

// Moved takes the Verdict about n bytes that have moved: the wait, and the next chunk (0: the Pacer
// chooses it). It returns the pause to make now. It adds up waits of less than a millisecond until
// they are worth a timer.
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

// Paused takes the real length of the pause that Moved has returned.
func (p *Pacer) Paused(d time.Duration) {
	const mostCredit = 20 * time.Millisecond // a machine that slept owes nothing
	p.owed = max(p.owed-d, -mostCredit)
}

// adapt chooses the next chunk by the wait for n bytes. Streams that share a limit see the same
// waits. If each scaled its chunk by the same factor, unequal shares would stay unequal. Halving
// and adding, as TCP's congestion control does, makes them equal.
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
			p.Chunk = 0 // no limit is in the way
			return
		}
	}
	p.Chunk = max(p.Chunk, minChunk)
}
