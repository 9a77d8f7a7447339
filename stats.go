package lbproxy

import (
	"iter"
	"time"
)

// Stats is a snapshot of an app's counters and of its open connections. No counter ever falls, even
// when upstreams are removed. Package [github.com/danielepagano/lbproxy/mtlsserver/admin] serves
// Stats as metrics for Prometheus.
type Stats struct {
	App      string
	Stopping bool   // Shutdown or Close was called; it stays true
	Open     int    // connections now, those not yet admitted included
	Accepted uint64 // connections ever: accepted by Serve, or given to ServeConn

	// Accepted is Open plus the sum of Ends, which has every EndReason. The map is the caller's.
	Ends map[EndReason]uint64

	// A connection that was not served is in one of these.
	NotAdmitted uint64 // rejected by admit
	Refused     uint64 // over a rate limit when it opened
	Failed      uint64 // no upstream was available (EndNoUpstream) or reached (EndDialFailed)

	Sent, Received uint64 // bytes to and from upstreams, those of open connections included

	// Upstreams are the current ones in slice order, then those that were removed and still have
	// connections.
	Upstreams []UpstreamStats

	// Gone sums up the upstreams that have left that list: Total, Failed, Sent and Received. The
	// sums over Upstreams and Gone never fall.
	Gone UpstreamStats
}

// UpstreamStats are the counters and the state of an upstream. An upstream that is added again
// after it was removed and its last connection had ended is a new one: its counters begin at 0.
type UpstreamStats struct {
	Addr           string
	Weight         int
	Open           int    // connections now, dials included
	Total          uint64 // connections it was chosen for
	Failed         uint64 // of those: dials that failed by the upstream's fault
	Sent, Received uint64 // bytes to and from it

	State   UpstreamState
	Since   time.Time // when State began
	Err     error     // why it is cooling or down: of the last dial or check; nil if it is up
	Drain   bool      // as configured
	Removed bool      // from the set; it goes when its connections have ended
}

// Stats returns a consistent snapshot: the upstreams never have more connections open than the app.
// It is cheap enough to be called every second; its cost depends on the number of upstreams only.
// It may be called after Shutdown and Close, too.
func (a *LBProxyApp) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Stats{
		App: a.id, Stopping: a.isStopping(), Open: a.open, Accepted: uint64(a.open),
		Ends:        make(map[EndReason]uint64, len(endReasons)),
		NotAdmitted: a.ends[EndNotAdmitted], Refused: a.refused,
		Failed: a.ends[EndNoUpstream] + a.ends[EndDialFailed],
	}
	for _, end := range endReasons {
		s.Ends[end] = a.ends[end]
		s.Accepted += a.ends[end]
	}
	s.Upstreams, s.Gone = a.balancer.snapshot()
	s.Sent, s.Received = s.Gone.Sent, s.Gone.Received
	for i := range s.Upstreams {
		s.Sent += s.Upstreams[i].Sent
		s.Received += s.Upstreams[i].Received
	}
	return s
}

// Conns returns an iterator over the admitted connections, oldest first. One that is open from
// before the call until the iteration ends comes exactly once; one that opens or ends meanwhile may
// come or not. The app goes on meanwhile: it holds no lock while the loop's body runs.
func (a *LBProxyApp) Conns() iter.Seq[*Conn] {
	return func(yield func(*Conn) bool) {
		for s := range a.walk() {
			switch s.conn.Info().State {
			case ConnDialing, ConnOpen:
				if !yield(s.conn) {
					return
				}
			}
		}
	}
}

// walk goes through the sessions that are open when it begins. A marker in the list keeps its
// place, so that the lock is held for a part of the list at a time.
func (a *LBProxyApp) walk() iter.Seq[*session] {
	const most = 1000 // sessions looked at under one lock
	return func(yield func(*session) bool) {
		a.mu.Lock()
		end := a.sessions.PushBack(nil)
		marker := a.sessions.PushFront(nil)
		a.mu.Unlock()
		defer func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.sessions.Remove(end)
			a.sessions.Remove(marker)
		}()
		batch := make([]*session, 0, most)
		for done := false; !done; {
			batch = batch[:0]
			a.mu.Lock()
			for range most {
				e := marker.Next()
				if done = e == end; done {
					break
				}
				a.sessions.MoveAfter(marker, e)
				if s, ok := e.Value.(*session); ok {
					batch = append(batch, s)
				}
			}
			a.mu.Unlock()
			for _, s := range batch {
				if !yield(s) {
					return
				}
			}
		}
	}
}
