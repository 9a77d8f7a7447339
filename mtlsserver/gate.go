package mtlsserver

import (
	"cmp"
	"container/list"
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// A gate bounds the handshakes in progress, for all apps together.
//
//	wait ──► waiting: silent ──first byte──► waiting: queued ──► inside ──► leave
//	           │ too many wait                 │ too many of      │ too many inside
//	           ▼                               ▼ its address      ▼
//	         the oldest is cut               refused            one of the heaviest is cut
//
// A silent client costs a socket and a goroutine. A client that has sent something queues while its
// address holds all the places it may have. A full gate never refuses a newcomer: the oldest
// handshake of the network that holds most places makes way for it.
type gate struct {
	Handshake // every field is set

	mu       sync.Mutex
	networks map[netip.Prefix]*network // with visits or misses
	waiting  list.List                 // of *visit without a place, oldest first
	inside   list.List                 // of *visit with a place, oldest first
	misses   []miss                    // oldest first
}

const (
	maxWaiting = 16384
	maxMisses  = 16384
)

// A network is an IPv4 address, or an IPv6 /64 or /48. An IPv6 visit belongs to a /64 (near), which
// MaxPerAddress is for, and to a /48 (wide), all of which a single attacker may own. For IPv4 both
// are the address.
type network struct {
	prefix netip.Prefix
	refs   int      // from visits and misses
	inside int      // visits with a place
	missed int      // recent handshakes that lost their place or ran out of time
	queue  []*visit // near networks only: visits that have sent a byte, oldest first
}

// weight returns the number of places that n holds or has recently lost. Lost places count because
// each address of a network may open one slow handshake, and another when that is cut. Otherwise
// such a network would weigh little and push newcomers out.
func (n *network) weight() int { return n.inside + n.missed }

// A miss is a handshake that had a place and failed to finish.
type miss struct {
	near, wide *network
	at         time.Time
}

// A visit is a connection at the gate. gate.mu guards its fields.
type visit struct {
	raw        net.Conn
	near, wide *network
	element    *list.Element // of waiting or inside; nil when cut or gone
	placed     bool          // it is or was inside
	ready      chan struct{} // closed when it gets a place, or is cut while it waits for one
	cut        bool          // it made way for another visit
}

func newGate(h Handshake) *gate {
	return &gate{Handshake: h, networks: map[netip.Prefix]*network{}}
}

// wait begins a visit, which the caller must end by leave.
func (g *gate) wait(raw net.Conn, from netip.Addr) *visit {
	near, wide := networksOf(from)
	v := &visit{raw: raw, ready: make(chan struct{})}
	g.mu.Lock()
	g.forget(time.Now())
	v.near, v.wide = g.network(near), g.network(wide)
	v.element = g.waiting.PushBack(v)
	var oldest *visit
	if g.waiting.Len() > maxWaiting {
		oldest = g.waiting.Front().Value.(*visit)
		g.drop(oldest)
	}
	g.mu.Unlock()
	oldest.wake()
	return v
}

// enter gets a place for v, which has sent its first byte. It waits while v's address holds all its
// places, until ctx or the deadline ends. The error is the Refusal for v.
func (g *gate) enter(ctx context.Context, v *visit, deadline time.Time) error {
	g.mu.Lock()
	if len(v.near.queue) >= 4*g.MaxPerAddress { // too long a queue to reach a place in time
		g.mu.Unlock()
		return &Refusal{Reason: TooManyFromAddress}
	}
	var losers []*visit
	if !v.cut {
		v.near.queue = append(v.near.queue, v)
		losers = g.promote(v.near)
	}
	g.mu.Unlock()
	wakeAll(losers)
	select {
	case <-v.ready:
		return g.verdict(v)
	default:
	}
	late := time.NewTimer(time.Until(deadline))
	defer late.Stop()
	select {
	case <-v.ready:
		return g.verdict(v)
	case <-late.C:
		return &Refusal{Reason: TooManyFromAddress, Err: os.ErrDeadlineExceeded}
	case <-ctx.Done():
		return &Refusal{Reason: TooManyFromAddress, Err: context.Cause(ctx)}
	}
}

// verdict returns a Refusal if v was cut, else nil.
func (g *gate) verdict(v *visit) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v.cut {
		return &Refusal{Reason: TooManyHandshakes}
	}
	return nil
}

