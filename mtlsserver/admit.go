package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A session is a connection from its accept until its line is in the log.
type session struct {
	conn *lbproxy.Conn
	app  string
	id   atomic.Pointer[Identity] // nil until the handshake is done; a reload may replace it

	release func() // releases its limits; nil before it has any
	ended   atomic.Bool
}

// end aborts the connection with cause. It reports whether this is the first call, because an ended
// session stays in Server.live for some time. Every call aborts, so that the connection has been
// aborted when any of them returns.
func (l *session) end(cause error) (first bool) {
	l.conn.Abort(cause)
	return !l.ended.Swap(true)
}

// expired returns a Refusal if the client's certificate has expired.
func (l *session) expired(now time.Time) error {
	if now.After(l.id.Load().Expires) {
		return &Refusal{Reason: Expired}
	}
	return nil
}

// admit is the AdmitFunc of p's app. It performs the handshake and decides whether the client may
// connect.
func (p *proxy) admit(ctx context.Context, c *lbproxy.Conn) error {
	s, l := p.server, &session{conn: c, app: p.conf.ID}
	c.OnDone = func(r lbproxy.Result) { s.done(l, r) }
	id, err := p.handshake(ctx, c, s.current.Load())
	if err != nil {
		return err
	}
	l.id.Store(id)
	s.liveMu.Lock()
	s.live[l] = struct{}{}
	s.open[userApp{id.User.Name, l.app}]++
	s.liveMu.Unlock()
	// A reload during the handshake could not judge this session, so judge it by the current
	// snapshot. A later reload finds it in s.live.
	if s.current.Load().apps[l.app] == nil { // otherwise p has its upstreams or those of a later one
		return &Refusal{Reason: AppRemoved}
	}
	if err := s.judge(l); err != nil {
		return err
	}
	snap := s.current.Load()
	user := l.id.Load().User
	c.ClientID, c.Verified = user.Name, true
	c.RateLimit, l.release = s.limits.of(user, l.app, snap.config.DefaultLimit)
	if snap.config.LogAdmissions {
		s.say(slog.LevelInfo, "admitted", append(l.attrs(), l.id.Load().attrs()...)...)
	}
	return nil
}

// handshake makes c a TLS connection with an authenticated client. If it fails, it has sent the
// client an alert, where TLS allows that.
func (p *proxy) handshake(ctx context.Context, c *lbproxy.Conn, snap *snapshot) (*Identity, error) {
	app := snap.apps[p.conf.ID]
	if app == nil {
		return nil, &Refusal{Reason: AppRemoved}
	}
	if app.acceptProxy != nil {
		if err := app.acceptProxy(ctx, c); err != nil {
			return nil, &Refusal{Reason: NoProxyHeader, Err: err}
		}
	}
	var id *Identity // claimed by the certificate; proved once the handshake is done
	config := snap.tls.Clone()
	config.VerifyConnection = func(cs tls.ConnectionState) (err error) {
		if name := cs.ServerName; !app.conf.serves(name) {
			return &Refusal{
				Reason: WrongServerName, Err: fmt.Errorf("the client wants %.100q", name),
			}
		}
		id, err = snap.auth.Identify(cs, p.conf.ID)
		return err
	}
	t, err := snap.gate.handshake(ctx, c, config)
	if err != nil {
		if refusal, ok := errors.AsType[*Refusal](err); ok && id != nil && refusal.Claim == nil {
			refusal.Claim, refusal.User = &id.claim, id.User.Name
		}
		return nil, err
	}
	t.CloseNotify = closeNotifies[app.conf.CloseNotify]
	c.Client = t
	return id, nil
}

// serves reports whether a client that asks for a server name may connect; empty asks for none.
func (a *App) serves(name string) bool {
	return name == "" || a.TLS == nil || a.TLS.ServerName == "" ||
		strings.EqualFold(name, a.TLS.ServerName)
}

