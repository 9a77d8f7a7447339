package logqueue

import (
	"context"
	"log/slog"
	"time"
)

// Lines is a Queue of log records, each for the slog.Handler of its logger.
type Lines struct {
	queue Queue[line]
	last  line // written last; belongs to the goroutine that writes
}

type line struct {
	ctx     context.Context
	handler slog.Handler
	record  slog.Record
}

// NewLines returns a Lines. Dropped lines are reported to the handler that was used last.
func NewLines() *Lines {
	q := new(Lines)
	q.queue.Write = func(l line) {
		q.last = l
		l.write()
	}
	q.queue.Dropped = func(n uint64) {
		q.last.record = slog.NewRecord(time.Now(), slog.LevelError, "lbproxy: log lines were dropped", 0)
		q.last.record.AddAttrs(slog.Uint64("lines", n))
		q.last.write()
	}
	return q
}

// write hands the line to its handler. If that panics, nobody is left to tell.
func (l *line) write() {
	defer func() { _ = recover() }()
	_ = l.handler.Handle(l.ctx, l.record)
}

// Add queues a line for l, if l is enabled for its level. attrs is called only then.
func (q *Lines) Add(
	ctx context.Context, l *slog.Logger, level slog.Level, msg string, attrs func() []slog.Attr,
) {
	defer func() { _ = recover() }() // l.Enabled is somebody else's
	if !l.Enabled(ctx, level) {
		return
	}
	record := slog.NewRecord(time.Now(), level, msg, 0)
	record.AddAttrs(attrs()...)
	q.queue.Add(line{ctx, l.Handler(), record})
}

// Flush waits until the lines that were added are written, for d at most.
func (q *Lines) Flush(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	_ = q.queue.Flush(ctx)
}
