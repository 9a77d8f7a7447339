//go:build linux

package soak

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

var (
	conns = flag.Uint64("conns", 0, "so many connections, of which every fifth is mTLS; "+
		"0: with -duration as many as it allows, else 1,000, with -short 300")
	duration = flag.Duration("duration", 0,
		"start no more connections after so long; 0: until all are done")
	inflight = flag.Int("inflight", 64, "connections at once")
	seed     = flag.Uint64("seed", 0, "repeat the plans of the run with this seed; 0: make one up")
)

func TestMain(m *testing.M) { proxytest.Main(m) }

// eventually reports whether ok is true within d. It looks a hundred times at least: on a busy
// machine d may be over before anything could happen.
func eventually(d time.Duration, ok func() bool) bool {
	late := time.Now().Add(d)
	for n := 0; !ok(); n++ {
		if n >= 100 && time.Now().After(late) {
			return false
		}
		time.Sleep(10 * time.Millisecond)
	}
	return true
}

// A run is one soak.
type run struct {
	seed     uint64
	total    uint64 // connections to make
	until    time.Time
	inflight int
	begun    time.Time
	black    string // where SYNs are not answered

	pki                                  *pki
	web, greeting, overTLS, slow, mortal []*server
	plain                                *plainFront
	mtls                                 *mtlsFront

	lag   lag
	drops atomic.Uint64 // droppedSegments, a second ago at most
	conns sync.Map      // of *conn by id: those that are not judged
	next  atomic.Uint64

	plainDone, mtlsDone, bytes, waited, lateOnes atomic.Uint64

	mu       sync.Mutex
	kinds    map[kind]uint64 // injected faults
	slowest  *conn
	grown    int64   // bytes in the heap after the last connection, more than before the first
	later    []*conn // to judge when no upstream can have them any more
	failures []string
}

const maxFailures = 20

// fail notes that something is wrong.
func (r *run) fail(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failures) < maxFailures {
		r.failures = append(r.failures, fmt.Sprintf(format, args...))
		fmt.Fprintf(os.Stderr, "soak: FAIL: %s\n", r.failures[len(r.failures)-1])
	}
}

func (r *run) hopeless() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failures) == maxFailures
}

// count notes that a fault was injected.
func (r *run) count(k kind) {
	r.mu.Lock()
	r.kinds[k]++
	r.mu.Unlock()
}

func (r *run) faults() (n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, of := range r.kinds {
		n += of
	}
	return n
}

// find returns connection id, or nil if there is no such one now.
func (r *run) find(id uint64) *conn {
	c, _ := r.conns.Load(id)
	found, _ := c.(*conn)
	return found
}

// report takes note of the outcome that a front has for a client's connection.
func (r *run) report(client string, o outcome) {
	addr, err := net.ResolveTCPAddr("tcp", client)
	if err != nil {
		r.fail("an outcome for the address %q: %v", client, err)
		return
	}
	id, ok := idOf(addr)
	if !ok {
		return
	}
	c := r.find(id)
	if c == nil {
		r.fail("connection %d is not there, or no more, and its end was %q", id, o.end)
		return
	}
	if n := c.results.Add(1); n > 1 {
		r.fail("connection %d, %v: has its result number %d, %+v", id, c.plan, n, o)
		return
	}
	c.outcome <- o
}

func newRun(t testing.TB, total uint64, black string) *run {
	r := &run{
		seed: *seed, total: total, inflight: *inflight, kinds: map[kind]uint64{}, pki: newPKI(t),
		black: black,
	}
	for r.seed == 0 {
		r.seed = rand.Uint64()
	}
	start := func(n int, change func(*server)) (all []*server) {
		for range n {
			all = append(all, newServer(t, r, change))
		}
		return all
	}
	r.web = start(4, nil)
	r.greeting = start(2, func(s *server) { s.greets = true })
	overTLS := &tls.Config{Certificates: []tls.Certificate{r.pki.server}}
	r.overTLS = start(2, func(s *server) { s.tls = overTLS })
	r.slow = start(2, func(s *server) { s.slow = true })
	r.mortal = start(3, nil)
	r.plain, r.mtls = newPlainFront(t, r), newMTLSFront(t, r)
	return r
}

