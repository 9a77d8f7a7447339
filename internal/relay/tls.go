package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

// CloseNotify says what a TLS stream is that ends without close_notify, between two records.
type CloseNotify uint8

const (
	Required CloseNotify = iota // cut
	Idle                        // whole, if nothing was under way in either direction; else cut
	Optional                    // whole
)

// A TLS is a TLS connection as a proxy needs it. crypto/tls takes the end of the connection below
// for the end of the stream; here the peer has to have said so (close_notify, RFC 8446 section
// 6.1), else the stream was cut, and Read returns io.ErrUnexpectedEOF. What one large Write sends
// goes out in few system calls. Until the handshake is done no more than a given number of bytes is
// read.
type TLS struct {
	*tls.Conn

	// CloseNotify is what a relay makes of an end without it. It must not change once there is one.
	// Read does not look at it.
	CloseNotify CloseNotify

	wire       *wire
	resumable  bool // a Read can stop and go on later: once done, there is no other handshake in it
	atBoundary bool // the stream has ended, without close_notify, between two records; the reader's
}

// ErrHandshakeSize is the error of a handshake that takes more bytes than it may.
var ErrHandshakeSize = errors.New("lbproxy: more bytes than a TLS handshake may take")

// NewTLS speaks TLS over raw. side is tls.Server or tls.Client. At most maxHandshake bytes are read
// before the handshake is done; 0: no bound.
func NewTLS(side func(net.Conn, *tls.Config) *tls.Conn, raw net.Conn, config *tls.Config, maxHandshake int) *TLS {
	w := &wire{Conn: raw, direct: raw, left: maxHandshake, bounded: maxHandshake > 0}
	if w.socket = newSocket(raw); w.socket != nil {
		w.direct = w.socket
	}
	return &TLS{
		Conn: side(w, config), wire: w,
		resumable: config == nil || config.Renegotiation == tls.RenegotiateNever,
	}
}

// Handshake is HandshakeContext without a context.
func (t *TLS) Handshake() error { return t.HandshakeContext(context.Background()) }

// HandshakeContext shakes hands, if that has not been done.
func (t *TLS) HandshakeContext(ctx context.Context) error {
	err := t.Conn.HandshakeContext(ctx)
	if err == nil && !t.wire.open.Swap(true) && t.wire.readFirst {
		// A server has nothing more to say. Its system would delay the acknowledgement, by 40 ms,
		// and a client that leaves Nagle's algorithm on waits for that with its first request.
		quickAck(rawTCP(Underlying(t.wire.Conn)))
	}
	return err
}

// NetConn returns the connection that TLS is spoken over.
func (t *TLS) NetConn() net.Conn { return t.wire.Conn }

// Read reads as tls.Conn's does, but a stream that was cut does not look whole.
func (t *TLS) Read(b []byte) (int, error) {
	if !t.wire.open.Load() {
		if err := t.Handshake(); err != nil {
			return 0, err
		}
	}
	n, err := t.Conn.Read(b)
	if t.wire.end != nil && (err == io.EOF || err == io.ErrUnexpectedEOF) {
		t.atBoundary = err == io.EOF
		if err = t.wire.end; err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

// Write writes as tls.Conn's does. If one of more than 16 KiB fails, how many bytes of b have left
// is not known, and 0 is returned.
func (t *TLS) Write(b []byte) (int, error) { return t.write(b, nil) }

const tlsRecord = 16 << 10 // the most that one holds

func (t *TLS) write(p []byte, b *buffer) (int, error) {
	if len(p) <= tlsRecord || !t.resumable {
		defer b.free()
		return t.Conn.Write(p)
	}
	if err := t.Handshake(); err != nil { // what it says to the peer is not to be kept back
		b.free()
		return 0, err
	}
	t.wire.gather()
	n, err := t.Conn.Write(p)
	b.free() // before a wait for the peer to take the records, which are a second copy
	if e := t.wire.flush(); e != nil {
		err = e
	}
	if err != nil {
		n = 0
	}
	return n, err
}

// await waits for the socket, if there is one. crypto/tls resumes a read that the socket has ended
// with errWait.
func (t *TLS) await(r trier) error {
	if t.wire.socket == nil || !t.resumable {
		r.try()
		return nil
	}
	return t.wire.socket.await(r)
}

func (t *TLS) read(b []byte) (int, error) {
	n, err := plain{t}.read(b)
	if t.wire.socket == nil || !t.resumable {
		return n, err
	}
	for more := n; more == tlsRecord && err == nil && len(b)-n >= tlsRecord; n += more {
		more, err = t.Read(b[n:]) // there may be more records
	}
	if n > 0 && err == errWait {
		err = nil
	}
	return n, err
}

func (t *TLS) closeWrite() error { return t.Conn.CloseWrite() }

// A wire is the connection below a TLS: it bounds the bytes of a handshake, notes how the stream
// has ended, and gathers records.
type wire struct {
	net.Conn
	socket *socket       // the same, if it is TCP; may be nil
	direct io.ReadWriter // socket, or Conn

	open      atomic.Bool // the handshake is done
	bounded   bool        // until then
	left      int         // so many bytes may be read
	readFirst bool        // the first that was done is a read, as a server does
	wrote     bool        // before or after that
	end       error       // what a read has ended with: io.EOF, or that of a reset; the reader's

	mu      sync.Mutex
	writers int     // calls of TLS.write that gather
	held    *buffer // what they have gathered, to the length of full; nil: nothing
	full    int
	err     error // of a write of what was gathered
}

func (w *wire) NetConn() net.Conn { return w.Conn }

func (w *wire) Read(b []byte) (int, error) {
	shaking := !w.open.Load()
	if shaking {
		w.readFirst = w.readFirst || !w.wrote
		if w.bounded {
			if w.left == 0 {
				return 0, ErrHandshakeSize
			}
			b = b[:min(len(b), w.left)]
		}
	}
	n, err := w.direct.Read(b)
	if shaking {
		w.left -= n
	}
	if n == 0 && err != nil && !shaking { // with bytes, what they say comes first
		if err == io.EOF || errors.Is(err, syscall.ECONNRESET) {
			// crypto/tls answers io.EOF by saying whether it came between two records.
			w.end, err = err, io.EOF
		}
	}
	return n, err
}

// Write is given a whole record, or several small ones.
func (w *wire) Write(b []byte) (int, error) {
	if !w.open.Load() {
		w.wrote = true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.writers == 0 && w.err == nil {
		return w.direct.Write(b)
	}
	if w.full+len(b) > tlsBuffer {
		w.send()
	}
	if w.held == nil {
		w.held = newBuffer(tlsBuffer)
	}
	n := copy((*w.held)[w.full:], b)
	w.full += n
	return n, w.err
}

// gather has records kept back until flush, or until there are many.
func (w *wire) gather() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writers++
}

func (w *wire) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writers--
	w.send()
	return w.err
}

// send writes what has been gathered. The caller holds mu.
func (w *wire) send() {
	if w.full > 0 && w.err == nil {
		var n int
		if n, w.err = w.direct.Write((*w.held)[:w.full]); n < w.full && w.err == nil {
			w.err = io.ErrShortWrite
		}
	}
	w.held.free()
	w.held, w.full = nil, 0
}
