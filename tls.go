package lbproxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// HandshakeTLS returns an AdmitFunc that performs a TLS handshake with the client, then asks next,
// which finds a [*TLSConn] in Client and no deadline on it; a nil next admits everyone. The
// handshake has 10 seconds and at most 16 KiB from the client; use [TLSServer] for other bounds.
// HandshakeTLS panics if config is nil. config must not be changed afterwards; to replace a
// certificate, set its GetCertificate, which is called in each handshake.
//
// It does not bound how many handshakes are in progress: Options.MaxConns does. Limits that next
// sets begin after the handshake. To bound the handshakes of one address, wrap HandshakeTLS in an
// AdmitFunc that counts, as the example named Limited does.
func HandshakeTLS(config *tls.Config, next AdmitFunc) AdmitFunc {
	if config == nil {
		panic("lbproxy: HandshakeTLS: config is nil")
	}
	return func(ctx context.Context, c *Conn) error {
		raw := c.Client
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		t := TLSServer(raw, config, 16<<10)
		if err := t.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("lbproxy: TLS handshake: %w", err)
		}
		raw.SetDeadline(time.Time{})
		c.Client = t
		if next == nil {
			return nil
		}
		return next(ctx, c)
	}
}

// CloseNotify says how a [TLSConn] treats a client that closes its connection without close_notify
// (RFC 8446, section 6.1). Many clients do so when they no longer need a connection that they kept;
// an attacker can fake it by a forged FIN.
type CloseNotify int

const (
	// CloseNotifyRequired, the zero value, resets the upstream. The end is EndClientClosed if both
	// directions were idle at a record boundary and nothing was unacknowledged, else
	// EndClientError.
	CloseNotifyRequired CloseNotify = iota

	// CloseNotifyIdle passes such an idle end on to the upstream as the end of the stream. Whoever
	// can forge a FIN can shorten a stream at a moment when it is idle.
	CloseNotifyIdle

	// CloseNotifyOptional passes every FIN on as the end of the stream, for clients that half-close
	// by FIN. Whoever can forge a FIN can shorten a stream anywhere.
	CloseNotifyOptional
)

// String returns "required", "idle" or "optional".
func (n CloseNotify) String() string {
	switch n {
	case CloseNotifyRequired:
		return "required"
	case CloseNotifyIdle:
		return "idle"
	case CloseNotifyOptional:
		return "optional"
	}
	return fmt.Sprintf("CloseNotify(%d)", int(n))
}

// ErrHandshakeSize is the error of a handshake that takes more bytes than [TLSServer] allows.
var ErrHandshakeSize = relay.ErrHandshakeSize

// A TLSConn is the server side of a TLS connection, for a [Conn]'s Client. It differs from a
// tls.Conn in that the end of the connection below it is not the end of the stream: the client must
// have said so by close_notify, else Read returns io.ErrUnexpectedEOF. A large Write leaves in few
// system calls. Until the handshake is done, no more than a given number of bytes is read.
//
// One goroutine may read while another writes. Methods other than ConnectionState, LocalAddr and
// RemoteAddr return net.ErrClosed when the app is done with the connection.
type TLSConn struct {
	// CloseNotify must be set before the connection is served.
	CloseNotify CloseNotify

	conn atomic.Pointer[relay.TLS] // nil after release
	over *tlsOver                  // set before conn is nil
}

// A tlsOver is the part of a TLSConn that is left when it is over.
type tlsOver struct {
	local, remote net.Addr
	state         tls.ConnectionState
}

// TLSServer returns a TLSConn over raw. At most maxHandshake bytes are read before the handshake is
// done; 0 means any number. config must not be nil or changed afterwards, as for tls.Server.
func TLSServer(raw net.Conn, config *tls.Config, maxHandshake int) *TLSConn {
	c := new(TLSConn)
	c.conn.Store(relay.TLSServer(raw, config, maxHandshake))
	return c
}

// hold returns the connection for the relay.
func (c *TLSConn) hold() net.Conn {
	t := c.conn.Load()
	if t == nil {
		return c
	}
	t.CloseNotify = relay.CloseNotify(c.CloseNotify)
	return t
}

// release lets go of the connection and its buffers.
func (c *TLSConn) release() {
	if t := c.conn.Load(); t != nil {
		c.over = &tlsOver{t.LocalAddr(), t.RemoteAddr(), t.ConnectionState()}
		c.conn.Store(nil)
	}
}

// Handshake is HandshakeContext with the background context.
func (c *TLSConn) Handshake() error { return c.HandshakeContext(context.Background()) }

// HandshakeContext performs the TLS handshake unless it has been performed. See
// [tls.Conn.HandshakeContext].
func (c *TLSConn) HandshakeContext(ctx context.Context) error {
	return c.do(func(t *relay.TLS) error { return t.HandshakeContext(ctx) })
}

// ConnectionState returns what the handshake agreed on. It may be called after the end, too.
func (c *TLSConn) ConnectionState() tls.ConnectionState {
	if t := c.conn.Load(); t != nil {
		return t.ConnectionState()
	}
	return c.over.state
}

// NetConn returns the connection below TLS; nil when the app is done with it.
func (c *TLSConn) NetConn() net.Conn {
	if t := c.conn.Load(); t != nil {
		return t.NetConn()
	}
	return nil
}

// LocalAddr returns the local address.
func (c *TLSConn) LocalAddr() net.Addr {
	if t := c.conn.Load(); t != nil {
		return t.LocalAddr()
	}
	return c.over.local
}

// RemoteAddr returns the client's address.
func (c *TLSConn) RemoteAddr() net.Addr {
	if t := c.conn.Load(); t != nil {
		return t.RemoteAddr()
	}
	return c.over.remote
}

// Read reads decrypted bytes. It returns io.EOF only when the client has sent close_notify.
func (c *TLSConn) Read(b []byte) (int, error) { return c.io(b, (*relay.TLS).Read) }

// Write writes b. If it fails and b has more than 16 KiB, it is not known how many bytes of b
// were sent, and 0 is returned.
func (c *TLSConn) Write(b []byte) (int, error) { return c.io(b, (*relay.TLS).Write) }

func (c *TLSConn) io(b []byte, f func(*relay.TLS, []byte) (int, error)) (int, error) {
	if t := c.conn.Load(); t != nil {
		return f(t, b)
	}
	return 0, net.ErrClosed
}

// CloseWrite sends close_notify.
func (c *TLSConn) CloseWrite() error { return c.do((*relay.TLS).CloseWrite) }

// Close sends close_notify and closes the connection.
func (c *TLSConn) Close() error { return c.do((*relay.TLS).Close) }

// SetDeadline sets the deadline of the connection below, like SetReadDeadline and SetWriteDeadline
// together. After a Write has timed out the TLS state is corrupt, and all later ones fail.
func (c *TLSConn) SetDeadline(at time.Time) error {
	return c.do(func(t *relay.TLS) error { return t.SetDeadline(at) })
}

// SetReadDeadline sets the deadline for Read.
func (c *TLSConn) SetReadDeadline(at time.Time) error {
	return c.do(func(t *relay.TLS) error { return t.SetReadDeadline(at) })
}

// SetWriteDeadline sets the deadline for Write.
func (c *TLSConn) SetWriteDeadline(at time.Time) error {
	return c.do(func(t *relay.TLS) error { return t.SetWriteDeadline(at) })
}

func (c *TLSConn) do(f func(*relay.TLS) error) error {
	if t := c.conn.Load(); t != nil {
		return f(t)
	}
	return net.ErrClosed
}
