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
// address holds all the places it may have. When all places are taken, a newcomer replaces the
// heaviest handshake, unless that is its own: see loser.
type gate struct {
	Handshake // every field is set

	mu         sync.Mutex
	networks   map[netip.Prefix]*network // with visits, or remembered
	waiting    list.List                 // of *visit without a place, oldest first
	inside     list.List                 // of *visit with a place, oldest first
	remembered map[standing]*list.List   // of *network known or failed, by their last rating, oldest first
}

const (
	maxWaiting    = 16384
	maxRemembered = 16384 // networks of each standing

	// A turn is how long a handshake keeps its place against others of equal weight and standing.
	// It suffices for two round trips of 200 ms.
	turn = 500 * time.Millisecond
)

// A standing is what a gate remembers of a network, best first.
type standing int

const (
	known   standing = iota - 1 // a client has finished its handshake
	unknown                     // the zero value
	failed                      // a client has not, within the last Timeout
)

// A network is an IPv4 address, or an IPv6 /64 or /48. An IPv6 visit belongs to a /64 (near), which
// MaxPerAddress is for, and to a /48 (wide), all of which a single attacker may own. For IPv4 both
// are the address.
type network struct {
	prefix   netip.Prefix
	visits   int
	inside   int           // visits with a place
	standing standing      // as rated last
	rated    time.Time     // when
	element  *list.Element // of remembered, unless n is unknown
	queue    []*visit      // near networks only: visits that have sent a byte, oldest first
}

// A visit is a connection at the gate. gate.mu guards its fields.
type visit struct {
	raw        net.Conn
	near, wide *network
	element    *list.Element // of waiting or inside; nil when cut or gone
	placed     time.Time     // when it got a place; zero if it never had one
	ready      chan struct{} // closed when it gets a place, or is cut while it waits for one
	cut        bool          // it made way for another visit
}

func newGate(h Handshake) *gate {
	return &gate{Handshake: h, networks: map[netip.Prefix]*network{},
		remembered: map[standing]*list.List{known: list.New(), failed: list.New()}}
}

