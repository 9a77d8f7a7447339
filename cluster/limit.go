package cluster

import (
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/redis/rueidis"
)

// A Limit bounds the connections and bytes of a client over all proxies together. A zero Burst,
// Open or BytesPerSecond sets no bound, and a negative one refuses everything, as does a Limit in
// which all three are zero. Every has a meaning only with Burst.
type Limit struct {
	Burst int           // tokens of a full bucket: a new connection takes one
	Every time.Duration // time to refill one token; 0 or less: none is ever refilled

	// Open is the most open connections. It is exact: each connection asks the store. When a proxy
	// dies, its connections stop counting after 6 seconds.
	Open int

	// BytesPerSecond is the rate of both directions together. Every 100 ms proxies exchange,
	// through the store, how much they could use. Each gets an even part, and more if others leave
	// some. When another proxy begins to move data, the rate may be exceeded by its part for 100
	// ms. Moving data never waits for the store.
	BytesPerSecond int64

	// Exact makes each connection ask the store. Otherwise a proxy borrows as many tokens as it
	// used in the last 100 ms, and returns unused ones after 100 ms. A crash loses the borrowed
	// tokens until they are refilled.
	Exact bool

	// Outage is the policy while the store is away.
	Outage Outage
}

// An Outage is the policy of a [Limit] while the store is away.
type Outage int

const (
	// Share gives each of N proxies one part in N of the limit, where N is their last known number.
	// Together they exceed the limit by at most one Burst.
	Share Outage = iota
	// Open admits every connection and slows none.
	Open
	// Closed refuses new connections. Open ones continue, with one part in N of BytesPerSecond.
	Closed
)

// String returns "share", "open" or "closed".
func (o Outage) String() string {
	switch o {
	case Share:
		return "share"
	case Open:
		return "open"
	case Closed:
		return "closed"
	}
	return fmt.Sprintf("Outage(%d)", int(o))
}

//go:embed limit.lua
var limitText string

var limitScript = rueidis.NewLuaScript(limitText)

const (
	flushEvery = 100 * time.Millisecond // between settlements of tokens and bytes
	renewEvery = 2 * time.Second        // of open connections, which limit.lua forgets after 6 s
	forever    = time.Duration(1) << 52 * time.Microsecond
)

// A limiter is one proxy's part in a Limit.
//
// It reports changes to the store, and any report may be lost. So it also reports its open
// connections as an absolute number: every 2 s, and after a failed call, when no other call is in
// flight.
type limiter struct {
	store  *Store
	l      Limit
	every  time.Duration // Every, bounded so that it is positive and Burst*every cannot overflow
	keys   []string      // its one key
	member string        // unique name under which the store counts its connections
	config [4]string     // the constant arguments of the script

	perByte float64 // 1/BytesPerSecond

	pace  lbproxy.Bandwidth
	moved atomic.Int64 // bytes since reported
	rate  atomic.Int64 // bytes a second that the store allows; 0 if unknown

	mu       sync.Mutex // not held over a call
	active   bool       // the flusher looks at it
	lent     int        // tokens borrowed and not used
	used     int        // tokens granted by the store and used since the last tick
	before   int        // used between the last two ticks
	charged  int        // the part of used that share has been charged for
	owed     int        // tokens granted without the store and not yet reported
	share    bucket     // tokens to grant without the store
	open     int        // connections open
	change   int        // of open, not yet reported
	heal     bool       // a call failed: the store may have another number
	renewed  time.Time  // when the absolute number was last reported
	inFlight int        // calls
	trip     *trip      // the call that connections wait for; nil if there is none
	waiting  int        // connections that wait for trip
	until    time.Time  // the store refuses until then
	short    bool       // the last call granted less than was wanted
	reported time.Time  // when could was last reported
}

// A trip is a call whose outcome several connections wait for.
type trip struct {
	done chan struct{} // closed when it is over
	err  error
}

