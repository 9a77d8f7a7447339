package lbproxy

import (
	"container/list"
	"context"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"time"
)

// A RateLimitManager receives the events of connections and decides whether they may go on. Its
// scope is the caller's choice: connections whose [Conn.RateLimit] is the same manager share its
// limit, be that a client's, an app's or the whole program's. It must be safe for concurrent use.
//
// EventOpen is reported before anything is dialed. If the manager allows it, exactly one EventClose
// follows, whatever happens. If it refuses, nothing follows, and it must not charge for the
// connection. EventData is reported after the bytes have moved, at most 1 MiB of them at a time, so
// a Wait is backpressure.
//
// Report is called on the connection's own goroutines and may block. Its ctx ends with the
// connection, except for EventClose, where it does not end. If Report panics, the connection ends,
// and the counts stay right. A manager that depends on something that can fail, such as a store,
// decides itself whether to let connections go on meanwhile. A manager that is kept in
// [ClientLimits] and remembers more than its open connections should have a method Idle() bool.
//
// A program may call Report itself, in an AdmitFunc for example, if it pairs events as above. A
// connection that it then rejects ends with EndNotAdmitted, not with EndRateLimited.
type RateLimitManager interface {
	Report(ctx context.Context, e Event) Decision
}

// An Event is one thing that a connection did.
type Event struct {
	Kind      EventKind
	App       string    // the app's id
	ClientID  string    // from Conn
	Direction Direction // EventData only
	Bytes     int64     // EventData only: how many moved, at most 1 MiB

	// Refused is set on the EventClose that undoes an EventOpen: this manager allowed the
	// connection, but a later one of the same [All] refused it, so it was never served. The manager
	// should give back its cost.
	Refused bool
}

// String describes e in one line, with the client's id quoted.
func (e Event) String() string {
	s := fmt.Sprintf("%v app=%q client=%q", e.Kind, e.App, e.ClientID)
	if e.Kind == EventData {
		s += fmt.Sprintf(" %v %d bytes", e.Direction, e.Bytes)
	}
	if e.Refused {
		s += " refused"
	}
	return s
}

// An EventKind says what an [Event] is about.
type EventKind int

const (
	EventOpen  EventKind = iota + 1 // a connection asks to be served
	EventData                       // bytes have moved
	EventClose                      // an allowed connection is over
)

// String returns "open", "data" or "close".
func (k EventKind) String() string {
	switch k {
	case EventOpen:
		return "open"
	case EventData:
		return "data"
	case EventClose:
		return "close"
	}
	return fmt.Sprintf("EventKind(%d)", int(k))
}

// A Direction says which way bytes went.
type Direction int

const (
	Upload   Direction = iota + 1 // client to upstream
	Download                      // upstream to client
)

// String returns "upload" or "download".
func (d Direction) String() string {
	switch d {
	case Upload:
		return "upload"
	case Download:
		return "download"
	}
	return fmt.Sprintf("Direction(%d)", int(d))
}

// A Decision is the answer to an [Event]. The zero Decision lets the connection go on. The answer
// to an EventClose is ignored.
type Decision struct {
	// Exceeded refuses the connection (EventOpen) or resets it (EventData).
	Exceeded bool

	// Err is the reason for Exceeded and becomes Result.Err; nil means [ErrRateLimited]. A custom
	// error should wrap ErrRateLimited, so that errors.Is finds it.
	Err error

	// Wait delays the dial (EventOpen), or the next bytes of this direction (EventData). A
	// direction makes up for inexact timers: a wait of less than a millisecond is added to the next
	// one, and one that lasted too long shortens the next. 0 or less means no wait.
	Wait time.Duration

	// Chunk is the most bytes to move at once next: in this direction (EventData) or in both
	// (EventOpen). 0 or less: the size is chosen so that waits stay near 20 ms. A manager of
	// several connections should set the same Chunk for all: otherwise their shares become equal
	// only after some time, or never quite.
	Chunk int
}

// and returns the decision of two managers together.
func (d Decision) and(o Decision) Decision {
	if o.Exceeded && !d.Exceeded {
		d.Exceeded, d.Err = true, o.Err
	}
	d.Wait = max(d.Wait, o.Wait)
	if o.Chunk > 0 && (d.Chunk <= 0 || o.Chunk < d.Chunk) {
		d.Chunk = o.Chunk
	}
	return d
}

