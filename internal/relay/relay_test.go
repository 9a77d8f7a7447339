package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

const pattern = proxytest.Pattern(7)

type halfClosing interface {
	net.Conn
	CloseWrite() error
}

// Streams that end well.

func TestHalfClose(t *testing.T) {
	const size = 1 << 20
	serverTLS, clientTLS := proxytest.TLSConfigs()
	overTLS := func(peer, ours net.Conn, peerIsServer bool) (halfClosing, net.Conn) {
		if peerIsServer {
			return tls.Server(peer, serverTLS), TLSClient(ours, clientTLS)
		}
		return tls.Client(peer, clientTLS), TLSServer(ours, serverTLS, 0)
	}
	for _, layer := range []string{"plain", "TLS client", "TLS server", "TLS both", "wrapped"} {
		for _, order := range []string{"client first", "server first", "both"} {
			t.Run(layer+"/"+order, func(t *testing.T) {
				c, ours := duplex(t)
				s, theirs := duplex(t)
				var client, server halfClosing = c, s
				var up, down net.Conn = ours, theirs
				if layer == "TLS client" || layer == "TLS both" {
					client, up = overTLS(c, ours, false)
				}
				if layer == "TLS server" || layer == "TLS both" {
					server, down = overTLS(s, theirs, true)
				}
				if layer == "wrapped" {
					up, down = wrapped{ours}, wrapped{theirs}
				}
				h := newRecorder(nil)
				r := newEngine(t, Config{}).Start(up, h, 0)
				r.Connect(down)
				var wg sync.WaitGroup
				got := make(chan error, 2)
				whole := func(c halfClosing) { got <- pattern.Exactly(c, size) }
				send := func(c halfClosing) {
					if _, err := pattern.Send(c, size); err != nil {
						t.Error(err)
					}
					if err := c.CloseWrite(); err != nil {
						t.Error(err)
					}
				}
				first, second := client, server
				switch order {
				case "server first":
					first, second = server, client
					fallthrough
				case "client first": // the answer begins when all of the question has come
					wg.Go(func() { whole(second); send(second) })
					wg.Go(func() { send(first); whole(first) })
				case "both":
					for _, c := range []halfClosing{client, server} {
						wg.Go(func() { send(c) })
						wg.Go(func() { whole(c) })
					}
				}
				wg.Wait()
				for range 2 {
					if err := <-got; err != nil {
						t.Error(err)
					}
				}
				if o := h.wait(t); o.Err != nil || o.Sent != size || o.Received != size {
					t.Errorf("%+v", o)
				}
			})
		}
	}
}

// wrapped is a TCP connection of somebody else's type.
type wrapped struct{ *net.TCPConn }

func (w wrapped) NetConn() net.Conn { return w.TCPConn }

func TestLongReplyAfterHalfClose(t *testing.T) {
	const size = 64 << 20
	client, server, h := join(t, nil)
	go func() {
		io.Copy(io.Discard, server)
		pattern.Send(server, size)
		server.CloseWrite()
	}()
	client.Write([]byte("everything, please"))
	client.CloseWrite()
	if err := pattern.Exactly(client, size); err != nil {
		t.Error(err)
	}
	if o := h.wait(t); o.Err != nil || o.Received != size || !o.Connected {
		t.Errorf("%+v", o)
	}
}

// A stream that keeps changing between small and bulk goes in and out of splicing.
func TestSmallAndBulkAlternate(t *testing.T) {
	client, server, h := join(t, nil)
	go func() {
		io.Copy(struct{ io.Writer }{server}, server)
		server.CloseWrite()
	}()
	var sent int64
	buf := make([]byte, 16<<20)
	for _, size := range []int{64, 8 << 20, 64, 64, 64, 300_000, 1, 70_000, 16 << 20, 5} {
		go func(at, end int64) {
			for at < end {
				n, err := client.Write(pattern.At(at, int(end-at)))
				if at += int64(n); err != nil {
					t.Error(err)
					return
				}
			}
		}(sent, sent+int64(size))
		if _, err := io.ReadFull(client, buf[:size]); err != nil {
			t.Fatal(err)
		}
		if err := pattern.Check(sent, buf[:size]); err != nil {
			t.Fatal(err)
		}
		sent += int64(size)
	}
	client.CloseWrite()
	if o := h.wait(t); o.Err != nil || o.Sent != sent || o.Received != sent {
		t.Errorf("%+v, want %d bytes each way", o, sent)
	}
}

// Before there is a server.

func TestNothingSentBeforeConnectIsLost(t *testing.T) {
	const size = 300_000
	for _, half := range []bool{false, true} {
		client, ours := duplex(t)
		server, theirs := duplex(t)
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		var wg sync.WaitGroup
		wg.Go(func() {
			pattern.Send(client, size)
			if half {
				client.CloseWrite()
			}
		})
		if half {
			wg.Wait() // it all fits into the buffers of the systems between
		}
		r.Connect(theirs)
		if half {
			if err := pattern.Exactly(server, size); err != nil {
				t.Error(err)
			}
		} else if n, err := io.CopyN(io.Discard, server, size); err != nil {
			t.Error(n, err)
		}
		wg.Wait()
		client.CloseWrite()
		server.Write([]byte("bye"))
		server.CloseWrite()
		if b, err := io.ReadAll(client); string(b) != "bye" || err != nil {
			t.Errorf("half-closed %v: client got %q, %v", half, b, err)
		}
		if o := h.wait(t); o.Err != nil || o.Sent != size {
			t.Errorf("%+v", o)
		}
	}
}

