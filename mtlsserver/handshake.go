package mtlsserver

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// orDefaults fills in what is zero.
func (h Handshake) orDefaults() Handshake {
	return Handshake{
		Timeout:       cmp.Or(h.Timeout, 10*time.Second),
		MaxConcurrent: cmp.Or(h.MaxConcurrent, 256),
		MaxPerAddress: cmp.Or(h.MaxPerAddress, 16),
		MaxBytes:      cmp.Or(h.MaxBytes, 16<<10),
	}
}

// A gate bounds the handshakes in progress, those of all apps together and those from each address. Those beyond wait
// for a place, in the order they came; so many from one address, or in all, that they would not get one soon are refused.
type gate struct {
	mu      sync.Mutex
	all     int
	from    map[netip.Prefix]int // no entry is 0
	waiting []*waiter
}

type waiter struct {
	from netip.Prefix
	in   chan struct{} // closed when it is counted in
}

// enter counts a handshake in, when there is a place for it. Every nil it returns is owed a leave.
func (g *gate) enter(ctx context.Context, from netip.Prefix, h Handshake) error {
	w := &waiter{from, make(chan struct{})}
	g.mu.Lock()
	refusal := g.full(from, h)
	if refusal == nil {
		g.take(w)
		g.mu.Unlock()
		return nil
	}
	alike := 0
	for _, other := range g.waiting {
		if other.from == from {
			alike++
		}
	}
	if alike >= 4*h.MaxPerAddress || len(g.waiting) >= h.MaxConcurrent {
		g.mu.Unlock()
		return refusal
	}
	g.waiting = append(g.waiting, w)
	g.mu.Unlock()
	select {
	case <-w.in:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.waiting, w)
	if i < 0 {
		return nil // it got its place just now
	}
	g.waiting = slices.Delete(g.waiting, i, i+1)
	if ctx.Err() == context.Canceled {
		return net.ErrClosed // by us
	}
	return refusal
}

// full says why there is no place for a handshake from an address, or returns nil. The caller holds mu.
func (g *gate) full(from netip.Prefix, h Handshake) error {
	switch {
	case g.from[from] >= h.MaxPerAddress:
		return &Refusal{Reason: TooManyFromAddress}
	case g.all >= h.MaxConcurrent:
		return &Refusal{Reason: TooManyHandshakes}
	}
	return nil
}

// take counts w in. The caller holds mu.
func (g *gate) take(w *waiter) {
	g.all++
	g.from[w.from]++
	close(w.in)
}

// leave gives a place back, and to the first who can use it.
func (g *gate) leave(from netip.Prefix, h Handshake) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.from[from]--; g.from[from] == 0 {
		delete(g.from, from)
	}
	for i, w := range g.waiting {
		if g.full(w.from, h) == nil {
			g.waiting = slices.Delete(g.waiting, i, i+1)
			g.take(w)
			return
		}
	}
}

// network is what a client has one of: its IPv4 address, or the /64 of an IPv6 one, in which it chooses the rest.
func network(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.Is4() {
		return netip.PrefixFrom(ip, 32)
	}
	p, _ := ip.Prefix(64)
	return p
}

var errTooLarge = errors.New("more bytes than a handshake needs")

// A wire is what crypto/tls has for the raw connection. It bounds what an unknown client may send, and remembers
// whether the end of the stream came from here: crypto/tls takes that for the end the peer meant (close_notify).
type wire struct {
	net.Conn
	left  int  // bytes that may be read, while the client is not known
	known bool // no bound any more
	ended bool // belongs to the reader
}

func (w *wire) Read(b []byte) (int, error) {
	if !w.known {
		if w.left == 0 {
			return 0, errTooLarge
		}
		b = b[:min(len(b), w.left)]
	}
	n, err := w.Conn.Read(b)
	w.left -= n
	if n == 0 && err == io.EOF { // with bytes, what they say comes first
		w.ended = true
	}
	return n, err
}

// NetConn lets lbproxy find the TCP connection, to reset it.
func (w *wire) NetConn() net.Conn { return w.Conn }

