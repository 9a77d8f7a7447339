package lbproxy

import (
	"container/list"
	"context"
	"math"
	"math/bits"
	"sync"
	"time"
)

// A RateLimitManager is told what connections do and answers whether a rate has been exceeded. Its scope is
// whatever the caller makes it by choosing which instance goes into which [Conn]: one client, one app, everything.
// It must be safe for concurrent use.
//
// EventOpen comes before anything is dialled. An open that is let in is followed by exactly one EventClose, whatever
// happens; one that is refused is followed by nothing and must not cost anything. EventData comes after the bytes
// were moved, for at most 1 MiB at a time; waiting then is backpressure. Report runs in the connection's own
// goroutines and may block; ctx ends with the connection, but for an EventClose it does not. A manager that depends
// on something that can fail, such as a store, chooses for itself whether to let things go on then. A panic ends the
// connection, not its accounting. A manager that [ClientLimits] keeps should have a method Idle() bool if it remembers
// more than open connections.
type RateLimitManager interface {
	Report(ctx context.Context, e Event) Decision
}

// An Event is one thing a connection did.
type Event struct {
	Kind      EventKind
	App       string    // the app's id
	ClientID  string    // as given in Conn
	Direction Direction // EventData only
	Bytes     int64     // EventData only: how many were moved, at most 1 MiB

	// Refused is set on an EventClose that takes back an open which this manager let in and another one,
	// asked later by All, refused: the connection never was. What the open cost is to be given back.
	Refused bool
}

// An EventKind says what an [Event] is about.
type EventKind int

const (
	EventOpen  EventKind = iota + 1 // a connection asks to be served
	EventData                       // bytes were moved
	EventClose                      // a connection that had been let in is over
)

// A Direction says which way bytes went.
type Direction int

const (
	Upload   Direction = iota + 1 // client to upstream
	Download                      // upstream to client
)

// A Decision is the answer to an [Event]. The zero Decision lets things go on. The answer to an EventClose is ignored.
type Decision struct {
	Exceeded bool          // EventOpen: refuse the connection; EventData: cut it
	Wait     time.Duration // otherwise: hold the connection (EventData: this direction of it) so long first
	Chunk    int           // most bytes to move at once next
}

// A TokenBucket limits how often connections open: Burst at once, then one more each Every. It refuses what
// exceeds that and never makes anything wait. The zero value refuses all. The fields must not change once it
// is in use. It is safe for concurrent use.
type TokenBucket struct {
	Burst int           // most openings at once; 0 or less refuses all
	Every time.Duration // time in which one opening is regained; 0 or less: none ever is

	mu    sync.Mutex
	spent int       // openings not yet regained
	since time.Time // when the one to be regained next was begun
}

// Report implements [RateLimitManager].
func (b *TokenBucket) Report(_ context.Context, e Event) Decision {
	switch {
	case e.Kind == EventOpen:
		return Decision{Exceeded: !b.take(time.Now())}
	case e.Kind == EventClose && e.Refused:
		b.giveBack()
	}
	return Decision{}
}

// Idle reports whether the bucket is full, so that a new one would serve as well. [ClientLimits] asks.
func (b *TokenBucket) Idle() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.regain(time.Now())
	return b.spent == 0
}

func (b *TokenBucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.regain(now)
	if b.spent >= b.Burst {
		return false
	}
	if b.spent == 0 {
		b.since = now
	}
	b.spent++
	return true
}