func (r *run) servers() []*server {
	return slices.Concat(r.web, r.greeting, r.overTLS, r.slow, r.mortal)
}

func TestSoak(t *testing.T) {
	total := uint64(1000)
	switch {
	case *conns > 0:
		total = *conns
	case *duration > 0:
		total = 1<<22 - 1000 // almost as many as have addresses of their own
	case testing.Short():
		total = 300
	}
	black := proxytest.BlackHole(t)
	bare := settled()
	r := newRun(t, total, black)
	resting := settled()
	streamOf(0, 0).At(0, 1) // makes the bytes that all streams are cut from
	heap := proxytest.HeapInUse()
	t.Logf("seed %d", r.seed)
	fmt.Fprintf(os.Stderr, "soak: seed %d\n", r.seed)

	r.begun = time.Now()
	if *duration > 0 {
		r.until = r.begun.Add(*duration)
	}
	stop := make(chan struct{})
	var aside sync.WaitGroup
	every := func(d time.Duration, f func(round int)) {
		aside.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-stop:
					return
				case <-time.After(d):
					f(round)
				}
			}
		})
	}
	aside.Go(func() { r.lag.watch(stop) })
	r.drops.Store(droppedSegments())
	every(time.Second, func(int) { r.drops.Store(droppedSegments()) })
	every(50*time.Millisecond, func(int) { r.plain.reshuffle() })
	every(100*time.Millisecond, r.mtls.reload)
	every(60*time.Millisecond, r.killOne)
	every(20*time.Millisecond, func(int) { r.plain.look() })
	every(5*time.Second, func(int) {
		r.judgeLater(time.Now().Add(-2 * giveUp)) // an upstream that had one of them has given it up
		r.progress()
	})

	var workers sync.WaitGroup
	for range r.inflight {
		workers.Go(r.work)
	}
	workers.Wait()
	r.roomAgain()
	last := time.Now()
	close(stop)
	aside.Wait()

	// Everything has to be as it was before the first connection.
	var wrong faults
	asBefore := func(before map[string]int) func() bool {
		return func() bool {
			wrong = r.plain.settled()
			for what, n := range inventory() {
				if n != before[what] {
					wrong.add("%d %s, want %d as before", n, what, before[what])
				}
			}
			return len(wrong) == 0
		}
	}
	if eventually(5*time.Second, asBefore(resting)) {
		r.judgeLater(time.Now()) // nobody can have them any more
	} else {
		r.fail("%v after the last connection: %s", time.Since(last).Round(time.Millisecond),
			strings.Join(wrong, "; "))
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	}
	took := time.Since(last)
	r.grown = proxytest.HeapInUse() - heap
	// The heap would grow by anything kept of each connection. Of mTLS clients the server remembers
	// the addresses, up to a bound, in about 240 bytes each.
	most := 1<<20 + 20*int64(r.next.Load()) + 300*int64(min(r.mtlsDone.Load(), 2*16384))
	if r.grown > most {
		r.fail("the heap has %d bytes more than before the first connection, want at most %d",
			r.grown, most)
	}
	r.mtls.stop()
	r.plain.stop()
	for _, s := range r.servers() {
		s.stop()
	}
	r.judgeLater(time.Now())
	r.conns.Range(func(id, _ any) bool {
		r.fail("connection %d was never judged", id)
		return true
	})
	if !eventually(5*time.Second, asBefore(bare)) {
		r.fail("after everything was closed: %s", strings.Join(wrong, "; "))
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	}
	r.figures(t, took)

	plain, mtls, faults := r.plainDone.Load(), r.mtlsDone.Load(), r.faults()
	if *duration == 0 && len(r.failures) == 0 && (plain+mtls < total || faults < total/5) {
		t.Errorf("%d plain and %d mTLS connections and %d faults, "+
			"want %d, and one fault to five of them", plain, mtls, faults, total)
	}
	for _, failure := range r.failures {
		t.Error(failure)
	}
	if t.Failed() {
		t.Logf("to repeat the plans: -seed %d", r.seed)
	}
}