// A TokenBucket limits the rate of new connections. Each takes one of Burst tokens, and a token is
// refilled each Every. A connection without a token is refused; none waits. The zero value refuses
// all. The fields must not change after first use. It is safe for concurrent use.
type TokenBucket struct {
	Burst int           // tokens of a full bucket; 0 or less refuses all
	Every time.Duration // time to refill one token; 0 or less: none is ever refilled

	// mu guards the fields below. An empty bucket needs no more state than this: time is compared
	// when somebody asks, so there is no refilling goroutine, no float and no overflow.
	mu    sync.Mutex
	spent int       // tokens not yet refilled, from 0 to Burst
	since time.Time // when the next one began to be refilled; meaningless if spent is 0
}

// Report implements [RateLimitManager].
func (b *TokenBucket) Report(_ context.Context, e Event) Decision {
	switch {
	case e.Kind == EventOpen:
		if !b.take(time.Now()) {
			return Decision{Exceeded: true, Err: errBucketEmpty}
		}
	case e.Kind == EventClose && e.Refused:
		b.giveBack()
	}
	return Decision{}
}

// Idle reports whether the bucket is full, so that [ClientLimits] may forget it.
func (b *TokenBucket) Idle() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(time.Now())
	return b.spent == 0
}

func (b *TokenBucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(now)
	if b.spent >= b.Burst {
		return false
	}
	if b.spent == 0 {
		b.since = now
	}
	b.spent++
	return true
}

// refill adds whole tokens. It is exact, and whole*Every cannot overflow because it never exceeds
// the time that has passed. The caller holds mu.
func (b *TokenBucket) refill(now time.Time) {
	if b.Every <= 0 || b.spent == 0 {
		return
	}
	whole := now.Sub(b.since) / b.Every
	if whole >= time.Duration(b.spent) {
		b.spent = 0
	} else if whole > 0 {
		b.spent -= int(whole)
		b.since = b.since.Add(whole * b.Every)
	}
}

func (b *TokenBucket) giveBack() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent = max(b.spent-1, 0)
}

// An OpenLimit limits how many connections are open at once. The zero value refuses all. Max must
// not change after first use. It is safe for concurrent use.
type OpenLimit struct {
	Max int // most connections at once; 0 or less refuses all

	mu   sync.Mutex
	open int // guarded by mu
}

// Report implements [RateLimitManager]. It panics on an EventClose without an EventOpen.
func (l *OpenLimit) Report(_ context.Context, e Event) Decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch e.Kind {
	case EventOpen:
		if l.open >= l.Max {
			return Decision{Exceeded: true, Err: errTooManyOpen}
		}
		l.open++
	case EventClose:
		if l.open == 0 {
			panic("lbproxy: OpenLimit: EventClose without EventOpen")
		}
		l.open--
	}
	return Decision{}
}

// A Bandwidth limits bytes per second, in both directions and over all connections that share it,
// taken together. It never refuses a connection, except that the zero value, which has no rate,
// refuses all. The fields must not change after first use. It is safe for concurrent use.
//
// Connections share the rate equally, whenever they came. A direction that uses less than its share
// is hardly delayed by the others, so an interactive session stays responsive beside any number of
// downloads.
type Bandwidth struct {
	BytesPerSecond int64 // 0 or less refuses all

	// Burst is how many bytes pass without a wait after an idle period, which refills it by
	// BytesPerSecond each second. 0 or less means none. Up to 64 streams together may exceed it by
	// BytesPerSecond times 20 ms, or by 512 bytes each if that is more.
	Burst int64

	// mu guards the fields below.
	mu   sync.Mutex
	paid time.Time // when the bytes moved so far are paid for, at BytesPerSecond …
	owed uint64    // … and so many BytesPerSecond-ths of a nanosecond: exact for the smallest pieces

	// An estimate of how many streams are held. It begins anew, at manyStreams, after an idle
	// period.
	streams float64       // at least 1
	since   time.Time     // when the count that follows began
	waits   time.Duration // the sum of all waits told since then
}

const (
	turn        = 20 * time.Millisecond // in which each stream that a Bandwidth holds gets its share
	manyStreams = 64                    // so many are assumed until they have been counted
	countFor    = 5 * turn              // how long that takes
	maxBytes    = 1 << 20               // in an Event
)

