package relay

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// joinTLS relays between a TLS client and a plain server. The client's raw socket is c.
func joinTLS(t testing.TB, mode CloseNotify) (client *tls.Conn, c, server *net.TCPConn, h *recorder) {
	t.Helper()
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	c, ours := duplex(t)
	server, theirs := duplex(t)
	client = tls.Client(c, clientTLS)
	up := NewTLS(tls.Server, ours, serverTLS, 0)
	up.CloseNotify = mode
	shaken := make(chan error, 1)
	go func() { shaken <- client.Handshake() }()
	proxytest.Must(t, up.Handshake())
	proxytest.Must(t, <-shaken)
	h = newRecorder(nil)
	r := newEngine(t, Config{}).Start(up, h, 0)
	r.Connect(theirs)
	t.Cleanup(func() { r.Abort(nil) })
	return client, c, server, h
}

func TestTLSStreamThatEndsWithoutCloseNotifyIsCut(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	client, ours := duplex(t)
	server, theirs := duplex(t)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	r.Connect(NewTLS(tls.Client, theirs, clientTLS, 0))
	client.Write([]byte("what?"))
	over := tls.Server(server, serverTLS)
	io.ReadFull(over, make([]byte, 5))
	over.Write([]byte("half of the ans"))
	server.Close()
	if b := readCut(t, client); string(b) != "half of the ans" {
		t.Errorf("client got %q", b)
	}
	if o := h.wait(t); o.Failed != Server || o.Err != io.ErrUnexpectedEOF || o.Quiet {
		t.Errorf("%+v", o)
	}
}

// Who leaves TLS without close_notify, while what is going on, and what the server sees of it.
func TestCloseNotify(t *testing.T) {
	if !canMeasure {
		t.Skip("elsewhere nobody knows what is unacknowledged, so nothing is quiet")
	}
	const half = 100
	kept := func(client *tls.Conn, server *net.TCPConn) { // a request, and its answer
		client.Write([]byte("what?"))
		io.ReadFull(server, make([]byte, 5))
		server.Write([]byte("that"))
		io.ReadFull(client, make([]byte, 4))
	}
	for _, row := range []struct {
		name  string
		mode  CloseNotify
		leave func(client *tls.Conn, c, server *net.TCPConn)
		clean bool // the server sees an end, not a reset
		quiet bool
	}{
		{"kept, FIN", Required, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.Close() }, false, true},
		{"kept, FIN", Idle, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.Close() }, true, false},
		{"kept, FIN", Optional, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.Close() }, true, false},
		{"kept, close_notify", Required, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); client.Close() }, true, false},
		{"kept, reset", Required, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.SetLinger(0); c.Close() }, false, true},
		{"kept, reset", Idle, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.SetLinger(0); c.Close() }, false, true},
		{"kept, reset", Optional, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.SetLinger(0); c.Close() }, false, true},
		{"half-closed by FIN", Required, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.CloseWrite() }, false, true},
		{"half-closed by FIN", Optional, func(client *tls.Conn, c, server *net.TCPConn) { kept(client, server); c.CloseWrite() }, true, false},
		{"in a record", Required, inARecord, false, false},
		{"in a record", Idle, inARecord, false, false},
		{"in a record", Optional, inARecord, false, false},
		{"an upload that is not acknowledged", Required, stuckUpload, false, false},
		{"an upload that is not acknowledged", Idle, stuckUpload, false, false},
		{"an upload that is not acknowledged", Optional, stuckUpload, true, false},
		{"an answer under way", Required, stuckAnswer, false, false},
		{"an answer under way", Idle, stuckAnswer, false, false},
		{"after an acknowledgement", Required, acknowledged, false, true},
		{"after an acknowledgement", Idle, acknowledged, true, false},
	} {
		t.Run(row.name+"/"+[]string{"required", "idle", "optional"}[row.mode], func(t *testing.T) {
			client, c, server, h := joinTLS(t, row.mode)
			row.leave(client, c, server)
			_, err := io.Copy(io.Discard, server)
			if clean := err == nil; clean != row.clean || !clean && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the server reads %v, want a clean end: %v", err, row.clean)
			}
			server.Close()
			c.Close()
			o := h.wait(t)
			if o.Quiet != row.quiet || o.Quiet && (o.Failed != Client || o.Err == nil) || !row.clean && o.Err == nil {
				t.Errorf("%+v, want quiet %v", o, row.quiet)
			}
		})
	}
}

// inARecord sends a part of one, and a FIN.
func inARecord(client *tls.Conn, c, server *net.TCPConn) {
	client.Write([]byte("what?"))
	io.ReadFull(server, make([]byte, 5))
	c.Write([]byte{23, 3, 3, 0, 100, 1, 2, 3})
	c.CloseWrite()
}

// stuckUpload sends more than the server's system takes, and a FIN.
func stuckUpload(client *tls.Conn, c, server *net.TCPConn) {
	server.SetReadBuffer(4 << 10)
	for b := make([]byte, 16<<10); ; {
		c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := client.NetConn().Write(nil); err != nil {
			break
		}
		if sent, _ := client.Write(b); sent < len(b) {
			break
		}
		if len(b) > 0 && stuckAfter(c) {
			break
		}
	}
	c.CloseWrite()
}