// A clientConn is a client's connection whose handshake is done. A stream that ends without close_notify was cut.
type clientConn struct {
	*tls.Conn
	wire *wire
	addr connAddr
}

func (c *clientConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF && c.wire.ended {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (c *clientConn) RemoteAddr() net.Addr { return c.addr }

// A connAddr is a client's address and the connection's number: an lbproxy.Result names its connection by nothing
// but the text of the client's address, and that may come back while the end of its last connection is on its way.
type connAddr struct {
	net.Addr
	number uint64
}

func (a connAddr) String() string { return fmt.Sprintf("%s#%d", a.Addr, a.number) }

// handshake makes raw a TLS connection whose client has proved who it is, or says why not, to the client as well.
func handshake(raw net.Conn, config *tls.Config, h Handshake, deadline time.Time) (*clientConn, error) {
	if err := raw.SetDeadline(deadline); err != nil {
		return nil, err
	}
	w := &wire{Conn: raw, left: h.MaxBytes}
	c := &clientConn{Conn: tls.Server(w, config), wire: w}
	// On a goroutine of its own: a handshake grows the stack to 32 KiB or so, which a session would keep.
	done := make(chan error)
	go func() {
		var err error
		defer func() {
			if p := recover(); p != nil { // here nobody else would, and it would end the process
				err = fmt.Errorf("panic: %v", p)
			}
			done <- err
		}()
		err = c.Handshake()
	}()
	if err := <-done; err != nil {
		refusal := refusalOf(err, c.ConnectionState())
		switch refusal.Reason {
		case HandshakeTimeout, HandshakeTooLarge, NotTLS, ClientGone, ClientAlert: // crypto/tls has sent no alert
		default:
			linger(raw)
		}
		return nil, refusal
	}
	w.known = true
	return c, raw.SetDeadline(time.Time{})
}

// linger lets a refused client read the alert that says so, before a reset that may throw away what is on its way.
func linger(raw net.Conn) {
	if c, ok := raw.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		raw.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		io.CopyN(io.Discard, raw, 256<<10)
	}
}

// refusalOf says why a handshake failed.
func refusalOf(err error, cs tls.ConnectionState) *Refusal {
	var refusal *Refusal // by VerifyConnection
	if errors.As(err, &refusal) {
		return refusal
	}
	return &Refusal{Reason: reasonOf(err, cs), Err: err}
}

func reasonOf(err error, cs tls.ConnectionState) Reason {
	var (
		verify *tls.CertificateVerificationError
		header tls.RecordHeaderError
		op     *net.OpError
	)
	switch text := err.Error(); {
	case errors.As(err, &verify):
		return reasonOfChain(verify)
	case errors.As(err, &header):
		return NotTLS
	case errors.Is(err, errTooLarge):
		return HandshakeTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return HandshakeTimeout
	case errors.As(err, &op) && op.Op == "remote error":
		return ClientAlert
	case errors.Is(err, io.EOF), op != nil, errors.Is(err, io.ErrUnexpectedEOF):
		return ClientGone
	case len(cs.PeerCertificates) > 0: // they were found good, and then something was wrong
		return NoProof

	// crypto/tls has no value for these. Nothing but the word in the log depends on its text.
	case strings.HasPrefix(text, "tls: client didn't provide a certificate"):
		return NoCertificate
	case strings.HasPrefix(text, "tls: failed to parse client certificate"):
		return BadCertificate
	case strings.HasPrefix(text, "tls: client offered only unsupported versions"):
		return OldTLS
	}
	return HandshakeFailed
}

// reasonOfChain says why a certificate was not verified.
func reasonOfChain(err *tls.CertificateVerificationError) Reason {
	var invalid x509.CertificateInvalidError
	switch {
	case !errors.As(err, &invalid):
		return UnknownCA
	case invalid.Reason == x509.IncompatibleUsage:
		return BadExtKeyUsage
	case invalid.Reason == x509.Expired && time.Now().Before(invalid.Cert.NotBefore):
		return NotYetValid
	case invalid.Reason == x509.Expired:
		return Expired
	}
	return NotDirect
}