// Report implements [RateLimitManager].
func (b *Bandwidth) Report(_ context.Context, e Event) Decision {
	if b.BytesPerSecond <= 0 {
		if e.Kind == EventOpen {
			return Decision{Exceeded: true, Err: errNoRate}
		}
		return Decision{}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case e.Kind == EventOpen:
		b.streams++
	case e.Kind == EventClose && e.Refused:
		b.streams = max(b.streams-1, 1)
		return Decision{}
	case e.Kind != EventData:
		return Decision{}
	}
	return b.move(time.Now(), max(e.Bytes, 0))
}

// Idle reports whether b is back in its initial state, so that [ClientLimits] may forget it.
func (b *Bandwidth) Idle() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.paid.After(time.Now())
}

// move charges n bytes that a stream has moved and says how long that stream is to wait.
//
// There is one account for all, so the rate holds for all together. It would be simple to let each
// stream wait until the account is settled, but unfair: all waits would be equally long, so a
// stream's share would be as large as its chunks, and a small request would wait for large ones.
// Instead each stream has a quantum, its share of a turn, and waits for as much of the debt as its
// bytes are of its quantum. So each moves quantum/debt bytes a second, in pieces of whatever size.
// If they are too fast together the debt grows, which slows all of them. With the right quantum the
// debt is about a turn. With a wrong one it is larger or smaller, but the rate is right.
//
// Start-time fair queueing would need to know the streams, and a queue. The caller holds mu.
func (b *Bandwidth) move(now time.Time, n int64) (d Decision) {
	burst, _ := nanoseconds(max(b.Burst, 0), b.BytesPerSecond)
	if now.Sub(b.paid) > turn-burst { // more than a turn of the burst is unspent, or b was idle
		b.streams, b.since, b.waits = manyStreams, now, 0
	}
	debt := b.charge(now, n) - burst
	whole := inTime(turn, b.BytesPerSecond)
	quantum := max(float64(whole)/b.streams, 1)
	switch {
	case debt <= 0:
		unspent := inTime(-debt, b.BytesPerSecond)
		quantum = max(quantum, float64(min(whole, unspent/(2*manyStreams))))
	default:
		d.Wait = debt
		if float64(n) < quantum { // half of n's own cost counts, else small pieces would gain
			cost, _ := nanoseconds(n, b.BytesPerSecond)
			d.Wait = time.Duration(float64(debt-min(cost, debt)/2) * float64(n) / quantum)
		}
		b.count(now, d.Wait)
		if debt > 2*turn { // there are more streams than were counted
			quantum *= float64(2*turn) / float64(debt)
		}
	}
	least := max(512, b.BytesPerSecond/4096)
	d.Chunk = int(min(max(int64(quantum), least), maxBytes))
	return d
}

// count estimates the number of streams by Little's law: one that is held waits all the time, so
// the waits of a second add up to as many seconds as there are streams. The caller holds mu.
func (b *Bandwidth) count(now time.Time, wait time.Duration) {
	b.waits += min(wait, forever-b.waits)
	if passed := now.Sub(b.since); passed >= countFor {
		b.streams = max(float64(b.waits)/float64(passed), 1)
		b.since, b.waits = now, 0
	}
}

// A debt of a hundred years is as good as for ever, and leaves room to add to it.
const forever = 100 * 365 * 24 * time.Hour

// charge adds n bytes to the account and returns how long it takes until it is settled. The caller
// holds mu.
func (b *Bandwidth) charge(now time.Time, n int64) time.Duration {
	if b.paid.Before(now) {
		b.paid, b.owed = now, 0
	}
	cost, owed := nanoseconds(n, b.BytesPerSecond)
	if b.owed += owed; b.owed >= uint64(b.BytesPerSecond) {
		b.owed -= uint64(b.BytesPerSecond)
		cost++
	}
	b.paid = b.paid.Add(min(cost, forever-min(b.paid.Sub(now), forever)))
	return b.paid.Sub(now)
}

// nanoseconds returns how long n bytes take at rate: whole nanoseconds, saturating, and what
// remains in rate-ths of one.
func nanoseconds(n, rate int64) (whole time.Duration, remainder uint64) {
	hi, lo := bits.Mul64(uint64(n), uint64(time.Second))
	if hi >= uint64(rate) {
		return math.MaxInt64, 0
	}
	quo, rem := bits.Div64(hi, lo, uint64(rate))
	if quo >= math.MaxInt64 {
		return math.MaxInt64, 0
	}
	return time.Duration(quo), rem
}

