package mtlsserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy"
)

// A line waits to be written to a Server's Logger.
type line struct {
	level slog.Level
	text  string
	attrs []slog.Attr
}

// say queues a line for the log. It never waits for a Logger that blocks: see logqueue.
func (s *Server) say(level slog.Level, text string, attrs ...slog.Attr) {
	s.lines.Add(line{level, text, attrs})
}

func (s *Server) write(l line) {
	defer func() { _ = recover() }() // a Logger that panics cannot be reported to the log
	s.log.LogAttrs(context.Background(), l.level, l.text, l.attrs...)
}

func (s *Server) writeDropped(n uint64) {
	s.write(line{slog.LevelError, "log lines were dropped", []slog.Attr{slog.Uint64("lines", n)}})
}

// done logs a connection that has ended. It frees the connection's limits before it queues the
// line.
func (s *Server) done(l *session, r lbproxy.Result) {
	refusal, refused := errors.AsType[*Refusal](r.Err)
	id, reason, level := l.id.Load(), Reason(r.End), slog.LevelInfo
	switch {
	case refused:
		reason, r.Err = refusal.Reason, refusal.Err
	case r.End == lbproxy.EndNotAdmitted,
		r.End == lbproxy.EndCanceled && id == nil: // after a panic in admit
		reason, refused = HandshakeFailed, true
	case r.End == lbproxy.EndNoUpstream,
		r.End == lbproxy.EndDialFailed,
		r.End == lbproxy.EndUpstreamError:
		level = slog.LevelWarn
	}
	s.countOut(l, reason, refused)
	if l.release != nil {
		l.release()
	}
	if r.End == lbproxy.EndClosed && id != nil {
		s.wasReset.Add(1)
	}
	attrs := append(l.attrs(),
		slog.String("reason", string(reason)),
		slog.Duration("duration", r.Duration))
	if id != nil {
		attrs = append(attrs, id.attrs()...)
	} else if refusal != nil {
		attrs = append(attrs, refusal.claimed()...)
	}
	if id != nil && r.End != lbproxy.EndNotAdmitted {
		attrs = append(attrs,
			slog.String("upstream", r.Upstream),
			slog.Int64("sent", r.Sent),
			slog.Int64("received", r.Received))
	}
	if r.Err != nil {
		detail := strings.ReplaceAll(r.Err.Error(), "\n", "; ")
		attrs = append(attrs, slog.String("detail", clean(detail, 200)))
	}
	if r.End == lbproxy.EndNotAdmitted && !s.refusals.allow(reason, time.Now()) {
		return
	}
	s.say(level, "connection", attrs...)
}

// countOut removes a session from s.live, and counts it if it was refused.
func (s *Server) countOut(l *session, reason Reason, refused bool) {
	s.liveMu.Lock()
	defer s.liveMu.Unlock()
	if refused {
		s.denied[reason]++
	}
	if _, ok := s.live[l]; !ok {
		return
	}
	delete(s.live, l)
	at := userApp{l.id.Load().User.Name, l.app}
	if s.open[at]--; s.open[at] == 0 {
		delete(s.open, at)
	}
}

func (l *session) attrs() []slog.Attr {
	return []slog.Attr{
		slog.String("app", l.app),
		slog.String("client", clientAddr(l.conn).String()),
	}
}

func (id *Identity) attrs() []slog.Attr {
	return []slog.Attr{
		slog.String("user", id.User.Name),
		slog.String("serial", string(id.Serial)),
	}
}

// claimed returns the unproven claims of a refused client as log attributes. Names are quoted and
// cut short: anybody can make a certificate with any name.
func (r *Refusal) claimed() (attrs []slog.Attr) {
	if r.Claim == nil {
		return nil
	}
	quoted := func(name string) string { return strconv.Quote(fmt.Sprintf("%.64s", name)) }
	attrs = append(attrs,
		slog.String("claimed_serial", fmt.Sprintf("%.60s", r.Claim.Cert.SerialNumber.Text(16))),
		slog.String("claimed_subject", quoted(r.Claim.Cert.Subject.String())),
		slog.String("claimed_issuer", quoted(r.Claim.Cert.Issuer.String())))
	if r.User != "" {
		attrs = append(attrs, slog.String("claimed_user", r.User))
	}
	return attrs
}

// clean returns the first most characters of a text, with '?' for each one that cannot be printed:
// a peer may have chosen part of the text.
func clean(text string, most int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, fmt.Sprintf("%.*s", most, text))
}

// refusals bounds the log lines about refused connections, per second and reason.
type refusals struct {
	most int // lines a second for each reason; negative: no bound

	mu      sync.Mutex
	seconds map[Reason]*second
}

// A second counts the refusals for a reason since began.
type second struct {
	began    time.Time
	lines    int
	withheld int // since the last call of take
}

// allow reports whether a refusal may have a line of its own. Otherwise it counts the refusal.
func (r *refusals) allow(reason Reason, now time.Time) bool {
	if r.most < 0 {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.seconds[reason]
	if s == nil {
		s = &second{}
		r.seconds[reason] = s
	}
	if now.Sub(s.began) >= time.Second {
		s.began, s.lines = now, 0
	}
	if s.lines++; s.lines > r.most {
		s.withheld++
		return false
	}
	return true
}

// take returns the number of refusals without a line, by reason, and resets it.
func (r *refusals) take() map[Reason]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts := map[Reason]int{}
	for reason, s := range r.seconds {
		if s.withheld > 0 {
			counts[reason], s.withheld = s.withheld, 0
		}
	}
	return counts
}

// sayWithheld logs the number of refusals that had no line of their own.
func (s *Server) sayWithheld() {
	for reason, n := range s.refusals.take() {
		s.say(slog.LevelInfo, "connections refused without a line each",
			slog.String("reason", string(reason)),
			slog.Int("connections", n))
	}
}

// An appLog passes on lbproxy's records about an app. It drops records about connections, which
// done logs.
type appLog struct{ slog.Handler }

func (h appLog) Enabled(ctx context.Context, level slog.Level) bool {
	return lbproxy.ConnFromContext(ctx) == nil && h.Handler.Enabled(ctx, level)
}
