package logqueue

import (
	"context"
	"log/slog"
	"time"
)

// Lines is a Queue of log records, each for the slog.Handler of its logger.
type Lines struct {
	queue Queue[line]
	last  line // the last one written; belongs to the writing goroutine
}

type line struct {
	ctx     context.Context
	handler slog.Handler
	record  slog.Record
}

// NewLines returns a Lines. It reports dropped lines to the handler of the last line.
func NewLines() *Lines {
	q := new(Lines)
	q.queue.Write = func(l line) {
		q.last = l
		l.write()
	}
	q.queue.Dropped = func(n uint64) {
		q.last.record = slog.NewRecord(time.Now(), slog.LevelError,
			"lbproxy: log lines were dropped", 0)
		q.last.record.AddAttrs(slog.Uint64("lines", n))
		q.last.write()
	}
	return q
}

// write passes the line to its handler. It ignores a panic, which it could only report to the same
// handler.
func (l *line) write() {
	defer func() { _ = recover() }()
	_ = l.handler.Handle(l.ctx, l.record)
}

// Add queues a line for l, if l is enabled for its level. attrs is called only then.
func (q *Lines) Add(
	ctx context.Context, l *slog.Logger, level slog.Level, msg string, attrs func() []slog.Attr,
) {
	defer func() { _ = recover() }() // l.Enabled is the caller's code and may panic
	if !l.Enabled(ctx, level) {
		return
	}
	record := slog.NewRecord(time.Now(), level, msg, 0)
	record.AddAttrs(attrs()...)
	q.queue.Add(line{ctx, l.Handler(), record})
}

// Flush waits until the lines added so far are written, but no longer than d.
func (q *Lines) Flush(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	_ = q.queue.Flush(ctx)
}
