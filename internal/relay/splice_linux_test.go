//go:build !lbproxy_portable

package relay

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// sendUrgent sends one byte out of band.
func sendUrgent(t *testing.T, c *net.TCPConn) {
	raw := rawTCP(c)
	var failed error
	err := raw.Write(func(fd uintptr) bool {
		failed = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil)
		return failed != syscall.EAGAIN
	})
	if err != nil || failed != nil {
		t.Error(err, failed)
	}
}

// Every byte except the urgent ones arrives.
func TestUrgentBytes(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct {
		name   string
		chunks []int // with an urgent byte between any two
		end    bool  // the stream ends behind the last
	}{
		{"at the start", []int{0, 5 * mib}, true},
		{"in the middle, and the end", []int{8 * mib, 100_000}, true},
		{"in the middle, and no end", []int{8 * mib, 100_000}, false},
		{"at the end", []int{8 * mib, 0}, true},
		{"twelve",
			[]int{3 * mib, 3 * mib, 3 * mib, 3 * mib, 3 * mib, 3 * mib, 3 * mib, 3 * mib,
				3 * mib, 3 * mib,
				3 * mib, 3 * mib, 5}, true},
	} {
		for _, side := range []Side{Client, Server} {
			// the reader begins when all is sent, or when the sender is stuck
			for _, slow := range []bool{false, true} {
				t.Run(row.name, func(t *testing.T) {
					client, server, h := join(t, nil)
					from, to := client, server
					if side == Server {
						from, to = server, client
					}
					var sent int64
					for _, n := range row.chunks {
						sent += int64(n)
					}
					begin := make(chan struct{})
					if !slow {
						close(begin)
					}
					var read atomic.Int64
					got := make(chan error, 1)
					go func() {
						<-begin
						b := make([]byte, 64<<10)
						for {
							n, err := to.Read(b)
							if wrong := pattern.Check(read.Load(), b[:n]); wrong != nil {
								err = wrong
							}
							if now := read.Add(int64(n)); err != nil || now == sent && !row.end {
								got <- err
								return
							}
						}
					}()
					if slow {
						time.AfterFunc(50*time.Millisecond, func() { close(begin) })
					}
					at := int64(0)
					for i, n := range row.chunks {
						// of two urgent bytes under way TCP turns the first into an ordinary
						// one
						if i > 1 {
							proxytest.Eventually(t, "all before has arrived", func() bool {
								return read.Load() == at
							})
						}
						if i > 0 {
							sendUrgent(t, from)
						}
						for end := at + int64(n); at < end; {
							n, err := from.Write(pattern.At(at, int(end-at)))
							if at += int64(n); err != nil {
								t.Fatal(err)
							}
						}
					}
					if row.end {
						from.CloseWrite()
					}
					want := map[bool]error{true: io.EOF}[row.end]
					if err := proxytest.Receive(t, "all has arrived", got); err != want ||
						read.Load() != sent {
						t.Errorf("%d of %d bytes, then %v", read.Load(), sent, err)
					}
					from.CloseWrite()
					to.CloseWrite()
					if o := h.wait(t); o.Err != nil {
						t.Errorf("%+v", o)
					}
				})
			}
		}
	}
}

// makeBlocking clears O_NONBLOCK of c, as callers do who need its descriptor for getsockopt.
func makeBlocking(t *testing.T, c *net.TCPConn) {
	f, err := c.File()
	proxytest.Must(t, err)
	defer f.Close()
	f.Fd()
	if !ask(rawTCP(c), BlocksFD) {
		t.Fatal("it does not block: what is this test for?")
	}
}