// inTime returns how many bytes pass in d at rate, saturating.
func inTime(d time.Duration, rate int64) int64 {
	hi, lo := bits.Mul64(uint64(d), uint64(rate))
	if hi >= uint64(time.Second) {
		return math.MaxInt64
	}
	quo, _ := bits.Div64(hi, lo, uint64(time.Second))
	return int64(min(quo, math.MaxInt64))
}

// All returns a manager that allows a connection if every one of managers does. It asks them in
// order. When one refuses, those asked before it get an EventClose with Refused set at once. It
// resets a connection when any of them does. The longest Wait and the smallest Chunk count. A nil
// manager is left out. A manager that holds a nil pointer is not, and panics at its first report.
// All() allows everything.
func All(managers ...RateLimitManager) RateLimitManager {
	var all all
	for _, m := range managers {
		if m != nil {
			all = append(all, m)
		}
	}
	return all
}

type all []RateLimitManager

func (a all) Report(ctx context.Context, e Event) (d Decision) {
	switch e.Kind {
	case EventOpen:
		return a.open(ctx, e)
	case EventClose:
		a.close(ctx, e)
		return Decision{}
	}
	for _, m := range a {
		d = d.and(m.Report(ctx, e))
	}
	return d
}

func (a all) open(ctx context.Context, e Event) (d Decision) {
	asked, agreed := 0, false
	defer func() { // also when one of them panics
		if !agreed {
			undo := Event{Kind: EventClose, App: e.App, ClientID: e.ClientID, Refused: true}
			a[:asked].close(context.WithoutCancel(ctx), undo)
		}
	}()
	for _, m := range a {
		one := m.Report(ctx, e)
		if one.Exceeded {
			return one
		}
		d = d.and(one)
		asked++
	}
	agreed = true
	return d
}

// close reports e to all of them in order, also to those after one that panics.
func (a all) close(ctx context.Context, e Event) {
	if len(a) > 0 {
		defer a[1:].close(ctx, e)
		a[0].Report(ctx, e)
	}
}

// Idle reports whether all of them are idle.
func (a all) Idle() bool {
	for _, m := range a {
		if !idle(m) {
			return false
		}
	}
	return true
}

// idle reports whether m, which has no open connection, may be replaced by a new manager.
func idle(m RateLimitManager) bool {
	i, ok := m.(interface{ Idle() bool })
	return !ok || i.Idle()
}

// ErrTooManyClients is the error of a full [ClientLimits] that refuses a client. It wraps
// [ErrRateLimited].
var ErrTooManyClients = fmt.Errorf("%w: ClientLimits has no room for a new client", ErrRateLimited)

// These say in Result.Err and in the log which limit has refused.
var (
	errBucketEmpty = fmt.Errorf("%w: TokenBucket: too many new connections", ErrRateLimited)
	errTooManyOpen = fmt.Errorf("%w: OpenLimit: too many open connections", ErrRateLimited)
	errNoRate      = fmt.Errorf("%w: Bandwidth: BytesPerSecond is not set", ErrRateLimited)
)

// ClientLimits keeps one [RateLimitManager] per client. [NewClientLimits] makes one; the zero value
// refuses all. It is safe for concurrent use.
//
// A client is whatever the caller's text names: a user, or a network. Do not name a client by its
// IPv6 address: a client usually has a whole /64, and would have 2^64 limits. Name it by the /64,
// as the example does.
type ClientLimits struct {
	max      int
	newLimit func(client string) RateLimitManager

	// mu guards the fields below, and those of clientLimit. It is not held while a manager is called.
	mu      sync.Mutex
	clients map[string]*clientLimit // at most max
	quiet   list.List               // of *clientLimit without connections, the longest quiet first
}