func TestClientGoneBeforeConnect(t *testing.T) {
	for _, row := range []struct {
		name  string
		leave func(c *proxytest.PipeConn)
		over  error // nil: it is not over, for a half-closed client may wait for an answer
	}{
		{"reset", func(c *proxytest.PipeConn) { c.SetLinger(0); c.Close() }, syscall.ECONNRESET},
		{"spoke and reset", func(c *proxytest.PipeConn) {
			c.Write([]byte("x"))
			c.SetLinger(0)
			c.Close()
		}, nil},
		{"half-closed", func(c *proxytest.PipeConn) { c.CloseWrite() }, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, ours := proxytest.Pipe()
				h := newRecorder(nil)
				r := newEngine(t, Config{}).Start(ours, h, 0)
				go row.leave(client)
				synctest.Wait()
				if len(h.over) > 0 != (row.over != nil) {
					t.Errorf("over %v", len(h.over) > 0)
				}
				if len(h.done) > 0 {
					t.Error("done before Connect")
				}
				if row.over == nil {
					r.Abort(io.ErrClosedPipe)
				}
				r.Connect(nil)
				if o := h.wait(t); row.over != nil && (o.Failed != Client || o.Err != row.over) {
					t.Errorf("%+v", o)
				}
				client.Close()
			})
		})
	}
	// a conn without half-close, of which an end is all there is
	synctest.Test(t, func(t *testing.T) {
		client, ours := net.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		client.Close()
		synctest.Wait()
		if len(h.over) == 0 {
			t.Error("not over")
		}
		server, theirs := proxytest.Pipe()
		if r.Connect(theirs) {
			t.Error("Connect returned true when it was over")
		}
		if _, err := server.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("the server reads %v, want a reset", err)
		}
		server.Close()
		if o := h.wait(t); o.Failed != Client || o.Err != errGone {
			t.Errorf("%+v", o)
		}
	})
}

// A client that has spoken and is reset is noticed although its bytes have not been read.
func TestResetBehindUnreadDataIsNoticedBeforeConnect(t *testing.T) {
	if !canMeasure {
		t.Skip("elsewhere it is noticed when the dial is done")
	}
	client, ours := duplex(t)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(ours, h, 0)
	client.Write(make([]byte, 10_000))
	client.SetLinger(0)
	client.Close()
	proxytest.Eventually(t, "it is over", func() bool { return len(h.over) > 0 })
	r.Connect(nil)
	if o := h.wait(t); o.Failed != Client || o.Err != errReset {
		t.Errorf("%+v", o)
	}
}

func TestConnectWithoutServerAborts(t *testing.T) {
	client, ours := duplex(t)
	h := newRecorder(nil)
	if newEngine(t, Config{}).Start(ours, h, 0).Connect(nil) {
		t.Error("Connect returned true")
	}
	proxytest.ReadReset(t, client)
	if o := h.wait(t); o.Failed != NoSide || o.Err != errNoServer || o.Connected {
		t.Errorf("%+v", o)
	}
}

// Cut streams.

func TestResetIsPassedOnAfterTheDataBeforeIt(t *testing.T) {
	const before = 100_000
	rounds := 300
	if !canMeasure {
		rounds = 2 // a second each
	}
	e := newEngine(t, Config{})
	for side := Client; side <= Server; side++ {
		for range rounds {
			from, to, h, _ := joinOver(t, e, nil)
			if side == Server {
				from, to = to, from
			}
			pattern.Send(from, before)
			got := make([]byte, before)
			if _, err := io.ReadFull(to, got); err != nil {
				t.Fatal(err)
			}
			from.SetLinger(0)
			from.Close()
			if more := proxytest.ReadReset(t, to); len(more) > 0 || pattern.Check(0, got) != nil {
				t.Fatalf("%d bytes more, %v", len(more), pattern.Check(0, got))
			}
			if o := h.wait(t); o.Failed != side || o.Err == nil {
				t.Fatalf("%+v", o)
			}
			to.Close()
		}
	}
}

// The bytes of a quiet connection arrived long ago, so its reset is passed on at once, even where
// the system cannot report which bytes have arrived.
func TestResetOfAQuietConnectionIsPassedOnAtOnce(t *testing.T) {
	t.Parallel()
	const conns = 8
	type pair struct {
		client, server *net.TCPConn
		h              *recorder
	}
	var all []pair
	e := newEngine(t, Config{})
	for range conns {
		client, server, h, _ := joinOver(t, e, nil)
		pattern.Send(client, 1000)
		io.ReadFull(server, make([]byte, 1000))
		all = append(all, pair{client, server, h})
	}
	time.Sleep(LingerTime + LingerTime/10)
	start := time.Now()
	for _, p := range all {
		p.client.SetLinger(0)
		p.client.Close()
		proxytest.ReadReset(t, p.server)
		p.server.Close()
		if o := p.h.wait(t); o.Failed != Client {
			t.Errorf("%+v", o)
		}
	}
	if took := time.Since(start); took > conns*LingerTime/2 {
		t.Errorf("%d resets took %v", conns, took)
	}
}

// An answer that was read from a server that has failed then arrives, also at a client that is busy
// sending.
func TestAnswerReadBeforeAResetArrives(t *testing.T) {
	const answer = 300 << 10
	rounds := 20
	if !canMeasure {
		rounds = 2
	}
	e := newEngine(t, Config{})
	for i := range rounds {
		client, server, h, r := joinOver(t, e, nil)
		sending := i%2 == 0
		var wg sync.WaitGroup
		if sending {
			wg.Go(func() {
				for b := make([]byte, 32<<10); ; {
					if _, err := client.Write(b); err != nil {
						return
					}
				}
			})
		} else {
			client.Write([]byte("x"))
		}
		io.ReadFull(server, make([]byte, 1))
		pattern.Send(server, answer)
		proxytest.Eventually(t, "all was written", func() bool {
			_, n := r.Counts()
			return n == answer
		})
		server.SetLinger(0)
		server.Close()
		b := make([]byte, answer)
		if n, err := io.ReadFull(client, b); err != nil {
			t.Fatalf("client got %d of %d bytes, %v", n, answer, err)
		}
		if err := pattern.Check(0, b); err != nil {
			t.Fatal(err)
		}
		// One call of the client gets the error of the reset; it may be a write.
		if n, err := io.Copy(io.Discard, client); n > 0 || err == nil && !sending {
			t.Fatalf("then %d bytes, %v", n, err)
		}
		wg.Wait()
		if o := h.wait(t); o.Failed != Server || o.Received != answer {
			t.Fatalf("%+v", o)
		}
	}
}