// handshake waits for the first byte of c's client, then for a place, and performs the TLS
// handshake, all within g.Timeout.
func (g *gate) handshake(
	ctx context.Context, c *lbproxy.Conn, config *tls.Config,
) (t *lbproxy.TLSConn, err error) {
	raw := c.Client
	deadline := time.Now().Add(g.Timeout)
	if err = raw.SetDeadline(deadline); err != nil {
		return nil, &Refusal{Reason: ClientGone, Err: err}
	}
	v := g.wait(raw, addrOf(clientAddr(c)))
	finished := false // stays false if the caller's Users panic or call runtime.Goexit
	defer func() {
		late := errors.Is(err, os.ErrDeadlineExceeded)
		if cut := g.leave(v, finished); cut != nil && (err == nil || late) {
			err = cut
		} else if finished {
			err = raw.SetDeadline(time.Time{})
		}
	}()
	t, err = g.handshakeInside(ctx, v, deadline, config)
	finished = err == nil
	return t, err
}

func (g *gate) handshakeInside(
	ctx context.Context, v *visit, deadline time.Time, config *tls.Config,
) (*lbproxy.TLSConn, error) {
	if err := awaitByte(v.raw); err != nil {
		return nil, refusalOf(err, tls.ConnectionState{})
	}
	if err := g.enter(ctx, v, deadline); err != nil {
		return nil, err
	}
	c := lbproxy.TLSServer(v.raw, config, g.MaxBytes)
	err := c.Handshake()
	if err == nil {
		return c, nil
	}
	refusal := refusalOf(err, c.ConnectionState())
	switch refusal.Reason {
	case HandshakeTimeout, HandshakeTooLarge, NotTLS, ClientGone, ClientAlert:
		// crypto/tls has sent no alert that the client could read.
	default:
		linger(v.raw)
	}
	return nil, refusal
}

// clientAddr returns the address of c's client: the one in the PROXY protocol header if a trusted
// peer has sent one, else the address of the connection.
func clientAddr(c *lbproxy.Conn) net.Addr {
	if c.ClientAddr != nil {
		return c.ClientAddr
	}
	return c.Client.RemoteAddr()
}

// linger gives a refused client time to read its alert. The reset that follows would otherwise
// discard an alert that is still on its way.
func linger(raw net.Conn) {
	if c, ok := raw.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		raw.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		io.CopyN(io.Discard, raw, 256<<10)
	}
}

// refusalOf returns the Refusal for the error of a handshake. crypto/tls exports no value for some
// errors, so they are recognized by their text; only the reason in the log depends on it.
func refusalOf(err error, cs tls.ConnectionState) *Refusal {
	if refusal, ok := errors.AsType[*Refusal](err); ok { // from VerifyConnection
		return refusal
	}
	op := "" // crypto/tls says "remote error" and "local error" of alerts
	if e, ok := errors.AsType[*net.OpError](err); ok {
		op = e.Op
	}
	_, notTLS := errors.AsType[tls.RecordHeaderError](err)
	verified := len(cs.PeerCertificates) > 0 // VerifyConnection has accepted the certificate
	is := func(target error) bool { return errors.Is(err, target) }
	begins := func(prefix string) bool { return strings.HasPrefix(err.Error(), prefix) }
	reason := HandshakeFailed
	switch {
	case notTLS:
		reason = NotTLS
	case is(lbproxy.ErrHandshakeSize):
		reason = HandshakeTooLarge
	case is(os.ErrDeadlineExceeded):
		reason = HandshakeTimeout
	case op == "remote error":
		reason = ClientAlert
	case op == "local error" && !verified && strings.HasSuffix(err.Error(), "bad record MAC"):
		// OpenSSL refuses the server's certificate so, and crypto/tls tries to decrypt the alert.
		reason = ClientAlert
		err = errors.New("the client refused our certificate by an unencrypted alert")
	case op == "local error": // the client broke the protocol
	case op != "", is(io.EOF), is(io.ErrUnexpectedEOF):
		reason = ClientGone
	case verified:
		reason = NoProof
	case begins("tls: client didn't provide a certificate"):
		reason = NoCertificate
	case begins("tls: failed to parse client certificate"):
		reason = BadCertificate
	case begins("tls: client offered only unsupported versions"):
		reason = OldTLS
	}
	return &Refusal{Reason: reason, Err: err}
}
