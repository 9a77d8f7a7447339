package lbproxy

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy/internal/proxyproto"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// An Upstream is a server that connections are forwarded to.
//
// A []Upstream may be decoded from JSON. The keys are the names of the fields, in upper or lower
// case: [{"addr": "10.0.0.1:80", "weight": 2}]. There is no key for TLS, which the program sets
// afterwards. Use [encoding/json.Decoder.DisallowUnknownFields], so that a misspelled key is an
// error.
type Upstream struct {
	// Addr is "host:port". It identifies the upstream and is unique within an app. A host name is
	// resolved at each dial.
	Addr string

	// Weight is the upstream's capacity relative to the others, at most a million. 0 means 1.
	Weight int

	// MaxConns is the most connections it gets at once, dials included. 0 means no bound.
	MaxConns int

	// Drain keeps new connections from it. Its open ones go on; it is still checked, counted and
	// shown.
	Drain bool

	// TLS, if set, makes the app speak TLS to the upstream; its Certificates prove the proxy to it.
	// An empty ServerName is taken from Addr, as in tls.Dial. A stream that the upstream ends
	// without close_notify counts as aborted. nil means plain TCP.
	TLS *tls.Config `json:"-"`

	// ProxyProtocol is the version, 1 or 2, of the PROXY protocol header that is sent to the upstream
	// first, before TLS and within the DialTimeout: it names the client's address and the one the
	// client connected to. 0 means none. Version 2 also tells the client's TLS version,
	// Conn.Verified and the certificate's common name, as HAProxy's send-proxy-v2-ssl-cn does, and
	// Conn.ClientID as type 0xE0, at most 1 KiB of it. Addresses of different families are sent as
	// UNKNOWN in version 1 and as IPv4-mapped IPv6 in version 2; addresses that are not TCP as
	// UNKNOWN and LOCAL, like those of a health check. The header is not counted in Sent.
	ProxyProtocol int
}

// check returns Addr's host, or the problem with u.
func (u *Upstream) check() (host, wrong string) {
	const maxWeight = 1_000_000 // (open+1)*weight must not overflow
	host, port, err := net.SplitHostPort(u.Addr)
	var addrErr *net.AddrError
	switch {
	case errors.As(err, &addrErr):
		return "", addrErr.Err + ": want host:port"
	case host == "":
		return "", "missing host: want host:port"
	case strings.ContainsFunc(host, unicode.IsSpace):
		return "", "a space in the host: want host:port"
	case strings.ContainsRune(host, '/'), strings.ContainsFunc(host, unicode.IsControl):
		return "", "a slash or a control character in the host: want host:port"
	case u.Weight < 0 || u.Weight > maxWeight:
		return "", fmt.Sprintf("Weight %d: want 0 (which means 1) to %d", u.Weight, maxWeight)
	case u.ProxyProtocol < 0 || u.ProxyProtocol > 2:
		return "", fmt.Sprintf("ProxyProtocol %d: want 1, 2, or 0 for none", u.ProxyProtocol)
	case u.MaxConns < 0:
		return "", fmt.Sprintf("MaxConns %d is negative: use 0 for no bound", u.MaxConns)
	}
	if n, err := net.LookupPort("tcp", port); strings.HasPrefix(port, "+") || err != nil || n == 0 {
		return "", fmt.Sprintf("port %q: want 1 to 65535 or the name of a service", port)
	}
	return host, ""
}

// An UpstreamState says whether an upstream gets connections.
type UpstreamState string

const (
	StateUp      UpstreamState = "up"      // it gets connections, unless it is full or draining
	StateCooling UpstreamState = "cooling" // a dial failed: skipped, then probed, see FailTimeout
	StateDown    UpstreamState = "down"    // its health checks failed: it gets no connection
)

// String returns the state's word.
func (s UpstreamState) String() string { return string(s) }

// An UpstreamChange is a change of one upstream: of its state, of [Upstream].Drain, or of the set
// it is in. A removed upstream counts as up, because its past failures no longer apply.
type UpstreamChange struct {
	App, Addr string
	From      UpstreamState // empty: it was added
	To        UpstreamState // equal to From if only Drain or Removed changed, or changes cancel out
	Drain     bool          // the current value, whether or not it changed
	Removed   bool          // likewise; connections may still be open on it
	Err       error         // why it is cooling or down; nil otherwise
	Time      time.Time     // of the change; of the last one, if several were merged
}

