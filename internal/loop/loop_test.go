//go:build linux && !lbproxy_portable

package loop

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

const pattern = proxytest.Pattern(7)

var (
	errIdle    = errors.New("idle")
	errAborted = errors.New("aborted")
	errNone    = errors.New("no target is left")
)

// A recorder is a Handler that dials targets in turn.
type recorder struct {
	session *Session
	targets []netip.AddrPort
	timeout time.Duration
	header  []byte
	next    func(failed error) (Target, error) // nil: the next of targets
	verdict func(n int) relay.Verdict          // nil: there is no limit
	onMoved func()                             // on the loop; nil: nothing

	failures  []error
	connected int
	sums      [3]int64
	calls     atomic.Int32 // of the last method
	left      chan [2]int
	done      chan relay.Outcome
}

func (h *recorder) Next(failed error) (Target, error) {
	if failed != nil {
		h.failures = append(h.failures, failed)
	}
	if h.next != nil {
		return h.next(failed)
	}
	if len(h.targets) == 0 {
		return Target{}, errNone
	}
	addr := h.targets[0]
	h.targets = h.targets[1:]
	return Target{addr, h.timeout}, nil
}

func (h *recorder) Header() []byte { return h.header }
func (h *recorder) Connected()     { h.connected++ }

func (h *recorder) Moved(from relay.Side, n int) relay.Verdict {
	h.sums[from] += int64(n)
	if h.onMoved != nil {
		h.onMoved()
	}
	if h.verdict != nil {
		return h.verdict(n)
	}
	return relay.Verdict{}
}

func (h *recorder) Leave(client, server int) {
	h.calls.Add(1)
	h.left <- [2]int{client, server}
}

func (h *recorder) Done(o relay.Outcome) {
	h.calls.Add(1)
	h.done <- o
}

// wait returns how the session ended.
func (h *recorder) wait(t testing.TB) relay.Outcome {
	t.Helper()
	o := proxytest.Receive(t, "done", h.done)
	if h.sums[relay.Client] != o.Sent || h.sums[relay.Server] != o.Received {
		t.Errorf("Moved was told of %v bytes: %+v", h.sums[1:], o)
	}
	if n := h.calls.Load(); n != 1 {
		t.Errorf("Done or Leave was called %d times", n)
	}
	return o
}

func newGroup(t testing.TB, config relay.Config) *Group {
	t.Helper()
	config.IdleErr = errIdle
	g, err := NewGroup(config, 2)
	proxytest.Must(t, err)
	t.Cleanup(g.Close)
	return g
}

const firstChunk = 4 << 10 // of sessions with a limit

// smallReads are verdicts that keep a session on its loop: it does not look like bulk if no read
// fills more than half of the buffer.
func smallReads(int) relay.Verdict { return relay.Verdict{Chunk: bufferSize / 2} }