// answeredThenReset returns a relay whose server has answered and then reset the connection, of
// which the client has read nothing yet.
func answeredThenReset(t *testing.T) (client net.Conn, h *recorder) {
	c, server, h, _ := joinPipes(newEngine(t, Config{}), nil)
	server.Write([]byte("answer"))
	server.SetLinger(0)
	server.Close()
	c.Write([]byte("x")) // so that the reset is noticed
	return c, h
}

func TestResetFollowsDeliveryAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, h := answeredThenReset(t)
		start := time.Now()
		time.Sleep(100 * time.Millisecond)
		if b := proxytest.ReadReset(t, client); string(b) != "answer" {
			t.Errorf("client got %q", b)
		}
		if o := h.wait(t); o.Failed != Server || time.Since(start) != 100*time.Millisecond {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
	})
}

func TestResetWaitsOneSecondForUnreadData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, h := answeredThenReset(t)
		start := time.Now()
		if o := h.wait(t); o.Failed != Server || o.Received != 0 ||
			time.Since(start) != time.Second {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
		proxytest.ReadReset(t, client)
	})
}

// The server has reset the connection, and the client does not read what came before that.
func TestUnreadSocketDataDelaysTheResetBriefly(t *testing.T) {
	t.Parallel()
	client, server, h := join(t, nil)
	for b := make([]byte, 64<<10); ; {
		server.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := server.Write(b); err != nil {
			break
		}
	}
	server.SetLinger(0)
	server.Close()
	for len(h.done) == 0 {
		client.Write([]byte("x")) // so that the reset is noticed
		select {
		case <-t.Context().Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	if o := h.wait(t); o.Failed != Server {
		t.Errorf("%+v", o)
	}
}

// A client that has half-closed is reset: the download's write finds that, and the upload, which
// has ended, cannot linger for itself.
func TestResetAfterHalfClose(t *testing.T) {
	client, server, h := join(t, nil)
	client.Write([]byte("x"))
	client.CloseWrite()
	if b, err := io.ReadAll(server); string(b) != "x" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	client.SetLinger(0)
	client.Close()
	for b := make([]byte, 64<<10); ; {
		if _, err := server.Write(b); err != nil {
			break
		}
	}
	if o := h.wait(t); o.Failed != Client {
		t.Errorf("%+v", o)
	}
}

// A client that has half-closed is reset while the server is silent: the sweep finds that.
func TestResetOfASilentHalfClosedSideIsNoticed(t *testing.T) {
	if !canMeasure {
		t.Skip("nobody can be asked")
	}
	e := newEngine(t, Config{Idle: time.Hour})
	client, server, h, r := joinOver(t, e, nil)
	client.CloseWrite()
	if _, err := io.ReadAll(server); err != nil {
		t.Error(err)
	}
	proxytest.Eventually(t, "the upload has ended", func() bool { return r.up.phase.Load() == ended })
	e.look(r, Clock()) // which finds nothing yet
	server.Write([]byte("x"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	client.SetLinger(0)
	client.Close()
	proxytest.Eventually(t, "the reset is noticed", func() bool {
		e.look(r, Clock())
		return len(h.done) > 0
	})
	if o := h.wait(t); o.Failed != Client || o.Err != errReset {
		t.Errorf("%+v", o)
	}
	if _, err := server.Write([]byte("late")); err == nil {
		t.Error("the server could still write")
	}
}

func TestAbort(t *testing.T) {
	why := errors.New("revoked")
	for name, half := range map[string]func(client, server *proxytest.PipeConn){
		"neither side has ended": func(client, server *proxytest.PipeConn) {},
		"the client has ended":   func(client, server *proxytest.PipeConn) { client.CloseWrite() },
		"the server has ended":   func(client, server *proxytest.PipeConn) { server.CloseWrite() },
		"the server, after words": func(client, server *proxytest.PipeConn) {
			server.Write([]byte("bye"))
			server.CloseWrite()
		},
		"a write is stuck": func(client, server *proxytest.PipeConn) {
			client.SetLinger(-1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server, h, r := joinPipes(newEngine(t, Config{}), nil)
				go io.Copy(io.Discard, client)
				if name == "a write is stuck" {
					client.Write([]byte("x"))
				} else {
					go io.Copy(io.Discard, server)
				}
				half(client, server)
				synctest.Wait()
				start := time.Now()
				r.Abort(why)
				r.Abort(errors.New("too late"))
				if o := h.wait(t); o.Err != why || o.Failed != NoSide || time.Since(start) != 0 {
					t.Errorf("%+v after %v", o, time.Since(start))
				}
				r.Abort(errors.New("far too late"))
			})
		})
	}
}

func TestAbortBeforeConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		go client.Write([]byte("hello"))
		synctest.Wait()
		r.Abort(nil)
		synctest.Wait()
		if len(h.done) > 0 {
			t.Fatal("done before Connect")
		}
		server, theirs := proxytest.Pipe()
		if r.Connect(theirs) {
			t.Error("Connect returned true")
		}
		if _, err := server.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("server reads %v, want a reset", err)
		}
		server.Close()
		if o := h.wait(t); o.Err == nil || o.Sent != 0 {
			t.Errorf("%+v", o)
		}
	})
}

