package lbproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Nothing waits for a log that nobody reads, or for any other hook.

// textLogger logs everything to w.
func textLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// A stuckWriter is a pipe that is full until it is read.
type stuckWriter struct {
	read chan bool // closed: it is read
	mu   sync.Mutex
	text strings.Builder
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	<-w.read
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.Write(b)
}

func TestALoggerThatBlocksHoldsNothingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &stuckWriter{read: make(chan bool)}
		start := time.Now()
		a, results := newApp(t, Options{
			Logger: textLogger(log), MaxConns: 1,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr == "u:1" {
					return nil, errors.New("refused")
				}
				return dialFake(echoFake)(ctx, network, addr)
			},
		}, "u:1", "v:1")
		come := comeFake(t, a, nil)
		for range 3 { // one at a time, each in the place of the one before
			c := come()
			ping(t, c) // by v, after u has failed
			c.Close()
			if r := <-results; r.End != EndDone || r.Upstream != "v:1" {
				t.Errorf("%+v", r)
			}
		}
		c := come()
		ping(t, c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.Shutdown(ctx); err != context.DeadlineExceeded {
			t.Errorf("Shutdown with one open: %v", err)
		}
		if took := time.Since(start); took > 1050*time.Millisecond {
			t.Errorf("all that took %v, of which Shutdown a second", took)
		}
		start = time.Now()
		a.Close()
		if took := time.Since(start); took > 110*time.Millisecond {
			t.Errorf("Close took %v, want 100ms for the log", took)
		}
		if r := <-results; r.End != EndClosed {
			t.Errorf("%+v", r)
		}
		close(log.read)
		synctest.Wait()
		if n := strings.Count(log.text.String(), "connection ended"); n != 4 {
			t.Errorf("%d lines of 4 connections:\n%s", n, log.text.String())
		}
	})
}

func TestShutdownWaitsBrieflyForTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// how long a line takes: how long Shutdown does
		for d, want := range map[time.Duration]time.Duration{
			0: 0, 30 * time.Millisecond: 30 * time.Millisecond, time.Second: 100 * time.Millisecond,
		} {
			log := &stuckWriter{read: make(chan bool)}
			a, results := newApp(t, Options{
				Logger: textLogger(log), DialContext: dialFake(echoFake)}, "u:1")
			comeFake(t, a, nil)().Close()
			<-results
			go func() { time.Sleep(d); close(log.read) }()
			start := time.Now()
			if err := a.Shutdown(t.Context()); err != nil || time.Since(start) != want {
				t.Errorf("%v after %v, want %v", err, time.Since(start), want)
			}
			time.Sleep(time.Second)
		}
	})
}

func TestLinesBeyondABoundAreDroppedAndCounted(t *testing.T) {
	const lines = 10_000
	log := &stuckWriter{read: make(chan bool)}
	a, results := newApp(t, Options{Logger: textLogger(log), DialContext: dialFake(echoFake)},
		"u:1")
	come := comeFake(t, a, nil)
	serveMany := func(n int) {
		for range n {
			come().Close()
			<-results
		}
	}
	serveMany(logqueue.MaxLines + 1)
	before := proxytest.HeapInUse()
	serveMany(lines - logqueue.MaxLines - 1)
	if grown := proxytest.HeapInUse() - before; grown > 1<<20 {
		t.Errorf("what is dropped takes %d bytes", grown)
	}
	close(log.read)
	a.Close()
	proxytest.Eventually(t, "dropped lines are reported", func() bool {
		log.mu.Lock()
		defer log.mu.Unlock()
		return strings.Contains(log.text.String(), "log lines were dropped")
	})
	kept := strings.Count(log.text.String(), "connection ended")
	_, after, _ := strings.Cut(log.text.String(), "log lines were dropped\" lines=")
	number, _, _ := strings.Cut(after, "\n")
	dropped, err := strconv.Atoi(number)
	if err != nil || kept+dropped != lines || kept < logqueue.MaxLines ||
		kept > logqueue.MaxLines+2 {
		t.Errorf("%d lines kept, %d (%v) reported as dropped; want %d in all", kept, dropped,
			err, lines)
	}
}

// A connection frees its slot of MaxConns and its place at the upstream before hooks are called for
// its end.
func TestHooksThatBlockAtTheEndHoldNoPlace(t *testing.T) {
	for _, hook := range []string{"Conn.OnDone", "Options.OnDone", "EventClose", "log"} {
		t.Run(hook, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				goOn := make(chan bool)
				log := &stuckWriter{read: make(chan bool)}
				block := func(where string) {
					if where == hook {
						<-goOn
					}
				}
				opts := Options{MaxConns: 1, DialContext: dialFake(echoFake), OnDone: func(Result) {
					block("Options.OnDone")
				}}
				if hook == "log" {
					opts.Logger = textLogger(log)
				}
				a, _ := newAppOver(t, opts, Upstream{Addr: "u:1", MaxConns: 1})
				come := comeFake(t, a, func(_ context.Context, c *Conn) error {
					c.OnDone = func(Result) { block("Conn.OnDone") }
					c.RateLimit = contextual(func(_ context.Context, e Event) {
						if e.Kind == EventClose {
							block("EventClose")
						}
					})
					return nil
				})
				for range 5 {
					c := come()
					ping(t, c)
					c.Close()
				}
				time.Sleep(time.Second) // the relay takes some milliseconds
				if s := a.Stats(); s.Open != 0 || s.Ends[EndDone] != 5 || s.Upstreams[0].Open != 0 {
					t.Errorf("%+v", s)
				}
				close(goOn)
				close(log.read)
			})
		})
	}
}
