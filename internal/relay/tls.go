package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

// CloseNotify says how to treat a TLS stream that ends between two records without close_notify.
type CloseNotify uint8

const (
	Required CloseNotify = iota // as cut
	Idle                        // as complete if no bytes were under way either way, else as cut
	Optional                    // as complete
)

// A TLS is a TLS connection for a proxy. It differs from a tls.Conn in three ways. A stream ends
// only with close_notify (RFC 8446, section 6.1): if the connection below ends without it, Read
// returns io.ErrUnexpectedEOF. A large Write takes few system calls. The handshake reads a bounded
// number of bytes.
type TLS struct {
	*tls.Conn

	// CloseNotify says how a relay treats an end without close_notify. It must not change once the
	// relay has started. Read does not use it.
	CloseNotify CloseNotify

	wire       *wire
	isServer   bool
	resumable  bool // a Read may stop and go on later, as it cannot meet a renegotiation
	atBoundary bool // the stream has ended between two records, without close_notify; the reader's
}

// ErrHandshakeSize is the error of a handshake that needs more bytes than allowed.
var ErrHandshakeSize = errors.New("lbproxy: more bytes than a TLS handshake may take")

// TLSServer returns the server's side of a TLS over raw. The handshake reads at most maxHandshake
// bytes; 0 means no bound.
func TLSServer(raw net.Conn, config *tls.Config, maxHandshake int) *TLS {
	t := newTLS(tls.Server, raw, config)
	t.isServer = true
	if maxHandshake > 0 {
		t.wire.left = maxHandshake
	}
	return t
}

// TLSClient returns the client's side of a TLS over raw.
func TLSClient(raw net.Conn, config *tls.Config) *TLS { return newTLS(tls.Client, raw, config) }

func newTLS(side func(net.Conn, *tls.Config) *tls.Conn, raw net.Conn, config *tls.Config) *TLS {
	w := &wire{Conn: raw, direct: raw, left: math.MaxInt}
	if w.socket = newSocket(raw, rawTCP(raw)); w.socket != nil {
		w.direct = w.socket
	}
	return &TLS{
		Conn: side(w, config), wire: w,
		resumable: config == nil || config.Renegotiation == tls.RenegotiateNever,
	}
}

// Handshake is HandshakeContext without a context.
func (t *TLS) Handshake() error { return t.HandshakeContext(context.Background()) }

// HandshakeContext performs the handshake, unless it has been done.
func (t *TLS) HandshakeContext(ctx context.Context) error {
	err := t.Conn.HandshakeContext(ctx)
	if err == nil && !t.wire.open.Swap(true) && t.isServer {
		// A server sends nothing more now, so its system would delay the acknowledgement by 40 ms.
		// A client with Nagle's algorithm would hold back its first request for that long.
		quickAck(rawTCP(Underlying(t.wire.Conn)))
	}
	return err
}

// NetConn returns the connection below the TLS.
func (t *TLS) NetConn() net.Conn { return t.wire.Conn }

// Read is tls.Conn's Read, but returns io.ErrUnexpectedEOF for a stream that was cut.
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

// Write is tls.Conn's Write. If a Write of more than 16 KiB fails, it returns 0, because the number
// of bytes that were sent is unknown.
func (t *TLS) Write(b []byte) (int, error) { return t.write(b, nil) }

const tlsRecord = 16 << 10 // the most bytes in a record

func (t *TLS) write(p []byte, b *Buffer) (int, error) {
	if len(p) <= tlsRecord || !t.resumable {
		defer b.Free()
		return t.Conn.Write(p)
	}
	if err := t.Handshake(); err != nil { // before gathering, so that its records go out at once
		b.Free()
		return 0, err
	}
	t.wire.gather()
	n, err := t.Conn.Write(p)
	b.Free() // before waiting for the peer, since the records are a second copy
	if e := t.wire.flush(); e != nil {
		err = e
	}
	if err != nil {
		n = 0
	}
	return n, err
}

// await waits on the socket, if there is one. crypto/tls can resume a read that has failed with
// errWait, because that is a temporary error.
func (t *TLS) await(d *direction) error {
	if t.wire.socket == nil || !t.resumable {
		d.try()
		return nil
	}
	return t.wire.socket.await(d)
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

// A wire is the connection below a TLS. It bounds the bytes of a handshake, records how the stream
// has ended, and gathers records into few writes.
type wire struct {
	net.Conn
	socket *socket       // the same, if it is TCP; may be nil
	direct io.ReadWriter // socket, or Conn

	open atomic.Bool // the handshake is done
	left int         // bytes that the handshake may still read
	end  error       // the error of a read: io.EOF, or a reset's; the reader's

	mu      sync.Mutex
	writers int     // calls of TLS.write in progress, whose records are gathered
	held    *Buffer // the gathered records, in its first full bytes; nil: none
	full    int
	err     error // the first error of writing held
}

func (w *wire) NetConn() net.Conn { return w.Conn }

func (w *wire) Read(b []byte) (int, error) {
	shaking := !w.open.Load()
	if shaking {
		if w.left == 0 {
			return 0, ErrHandshakeSize
		}
		b = b[:min(len(b), w.left)]
	}
	n, err := w.direct.Read(b)
	if shaking {
		w.left -= n
	}
	if n == 0 && err != nil && !shaking { // an error that comes with bytes is returned after them
		if err == io.EOF || errors.Is(err, syscall.ECONNRESET) {
			// crypto/tls answers io.EOF by saying whether it came between two records.
			w.end, err = err, io.EOF
		}
	}
	return n, err
}

// Write writes a whole record, or several small ones. crypto/tls calls it.
func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.writers == 0 && w.err == nil {
		return w.direct.Write(b)
	}
	if w.full+len(b) > tlsBuffer {
		w.send()
	}
	if w.held == nil {
		w.held = NewBuffer(tlsBuffer)
	}
	n := copy((*w.held)[w.full:], b)
	w.full += n
	return n, w.err
}

// gather makes Write keep back records until flush, or until held is full.
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

// send writes the gathered records. The caller holds mu.
func (w *wire) send() {
	if w.full > 0 && w.err == nil {
		var n int
		if n, w.err = w.direct.Write((*w.held)[:w.full]); n < w.full && w.err == nil {
			w.err = io.ErrShortWrite
		}
	}
	w.held.Free()
	w.held, w.full = nil, 0
}