// start starts a session of a new client, and returns the client.
func start(t testing.TB, g *Group, h *recorder) *net.TCPConn {
	t.Helper()
	l := proxytest.Listen(t)
	defer l.Close()
	client := proxytest.Dial(t, l.Addr().String())
	raw, err := l.SyscallConn()
	proxytest.Must(t, err)
	var fd int
	proxytest.Eventually(t, "it is accepted", func() bool {
		raw.Control(func(l uintptr) {
			fd, _, err = syscall.Accept4(int(l), syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		})
		return err == nil
	})
	begin(g.Start, h, fd)
	t.Cleanup(func() { h.session.Abort(errAborted) })
	return client
}

func begin(start func(*Session), h *recorder, fd int) {
	h.done, h.left = make(chan relay.Outcome, 1), make(chan [2]int, 1)
	if h.timeout == 0 {
		h.timeout = proxytest.Patience
	}
	h.session = NewSession(fd, h)
	if h.verdict != nil {
		h.session.Limit(firstChunk)
	}
	start(h.session)
}

// join starts a session, and returns both ends.
func join(t testing.TB, g *Group) (client, server *net.TCPConn, h *recorder) {
	t.Helper()
	h = &recorder{}
	client, server = joinAs(t, g, h)
	return client, server, h
}

func joinAs(t testing.TB, g *Group, h *recorder) (client, server *net.TCPConn) {
	t.Helper()
	l := proxytest.Listen(t)
	defer l.Close()
	h.targets = []netip.AddrPort{addrOf(l)}
	client = start(t, g, h)
	server, err := l.AcceptTCP()
	proxytest.Must(t, err)
	t.Cleanup(func() { server.Close() })
	proxytest.Must(t, server.SetDeadline(time.Now().Add(proxytest.Patience)))
	return client, server
}

func addrOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

func TestBothStreamsArriveWhole(t *testing.T) {
	g := newGroup(t, relay.Config{})
	for _, size := range []int64{0, 1, 4096, bufferSize - 1, bufferSize, bufferSize + 1, 200_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			client, server, h := join(t, g)
			var ends sync.WaitGroup
			for i, c := range []*net.TCPConn{client, server} {
				p := proxytest.Pattern(i)
				other := proxytest.Pattern(1 - i)
				ends.Go(func() {
					for sent := int64(0); sent < size; { // in pieces that do not look like bulk
						n := min(size-sent, 30_000)
						c.Write(p.At(sent, int(n))[:])
						sent += int64(len(p.At(sent, int(n))))
						time.Sleep(time.Millisecond)
					}
					c.CloseWrite()
				})
				ends.Go(func() {
					if err := other.Exactly(c, size); err != nil {
						t.Error(err)
					}
				})
			}
			ends.Wait()
			if o := h.wait(t); o.Err != nil || o.Sent != size || o.Received != size || !o.Connected {
				t.Errorf("%+v", o)
			}
		})
	}
}

func TestHalfClose(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	client.Write([]byte("question"))
	client.CloseWrite()
	if b, err := io.ReadAll(server); string(b) != "question" || err != nil {
		t.Errorf("the server read %q, %v", b, err)
	}
	const size = 100_000 // does not look like bulk
	go func() {
		pattern.Send(server, size)
		server.CloseWrite()
	}()
	if err := pattern.Exactly(client, size); err != nil {
		t.Error(err)
	}
	if o := h.wait(t); o.Err != nil || o.Received != size {
		t.Errorf("%+v", o)
	}
}

func TestSlowReaderGetsAll(t *testing.T) {
	t.Parallel()
	h := &recorder{verdict: smallReads}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	client.CloseWrite()
	const size = 64 << 20 // more than all queues hold
	sent := make(chan struct{})
	go func() {
		pattern.Send(server, size)
		server.CloseWrite()
		close(sent)
	}()
	select {
	case <-sent:
		t.Error("nobody reads, and the server could send everything")
	case <-time.After(300 * time.Millisecond):
	}
	if err := pattern.Exactly(client, size); err != nil {
		t.Error(err)
	}
	if o := h.wait(t); o.Err != nil || o.Received != size {
		t.Errorf("%+v", o)
	}
}

func TestResetIsPassedOnAfterTheDataBeforeIt(t *testing.T) {
	t.Parallel()
	g := newGroup(t, relay.Config{})
	for _, side := range []relay.Side{relay.Client, relay.Server} {
		client, server, h := join(t, g)
		from, to := client, server
		if side == relay.Server {
			from, to = server, client
		}
		// Small, so that not all is delivered at once. With 4 KiB the system often waits 200 ms before
		// it sends more, four times: that is most of the second for which a session lingers.
		to.SetReadBuffer(16 << 10)
		proxytest.Must(t, pingBoth(client, server))
		const size = 60_000
		pattern.Send(from, size)
		time.Sleep(50 * time.Millisecond) // it has arrived: a reset throws away what has not
		from.SetLinger(0)
		from.Close()
		if b := proxytest.ReadReset(t, to); len(b) != size || pattern.Check(0, b) != nil {
			t.Errorf("%d bytes of %d arrived before the reset", len(b), size)
		}
		if o := h.wait(t); o.Failed != side || !errors.Is(o.Err, syscall.ECONNRESET) {
			t.Errorf("%+v", o)
		}
	}
}

