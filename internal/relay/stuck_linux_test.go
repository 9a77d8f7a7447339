//go:build !lbproxy_portable

package relay

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// fill writes until nothing has been taken for a while.
func fill(c net.Conn) {
	for b := make([]byte, 64<<10); ; {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// A side is reset while its bytes are stuck on their way to a reader that does not read. Nobody
// reads from it then, and nobody writes to it.
func TestResetBehindAStuckWriteIsNoticed(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		side  Side
		ended bool // the other side has ended its stream
		tls   bool // the client's
	}{
		{"client", Client, false, false},
		{"client, and the download has ended", Client, true, false},
		{"client with TLS", Client, true, true},
		{"server", Server, false, false},
		{"server, and the upload has ended", Server, true, false},
		{"server of a client with TLS", Server, true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			client, ours := duplex(t)
			server, theirs := duplex(t)
			h := newRecorder(nil)
			e := newEngine(t, Config{Idle: time.Minute})
			var r *Relay
			from, to := net.Conn(client), net.Conn(server)
			if row.tls {
				serverTLS, clientTLS := proxytest.TLSConfigs()
				r = e.Start(TLSServer(ours, serverTLS, 0), h, 0)
				c := tls.Client(client, clientTLS)
				proxytest.Must(t, c.Handshake())
				from = c
			} else {
				r = e.Start(ours, h, 0)
			}
			r.Connect(theirs)
			t.Cleanup(func() { r.Abort(nil) })
			broken := client
			if row.side == Server {
				from, to, broken = to, from, server
			}
			if row.ended {
				to.(halfCloser).CloseWrite()
				if _, err := io.ReadAll(from); err != nil {
					t.Fatal(err)
				}
			}
			fill(from)
			start := time.Now()
			broken.SetLinger(0)
			broken.Close()
			o, took := h.wait(t), time.Since(start)
			// On a busy machine the relay may still be reading, and meet the reset itself.
			known := o.Err == errReset || errors.Is(o.Err, syscall.ECONNRESET)
			if o.Failed != row.side || !known || took > 20*time.Second {
				t.Errorf("after %v: %+v", took, o)
			}
		})
	}
}

// A side that has ended its stream, to which the other has ended too, looks like one that was
// reset. Its bytes, stuck on their way, arrive all the same.
func TestEndBehindAStuckWriteIsNotAReset(t *testing.T) {
	t.Parallel()
	client, ours := duplex(t)
	server, theirs := duplex(t)
	ours.SetReadBuffer(256 << 10) // has room for all that the upload has yet to read
	server.SetReadBuffer(4 << 10)
	theirs.SetWriteBuffer(4 << 10)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	r.Connect(theirs)
	server.CloseWrite()
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	const size = 100 << 10
	if _, err := pattern.Send(client, size); err != nil {
		t.Fatal(err)
	}
	client.Close()
	proxytest.Eventually(t, "the client's end is there", func() bool { return wasReset(rawTCP(ours)) })
	time.Sleep(2 * stuckTime)
	if !r.up.watched.Load() || r.up.phase.Load() != writing {
		t.Error("the upload is not stuck")
	}
	server.SetReadBuffer(256 << 10) // the rest need not be slow
	if err := pattern.Exactly(server, size); err != nil {
		t.Error(err)
	}
	if o := h.wait(t); o.Err != nil {
		t.Errorf("%+v", o)
	}
}