// Many goroutines end a relay at once, while it ends by itself.
func TestAbortAtAnyTime(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 50
	}
	e := newEngine(t, Config{})
	for i := range rounds {
		client, ours := duplex(t)
		server, theirs := duplex(t)
		h := newRecorder(nil)
		r := e.Start(ours, h, 0)
		var wg sync.WaitGroup
		for n := range 3 {
			wg.Go(func() {
				if i%4 != 0 || n == 0 {
					r.Abort(fmt.Errorf("abort %d", n))
				}
			})
		}
		wg.Go(func() { r.Connect(theirs) })
		wg.Go(func() { client.Write([]byte("x")); client.Close() })
		wg.Go(func() { server.Write([]byte("y")); server.Close() })
		wg.Wait()
		h.wait(t)
	}
}

// Who looks for resets may find one at any time, also when the relay ends or has ended.
func TestFailAtAnyTime(t *testing.T) {
	for i := range 200 {
		synctest.Test(t, func(t *testing.T) {
			client, server, h, r := joinPipes(newEngine(t, Config{}), nil)
			var wg sync.WaitGroup
			for _, c := range []*proxytest.PipeConn{client, server} {
				wg.Go(func() { c.Write([]byte("x")); c.CloseWrite(); io.Copy(io.Discard, c) })
			}
			for range i % 3 {
				wg.Go(func() { r.up.sourceFailed(errReset) })
				wg.Go(func() { r.down.sourceFailed(errReset) })
			}
			wg.Wait()
			o := h.wait(t)
			if (o.Err != nil) != (o.Failed != NoSide) || i%3 == 0 && o.Err != nil {
				t.Errorf("%+v", o)
			}
			r.up.sourceFailed(errReset)
			if len(h.over) > 0 || r.timer != nil && o.Err == nil {
				t.Errorf("after the end it fails: %+v", o)
			}
			client.Close()
			server.Close()
		})
	}
}

// A relay is not done while its handler hears that it is over.
func TestDoneWaitsForOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		h := slowOver{newRecorder(nil), make(chan struct{})}
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(theirs)
		go r.up.sourceFailed(errReset)
		synctest.Wait()
		client.Close()
		server.Close()
		synctest.Wait()
		if len(h.done) > 0 {
			t.Error("it is done")
		}
		close(h.release)
		if o := h.wait(t); o.Err != errReset || o.Failed != Client {
			t.Errorf("%+v", o)
		}
	})
}

type slowOver struct {
	*recorder
	release chan struct{}
}

func (h slowOver) Over(cause error) {
	<-h.release
	h.recorder.Over(cause)
}

// A relay is not done while its conns are being reset.
func TestDoneWaitsForTheReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		slow := &slowReset{PipeConn: theirs, resetting: make(chan struct{}),
			release: make(chan struct{})}
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(slow)
		go r.Abort(io.ErrClosedPipe)
		<-slow.resetting
		server.Close() // as the peer might
		client.Close()
		synctest.Wait()
		if len(h.done) > 0 {
			t.Error("it is done")
		}
		close(slow.release)
		h.wait(t)
	})
}

type slowReset struct {
	*proxytest.PipeConn
	resetting, release chan struct{}
}

func (c *slowReset) SetLinger(int) error {
	close(c.resetting)
	<-c.release
	return nil
}

// The closing of both sides may wait for a peer, as TLS's goodbye does. Abort breaks it off.
func TestAbortWhileClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		slow := &slowClose{Conn: ours, closed: make(chan struct{})}
		slower := &slowReset{PipeConn: theirs, resetting: make(chan struct{}),
			release: make(chan struct{})}
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(slow, h, 0)
		r.Connect(slower)
		client.CloseWrite()
		server.CloseWrite()
		synctest.Wait()
		if len(h.done) > 0 {
			t.Error("it is done")
		}
		why := errors.New("enough")
		go r.Abort(why)
		<-slower.resetting // by now the client's Close has returned
		synctest.Wait()
		if len(h.done) > 0 {
			t.Error("it is done while it is reset")
		}
		close(slower.release)
		if o := h.wait(t); o.Err != why {
			t.Errorf("%+v", o)
		}
		client.Close()
		server.Close()
		synctest.Wait()
		if h.late.Load() {
			t.Error("Done was called twice")
		}
	})
}

// A slowClose is a layer whose Close waits until the conn below is closed.
type slowClose struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *slowClose) NetConn() net.Conn { return (*slowBelow)(c) }
func (c *slowClose) CloseWrite() error { return c.Conn.(halfClosing).CloseWrite() }
func (c *slowClose) Close() error      { <-c.closed; return nil }

type slowBelow slowClose

func (c *slowBelow) Close() error {
	c.once.Do(func() {
		close(c.closed)
	})
	return c.Conn.Close()
}
func (c *slowBelow) LocalAddr() net.Addr                { return nil }
func (c *slowBelow) RemoteAddr() net.Addr               { return nil }
func (c *slowBelow) Read(b []byte) (int, error)         { return c.Conn.Read(b) }
func (c *slowBelow) Write(b []byte) (int, error)        { return c.Conn.Write(b) }
func (c *slowBelow) SetDeadline(time.Time) error        { return nil }
func (c *slowBelow) SetReadDeadline(t time.Time) error  { return nil }
func (c *slowBelow) SetWriteDeadline(t time.Time) error { return nil }

// These tests are about the handler's Verdicts.