// stuckAfter reports whether c has a queue: its peer's has no room, since nobody reads there.
func stuckAfter(c *net.TCPConn) bool { return unsent(rawTCP(c)) > 256<<10 }

// stuckAnswer has an answer under way that the client does not read when it sends a FIN.
func stuckAnswer(client *tls.Conn, c, server *net.TCPConn) {
	client.Write([]byte("what?"))
	io.ReadFull(server, make([]byte, 5))
	c.SetReadBuffer(4 << 10)
	for b := make([]byte, 64<<10); ; {
		server.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := server.Write(b); err != nil {
			break
		}
	}
	c.CloseWrite()
}

// acknowledged is an upload that the server acknowledges each 64 KiB, with a FIN after one of the
// acknowledgements. Somebody between may have forged it.
func acknowledged(client *tls.Conn, c, server *net.TCPConn) {
	for range 3 {
		go client.Write(make([]byte, 64<<10))
		io.ReadFull(server, make([]byte, 64<<10))
		server.Write([]byte("+"))
		io.ReadFull(client, make([]byte, 1))
	}
	c.CloseWrite()
}

// A client that half-closes by FIN gets its answer where close_notify is optional.
func TestAnswerAfterAFINWithoutCloseNotify(t *testing.T) {
	const answer = 300_006
	client, c, server, h := joinTLS(t, Optional)
	client.Write([]byte("what?"))
	c.CloseWrite()
	if b, err := io.ReadAll(server); string(b) != "what?" || err != nil {
		t.Errorf("server got %q, %v", b, err)
	}
	go func() { pattern.Send(server, answer); server.Close() }()
	if err := pattern.Exactly(client, answer); err != nil {
		t.Error(err)
	}
	if o := h.wait(t); o.Err != nil || o.Received != answer {
		t.Errorf("%+v", o)
	}
}

// A client that is cut gets a reset, which is below TLS, rather than a goodbye.
func TestAbortedTLSClientSeesAReset(t *testing.T) {
	client, _, server, h := joinTLS(t, Required)
	go io.Copy(server, server)
	proxytest.Must(t, proxytest.Ping(client))
	server.SetLinger(0)
	server.Close()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it reads %v, want a reset", err)
	}
	h.wait(t)
}

func TestTLSEndWaitsForASlowReader(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	for _, ended := range []bool{false, true} { // the client's own stream
		synctest.Test(t, func(t *testing.T) {
			raw, ours := proxytest.Pipe() // which has no buffer: what is written waits for the reader
			server, theirs := proxytest.Pipe()
			up := NewTLS(tls.Server, ours, serverTLS, 0)
			client := NewTLS(tls.Client, raw, clientTLS, 0) // which tells a cut
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(up, h, 0)
			r.Connect(theirs)
			if err := client.Handshake(); err != nil {
				t.Fatal(err)
			}
			go func() {
				server.Write([]byte("answer"))
				server.CloseWrite()
				io.Copy(io.Discard, server)
				server.Close()
			}()
			if ended {
				client.CloseWrite()
				time.Sleep(time.Second) // the server has been told, and the upload is over
			}
			io.ReadFull(client, make([]byte, 6))
			time.Sleep(time.Minute) // crypto/tls would give up after 5 s
			if _, err := client.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("client ended %v: it reads %v, want the end", ended, err)
			}
			raw.Close()
			if o := h.wait(t); o.Err != nil && ended {
				t.Errorf("client ended %v: %+v", ended, o)
			}
		})
	}
}

// crypto/tls alone would try to say goodbye for 5 s.
func TestTLSPeerThatDoesNotReadDoesNotHoldAbort(t *testing.T) {
	client, c, server, h := joinTLS(t, Required)
	c.SetReadBuffer(4 << 10)
	for b := make([]byte, 64<<10); ; { // until all buffers are full
		server.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := server.Write(b); err != nil {
			break
		}
	}
	server.SetLinger(0)
	server.Close()
	client.Write([]byte("x")) // so that the reset is noticed
	start := time.Now()
	if o := h.wait(t); o.Failed != Server || time.Since(start) > 4*time.Second {
		t.Errorf("%+v after %v", o, time.Since(start))
	}
}

// A TLS client may shake hands after the server has ended its stream.
func TestEndBeforeTheHandshakeWaitsForIt(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	for name, layer := range map[string]func(net.Conn) net.Conn{
		"tls.Conn": func(c net.Conn) net.Conn { return tls.Server(c, serverTLS) },
		"TLS":      func(c net.Conn) net.Conn { return NewTLS(tls.Server, c, serverTLS, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			raw, ours := duplex(t)
			server, theirs := duplex(t)
			server.CloseWrite()
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(layer(ours), h, 0)
			r.Connect(theirs)
			proxytest.Eventually(t, "the end is being passed on", func() bool { return atEnd(&r.down) })
			client := tls.Client(raw, clientTLS)
			if _, err := client.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("client reads %v, want the end", err)
			}
			client.Close()
			if o := h.wait(t); o.Err != nil {
				t.Errorf("%+v", o)
			}
		})
	}
}

