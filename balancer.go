package lbproxy

import (
	"container/heap"
	"container/list"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A balancer decides which upstream gets the next connection, and which are passed over.
//
// All upstreams of the current set stand in one heap, the next to be chosen first (see before). Choosing
// and counting are one critical section, so concurrent picks see each other, and the cost of a choice
// grows with the logarithm of the number of upstreams.
type balancer struct {
	failTimeout time.Duration // how long a failed upstream is passed over; not positive means not at all

	mu       sync.Mutex
	heap     upstreamHeap         // the current set
	cooling  list.List            // of *upstream: those in state cooling, the first to recover in front
	draining map[string]*upstream // removed from the set, with connections still open
	paced    *upstream            // took the last pick while catching up: not eligible for the next one
}

// An upstream is one server as the balancer sees it. Its mutable fields belong to balancer.mu.
type upstream struct {
	conf  *Upstream // as configured; replaced whole, never changed
	place int       // in the configured slice: decides ties
	at    int       // in the heap; -1 when removed from the set

	open     int // connections counted on it, dials included
	dialling int // of those: not settled
	state    upstreamState
	until    time.Time     // cooling: when the next trial is due
	queued   *list.Element // cooling: its place in balancer.cooling

	// catchingUp is set when a trial or health checks find it working again, until another upstream is as little
	// loaded that is not itself catching up or due for a trial: meanwhile it gets at most every second connection, so
	// that recovery is not a stampede.
	catchingUp bool

	total, failed  uint64
	sent, received atomic.Uint64
}

type upstreamState uint8

const (
	up      upstreamState = iota
	cooling               // a dial failed: passed over until its time is up
	ready                 // its time is up: the next connection to choose it is the trial
	onTrial               // that connection is dialling: passed over until a dial tells how it is
	down                  // health checks say so: not used until they say otherwise, whatever dials tell
)

// rank sorts upstreams by whether they may be chosen: at best now, only as a last resort, or not at all.
func (u *upstream) rank() rank {
	if u.conf.MaxConns > 0 && u.open >= u.conf.MaxConns {
		return never
	}
	switch u.state {
	case up, ready:
		return eligible
	case down:
		return never
	}
	return lastResort
}

type rank uint8

const (
	eligible rank = iota
	lastResort
	never
)

// before orders the heap: by rank, then by load, which is (open+1)/weight, then by place in the slice.
// Among the passed over, the one that failed longest ago comes first: it is the likeliest to be back, and
// those that a connection has just tried are out of its way.
func (u *upstream) before(v *upstream) bool {
	ru, rv := u.rank(), v.rank()
	if ru != rv {
		return ru < rv
	}
	if ru == lastResort && !u.until.Equal(v.until) {
		return u.until.Before(v.until)
	}
	lu, lv := int64(u.open+1)*int64(v.conf.Weight), int64(v.open+1)*int64(u.conf.Weight)
	if lu != lv {
		return lu < lv
	}
	return u.place < v.place
}

// set makes confs, which are valid and complete, the current set. An upstream is known by its Addr: one that
// was there keeps its connections, counters and state, one that is still draining its connections and counters.
// It returns the upstreams in the order of confs.
func (b *balancer) set(confs []Upstream) []*upstream {
	b.mu.Lock()
	defer b.mu.Unlock()
	known := b.draining
	for _, u := range b.heap {
		known[u.conf.Addr] = u
	}
	b.draining = map[string]*upstream{}
	b.heap = make(upstreamHeap, len(confs))
	for i := range confs {
		u := known[confs[i].Addr]
		if u == nil {
			u = new(upstream)
		}
		delete(known, confs[i].Addr)
		u.conf, u.place, u.at = &confs[i], i, i
		b.heap[i] = u
	}
	inOrder := slices.Clone([]*upstream(b.heap))
	heap.Init(&b.heap)
	for addr, u := range known {
		u.at = -1
		b.recovered(u)
		if u.open > 0 {
			b.draining[addr] = u
		}
	}
	return inOrder
}

// acquire chooses the least loaded upstream that is not in tried and counts a connection on it. It returns
// nil if there is none. The caller owes one release, and one settle when it has dialled.
func (b *balancer) acquire(tried map[*upstream]bool, now time.Time) (*upstream, *Upstream) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for e := b.cooling.Front(); e != nil; e = b.cooling.Front() {
		u := e.Value.(*upstream)
		if u.until.After(now) {
			break
		}
		b.cooling.Remove(e)
		u.queued, u.state = nil, ready
		heap.Fix(&b.heap, u.at)
	}
	u := b.best(0, tried, b.paced)
	if u == nil || u.rank() != eligible {
		u = b.best(0, tried, nil) // better the paced one than none, or one that is passed over
	}
	if u == nil || u.rank() == never {
		return nil, nil
	}
	if u.state == ready {
		u.state = onTrial
	}
	u.open++
	u.dialling++
	u.total++
	heap.Fix(&b.heap, u.at)
	b.paced = nil
	if u.catchingUp {
		if first := b.heap[0]; first == u {
			b.paced = u
		} else if first.state == up && !first.catchingUp {
			u.catchingUp = false
		}
	}
	return u, u.conf
}

