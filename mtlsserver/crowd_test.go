package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy"
)

// These tests check the decisions of a gate one by one, without connections and with a stopped
// clock. They run in a bubble of package synctest.

// A comer is a client at a gate.
type comer struct {
	net.Conn // nil: a gate calls SetDeadline only
	*visit
	g       *gate
	cancel  func()
	woken   bool       // the gate has interrupted it
	entered chan error // what enter returned
	in      bool       // enter has returned
	err     error      // of enter
}

func (c *comer) SetDeadline(t time.Time) error {
	c.woken = t.Before(time.Now())
	return nil
}

// silent makes a client come to g without sending anything.
func (g *gate) silent(ip string) *comer {
	c := &comer{g: g, cancel: func() {}, entered: make(chan error, 1)}
	c.visit = g.wait(c, netip.MustParseAddr(ip))
	return c
}

// come makes a client come to g and send its first byte.
func (g *gate) come(ip string) *comer { return g.silent(ip).speak() }

func (c *comer) speak() *comer {
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go func() { c.entered <- c.g.enter(ctx, c.visit, time.Now().Add(c.g.Timeout)) }()
	synctest.Wait()
	return c
}

// leave ends a visit and returns the gate's verdict.
func (c *comer) leave(missed bool) error {
	err := c.g.leave(c.visit, missed)
	synctest.Wait()
	c.cancel()
	return err
}

// want fails unless the clients have these states: "in", "waiting", "cut" or "refused".
func want(t *testing.T, states string, clients ...*comer) {
	t.Helper()
	var got []string
	for _, c := range clients {
		select {
		case c.err = <-c.entered:
			c.in = true
		default:
		}
		refusal, _ := errors.AsType[*Refusal](c.g.verdict(c.visit))
		late, _ := errors.AsType[*Refusal](c.err)
		switch {
		case refusal != nil && refusal.Reason == TooManyHandshakes && c.woken:
			got = append(got, "cut")
		case late != nil && late.Reason == TooManyFromAddress && !c.woken:
			got = append(got, "refused")
		case refusal == nil && late == nil && c.in && !c.woken:
			got = append(got, "in")
		case refusal == nil && !c.in && !c.woken:
			got = append(got, "waiting")
		default:
			t.Errorf("verdict %v, error %v, woken: %t", refusal, c.err, c.woken)
		}
	}
	if got := strings.Join(got, " "); got != states {
		t.Errorf("the clients are\n%s, want\n%s", got, states)
	}
}

// empty fails unless g has forgotten everything a while after its visits have ended.
func (g *gate) empty(t *testing.T) {
	t.Helper()
	g.forget(time.Now().Add(g.Timeout + 1))
	if len(g.networks)+len(g.misses)+g.waiting.Len()+g.inside.Len() != 0 {
		t.Errorf("networks %v, misses %v, %d waiting, %d inside: want none", g.networks, g.misses,
			g.waiting.Len(), g.inside.Len())
	}
}

func leave(clients ...*comer) {
	for _, c := range clients {
		c.leave(false)
	}
}

func TestFullGateCutsTheOldestOfTheHeaviestAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 4, MaxPerAddress: 2})
		a := g.come("192.0.2.1")
		b1, b2 := g.come("192.0.2.2"), g.come("192.0.2.2")
		c := g.come("192.0.2.3")
		want(t, "in in in in", a, b1, b2, c)
		d := g.come("192.0.2.4")
		want(t, "in cut in in in", a, b1, b2, c, d)
		e := g.come("192.0.2.5") // the cut one still weighs
		want(t, "in cut cut in in in", a, b1, b2, c, d, e)
		f := g.come("192.0.2.2") // its misses make the newcomer itself the heaviest
		want(t, "in in in in cut", a, c, d, e, f)
		time.Sleep(g.Timeout + 1)
		h := g.come("192.0.2.2") // after a while they count no more
		want(t, "cut in in in in", a, c, d, e, h)
		i := g.come("192.0.2.2")
		want(t, "in in in cut in", c, d, e, h, i)
		if err := b1.leave(true); err == nil {
			t.Error("the cut handshake has a good end")
		}
		leave(a, b2, c, d, e, f, h, i)
		g.empty(t)
	})
}

// Of IPv6 the heaviest /48 counts first, and in it the heaviest /64.
func TestFullGateCutsInTheHeaviestNetworkOfTheHeaviestSite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 6, MaxPerAddress: 2})
		a1, a2 := g.come("2001:db8:a::1"), g.come("2001:db8:a::2")
		b1 := g.come("2001:db8:b:1::1")
		b2, b3 := g.come("2001:db8:b:2::1"), g.come("2001:db8:b:2::2")
		c := g.come("192.0.2.1")
		d := g.come("192.0.2.2")
		want(t, "in in in cut in in in", a1, a2, b1, b2, b3, c, d)
		// The /64s of b2 and b3, and of a1 and a2, weigh two each: the /48 decides.
		e := g.come("192.0.2.3")
		want(t, "in in in cut in in in", a1, a2, b1, b3, c, d, e)
		time.Sleep(g.Timeout + 1)
		f := g.come("192.0.2.4")
		want(t, "cut in in in in in in", a1, a2, b1, c, d, e, f)
		leave(a1, a2, b1, b2, b3, c, d, e, f)
		g.empty(t)
	})
}

