package relay

import (
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

var errIdle = errors.New("idle")

// A recorder is a Handler that records its calls.
type recorder struct {
	moved  func(Side, int) Verdict // nil: go on
	over   chan error
	done   chan Outcome
	isDone atomic.Bool
	late   atomic.Bool // a call came after Done, or Over came twice or not before Done
	empty  atomic.Bool // Moved was called for no bytes
	sums   [3]atomic.Int64
}

func newRecorder(moved func(Side, int) Verdict) *recorder {
	return &recorder{moved: moved, over: make(chan error, 1), done: make(chan Outcome, 1)}
}

func (h *recorder) Moved(from Side, n int) Verdict {
	if h.isDone.Load() {
		h.late.Store(true)
	}
	if n <= 0 {
		h.empty.Store(true)
	}
	h.sums[from].Add(int64(n))
	if h.moved != nil {
		return h.moved(from, n)
	}
	return Verdict{}
}

func (h *recorder) Over(cause error) {
	select {
	case h.over <- cause:
	default:
		h.late.Store(true)
	}
}

func (h *recorder) Done(o Outcome) {
	if h.isDone.Swap(true) || len(h.over) != 1 {
		h.late.Store(true)
	}
	h.done <- o
}

// wait returns how the relay ended, and checks the calls before that.
func (h *recorder) wait(t testing.TB) Outcome {
	t.Helper()
	o := <-h.done // which may take hours of fake time; real peers have deadlines
	h.check(t, o)
	return o
}

func (h *recorder) check(t testing.TB, o Outcome) {
	t.Helper()
	if h.late.Load() {
		t.Error("the handler was called out of order")
	}
	if h.empty.Load() {
		t.Error("Moved was called for no bytes")
	}
	if cause := <-h.over; cause != o.Err {
		t.Errorf("Over said %v, Done says %v", cause, o.Err)
	}
	if o.Panic != nil && o.Err != ErrPanicked {
		t.Errorf("a panic that nobody knows of: %v", o.Panic)
	}
	if up, down := h.sums[Client].Load(), h.sums[Server].Load(); up != o.Sent ||
		down != o.Received {
		t.Errorf("Moved was told of %d and %d bytes: %+v", up, down, o)
	}
}

// newEngine returns an engine that is closed when the test ends.
func newEngine(t testing.TB, config Config) *Engine {
	if config.IdleErr == nil {
		config.IdleErr = errIdle
	}
	e := NewEngine(config)
	t.Cleanup(e.Close)
	return e
}

// Start returns a relay that has started.
func (e *Engine) Start(client net.Conn, h Handler, chunk int) *Relay {
	r := e.New(client, h, chunk)
	r.Start()
	return r
}

// join relays between two sockets.
func join(
	t testing.TB, moved func(Side, int) Verdict,
) (client, server *net.TCPConn, h *recorder) {
	t.Helper()
	client, server, h, _ = joinOver(t, newEngine(t, Config{}), moved)
	return client, server, h
}

func joinOver(
	t testing.TB, e *Engine, moved func(Side, int) Verdict,
) (client, server *net.TCPConn, h *recorder, r *Relay) {
	t.Helper()
	client, ours := duplex(t)
	server, theirs := duplex(t)
	h = newRecorder(moved)
	r = e.Start(ours, h, 0)
	r.Connect(theirs)
	t.Cleanup(func() { r.Abort(nil) })
	return client, server, h, r
}

// duplex returns a peer's end and the relay's, which has no deadline.
func duplex(t testing.TB) (peer, ours *net.TCPConn) {
	t.Helper()
	peer, ours = proxytest.Duplex(t)
	ours.SetDeadline(time.Time{})
	return peer, ours
}

// joinPipes relays between two connections in memory, at once.
func joinPipes(
	e *Engine, moved func(Side, int) Verdict,
) (client, server *proxytest.PipeConn, h *recorder, r *Relay) {
	client, ours := proxytest.Pipe()
	server, theirs := proxytest.Pipe()
	h = newRecorder(moved)
	r = e.Start(ours, h, 0)
	r.Connect(theirs)
	return client, server, h, r
}

// openPipes returns the pipes of which the process holds an end.
func openPipes() map[string]bool {
	pipes := map[string]bool{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "pipe:") {
			pipes[to] = true
		}
	}
	return pipes
}

// pipesSince returns how many pipes are open that were not before. The garbage collector closes
// those of io.Copy in earlier tests, sooner or later.
func pipesSince(before map[string]bool) (n int) {
	for pipe := range openPipes() {
		if !before[pipe] {
			n++
		}
	}
	return n
}
