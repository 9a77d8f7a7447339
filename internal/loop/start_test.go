//go:build linux && !lbproxy_portable

package loop

import (
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// TestAbortDuringStart aborts sessions as soon as they have a loop, while others want its lock. No
// message for a session may come before the one that starts it.
func TestAbortDuringStart(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4)) // for threads that wait for the lock
	g := newGroup(t, relay.Config{})
	var others sync.WaitGroup
	defer others.Wait()
	stop := make(chan struct{})
	defer close(stop)
	over := &Session{timer: -1, phase: over} // whom messages do not concern
	for _, l := range append(g.loops, g.loops...) {
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					l.post(message{op: opResume, s: over})
				}
			}
		})
	}
	n := 1000
	if testing.Short() {
		n = 200
	}
	for range n {
		fds, err := syscall.Socketpair(syscall.AF_UNIX,
			syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
		proxytest.Must(t, err)
		h := &recorder{next: func(error) (Target, error) { return Target{}, ErrWait }}
		h.done, h.left = make(chan relay.Outcome, 4), make(chan [2]int, 1)
		h.session = NewSession(fds[0], h)
		aborted := make(chan struct{})
		go func() {
			defer close(aborted)
			for h.session.loop.Load() == nil {
			}
			h.session.Abort(errAborted)
		}()
		g.Start(h.session)
		h.wait(t)
		<-aborted
		syscall.Close(fds[1])
	}
}