// inventory counts what must be the same afterwards.
func inventory() map[string]int {
	return map[string]int{"goroutines": runtime.NumGoroutine(), "descriptors": proxytest.Descriptors()}
}

// settled returns the inventory when it no longer changes: goroutines that were begun have got to
// where they stay.
func settled() map[string]int {
	now := inventory()
	for same := 0; same < 20; same++ {
		time.Sleep(10 * time.Millisecond)
		if next := inventory(); !maps.Equal(now, next) {
			now, same = next, 0
		}
	}
	return now
}

// killOne kills an upstream, and brings it back a little later.
func (r *run) killOne(round int) {
	s := r.mortal[round%len(r.mortal)]
	s.kill()
	time.Sleep(20 * time.Millisecond)
	if err := s.start(); err != nil {
		r.fail("upstream %s cannot listen again: %v", s.addr, err)
	}
}

func (r *run) work() {
	for !r.hopeless() && (r.until.IsZero() || time.Now().Before(r.until)) {
		id := r.next.Add(1) - 1
		if id >= r.total {
			return
		}
		r.connect(newConn(newPlan(r.seed, id)))
	}
}

// roomAgain checks that those who were over a limit now and then are served when they are alone.
func (r *run) roomAgain() {
	for _, mtls := range []bool{false, true} {
		id := r.next.Add(1) - 1
		g := &generator{rand.New(rand.NewPCG(r.seed, id)), &plan{id: id, mtls: mtls, kind: someLimit}}
		g.fill()
		g.ends = g.ends[:1] // which is not that it was over its limit
		r.connect(newConn(g.plan))
	}
}

// connect is one connection, from its client's side, to its end.
func (r *run) connect(c *conn) {
	r.conns.Store(c.id, c)
	c.started, c.dropsBefore = time.Now(), r.drops.Load()
	r.client(c)
	c.ended = time.Now()
	if c.up.tcp != nil {
		c.up.tcp.Close()
	}
	close(c.clientDone)

	late := time.NewTimer(giveUp)
	defer late.Stop()
	var o outcome
	select {
	case o = <-c.outcome:
	case <-late.C:
		r.fail("connection %d, %v: the proxy never said how it ended", c.id, c.plan)
		return
	}
	sure := c.reach == surely || c.kind == someLimit && !o.limited()
	if !sure && !c.seen.Load() {
		c.outcome <- o // for judgeLater
		r.mu.Lock()
		r.later = append(r.later, c)
		r.mu.Unlock()
		return
	}
	select {
	case <-c.upstreamDone:
		r.judge(c, &o)
	case <-late.C:
		r.fail("connection %d, %v: not over at the upstream, or never seen there (%v): "+
			"the proxy says %+v", c.id, c.plan, c.seen.Load(), o)
		r.conns.Delete(c.id)
	}
}

// client connects and plays the client's part.
func (r *run) client(c *conn) {
	addr := r.plain.addrs[c.app]
	if c.mtls {
		addr = r.mtls.addrs[c.app]
	} else if useLoops() {
		c.abort = func(cause error) { r.plain.abort(c, cause) }
	}
	e := &c.up
	dialer := net.Dialer{Deadline: c.started.Add(giveUp), LocalAddr: addrOf(c.id)}
	var raw net.Conn
	for {
		if raw, e.readErr = dialer.Dial("tcp", addr); e.readErr == nil {
			break
		}
		if !errors.Is(e.readErr, syscall.EADDRNOTAVAIL) && !errors.Is(e.readErr, syscall.EMFILE) {
			return // reset so soon
		}
		r.waited.Add(1) // for a resource of this machine that the proxy does not use
		time.Sleep(20 * time.Millisecond)
	}
	e.tcp = raw.(*net.TCPConn)
	e.net = e.tcp
	e.tcp.SetDeadline(c.started.Add(giveUp))
	if c.kind == handshakeGone {
		e.tcp.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}[:c.id%11]) // how a ClientHello begins
		time.Sleep(time.Duration(c.id%3) * time.Millisecond)
		e.tcp.SetLinger(0)
		e.readErr = errReset // by the client itself
		return
	}
	if c.mtls {
		if e.readErr = e.overTLS(tls.Client, r.mtls.client(c)); e.readErr != nil {
			return
		}
	}
	if c.app == "greet" {
		hello := make([]byte, len(greeting))
		if _, e.readErr = io.ReadFull(e.net, hello); e.readErr != nil {
			return
		}
		if !slices.Equal(hello, greeting) {
			e.wrong = fmt.Sprintf("a greeting of %q", hello)
			return
		}
	}
	if _, e.writeErr = e.net.Write(header(r.seed, c.id)); e.writeErr != nil {
		for e.recv(1) { // until the error
		}
		return
	}
	e.play(c.client)
}

