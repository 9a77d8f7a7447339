package relay

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A tlsRig is a relay between a TLS client and a plain server.
type tlsRig struct {
	*recorder
	relay     *Relay
	client    *tls.Conn
	c, server *net.TCPConn // c is below client
	t         testing.TB
}

func joinTLS(t testing.TB, mode CloseNotify) *tlsRig {
	t.Helper()
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	c, ours := duplex(t)
	server, theirs := duplex(t)
	j := &tlsRig{recorder: newRecorder(nil), client: tls.Client(c, clientTLS), c: c,
		server: server, t: t}
	up := TLSServer(ours, serverTLS, 0)
	up.CloseNotify = mode
	shaken := make(chan error, 1)
	go func() { shaken <- j.client.Handshake() }()
	proxytest.Must(t, up.Handshake())
	proxytest.Must(t, <-shaken)
	j.relay = newEngine(t, Config{}).Start(up, j, 0)
	j.relay.Connect(theirs)
	t.Cleanup(func() { j.relay.Abort(nil) })
	return j
}

// exchange has an answer to n bytes, and waits until the relay, too, knows that it has arrived.
func (j *tlsRig) exchange(n int) {
	_, before := j.relay.Counts()
	wrote := make(chan struct{})
	go func() { j.client.Write(make([]byte, n)); close(wrote) }()
	io.ReadFull(j.server, make([]byte, n))
	<-wrote
	j.server.Write([]byte("+"))
	io.ReadFull(j.client, make([]byte, 1))
	proxytest.Eventually(j.t, "the answer is counted", func() bool {
		_, now := j.relay.Counts()
		return now > before
	})
}

func (j *tlsRig) kept() { j.exchange(5) }

func TestTLSStreamWithoutCloseNotifyIsCut(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	client, ours := duplex(t)
	server, theirs := duplex(t)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	r.Connect(TLSClient(theirs, clientTLS))
	client.Write([]byte("what?"))
	over := tls.Server(server, serverTLS)
	io.ReadFull(over, make([]byte, 5))
	over.Write([]byte("half of the ans"))
	server.Close()
	if b := proxytest.ReadReset(t, client); string(b) != "half of the ans" {
		t.Errorf("client got %q", b)
	}
	if o := h.wait(t); o.Failed != Server || o.Err != io.ErrUnexpectedEOF || o.Quiet {
		t.Errorf("%+v", o)
	}
}

// Each row says which side leaves TLS without close_notify and when, and what the server sees.
func TestCloseNotify(t *testing.T) {
	if !canMeasure {
		t.Skip("elsewhere nobody knows what is unacknowledged, so nothing is quiet")
	}
	for _, row := range []struct {
		name  string
		mode  CloseNotify
		leave func(*tlsRig)
		clean bool // the server sees an end, not a reset
		quiet bool
	}{
		{"kept, FIN", Required, func(j *tlsRig) { j.kept(); j.c.Close() }, false, true},
		{"kept, FIN", Idle, func(j *tlsRig) { j.kept(); j.c.Close() }, true, false},
		{"kept, FIN", Optional, func(j *tlsRig) { j.kept(); j.c.Close() }, true, false},
		{"kept, close_notify", Required, func(j *tlsRig) {
			j.kept()
			j.client.Close()
		}, true, false},
		{"kept, reset", Required, func(j *tlsRig) {
			j.kept()
			j.c.SetLinger(0)
			j.c.Close()
		}, false, true},
		{"kept, reset", Idle, func(j *tlsRig) {
			j.kept()
			j.c.SetLinger(0)
			j.c.Close()
		}, false, true},
		{"kept, reset", Optional, func(j *tlsRig) {
			j.kept()
			j.c.SetLinger(0)
			j.c.Close()
		}, false, true},
		{"half-closed by FIN", Required, func(j *tlsRig) {
			j.kept()
			j.c.CloseWrite()
		}, false, true},
		{"half-closed by FIN", Optional, func(j *tlsRig) {
			j.kept()
			j.c.CloseWrite()
		}, true, false},
		{"in a record", Required, (*tlsRig).inARecord, false, false},
		{"in a record", Idle, (*tlsRig).inARecord, false, false},
		{"in a record", Optional, (*tlsRig).inARecord, false, false},
		{"an upload that is not acknowledged", Required, (*tlsRig).stuckUpload, false, false},
		{"an upload that is not acknowledged", Idle, (*tlsRig).stuckUpload, false, false},
		{"an upload that is not acknowledged", Optional, (*tlsRig).stuckUpload, true, false},
		{"an answer under way", Required, (*tlsRig).stuckAnswer, false, false},
		{"an answer under way", Idle, (*tlsRig).stuckAnswer, false, false},
		{"an upload, acknowledged by the system", Required, (*tlsRig).midUpload, false, false},
		{"an upload, acknowledged by the system", Idle, (*tlsRig).midUpload, false, false},
		{"after an acknowledgement", Required, (*tlsRig).acknowledged, false, true},
		{"after an acknowledgement", Idle, (*tlsRig).acknowledged, true, false},
	} {
		t.Run(row.name+"/"+[]string{"required", "idle", "optional"}[row.mode], func(t *testing.T) {
			j := joinTLS(t, row.mode)
			row.leave(j)
			// until the relay has seen the end
			if row.name == "an upload that is not acknowledged" {
				proxytest.Eventually(t, "the end has come", func() bool {
					return len(j.over) > 0 || atEnd(&j.relay.up)
				})
			}
			_, err := io.Copy(io.Discard, j.server)
			if clean := err == nil; clean != row.clean || !clean &&
				!errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the server reads %v, want a clean end: %v", err, row.clean)
			}
			j.server.Close()
			j.c.Close()
			o := j.wait(t)
			if o.Quiet != row.quiet || o.Quiet && (o.Failed != Client || o.Err == nil) ||
				!row.clean && o.Err == nil {
				t.Errorf("%+v, want quiet %v", o, row.quiet)
			}
		})
	}
}

