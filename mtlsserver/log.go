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

// say queues a line for the log. Nobody waits for a Logger that blocks: see logqueue.
func (s *Server) say(level slog.Level, text string, attrs ...slog.Attr) {
	s.lines.Add(line{level, text, attrs})
}

func (s *Server) write(l line) {
	defer func() { _ = recover() }() // nobody is left to tell what a Logger panics with
	s.log.LogAttrs(context.Background(), l.level, l.text, l.attrs...)
}

func (s *Server) writeDropped(n uint64) {
	s.write(line{slog.LevelError, "log lines were dropped", []slog.Attr{slog.Uint64("lines", n)}})
}

// done writes the line of a connection. The connection and its place are gone by then.
func (s *Server) done(l *session, r lbproxy.Result) {
	s.countOut(l, r)
	if l.release != nil {
		l.release()
	}
	if r.End == lbproxy.EndClosed && l.id.Load() != nil {
		s.cut.Add(1)
	}
	reason, level := reasonOf(l, r), slog.LevelInfo
	refusal, refused := errors.AsType[*Refusal](r.Err)
	switch {
	case refused:
		r.Err = refusal.Err
	case r.End == lbproxy.EndNoUpstream, r.End == lbproxy.EndDialFailed, r.End == lbproxy.EndUpstreamError:
		level = slog.LevelWarn
	}
	attrs := l.attrs()
	attrs = append(attrs, slog.String("reason", string(reason)), slog.Duration("duration", r.Duration))
	if id := l.id.Load(); id != nil {
		attrs = append(attrs, slog.String("user", id.User.Name), slog.String("serial", string(id.Serial)))
	} else if refused {
		attrs = append(attrs, refusal.claimed()...)
	}
	if r.End != lbproxy.EndNotAdmitted && l.id.Load() != nil {
		attrs = append(attrs, slog.String("upstream", r.Upstream), slog.Int64("sent", r.Sent), slog.Int64("received", r.Received))
	}
	if r.Err != nil {
		attrs = append(attrs, slog.String("detail", clean(strings.ReplaceAll(r.Err.Error(), "\n", "; "), 200)))
	}
	if r.End == lbproxy.EndNotAdmitted && !s.refusals.allow(reason, time.Now()) {
		return
	}
	s.say(level, "connection", attrs...)
}

// countOut takes a connection out of those that are live, and counts it if it was refused.
func (s *Server) countOut(l *session, r lbproxy.Result) {
	_, refused := errors.AsType[*Refusal](r.Err)
	reason := reasonOf(l, r)
	s.liveMu.Lock()
	defer s.liveMu.Unlock()
	if refused || r.End == lbproxy.EndNotAdmitted {
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

// reasonOf returns the word for the end of a connection.
func reasonOf(l *session, r lbproxy.Result) Reason {
	refusal, refused := errors.AsType[*Refusal](r.Err)
	switch {
	case refused:
		return refusal.Reason
	case r.End == lbproxy.EndNotAdmitted, r.End == lbproxy.EndCanceled && l.id.Load() == nil: // a hook panicked
		return HandshakeFailed
	}
	return Reason(r.End)
}

// admitted writes that a client has been let in.
func (s *Server) admitted(l *session) {
	id := l.id.Load()
	s.say(slog.LevelInfo, "admitted", append(l.attrs(), slog.String("user", id.User.Name), slog.String("serial", string(id.Serial)))...)
}

func (l *session) attrs() []slog.Attr {
	return []slog.Attr{slog.String("app", l.app), slog.String("client", clientAddr(l.conn).String())}
}

// claimed is what a refused client says of itself. Names are quoted and cut short: the client may
// have made its certificate itself.
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

// clean is the beginning of a text, without what a log cannot bear: a peer may have a word in it.
func clean(text string, most int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, fmt.Sprintf("%.*s", most, text))
}

// refusals bounds how many refused connections a second have a line, for each reason.
type refusals struct {
	most int // negative: no bound

	mu      sync.Mutex
	seconds map[Reason]*second
}

// A second is the latest one in which there was a refusal for a reason.
type second struct {
	began    time.Time
	lines    int
	withheld int // since they were told last
}

// allow reports whether a refusal may have a line. If not it is counted.
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

// take returns how many refusals had no line, for each reason, and forgets them.
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

// sayWithheld writes how many refusals had no line of their own.
func (s *Server) sayWithheld() {
	for reason, n := range s.refusals.take() {
		s.say(slog.LevelInfo, "connections refused without a line each", slog.String("reason", string(reason)), slog.Int("connections", n))
	}
}

// An appLog passes on what lbproxy says about an app, and not what it says about connections.
type appLog struct{ slog.Handler }

func (h appLog) Enabled(ctx context.Context, level slog.Level) bool {
	return lbproxy.ConnFromContext(ctx) == nil && h.Handler.Enabled(ctx, level)
}