// A socket without O_NONBLOCK is never spliced, read or written in a way that blocks.
func TestBlockingSocketBlocksNobody(t *testing.T) {
	const size = 4 << 20
	for _, which := range []string{"client", "server", "both"} {
		for _, side := range []Side{Client, Server} {
			t.Run(which, func(t *testing.T) {
				t.Parallel()
				before := openPipes()
				client, ours := duplex(t)
				server, theirs := duplex(t)
				if which != "server" {
					makeBlocking(t, ours)
				}
				if which != "client" {
					makeBlocking(t, theirs)
				}
				h := newRecorder(nil)
				r := newEngine(t, Config{Idle: 2 * time.Second}).Start(ours, h, 0)
				r.Connect(theirs)
				from, to := client, server
				if side == Server {
					from, to = server, client
				}
				go pattern.Send(from, size)
				b := make([]byte, size)
				if _, err := io.ReadFull(to, b); err != nil || pattern.Check(0, b) != nil {
					t.Fatal(err, pattern.Check(0, b))
				}
				if n := pipesSince(before); n > 0 {
					t.Errorf("%d pipes are in use", n)
				}
				if o := h.wait(t); o.Err != errIdle { // both are silent
					t.Errorf("%+v", o)
				}
				if !r.up.noSplice && !r.down.noSplice {
					t.Error("splicing was not given up")
				}
			})
		}
	}
	t.Run("a reader that is stuck", func(t *testing.T) {
		_, ours := duplex(t)
		server, theirs := duplex(t)
		makeBlocking(t, ours)
		makeBlocking(t, theirs)
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(theirs)
		for b := make([]byte, 64<<10); ; {
			server.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := server.Write(b); err != nil {
				break
			}
		}
		aborted := make(chan struct{})
		go func() { r.Abort(io.ErrClosedPipe); close(aborted) }()
		proxytest.Receive(t, "Abort returns", aborted)
		h.wait(t)
	})
}

func TestPipesAreBoundedAndNoneIsLost(t *testing.T) {
	before := openPipes()
	var pool pipePool
	counted := func() int { // beside the timer that trims the pool
		pool.mu.Lock()
		defer pool.mu.Unlock()
		return pool.all
	}
	inUse := make([]*pipe, maxPipes)
	for range 2 { // once with new pipes, once with used ones
		for i := range inUse {
			if inUse[i] = pool.get(); inUse[i] == nil {
				t.Fatalf("no pipe when %d are in use", i)
			}
		}
		if pool.get() != nil {
			t.Errorf("more than %d pipes", maxPipes)
		}
		pool.drop(inUse[0]) // so another one may be made
		for _, p := range inUse[1:] {
			pool.put(p)
		}
	}
	pool.mu.Lock()
	pool.spare = len(pool.free)
	pool.mu.Unlock()
	pool.trim()
	if n := pipesSince(before); n != 0 || counted() != 0 {
		t.Errorf("trimmed: %d pipes are open, %d counted", n, counted())
	}
	pool.put(pool.get())
	pool.close()
	if n := pipesSince(before); n != 0 || counted() != 0 {
		t.Errorf("closed: %d pipes are open, %d counted", n, counted())
	}
}

func TestIdleRelaysHoldNoPipes(t *testing.T) {
	const size = 4 << 20
	e := newEngine(t, Config{})
	before := openPipes()
	used := false
	for range 20 {
		client, server, _, _ := joinOver(t, e, nil)
		go pattern.Send(client, size)
		if _, err := io.CopyN(io.Discard, struct{ io.Reader }{server}, size); err != nil {
			t.Fatal(err)
		}
		used = used || pipesSince(before) > 0
	}
	if !used {
		t.Error("nothing was spliced")
	}
	proxytest.Eventually(t, "no pipe is held", func() bool { return pipesSince(before) == 0 })
}