// Limit returns a manager for [lbproxy.Conn] or [lbproxy.NewClientLimits]. The key identifies the
// client. In all proxies of the cluster, managers with the same key and the same numbers are one
// limit; other numbers begin a new one. Limit makes no call, and the manager needs no Close.
func (s *Store) Limit(key string, l Limit) lbproxy.RateLimitManager {
	m := &limiter{store: s, l: l, every: max(l.Every, 0),
		perByte: 1 / float64(max(l.BytesPerSecond, 1)),
		pace:    lbproxy.Bandwidth{BytesPerSecond: l.BytesPerSecond}}
	// The script counts in whole microseconds; its numbers are exact up to 2^53.
	m.every = (m.every + time.Microsecond - 1).Truncate(time.Microsecond)
	if most := forever / time.Duration(max(l.Burst, 1)); m.every == 0 || m.every > most {
		m.every = max(most.Truncate(time.Microsecond), time.Microsecond)
	}
	m.config = [4]string{
		strconv.Itoa(max(l.Burst, 0)), strconv.FormatInt(m.every.Microseconds(), 10),
		strconv.Itoa(max(l.Open, 0)), strconv.FormatInt(max(l.BytesPerSecond, 0), 10),
	}
	m.member = s.id + "." + strconv.FormatUint(s.serial.Add(1), 10)
	m.keys = []string{fmt.Sprintf("l:{%s:%s:%d/%v/%d/%d}",
		s.name, key, l.Burst, l.Every, l.Open, l.BytesPerSecond)}
	return m
}

// refuses reports whether l refuses every connection.
func (l *Limit) refuses() bool {
	return l.Burst < 0 || l.Open < 0 || l.BytesPerSecond < 0 ||
		l.Burst == 0 && l.Open == 0 && l.BytesPerSecond == 0
}

// Report implements [lbproxy.RateLimitManager]. Only an EventOpen waits for the store, for at most
// Options.Timeout. An EventClose without an EventOpen before it panics.
func (m *limiter) Report(ctx context.Context, e lbproxy.Event) lbproxy.Decision {
	switch e.Kind {
	case lbproxy.EventOpen:
		if m.l.refuses() || !m.enter(ctx) {
			return lbproxy.Decision{Exceeded: true}
		}
	case lbproxy.EventClose:
		m.leave(e.Refused)
		return lbproxy.Decision{}
	}
	if m.l.BytesPerSecond <= 0 {
		return lbproxy.Decision{}
	}
	// Pace by a Bandwidth with the whole rate, and divide the bytes by this proxy's share of it.
	share := m.bytesShare()
	if share == 0 {
		return lbproxy.Decision{}
	}
	if n := e.Bytes; n > 0 && m.moved.Add(n) == n {
		m.moving()
	}
	if share == 1 {
		return m.pace.Report(ctx, e)
	}
	e.Bytes = int64(float64(e.Bytes) / share)
	d := m.pace.Report(ctx, e)
	d.Chunk = max(int(float64(d.Chunk)*share), 512)
	return d
}

// Idle reports whether a new limiter of the same key could replace this one. The store keeps the
// limit's state.
func (m *limiter) Idle() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lent == 0 && m.open == 0 && m.owed == 0 && m.moved.Load() == 0 && m.change == 0 &&
		m.inFlight == 0
}

// enter decides on an EventOpen.
func (m *limiter) enter(ctx context.Context) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	leased := m.l.Open == 0 && !m.l.Exact
	for {
		if m.store.client.Load() == nil {
			return m.alone()
		}
		if m.l.Open == 0 && (m.l.Burst == 0 || m.lent > 0) {
			return m.letIn()
		}
		if !m.until.IsZero() && time.Now().Before(m.until) {
			return false
		}
		if t := m.trip; t != nil {
			if !m.wait(ctx, t) {
				return false
			}
			if t.err != nil {
				return m.alone()
			}
			continue // with the tokens that the trip has brought
		}
		c := call{wanted: min(m.l.Burst, 1), asks: 1}
		if leased {
			c.wanted, c.exclusive = m.batch(), true
		}
		switch err := m.ask(&c); {
		case err != nil:
			return m.alone()
		case c.refused:
			return false
		}
		return m.letIn()
	}
}

// letIn counts a connection that the store has admitted. The caller holds mu.
func (m *limiter) letIn() bool {
	if m.l.Burst > 0 {
		m.lent--
	}
	m.used++
	m.open++
	m.activate()
	return true
}

