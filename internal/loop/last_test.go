//go:build linux && !386 && !lbproxy_portable

package loop

import (
	"io"
	"net"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// The last bytes of a stream and its FIN leave in one segment.
func TestLastBytesLeaveWithTheFIN(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	proxytest.Must(t, pingBoth(client, server))
	if _, segments := endAfterLastBytes(t, h.session, server); segments != 1 {
		t.Errorf("%d segments left, want 1", segments)
	}
	if b, err := io.ReadAll(client); string(b) != lastBytes || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// When both streams have ended, closing says so, at the end of the turn. The last bytes do not wait
// for that: the other sessions' turns come first.
func TestLastBytesDoNotWaitForTheClose(t *testing.T) {
	client, server, h := join(t, newGroup(t, relay.Config{}))
	proxytest.Must(t, client.CloseWrite())
	if _, err := io.ReadAll(server); err != nil {
		t.Error(err)
	}
	if n, _ := endAfterLastBytes(t, h.session, server); n != 0 {
		t.Errorf("%d bytes wait", n)
	}
	if b, err := io.ReadAll(client); string(b) != lastBytes || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// If a limit delays the FIN, or ends the session, the last bytes do not wait for it.
func TestLastBytesLeaveWithoutTheFIN(t *testing.T) {
	for name, verdict := range map[string]relay.Verdict{
		"held": {Wait: time.Hour}, "refused": {Err: errAborted},
	} {
		t.Run(name, func(t *testing.T) {
			h := &recorder{verdict: func(n int) (v relay.Verdict) {
				if n == len(lastBytes) {
					v = verdict
				}
				return v
			}}
			client, server := joinAs(t, newGroup(t, relay.Config{}), h)
			proxytest.Must(t, pingBoth(client, server))
			if n, _ := endAfterLastBytes(t, h.session, server); n != 0 {
				t.Errorf("%d bytes wait", n)
			}
			if b, _ := io.ReadFull(client, make([]byte, len(lastBytes))); b != len(lastBytes) {
				t.Errorf("%d bytes came, want %d", b, len(lastBytes))
			}
		})
	}
}

const lastBytes = "bye"

// endAfterLastBytes has upstream send its last bytes and a FIN, so that the loop finds both in one
// turn. It returns how many bytes the session has not sent to the client after that turn, and how
// many segments it has sent.
func endAfterLastBytes(t *testing.T, s *Session, upstream *net.TCPConn) (unsent, segments int) {
	t.Helper()
	over := make(chan struct{})
	l := s.loop.Load()
	l.post(func() {
		to := int(s.side[client].fd)
		// An acknowledgement that comes before the FIN would make the system send what waits.
		for relay.UnsentFD(to) > 0 {
			time.Sleep(time.Millisecond)
		}
		before := infoOf(to).segmentsOut
		upstream.Write([]byte(lastBytes))
		upstream.CloseWrite()
		for !hasFIN(int(s.side[server].fd)) {
			time.Sleep(time.Millisecond)
		}
		l.post(func() { // in the next turn, after the events
			const siocoutqnsd = 0x894b // SIOCOUTQNSD of linux/sockios.h
			var n int32
			syscall.Syscall(
				syscall.SYS_IOCTL, uintptr(to), siocoutqnsd, uintptr(unsafe.Pointer(&n)))
			unsent, segments = int(n), int(infoOf(to).segmentsOut-before)
			close(over)
		})
	})
	proxytest.Receive(t, "the turn is over", over)
	return unsent, segments
}

// hasFIN reports whether the FIN of a socket's peer has come.
func hasFIN(fd int) bool {
	const closed, closeWait = 7, 8 // closed: after a shutdown of fd
	state := infoOf(fd).state
	return state == closed || state == closeWait
}

// info is what the tests need of tcp_info, linux/tcp.h.
type info struct {
	state       uint8
	_           [135]byte
	segmentsOut uint32
}

func infoOf(fd int) (i info) {
	size := uint32(unsafe.Sizeof(i))
	syscall.Syscall6(syscall.SYS_GETSOCKOPT, uintptr(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO,
		uintptr(unsafe.Pointer(&i)), uintptr(unsafe.Pointer(&size)), 0)
	return i
}