// NewClientLimits returns a ClientLimits that remembers at most max clients (0 or less: none) and
// calls newLimit to make the manager of each. Method For calls newLimit for a client it does not
// remember, so perhaps several times for one client; one of the results is used. newLimit must be
// safe for concurrent use. If it returns nil the client has no limit. A nil newLimit refuses all.
//
// When max is reached, a new client replaces an idle one, which is forgotten. A client is idle if
// it has no open connection and its manager has no method Idle() bool, or Idle returns true.
// [TokenBucket], [Bandwidth] and [All] have that method, so being forgotten does not give back what
// a client has spent. If none of a small sample of clients is idle, the new client is refused with
// [ErrTooManyClients], although others may be idle.
func NewClientLimits(max int, newLimit func(client string) RateLimitManager) *ClientLimits {
	return &ClientLimits{max: max, newLimit: newLimit, clients: map[string]*clientLimit{}}
}

// For returns the manager of client, for [Conn.RateLimit]. It may be kept, or asked for again for
// each connection: the managers returned for one client share one state. A client is remembered
// from its first EventOpen. For returns nil if the client has no limit.
func (l *ClientLimits) For(client string) RateLimitManager {
	l.mu.Lock()
	c := l.clients[client]
	l.mu.Unlock()
	if c != nil {
		return c
	}
	if l.newLimit == nil {
		return new(OpenLimit) // which refuses all
	}
	limit := l.newLimit(client)
	if limit == nil {
		return nil
	}
	return &clientLimit{in: l, client: client, limit: limit}
}

// Len returns how many clients are remembered: those with open connections and those whose managers
// have not been forgotten yet. It never exceeds the max that NewClientLimits was given.
func (l *ClientLimits) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.clients)
}

// A clientLimit is what For returns: the remembered one of its client, or one that may become it.
type clientLimit struct {
	in     *ClientLimits
	client string
	limit  RateLimitManager

	// in.mu guards the fields below. Events of an open connection may read known without it: known
	// changes only while c has no open connection.
	known *clientLimit  // the remembered one, as of the last EventOpen
	open  int           // if known is c itself: open connections, which keep it from being forgotten
	quiet *list.Element // its place in in.quiet while open is 0
}

func (c *clientLimit) Report(ctx context.Context, e Event) Decision {
	switch e.Kind {
	case EventOpen:
		return c.reportOpen(ctx, e)
	case EventClose:
		defer c.in.leave(c.known)
	}
	return c.known.limit.Report(ctx, e)
}

func (c *clientLimit) reportOpen(ctx context.Context, e Event) (d Decision) {
	known := c.in.enter(c)
	if known == nil {
		return Decision{Exceeded: true, Err: ErrTooManyClients}
	}
	d.Exceeded = true
	defer func() { // also when it panics
		if d.Exceeded {
			c.in.leave(known)
		}
	}()
	return known.limit.Report(ctx, e)
}

// enter counts a connection of c's client and remembers c if the client is new. It returns the
// remembered clientLimit, or nil if there is no room.
func (l *ClientLimits) enter(c *clientLimit) *clientLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.clients[c.client] == nil {
		if len(l.clients) < l.max {
			l.clients[c.client] = c
		} else if !l.forgetOne() {
			return nil
		}
	}
	known := l.clients[c.client]
	if c.known != known {
		c.known = known
	}
	if known.quiet != nil {
		l.quiet.Remove(known.quiet)
		known.quiet = nil
	}
	known.open++
	return known
}

// leave counts a connection out.
func (l *ClientLimits) leave(known *clientLimit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if known == nil || known.open == 0 {
		panic("lbproxy: ClientLimits: EventClose without EventOpen")
	}
	if known.open--; known.open == 0 {
		known.quiet = l.quiet.PushBack(known)
	}
}

// forgetOne makes room and reports whether it could. The caller holds mu, which is released while a
// manager is asked. Eight clients are asked at most, so the cost is bounded; each goes to the back
// of the list first, so that the next call asks others.
func (l *ClientLimits) forgetOne() bool {
	for range 8 {
		if len(l.clients) < l.max {
			return true
		}
		place := l.quiet.Front()
		if place == nil {
			return false
		}
		l.quiet.MoveToBack(place)
		c := place.Value.(*clientLimit)
		if l.askIdle(c) && c.quiet == place { // and it has not been used meanwhile
			l.quiet.Remove(place)
			c.quiet = nil
			delete(l.clients, c.client)
			return true
		}
	}
	return false
}

func (l *ClientLimits) askIdle(c *clientLimit) bool {
	l.mu.Unlock()
	defer l.mu.Lock()
	return idle(c.limit)
}
