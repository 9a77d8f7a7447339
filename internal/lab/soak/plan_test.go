//go:build linux

package soak

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A kind is the fault of a connection, if any.
type kind string

const (
	normal        kind = "none"
	bytewise      kind = "1-byte writes"
	earlyFIN      kind = "FIN"             // one side ends its stream at once, the other goes on
	cutTLS        kind = "FIN inside TLS"  // without close_notify, by the client or an upstream
	clientReset   kind = "client reset"    //
	upstreamReset kind = "upstream reset"  // after a part of the answer
	goneEarly     kind = "client gone"     // reset before anything came back
	vanish        kind = "client closed"   // in the midst of what it is sent
	vanishUp      kind = "upstream closed" // in the midst of what it is sent
	stall         kind = "stall"
	canceled      kind = "cancel"
	refuse        kind = "refuse"     // by some upstreams; another one serves
	refuseAll     kind = "refuse all" // by all of them
	blackHole     kind = "black hole"
	slowDial      kind = "slow dial"
	slowAccept    kind = "slow accept"
	noDescriptors kind = "EMFILE, dial"
	noPorts       kind = "EADDRNOTAVAIL"
	overLimit     kind = "limit, open" // refused when it opens
	cutByLimit    kind = "limit, data" // cut by a limit
	someLimit     kind = "limit, some" // more want to be open than may be
	killed        kind = "upstream killed"
	revoked       kind = "revoke"
	stranger      kind = "unknown serial"
	handshakeGone kind = "reset in handshake"

	// The kinds below are not faults of one connection.
	noAccept kind = "EMFILE, accept"
	reload   kind = "reload, SetUpstreams"
)

// A share is how many of a thousand connections are of a kind. The rest is normal.
type share struct {
	kind
	of int
}

var plainShares = []share{
	{bytewise, 25}, {earlyFIN, 30}, {clientReset, 30}, {upstreamReset, 30}, {goneEarly, 10},
	{vanish, 5}, {vanishUp, 5}, {cutTLS, 15}, {stall, 12}, {slowAccept, 10}, {canceled, 10},
	{refuse, 20}, {refuseAll, 5}, {blackHole, 6}, {slowDial, 8}, {noDescriptors, 10}, {noPorts, 5},
	{overLimit, 10}, {cutByLimit, 10}, {someLimit, 30}, {killed, 20},
}

var mtlsShares = []share{
	{bytewise, 25}, {earlyFIN, 30}, {clientReset, 30}, {upstreamReset, 30}, {goneEarly, 10},
	{vanish, 5}, {vanishUp, 5}, {cutTLS, 40}, {stall, 10}, {slowAccept, 10}, {someLimit, 30},
	{killed, 20}, {revoked, 40}, {stranger, 15}, {handshakeGone, 15},
}

// An op is something that one end of a connection does.
type op int

const (
	send    op = iota // n bytes
	recv              // n bytes
	recvEnd           // to the end of the stream, whatever that is
	fin               // end the own stream
	pause             // for n milliseconds
	flush             // wait until what was sent has arrived
	reset             // by TCP
	cut               // FIN by TCP, without ending the own stream in TLS
	shut              // close, as one who has lost interest
	flood             // send until that fails
	hold              // wait until the client is done
	cancel            // the context that the proxy was given for the connection
)

func (o op) String() string {
	return [...]string{"send", "recv", "recv to the end", "FIN", "pause", "flush", "reset", "cut",
		"close", "flood", "hold", "cancel"}[o]
}

type step struct {
	op op
	n  int
}

// A script is the work of one goroutine of one end. After a failed send only its receives follow,
// after a failed recv nothing.
type script []step

// A verdict is how the stream that an end receives must end.
type verdict string

const (
	whole   verdict = "whole"   // all that was sent, then a clean end
	broken  verdict = "broken"  // a part of what was sent, and no clean end
	refused verdict = "refused" // broken, without a byte
	either  verdict = "either"  // any of these: this end has failed
)

// A plan describes a connection and its expected ends. It is a function of the seed and the id.
type plan struct {
	id    uint64
	mtls  bool
	app   string
	user  int // who it is, with mTLS: revoked connections only
	kind  kind
	piece int // bytes in a write; 0 is as much as there is, -1 alternates 1 and many

	client, upstream       []script // the scripts of each run at the same time
	clientEnd, upstreamEnd verdict
	// where it is broken, all that the other end sent is there nevertheless; see conn.late
	exact                    bool
	floods                   bool // a flood must end by an error
	reach                    reach
	ends                     []string // the reasons that the proxy may report
	dialFaults, limitedBytes int
}