// alone decides by the Outage policy. The caller holds mu.
func (m *limiter) alone() bool {
	now := time.Now()
	m.settle(now)
	n, burst, every := m.part()
	allowed, borrowed := m.l.Outage != Closed, false
	if m.l.Outage == Share && m.l.Open > 0 {
		allowed = m.open < max(m.l.Open/n, 1)
	}
	if allowed && m.l.Burst > 0 {
		if borrowed = m.lent > 0; borrowed {
			m.lent-- // paid for already
		} else if !m.share.take(now, burst, every) {
			allowed = m.l.Outage == Open
		}
	}
	if !allowed {
		m.store.turnedAway.Add(1)
		return false
	}
	m.store.alone.Add(1)
	if m.l.Burst > 0 && !borrowed {
		m.owed = min(m.owed+1, m.l.Burst)
	}
	m.open++
	m.heal = true
	m.activate()
	return true
}

// part returns this proxy's part of the limit without the store: one in n.
func (m *limiter) part() (n, burst int, every time.Duration) {
	n = int(m.store.peers.Load())
	most := min(n, max(m.l.Burst, 1)) // a part is one token at least
	return n, max(m.l.Burst/n, 1), min(m.every, forever/time.Duration(most)) * time.Duration(most)
}

// settle charges the share for the tokens that the store has granted, so that the policy does not
// grant them again. The caller holds mu.
func (m *limiter) settle(now time.Time) {
	if n := m.used - m.charged; n > 0 && m.l.Burst > 0 {
		_, burst, every := m.part()
		m.share.charge(now, n, burst, every)
	}
	m.charged = m.used
}

// batch returns how many tokens to borrow: as many as were needed lately, but no more than are
// refilled in that time, and no more than this proxy's part. The caller holds mu.
func (m *limiter) batch() int {
	_, burst, _ := m.part()
	needed := max(m.used, m.before, m.waiting+1)
	if m.short { // the limit admits less than is needed: borrow all there is in one call
		needed += needed/4 + 1
	}
	return min(needed, burst, max(int(flushEvery/m.every), 1))
}

// wait waits for t and reports whether t ended before ctx. The caller holds mu, which wait releases
// meanwhile.
func (m *limiter) wait(ctx context.Context, t *trip) bool {
	m.waiting++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.waiting--
	}()
	select {
	case <-t.done:
		return true
	case <-ctx.Done():
		return false
	}
}

// leave counts a connection that has ended. If another limit refused it, it returns its token.
func (m *limiter) leave(refused bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open == 0 {
		panic("cluster: EventClose without EventOpen")
	}
	m.open--
	if refused && m.l.Burst > 0 {
		m.lent++
		m.activate()
	}
	if m.l.Open > 0 {
		m.change--
		m.until = time.Time{} // the store may have a place now
		m.activate()
		m.store.limits.hurry(m)
	}
}

// bytesShare returns this proxy's part of BytesPerSecond, or 0 if there is no bound now. The
// store's last rate holds until the next tick, even if the store has gone since.
func (m *limiter) bytesShare() float64 {
	if rate := m.rate.Load(); rate > 0 {
		return float64(rate) * m.perByte
	}
	if m.l.Outage == Open && m.store.client.Load() == nil {
		return 0
	}
	return 1 / float64(m.store.peers.Load()) // an even part
}

// moving reports the first bytes after a rest to the store.
func (m *limiter) moving() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := time.Now(); now.Sub(m.reported) > flushEvery {
		m.reported = now
		m.store.limits.hurry(m)
	}
	m.activate()
}

// could returns how many bytes a second this proxy could use: -1, as many as there are, if it used
// nearly all of its rate; 0 if it moved none. It begins a new count. The caller holds mu.
func (m *limiter) could(now time.Time) int64 {
	bytes := m.moved.Swap(0)
	if bytes == 0 {
		return 0
	}
	moved, rate := float64(bytes)/max(now.Sub(m.reported), flushEvery/2).Seconds(), m.rate.Load()
	m.reported = now
	if rate == 0 || moved > 0.8*float64(rate) {
		return -1
	}
	return int64(moved) + 1
}

// activate makes the flusher look at m. The caller holds mu.
func (m *limiter) activate() {
	if !m.active {
		m.active = true
		m.store.limits.add(m)
	}
}

