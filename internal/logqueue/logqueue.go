// Package logqueue queues log lines, so that a log that nobody reads does not block its writers.
package logqueue

import (
	"bytes"
	"context"
	"io"
	"sync"
)

// MaxLines is the most lines that wait. Further lines are dropped and counted.
const MaxLines = 4096

// A Queue passes lines to Write, in order, on a goroutine that runs while lines wait. Add never
// waits for Write. The fields must be set before the first Add.
type Queue[T any] struct {
	Write   func(line T)   // may block
	Dropped func(n uint64) // reports that n lines were dropped; may block

	mu      sync.Mutex
	lines   []T
	dropped uint64        // since the last report
	written int           // since the last report
	idle    chan struct{} // closed when the goroutine ends; nil while there is none
	closed  bool
}

// Add queues a line, or drops it.
func (q *Queue[T]) Add(line T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || len(q.lines) >= MaxLines {
		q.dropped++
		return
	}
	q.lines = append(q.lines, line)
	if q.idle == nil {
		q.idle = make(chan struct{})
		go q.run()
	}
}

// run writes lines until none is left.
func (q *Queue[T]) run() {
	returned := false
	defer func() {
		if !returned { // Write called runtime.Goexit
			go q.run()
		}
	}()
	for write := q.next(); write != nil; write = q.next() {
		write()
	}
	returned = true
}

// next returns a function that writes the next line; nil if none is left. It reports dropped lines
// when the queue is empty, or after MaxLines lines, and not before each line: while lines come
// faster than they are written, that would double them.
func (q *Queue[T]) next() func() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := q.dropped; n > 0 && (len(q.lines) == 0 || q.written >= MaxLines) {
		q.dropped, q.written = 0, 0
		return func() { q.Dropped(n) }
	}
	if len(q.lines) == 0 {
		close(q.idle)
		q.idle, q.lines, q.written = nil, nil, 0
		return nil
	}
	line := q.lines[0]
	clear(q.lines[:1]) // let the written line be collected
	q.lines = q.lines[1:]
	q.written++
	return func() { q.Write(line) }
}

// Flush waits until all lines have been written, or until ctx ends.
func (q *Queue[T]) Flush(ctx context.Context) error {
	q.mu.Lock()
	idle := q.idle
	q.mu.Unlock()
	if idle == nil {
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close is like Flush, and drops all lines that are added later.
func (q *Queue[T]) Close(ctx context.Context) error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	return q.Flush(ctx)
}

// A Writer is a Queue for the output of slog's handlers, which write one line at a time.
type Writer struct{ queue Queue[[]byte] }

// NewWriter returns a Writer to w. It ignores errors of w, as slog does. After lines were dropped
// and w takes lines again, it writes the text that report returns for their number.
func NewWriter(w io.Writer, report func(n uint64) []byte) *Writer {
	return &Writer{Queue[[]byte]{
		Write:   func(line []byte) { w.Write(line) },
		Dropped: func(n uint64) { w.Write(report(n)) },
	}}
}

// Write queues a copy of line. It never waits and never fails.
func (w *Writer) Write(line []byte) (int, error) {
	w.queue.Add(bytes.Clone(line))
	return len(line), nil
}

// Close waits until all lines have been written, or until ctx ends. It drops lines that come later.
func (w *Writer) Close(ctx context.Context) error { return w.queue.Close(ctx) }