func TestVerdictHoldsOneDirection(t *testing.T) {
	for _, blocks := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			client, server, h, _ := joinPipes(newEngine(t, Config{Idle: time.Minute}),
				func(from Side, n int) Verdict {
					switch {
					case from == Server:
						return Verdict{}
					case blocks:
						time.Sleep(time.Hour)
						return Verdict{}
					}
					return Verdict{Wait: time.Hour}
				})
			go io.Copy(server, server)
			start := time.Now()
			if err := proxytest.Ping(client); err != nil || time.Since(start) != 0 {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			if err := proxytest.Ping(client); err != nil || time.Since(start) != time.Hour {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			time.Sleep(time.Hour + 59*time.Second) // held no more, and not idle for long enough
			if len(h.over) > 0 {
				t.Error("it was taken for idle")
			}
			time.Sleep(time.Second)
			if o := h.wait(t); o.Err != errIdle {
				t.Errorf("%+v", o)
			}
			client.Close()
			server.Close()
		})
	}
}

func TestVerdictAborts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tooMuch := errors.New("too much")
		client, server, h, _ := joinPipes(newEngine(t, Config{}), func(Side, int) Verdict {
			return Verdict{Err: tooMuch}
		})
		go io.Copy(io.Discard, server)
		client.Write([]byte("x"))
		proxytest.ReadReset(t, client)
		if o := h.wait(t); o.Err != tooMuch || o.Failed != NoSide || o.Sent != 1 {
			t.Errorf("%+v", o)
		}
	})
}

func TestChunkBoundsEachMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var most [2]int
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		first := true
		h := newRecorder(func(from Side, n int) Verdict {
			if first {
				most[0] = n
			} else {
				most[1] = max(most[1], n)
			}
			first = false
			return Verdict{Chunk: 100}
		})
		r := newEngine(t, Config{}).Start(ours, h, 1000)
		r.Connect(theirs)
		go func() { pattern.Send(client, 10_000); client.CloseWrite() }()
		server.CloseWrite()
		if err := pattern.Exactly(server, 10_000); err != nil {
			t.Error(err)
		}
		h.wait(t)
		if most != [2]int{1000, 100} {
			t.Errorf("%d bytes moved before a verdict and %d then, want 1000 and 100", most[0],
				most[1])
		}
	})
}

func TestPanicInMovedAborts(t *testing.T) {
	boom := errors.New("boom")
	for _, side := range []Side{Client, Server} {
		synctest.Test(t, func(t *testing.T) {
			engine := newEngine(t, Config{})
			client, server, h, _ := joinPipes(engine, func(from Side, n int) Verdict {
				if from == side {
					panic(boom)
				}
				return Verdict{}
			})
			go io.Copy(server, server)
			client.Write([]byte("x"))
			proxytest.ReadReset(t, client)
			o := h.wait(t)
			err, ok := o.Panic.(error)
			if o.Err != ErrPanicked || !ok || !errors.Is(err, boom) ||
				!strings.Contains(err.Error(), "relay_test.go") {
				t.Errorf("%+v", o)
			}
		})
	}
}

// A Verdict about the bytes before an error does not delay the error.
func TestVerdictDoesNotDelayAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(func(Side, int) Verdict { return Verdict{Wait: time.Minute} })
		r := newEngine(t, Config{}).Start(&goneConn{ours, make(chan struct{})}, h, 0)
		r.Connect(theirs)
		start := time.Now()
		server.Write([]byte("answer"))
		proxytest.ReadReset(t, server)
		if o := h.wait(t); o.Failed != Client || o.Received != 1 ||
			time.Since(start) > time.Second {
			t.Errorf("%+v after %v", o, time.Since(start))
		}
	})
}

// A goneConn hides its socket. A write sends part of the bytes and fails, and then a read returns
// io.EOF.
type goneConn struct {
	*proxytest.PipeConn
	failed chan struct{}
}

func (c *goneConn) Write(b []byte) (int, error) {
	close(c.failed)
	return 1, syscall.ECONNRESET
}

func (c *goneConn) Read(b []byte) (int, error) {
	<-c.failed
	return 0, io.EOF
}

// Conns that are not as they should be.

type oddConn struct {
	net.Conn
	read, write func([]byte) (int, error)
}

func (c oddConn) Read(b []byte) (int, error) {
	if c.read != nil {
		return c.read(b)
	}
	return c.Conn.Read(b)
}

func (c oddConn) Write(b []byte) (int, error) {
	if c.write != nil {
		return c.write(b)
	}
	return c.Conn.Write(b)
}

func (c oddConn) CloseWrite() error { return c.Conn.(halfClosing).CloseWrite() }

func TestBadConnsAreErrors(t *testing.T) {
	boom := errors.New("boom")
	for _, row := range []struct {
		name           string
		client, server oddConn
		failed         Side
		want           error
	}{
		{name: "short write to the server", server: oddConn{write: func(b []byte) (int, error) {
			return len(b) - 1, nil
		}}, failed: Server, want: io.ErrShortWrite},
		{name: "negative write to the server", server: oddConn{write: func(b []byte) (int, error) {
			return -1, nil
		}}, failed: Server, want: errBadCount},
		{name: "write of too much", server: oddConn{write: func(b []byte) (int, error) {
			return len(b) + 1, nil
		}}, failed: Server, want: errBadCount},
		{name: "short write to the client", client: oddConn{write: func(b []byte) (int, error) {
			return 0, nil
		}}, failed: Client, want: io.ErrShortWrite},
		{name: "write error", client: oddConn{write: func(b []byte) (int, error) {
			return 0, boom
		}}, failed: Client, want: boom},
		{name: "negative read", client: oddConn{read: func(b []byte) (int, error) {
			return -1, nil
		}}, failed: Client, want: errBadCount},
		{name: "read of too much", server: oddConn{read: func(b []byte) (int, error) {
			return len(b) + 1, nil
		}}, failed: Server, want: errBadCount},
		{name: "reads of nothing", server: oddConn{read: func(b []byte) (int, error) {
			return 0, nil
		}}, failed: Server, want: io.ErrNoProgress},
		{name: "read error", server: oddConn{read: func(b []byte) (int, error) {
			return 0, boom
		}}, failed: Server, want: boom},
	} {
		synctest.Test(t, func(t *testing.T) {
			client, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			row.client.Conn, row.server.Conn = ours, theirs
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(row.client, h, 0)
			r.Connect(row.server)
			go client.Write([]byte("hello"))
			go io.Copy(io.Discard, client)
			go func() { io.Copy(server, server); server.Close() }()
			if o := h.wait(t); o.Failed != row.failed || o.Err != row.want {
				t.Errorf("%s: %+v, want %v, %v", row.name, o, row.failed, row.want)
			}
			client.Close()
		})
	}
}