// A call is one trip to the store.
type call struct {
	wanted    int  // tokens
	given     int  // tokens to return
	asks      int  // 1 for a connection that asks to be admitted
	absolute  bool // report the number of open connections, not its change
	exclusive bool // others wait for this call

	refused bool // the answer to a connection that asks
}

// ask makes a call and reports everything that has changed. The caller holds mu, which ask releases
// meanwhile.
func (m *limiter) ask(c *call) error {
	own := strconv.Itoa(m.change)
	if c.absolute {
		own = "=" + strconv.Itoa(m.open)
	}
	spare := min(m.lent, c.wanted) // returned by a connection that another limit refused
	m.lent -= spare
	owed, could := m.owed, m.could(time.Now())
	m.change, m.owed = 0, 0
	args := append([]string{m.member}, m.config[:]...)
	args = append(args,
		strconv.Itoa(c.wanted-spare), strconv.Itoa(c.given), strconv.Itoa(owed), own,
		strconv.Itoa(c.asks), strconv.FormatInt(could, 10))
	var t *trip
	if c.exclusive {
		t = &trip{done: make(chan struct{})}
		m.trip = t
		defer close(t.done)
	}
	m.inFlight++
	m.mu.Unlock()
	values, err := m.store.script(context.Background(), m.store.opts.Timeout, limitScript, m.keys,
		args...)
	m.mu.Lock()
	m.inFlight--
	now := time.Now()
	var answer answer
	if err == nil {
		err = answer.read(values)
	}
	if t != nil {
		m.trip, t.err = nil, err
	}
	m.lent += spare
	if err != nil { // the report may have been lost
		m.owed = min(m.owed+owed, m.l.Burst)
		m.heal = true
		return err
	}
	m.lent += answer.granted
	if c.absolute {
		m.heal, m.renewed = false, now
	}
	if could != 0 { // begin with an even part, then double: others may begin at the same moment
		even := max(m.l.BytesPerSecond/m.store.peers.Load(), 1)
		m.rate.Store(min(answer.rate, max(2*m.rate.Load(), even)))
	}
	c.refused = answer.why != ""
	if c.asks > 0 {
		m.short = c.refused || answer.granted < c.wanted-spare
		if m.short {
			m.until = now.Add(m.hold(c, answer.wait))
		}
	}
	return nil
}

// hold returns how long not to ask again after the store has refused, or has granted less than was
// wanted. A limit that borrows waits for several tokens to be refilled: otherwise a flood would
// cause a call for each.
func (m *limiter) hold(c *call, wait time.Duration) time.Duration {
	if c.exclusive && c.wanted > 0 {
		wait = max(wait, min(flushEvery, m.every*time.Duration(m.l.Burst)/2))
	}
	return min(wait, time.Second) // another proxy may return tokens
}

// An answer is the result of limit.lua.
type answer struct {
	granted int
	why     string
	wait    time.Duration
	rate    int64
}

func (a *answer) read(values []rueidis.RedisMessage) error {
	if len(values) != 4 {
		return fmt.Errorf("cluster: the store answers with %d values instead of 4", len(values))
	}
	granted, err1 := values[0].AsInt64()
	why, err2 := values[1].ToString()
	wait, err3 := values[2].AsInt64()
	rate, err4 := values[3].AsInt64()
	*a = answer{int(granted), why, time.Duration(wait) * time.Microsecond, rate}
	return cmp.Or(err1, err2, err3, err4)
}

// A bucket is a token bucket whose size is an argument, because it changes with the number of
// proxies.
type bucket struct{ full time.Time } // when all tokens will have been refilled

func (b *bucket) take(now time.Time, burst int, every time.Duration) bool {
	full := later(b.full, now).Add(every)
	if full.Sub(now) > time.Duration(burst)*every {
		return false
	}
	b.full = full
	return true
}

// charge takes n tokens, or as many as there are.
func (b *bucket) charge(now time.Time, n, burst int, every time.Duration) {
	from := later(b.full, now)
	free := time.Duration(burst)*every - from.Sub(now)
	b.full = from.Add(max(min(time.Duration(min(n, burst))*every, free), 0))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
