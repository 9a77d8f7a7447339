package mtlsserver

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// A gate bounds the handshakes in progress, those of all apps together and those from each address. Those beyond wait
// for a place, in the order they came; so many from one address, or in all, that they would not get one soon are refused.
type gate struct {
	Handshake // without zeros

	mu     sync.Mutex
	queues map[netip.Prefix]*queue // one is there while there is somebody in it
}

// A queue is for a number of places. Who waits to send gets one in turn.
type queue struct {
	places chan struct{} // has an element for each that is taken
	asked  int           // those who have a place or wait for one; belongs to gate.mu
}

var everyone netip.Prefix // those of all addresses, who have one in that of theirs

func newGate(h Handshake) *gate { return &gate{Handshake: h, queues: map[netip.Prefix]*queue{}} }

// enter waits for a place for a handshake until ctx ends. Every nil it returns is owed a leave.
func (g *gate) enter(ctx context.Context, from netip.Prefix) error {
	if !g.take(ctx, from, g.MaxPerAddress, 4) {
		return &Refusal{Reason: TooManyFromAddress, Err: context.Cause(ctx)}
	}
	if !g.take(ctx, everyone, g.MaxConcurrent, 1) {
		g.giveBack(from, true)
		return &Refusal{Reason: TooManyHandshakes, Err: context.Cause(ctx)}
	}
	return nil
}

// leave gives a place back.
func (g *gate) leave(from netip.Prefix) {
	g.giveBack(everyone, true)
	g.giveBack(from, true)
}

// take waits for one of so many places in a queue, unless a multiple of that are waiting, or until ctx ends.
func (g *gate) take(ctx context.Context, from netip.Prefix, places, multiple int) bool {
	g.mu.Lock()
	q := g.queues[from]
	if q == nil {
		q = &queue{places: make(chan struct{}, places)}
		g.queues[from] = q
	}
	if q.asked/(1+multiple) >= places {
		g.mu.Unlock()
		return false
	}
	var late <-chan struct{} // nil if there is a place now: that is had whatever the time
	if q.asked >= places {
		late = ctx.Done()
	}
	q.asked++
	g.mu.Unlock()
	select {
	case q.places <- struct{}{}:
		return true
	case <-late:
		g.giveBack(from, false)
		return false
	}
}

// giveBack takes somebody who has a place, or waited for one, out of a queue.
func (g *gate) giveBack(from netip.Prefix, has bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := g.queues[from]
	if has {
		<-q.places
	}
	if q.asked--; q.asked == 0 {
		delete(g.queues, from)
	}
}

// network is what a client has one of: its IPv4 address, or the /64 of an IPv6 one, in which it chooses the rest.
func network(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap()
	if ip.Is4() {
		return netip.PrefixFrom(ip, 32)
	}
	p, _ := ip.Prefix(64) // without a zone
	return p
}