func TestHandshakeThatRanOutOfTimeWeighs(t *testing.T) {
	for missed, states := range map[bool]string{true: "in cut in", false: "cut in in"} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 2, MaxPerAddress: 2})
			leave(g.silent("192.0.2.1")) // it never had a place
			g.silent("192.0.2.1").leave(missed)
			a := g.come("192.0.2.1")
			g.come("192.0.2.2").leave(missed)
			b := g.come("192.0.2.2")
			c := g.come("192.0.2.3")
			want(t, states, a, b, c)
			leave(a, b, c)
			g.empty(t)
		})
	}
}

// An address has its places and a queue of four times as many.
func TestQueueOfAnAddressIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 100, MaxPerAddress: 2})
		var all []*comer
		for range 2 + 8 + 1 {
			all = append(all, g.come("192.0.2.1"))
		}
		want(t, "in in"+strings.Repeat(" waiting", 8)+" refused", all...)
		other := g.come("192.0.2.2")
		leave(all[0])
		want(t, "in in waiting in", all[1], all[2], all[3], other)
		leave(all[4]) // from the middle of the queue
		leave(all[1])
		want(t, "in in waiting", all[2], all[3], all[5])
		all[5].cancel()
		synctest.Wait()
		want(t, "refused waiting", all[5], all[6])
		leave(all[5])
		time.Sleep(g.Timeout)
		synctest.Wait()
		want(t, "refused", all[6])
		if !errors.Is(all[6].err, os.ErrDeadlineExceeded) {
			t.Errorf("error %v, want one of a deadline", all[6].err)
		}
		leave(all[2], all[3], other)
		leave(all[6:]...)
		g.empty(t)
	})
}

// A cut handshake has given its place to another one, so its end admits nobody unless a place is
// free.
func TestCutHandshakeLeavesNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 3, MaxPerAddress: 2})
		a := g.come("192.0.2.1")
		b1, b2, b3 := g.come("192.0.2.2"), g.come("192.0.2.2"), g.come("192.0.2.2")
		want(t, "in in in waiting", a, b1, b2, b3)
		c := g.come("192.0.2.3")
		want(t, "in cut in waiting in", a, b1, b2, b3, c)
		leave(b1)
		want(t, "in in waiting in", a, b2, b3, c)
		d := g.come("192.0.2.4")
		want(t, "in cut waiting in in", a, b2, b3, c, d)
		leave(c)
		want(t, "in waiting in", a, b3, d)
		leave(b2)
		want(t, "in in in", a, b3, d)
		leave(a, b3, d)
		g.empty(t)
	})
}

func TestOldestSilentClientMakesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 1, MaxPerAddress: 1})
		all := []*comer{g.silent("192.0.2.1"), g.silent("192.0.2.1")}
		for len(all) < maxWaiting {
			all = append(all, g.silent("192.0.2.2"))
		}
		want(t, "waiting waiting", all[0], all[1])
		newcomer := g.silent("192.0.2.3")
		want(t, "cut waiting waiting", all[0], all[1], newcomer)
		want(t, "cut", all[0].speak()) // its byte came too late
		leave(append(all, newcomer)...)
		g.empty(t)
	})
}

func TestMissesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 1, MaxPerAddress: 1})
		for range maxMisses + 1 {
			g.come("192.0.2.1").leave(true)
		}
		c := g.come("192.0.2.2")
		if n := len(g.misses); n != maxMisses {
			t.Errorf("the gate remembers %d misses, want %d", n, maxMisses)
		}
		leave(c)
		g.empty(t)
	})
}

// A deaf connection ignores deadlines, as if they came too late.
type deaf struct{ net.Conn }

func (deaf) SetDeadline(time.Time) error { return nil }

// A handshake that was cut is refused even if its last byte came before the gate could end it.
func TestHandshakeThatWasCutIsRefused(t *testing.T) {
	l := newLab(t, nil)
	pair, err := tls.LoadX509KeyPair(l.config.TLS.Cert, l.config.TLS.Key)
	must(t, err)
	g := newGate(Handshake{Timeout: patience, MaxConcurrent: 1, MaxPerAddress: 1, MaxBytes: 1 << 14})
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	config.VerifyConnection = func(tls.ConnectionState) error {
		v := g.wait(someConn(t), netip.MustParseAddr("192.0.2.1"))
		defer g.leave(v, false)
		return g.enter(t.Context(), v, time.Now().Add(patience))
	}
	client, server := net.Pipe()
	defer client.Close()
	go tls.Client(client, l.clientConfig(nil)).Handshake()
	conn, err := g.handshake(t.Context(), &lbproxy.Conn{Client: deaf{server}}, config)
	if refusal, ok := errors.AsType[*Refusal](err); !ok || refusal.Reason != TooManyHandshakes {
		t.Errorf("handshake = %v, %v, want %s", conn, err, TooManyHandshakes)
	}
}