// reach says whether an upstream will see a connection.
type reach int

const (
	surely reach = iota
	perhaps
	never
)

func (p *plan) String() string {
	front := "plain"
	if p.mtls {
		front = "mTLS"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s, pieces of %d; ", front, p.app, p.kind, p.piece)
	for _, side := range []struct {
		name    string
		scripts []script
	}{{"client", p.client}, {"upstream", p.upstream}} {
		b.WriteString(side.name)
		for i, script := range side.scripts {
			b.WriteString([]string{": ", " | "}[min(i, 1)])
			for j, s := range script {
				b.WriteString([]string{"", ", "}[min(j, 1)] + s.op.String())
				if s.op == send || s.op == recv || s.op == pause {
					fmt.Fprintf(&b, " %d", s.n)
				}
			}
		}
		b.WriteString("; ")
	}
	return strings.TrimSuffix(b.String(), "; ")
}

// newPlan returns the plan of connection id.
func newPlan(seed, id uint64) *plan {
	g := &generator{rand.New(rand.NewPCG(seed, id)), &plan{id: id, mtls: id%5 == 4, kind: normal}}
	g.pieces()
	shares := plainShares
	if g.mtls {
		shares = mtlsShares
	}
	at := g.IntN(1000)
	for _, s := range shares {
		if at -= s.of; at < 0 {
			g.kind = s.kind
			break
		}
	}
	g.fill()
	return g.plan
}

// A generator makes a plan.
type generator struct {
	*rand.Rand
	*plan
}

func (g *generator) pieces() {
	g.piece = []int{0, 0, 0, 0, -1, 100, 1000, 4096, 5000, 65536}[g.IntN(10)]
}

// size is a number of bytes: none, a few, about the size of a buffer, or many.
func (g *generator) size() int {
	near := func(n int) int { return n - 1 + g.IntN(3) }
	switch p := g.IntN(100); {
	case p < 8:
		return 0
	case p < 16:
		return 1
	case p < 40:
		return 2 + g.IntN(200)
	case p < 55:
		return near(4 << 10)
	case p < 68:
		return near(64 << 10)
	case p < 72:
		return near(128 << 10)
	case p < 90:
		return g.IntN(32 << 10)
	case p < 99:
		return 100_000 + g.IntN(500_000)
	}
	return 1<<20 + g.IntN(2<<20)
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

// fill makes the plan what its kind needs.
func (g *generator) fill() {
	g.clientEnd, g.upstreamEnd, g.ends = whole, whole, []string{string(lbproxy.EndDone)}
	g.app = []string{"web", "web", "web", "greet", "tls"}[g.IntN(5)]
	k, j := g.size(), g.size() // bytes from the client, from the upstream
	switch g.kind {
	case normal:
		if g.chance(10) && !g.mtls {
			g.app = "limits"
		}
		g.exchange(k, j)

	case bytewise:
		g.piece = 1
		g.exchange(k%400, j%400)
	case earlyFIN:
		if g.chance(50) {
			g.script(script{{recv, j}, {recvEnd, 0}, {send, k}, {fin, 0}},
				script{{send, j}, {fin, 0}, {recvEnd, 0}})
		} else {
			g.script(script{{fin, 0}, {recvEnd, 0}},
				script{{recvEnd, 0}, {pause, g.IntN(5)}, {send, j}, {fin, 0}})
		}
	case clientReset:
		g.reset(true, k, j)
	case upstreamReset:
		g.reset(false, j, k)
	case cutTLS:
		g.cutTLS(k, j)
	case goneEarly:
		g.client = []script{{{send, k}, {reset, 0}}}
		g.upstream = []script{{{send, j}}, {{recvEnd, 0}}}
		g.broken(either, broken, lbproxy.EndClientError, lbproxy.EndClientClosed,
			lbproxy.EndReason(mtlsserver.ClientGone))
		g.reach = perhaps
	case vanish:
		g.client = []script{{{recv, 1 + j}, {shut, 0}}}
		g.upstream = []script{{{flood, 0}}, {{recvEnd, 0}}}
		g.broken(either, either, lbproxy.EndClientError)
		g.floods = true
	case vanishUp:
		g.client = []script{{{flood, 0}}, {{recvEnd, 0}}}
		g.upstream = []script{{{send, j}, {recv, 1 + k}, {shut, 0}}}
		g.broken(either, either, lbproxy.EndUpstreamError)
		g.floods = true
	case stall:
		g.app = "idle"
		g.holding(k%10_000, j%10_000, lbproxy.EndIdleTimeout)
		g.reach = perhaps // a busy machine may be too late with the first byte
		if g.chance(50) { // the client has ended its stream, the upstream never does
			g.client = []script{{{send, k % 10_000}, {fin, 0}, {recvEnd, 0}}}
			g.upstream = []script{{{recv, k % 10_000}, {send, j % 10_000}, {hold, 0}}}
			g.upstreamEnd = either
		}
	case canceled:
		g.holding(k, j, lbproxy.EndCanceled)
		g.client = []script{{{send, k}, {recv, j + 1}, {cancel, 0}, {recvEnd, 0}}}
		g.upstream = []script{{{recv, k}, {send, j + 1}, {recvEnd, 0}}}
		g.exact = true
	case slowAccept:
		g.app = "slow"
		g.exchange(k, j)
	case refuse, blackHole, noPorts, slowDial:
		g.app = "dial"
		g.dialFaults = 1 + g.IntN(dialUpstreams-1)
		if g.kind == blackHole || g.kind == slowDial {
			g.dialFaults = 1
		}
		if g.kind == blackHole {
			g.app = "hole"
		}
		g.exchange(k, j)
	case refuseAll:
		g.app, g.dialFaults = "dial", dialUpstreams
		g.refused(lbproxy.EndDialFailed)
	case noDescriptors:
		g.app, g.dialFaults = "dial", 1
		g.refused(lbproxy.EndDialFailed)
	case overLimit:
		g.app = "limits"
		g.refused(lbproxy.EndRateLimited)
	case cutByLimit:
		g.app = "limits"
		g.holding(k+1, j, lbproxy.EndRateLimited)
		g.limitedBytes = headerSize + 1 + g.IntN(k+1)
		g.reach = perhaps
	case someLimit:
		if g.app = "limits"; g.mtls {
			g.app = "web"
		}
		g.exchange(k%10_000, j%10_000)
		g.ends = append(g.ends, string(lbproxy.EndRateLimited))
		g.reach = perhaps
	case killed:
		g.app = "kill"
		// one after the other may be killed while it is dialed
		g.holding(k, j, lbproxy.EndUpstreamError, lbproxy.EndDialFailed)
		g.upstreamEnd, g.reach = either, perhaps
	case revoked:
		g.user = g.IntN(revocableUsers)
		g.holding(k, j)
		g.ends = []string{string(mtlsserver.Revoked), string(mtlsserver.UnknownSerial)}
		g.reach = perhaps
	case stranger:
		g.refused(lbproxy.EndReason(mtlsserver.UnknownSerial))
	case handshakeGone:
		g.refused(lbproxy.EndReason(mtlsserver.ClientGone))
	}
}

func (g *generator) script(client, upstream script) {
	g.client, g.upstream = []script{client}, []script{upstream}
}

func (g *generator) broken(client, upstream verdict, ends ...lbproxy.EndReason) {
	g.clientEnd, g.upstreamEnd, g.ends = client, upstream, nil
	for _, end := range ends {
		g.ends = append(g.ends, string(end))
	}
}

// refused plans a reset of the client before any upstream sees it.
func (g *generator) refused(ends ...lbproxy.EndReason) {
	g.client = []script{{{send, g.IntN(2000)}}, {{recvEnd, 0}}}
	g.broken(refused, refused, ends...)
	g.reach = never
}

// exchange plans two complete streams.
func (g *generator) exchange(k, j int) {
	rest := func() (s script) {
		if g.chance(10) {
			s = script{{pause, 1 + g.IntN(20)}}
		}
		return s
	}
	shape := g.IntN(4)
	if g.kind == normal && g.chance(4) {
		shape = 4
	}
	switch shape {
	case 0: // both at the same time
		g.client = []script{append(rest(), step{send, k}, step{fin, 0}), {{recvEnd, 0}}}
		g.upstream = []script{append(rest(), step{send, j}, step{fin, 0}), {{recvEnd, 0}}}
	case 1: // an answer to all of what was asked
		g.script(append(rest(), step{send, k}, step{fin, 0}, step{recvEnd, 0}),
			append(append(script{{recvEnd, 0}}, rest()...), step{send, j}, step{fin, 0}))
	case 2: // the upstream first
		g.script(append(append(script{{recvEnd, 0}}, rest()...), step{send, k}, step{fin, 0}),
			append(rest(), step{send, j}, step{fin, 0}, step{recvEnd, 0}))
	case 3: // in turns
		var c, u script
		for range 1 + g.IntN(6) {
			k, j := g.size()%300_000, g.size()%300_000
			if g.kind == bytewise {
				k, j = k%100, j%100
			}
			c = append(append(c, rest()...), step{send, k}, step{recv, j})
			u = append(append(append(u, step{recv, k}), rest()...), step{send, j})
		}
		g.script(append(c, step{fin, 0}, step{recvEnd, 0}), append(u, step{recvEnd, 0}, step{fin, 0}))
	case 4: // to readers that stop now and then, so that all buffers between them fill up
		slowly := func(n int) (s script) {
			for range 3 {
				n /= 3
				s = append(s, step{recv, n}, step{pause, 1 + g.IntN(10)})
			}
			return append(s, step{recvEnd, 0})
		}
		if g.chance(50) {
			k += 1 << 20
		} else {
			j += 1 << 20
		}
		g.client = []script{{{send, k}, {fin, 0}}, slowly(j)}
		g.upstream = []script{{{send, j}, {fin, 0}}, slowly(k)}
	}
}

// holding makes both ends wait for the break of the connection, after each has received the other's
// bytes.
func (g *generator) holding(k, j int, ends ...lbproxy.EndReason) {
	g.script(script{{send, k}, {recv, j}, {recvEnd, 0}}, script{{recv, k}, {send, j}, {recvEnd, 0}})
	g.broken(broken, broken, ends...)
}

// reset makes one end reset the connection after sending n bytes, while the other sends m.
func (g *generator) reset(byClient bool, n, m int) {
	var first script
	if byClient { // not before an upstream has the connection
		first, m = script{{recv, 1}}, m+1
	}
	sent, last := script{{send, m}}, script{{send, n}, {flush, 0}, {reset, 0}}
	own := either
	g.exact = true
	switch g.IntN(7) {
	case 0, 1: // without having read more
	case 2: // nor could more fit between the two
		sent, last = script{{flood, 0}}, script{{send, n}, {flush, 0}, {pause, 30}, {reset, 0}}
		g.floods = true
	case 3, 4:
		first = script{{recv, m}}
	case 5, 6: // when the other has ended its stream
		sent = append(sent, step{fin, 0})
		first, own = script{{recv, m}, {recvEnd, 0}}, whole
	}
	one, other := []script{append(first, last...)}, []script{sent, {{recvEnd, 0}}}
	if byClient {
		g.client, g.upstream = one, other
		g.broken(own, broken, lbproxy.EndClientError, lbproxy.EndClientClosed)
	} else {
		g.client, g.upstream = other, one
		g.broken(broken, own, lbproxy.EndUpstreamError)
	}
}

// cutTLS cuts one end's stream so that TCP sees a clean end and TLS does not.
func (g *generator) cutTLS(k, j int) {
	if g.mtls && g.chance(60) {
		g.client = []script{{{recv, 1}, {send, k}, {cut, 0}, {recvEnd, 0}}}
		g.upstream = []script{{{send, 1 + j}}, {{recvEnd, 0}}}
		g.broken(broken, broken, lbproxy.EndClientError, lbproxy.EndClientClosed)
	} else {
		g.app = "tls"
		g.client = []script{{{send, k}}, {{recvEnd, 0}}}
		g.upstream = []script{{{recv, k}, {send, j}, {cut, 0}, {recvEnd, 0}}}
		g.broken(broken, broken, lbproxy.EndUpstreamError)
	}
}

// sends is how many bytes scripts send.
func sends(scripts []script) (n int64) {
	for _, script := range scripts {
		for _, s := range script {
			if s.op == send {
				n += int64(s.n)
			}
		}
	}
	return n
}

const (
	idleTimeout = 400 * time.Millisecond // of the apps where connections stall
	// of the app that dials black holes; a busy machine has to make a good dial in it
	dialTimeout = time.Second
)