// pingBoth sends a byte each way.
func pingBoth(client, server net.Conn) error {
	b := []byte{1}
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		if _, err := way[0].Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(way[1], b); err != nil {
			return err
		}
	}
	return nil
}

func TestStuckReaderIsWaitedForASecond(t *testing.T) {
	t.Parallel()
	h := &recorder{verdict: smallReads}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	server.CloseWrite()
	if _, err := io.ReadAll(client); err != nil {
		t.Error(err)
	}
	for client.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); ; { // until all is full
		if _, err := client.Write(make([]byte, 30_000)); err != nil {
			break
		}
	}
	start := time.Now()
	client.SetLinger(0)
	client.Close()
	o := h.wait(t)
	if took := time.Since(start); o.Failed != relay.Client || took < relay.LingerTime {
		t.Errorf("after %v: %+v", took, o)
	}
	proxytest.ReadReset(t, server)
}

// The loop may learn of the server's end first, and find the client reset when it passes that on.
func TestResetBesideAnEndIsAReset(t *testing.T) {
	g := newGroup(t, relay.Config{})
	for range 200 {
		client, server, h := join(t, g)
		client.SetLinger(0)
		server.CloseWrite()
		client.Close()
		if o := h.wait(t); o.Failed != relay.Client || !errors.Is(o.Err, syscall.ECONNRESET) {
			t.Fatalf("%+v", o)
		}
		server.Close()
	}
}

func TestResetOfAReaderReachesTheWriter(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	proxytest.Must(t, pingBoth(client, server))
	client.CloseWrite() // also after its own stream has ended
	if _, err := io.ReadAll(server); err != nil {
		t.Error(err)
	}
	client.SetLinger(0)
	client.Close()
	if o := h.wait(t); o.Failed != relay.Client || !errors.Is(o.Err, syscall.ECONNRESET) {
		t.Errorf("%+v", o)
	}
	_, err := server.Write([]byte("late"))
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the server could still write: %v", err)
	}
}

func TestUrgentByteLosesNothingElse(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	raw, err := client.SyscallConn()
	proxytest.Must(t, err)
	client.Write([]byte("before"))
	raw.Control(func(fd uintptr) { err = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil) })
	proxytest.Must(t, err)
	client.Write([]byte("after"))
	client.CloseWrite()
	if b, err := io.ReadAll(server); string(b) != "beforeafter" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	server.Close()
	if o := h.wait(t); o.Err != nil || o.Sent != 11 {
		t.Errorf("%+v", o)
	}
}

// TestUrgentByteWhileSignalsCome sends bytes behind urgent ones, while signals interrupt the reads.
func TestUrgentByteWhileSignalsCome(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	raw, err := client.SyscallConn()
	proxytest.Must(t, err)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		signalThreads(stop)
	}()
	defer func() { close(stop); <-ended }()
	b := make([]byte, 1)
	for n := range 10_000 {
		raw.Control(func(fd uintptr) { err = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil) })
		proxytest.Must(t, err)
		client.Write([]byte("a"))
		if _, err := io.ReadFull(server, b); err != nil {
			t.Fatalf("byte %d: %v", n, err)
		}
	}
	client.CloseWrite()
	server.Close()
	h.wait(t)
}