// unread bytes do not fit into the window of a peer that does not read, but into the queue before
// it.
const unread = 400 << 10

// inARecord sends a part of one, and a FIN.
func (j *tlsRig) inARecord() {
	j.client.Write([]byte("what?"))
	io.ReadFull(j.server, make([]byte, 5))
	j.c.Write([]byte{23, 3, 3, 0, 100, 1, 2, 3})
	j.c.CloseWrite()
}

// stuckUpload sends more than the server, which does not read yet, has room for, and a FIN.
func (j *tlsRig) stuckUpload() {
	j.client.Write(make([]byte, unread))
	j.c.CloseWrite()
}

// midUpload sends a FIN with nothing left to be acknowledged, but no answer to the last bytes.
func (j *tlsRig) midUpload() {
	j.client.Write(make([]byte, 64<<10))
	io.ReadFull(j.server, make([]byte, 64<<10))
	proxytest.Eventually(j.t, "the upload is counted", func() bool {
		sent, _ := j.relay.Counts()
		return sent == 64<<10 && j.relay.held.Load() == 0
	})
	j.relay.last.Store(Clock() + int64(time.Hour)) // it is not quiet, however slow the machine
	j.c.CloseWrite()
}

// stuckAnswer has an answer under way that the client does not read when it sends a FIN.
func (j *tlsRig) stuckAnswer() {
	j.client.Write([]byte("what?"))
	io.ReadFull(j.server, make([]byte, 5))
	j.server.Write(make([]byte, unread))
	j.c.CloseWrite()
}

// acknowledged is an upload that the server acknowledges each 64 KiB, with a FIN after one of the
// acknowledgements. Somebody between may have forged it.
func (j *tlsRig) acknowledged() {
	for range 3 {
		j.exchange(64 << 10)
	}
	j.c.CloseWrite()
}

// A client that half-closes by FIN gets its answer where close_notify is optional.
func TestAnswerAfterAFINWithoutCloseNotify(t *testing.T) {
	const answer = 300_006
	j := joinTLS(t, Optional)
	j.client.Write([]byte("what?"))
	j.c.CloseWrite()
	if b, err := io.ReadAll(j.server); string(b) != "what?" || err != nil {
		t.Errorf("server got %q, %v", b, err)
	}
	go func() { pattern.Send(j.server, answer); j.server.Close() }()
	if err := pattern.Exactly(j.client, answer); err != nil {
		t.Error(err)
	}
	if o := j.wait(t); o.Err != nil || o.Received != answer {
		t.Errorf("%+v", o)
	}
}