// A write of nothing may mean something to a layer, such as an empty record.
func TestWritesInPiecesAreNeverEmpty(t *testing.T) {
	var pieces []int
	to := end{stream: plain{oddConn{write: func(b []byte) (int, error) {
		pieces = append(pieces, len(b))
		return len(b), nil
	}}}}
	d := direction{relay: new(Relay), to: &to}
	n, err := d.writePieces(make([]byte, 2*writePiece), nil)
	if n != 2*writePiece || err != nil || !slices.Equal(pieces, []int{writePiece, writePiece}) {
		t.Errorf("%d, %v: %v", n, err, pieces)
	}
}

func TestBufferSize(t *testing.T) {
	plain, socket := new(end), &end{stream: new(socket)}
	for _, row := range []struct {
		from, to *end
		lastRead int
		want     int
	}{
		{socket, nil, LargeBuffer, SmallBuffer}, // during the dial
		{socket, plain, 0, LargeBuffer},         // which holds no buffer while it waits
		{plain, socket, 0, SmallBuffer},
		{plain, socket, SmallBuffer - 1, SmallBuffer},
		{plain, socket, SmallBuffer, LargeBuffer},
	} {
		d := direction{from: row.from, to: row.to, n: row.lastRead}
		if got := d.bufferSize(); got != row.want {
			t.Errorf("%+v: %d", row, got)
		}
	}
}

func TestPanickingConnAborts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(oddConn{Conn: theirs, read: func([]byte) (int, error) { panic("boom") }})
		proxytest.ReadReset(t, client)
		if o := h.wait(t); !strings.HasPrefix(fmt.Sprint(o.Panic), "boom\n\ngoroutine") {
			t.Errorf("%+v", o)
		}
		server.Close()
	})
}

// The first panic counts. One in Close ends nothing that has not ended.
func TestPanicInCloseIsReported(t *testing.T) {
	for _, row := range []struct {
		read func([]byte) (int, error)
		err  error
		want string
	}{
		{nil, nil, "closing"},
		{func([]byte) (int, error) { panic("reading") }, ErrPanicked, "reading"},
	} {
		synctest.Test(t, func(t *testing.T) {
			client, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(ours, h, 0)
			r.Connect(badClose{oddConn{Conn: theirs, read: row.read}})
			client.CloseWrite()
			server.CloseWrite()
			o := <-h.done
			if o.Err != row.err || !strings.HasPrefix(fmt.Sprint(o.Panic), row.want+"\n\n") {
				t.Errorf("%+v, want %v and a panic in %s", o, row.err, row.want)
			}
			client.Close()
			server.Close()
			theirs.Close()
		})
	}
}

// A conn that cannot be half-closed is closed by the goroutine that has copied to it.
func TestPanicInCloseInPlaceOfCloseWriteIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(struct{ net.Conn }{panicAtReset{theirs, "Close"}})
		client.CloseWrite()
		o := <-h.done
		if o.Failed != Server || !strings.HasPrefix(fmt.Sprint(o.Panic), "Close\n\n") {
			t.Errorf("%+v", o)
		}
		client.Close()
		server.Close()
	})
}

// The timer that takes the deadline of a long half-close away has a goroutine of its own.
func TestPanicInSetWriteDeadlineDuringAHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(slowHalfClose{badDeadline{theirs}})
		client.CloseWrite()
		time.Sleep(time.Minute)
		server.Close()
		if o := h.wait(t); o.Err != nil {
			t.Errorf("%+v", o)
		}
		client.Close()
	})
}

// A slowHalfClose is a layer whose half-close takes longer than the timer.
type slowHalfClose struct{ badDeadline }

func (c slowHalfClose) NetConn() net.Conn { return c.badDeadline }
func (c slowHalfClose) CloseWrite() error {
	time.Sleep(3 * time.Second)
	return c.badDeadline.CloseWrite()
}

type badDeadline struct{ *proxytest.PipeConn }

func (badDeadline) SetWriteDeadline(time.Time) error { panic("boom") }

// A sweep resets what is idle, on a goroutine that nobody can catch a panic of.
func TestPanicInResetOfAnIdleConnIsReported(t *testing.T) {
	for _, where := range []string{"SetLinger", "Close"} {
		synctest.Test(t, func(t *testing.T) {
			client, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			h := newRecorder(nil)
			e := newEngine(t, Config{Idle: time.Second, IdleErr: errIdle})
			e.Start(panicAtReset{ours, where}, h, 0).Connect(theirs)
			o := <-h.done
			if o.Err != errIdle || !strings.HasPrefix(fmt.Sprint(o.Panic), where+"\n\n") {
				t.Errorf("%+v", o)
			}
			proxytest.ReadReset(t, server)
			client.Close()
		})
	}
}