// leave ends v and returns its verdict. A visit that has timed out (missed) counts against its
// networks for g.Timeout.
func (g *gate) leave(v *visit, missed bool) error {
	g.mu.Lock()
	if missed && v.placed && !v.cut {
		g.miss(v)
	}
	g.remove(v)
	var losers []*visit
	if !v.cut || g.inside.Len() < g.MaxConcurrent {
		losers = g.promote(v.near)
	}
	g.release(v.near)
	g.release(v.wide)
	g.mu.Unlock()
	wakeAll(losers)
	return g.verdict(v)
}

// promote gives places to the queue of n as far as MaxPerAddress allows. It returns the visits that
// are cut for that; the caller wakes them without the lock.
func (g *gate) promote(n *network) (losers []*visit) {
	for len(n.queue) > 0 && n.inside < g.MaxPerAddress {
		v := n.queue[0]
		g.remove(v)
		v.placed = true
		v.element = g.inside.PushBack(v)
		v.count(1)
		if g.inside.Len() > g.MaxConcurrent {
			loser := g.heaviest()
			g.miss(loser)
			g.drop(loser)
			losers = append(losers, loser)
		}
		close(v.ready) // v may be the loser
	}
	return losers
}

// heaviest returns the oldest visit with a place in the heaviest /64 of the heaviest /48.
func (g *gate) heaviest() (v *visit) {
	for e := g.inside.Front(); e != nil; e = e.Next() {
		other := e.Value.(*visit)
		if v == nil || other.heavier(v) {
			v = other
		}
	}
	return v
}

func (v *visit) heavier(than *visit) bool {
	return cmp.Or(
		cmp.Compare(v.wide.weight(), than.wide.weight()),
		cmp.Compare(v.near.weight(), than.near.weight()),
	) > 0
}

// drop cuts v. The caller wakes it after it has released the lock.
func (g *gate) drop(v *visit) {
	v.cut = true
	g.remove(v)
}

// remove removes v from waiting, its queue or inside.
func (g *gate) remove(v *visit) {
	switch {
	case v.element == nil:
		return
	case v.placed:
		g.inside.Remove(v.element)
		v.count(-1)
	default:
		g.waiting.Remove(v.element)
		if i := slices.Index(v.near.queue, v); i >= 0 {
			v.near.queue = slices.Delete(v.near.queue, i, i+1)
		}
	}
	v.element = nil
}

// count adds n to the number of places that v's networks hold.
func (v *visit) count(n int) {
	v.near.inside += n
	if v.wide != v.near {
		v.wide.inside += n
	}
}

// wake interrupts the goroutine of a visit that was cut. A nil v is ignored.
func (v *visit) wake() {
	if v == nil {
		return
	}
	v.raw.SetDeadline(time.Unix(1, 0))
	if !v.placed { // otherwise promote has closed it
		close(v.ready)
	}
}

func wakeAll(visits []*visit) {
	for _, v := range visits {
		v.wake()
	}
}

// network returns the network of a prefix and counts a reference, which release drops.
func (g *gate) network(p netip.Prefix) *network {
	n := g.networks[p]
	if n == nil {
		n = &network{prefix: p}
		g.networks[p] = n
	}
	n.refs++
	return n
}

func (g *gate) release(n *network) {
	if n.refs--; n.refs == 0 {
		delete(g.networks, n.prefix)
	}
}

// miss counts v against its networks until forget drops it.
func (g *gate) miss(v *visit) {
	g.misses = append(g.misses, miss{v.near, v.wide, time.Now()})
	for _, n := range []*network{v.near, v.wide} {
		n.refs++
	}
	v.near.missed++
	if v.wide != v.near {
		v.wide.missed++
	}
}

// forget drops misses older than g.Timeout, and the oldest ones if there are more than maxMisses.
func (g *gate) forget(now time.Time) {
	for len(g.misses) > 0 && (len(g.misses) > maxMisses || now.Sub(g.misses[0].at) > g.Timeout) {
		m := g.misses[0]
		g.misses = g.misses[1:]
		m.near.missed--
		if m.wide != m.near {
			m.wide.missed--
		}
		g.release(m.near)
		g.release(m.wide)
	}
}

// addrOf returns the IP address of a; the zero Addr if it has none.
func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// networksOf returns the networks of an address: the address itself for IPv4, its /64 and /48 for
// IPv6, where a client may choose the other bits.
func networksOf(ip netip.Addr) (near, wide netip.Prefix) {
	if ip.Is4() {
		near = netip.PrefixFrom(ip, 32)
		return near, near
	}
	near, _ = ip.Prefix(64) // without a zone
	wide, _ = ip.Prefix(48)
	return near, wide
}