// signalThreads sends the process's threads the signal by which the runtime preempts them.
func signalThreads(stop <-chan struct{}) {
	for {
		tasks, _ := os.ReadDir("/proc/self/task")
		for i := range 200 * len(tasks) {
			select {
			case <-stop:
				return
			default:
			}
			tid, _ := strconv.Atoi(tasks[i%len(tasks)].Name())
			syscall.Syscall(syscall.SYS_TGKILL,
				uintptr(os.Getpid()), uintptr(tid), uintptr(syscall.SIGURG))
		}
	}
}

func TestAbort(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	proxytest.Must(t, pingBoth(client, server))
	h.session.Abort(errAborted)
	h.session.Abort(errIdle) // the first counts
	proxytest.ReadReset(t, client)
	proxytest.ReadReset(t, server)
	if o := h.wait(t); o.Err != errAborted || o.Failed != relay.NoSide {
		t.Errorf("%+v", o)
	}
	h.session.Abort(errAborted)
}

func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	const idle = 2 * time.Second // a busy machine may not run this for a second
	g := newGroup(t, relay.Config{Idle: idle})
	client, server, h := join(t, g)
	for range 6 { // for longer than the timeout
		proxytest.Must(t, pingBoth(client, server))
		time.Sleep(idle / 5)
	}
	proxytest.Must(t, pingBoth(client, server))
	start := time.Now()
	o := h.wait(t)
	if took := time.Since(start); o.Err != errIdle || took < idle-50*time.Millisecond {
		t.Errorf("after %v: %+v", took, o)
	}
	proxytest.ReadReset(t, client)
	proxytest.ReadReset(t, server)
}

func TestSlowReaderIsNotIdle(t *testing.T) {
	t.Parallel()
	const idle = 2 * time.Second // a busy machine may not run this for a second
	h := &recorder{verdict: smallReads}
	client, server := joinAs(t, newGroup(t, relay.Config{Idle: idle}), h)
	client.SetReadBuffer(64 << 10)
	client.CloseWrite()
	const size = 8 << 20
	go func() {
		pattern.Send(server, size)
		server.CloseWrite()
	}()
	var got int64
	b := make([]byte, 64<<10)
	for began := time.Now(); time.Since(began) < 2*idle; time.Sleep(idle / 40) {
		n, err := client.Read(b)
		proxytest.Must(t, err)
		proxytest.Must(t, pattern.Check(got, b[:n]))
		got += int64(n)
	}
	n, err := io.Copy(io.Discard, client)
	if got+n != size || err != nil {
		t.Errorf("%d bytes of %d, %v", got+n, size, err)
	}
	h.wait(t)
}

// A sweep that takes many turns rests for longer than it took, though a session may be idle before.
func TestSweepsRest(t *testing.T) {
	l, err := newLoop(relay.Config{Idle: time.Hour}, new(Group))
	proxytest.Must(t, err)
	defer l.file.Close()
	const turns = 10
	l.now = relay.Clock()
	for range turns * sweepTurn {
		s := NewSession(-1, nil)
		s.phase, s.idle.last = open, l.now
		l.enter(s)
	}
	l.sessions[0].idle.last -= int64(time.Hour - time.Minute)
	l.sweep.next = l.now
	for range turns {
		l.now += int64(time.Second)
		l.sweepSome()
	}
	const least = sweepRest * (turns - 1) * time.Second
	if rest := time.Duration(l.sweep.next - l.now); l.sweep.running || rest != least {
		t.Errorf("running: %v, the next one is due in %v, want %v", l.sweep.running, rest, least)
	}
}

func TestNextTargetIsDialledWhenOneFails(t *testing.T) {
	t.Parallel()
	g := newGroup(t, relay.Config{})
	l := proxytest.Listen(t)
	refusing := netip.MustParseAddrPort(proxytest.RefusingAddr(t))
	hole := netip.MustParseAddrPort(proxytest.BlackHole(t))
	h := &recorder{
		targets: []netip.AddrPort{refusing, hole, addrOf(l)}, timeout: 200 * time.Millisecond,
	}
	client := start(t, g, h)
	server, err := l.AcceptTCP()
	proxytest.Must(t, err)
	defer server.Close()
	server.SetDeadline(time.Now().Add(proxytest.Patience))
	proxytest.Must(t, pingBoth(client, server))
	client.Close()
	server.Close()
	o := h.wait(t)
	if len(h.failures) != 2 || !errors.Is(h.failures[0], syscall.ECONNREFUSED) ||
		!errors.Is(h.failures[1], os.ErrDeadlineExceeded) || h.connected != 1 || o.Err != nil {
		t.Errorf("%v, %+v", h.failures, o)
	}
}