// regain counts whole openings, so it is exact and nothing overflows: whole*Every never exceeds the time passed.
func (b *TokenBucket) regain(now time.Time) {
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

// An OpenLimit limits how many connections are open at once. The zero value refuses all. Max must not change
// once it is in use. It is safe for concurrent use.
type OpenLimit struct {
	Max int // most connections at once; 0 or less refuses all

	mu   sync.Mutex
	open int
}

// Report implements [RateLimitManager]. It panics on an EventClose that no EventOpen came before.
func (l *OpenLimit) Report(_ context.Context, e Event) Decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch e.Kind {
	case EventOpen:
		if l.open >= l.Max {
			return Decision{Exceeded: true}
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

// Bandwidth limits bytes per second, both directions and all connections that share it taken together. It
// throttles by Wait and rejects nothing, but for the zero value, which has no rate to let anything through at
// and refuses all. The fields must not change once it is in use. It is safe for concurrent use.
type Bandwidth struct {
	BytesPerSecond int64 // 0 or less refuses all
	Burst          int64 // bytes that may go unthrottled after a rest; 0 or less means none

	mu   sync.Mutex
	paid time.Time // when the bytes moved so far are paid for, at BytesPerSecond …
	owed uint64    // … and so many BytesPerSecond-ths of a nanosecond: exact, however small the pieces
}

// Report implements [RateLimitManager].
func (b *Bandwidth) Report(_ context.Context, e Event) Decision {
	switch {
	case e.Kind == EventOpen && b.BytesPerSecond <= 0:
		return Decision{Exceeded: true}
	case e.Kind == EventData:
		return Decision{Wait: b.take(time.Now(), e.Bytes)}
	}
	return Decision{}
}

// Idle reports whether everything moved is paid for, so that a new one would serve as well. [ClientLimits] asks.
func (b *Bandwidth) Idle() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.paid.After(time.Now())
}

// take returns how long to hold on after n bytes were moved.
func (b *Bandwidth) take(now time.Time, n int64) time.Duration {
	if n <= 0 || b.BytesPerSecond <= 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.paid.Before(now) {
		b.paid, b.owed = now, 0
	}
	cost, owed := nanoseconds(n, b.BytesPerSecond)
	if b.owed += owed; b.owed >= uint64(b.BytesPerSecond) {
		b.owed -= uint64(b.BytesPerSecond)
		cost++
	}
	// A debt of more than a hundred years is as good as for ever, and leaves room to add to it.
	const forever = 100 * 365 * 24 * time.Hour
	b.paid = b.paid.Add(min(cost, forever-min(b.paid.Sub(now), forever)))
	free, _ := nanoseconds(max(b.Burst, 0), b.BytesPerSecond)
	return max(b.paid.Sub(now)-free, 0)
}

// nanoseconds returns how long n bytes take at rate: whole nanoseconds, saturating, and what remains in rate-ths of one.
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

// All returns a manager that lets an open in only if every one of managers does, asked in order: when one
// refuses, those asked before it are told so at once by an EventClose with Refused set. Data is cut when any
// one says so. Of several waits the longest counts. A nil manager sets no limit.
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
		one := m.Report(ctx, e)
		d.Exceeded, d.Wait = d.Exceeded || one.Exceeded, max(d.Wait, one.Wait)
	}
	return d
}

func (a all) open(ctx context.Context, e Event) (d Decision) {
	asked, agreed := 0, false
	defer func() { // also when one of them panics
		if !agreed {
			a[:asked].close(context.WithoutCancel(ctx), Event{Kind: EventClose, App: e.App, ClientID: e.ClientID, Refused: true})
		}
	}()
	for _, m := range a {
		one := m.Report(ctx, e)
		if one.Exceeded {
			return one
		}
		d.Wait = max(d.Wait, one.Wait)
		asked++
	}
	agreed = true
	return d
}

// close tells all of them in order, also those after one that panics.
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

// idle reports whether m, none of whose connections is open, may be replaced by a new one.
func idle(m RateLimitManager) bool {
	i, ok := m.(interface{ Idle() bool })
	return !ok || i.Idle()
}

// ClientLimits keeps one [RateLimitManager] per client. It is made by [NewClientLimits]; the zero value refuses all. It
// is safe for concurrent use.
type ClientLimits struct {
	max      int
	newLimit func(client string) RateLimitManager

	mu      sync.Mutex
	clients map[string]*clientLimit // at most max
	quiet   list.List               // of *clientLimit: those with nothing open
}

// NewClientLimits returns a ClientLimits that has newLimit make a manager for each client and remembers at most
// max clients (0 or less: none). For calls newLimit for each client that is not remembered, so perhaps more than
// once for a client, of whose managers then one is used. newLimit must be safe for concurrent use; nil from it
// means no limit for that client, nil in place of it refuses all.
//
// When max is reached, an idle client is forgotten to make room: one that has no connection open and whose
// manager, if it has a method Idle() bool, returns true. [TokenBucket], [Bandwidth] and [All] have that method, so
// what a client has spent is not regained by being forgotten. When a few clients have been looked at and none is
// idle, the newcomer is refused.
func NewClientLimits(max int, newLimit func(client string) RateLimitManager) *ClientLimits {
	return &ClientLimits{max: max, newLimit: newLimit, clients: map[string]*clientLimit{}}
}

// For returns the manager of client, for [Conn.RateLimit]. It may be kept, or asked for anew for each connection:
// all that For returns for one client acts as one. A client is remembered from its first EventOpen.
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

// A clientLimit is what For returns: the remembered one of its client, or one that may become it.
type clientLimit struct {
	in     *ClientLimits
	client string
	limit  RateLimitManager

	// The fields below belong to in.mu, but for known: it changes only when it has no connection open, so
	// events of an open one may read it.
	known *clientLimit  // the remembered one, as of the last EventOpen
	open  int           // known == itself: connections open; it is not forgotten while there are any
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
		return Decision{Exceeded: true}
	}
	d.Exceeded = true
	defer func() { // also when it panics
		if d.Exceeded {
			c.in.leave(known)
		}
	}()
	return known.limit.Report(ctx, e)
}

// enter counts a connection of c's client, remembering c if the client was unknown. It returns the remembered
// one, or nil if there is no room.
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

// forgetOne makes room and reports whether it could. The caller holds mu, which is released while a manager is
// asked. The cost is bounded: who has been asked stands at the back until the others were.
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
		if l.askIdle(c) && c.quiet == place { // it has not been used meanwhile
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