func atEnd(d *direction) bool {
	d.relay.mu.Lock()
	defer d.relay.mu.Unlock()
	return d.atEnd
}

// A TLS by itself.

// countedConn counts what is written, and fails from the write of the given number on.
type countedConn struct {
	net.Conn
	writes, failFrom int
	onWrite          func() // nil: nothing
}

func (c *countedConn) Write(b []byte) (int, error) {
	if c.onWrite != nil {
		c.onWrite()
	}
	if c.writes++; c.failFrom > 0 && c.writes >= c.failFrom {
		return 0, errors.New("broken wire")
	}
	return c.Conn.Write(b)
}

func tlsPair(t *testing.T, maxHandshake int) (client *tls.Conn, server *TLS, wire *countedConn) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.DynamicRecordSizingDisabled = true
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	wire = &countedConn{Conn: ours}
	return tls.Client(theirs, clientTLS), NewTLS(tls.Server, wire, serverTLS, maxHandshake), wire
}

func TestTLSGathersWhatALargeWriteSends(t *testing.T) {
	client, server, wire := tlsPair(t, 0)
	got := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(client)
		got <- all
	}()
	proxytest.Must(t, server.Handshake())
	sent := pattern.At(0, 300_000)
	for i, row := range []struct{ from, to, most int }{{0, 1, 1}, {1, 16_384, 1}, {16_384, 16_384 + 64<<10, 1}, {16_384 + 64<<10, 300_000, 4}} {
		before := wire.writes
		if n, err := server.Write(sent[row.from:row.to]); n != row.to-row.from || err != nil {
			t.Fatalf("write %d: %d, %v", i, n, err)
		}
		if n := wire.writes - before; n > row.most {
			t.Errorf("%d bytes took %d writes, want %d", row.to-row.from, n, row.most)
		}
	}
	server.Close()
	if all := <-got; !bytes.Equal(all, sent) {
		t.Errorf("%d bytes came, which are not the %d that were sent", len(all), len(sent))
	}
}

func TestTLSSaysWhenWhatWasGatheredDidNotLeave(t *testing.T) {
	for which := 1; which <= 4; which++ { // of the writes that it takes
		client, server, wire := tlsPair(t, 0)
		go io.Copy(io.Discard, client)
		proxytest.Must(t, server.Handshake())
		wire.failFrom = wire.writes + which
		if n, err := server.Write(make([]byte, 200_000)); n != 0 || err == nil || err.Error() != "broken wire" {
			t.Errorf("write %d fails: %d, %v", which, n, err)
		}
		if n, err := server.Write(make([]byte, 10)); n != 0 || err == nil {
			t.Errorf("afterwards: %d, %v", n, err)
		}
	}
}

// What is gathered is a second copy of what is written. While the peer does not take it, it is the
// only one.
func TestOneBufferIsHeldWhileTLSWaits(t *testing.T) {
	client, server, wire := tlsPair(t, 0)
	go io.Copy(io.Discard, client)
	proxytest.Must(t, server.Handshake())
	b := make(buffer, 3*tlsRecord) // of a size that no pool has, so that its return is seen
	freed := false
	wire.onWrite = func() { freed = bufferIsFree(&b) }
	if n, err := server.write(b, &b); n != len(b) || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if !freed {
		t.Error("the buffer is kept")
	}
}

// bufferIsFree reports whether b is in the pool that it would go to.
func bufferIsFree(b *buffer) bool {
	for range 10_000 {
		if smallBuffers.Get() == any(b) {
			return true
		}
	}
	return false
}

func TestTLSBoundsTheHandshake(t *testing.T) {
	for _, explicitly := range []bool{true, false} {
		client, server, _ := tlsPair(t, 100)
		go client.Handshake()
		var err error
		if explicitly {
			err = server.Handshake()
		} else {
			_, err = server.Read(make([]byte, 1))
		}
		if !errors.Is(err, ErrHandshakeSize) {
			t.Errorf("100 bytes: %v", err)
		}
	}
	client, server, _ := tlsPair(t, 16<<10)
	go func() {
		client.Write(make([]byte, 100_000))
		client.Close()
	}()
	if n, err := io.Copy(io.Discard, server); n != 100_000 || err != nil { // Read makes the handshake
		t.Errorf("after it: %d bytes, %v", n, err)
	}
}

// A large write that makes the handshake itself must not keep that back.
func TestTLSMakesTheHandshakeBeforeItGathers(t *testing.T) {
	client, server, _ := tlsPair(t, 0)
	go func() {
		server.Write(make([]byte, 100_000))
		server.Close()
	}()
	client.SetDeadline(time.Now().Add(10 * time.Second))
	if n, err := io.Copy(io.Discard, client); n != 100_000 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestTLSShowsWhatIsBelow(t *testing.T) {
	_, server, wire := tlsPair(t, 0)
	if server.NetConn() != net.Conn(wire) {
		t.Errorf("%T", server.NetConn())
	}
}