type panicAtReset struct {
	*proxytest.PipeConn
	where string
}

func (c panicAtReset) SetLinger(sec int) error {
	if c.where == "SetLinger" {
		panic(c.where)
	}
	return c.PipeConn.SetLinger(sec)
}

func (c panicAtReset) Close() error {
	c.PipeConn.Close()
	if c.where == "Close" {
		panic(c.where)
	}
	return nil
}

type badClose struct{ oddConn }

func (c badClose) NetConn() net.Conn { return c.oddConn.Conn }
func (badClose) Close() error        { panic("closing") }

func TestDataReadWithAnErrorIsDelivered(t *testing.T) {
	for _, err := range []error{io.EOF, errors.New("boom")} {
		synctest.Test(t, func(t *testing.T) {
			_, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			reads := 0
			h := newRecorder(nil)
			read := func(b []byte) (int, error) {
				if reads++; reads > 1 {
					return 0, io.EOF
				}
				return copy(b, "last words"), err
			}
			r := newEngine(t, Config{}).Start(oddConn{Conn: ours, read: read}, h, 0)
			r.Connect(theirs)
			b := make([]byte, 10)
			io.ReadFull(server, b)
			server.Close()
			if o := h.wait(t); o.Sent != 10 || string(b) != "last words" {
				t.Errorf("with %v: %q, %+v", err, b, o)
			}
		})
	}
}

// Conns without half-close.

func TestServerWithoutHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		server, theirs := net.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(theirs)
		go func() { io.Copy(server, server); server.Close() }()
		if err := proxytest.Ping(client); err != nil {
			t.Error(err)
		}
		client.CloseWrite()
		proxytest.ReadReset(t, client) // for its answer may be cut
		if o := h.wait(t); o.Failed != Server || !strings.Contains(fmt.Sprint(o.Err),
			"CloseWrite") || o.Sent != 1 || o.Received != 1 {
			t.Errorf("%+v", o)
		}
	})
}

func TestClientWithoutHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := net.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(theirs)
		go func() { server.Write([]byte("answer")); server.CloseWrite() }()
		if b, err := io.ReadAll(client); string(b) != "answer" || err != nil {
			t.Errorf("client got %q, %v", b, err)
		}
		if o := h.wait(t); o.Failed != Client ||
			!strings.Contains(fmt.Sprint(o.Err), "CloseWrite") {
			t.Errorf("%+v", o)
		}
		proxytest.ReadReset(t, server) // for what it was sent may be cut
		client.Close()
	})
}

func TestHalfCloseIsNotNeededAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := net.Pipe()
		server, theirs := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Connect(theirs)
		go func() { io.ReadAll(server); server.Close() }()
		client.Write([]byte("x"))
		client.Close()
		if o := h.wait(t); o.Err != nil || o.Sent != 1 {
			t.Errorf("%+v", o)
		}
	})
	synctest.Test(t, func(t *testing.T) { // though that is still being passed on
		client, ours := proxytest.Pipe()
		server, theirs := net.Pipe()
		held := make(chan struct{})
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(slowCloser{ours, held}, h, 0)
		r.Connect(theirs)
		server.Close()
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("client reads %v, want the end", err)
		}
		client.CloseWrite()
		time.Sleep(time.Second) // more than the upload waits for an error to come back
		close(held)
		if o := h.wait(t); o.Err != nil {
			t.Errorf("%+v", o)
		}
	})
}

// The end of one stream does not wait for a reader who is stuck in the other.
func TestEndPassesAStuckWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, h, r := joinPipes(newEngine(t, Config{}), nil)
		go server.Write([]byte("what the client does not read"))
		synctest.Wait()
		client.CloseWrite()
		server.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := server.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the server reads %v, want the end", err)
		}
		r.Abort(nil)
		h.wait(t)
	})
}

// A slowCloser is slow to return from telling its peer that the stream has ended.
type slowCloser struct {
	*proxytest.PipeConn
	held chan struct{}
}

func (c slowCloser) CloseWrite() error {
	err := c.PipeConn.CloseWrite()
	<-c.held
	return err
}

// The client goes on sending, so that it has unread bytes in our socket when its answer is on its
// way: closing would cost it the answer.
func TestAnswerArrivesAtClientWithoutHalfClose(t *testing.T) {
	const size = 2 << 20
	client, ours := duplex(t)
	server, theirs := duplex(t)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(layered{ours}, h, 0)
	r.Connect(theirs)
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := make([]byte, 64<<10); ; {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	})
	for last, now := int64(-1), int64(0); now != last; { // until the upload is stuck
		<-time.After(100 * time.Millisecond)
		last = now
		now, _ = r.Counts()
	}
	wg.Go(func() { pattern.Send(server, size); server.CloseWrite() })
	b := make([]byte, size)
	n, err := io.ReadFull(client, b)
	if err != nil || pattern.Check(0, b) != nil {
		t.Errorf("got %d of %d bytes, %v, %v", n, size, err, pattern.Check(0, b[:n]))
	}
	client.Close()
	wg.Wait()
	if o := h.wait(t); o.Failed != Client {
		t.Errorf("%+v", o)
	}
}

// Only closing tells such a client that its answer is complete.
func TestWholeAnswerEndsInACloseThoughTheClientCannotHalfClose(t *testing.T) {
	const size = 1 << 20
	client, ours := duplex(t)
	server, theirs := duplex(t)
	h := newRecorder(nil)
	r := newEngine(t, Config{}).Start(layered{ours}, h, 0)
	r.Connect(theirs)
	go func() { pattern.Send(server, size); server.CloseWrite() }()
	if err := pattern.Exactly(client, size); err != nil {
		t.Error(err)
	}
	proxytest.ReadReset(t, server) // for what it was sent may be cut
	if o := h.wait(t); o.Failed != Client {
		t.Errorf("%+v", o)
	}
}

