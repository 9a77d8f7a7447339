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
	before := tcpInfo(t, client).segmentsIn
	endAfterLastBytes(t, h.session, server)
	if b, err := io.ReadAll(client); string(b) != lastBytes || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if n := tcpInfo(t, client).segmentsIn - before; n != 1 {
		t.Errorf("%d segments came, want 1", n)
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
			if n := endAfterLastBytes(t, h.session, server); n != 0 {
				t.Errorf("%d bytes wait", n)
			}
			if b, _ := io.ReadFull(client, make([]byte, len(lastBytes))); b != len(lastBytes) {
				t.Errorf("%d bytes came, want %d", b, len(lastBytes))
			}
		})
	}
}

const lastBytes = "bye"

// endAfterLastBytes has server send its last bytes and a FIN, so that the loop finds both in one
// turn. It returns how many bytes the session has not sent to the client after that turn.
func endAfterLastBytes(t *testing.T, s *Session, server *net.TCPConn) int {
	t.Helper()
	unsent := make(chan int, 1)
	s.post(message{op: opDo, do: func() {
		server.Write([]byte(lastBytes))
		server.CloseWrite()
		for infoOf(int(s.side[1].fd)).state != closeWait {
			time.Sleep(time.Millisecond)
		}
		s.post(message{op: opDo, do: func() { // in the next turn, after the events
			const siocoutqnsd = 0x894b // SIOCOUTQNSD of linux/sockios.h
			var n int32
			syscall.Syscall(syscall.SYS_IOCTL, uintptr(s.side[0].fd), siocoutqnsd,
				uintptr(unsafe.Pointer(&n)))
			unsent <- int(n)
		}})
	}})
	return proxytest.Receive(t, "the turn is over", unsent)
}

const closeWait = 8 // TCP_CLOSE_WAIT

// info is what the tests need of tcp_info, linux/tcp.h.
type info struct {
	state      uint8
	_          [139]byte
	segmentsIn uint32
}

func infoOf(fd int) (i info) {
	size := uint32(unsafe.Sizeof(i))
	syscall.Syscall6(syscall.SYS_GETSOCKOPT, uintptr(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO,
		uintptr(unsafe.Pointer(&i)), uintptr(unsafe.Pointer(&size)), 0)
	return i
}

func tcpInfo(t *testing.T, c *net.TCPConn) (i info) {
	t.Helper()
	raw, err := c.SyscallConn()
	proxytest.Must(t, err)
	proxytest.Must(t, raw.Control(func(fd uintptr) { i = infoOf(int(fd)) }))
	return i
}