// best returns the first upstream in the heap below place i that is neither in tried nor skip. The first of a
// heap is its root, so only where the root is passed over do its children have to be asked.
func (b *balancer) best(i int, tried map[*upstream]bool, skip *upstream) *upstream {
	if i >= len(b.heap) {
		return nil
	}
	u := b.heap[i]
	if u != skip && !tried[u] {
		return u
	}
	l, r := b.best(2*i+1, tried, skip), b.best(2*i+2, tried, skip)
	if l == nil || r != nil && r.before(l) {
		return r
	}
	return l
}

// A verdict is what a dial says about an upstream.
type verdict uint8

const (
	unknown verdict = iota // the dial failed for a reason that is ours
	works
	fails
)

// settle takes note of how a dial to u went and reports whether that changed u's standing:
// a working one is now passed over, or one that was passed over now works.
func (b *balancer) settle(u *upstream, v verdict, now time.Time) (changed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := u.state
	u.dialling--
	if v == fails {
		u.failed++
	}
	switch {
	case u.at < 0 || u.state == down:
		return false // removed or found down meanwhile
	case v == works && was != up:
		b.recovered(u)
		u.catchingUp = true
		changed = true
	case v == fails && b.failTimeout > 0:
		b.recovered(u)
		u.state, u.until, u.catchingUp = cooling, now.Add(b.failTimeout), false
		u.queued = b.cooling.PushBack(u)
		changed = was == up
	case v == unknown && was == onTrial && u.dialling == 0:
		u.state = ready // no dial is left that could tell: the next connection is a trial
	default:
		return false
	}
	heap.Fix(&b.heap, u.at)
	return changed
}

// mark takes note that health checks found u, which is in the current set, down, or up after it was down. Either
// way what dials told before is forgotten.
func (b *balancer) mark(u *upstream, isDown bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.recovered(u)
	u.catchingUp = !isDown
	if isDown {
		u.state = down
	}
	heap.Fix(&b.heap, u.at)
}

// recovered makes u an upstream like any other again. The caller holds b.mu and mends the heap.
func (b *balancer) recovered(u *upstream) {
	u.state = up
	if u.queued != nil {
		b.cooling.Remove(u.queued)
		u.queued = nil
	}
}

// release gives back a connection that acquire counted. One release too many is a bug in this package.
func (b *balancer) release(u *upstream) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if u.open == 0 {
		panic("lbproxy: upstream " + u.conf.Addr + ": released more often than acquired")
	}
	u.open--
	if u.at >= 0 {
		heap.Fix(&b.heap, u.at)
	} else if u.open == 0 {
		delete(b.draining, u.conf.Addr)
	}
}

// stats describes every upstream: the current set in slice order, then the draining ones.
func (b *balancer) stats() []UpstreamStats {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]UpstreamStats, len(b.heap), len(b.heap)+len(b.draining))
	for _, u := range b.heap {
		all[u.place] = u.stats()
	}
	for _, u := range b.draining {
		all = append(all, u.stats())
	}
	slices.SortFunc(all[len(b.heap):], func(x, y UpstreamStats) int { return strings.Compare(x.Addr, y.Addr) })
	return all
}

func (u *upstream) stats() UpstreamStats {
	s := UpstreamStats{
		Addr: u.conf.Addr, Weight: u.conf.Weight, Open: u.open, Total: u.total, Failed: u.failed,
		State: "up", Sent: u.sent.Load(), Received: u.received.Load(),
	}
	switch {
	case u.at < 0:
		s.State = "draining"
	case u.state == down:
		s.State = "down"
	case u.state != up:
		s.State = "cooling"
	}
	return s
}

// upstreamHeap implements heap.Interface; nothing is pushed or popped, only mended.
type upstreamHeap []*upstream

func (h upstreamHeap) Len() int           { return len(h) }
func (h upstreamHeap) Less(i, j int) bool { return h[i].before(h[j]) }
func (h upstreamHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i]; h[i].at, h[j].at = i, j }
func (h upstreamHeap) Push(any)           { panic("unused") }
func (h upstreamHeap) Pop() any           { panic("unused") }