func TestEngineClosesItsPipes(t *testing.T) {
	before := openPipes()
	e := NewEngine(Config{})
	client, server, h, r := joinOver(t, e, nil)
	go pattern.Send(server, 64<<20)
	for pipesSince(before) == 0 { // until it counts as bulk
		if _, err := io.CopyN(io.Discard, struct{ io.Reader }{client}, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	r.Abort(nil)
	h.wait(t)
	e.Close()
	if n := pipesSince(before); n > 0 {
		t.Errorf("%d pipes are kept", n)
	}
}

// A relay that breaks while bulk is under way leaves no byte for the next one.
func TestBytesOfAnAbortedRelayReachNoOther(t *testing.T) {
	const size = 4 << 20
	e := newEngine(t, Config{})
	for range 3 {
		client, server, h, r := joinOver(t, e, nil)
		go pattern.Send(server, 16*size)
		io.CopyN(io.Discard, struct{ io.Reader }{client}, size)
		for last, now := int64(-1), int64(0); now != last; { // until it is stuck
			<-time.After(20 * time.Millisecond)
			last = now
			_, now = r.Counts()
		}
		client.SetLinger(0)
		client.Close()
		if o := h.wait(t); o.Failed != Client {
			t.Fatalf("%+v", o)
		}
		client, server, h, _ = joinOver(t, e, nil)
		go func() { pattern.Send(server, size); server.CloseWrite() }()
		if err := pattern.Exactly(client, size); err != nil {
			t.Fatal(err)
		}
		client.Close()
		h.wait(t)
	}
}

// A limit that does not slow a stream leaves it spliced, and hears of every chunk.
func TestVerdictsLeaveBulkSpliced(t *testing.T) {
	const size = 32 << 20
	before := openPipes()
	var most atomic.Int64
	e := newEngine(t, Config{})
	client, server, h, r := joinOver(t, e, func(_ Side, n int) Verdict {
		if int64(n) > most.Load() {
			most.Store(int64(n))
		}
		return Verdict{}
	})
	go func() { pattern.Send(server, size); server.CloseWrite() }()
	if err := pattern.Exactly(client, size); err != nil {
		t.Error(err)
	}
	if pipesSince(before) == 0 {
		t.Error("no pipe was used")
	}
	client.Close()
	h.wait(t)
	if most.Load() > maxChunk || most.Load() <= LargeBuffer || r.down.noSplice {
		t.Errorf("%d bytes at once, given up: %v", most.Load(), r.down.noSplice)
	}
}

// aboutToSplice returns a relay that has not started and whose download is to be spliced.
func aboutToSplice(t *testing.T) (client, server *net.TCPConn, r *Relay) {
	client, ours := duplex(t)
	server, theirs := duplex(t)
	r = newEngine(t, Config{}).New(ours, newRecorder(nil), 0)
	r.server = newEnd(theirs)
	r.down.from = &r.server
	r.down.fullReads = 2
	return client, server, r
}

// send waits until all of it has arrived.
func send(t *testing.T, c *net.TCPConn, n int) {
	c.Write(make([]byte, n))
	proxytest.Eventually(t, "all has come", func() bool { return unsent(rawTCP(c)) == 0 })
}

// A stream that comes in small pieces is cheaper to read and write.
func TestTwoSmallMovesEndSplicing(t *testing.T) {
	client, server, r := aboutToSplice(t)
	const small, large = LargeBuffer/4 - 1, LargeBuffer / 4
	for i, size := range []int{large, large, large, small, large, small, small} {
		if i > 0 && r.down.splicer == nil {
			t.Fatalf("splicing has ended before move %d", i)
		}
		send(t, server, size)
		if n, err1, err2 := r.down.move(); n != size || err1 != nil || err2 != nil {
			t.Fatalf("move %d of %d bytes: %d, %v, %v", i, size, n, err1, err2)
		}
		io.ReadFull(client, make([]byte, size))
	}
	if r.down.splicer != nil || r.down.noSplice {
		t.Errorf("splicing goes on, or was given up for ever: %v", r.down.noSplice)
	}
}

func TestSplicerWaitsWithoutAPipe(t *testing.T) {
	_, server, r := aboutToSplice(t)
	s := newSplicer(&r.down)
	fill := func() (ready bool) {
		control(r.server.raw, func(fd int) { ready = s.fillReady(uintptr(fd)) })
		return ready
	}
	if fill() || s.pipe != nil {
		t.Error("there is nothing to read, and it does not wait for that, or has a pipe")
	}
	send(t, server, 100)
	if !fill() || s.pipe == nil || s.n != 100 {
		t.Errorf("spliced %d bytes, want 100", s.n)
	}
	s.pipe.close()
}

func TestSpliceToAResetConnFails(t *testing.T) {
	client, server, r := aboutToSplice(t)
	client.SetLinger(0)
	client.Close()
	proxytest.Eventually(t, "it was reset", func() bool { return wasReset(rawTCP(r.client.conn)) })
	send(t, server, 1000)
	moved := make(chan error, 1)
	go func() {
		n, readErr, writeErr := r.down.move()
		if n != 0 || readErr != nil {
			t.Errorf("%d bytes were moved, %v", n, readErr)
		}
		moved <- writeErr
	}()
	if err := proxytest.Receive(t, "the move returns", moved); err == nil {
		t.Error("no error")
	}
}

// A socket's large moves take turns, and its small ones do not.
func TestLargeMovesOfASocketTakeTurns(t *testing.T) {
	defer lastSmall.Store(0)
	peer, c := duplex(t)
	go peer.Write(make([]byte, 1<<20))
	go io.Copy(io.Discard, peer)
	s := newSocket(c, rawTCP(c))
	for name, move := range map[string]func(n int){
		"read": func(n int) {
			s.n = n // of the last read, for which the next one is judged
			s.Read(make([]byte, 1))
		},
		"write": func(n int) { s.Write(make([]byte, n)) },
	} {
		for range cap(turns) {
			turns <- struct{}{}
		}
		moved := make(chan bool)
		go func() {
			lastSmall.Store(Clock())
			move(bulkChunk - 1)
			moved <- true
		}()
		proxytest.Receive(t, "a small "+name, moved)
		var stop atomic.Bool
		go func() {
			for !stop.Load() { // again if the goroutine was held for so long that none is recent
				lastSmall.Store(Clock())
				move(bulkChunk)
			}
			moved <- true
		}()
		proxytest.Eventually(t, "a large "+name+" waits for a turn", waitsForTurn)
		stop.Store(true)
		for range cap(turns) {
			giveTurn(true)
		}
		proxytest.Receive(t, "a large "+name, moved)
	}
}

func TestWasReset(t *testing.T) {
	peer, c := duplex(t)
	raw := rawTCP(c)
	check := func(when string, want bool) {
		t.Helper()
		if reset := wasReset(raw); reset != want {
			t.Errorf("%s: reset %v", when, reset)
		}
	}
	check("open", false)
	peer.SetLinger(0)
	peer.Close()
	c.Read(make([]byte, 1))
	check("reset", true)
	c.Close()
	check("closed", false)
	raw = nil
	check("not TCP", false)
}

func TestNothingIsUnsentAfterAReset(t *testing.T) {
	peer, c := duplex(t)
	e := newEnd(c)
	go c.Write(make([]byte, 64<<20)) // far more than the socket buffers hold
	proxytest.Eventually(t, "something is unsent", func() bool { return e.unsent() > 0 })
	peer.SetLinger(0)
	peer.Close()
	proxytest.Eventually(t, "it was reset", func() bool { return wasReset(rawTCP(c)) })
	if n := e.unsent(); n != 0 {
		t.Errorf("%d bytes are said to be on their way", n)
	}
	if n, err := newSocket(c, rawTCP(c)).Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("writing: %d, %v; want an error", n, err)
	}
}

// closeWrite fails as it does in package net.
func TestCloseWriteAfterTheEnd(t *testing.T) {
	peer, c := duplex(t)
	s := newSocket(c, rawTCP(c))
	peer.SetLinger(0)
	peer.Close()
	c.Read(make([]byte, 1)) // until it has been reset
	want := c.CloseWrite()
	if err := s.closeWrite(); !errors.Is(err, syscall.ENOTCONN) || err.Error() != want.Error() {
		t.Errorf("reset: %v, want %v", err, want)
	}
	c.Close()
	if err := s.closeWrite(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// After a write has met a reset, a read in the other direction returns io.EOF. Here the write
// returns late.
func TestResetSeenByAWriteIsNotAnEnd(t *testing.T) {
	client, ours := duplex(t)
	server, theirs := duplex(t)
	writing, release := make(chan struct{}), make(chan struct{})
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	r.Connect(&heldError{Conn: theirs, writing: writing, taken: make(chan struct{}),
		release: release})
	client.Write([]byte("x"))
	<-writing
	server.SetLinger(0)
	server.Close()
	proxytest.ReadReset(t, client)
	close(release)
	if o := h.wait(t); o.Failed != Server || o.Err != errReset {
		t.Errorf("%+v", o)
	}
}

type heldError struct {
	net.Conn
	writing, taken, release chan struct{}
}

func (c *heldError) Write(b []byte) (int, error) {
	close(c.writing)
	for !wasReset(rawTCP(c.Conn)) {
		runtime.Gosched()
	}
	n, err := c.Conn.Write(b)
	close(c.taken)
	<-c.release
	return n, err
}

func (c *heldError) Read(b []byte) (int, error) {
	<-c.taken
	return c.Conn.Read(b)
}

func (c *heldError) NetConn() net.Conn { return c.Conn }

func TestEndOfBothSidesIsNotAReset(t *testing.T) {
	client, ours := duplex(t)
	server, theirs := duplex(t)
	late := &lateWrite{TCPConn: theirs, writing: make(chan struct{}), goOn: make(chan struct{})}
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	r.Connect(late)
	client.Write([]byte("x"))
	client.CloseWrite()
	<-late.writing
	server.CloseWrite() // the download's end finds the upload writing
	go func() { io.Copy(io.Discard, server) }()
	time.AfterFunc(3*time.Millisecond, func() { close(late.goOn) })
	if b, err := io.ReadAll(client); err != nil {
		t.Errorf("client reads %q, %v; want the end", b, err)
	}
	if o := h.wait(t); o.Err != nil {
		t.Errorf("%+v", o)
	}
}

// The question whether a side was reset may be answered late: by then the write that it was about
// may have come back, and both sides may have ended their streams, which looks the same.
func TestLateAnswerIsNotTakenForAReset(t *testing.T) {
	client, ours := duplex(t)
	server, theirs := duplex(t)
	late := &lateWrite{TCPConn: theirs, writing: make(chan struct{}), goOn: make(chan struct{})}
	h := newRecorder(nil)
	r := newEngine(t, Config{}).New(ours, h, 0)
	go io.Copy(io.Discard, server)
	var once sync.Once
	var looked atomic.Bool
	r.server = newEnd(late)
	r.server.raw = &heldAnswer{r.server.raw, func() {
		once.Do(func() {
			close(late.goOn)
			proxytest.Eventually(t, "both sides have ended", func() bool {
				return r.up.phase.Load() == ended && wasReset(rawTCP(theirs))
			})
			looked.Store(true)
		})
	}}
	r.down.from = &r.server
	r.Start()
	client.Write([]byte("x"))
	client.CloseWrite()
	<-late.writing
	server.CloseWrite()
	r.engine.add(r)
	go r.down.run()
	if b, err := io.ReadAll(client); err != nil {
		t.Errorf("client reads %q, %v; want the end", b, err)
	}
	if o := h.wait(t); o.Err != nil || !looked.Load() {
		t.Errorf("%+v, looked: %v", o, looked.Load())
	}
}

// A heldAnswer is held before it is given.
type heldAnswer struct {
	syscall.RawConn
	hold func()
}

func (c *heldAnswer) Control(f func(uintptr)) error {
	c.hold()
	return c.RawConn.Control(f)
}

// A socket that both sides have ended looks reset. With a server that is no reason to end.
func TestLatePollIsNotTakenForAReset(t *testing.T) {
	client, ours := duplex(t)
	ours.CloseWrite()
	io.ReadAll(client)
	client.Close()
	io.ReadAll(ours)
	proxytest.Eventually(t, "it looks reset", func() bool { return wasReset(rawTCP(ours)) })
	h := newRecorder(nil)
	r := newEngine(t, Config{}).New(ours, h, 0)
	r.server = r.client // any
	if r.pollClient(); r.cause != nil {
		t.Errorf("it is over: %v", r.cause)
	}
}

// A lateWrite is a layer in whose first write something else happens.
type lateWrite struct {
	*net.TCPConn
	once          sync.Once
	writing, goOn chan struct{}
}

func (c *lateWrite) Write(b []byte) (int, error) {
	c.once.Do(func() { close(c.writing); <-c.goOn })
	return c.TCPConn.Write(b)
}

func (c *lateWrite) NetConn() net.Conn { return c.TCPConn }

// heapOf returns how many bytes each of 200 relays holds, without its conns, after wait.
func heapOf(t *testing.T, wait func(r *Relay, client, server, theirs *net.TCPConn)) int64 {
	const n = 201
	e := newEngine(t, Config{})
	var conns [n][4]*net.TCPConn
	for i := range conns {
		conns[i][0], conns[i][1] = duplex(t)
		conns[i][2], conns[i][3] = duplex(t)
	}
	relays, hs := make([]*Relay, n), make([]*recorder, n)
	for i := range hs {
		hs[i] = newRecorder(nil)
	}
	var spare sync.WaitGroup // leave records for the relays' goroutines
	begin := make(chan struct{})
	for range 4 * n {
		spare.Go(func() { <-begin })
	}
	close(begin)
	spare.Wait()
	before := int64(0)
	for i, c := range conns {
		if i == 1 { // the first allocates more
			before = proxytest.HeapInUse()
		}
		relays[i] = e.Start(c[1], hs[i], 0)
		wait(relays[i], c[0], c[2], c[3])
	}
	each := (proxytest.HeapInUse() - before) / (n - 1)
	for i, r := range relays {
		r.Abort(nil)
		if r.server.conn == nil {
			r.Connect(nil)
		}
		hs[i].wait(t)
	}
	return each
}

// A relay that waits for its server holds a small buffer if its client has sent something.
func TestRelayBeforeConnectHoldsASmallBuffer(t *testing.T) {
	each := heapOf(t, func(r *Relay, client, _, _ *net.TCPConn) {
		client.Write(make([]byte, 100))
		proxytest.Eventually(t, "it waits for its server", func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.changed != nil
		})
	})
	if each > 8000 { // under the race detector, whose pools drop buffers, about 6,200
		t.Errorf("each holds %d bytes, want at most 8 KB", each)
	}
}

// A goroutine begins with a stack of 2 KiB. Those of a relay need no larger one, even if the first
// bytes have to wait for the server.
func TestIdleRelaysHaveSmallStacks(t *testing.T) {
	inUse := func() int64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.StackInuse)
	}
	// New stacks are as large as the last garbage collection found the mean to need.
	stop := make(chan struct{})
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer close(stop)
	for range 1000 {
		waiting.Go(func() { <-stop })
	}
	runtime.GC()

	const n = 200
	e := newEngine(t, Config{})
	before := inUse()
	for range n {
		client, ours := duplex(t)
		server, theirs := duplex(t)
		r := e.Start(ours, newRecorder(nil), 0)
		t.Cleanup(func() { r.Abort(nil) })
		client.Write([]byte("x"))
		proxytest.Eventually(t, "it waits for its server", func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.changed != nil
		})
		r.Connect(theirs)
		for range 2 {
			io.ReadFull(server, make([]byte, 1))
			server.Write([]byte("x"))
			client, server = server, client
		}
	}
	most := int64(5 << 10)
	if proxytest.Race { // whose frames are larger
		most *= 4
	}
	if each := (inUse() - before) / n; each > most {
		t.Errorf("each has %d bytes of stack, want at most %d", each, most)
	}
}