// wait begins a visit, which the caller must end by leave.
func (g *gate) wait(raw net.Conn, from netip.Addr) *visit {
	near, wide := networksOf(from)
	v := &visit{raw: raw, ready: make(chan struct{})}
	g.mu.Lock()
	g.forget(time.Now())
	v.near, v.wide = g.network(near), g.network(wide)
	v.element = g.waiting.PushBack(v)
	var losers []*visit
	if g.waiting.Len() > maxWaiting {
		losers = append(losers, g.waiting.Front().Value.(*visit))
		g.drop(losers[0])
	}
	g.mu.Unlock()
	wake(losers)
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
	wake(losers)
	select {
	case <-v.ready: // even if the deadline has passed: the handshake will report that
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

// leave ends v and returns its verdict. If v still has a place, whether its handshake has finished
// decides the standing of its networks.
func (g *gate) leave(v *visit, finished bool) error {
	g.mu.Lock()
	if !v.placed.IsZero() && !v.cut {
		if finished {
			g.rate(v.near, known)
			g.rate(v.wide, known)
		} else {
			g.fail(v)
		}
	}
	g.remove(v)
	var losers []*visit
	if !v.cut || g.inside.Len() < g.MaxConcurrent {
		losers = g.promote(v.near)
	}
	g.release(v.near)
	g.release(v.wide)
	g.mu.Unlock()
	wake(losers)
	return g.verdict(v)
}

// promote gives places to the queue of n as far as MaxPerAddress allows. It returns the visits that
// are cut for that; the caller wakes them without the lock.
func (g *gate) promote(n *network) (losers []*visit) {
	for len(n.queue) > 0 && n.inside < g.MaxPerAddress {
		v := n.queue[0]
		g.remove(v)
		v.placed = time.Now()
		v.element = g.inside.PushBack(v)
		v.count(1)
		if g.inside.Len() > g.MaxConcurrent {
			loser := g.loser(v.placed)
			if loser.hadTurn(v.placed) {
				g.fail(loser)
			}
			g.drop(loser)
			losers = append(losers, loser)
		}
		close(v.ready) // v may be the loser
	}
	return losers
}

// loser returns the visit that makes way when too many are inside. It is one of the heaviest: the
// oldest of these if it has had its turn, else the newest. If it were always the oldest, many
// newcomers at once would push each other out before any handshake could finish.
func (g *gate) loser(now time.Time) *visit {
	var oldest, newest *visit
	for e := g.inside.Front(); e != nil; e = e.Next() {
		v, order := e.Value.(*visit), 1
		if oldest != nil {
			order = g.compare(v, oldest)
		}
		if order > 0 {
			oldest = v
		}
		if order >= 0 {
			newest = v
		}
	}
	if oldest.hadTurn(now) {
		return oldest
	}
	return newest
}

func (v *visit) hadTurn(now time.Time) bool { return now.Sub(v.placed) >= turn }

// compare compares the weights of two visits: of their wide networks first, then of the near ones.
// Between equal weights, the network with the worse standing is the heavier one.
func (g *gate) compare(v, w *visit) int {
	return cmp.Or(
		cmp.Compare(g.weight(v.wide), g.weight(w.wide)),
		cmp.Compare(v.wide.standing, w.wide.standing),
		cmp.Compare(g.weight(v.near), g.weight(w.near)),
		cmp.Compare(v.near.standing, w.near.standing),
	)
}

// weight returns the number of places that n holds. A failed network weighs more than any other,
// because each address of an attacker may open one slow handshake, and another when that is cut.
func (g *gate) weight(n *network) int {
	if n.standing == failed {
		return n.inside + g.MaxConcurrent
	}
	return n.inside
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
	case !v.placed.IsZero():
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

// wake interrupts the goroutines of visits that were cut.
func wake(visits []*visit) {
	for _, v := range visits {
		v.raw.SetDeadline(time.Unix(1, 0))
		if v.placed.IsZero() { // otherwise promote has closed it
			close(v.ready)
		}
	}
}

// network returns the network of a prefix and counts a visit, which release counts out.
func (g *gate) network(p netip.Prefix) *network {
	n := g.networks[p]
	if n == nil {
		n = &network{prefix: p}
		g.networks[p] = n
	}
	n.visits++
	return n
}

func (g *gate) release(n *network) {
	n.visits--
	g.forgetUnused(n)
}

func (g *gate) forgetUnused(n *network) {
	if n.visits == 0 && n.standing == unknown {
		delete(g.networks, n.prefix)
	}
}

// fail notes that v's client has not finished its handshake. Callers do not count a visit that was
// cut before its turn was over. Otherwise an unlucky client that tries again at once would fail
// more often than any attacker, and could not get in for as long as an attack lasts.
func (g *gate) fail(v *visit) {
	for _, n := range []*network{v.near, v.wide} {
		if n.standing != known {
			g.rate(n, failed)
		}
	}
}

// rate sets the standing of n.
func (g *gate) rate(n *network, s standing) {
	if n.standing != unknown {
		g.remembered[n.standing].Remove(n.element)
	}
	n.standing, n.rated = s, time.Now()
	if s == unknown {
		g.forgetUnused(n)
		return
	}
	l := g.remembered[s]
	n.element = l.PushBack(n)
	if l.Len() > maxRemembered {
		g.rate(l.Front().Value.(*network), unknown)
	}
}

// forget forgets failures older than g.Timeout.
func (g *gate) forget(now time.Time) {
	l := g.remembered[failed]
	for e := l.Front(); e != nil; e = l.Front() {
		n := e.Value.(*network)
		if now.Sub(n.rated) <= g.Timeout {
			return
		}
		g.rate(n, unknown)
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