func TestManyRefusingTargets(t *testing.T) {
	refusing := netip.MustParseAddrPort(proxytest.RefusingAddr(t))
	h := &recorder{}
	for range 1000 {
		h.targets = append(h.targets, refusing)
	}
	client := start(t, newGroup(t, relay.Config{}), h)
	proxytest.ReadReset(t, client)
	if o := h.wait(t); o.Err != errNone || len(h.failures) != 1000 || o.Connected {
		t.Errorf("%d failures, %+v", len(h.failures), o)
	}
}

func TestClientGoneDuringDial(t *testing.T) {
	t.Parallel()
	h := &recorder{targets: []netip.AddrPort{netip.MustParseAddrPort(proxytest.BlackHole(t))}}
	client := start(t, newGroup(t, relay.Config{}), h)
	client.Write([]byte("unread"))
	client.SetLinger(0)
	client.Close()
	if o := h.wait(t); o.Failed != relay.Client || !errors.Is(o.Err, syscall.ECONNRESET) {
		t.Errorf("%+v", o)
	}
}

func TestCanceledDialMovesOn(t *testing.T) {
	t.Parallel()
	l := proxytest.Listen(t)
	first := netip.MustParseAddrPort(proxytest.BlackHole(t))
	h := &recorder{}
	dialling := make(chan uint32, 1)
	h.next = func(failed error) (Target, error) {
		if failed != nil {
			return Target{addrOf(l), time.Minute}, nil
		}
		dialling <- h.session.Dials() + 1
		return Target{first, time.Minute}, nil
	}
	start(t, newGroup(t, relay.Config{}), h)
	n := <-dialling
	h.session.CancelDial(n+1, errAborted) // not this one
	h.session.CancelDial(n, errIdle)
	server, err := l.Accept()
	proxytest.Must(t, err)
	server.Close()
	h.session.Abort(errAborted)
	h.wait(t)
	if len(h.failures) != 1 || h.failures[0] != errIdle {
		t.Error(h.failures)
	}
}

func TestWaitAndResume(t *testing.T) {
	l := proxytest.Listen(t)
	h := &recorder{}
	asked := make(chan struct{}, 2)
	ready := false
	h.next = func(error) (Target, error) {
		defer func() { ready = true; asked <- struct{}{} }()
		if !ready {
			return Target{}, ErrWait
		}
		return Target{addrOf(l), time.Minute}, nil
	}
	h.header = []byte("HEADER")
	client := start(t, newGroup(t, relay.Config{}), h)
	client.Write([]byte("-early"))
	<-asked
	h.session.Resume()
	h.session.Resume() // does nothing
	server, err := l.Accept()
	proxytest.Must(t, err)
	defer server.Close()
	client.CloseWrite()
	if b, err := io.ReadAll(server); string(b) != "HEADER-early" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	server.Close()
	if o := h.wait(t); o.Err != nil || o.Sent != 6 {
		t.Errorf("%+v", o)
	}
}