// One byte more, and the heap gives each 576.
func TestRelayTakes512Bytes(t *testing.T) {
	if size := unsafe.Sizeof(Relay{}); size > 512 {
		t.Errorf("a relay takes %d bytes", size)
	}
}

func TestIdleRelaysHoldNoBuffers(t *testing.T) {
	each := heapOf(t, func(r *Relay, client, server, theirs *net.TCPConn) {
		r.Connect(theirs)
		for range 2 {
			client.Write([]byte("x"))
			io.ReadFull(server, make([]byte, 1))
			client, server = server, client
		}
	})
	if each > 2<<10 {
		t.Errorf("each holds %d bytes, want at most 2 KiB", each)
	}
}

// Bytes that a stuck reader does not take wait in a small buffer, not in the large one that they
// were read into.
func TestStuckReaderHoldsASmallBuffer(t *testing.T) {
	e := stuck(t)
	s := e.stream.(*socket)
	proxytest.Eventually(t, "it waits", func() (waits bool) {
		s.outBuf = NewBuffer(LargeBuffer)
		s.out = (*s.outBuf)[:100]
		copy(s.out, pattern.At(0, 100))
		s.raw.Control(func(fd uintptr) { waits = !s.writeReady(fd) })
		return waits
	})
	if len(*s.outBuf) != SmallBuffer || len(s.out) != 100 || pattern.Check(0, s.out) != nil {
		t.Errorf("it waits with a buffer of %d bytes, %d of them to be written",
			len(*s.outBuf), len(s.out))
	}
}

