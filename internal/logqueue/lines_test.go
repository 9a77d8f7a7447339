package logqueue

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A recorder is a handler that keeps messages, and calls hold before it does.
type recorder struct {
	hold func(msg string)
	mu   sync.Mutex
	text []string
}

func (h *recorder) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (h *recorder) WithAttrs([]slog.Attr) slog.Handler           { return h }
func (h *recorder) WithGroup(string) slog.Handler                { return h }
func (h *recorder) Handle(_ context.Context, r slog.Record) error {
	if h.hold != nil {
		h.hold(r.Message)
	}
	text := r.Level.String() + " " + r.Message
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	h.mu.Lock()
	defer h.mu.Unlock()
	h.text = append(h.text, text)
	return nil
}

func (h *recorder) lines() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text
}

func one() []slog.Attr { return []slog.Attr{slog.Int("n", 1)} }

func TestLinesAreWrittenInOrderAndUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{}
		q, l := NewLines(), slog.New(h)
		q.Add(t.Context(), l, slog.LevelInfo, "a", one)
		q.Add(t.Context(), l, slog.LevelDebug, "not enabled", func() []slog.Attr {
			panic("attrs are not for it")
		})
		q.Add(t.Context(), l, slog.LevelWarn, "b", one)
		q.Flush(time.Second)
		if got, want := strings.Join(h.lines(), ", "), "INFO a n=1, WARN b n=1"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	})
}

func TestFlushWaitsForLinesButNotForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{hold: func(string) { time.Sleep(time.Second) }}
		q, l := NewLines(), slog.New(h)
		start := time.Now()
		q.Flush(time.Minute) // nothing waits
		q.Add(t.Context(), l, slog.LevelInfo, "a", one)
		q.Flush(100 * time.Millisecond)
		if took := time.Since(start); took != 100*time.Millisecond || len(h.lines()) != 0 {
			t.Errorf("%v, %d lines", took, len(h.lines()))
		}
		q.Flush(time.Minute)
		if took := time.Since(start); took != time.Second || len(h.lines()) != 1 {
			t.Errorf("%v, %d lines", took, len(h.lines()))
		}
	})
}

func TestDroppedLinesAreReportedToTheSameHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan bool)
		h := &recorder{hold: func(string) { <-goOn }}
		q, l := NewLines(), slog.New(h)
		for range MaxLines + 1000 {
			q.Add(t.Context(), l, slog.LevelInfo, "a", one)
		}
		close(goOn)
		q.Flush(time.Second)
		all := strings.Join(h.lines(), "\n")
		written := strings.Count(all, "INFO a")
		reports := strings.Count(all, "ERROR lbproxy: log lines were dropped")
		dropped := fmt.Sprintf("dropped lines=%d", MaxLines+1000-written)
		if written < MaxLines || reports != 1 || !strings.Contains(all, dropped) {
			t.Errorf("%d lines, %d reports, none with %q", written, reports, dropped)
		}
	})
}

func TestAHandlerThatPanicsLosesItsLineOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &recorder{hold: func(msg string) {
			if msg == "bad" {
				panic("boom")
			}
		}}
		q, l := NewLines(), slog.New(h)
		for _, msg := range []string{"a", "bad", "b"} {
			q.Add(t.Context(), l, slog.LevelInfo, msg, one)
		}
		q.Flush(time.Second)
		if got, want := strings.Join(h.lines(), ", "), "INFO a n=1, INFO b n=1"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	})
}