// LogValue implements [slog.LogValuer], so slog.Info("upstream", "", change) in an OnUpstream logs
// a change. The value is a group of app, upstream, from and to, and of drain, removed and err unless
// they are zero.
func (c UpstreamChange) LogValue() slog.Value {
	attrs := []slog.Attr{
		slog.String("app", c.App), slog.String("upstream", c.Addr),
		slog.String("from", string(c.From)), slog.String("to", string(c.To)),
	}
	if c.Drain {
		attrs = append(attrs, slog.Bool("drain", true))
	}
	if c.Removed {
		attrs = append(attrs, slog.Bool("removed", true))
	}
	if c.Err != nil {
		attrs = append(attrs, slog.String("err", c.Err.Error()))
	}
	return slog.GroupValue(attrs...)
}

// changes calls Options.OnUpstream for every change of an app's upstreams, one after the other, in
// the order of their Times. Nobody waits for the hook: while it runs, changes wait here, merged so
// that there is at most one for each Addr.
type changes struct {
	app *LBProxyApp

	mu      sync.Mutex // may be taken while balancer.mu is held; no other lock is taken under it
	waiting list.List  // of UpstreamChange, the oldest in front
	byAddr  map[string]*list.Element
	running bool // a goroutine is in run; it goes when nothing waits
}

// add queues ch and returns at once. It does nothing if c is nil.
func (c *changes) add(ch UpstreamChange) {
	if c == nil {
		return
	}
	ch.App = c.app.id
	c.mu.Lock()
	defer c.mu.Unlock()
	if older := c.byAddr[ch.Addr]; older != nil {
		ch.From = c.waiting.Remove(older).(UpstreamChange).From
	}
	c.byAddr[ch.Addr] = c.waiting.PushBack(ch)
	if !c.running {
		c.running = true
		go c.run()
	}
}

// run calls the hook until nothing waits. Close does not wait for it: a hook that blocks for ever
// must not keep an app from closing, and a hook may call Close.
func (c *changes) run() {
	finished := false
	defer func() {
		if finished {
			return
		}
		p := recover() // nil: the hook called runtime.Goexit
		go c.run()     // before logging, which may block
		c.app.logPanic("Options.OnUpstream", p, string(debug.Stack()))
	}()
	for ch, ok := c.next(); ok; ch, ok = c.next() {
		c.app.opts.OnUpstream(ch)
	}
	finished = true
}

// next takes the oldest change. If there is none, the goroutine that asks must end.
func (c *changes) next() (ch UpstreamChange, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	front := c.waiting.Front()
	if front == nil {
		c.running = false
		return ch, false
	}
	ch = c.waiting.Remove(front).(UpstreamChange)
	delete(c.byAddr, ch.Addr)
	return ch, true
}

// An upstream is one server as the balancer sees it.
type upstream struct {
	// What before compares comes first, so that it shares a cache line. refresh derives rank and
	// load from the other fields.
	rank  rank
	phase phase
	load  float64   // (open + 1 + bias) / Weight
	order int       // among equals: its index, counted from the app's place among its peers
	until time.Time // cooling, ready, onTrial: when the cooling ends or ended

	conf      *Upstream // as configured; replaced whole, never changed
	index     int       // in the configured slice
	heapIndex int       // in balancer.heap; -1: removed from the set
	bias      float64   // Peers.Bias

	open        int           // connections counted on it, dials included
	dialing     int           // of those: not settled yet
	coolingElem *list.Element // cooling: its element of balancer.cooling

	// slowStart is set when an upstream is found working again, by a trial or by health checks.
	// While it is, the upstream gets at most every second connection. It ends when another
	// upstream that is up and not in slow start itself is as little loaded.
	slowStart bool

	since    time.Time               // when its State began
	err      error                   // why it is not up
	lost     context.Context         // ended by markDown; nil until a connection needs it
	lose     context.CancelCauseFunc // ends lost
	total    uint64
	failed   uint64
	sent     atomic.Uint64
	received atomic.Uint64
}

type phase uint8

const (
	up phase = iota
	cooling
	ready
	onTrial
	down
)

// state is the phase as users see it: they need not know how a cooling upstream is tried again.
func (p phase) state() UpstreamState {
	switch p {
	case up:
		return StateUp
	case down:
		return StateDown
	}
	return StateCooling
}

type rank uint8

const (
	eligible rank = iota
	lastResort
	never
)

