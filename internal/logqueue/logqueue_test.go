package logqueue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func report(n uint64) []byte { return fmt.Appendf(nil, "dropped %d\n", n) }

// Writers never wait. Lines without room are counted, and the count is reported when the log takes
// lines again.
func TestAFullPipeHoldsNobodyUp(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	q := NewWriter(w, report)
	const total = 20_000
	line := strings.Repeat("x", 99) + "\n"
	for range total {
		if n, err := io.WriteString(q, line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := q.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close = %v while nobody reads", err)
	}
	read := make(chan string)
	go func() {
		text, _ := io.ReadAll(r)
		r.Close()
		read <- string(text)
	}()
	if err := q.Close(t.Context()); err != nil {
		t.Errorf("Close = %v while somebody reads", err)
	}
	w.Close()
	text := <-read
	kept, want := strings.Count(text, line), 0
	for said := range strings.SplitSeq(strings.ReplaceAll(text, line, ""), "\n") {
		var n int
		fmt.Sscanf(said, "dropped %d", &n)
		want += n
	}
	if kept < MaxLines || kept+want != total {
		t.Errorf("%d lines of %d written, %d reported as dropped", kept, total, want)
	}
}

// While lines come faster than they are written, the count is told now and then.
func TestDroppedLinesAreReportedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var written, reports, dropped uint64
		q := &Queue[int]{
			Write:   func(int) { written++; time.Sleep(time.Millisecond) },
			Dropped: func(n uint64) { reports++; dropped += n },
		}
		const total = 40_000
		for i := range total {
			q.Add(i)
			time.Sleep(time.Millisecond / 4)
		}
		if err := q.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if written+dropped != total || reports < 2 || reports > written/1000 {
			t.Errorf("%d written, %d dropped of %d, in %d reports", written, dropped, total,
				reports)
		}
	})
}

func TestLinesKeepTheirOrder(t *testing.T) {
	var got []int
	q := &Queue[int]{Write: func(i int) { got = append(got, i) }}
	for i := range 1000 {
		q.Add(i)
		if i%100 == 0 {
			if err := q.Flush(t.Context()); err != nil || len(got) != i+1 {
				t.Fatalf("after Flush of %d lines: %d, %v", i+1, len(got), err)
			}
		}
	}
	q.Close(t.Context())
	for i, n := range got {
		if i != n {
			t.Fatalf("line %d is %d", i, n)
		}
	}
	q.Add(0)
	if len(got) != 1000 {
		t.Errorf("%d lines, one after Close", len(got))
	}
}

func TestNoGoroutineIsLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	q := NewWriter(io.Discard, report)
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			for range 1000 {
				q.Write([]byte("line\n"))
			}
		})
	}
	writers.Wait()
	if err := q.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	late := time.Now().Add(20 * time.Second)
	for ; runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(late) {
			t.Fatalf("%d goroutines, were %d", runtime.NumGoroutine(), before)
		}
	}
}
