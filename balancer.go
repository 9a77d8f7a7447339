package lbproxy

import (
	"container/heap"
	"container/list"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// A balancer chooses the upstream for each connection and counts the connections of each upstream.
//
// The upstreams of the current set are in one heap, ordered by before: the root is the next choice.
// Choosing and counting are one critical section, so concurrent choices see each other. A choice
// costs O(log n), also when most upstreams are full, failed, down or draining: those sink to the
// bottom of the heap.
//
// The phases of an upstream:
//
//	     a dial fails              FailTimeout is over           it is chosen
//	up --------------> cooling ------------------------> ready -------------> onTrial
//	^                  ^     |                            |  ^                 | | |
//	|                  |     +-- a dial works (*) --> up <+  +- tells nothing -+ | |
//	|                  +------------------------- the trial fails ---------------+ |
//	+----------------------------- the trial works (*) ----------------------------+
//
//	any phase -- health checks fail --> down -- health checks pass (*) --> up
//
// At (*) the upstream begins in slow start. cooling and onTrial are last resorts: a connection
// gets them only when no upstream is up or ready. down is never chosen, and no dial ends it.
type balancer struct {
	failTimeout time.Duration // how long a failed upstream cools; not positive: it does not
	checked     bool          // there are health checks, so picks need a lost context
	changes     *changes      // learns of every change; nil: nobody wants to know

	// mu guards what follows and the mutable fields of every upstream. No hook, logger or other
	// foreign code runs under it.
	mu      sync.Mutex
	heap    upstreamHeap         // the current set
	cooling list.List            // the *upstream in phase cooling, the first to be ready in front
	removed map[string]*upstream // no longer in the set, with connections still open
	resting *upstream            // in slow start and chosen last: the next connection skips it
	peers   Peers

	// How many of the set are draining, and how many others are down, for errNone.
	draining, down int

	gone UpstreamStats // see Stats.Gone
}

// set makes confs, which are valid and complete, the current set, and returns its upstreams in the
// order of confs. An upstream is identified by its Addr: one that stays keeps its connections,
// counters and phase; one that comes back while old connections are open keeps those and its
// counters.
func (b *balancer) set(confs []Upstream, now time.Time) []*upstream {
	b.mu.Lock()
	defer b.mu.Unlock()
	isFirst := b.heap == nil // New's caller knows the first set: nobody is told of it
	gone := b.removed
	for _, u := range b.heap {
		gone[u.conf.Addr] = u
	}
	b.removed = map[string]*upstream{}
	b.heap = make(upstreamHeap, len(confs))
	for i := range confs {
		conf := &confs[i]
		u := gone[conf.Addr]
		if u == nil {
			u = &upstream{heapIndex: -1}
		}
		delete(gone, conf.Addr)
		from, isNews := u.phase.state(), u.heapIndex >= 0 && u.conf.Drain != conf.Drain
		if u.heapIndex < 0 {
			u.since, from, isNews = now, "", !isFirst
		}
		u.conf, u.index, u.heapIndex = conf, i, i
		b.heap[i] = u
		if isNews {
			b.tell(u, from, now)
		}
	}
	inOrder := slices.Clone([]*upstream(b.heap))
	for addr, u := range gone {
		if u.heapIndex >= 0 {
			from := u.phase.state()
			b.uncool(u)
			u.phase, u.err, u.slowStart, u.heapIndex = up, nil, false, -1
			if from != StateUp {
				u.since = now
			}
			b.tell(u, from, now)
		}
		if u.open > 0 {
			b.removed[addr] = u
		} else {
			b.retire(u)
		}
	}
	b.arrange()
	return inOrder
}

// setPeers replaces what is known of other apps that use the same upstreams.
func (b *balancer) setPeers(p Peers) {
	p.Bias = maps.Clone(p.Bias)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.peers = p
	b.arrange()
}

// arrange computes what depends on the whole set, and orders the heap. The caller holds b.mu.
func (b *balancer) arrange() {
	b.draining, b.down = 0, 0
	n := len(b.heap)
	first := b.peers.first(n)
	for _, u := range b.heap {
		u.order = (u.index - first + n) % n
		u.bias = b.peers.Bias[u.conf.Addr]
		if u.conf.Drain {
			b.draining++
		} else if u.phase == down {
			b.down++
		}
		u.refresh()
	}
	heap.Init(&b.heap)
}

// fix restores the order of the heap after a change of u. The caller holds b.mu.
func (b *balancer) fix(u *upstream) {
	u.refresh()
	if u.heapIndex >= 0 {
		heap.Fix(&b.heap, u.heapIndex)
	}
}

// A pick is an upstream that acquire chose.
type pick struct {
	u    *upstream
	conf *Upstream       // as it was configured at the choice
	lost context.Context // ends when health checks find u down; nil: there are no checks
}

// A search is one connection's search for an upstream that answers: what it has tried.
// The zero search has tried nothing.
type search struct {
	tried map[*upstream]bool
	rest  []*upstream // after maxExact attempts: the upstreams not looked at yet
}

// maxExact is how many upstreams a connection tries strictly in the order of their loads.
const maxExact = 64

func (s *search) add(u *upstream) {
	if s.tried == nil {
		s.tried = map[*upstream]bool{}
	}
	s.tried[u] = true
}

// acquire chooses the least loaded upstream that s has not tried and counts a connection on it.
// The caller owes one release, and before it one settle when the dial is over. If there is no such
// upstream the error is an ErrNoUpstream that says why.
func (b *balancer) acquire(s *search, now time.Time) (pick, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for e := b.cooling.Front(); e != nil; e = b.cooling.Front() {
		u := e.Value.(*upstream)
		if u.until.After(now) {
			break
		}
		b.uncool(u)
		u.phase = ready
		b.fix(u)
	}
	u := b.choose(s)
	if u == nil || u.rank == never {
		return pick{}, b.errNone(s)
	}
	if u.phase == ready {
		u.phase = onTrial
	}
	u.open++
	u.dialing++
	u.total++
	b.fix(u)
	b.resting = nil
	if u.slowStart {
		if first := b.heap[0]; first == u {
			b.resting = u
		} else if first.phase == up && !first.slowStart {
			u.slowStart = false
		}
	}
	if b.checked && u.lost == nil {
		u.lost, u.lose = context.WithCancelCause(context.Background())
	}
	return pick{u, u.conf, u.lost}, nil
}

// choose returns the upstream for the next connection, which may be of rank never, or nil.
func (b *balancer) choose(s *search) *upstream {
	tried, root := s.tried, b.heap[0]
	switch {
	case root != b.resting && !tried[root]:
		return root
	case len(tried) > maxExact && tried[root]:
		return b.chooseRest(s)
	}
	u := b.least(0, tried, b.resting)
	if u == nil || u.rank != eligible {
		u = b.least(0, tried, nil) // slow start is better than none and than a last resort
	}
	return u
}

// least returns the least upstream of the subtree of b.heap at i that is neither in tried nor skip.
// The root of a subtree is its least, so only where that is excluded do its children matter.
func (b *balancer) least(i int, tried map[*upstream]bool, skip *upstream) *upstream {
	if i >= len(b.heap) {
		return nil
	}
	u := b.heap[i]
	if u != skip && !tried[u] {
		return u
	}
	l, r := b.least(2*i+1, tried, skip), b.least(2*i+2, tried, skip)
	if l == nil || r != nil && r.before(l) {
		return r
	}
	return l
}

// chooseRest is choose for a connection that has tried many upstreams that have not sunk in the
// heap: nothing cools, or the errors were ours. least would walk over all of them each time, which
// added up to a second under the lock for 10,000 upstreams. Here the connection gets a copy of the
// heap, where a parent is never more loaded than its children, and looks at each element once.
func (b *balancer) chooseRest(s *search) *upstream {
	if s.rest == nil {
		s.rest = slices.Clone([]*upstream(b.heap))
	}
	for len(s.rest) > 0 {
		u := s.rest[0]
		s.rest = s.rest[1:]
		if u.heapIndex >= 0 && u.rank != never && !s.tried[u] {
			return u
		}
	}
	return nil
}

// errNone is acquire's error. With nothing tried, an upstream that is neither draining nor down
// must be full.
func (b *balancer) errNone(s *search) error {
	if len(s.tried) > 0 {
		return ErrNoUpstream
	}
	return &noUpstream{full: len(b.heap) - b.draining - b.down, down: b.down, draining: b.draining}
}

// settle records the verdict v of a dial to u, and its error, and reports whether u failed while it
// was up, or works after it had failed.
func (b *balancer) settle(u *upstream, v verdict, err error, now time.Time) (changed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	u.dialing--
	if v == fails {
		u.failed++
	}
	wasUp := u.phase == up
	switch {
	case u.heapIndex < 0 || u.phase == down: // removed or found down while it was dialed
	case v == works && !wasUp:
		b.enter(u, up, nil, now)
		return true
	case v == fails && b.failTimeout > 0:
		b.enter(u, cooling, err, now)
		return wasUp
	case v == unknown && u.phase == onTrial && u.dialing == 0:
		u.phase = ready // no dial is left that could decide: the next connection is the trial
		b.fix(u)
	}
	return false
}

// markDown records that health checks found u, which is in the current set, down because of err. It
// ends the lost context of u's picks. What dials said before is forgotten.
func (b *balancer) markDown(u *upstream, err error, now time.Time) {
	b.mu.Lock()
	if !u.conf.Drain {
		b.down++
	}
	b.enter(u, down, err, now)
	lose := u.lose
	u.lost, u.lose = nil, nil // the next pick, once u is up again, gets a new one
	b.mu.Unlock()
	if lose != nil {
		lose(errUpstreamDown)
	}
}

// markUp records that health checks found u, which was down, up again.
func (b *balancer) markUp(u *upstream, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !u.conf.Drain {
		b.down--
	}
	b.enter(u, up, nil, now)
}

// enter moves u to phase p, which is up, cooling or down, because of err. The caller holds b.mu.
func (b *balancer) enter(u *upstream, p phase, err error, now time.Time) {
	b.uncool(u)
	from := u.phase.state()
	u.phase, u.err, u.slowStart = p, err, p == up
	if p == cooling {
		u.until = now.Add(b.failTimeout)
		u.coolingElem = b.cooling.PushBack(u)
	}
	if p.state() != from {
		u.since = now
		b.tell(u, from, now)
	}
	b.fix(u)
}

// uncool takes u out of the queue of those that cool. The caller holds b.mu.
func (b *balancer) uncool(u *upstream) {
	if u.coolingElem != nil {
		b.cooling.Remove(u.coolingElem)
		u.coolingElem = nil
	}
}

// tell queues the change of u from a state to what it is now. The caller holds b.mu, so that
// changes are queued in the order in which they happen.
func (b *balancer) tell(u *upstream, from UpstreamState, now time.Time) {
	b.changes.add(UpstreamChange{
		Addr: u.conf.Addr, From: from, To: u.phase.state(), Drain: u.conf.Drain,
		Removed: u.heapIndex < 0, Err: u.err, Time: now,
	})
}

// release gives back a connection that acquire counted. It panics if there is none: a release too
// many is a bug in this package, and a count that is too low would hide it.
func (b *balancer) release(u *upstream) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if u.open == 0 {
		panic("lbproxy: upstream " + u.conf.Addr + ": released more often than acquired")
	}
	u.open--
	b.fix(u)
	if u.heapIndex < 0 && u.open == 0 {
		delete(b.removed, u.conf.Addr)
		b.retire(u)
	}
}

// retire keeps the counts of an upstream that is about to be forgotten. The caller holds b.mu.
func (b *balancer) retire(u *upstream) {
	b.gone.Total += u.total
	b.gone.Failed += u.failed
	b.gone.Sent += u.sent.Load()
	b.gone.Received += u.received.Load()
}

// snapshot describes every upstream: the current set in slice order, then the removed ones by Addr,
// and those that are gone together.
func (b *balancer) snapshot() (all []UpstreamStats, gone UpstreamStats) {
	b.mu.Lock()
	defer b.mu.Unlock()
	all = make([]UpstreamStats, len(b.heap), len(b.heap)+len(b.removed))
	for _, u := range b.heap {
		all[u.index] = u.stats()
	}
	for _, u := range b.removed {
		all = append(all, u.stats())
	}
	slices.SortFunc(all[len(b.heap):], func(x, y UpstreamStats) int {
		return strings.Compare(x.Addr, y.Addr)
	})
	return all, b.gone
}