// refresh derives u's rank and load after a change of anything they depend on.
//
// The quotient of floats orders loads exactly: two fractions of connections below 2^31 and
// weights up to a million differ by more than a rounding error, and equal ones round alike.
func (u *upstream) refresh() {
	u.load = (float64(u.open+1) + u.bias) / float64(u.conf.Weight)
	switch {
	case u.conf.Drain, u.phase == down, u.conf.MaxConns > 0 && u.open >= u.conf.MaxConns:
		u.rank = never
	case u.phase == up, u.phase == ready:
		u.rank = eligible
	default:
		u.rank = lastResort
	}
}

// before orders the heap: by rank, then by load, then by order. Among last resorts the upstream
// that failed longest ago comes first: it is the most likely to be back, and those that a
// connection has just tried are out of its way.
func (u *upstream) before(v *upstream) bool {
	switch {
	case u.rank != v.rank:
		return u.rank < v.rank
	case u.rank == lastResort && !u.until.Equal(v.until):
		return u.until.Before(v.until)
	case u.load != v.load:
		return u.load < v.load
	}
	return u.order < v.order
}

func (u *upstream) stats() UpstreamStats {
	return UpstreamStats{
		Addr: u.conf.Addr, Weight: u.conf.Weight, Open: u.open, Total: u.total, Failed: u.failed,
		Sent: u.sent.Load(), Received: u.received.Load(), State: u.phase.state(), Since: u.since,
		Err: u.err, Drain: u.conf.Drain, Removed: u.heapIndex < 0,
	}
}

// upstreamHeap implements heap.Interface. The heap package only reorders it.
type upstreamHeap []*upstream

func (h upstreamHeap) Len() int           { return len(h) }
func (h upstreamHeap) Less(i, j int) bool { return h[i].before(h[j]) }
func (h upstreamHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIndex, h[j].heapIndex = i, j
}
func (h upstreamHeap) Push(any) { panic("unused") }
func (h upstreamHeap) Pop() any { panic("unused") }

// A noUpstream is an ErrNoUpstream that says why no upstream was available.
type noUpstream struct{ full, down, draining int }

func (e *noUpstream) Error() string {
	var why []string
	for _, c := range []struct {
		n    int
		what string
	}{{e.full, "full"}, {e.down, "down"}, {e.draining, "draining"}} {
		if c.n > 0 {
			why = append(why, fmt.Sprint(c.n, " ", c.what))
		}
	}
	return ErrNoUpstream.Error() + ": " + strings.Join(why, ", ")
}

func (e *noUpstream) Is(target error) bool { return target == ErrNoUpstream }

// errUpstreamDown ends dials to an upstream that is found down, and with Options.CloseOnDown its
// connections.
var errUpstreamDown = errors.New("health checks found the upstream down")

// A verdict is the result of a dial for its upstream.
type verdict uint8

const (
	unknown verdict = iota // the dial failed for a reason that is not the upstream's
	works
	fails
)

// ourFault reports whether a dial's error says nothing about the upstream.
func ourFault(err error) bool {
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, context.Canceled) || exhausted(err)
}