// judge takes note of a connection that is over.
func (r *run) judge(c *conn, o *outcome) {
	spare := r.lag.between(c.started, time.Now())
	if c.exact {
		c.drops = droppedSegments() - c.dropsBefore
	}
	if c.late = spare > 500*time.Millisecond; c.late {
		r.lateOnes.Add(1)
	}
	wrong := c.judge(o)
	if c.took() > patience+spare {
		wrong.add("it took %v, and the machine was busy elsewhere for no more than %v of that",
			c.took(), spare)
	}
	if c.kind == revoked {
		wrong = append(wrong, r.mtls.judge(c)...)
	}
	if len(wrong) > 0 {
		r.fail("connection %d, %v: %s", c.id, c.plan, strings.Join(wrong, "; "))
	}
	r.mu.Lock()
	if r.slowest == nil || c.took() > r.slowest.took() {
		r.slowest = c
	}
	r.mu.Unlock()
	if c.kind != normal && (c.kind != someLimit || o.limited()) {
		r.count(c.kind)
	}
	r.bytes.Add(uint64(c.up.got + c.down.got))
	if c.mtls {
		r.mtlsDone.Add(1)
	} else {
		r.plainDone.Add(1)
	}
	r.conns.Delete(c.id)
}

// judgeLater judges the connections that no upstream had seen, of those that ended before a time
// after which none can.
func (r *run) judgeLater(before time.Time) {
	r.mu.Lock()
	n := 0
	for n < len(r.later) && r.later[n].ended.Before(before) {
		n++
	}
	due := r.later[:n]
	r.later = r.later[n:]
	r.mu.Unlock()
	for _, c := range due {
		o := <-c.outcome
		r.judge(c, &o)
	}
	clear(due) // those that are still to come are in the same array
}

// progress prints a line.
func (r *run) progress() {
	r.mu.Lock()
	later, wrong := len(r.later), len(r.failures)
	r.mu.Unlock()
	fmt.Fprintf(os.Stderr, "soak: %4.0fs %d plain and %d mTLS connections, "+
		"%d more that no upstream has seen; %d faults, %d MiB checked, %d wrong\n",
		time.Since(r.begun).Seconds(), r.plainDone.Load(), r.mtlsDone.Load(), later,
		r.faults(), r.bytes.Load()>>20, wrong)
}

// figures prints what was done.
func (r *run) figures(t *testing.T, settled time.Duration) {
	var b strings.Builder
	row := func(name string, value any) { fmt.Fprintf(&b, "\n%-44s %v", name, value) }
	row("seed", r.seed)
	row("plain connections, every byte checked", r.plainDone.Load())
	row("mTLS connections, every byte checked", r.mtlsDone.Load())
	row("bytes checked, MiB", r.bytes.Load()>>20)
	row("failures", len(r.failures))
	row("faults injected", r.faults())
	for _, k := range slices.Sorted(maps.Keys(r.kinds)) {
		row("  "+string(k), r.kinds[k])
	}
	if c := r.slowest; c != nil {
		row("slowest connection",
			fmt.Sprintf("%v, %d: %v", c.took().Round(time.Millisecond), c.id, c.plan))
	}
	row("longest time this process was not run", r.lag.most.Round(time.Millisecond))
	row("connections that were held up by that", r.lateOnes.Load())
	row("waits for a port or descriptor of a client", r.waited.Load())
	row("counts exact after the last connection, in", settled.Round(time.Millisecond))
	row("heap then, more than before, KiB", r.grown>>10)
	row("took", time.Since(r.begun).Round(time.Millisecond))
	t.Log(b.String())
}
