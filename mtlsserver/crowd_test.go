package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
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
func (c *comer) leave(finished bool) error {
	err := c.g.leave(c.visit, finished)
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

// empty fails unless g has forgotten all but the known networks a while after its visits ended.
func (g *gate) empty(t *testing.T) {
	t.Helper()
	g.forget(time.Now().Add(g.Timeout + 1))
	for g.remembered[known].Len() > 0 { // only newer ones push these out
		g.rate(g.remembered[known].Front().Value.(*network), unknown)
	}
	if len(g.networks)+g.remembered[failed].Len()+g.waiting.Len()+g.inside.Len() != 0 {
		t.Errorf("networks %v, %d failed, %d waiting, %d inside: want none", g.networks,
			g.remembered[failed].Len(), g.waiting.Len(), g.inside.Len())
	}
}

// leave ends the visits of clients, whose handshakes have finished.
func leave(clients ...*comer) {
	for _, c := range clients {
		c.leave(true)
	}
}

func TestFullGateCutsTheOldestOfTheHeaviestAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 4, MaxPerAddress: 2})
		a := g.come("192.0.2.1")
		b1, b2 := g.come("192.0.2.2"), g.come("192.0.2.2")
		c := g.come("192.0.2.3")
		want(t, "in in in in", a, b1, b2, c)
		time.Sleep(turn)
		d := g.come("192.0.2.4")
		want(t, "in cut in in in", a, b1, b2, c, d)
		e := g.come("192.0.2.5") // the network of the cut one has failed
		want(t, "in cut cut in in in", a, b1, b2, c, d, e)
		if err := b1.leave(true); err == nil {
			t.Error("the cut handshake has a good end")
		}
		leave(a, b2)
		f := g.come("192.0.2.2")
		want(t, "in in in in", c, d, e, f)
		h := g.come("192.0.2.6")
		want(t, "in in in cut in", c, d, e, f, h)
		time.Sleep(g.Timeout + 1)
		i := g.come("192.0.2.2") // the failure is forgotten
		want(t, "cut in in in in", c, d, e, h, i)
		leave(c, d, e, f, h, i)
		g.empty(t)
	})
}

// Newcomers do not push each other out before a turn is over, and who is turned away meanwhile has
// not failed. A known network takes precedence at once.
func TestHandshakeKeepsItsPlaceForATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 2, MaxPerAddress: 2})
		a, b := g.come("192.0.2.1"), g.come("192.0.2.2")
		time.Sleep(turn - 1)
		c := g.come("192.0.2.3")
		want(t, "in in cut", a, b, c)
		time.Sleep(time.Nanosecond)
		d := g.come("192.0.2.3")
		want(t, "cut in in", a, b, d)
		e := g.come("192.0.2.1") // has failed
		want(t, "in in cut", b, d, e)
		leave(a, b, c, d, e)
		f, h := g.come("192.0.2.4"), g.come("192.0.2.5")
		i := g.come("192.0.2.3") // is known
		want(t, "in cut in", f, h, i)
		j := g.come("192.0.2.5")
		want(t, "in in cut", f, i, j)
		time.Sleep(turn)
		k := g.come("192.0.2.2")
		want(t, "cut in in", f, i, k)
		l := g.come("192.0.2.3") // two places weigh more, known or not
		want(t, "cut in in", i, k, l)
		m := g.come("192.0.2.3") // and to lose one is no failure of a known network
		want(t, "in in cut", k, l, m)
		leave(f, h, i, j, k, l, m)
		g.empty(t)
	})
}

// A crowd is strangers who come to a gate, 2,000 a second. They send a byte, and then nothing.
type crowd struct {
	*gate
	ctx      context.Context
	networks int // theirs; each has one handshake at a time
	visits   map[int]*visit
	next     int
	random   *rand.Rand
}

func newCrowd(t *testing.T, networks int) *crowd {
	g := newGate(Handshake{Timeout: 10 * time.Second, MaxConcurrent: 256, MaxPerAddress: 16})
	return &crowd{g, t.Context(), networks, map[int]*visit{}, 0, rand.New(rand.NewPCG(1, 2))}
}

func (c *crowd) upTo(d time.Duration) time.Duration {
	return time.Duration(c.random.Int64N(int64(d)))
}

func (c *crowd) come(from [4]byte) (*visit, error) {
	v := c.wait(&comer{}, netip.AddrFrom4(from))
	return v, c.enter(c.ctx, v, time.Now().Add(c.Timeout))
}