// exhausted reports whether a dial failed because this machine has run out of something, so that
// the next dial would fail, too.
//
// A *net.DNSError keeps only the text of what the resolver met, and the C library answers even "no
// such host" when it cannot open its files. So after a failed lookup, whatever it says, what counts
// is whether a descriptor can be had now.
func exhausted(err error) bool {
	for _, errno := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
		syscall.ENOSPC, // from epoll: see max_user_watches, epoll(7)
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	var lookup *net.DNSError
	if !errors.As(err, &lookup) {
		return false
	}
	f, err := os.Open(os.DevNull)
	if err == nil {
		f.Close()
	}
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// Dial connects to u as the default health check does: it dials Addr, sends a PROXY header that
// names no client (LOCAL, or UNKNOWN in version 1) if u.ProxyProtocol is set, performs a TLS
// handshake if u.TLS is set, and returns the connection, which the caller must close. ctx bounds
// all of it. It is for a [HealthCheck].Check that speaks the upstream's protocol.
//
// Dial knows no app: it uses a zero [net.Dialer], where the default check uses
// [Options].DialContext.
func (u Upstream) Dial(ctx context.Context) (net.Conn, error) {
	if u.TLS != nil && u.TLS.ServerName == "" { // u did not come from an app
		host, _, err := net.SplitHostPort(u.Addr)
		if err != nil {
			return nil, err
		}
		u.TLS = u.TLS.Clone()
		u.TLS.ServerName = host
	}
	return u.dial(ctx, new(net.Dialer).DialContext, nil)
}

// dial connects to u through dialContext, sends the PROXY header for client (nil: a health check),
// and speaks TLS, as far as that is configured.
func (u *Upstream) dial(ctx context.Context,
	dialContext func(ctx context.Context, network, addr string) (net.Conn, error), client *Conn,
) (c net.Conn, err error) {
	raw, err := dialContext(ctx, "tcp", u.Addr)
	switch {
	case err != nil:
		return nil, err // raw may be a nil pointer in a non-nil interface
	case raw == nil:
		return nil, errNilDialed
	}
	defer func() {
		if c == nil { // the header or the handshake failed, or a hook in u.TLS panicked
			relay.Reset(raw)
		}
	}()
	if u.ProxyProtocol > 0 {
		if err := u.sendProxyHeader(ctx, raw, client); err != nil {
			return nil, fmt.Errorf("PROXY header: %w", err)
		}
	}
	if u.TLS == nil {
		return raw, nil
	}
	t := relay.TLSClient(raw, u.TLS)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return t, nil
}

// sendProxyHeader writes the PROXY protocol header for client to c. It is given up when ctx ends.
func (u *Upstream) sendProxyHeader(ctx context.Context, c net.Conn, client *Conn) error {
	stop := context.AfterFunc(ctx, func() { c.SetWriteDeadline(time.Unix(1, 0)) })
	_, err := c.Write(proxyHeader(u.ProxyProtocol, client))
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// proxyHeader returns the header for client; nil means that there is none, as in a health check.
func proxyHeader(version int, client *Conn) []byte {
	h := proxyproto.Header{Local: true}
	if client != nil {
		h = client.proxyHeader()
	}
	if version == 1 {
		return h.AppendV1(nil)
	}
	return h.AppendV2(nil)
}

// finding is a session's search for an upstream that answers.
type finding struct {
	search search
	pick   pick      // the upstream that is being tried; the zero pick: none
	began  time.Time // to try it
	errs   []error   // of those that were
	none   error     // why there is no other

	dialing // for a session on a loop
}

// connect finds an upstream that answers.
func (s *session) connect() (net.Conn, *ending) {
	if s.finding == nil {
		s.finding = new(finding)
	}
	f := s.finding
	for f.pick.u != nil || s.choose(f) {
		server, err := s.dial(f.pick)
		if err == nil {
			s.connected(f)
			return server, nil
		}
		if !s.next(f, err) {
			break
		}
	}
	return nil, f.ending()
}

// choose picks the next upstream to try. It returns false if there is none, or s is over.
func (s *session) choose(f *finding) bool {
	if s.over() {
		return false
	}
	f.began = time.Now()
	f.pick, f.none = s.app.balancer.acquire(&f.search, f.began)
	if f.none != nil {
		return false
	}
	s.upstream = f.pick.u
	s.attempts++
	s.setState(ConnDialing, f.pick.conf.Addr)
	return true
}

// connected notes that the pick of f has answered.
func (s *session) connected(f *finding) {
	p, now := f.pick, time.Now()
	s.dialTime = now.Sub(f.began)
	worksAgain := s.app.balancer.settle(p.u, works, nil, now)
	s.finding = nil
	s.setState(ConnOpen, p.conf.Addr)
	if worksAgain {
		s.app.log(slog.LevelInfo, "lbproxy: upstream works again", slog.String("upstream", p.conf.Addr))
	}
	if s.app.opts.CloseOnDown && p.lost != nil {
		s.unlost = after(p.lost, func() {
			s.conn.abort(&ending{EndUpstreamError, context.Cause(p.lost)})
		})
	}
}

// next gives back the pick of f, whose dial has failed. It returns false if no other need be tried.
func (s *session) next(f *finding, err error) bool {
	p := f.pick
	v, err := s.judge(p, err)
	wasUp := s.app.balancer.settle(p.u, v, err, time.Now())
	f.pick, s.upstream = pick{}, nil
	s.app.balancer.release(p.u)
	if wasUp {
		s.app.log(slog.LevelWarn, "lbproxy: upstream failed and is skipped",
			slog.String("upstream", p.conf.Addr), slog.Duration("for", s.app.balancer.failTimeout),
			slog.String("err", err.Error()))
	}
	f.errs = append(f.errs, &DialError{App: s.app.id, Addr: p.conf.Addr, Err: err})
	f.search.add(p.u)
	return !exhausted(err)
}

// endFinding settles what a search that nobody goes on with owes, if there is one.
func (s *session) endFinding() {
	f := s.finding
	if f == nil {
		return
	}
	f.resolving.Wait()
	f.endWatch()
	if f.pick.u != nil {
		s.app.balancer.settle(f.pick.u, unknown, nil, time.Now())
	}
	s.finding = nil
}

// ending is how a session ends for which no upstream was found.
func (f *finding) ending() *ending {
	isNotDown := func(err error) bool { return !errors.Is(err, errUpstreamDown) }
	switch {
	case f.errs == nil:
		return &ending{EndNoUpstream, f.none}
	case !slices.ContainsFunc(f.errs, isNotDown): // health checks found all of them down meanwhile
		return &ending{EndNoUpstream, errors.Join(append([]error{f.none}, f.errs...)...)}
	}
	return &ending{EndDialFailed, errors.Join(f.errs...)}
}

// dial tries p once.
func (s *session) dial(p pick) (net.Conn, error) {
	ctx, cancel := s.dialContext()
	defer cancel()
	if p.lost != nil {
		defer context.AfterFunc(p.lost, cancel)()
	}
	return p.conf.dial(ctx, s.app.opts.DialContext, s.conn)
}

// judge returns the verdict of a dial to p that failed with err, and the error to report. A dial
// that was given up since s is over, or p was found down, has no verdict.
func (s *session) judge(p pick, err error) (verdict, error) {
	switch {
	case p.lost != nil && p.lost.Err() != nil:
		return unknown, context.Cause(p.lost)
	case ourFault(err), s.over():
		return unknown, err
	}
	return fails, err
}

// dialContext returns the context of a dial, which ends when the session is over.
func (s *session) dialContext() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), s.app.opts.DialTimeout)
	s.conn.mu.Lock()
	s.undial = cancel
	over := s.isOver
	s.conn.mu.Unlock()
	if over {
		cancel()
	}
	return ctx, cancel
}