// layered is a layer over a conn that has no half-close.
type layered struct{ net.Conn }

func (l layered) NetConn() net.Conn { return l.Conn }

func TestWrappersAreClosed(t *testing.T) {
	for _, how := range []string{"done", "abort", "no server"} {
		synctest.Test(t, func(t *testing.T) {
			client, ours := proxytest.Pipe()
			server, theirs := proxytest.Pipe()
			var closed atomic.Int32
			h := newRecorder(nil)
			r := newEngine(t, Config{}).Start(countedClose{ours, &closed}, h, 0)
			if how == "no server" {
				r.Connect(nil)
			} else {
				r.Connect(countedClose{theirs, &closed})
			}
			if how == "abort" {
				r.Abort(nil)
			}
			client.CloseWrite()
			server.CloseWrite()
			h.wait(t)
			want := int32(2)
			if how == "no server" {
				want = 1
			}
			if closed.Load() != want {
				t.Errorf("%s: %d wrappers were closed, want %d", how, closed.Load(), want)
			}
			client.Close()
			server.Close()
			theirs.Close()
		})
	}
}

type countedClose struct {
	*proxytest.PipeConn
	closed *atomic.Int32
}

func (c countedClose) NetConn() net.Conn { return c.PipeConn }
func (c countedClose) Close() error      { c.closed.Add(1); return c.PipeConn.Close() }

// A foreign NetConn is asked once for each side, when nothing is locked.
func TestNetConnIsNotCalledUnderALock(t *testing.T) {
	client, ours := duplex(t)
	var r *Relay
	var asked atomic.Int32
	c := &nosy{TCPConn: ours}
	c.ask = func() {
		asked.Add(1)
		if r != nil {
			r.Counts()
			r.isSettled() // takes the lock
		}
	}
	h := newRecorder(nil)
	r = newEngine(t, Config{Idle: 10 * time.Millisecond}).Start(c, h, 0)
	client.Write([]byte("x"))
	server, theirs := duplex(t)
	r.Connect(theirs)
	server.Read(make([]byte, 1))
	if o := h.wait(t); o.Err != errIdle {
		t.Errorf("%+v", o)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("NetConn was called %d times, want 1", n)
	}
}

type nosy struct {
	*net.TCPConn
	ask func()
}

func (c *nosy) NetConn() net.Conn { c.ask(); return c.TCPConn }

func TestUnderlying(t *testing.T) {
	_, c := proxytest.Pipe()
	if got := Underlying(layered{layered{c}}); got != net.Conn(c) {
		t.Errorf("%T", got)
	}
	if got := Underlying(layered{}); got != net.Conn(layered{}) {
		t.Errorf("%T", got)
	}
}

// Bytes written before Linger arrive, although bytes of the peer remain unread.
func TestLinger(t *testing.T) {
	peer, ours := duplex(t)
	peer.Write(make([]byte, 64<<10))
	ours.Write(bytes.Repeat([]byte("no "), 1000))
	Linger(t.Context(), ours)
	if b := proxytest.ReadReset(t, peer); len(b) != 3000 {
		t.Errorf("%d bytes arrived, want 3000", len(b))
	}
	synctest.Test(t, func(t *testing.T) { // nothing is known to be under way
		peer, ours := proxytest.Pipe()
		start := time.Now()
		if Linger(t.Context(), ours); time.Since(start) != 0 {
			t.Errorf("took %v", time.Since(start))
		}
		peer.Close()
	})
	stopped, stop := context.WithCancel(t.Context())
	stop()
	peer, ours = duplex(t)
	ours.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err := error(nil); err == nil; {
		_, err = ours.Write(make([]byte, 1<<20))
	}
	start := time.Now()
	Linger(stopped, ours)
	if took := time.Since(start); took > LingerTime/2 {
		t.Errorf("stopped, and it took %v", took)
	}
	peer.Close()
}

// What does not fit into the peer's window waits in our queue until the peer reads.
func TestLingerWaitsForASlowReader(t *testing.T) {
	const size = 256 << 10
	peer, ours := duplex(t)
	peer.SetReadBuffer(16 << 10)
	ours.SetWriteBuffer(2 * size)
	pattern.Send(ours, size)
	if canMeasure && unsent(rawTCP(ours)) == 0 {
		t.Fatal("all of it has arrived: what is this test for?")
	}
	go Linger(t.Context(), ours)
	b := make([]byte, size)
	if n, err := io.ReadFull(peer, b); err != nil || pattern.Check(0, b) != nil {
		t.Errorf("%d of %d bytes arrived: %v, %v", n, size, err, pattern.Check(0, b[:n]))
	}
	proxytest.ReadReset(t, peer)
}

// A relay that waits allocates nothing for a round trip.
func TestRoundTripsAllocateNothing(t *testing.T) {
	if raceEnabled || !canMeasure {
		t.Skip("the race detector and the portable path allocate")
	}
	client, server, _ := join(t, nil)
	go func() {
		for b := make([]byte, 64); ; {
			if _, err := io.ReadFull(server, b); err != nil {
				return
			}
			server.Write(b)
		}
	}()
	b := make([]byte, 64)
	trip := func() {
		client.Write(b)
		if _, err := io.ReadFull(client, b); err != nil {
			t.Fatal(err)
		}
	}
	trip()
	// A garbage collection empties the pools once in a while.
	if n := testing.AllocsPerRun(2000, trip); n > 0.05 {
		t.Errorf("%v allocations a round trip, want 0", n)
	}
}
