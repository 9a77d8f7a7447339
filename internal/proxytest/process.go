package proxytest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// FullPipe returns the ends of a pipe that is full, like a log that nobody reads. r yields filler
// bytes, then the bytes that writers could write once there was room.
func FullPipe(t testing.TB) (r, w *os.File, filler int64) {
	t.Helper()
	r, w, err := os.Pipe()
	Must(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := w.Write(make([]byte, 8<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("filling the pipe: %v", err)
	}
	return r, w, int64(n)
}

// ProcessUse returns the resident memory of a process in bytes and the number of its descriptors.
// It needs Linux's /proc.
func ProcessUse(t testing.TB, pid int) (resident int64, descriptors int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	Must(t, err)
	_, after, _ := strings.Cut(string(status), "\nVmRSS:")
	if _, err := fmt.Sscanf(after, "%d kB", &resident); err != nil {
		t.Fatalf("VmRSS of process %d: %v", pid, err)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	Must(t, err)
	return resident << 10, len(entries)
}

// WantNoGrowth fails the test unless a process comes to have hardly more descriptors than it had,
// and its resident memory has grown by a few MiB at most.
func WantNoGrowth(t testing.TB, pid int, resident int64, descriptors int) {
	t.Helper()
	var grown int64
	Eventually(t, "no more descriptors open than before", func() bool {
		now, open := ProcessUse(t, pid)
		grown = now - resident
		return open <= descriptors+8
	})
	most := int64(16 << 20)
	if Race {
		most *= 4
	}
	if grown > most {
		t.Errorf("process %d has grown by %d MiB, want at most %d", pid, grown>>20, most>>20)
	}
}
