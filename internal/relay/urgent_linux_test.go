//go:build !lbproxy_portable

package relay

import (
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// A signaler sends its thread the signal by which the runtime preempts it, when it is told to.
type signaler struct{ due, stop atomic.Bool }

func (s *signaler) run(tid int) {
	for !s.stop.Load() {
		if s.due.CompareAndSwap(true, false) {
			syscall.RawSyscall(syscall.SYS_TGKILL,
				uintptr(os.Getpid()), uintptr(tid), uintptr(syscall.SIGURG))
		}
	}
}

// just has a signal come about when f begins, a little earlier or later each time.
func (s *signaler) just(f func()) {
	s.due.Store(true)
	for range rand.IntN(4000) {
	}
	f()
}

// In front of an urgent byte a signal makes the system say that there is nothing to read. No event
// comes for the bytes behind it, so whoever believes that waits for ever.
func TestSignalAtAnUrgentByteHidesNothing(t *testing.T) {
	const rounds = 10_000
	peer, c := duplex(t)
	s, b := newSocket(c, rawTCP(c)), make([]byte, 16)
	sp := &splicer{d: &direction{relay: &Relay{engine: newEngine(t, Config{})}}}
	hidden := map[string]int{}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var sig signaler
	var wg sync.WaitGroup
	tid := syscall.Gettid()
	wg.Go(func() { sig.run(tid) })
	defer wg.Wait()
	defer sig.stop.Store(true)
	for range rounds {
		sendUrgent(t, peer)
		peer.Write([]byte("a"))
		s.raw.Control(func(fd uintptr) {
			for pollFD(int(fd), syscall.EPOLLIN) == 0 { // until it has arrived
			}
			sig.just(func() {
				if !sp.fillReady(fd) {
					hidden["splicer"]++
				}
			})
			sig.just(func() {
				s.in = b
				for !s.receive(fd) {
					hidden["socket"]++
				}
			})
		})
		if s.n != 1 || s.inErr != 0 {
			t.Fatal(s.n, s.inErr)
		}
	}
	for who, n := range hidden {
		t.Errorf("the %s took %d of %d rounds for empty", who, n, rounds)
	}
}
