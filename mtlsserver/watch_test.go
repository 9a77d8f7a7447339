package mtlsserver

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http/httptest"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// TestWatch has the server's clock run for a day.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &book{told: map[string]bool{}, more: make(chan struct{})}
		s := &Server{
			log:      slog.New(log),
			refusals: refusals{seconds: map[Reason]*second{NotTLS: {withheld: 7}}},
			limits:   limits{kept: map[limitKey]*keptLimit{}},
		}
		s.lines.Write, s.lines.Dropped = s.write, s.writeDropped
		s.over, s.end = context.WithCancel(context.Background())
		page := admin.Handler(s.currentApps, &admin.Options{Recorder: &s.recorder})
		s.current.Store(&snapshot{config: new(Config), admin: page, certificates: []Certificate{
			{Key: "tls.cert", NotAfter: time.Now().Add(5 * 24 * time.Hour)},
		}})
		s.watching.Go(s.watch)
		wantLines := func(after time.Duration, want ...string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			var got []string
			for _, e := range log.all() {
				got = append(got, e["msg"])
			}
			if !slices.Equal(got, want) {
				t.Errorf("lines %q, want %q", got, want)
			}
		}
		const withheld = "connections refused without a line each"
		wantLines(600*time.Millisecond, withheld)

		s.limits.mu.Lock()
		s.limits.kept[limitKey{user: "alice"}] = &keptLimit{} // nobody uses it
		s.limits.mu.Unlock()
		time.Sleep(61 * time.Second)
		s.limits.mu.Lock()
		if len(s.limits.kept) != 0 {
			t.Errorf("limits %v are kept after a minute", slices.Collect(maps.Keys(s.limits.kept)))
		}
		s.limits.mu.Unlock()

		request := httptest.NewRequest("GET", "http://localhost/api/stats", nil)
		answer := httptest.NewRecorder()
		page.ServeHTTP(answer, request)
		var stats admin.Stats
		must(t, json.Unmarshal(answer.Body.Bytes(), &stats))
		if n := len(stats.History); n < 30 || n > 32 {
			t.Errorf("the page has %d points of the first minute, want one every two seconds", n)
		}

		wantLines(23*time.Hour, withheld)
		wantLines(2*time.Hour, withheld, "certificate expires soon")
		s.end()
		s.watching.Wait()
	})
}

func TestWarnOfExpiry(t *testing.T) {
	s := newLab(t, nil).server
	log := &book{told: map[string]bool{}, more: make(chan struct{})}
	s.lines.Flush(t.Context())
	s.log = slog.New(log)
	snap := *s.current.Load()
	const day = 24 * time.Hour
	snap.certificates = nil
	for key, left := range map[string]time.Duration{
		"later": 31 * day, "soon": 29*day + time.Hour, "expired": -time.Hour,
	} {
		snap.certificates = append(snap.certificates,
			Certificate{Key: key, NotAfter: time.Now().Add(left)})
	}
	s.current.Store(&snap)
	s.warnOfExpiry()
	soon := log.await(t, "of soon", func(e entry) bool { return e["key"] == "soon" })
	if soon["msg"] != "certificate expires soon" || soon["days_left"] != "29" {
		t.Errorf("line %v, want that 29 days are left", soon)
	}
	expired := log.await(t, "of expired", func(e entry) bool { return e["key"] == "expired" })
	if expired["msg"] != "certificate has expired" {
		t.Errorf("line %v, want that it has expired", expired)
	}
	if lines := log.all(); len(lines) != 2 {
		t.Errorf("lines %v, want two", lines)
	}
}

// An endless is a connection whose peer sends for ever.
type endless struct {
	comer
	until time.Time // the deadline of reads
	read  int
}

func (*endless) CloseWrite() error                   { return nil }
func (c *endless) SetReadDeadline(t time.Time) error { c.until = t; return nil }
func (c *endless) Read(b []byte) (int, error)        { c.read += len(b); return len(b), nil }

// A refused client has half a second to read its alert, and costs no more than 256 KiB.
func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := new(endless)
		linger(c)
		if left := time.Until(c.until); left != time.Second/2 || c.read < 256<<10 || c.read > 512<<10 {
			t.Errorf("the server reads %d bytes, for %v", c.read, left)
		}
	})
}
