//go:build linux && !lbproxy_portable

package loop

import (
	"strings"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// TestAbortDuringStart looks at a session whose start waits for the loop's lock. No message for a
// session may come before the one that starts it, so nobody can send one yet.
func TestAbortDuringStart(t *testing.T) {
	g := newGroup(t, relay.Config{})
	peer, ours := socketpair(t)
	defer syscall.Close(peer)
	h := &recorder{next: func(error) (Target, error) { return Target{}, ErrWait }}
	h.done, h.left = make(chan relay.Outcome, 4), make(chan [2]int, 1)
	h.session = NewSession(ours, h)
	for _, l := range g.loops {
		l.mu.Lock()
	}
	started := make(chan struct{})
	go func() {
		defer close(started)
		g.Start(h.session)
	}()
	proxytest.Eventually(t, "Start waits for the lock", func() bool {
		for _, stack := range proxytest.Goroutines() {
			if strings.Contains(stack, "[sync.Mutex.Lock") && strings.Contains(stack, ").Start(") {
				return true
			}
		}
		return false
	})
	if h.session.loop.Load() != nil {
		t.Error("the session has a loop, which can be sent messages, before its start has been sent")
	}
	for _, l := range g.loops {
		l.mu.Unlock()
	}
	<-started
	h.session.Abort(errAborted)
	if o := h.wait(t); o.Err != errAborted {
		t.Errorf("%+v", o)
	}
}