// TestBulkLeavesWhole passes a session that has turned to bulk to a relay.
func TestBulkLeavesWhole(t *testing.T) {
	overHalf := func(int) relay.Verdict { return relay.Verdict{Chunk: bufferSize/2 + 1} }
	for _, row := range []struct {
		name       string
		halfClosed bool
		verdict    func(int) relay.Verdict
	}{
		{"full reads", false, nil},
		{"half-closed", true, nil},
		{"reads of more than half a buffer", false, overHalf},
	} {
		t.Run(row.name, func(t *testing.T) {
			const size = 64 << 20
			h := &recorder{verdict: row.verdict}
			client, server := joinAs(t, newGroup(t, relay.Config{}), h)
			if row.halfClosed {
				client.CloseWrite()
				if _, err := io.ReadAll(server); err != nil {
					t.Error(err)
				}
			}
			go func() {
				pattern.Send(server, size)
				server.CloseWrite()
			}()
			got := make(chan error, 1)
			go func() {
				err := pattern.Exactly(client, size)
				client.Close()
				got <- err
			}()
			var fds [2]int
			select {
			case fds = <-h.left:
			case o := <-h.done:
				t.Fatalf("it did not leave: %+v", o)
			}
			e := relay.NewEngine(relay.Config{})
			defer e.Close()
			after := &relayed{done: make(chan relay.Outcome, 1)}
			h.goOn(e, fds, after)
			if err := <-got; err != nil {
				t.Error(err)
			}
			o := proxytest.Receive(t, "the relay's end", after.done)
			if _, before := h.session.Counts(); o.Err != nil || before+o.Received != size {
				t.Errorf("%d before, %+v", before, o)
			}
		})
	}
}

// TestEndOfTheSecondStreamOnTheWayToARelay ends the second stream of a half-closed session after it
// has left its loop, and before the relay begins.
func TestEndOfTheSecondStreamOnTheWayToARelay(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	client.CloseWrite()
	if _, err := io.ReadAll(server); err != nil {
		t.Error(err)
	}
	var left atomic.Bool
	go func() {
		for !left.Load() {
			server.Write(make([]byte, bufferSize))
		}
		server.CloseWrite()
	}()
	go io.Copy(io.Discard, client)
	fds := proxytest.Receive(t, "the sockets", h.left)
	left.Store(true)
	proxytest.Eventually(t, "the end has come", func() bool {
		n, _, err := syscall.Recvfrom(fds[1], make([]byte, bufferSize), syscall.MSG_DONTWAIT)
		return n == 0 && err == nil
	})
	e := relay.NewEngine(relay.Config{})
	defer e.Close()
	after := &relayed{done: make(chan relay.Outcome, 1)}
	h.goOn(e, fds, after)
	if o := proxytest.Receive(t, "the relay's end", after.done); o.Err != nil {
		t.Errorf("%+v", o)
	}
}

// goOn starts a relay for h's session, which has left its loop.
func (h *recorder) goOn(e *relay.Engine, fds [2]int, after relay.Handler) {
	client := relay.NewFileConn(fds[0], &net.TCPAddr{}, &net.TCPAddr{})
	server := relay.NewFileConn(fds[1], &net.TCPAddr{}, &net.TCPAddr{})
	client.Shut, server.Shut = h.session.Shut()
	r := e.New(client, after, h.session.Chunk())
	r.Start()
	r.Connect(server)
}

type relayed struct{ done chan relay.Outcome }

func (*relayed) Moved(relay.Side, int) relay.Verdict { return relay.Verdict{} }
func (*relayed) Over(error)                          {}
func (r *relayed) Done(o relay.Outcome)              { r.done <- o }

