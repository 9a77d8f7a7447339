// Package logqueue writes log lines without holding up those who have something to log.
package logqueue

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// maxLines bounds the lines that wait.
const maxLines = 4096

// Lines writes log lines on a goroutine of its own, so that nobody waits for a slog.Handler that
// blocks. At most 4,096 lines wait; more are dropped, and counted in a line that follows. The
// goroutine runs while there are lines. The zero Lines is ready to use.
type Lines struct {
	mu      sync.Mutex
	waiting []line
	dropped int           // since the last line was written
	idle    chan struct{} // closed when the goroutine ends; nil while there is none
}

type line struct {
	ctx     context.Context
	handler slog.Handler
	record  slog.Record
}

// Add queues a line for l, if l is enabled for its level. attrs is called only then.
func (q *Lines) Add(
	ctx context.Context, l *slog.Logger, level slog.Level, msg string, attrs func() []slog.Attr,
) {
	if !l.Enabled(ctx, level) {
		return
	}
	line := line{ctx, l.Handler(), slog.NewRecord(time.Now(), level, msg, 0)}
	line.record.AddAttrs(attrs()...)
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) >= maxLines {
		q.dropped++
		return
	}
	q.waiting = append(q.waiting, line)
	if q.idle == nil {
		q.idle = make(chan struct{})
		go q.write()
	}
}

// write writes lines until none is left.
func (q *Lines) write() {
	for {
		q.mu.Lock()
		lines, dropped := q.waiting, q.dropped
		q.waiting, q.dropped = nil, 0
		if len(lines) == 0 {
			close(q.idle)
			q.idle = nil
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		for _, line := range lines {
			line.write()
		}
		if dropped > 0 {
			last := lines[len(lines)-1]
			last.record = slog.NewRecord(time.Now(), slog.LevelError, "lbproxy: log lines were dropped", 0)
			last.record.AddAttrs(slog.Int("lines", dropped))
			last.write()
		}
	}
}

// write hands the line to its handler. If that panics, nobody is left to tell.
func (l *line) write() {
	defer func() { _ = recover() }()
	_ = l.handler.Handle(l.ctx, l.record)
}

// Flush waits until the lines that were added are written, for d at most.
func (q *Lines) Flush(d time.Duration) {
	q.mu.Lock()
	idle := q.idle
	q.mu.Unlock()
	if idle == nil {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
}