// A client that is cut gets a reset, which is below TLS, rather than a goodbye.
func TestAbortedTLSClientSeesAReset(t *testing.T) {
	j := joinTLS(t, Required)
	go io.Copy(j.server, j.server)
	proxytest.Must(t, proxytest.Ping(j.client))
	j.server.SetLinger(0)
	j.server.Close()
	if _, err := j.client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("it reads %v, want a reset", err)
	}
	j.wait(t)
}

func TestCloseNotifyWaitsForSlowReader(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	for _, ended := range []bool{false, true} { // the client's own stream
		synctest.Test(t, func(t *testing.T) {
			// which has no buffer: what is written waits for the reader
			raw, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			up := TLSServer(ours, serverTLS, 0)
			client := TLSClient(raw, clientTLS) // which tells a cut
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
func TestAbortDoesNotWaitForStuckTLSPeer(t *testing.T) {
	t.Parallel()
	j := joinTLS(t, Required)
	j.c.SetReadBuffer(4 << 10)
	for b := make([]byte, 64<<10); ; { // until all buffers are full
		j.server.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := j.server.Write(b); err != nil {
			break
		}
	}
	j.server.SetLinger(0)
	j.server.Close()
	j.client.Write([]byte("x")) // so that the reset is noticed
	start := time.Now()
	if o := j.wait(t); o.Failed != Server || time.Since(start) > 4*time.Second {
		t.Errorf("%+v after %v", o, time.Since(start))
	}
}

// A TLS client may shake hands after the server has ended its stream.
func TestServerEndWaitsForTheHandshake(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	for name, layer := range map[string]func(net.Conn) net.Conn{
		"tls.Conn": func(c net.Conn) net.Conn { return tls.Server(c, serverTLS) },
		"TLS":      func(c net.Conn) net.Conn { return TLSServer(c, serverTLS, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			raw, ours := duplex(t)
			server, theirs := duplex(t)
			server.CloseWrite()
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(layer(ours), h, 0)
			r.Connect(theirs)
			proxytest.Eventually(t, "the end is being passed on", func() bool {
				return atEnd(&r.down)
			})
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
	return tls.Client(theirs, clientTLS), TLSServer(wire, serverTLS, maxHandshake), wire
}

func TestTLSBatchesRecordsOfALargeWrite(t *testing.T) {
	client, server, wire := tlsPair(t, 0)
	got := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(client)
		got <- all
	}()
	proxytest.Must(t, server.Handshake())
	sent := pattern.At(0, 300_000)
	for i, row := range []struct{ from, to, most int }{{0, 1, 1}, {1, 16_384, 1},
		{16_384, 16_384 + 64<<10, 1}, {16_384 + 64<<10, 300_000, 4}} {
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

func TestTLSReportsABatchThatFailed(t *testing.T) {
	for which := 1; which <= 4; which++ { // of the writes that it takes
		client, server, wire := tlsPair(t, 0)
		go io.Copy(io.Discard, client)
		proxytest.Must(t, server.Handshake())
		wire.failFrom = wire.writes + which
		if n, err := server.Write(make([]byte, 200_000)); n != 0 || err == nil ||
			err.Error() != "broken wire" {
			t.Errorf("write %d fails: %d, %v", which, n, err)
		}
		if n, err := server.Write(make([]byte, 10)); n != 0 || err == nil {
			t.Errorf("afterwards: %d, %v", n, err)
		}
	}
}

func TestTLSLargeWriteThatMakesNoRecord(t *testing.T) {
	client, server, _ := tlsPair(t, 0)
	go io.Copy(io.Discard, client)
	proxytest.Must(t, server.Handshake())
	proxytest.Must(t, server.CloseWrite())
	if n, err := server.Write(make([]byte, 200_000)); n != 0 || err == nil {
		t.Errorf("after the end: %d, %v; want an error", n, err)
	}
}

// The gathered records are a second copy of the written bytes. While the peer does not take them,
// they are the only copy.
func TestTLSWriteHoldsOneBuffer(t *testing.T) {
	client, server, wire := tlsPair(t, 0)
	go io.Copy(io.Discard, client)
	proxytest.Must(t, server.Handshake())
	freed := false
	for range 50 { // a pool may lose what it is given, and does so often under the race detector
		b := make(Buffer, LargeBuffer)
		wire.onWrite = func() { freed = freed || bufferIsFree(&b) }
		if n, err := server.write(b, &b); n != len(b) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	if !freed {
		t.Error("the buffer is kept")
	}
}

// bufferIsFree reports whether b is in the pool that it would go to.
func bufferIsFree(b *Buffer) bool {
	for range 100 {
		if poolOf(len(*b)).Get() == any(b) {
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
	// Read makes the handshake
	first, err := server.Read(make([]byte, 10))
	if n, err2 := io.Copy(io.Discard, server); first != 10 || err != nil || n != 100_000-10 ||
		err2 != nil {
		t.Errorf("after it: %d bytes, %v, and %d, %v", first, err, n, err2)
	}
}

// A large write that makes the handshake itself must not keep that back.
func TestTLSHandshakesBeforeItBatches(t *testing.T) {
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

// A read takes all full records that have come, and waits for no more.
func TestTLSReadTakesTheRecordsThatHaveCome(t *testing.T) {
	if !canMeasure {
		t.Skip("elsewhere a read waits, so it takes one record")
	}
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.SessionTicketsDisabled = true
	clientTLS.DynamicRecordSizingDisabled = true
	peer, ours := duplex(t)
	client, server := tls.Client(peer, clientTLS), TLSServer(ours, serverTLS, 0)
	shaken := make(chan error, 1)
	go func() { shaken <- client.Handshake() }()
	proxytest.Must(t, server.Handshake())
	proxytest.Must(t, <-shaken)
	sender, receiver := newEnd(peer), newEnd(server)
	for _, row := range []struct{ sent, size int }{
		{100, LargeBuffer},
		{tlsRecord, LargeBuffer},
		{2 * tlsRecord, 2 * tlsRecord},
		{2*tlsRecord + 1, LargeBuffer},
	} {
		client.Write(make([]byte, row.sent))
		proxytest.Eventually(t, "all has come", func() bool { return sender.unsent() == 0 })
		d := direction{from: &receiver, to: &sender, n: LargeBuffer, pacer: Pacer{Chunk: row.size}}
		if err := server.await(&d); err != nil || d.n != row.sent || d.err != nil {
			t.Errorf("%d bytes: awaited %v, read %d, %v", row.sent, err, d.n, d.err)
		}
	}
	ours.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	d := direction{from: &receiver, to: &sender}
	if err := server.await(&d); !errors.Is(err, os.ErrDeadlineExceeded) || d.buf != nil {
		t.Errorf("nothing: awaited %v, read %d", err, d.n)
	}
}

// A conn that can only be waited for by reading is not asked for a second record.
func TestTLSReadOverAnyConnTakesOneRecord(t *testing.T) {
	serverTLS, clientTLS := proxytest.TLSConfigs()
	serverTLS.DynamicRecordSizingDisabled = true
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go tls.Server(theirs, serverTLS).Write(make([]byte, tlsRecord))
	ours.SetDeadline(time.Now().Add(10 * time.Second))
	n, err := TLSClient(ours, clientTLS).read(make([]byte, LargeBuffer))
	if n != tlsRecord || err != nil {
		t.Errorf("%d bytes, %v; want a record of %d", n, err, tlsRecord)
	}
}

func TestTLSReadsGoOnOnlyWithoutRenegotiation(t *testing.T) {
	_, c := proxytest.Pipe()
	for _, row := range []struct {
		config *tls.Config
		want   bool
	}{
		{nil, true},
		{&tls.Config{}, true},
		{&tls.Config{Renegotiation: tls.RenegotiateOnceAsClient}, false},
	} {
		if got := TLSClient(c, row.config).resumable; got != row.want {
			t.Errorf("%+v: %v, want %v", row.config, got, row.want)
		}
	}
}

func TestTLSNetConn(t *testing.T) {
	_, server, wire := tlsPair(t, 0)
	if server.NetConn() != net.Conn(wire) {
		t.Errorf("%T", server.NetConn())
	}
}
