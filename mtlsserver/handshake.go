package mtlsserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

// handshake makes raw a TLS connection whose client has proved who it is, or says why not, to the client as well.
func (g *gate) handshake(ctx context.Context, raw net.Conn, config *tls.Config) (*lbproxy.TLSConn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.Timeout) // for waiting, too
	defer cancel()
	from := network(raw.RemoteAddr())
	if err := g.enter(ctx, from); err != nil {
		return nil, err
	}
	defer g.leave(from)
	deadline, _ := ctx.Deadline()
	if err := raw.SetDeadline(deadline); err != nil {
		return nil, &Refusal{Reason: ClientGone, Err: err}
	}
	c := lbproxy.TLSServer(raw, config, g.MaxBytes)
	if err := c.Handshake(); err != nil {
		refusal := refusalOf(err, c.ConnectionState())
		switch refusal.Reason {
		case HandshakeTimeout, HandshakeTooLarge, NotTLS, ClientGone, ClientAlert: // crypto/tls has sent no alert
		default:
			linger(raw)
		}
		return nil, refusal
	}
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
	if refusal, ok := errors.AsType[*Refusal](err); ok { // by VerifyConnection
		return refusal
	}
	_, unverified := errors.AsType[*tls.CertificateVerificationError](err)
	invalid, isInvalid := errors.AsType[x509.CertificateInvalidError](err)
	_, notTLS := errors.AsType[tls.RecordHeaderError](err)
	op, isOp := errors.AsType[*net.OpError](err)
	because := func(r Reason) *Refusal { return &Refusal{Reason: r, Err: err} }
	switch text := err.Error(); {
	case isInvalid && invalid.Reason == x509.IncompatibleUsage:
		return because(BadExtKeyUsage)
	case isInvalid && invalid.Reason == x509.Expired && time.Now().Before(invalid.Cert.NotBefore):
		return because(NotYetValid)
	case isInvalid && invalid.Reason == x509.Expired:
		return because(Expired)
	case isInvalid:
		return because(NotDirect)
	case unverified:
		return because(UnknownCA)
	case notTLS:
		return because(NotTLS)
	case errors.Is(err, lbproxy.ErrHandshakeSize):
		return because(HandshakeTooLarge)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return because(HandshakeTimeout)
	case isOp && op.Op == "remote error":
		return because(ClientAlert)
	case isOp && op.Op == "local error" && len(cs.PeerCertificates) == 0 && strings.HasSuffix(text, "bad record MAC"):
		return because(ClientAlert) // one in the clear, as OpenSSL sends it: crypto/tls tries to decrypt that
	case isOp && op.Op == "local error": // what the client sent is against the protocol
		return because(HandshakeFailed)
	case isOp, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return because(ClientGone)
	case len(cs.PeerCertificates) > 0: // they were found good, and then something was wrong
		return because(NoProof)

	// crypto/tls has no value for these. Nothing but the word in the log depends on its text.
	case strings.HasPrefix(text, "tls: client didn't provide a certificate"):
		return because(NoCertificate)
	case strings.HasPrefix(text, "tls: failed to parse client certificate"):
		return because(BadCertificate)
	case strings.HasPrefix(text, "tls: client offered only unsupported versions"):
		return because(OldTLS)
	}
	return because(HandshakeFailed)
}