// TestDescriptorsUsedAnew has many sessions come and go as fast as they can, in every way, so that
// numbers of descriptors and slots are used anew all the time. Each stream is its own, so a byte in
// the wrong place is found.
func TestDescriptorsUsedAnew(t *testing.T) {
	g := newGroup(t, relay.Config{})
	up := proxytest.Listen(t)
	stop := proxytest.Serve(up, func(c net.Conn) { // answers with what it was sent
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		io.Copy(c, c)
	})
	t.Cleanup(stop)
	refusing := netip.MustParseAddrPort(proxytest.RefusingAddr(t))
	front := proxytest.Listen(t)
	var sessions sync.WaitGroup
	random := rand.New(rand.NewPCG(1, 2)) // used by one goroutine at a time
	serve := func(c Accepted, start func(*Session)) {
		h := &recorder{targets: []netip.AddrPort{addrOf(up)}}
		if random.IntN(4) == 0 {
			h.onMoved = func() { sendAway(g, h.session) }
		}
		for range random.IntN(3) {
			h.targets = append([]netip.AddrPort{refusing}, h.targets...)
		}
		abort := random.IntN(8) == 0
		sessions.Add(1)
		begin(start, h, c.FD)
		go func() {
			defer sessions.Done()
			if abort {
				h.session.Abort(errAborted)
			}
			select {
			case <-h.done:
			case fds := <-h.left:
				Reset(fds[0])
				Reset(fds[1])
			}
		}()
	}
	a, err := g.NewListener(front, func(c Accepted) bool {
		if random.IntN(8) == 0 {
			return false
		}
		if random.IntN(32) == 0 { // then another loop is to accept, or the first again
			g.loops[0].busy.behind.Store(int64(random.IntN(2)) << 62)
		}
		serve(c, c.Start)
		return true
	})
	proxytest.Must(t, err)
	t.Cleanup(a.Close)
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		for {
			c, err := a.Accept()
			if err != nil {
				return
			}
			serve(c, c.Start)
		}
	}()
	var clients sync.WaitGroup
	var bad, whole atomic.Int64
	for i := range 32 {
		random := rand.New(rand.NewPCG(uint64(i), 3))
		clients.Go(func() {
			for n := range 150 {
				p := proxytest.Pattern(uint64(i)<<32 | uint64(n))
				c, err := net.Dial("tcp", front.Addr().String())
				if err != nil {
					continue
				}
				c.SetDeadline(time.Now().Add(proxytest.Patience))
				size := int64(1 + random.IntN(3000))
				_, sendErr := p.Send(c, size)
				switch random.IntN(4) {
				case 0:
					c.(*net.TCPConn).SetLinger(0)
					c.Close()
					continue
				case 1:
					c.Close()
					continue
				}
				sendErr = errors.Join(sendErr, c.(*net.TCPConn).CloseWrite())
				b, err := io.ReadAll(c)
				if err == nil {
					err = sendErr // a write that meets a reset takes the error: a read then sees an end
				}
				if wrong := p.Check(0, b); wrong != nil || err == nil && int64(len(b)) != size {
					bad.Add(1)
					t.Errorf("%d of %d bytes, %v: %v", len(b), size, err, wrong)
				} else if err == nil {
					whole.Add(1)
				} else if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) &&
					!errors.Is(err, syscall.ENOTCONN) {
					t.Error(err)
				}
				c.Close()
			}
		})
	}
	clients.Wait()
	a.Close()
	<-accepting
	sessions.Wait()
	if bad.Load() > 0 || whole.Load() < 100 {
		t.Errorf("%d bad, %d whole", bad.Load(), whole.Load())
	}
	for _, l := range g.loops {
		if n := l.load.Load(); n != 0 {
			t.Errorf("a loop still counts %d sessions", n)
		}
	}
}

// TestEventOfAnEarlierGenerationIsNobodys checks what the kernel is unlikely to do: report an event
// that was for a descriptor that was registered before.
func TestEventOfAnEarlierGenerationIsNobodys(t *testing.T) {
	l, err := newLoop(relay.Config{}, new(Group))
	proxytest.Must(t, err)
	defer l.file.Close()
	peer, ours := socketpair(t)
	defer syscall.Close(peer)
	h := &recorder{next: func(error) (Target, error) { return Target{}, ErrWait }}
	h.done = make(chan relay.Outcome, 1)
	s := NewSession(ours, h)
	s.loop.Store(l)
	l.start(s)
	old := syscall.EpollEvent{
		Events: syscall.EPOLLPRI, Fd: s.slot<<1 | client, Pad: int32(s.side[client].gen - 1),
	}
	l.dispatch(&old)
	if s.side[client].state&urgent != 0 {
		t.Error("an event of an earlier generation was taken for the session's")
	}
	old.Pad++
	l.dispatch(&old)
	if s.side[client].state&urgent == 0 {
		t.Error("its own event was not")
	}
	l.end(s, errAborted)
	l.dispatch(&old) // in the batch in which it has ended
	l.bury()
	<-h.done
}