// Peers describes other apps, in other processes, that spread connections over the same upstreams.
// The zero Peers means that there are none.
type Peers struct {
	// Index and Count say that the app is number Index, from 0, of Count. Among equally loaded
	// upstreams it prefers those from len(upstreams)*Index/Count on, wrapping around; an app
	// alone (Count 0 or 1) prefers the first. Without it, many apps with few connections each
	// would all choose the first upstreams.
	Index, Count int

	// Bias adds to the open connections of an upstream, named by its Addr, when one is chosen. It
	// changes neither Stats nor MaxConns. It corrects a lasting imbalance that the app's own
	// connections do not show. Do not put the others' open connections here: those counts come
	// late, and every app would then choose the same upstream. A missing Addr means 0. An Addr
	// without an upstream has no effect until there is one.
	Bias map[string]float64
}

// SetPeers tells the app of its peers, in place of an earlier call; an app begins without peers.
// The Bias is copied, and SetUpstreams keeps it. It may be called often: with 10,000 upstreams it
// takes about a millisecond. If Index is not below Count, or a Bias is negative or not a number, it
// returns an error and changes nothing.
func (a *LBProxyApp) SetPeers(p Peers) error {
	if p.Count < 0 {
		return fmt.Errorf("lbproxy: app %q: Peers.Count %d is negative: "+
			"use 0 for no peers", a.id, p.Count)
	}
	if most := max(p.Count, 1) - 1; p.Index < 0 || p.Index > most {
		return fmt.Errorf("lbproxy: app %q: Peers.Index %d: "+
			"want 0 to %d, as Count is %d", a.id, p.Index, most, p.Count)
	}
	for addr, bias := range p.Bias {
		if !(bias >= 0) { // NaN included
			return fmt.Errorf("lbproxy: app %q: Peers.Bias[%q] %v: "+
				"want 0 or more connections", a.id, addr, bias)
		}
	}
	a.balancer.setPeers(p)
	return nil
}

// first is n*Index/Count, for n upstreams, without overflow.
func (p Peers) first(n int) int {
	if p.Count <= 1 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(p.Index))
	first, _ := bits.Div64(hi, lo, uint64(p.Count))
	return int(first)
}