// After a server's handshake the client's last message is acknowledged at once: the socket is in
// the mode in which acknowledgements do not wait for data. (With crypto/tls alone it is not, unless
// the client has paused for 200 ms: the system then takes what comes for a new beginning.)
func TestTLSServerAcknowledgesTheHandshakeAtOnce(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	peer, c := duplex(t)
	server := TLSServer(c, serverTLS, 0)
	done := make(chan error, 1)
	go func() { done <- tls.Client(peer, clientTLS).Handshake() }()
	proxytest.Must(t, server.Handshake())
	proxytest.Must(t, <-done)
	quick := 0
	control(rawTCP(c), func(fd int) {
		quick, _ = syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_QUICKACK)
	})
	if quick != 1 {
		t.Error("the acknowledgement waits for data")
	}
}

// A socket returns the same errors as its conn.
func TestSocketReturnsTheErrorsOfTheConn(t *testing.T) {
	_, c := duplex(t)
	s := newSocket(c, rawTCP(c))
	c.SetDeadline(time.Unix(1, 0))
	b := make([]byte, 1)
	for _, do := range []func(io.ReadWriter) (int, error){
		func(c io.ReadWriter) (int, error) { return c.Read(b) },
		func(c io.ReadWriter) (int, error) { return c.Write(b) },
	} {
		_, want := do(c)
		if _, err := do(s); err == nil || err.Error() != want.Error() {
			t.Errorf("%v, want %v", err, want)
		}
	}
}
