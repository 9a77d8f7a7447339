package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A session is a connection, from when it is accepted until its line is in the log.
type session struct {
	conn *lbproxy.Conn
	app  string
	id   atomic.Pointer[Identity] // nil until the client has proved it; a reload may renew it

	release func() // its limits; nil until it has them
}

// admit is each connection's way in.
func (p *proxy) admit(ctx context.Context, c *lbproxy.Conn) error {
	l := &session{conn: c, app: p.conf.ID}
	c.OnDone = func(r lbproxy.Result) { p.server.done(l, r) }
	return p.authenticate(ctx, c, l)
}

// authenticate makes the handshake and decides whether the client is let in.
func (p *proxy) authenticate(ctx context.Context, c *lbproxy.Conn, l *session) error {
	s := p.server
	id, err := p.handshake(ctx, c, s.current.Load())
	if err != nil {
		return err
	}
	l.id.Store(id)
	s.liveMu.Lock()
	s.live[l] = struct{}{}
	s.open[userApp{id.User.Name, l.app}]++
	s.liveMu.Unlock()
	// A reload that came before this could not end the session, so it is judged by the snapshot
	// that is current now; one that comes after it can.
	snap := s.current.Load()
	if snap.proxies[l.app] == nil { // else p has the upstreams of snap, or of a later one
		return &Refusal{Reason: AppRemoved}
	}
	if err := snap.judge(l); err != nil {
		return err
	}
	user := l.id.Load().User
	c.ClientID, c.Verified = user.Name, true
	c.RateLimit, l.release = s.limits.of(user, l.app, snap.defaultLimit)
	if snap.logAdmissions {
		s.admitted(l)
	}
	return nil
}

// handshake makes c a TLS connection whose client has proved who it is, or says why not, to the
// client as well.
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
	var id *Identity // as the certificate says; it is proved when the handshake is done
	config := app.tls.Clone()
	config.VerifyConnection = func(cs tls.ConnectionState) (err error) {
		if want := app.serverName; want != "" && cs.ServerName != "" && !strings.EqualFold(cs.ServerName, want) {
			return &Refusal{Reason: WrongServerName, Err: fmt.Errorf("the client wants %.100q", cs.ServerName)}
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
	t.CloseNotify = app.closeNotify
	c.Client = t
	return id, nil
}

// handshake makes c's client speak TLS. It waits for the client's first byte, then for a place.
func (g *gate) handshake(
	ctx context.Context, c *lbproxy.Conn, config *tls.Config,
) (t *lbproxy.TLSConn, err error) {
	raw := c.Client
	deadline := time.Now().Add(g.Timeout)
	if err = raw.SetDeadline(deadline); err != nil {
		return nil, &Refusal{Reason: ClientGone, Err: err}
	}
	v := g.wait(raw, addrOf(clientAddr(c)))
	returned := false // else the goroutine has ended: a user store may call runtime.Goexit
	defer func() {
		late := errors.Is(err, os.ErrDeadlineExceeded)
		if cut := g.leave(v, late); cut != nil && (err == nil || late) {
			err = cut
		} else if err == nil && returned {
			err = raw.SetDeadline(time.Time{})
		}
	}()
	t, err = g.handshakeInside(ctx, v, deadline, config)
	returned = true
	return t, err
}

func (g *gate) handshakeInside(ctx context.Context, v *visit, deadline time.Time, config *tls.Config) (*lbproxy.TLSConn, error) {
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
	case HandshakeTimeout, HandshakeTooLarge, NotTLS, ClientGone, ClientAlert: // crypto/tls has sent no alert
	default:
		linger(v.raw)
	}
	return nil, refusal
}

// clientAddr is where c's client is, behind a trusted PROXY peer as that says.
func clientAddr(c *lbproxy.Conn) net.Addr {
	if c.ClientAddr != nil {
		return c.ClientAddr
	}
	return c.Client.RemoteAddr()
}

// linger lets a refused client read the alert that says so, before a reset that may throw away
// what is on its way.
func linger(raw net.Conn) {
	if c, ok := raw.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		raw.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		io.CopyN(io.Discard, raw, 256<<10)
	}
}

// A failure is how a handshake failed.
type failure struct {
	error
	op   string // of the net.OpError, if it is one: crypto/tls has "remote error" and "local error"
	text string
	cert bool // the client's certificate was found good before
}

// failures say which reason the first failure that matches has. For some crypto/tls has no value,
// only a text; nothing but the word in the log depends on that.
var failures = []struct {
	match  func(f *failure) bool
	reason Reason
}{
	{func(f *failure) bool { _, ok := errors.AsType[tls.RecordHeaderError](f.error); return ok }, NotTLS},
	{func(f *failure) bool { return errors.Is(f.error, lbproxy.ErrHandshakeSize) }, HandshakeTooLarge},
	{func(f *failure) bool { return errors.Is(f.error, os.ErrDeadlineExceeded) }, HandshakeTimeout},
	{func(f *failure) bool { return f.op == "remote error" || f.alertInTheClear() }, ClientAlert},
	{func(f *failure) bool { return f.op == "local error" }, HandshakeFailed}, // against the protocol
	{func(f *failure) bool { return f.op != "" }, ClientGone},
	{func(f *failure) bool { return errors.Is(f.error, io.EOF) || errors.Is(f.error, io.ErrUnexpectedEOF) }, ClientGone},
	{func(f *failure) bool { return f.cert }, NoProof},
	{func(f *failure) bool { return strings.HasPrefix(f.text, "tls: client didn't provide a certificate") }, NoCertificate},
	{func(f *failure) bool { return strings.HasPrefix(f.text, "tls: failed to parse client certificate") }, BadCertificate},
	{func(f *failure) bool {
		return strings.HasPrefix(f.text, "tls: client offered only unsupported versions")
	}, OldTLS},
}

// alertInTheClear reports whether the client sent an alert that is not encrypted, as OpenSSL does
// when it refuses the server's certificate. crypto/tls tries to decrypt it.
func (f *failure) alertInTheClear() bool {
	return f.op == "local error" && !f.cert && strings.HasSuffix(f.text, "bad record MAC")
}

// refusalOf says why a handshake failed.
func refusalOf(err error, cs tls.ConnectionState) *Refusal {
	if refusal, ok := errors.AsType[*Refusal](err); ok { // by VerifyConnection
		return refusal
	}
	f := &failure{error: err, text: err.Error(), cert: len(cs.PeerCertificates) > 0}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		f.op = op.Op
	}
	for _, known := range failures {
		if known.match(f) {
			if f.alertInTheClear() {
				err = errors.New("the client refused our certificate, by an alert in the clear")
			}
			return &Refusal{Reason: known.reason, Err: err}
		}
	}
	return &Refusal{Reason: HandshakeFailed, Err: err}
}
