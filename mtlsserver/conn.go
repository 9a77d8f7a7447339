package mtlsserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy"
)

// A session is an authenticated connection, from before it is admitted until its Result is known.
type session struct {
	app    string
	client net.Addr
	state  tls.ConnectionState
	id     *Identity
	cancel context.CancelCauseFunc
}

// admit is each connection's way in.
func (p *proxy) admit(ctx context.Context, raw net.Conn) (context.Context, lbproxy.Conn, error) {
	s, start := p.server, time.Now()
	l := &session{app: p.conf.ID, client: raw.RemoteAddr()}
	err := errors.New("the handshake did not return") // if a user store panics
	defer func() {
		if err != nil {
			s.refused(l, time.Since(start), err)
		}
	}()
	c, err := p.handshake(ctx, raw)
	if err == nil { // and only now it is the client who says so
		l.state = c.ConnectionState()
		l.id, err = s.current.Load().auth.Identify(l.state, l.app)
	}
	if err != nil {
		if ctx.Err() != nil && (errors.Is(err, net.ErrClosed) || errors.Is(err, lbproxy.ErrAppClosed)) {
			err = &Refusal{Reason: Reason(lbproxy.EndClosed)}
		}
		return nil, lbproxy.Conn{}, err
	}
	ctx, l.cancel = context.WithCancelCause(ctx)
	s.liveMu.Lock()
	s.live[l] = struct{}{}
	s.liveMu.Unlock()
	// A reload that came before this could not end the session, so it is judged by the snapshot that is current now;
	// one that comes after it can.
	snap := s.current.Load()
	conn := lbproxy.Conn{Client: c, ClientID: l.id.User.Name, OnDone: func(r lbproxy.Result) { s.done(l, r) }}
	if user, err := snap.allows(l); err != nil {
		l.cancel(err)
	} else {
		conn.RateLimit = snap.limit(user, l.app)
	}
	return ctx, conn, nil
}

// handshake lets raw through the gate, by the rules of the current snapshot.
func (p *proxy) handshake(ctx context.Context, raw net.Conn) (*lbproxy.TLSConn, error) {
	snap := p.server.current.Load()
	config := snap.configs[p.conf.ID]
	if config == nil {
		return nil, &Refusal{Reason: AppRemoved}
	}
	return snap.gate.handshake(ctx, raw, config)
}

// refused writes the line of a connection that was not admitted.
func (s *Server) refused(l *session, d time.Duration, err error) {
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok {
		refusal = &Refusal{Reason: HandshakeFailed, Err: err}
	}
	var claimed []slog.Attr
	if refusal.Serial != "" {
		claimed = []slog.Attr{slog.String("claimed_serial", string(refusal.Serial))}
	}
	s.line(slog.LevelInfo, l, refusal.Reason, d, refusal.Err, claimed...)
}

// done writes the line of a connection that was admitted.
func (s *Server) done(l *session, r lbproxy.Result) {
	s.liveMu.Lock()
	delete(s.live, l)
	s.liveMu.Unlock()
	l.cancel(nil)
	reason, level := Reason(r.End), slog.LevelInfo
	switch refusal, ok := errors.AsType[*Refusal](r.Err); {
	case ok:
		reason, r.Err = refusal.Reason, nil
	case r.End == lbproxy.EndNoUpstream, r.End == lbproxy.EndDialFailed, r.End == lbproxy.EndUpstreamError:
		level = slog.LevelWarn
	}
	s.line(level, l, reason, r.Duration, r.Err,
		slog.String("user", l.id.User.Name), slog.String("serial", string(l.id.Serial)),
		slog.String("upstream", r.Upstream), slog.Int64("sent", r.Sent), slog.Int64("received", r.Received))
}

// line writes the one line there is for each connection.
func (s *Server) line(level slog.Level, l *session, reason Reason, d time.Duration, err error, more ...slog.Attr) {
	attrs := append([]slog.Attr{
		slog.String("app", l.app), slog.String("client", l.client.String()),
		slog.String("reason", string(reason)), slog.Duration("duration", d),
	}, more...)
	if err != nil {
		attrs = append(attrs, slog.String("detail", clean(strings.ReplaceAll(err.Error(), "\n", "; "), 200)))
	}
	s.log.LogAttrs(context.Background(), level, "connection", attrs...)
}

// clean is the beginning of a text as far as a line of a log can bear it: a peer may have had a word in it.
func clean(text string, most int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, fmt.Sprintf("%.*s", most, text))
}