func socketpair(t testing.TB) (peer, ours int) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK, 0)
	proxytest.Must(t, err)
	return fds[0], fds[1]
}

func TestGroupFailsWhereEpollIsNotPolled(t *testing.T) {
	setNonblock = func(int, bool) error { return nil } // then the runtime does not poll it
	defer func() { setNonblock = syscall.SetNonblock }()
	if g, err := NewGroup(relay.Config{}, 2); err != errNotPollable {
		t.Errorf("%v, %v", g, err)
	}
}

func TestListenerNoticesThatItsSocketWasClosed(t *testing.T) {
	l := proxytest.Listen(t)
	a, err := newGroup(t, relay.Config{}).NewListener(l, nil)
	proxytest.Must(t, err)
	defer a.Close()
	accepted := make(chan error, 1)
	go func() {
		_, err := a.Accept()
		accepted <- err
	}()
	l.Close()
	if err := proxytest.Receive(t, "Accept's end", accepted); err != net.ErrClosed {
		t.Error(err)
	}
}

// The first connection comes before there is a Listener, so it inherits no options from its socket.
func TestConnectionsHaveTheirOptions(t *testing.T) {
	l := proxytest.Listen(t)
	raw, err := l.SyscallConn()
	proxytest.Must(t, err)
	raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER,
			&syscall.Linger{Onoff: 1, Linger: 4})
	})
	proxytest.Must(t, err)
	proxytest.Dial(t, l.Addr().String())
	a, err := newGroup(t, relay.Config{}).NewListener(l, func(Accepted) bool { return false })
	proxytest.Must(t, err)
	defer a.Close()
	for _, when := range []string{"before", "after"} {
		if when == "after" {
			proxytest.Dial(t, l.Addr().String())
		}
		c, err := a.Accept()
		proxytest.Must(t, err)
		defer Reset(c.FD)
		for _, option := range []struct{ level, name, want int }{
			{syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1},
			{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
			{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
			{syscall.SOL_SOCKET, syscall.SO_LINGER, 0},
		} {
			got, err := syscall.GetsockoptInt(c.FD, option.level, option.name)
			if got != option.want || err != nil {
				t.Errorf("%s: %+v, but it is %d, %v", when, option, got, err)
			}
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, network := range []string{"tcp4 127.0.0.1:0", "tcp6 [::1]:0", "tcp :0"} {
		var proto, addr string
		fmt.Sscan(network, &proto, &addr)
		l, err := net.Listen(proto, addr)
		if err != nil {
			t.Log(err) // no IPv6 here
			continue
		}
		g := newGroup(t, relay.Config{})
		a, err := g.NewListener(l.(*net.TCPListener), func(Accepted) bool { return false })
		proxytest.Must(t, err)
		to := l.Addr().(*net.TCPAddr)
		if to.IP.IsUnspecified() {
			to = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: to.Port}
		}
		c := proxytest.Dial(t, to.String())
		got, err := a.Accept()
		proxytest.Must(t, err)
		if got.Local.String() != c.RemoteAddr().String() ||
			got.Remote.String() != c.LocalAddr().String() {
			t.Errorf("%s: local %v, remote %v; want %v, %v",
				network, got.Local, got.Remote, c.RemoteAddr(), c.LocalAddr())
		}
		Reset(got.FD)
		a.Close()
		l.Close()
	}
}
