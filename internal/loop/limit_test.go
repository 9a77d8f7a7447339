//go:build linux && !lbproxy_portable

package loop

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// TestLimitBoundsChunks checks the size of each piece: before the first verdict, and after it.
func TestLimitBoundsChunks(t *testing.T) {
	const size, chunk = 100_000, 1000
	var pieces []int
	h := &recorder{verdict: func(n int) relay.Verdict {
		pieces = append(pieces, n)
		return relay.Verdict{Chunk: chunk}
	}}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	go func() {
		pattern.Send(client, size)
		client.CloseWrite()
	}()
	if n, err := pattern.Receive(server); n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	server.Close()
	if o := h.wait(t); o.Sent != size || o.Err != nil {
		t.Errorf("%+v", o)
	}
	for i, n := range pieces {
		if most := []int{firstChunk, chunk}[min(i, 1)]; n > most {
			t.Errorf("piece %d has %d bytes, want %d at most", i, n, most)
		}
	}
}

// TestLimitHoldsOneDirection holds the upload for a wait. Meanwhile the download moves. The end of
// the upload is passed on after the wait.
func TestLimitHoldsOneDirection(t *testing.T) {
	t.Parallel()
	const wait, idle = 2 * time.Second, 1200 * time.Millisecond
	var h *recorder
	h = &recorder{verdict: func(int) relay.Verdict {
		if h.sums[relay.Server] == 0 {
			return relay.Verdict{Wait: wait}
		}
		return relay.Verdict{}
	}}
	client, server := joinAs(t, newGroup(t, relay.Config{Idle: idle}), h)
	began := time.Now()
	client.Write([]byte("a"))
	io.ReadFull(server, make([]byte, 1))
	client.Write([]byte("b"))
	client.CloseWrite()
	server.Write([]byte("c"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil || time.Since(began) > wait {
		t.Errorf("the download waits, too: %v, %v", time.Since(began), err)
	}
	if b, err := io.ReadAll(server); string(b) != "b" || err != nil || time.Since(began) < wait {
		t.Errorf("%q, %v, after %v: want b after %v", b, err, time.Since(began), wait)
	}
	server.Close()
	if o := h.wait(t); o.Err != nil {
		t.Errorf("%+v", o)
	}
}

// TestVerdictEndsASession has the verdict on the first piece end the session, while more is read.
func TestVerdictEndsASession(t *testing.T) {
	enough := errors.New("enough")
	h := &recorder{verdict: func(int) relay.Verdict { return relay.Verdict{Err: enough} }}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	client.Write(make([]byte, 3*firstChunk))
	if o := h.wait(t); o.Err != enough || o.Failed != relay.NoSide || o.Sent == 0 {
		t.Errorf("%+v", o)
	}
	proxytest.ReadReset(t, client)
	proxytest.ReadReset(t, server)
}

// A reset of a client that is held is not found out only when the wait is over.
func TestResetOfAHeldSideIsNoticed(t *testing.T) {
	h := &recorder{verdict: func(int) relay.Verdict { return relay.Verdict{Wait: time.Hour} }}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	client.Write([]byte("a"))
	io.ReadFull(server, make([]byte, 1))
	client.Write([]byte("b"))
	client.SetLinger(0)
	client.Close()
	if o := h.wait(t); o.Failed != relay.Client {
		t.Errorf("%+v", o)
	}
}

// Bulk with a limit that allows it leaves its loop, and says what may move at once.
func TestBulkLeavesWithItsChunk(t *testing.T) {
	h := &recorder{verdict: func(int) relay.Verdict { return relay.Verdict{Chunk: 10 * bufferSize} }}
	client, server := joinAs(t, newGroup(t, relay.Config{}), h)
	go pattern.Send(client, 64<<20)
	go io.Copy(io.Discard, server) // a session that is held up stays
	fds := proxytest.Receive(t, "the descriptors", h.left)
	if n := h.session.Chunk(); n != firstChunk { // the download's, which has had no verdict
		t.Errorf("%d bytes may move at once, want %d", n, firstChunk)
	}
	for _, fd := range fds {
		Reset(fd)
	}
}
