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

// A gate bounds the handshakes in progress, those of all apps together.
//
//	wait ──► waiting: silent ──first byte──► waiting: queued ──► inside ──► leave
//	           │ too many wait                 │ too many of      │ too many inside
//	           ▼                               ▼ its address      ▼
//	         the oldest is cut               refused            one of the heaviest is cut
//
// Silent clients cost a socket and a goroutine each. Those who have said something and whose
// address has all its places wait in the order they came. A newcomer is never refused because
// others hold all places: one of those, of the network that holds most, makes way.
type gate struct {
	Handshake // without zeros

	mu       sync.Mutex
	networks map[netip.Prefix]*network // those with visits or misses
	waiting  list.List                 // of *visit without a place, oldest first
	inside   list.List                 // of *visit with a place, oldest first
	misses   []miss                    // oldest first
}

const (
	maxWaiting = 16384
	maxMisses  = 16384
)

// A network is an IPv4 address, or an IPv6 /64 or /48. A visit belongs to the /64 (near), where
// places are counted, and to the /48 (wide), which a single attacker may have whole. Both are the
// same for IPv4.
type network struct {
	prefix netip.Prefix
	refs   int      // visits and misses that have it
	inside int      // visits with a place
	missed int      // handshakes that lost their place or ran out of time lately
	queue  []*visit // of the near network: those whose first byte has come, oldest first
}

// weight is how much n holds. What it lost counts too: a network of which each address opens one
// slow handshake, and again whenever that is cut, must not push out those who are new.
func (n *network) weight() int { return n.inside + n.missed }

// A miss is a handshake that came to nothing after it had a place.
type miss struct {
	near, wide *network
	at         time.Time
}

// A visit is a connection at the gate. Its fields belong to gate.mu.
type visit struct {
	raw        net.Conn
	near, wide *network
	element    *list.Element // of waiting or inside; nil when cut or gone
	placed     bool          // it is or was inside
	ready      chan struct{} // closed when it gets a place, or is cut while it waits for one
	cut        bool          // it made way: its deadline has passed
}

func newGate(h Handshake) *gate { return &gate{Handshake: h, networks: map[netip.Prefix]*network{}} }

// wait begins a visit. Every visit is owed a leave.
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

// enter gets a place for v, which has said something, or says why there is none. It waits while
// v's address has all its places, until ctx ends or the deadline.
func (g *gate) enter(ctx context.Context, v *visit, deadline time.Time) error {
	g.mu.Lock()
	if len(v.near.queue) >= 4*g.MaxPerAddress { // they would not get one soon
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

// verdict returns the error of a visit that was cut.
func (g *gate) verdict(v *visit) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v.cut {
		return &Refusal{Reason: TooManyHandshakes}
	}
	return nil
}

// leave ends v. If it missed its end, by a timeout, that counts against its network for as long as
// a handshake may take. The error is that of a visit that was cut.
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

// promote gives places to those that wait for one of n's, and returns those that must make way.
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

// heaviest returns the oldest visit inside of the network that holds most.
func (g *gate) heaviest() (v *visit) {
	for e := g.inside.Front(); e != nil; e = e.Next() {
		other := e.Value.(*visit)
		if v == nil || cmp.Or(cmp.Compare(other.wide.weight(), v.wide.weight()), cmp.Compare(other.near.weight(), v.near.weight())) > 0 {
			v = other
		}
	}
	return v
}

// drop cuts v out. The caller wakes it without the lock.
func (g *gate) drop(v *visit) {
	v.cut = true
	g.remove(v)
}

// remove takes v out of the list it is in, if any.
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

// count adds n to the places of v's networks.
func (v *visit) count(n int) {
	v.near.inside += n
	if v.wide != v.near {
		v.wide.inside += n
	}
}

// wake makes the goroutine of a visit that was cut notice. It may be called for nil.
func (v *visit) wake() {
	if v == nil {
		return
	}
	v.raw.SetDeadline(time.Unix(1, 0))
	if !v.placed { // nobody else closes it any more
		close(v.ready)
	}
}

func wakeAll(visits []*visit) {
	for _, v := range visits {
		v.wake()
	}
}

// network returns the network of a prefix, and owes it a release.
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

// miss counts a handshake that came to nothing.
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

// forget forgets misses that are as old as a handshake may get, and the oldest of too many.
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

// networksOf returns the networks of an address: itself for IPv4, the /64 and the /48 for IPv6, in
// which a client chooses the rest.
func networksOf(ip netip.Addr) (near, wide netip.Prefix) {
	if ip.Is4() {
		near = netip.PrefixFrom(ip, 32)
		return near, near
	}
	near, _ = ip.Prefix(64) // without a zone
	wide, _ = ip.Prefix(48)
	return near, wide
}