// pass lets time pass, in which strangers come.
func (c *crowd) pass(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); c.next++ {
		time.Sleep(c.upTo(time.Millisecond))
		if c.next%1000 == 0 {
			c.clear()
		}
		if i := c.next % c.networks; c.visits[i] == nil {
			c.visits[i], _ = c.come([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		}
	}
}

// clear ends the strangers' visits that were cut or are out of time.
func (c *crowd) clear() {
	for i, v := range c.visits {
		if v.cut || time.Since(v.placed) >= c.Timeout {
			c.leave(v, false)
			delete(c.visits, i)
		}
	}
}

// visit is a client's visit. Its handshake takes a round trip of 200 ms.
func (c *crowd) visit(from [4]byte) error {
	v, err := c.come(from)
	if err != nil {
		c.leave(v, false)
		c.pass(c.upTo(200 * time.Millisecond))
		return err
	}
	c.pass(200 * time.Millisecond)
	return c.leave(v, true)
}

func (c *crowd) empty(t *testing.T) {
	time.Sleep(c.Timeout)
	c.clear()
	c.gate.empty(t)
}

// A client is turned away, or has failed and is turned away. It comes again each time, gets in, and
// from then on does so at each visit.
func TestClientThatWasTurnedAwayGetsIn(t *testing.T) {
	const once = 1 << 24
	for name, test := range map[string]struct {
		networks int
		failed   bool // the client, before
		within   time.Duration
	}{
		"strangers come again":                        {2000, false, 2 * time.Second},
		"strangers come once":                         {once, false, 5 * time.Second},
		"strangers come again, the client has failed": {2000, true, 15 * time.Second},
		"strangers come once, the client has failed":  {once, true, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(t, test.networks)
				c.pass(200 * time.Millisecond)
				client := [4]byte{192, 0, 2, 1}
				if test.failed {
					n := c.network(netip.PrefixFrom(netip.AddrFrom4(client), 32))
					c.rate(n, failed)
					c.release(n)
				}
				start := time.Now()
				if c.visit(client) == nil {
					t.Fatal("the gate let the client in at once")
				}
				for c.visit(client) != nil {
					if time.Since(start) > test.within {
						t.Fatalf("the client was locked out for %v", time.Since(start))
					}
				}
				t.Logf("the client got in after %v", time.Since(start))
				for range 100 {
					must(t, c.visit(client))
				}
				c.empty(t)
			})
		})
	}
}

// Clients whom the gate does not know get in when the strangers have shown how slow they are.
func TestNewClientsGetInBesideStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 2000)
		c.pass(5 * time.Second)
		for i := range 200 {
			must(t, c.visit([4]byte{192, 0, 2, byte(i)}))
		}
		c.empty(t)
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
		time.Sleep(turn)
		d := g.come("192.0.2.2")
		want(t, "in in in cut in in in", a1, a2, b1, b2, b3, c, d)
		// The /64s of b3, and of a1 and a2, have two places or have failed: the /48 decides.
		e := g.come("192.0.2.3")
		want(t, "in in in cut in in in", a1, a2, b1, b3, c, d, e)
		f := g.come("192.0.2.4")
		want(t, "in in cut in in in in", a1, a2, b1, c, d, e, f)
		h := g.come("192.0.2.5")
		want(t, "cut in in in in in in", a1, a2, c, d, e, f, h)
		leave(a1, a2, b1, b2, b3, c, d, e, f, h)
		g.empty(t)
	})
}

func TestUnfinishedHandshakeMakesItsNetworkHeavier(t *testing.T) {
	for _, test := range []struct {
		finished []bool // the first client's earlier handshakes
		states   string
	}{
		{[]bool{true}, "in in cut"},
		{[]bool{false}, "cut in in"},
		{[]bool{false, true}, "in in cut"},
		{[]bool{true, false}, "in in cut"}, // a known network does not fail
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 2, MaxPerAddress: 2})
			g.silent("192.0.2.2").leave(false) // it never had a place
			for _, finished := range test.finished {
				g.come("192.0.2.1").leave(finished)
			}
			a, b := g.come("192.0.2.1"), g.come("192.0.2.2")
			c := g.come("192.0.2.3")
			want(t, test.states, a, b, c)
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
		time.Sleep(turn)
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

func TestRememberedNetworksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 1, MaxPerAddress: 1})
		for _, finished := range []bool{true, false} {
			for i := range maxRemembered + 1 {
				ip := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
				if finished {
					ip = netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
				}
				g.come(ip.String()).leave(finished)
			}
		}
		k, f := g.remembered[known].Len(), g.remembered[failed].Len()
		if k != maxRemembered || f != maxRemembered {
			t.Errorf("the gate remembers %d known and %d failed networks, want %d each", k, f,
				maxRemembered)
		}
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
		defer g.leave(v, true)
		g.rate(v.near, known)
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
