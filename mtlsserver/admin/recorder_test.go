package admin

import (
	"fmt"
	"runtime"
	"testing"
	"time"
	"weak"

	"github.com/danielepagano/lbproxy"
)

// What is gone is remembered by name only so far; sums are kept for ever.
func TestPastIsBoundedAndKeepsItsSums(t *testing.T) {
	r := &Recorder{}
	r.stats(nil, time.Now())
	const apps, upstreams = 2 * maxGone, 2 * maxGone
	for i := range apps {
		a := newApp(fmt.Sprint("app", i))
		a.Accepted, a.Sent = 1, 3
		a.keep(Upstream{Addr: fmt.Sprint("u", i), Total: 1, Sent: 3}, maxGone)
		r.of(a.ID).merge(a, false, maxGone)
	}
	for i := range upstreams {
		r.of("web").keep(Upstream{Addr: fmt.Sprint("u", i), Total: 1, Sent: 3}, maxGone)
	}
	r.of("web").Sent = 3 * upstreams
	var accepted, total uint64
	all := r.stats(nil, time.Now()).Apps
	for _, a := range all {
		accepted += a.Accepted
		total += a.Gone.Total
		if len(a.gone) > maxGone+1 {
			t.Errorf("app %q remembers %d upstreams", a.ID, len(a.gone))
		}
	}
	if accepted != apps || total != apps+upstreams || len(all) > maxGone+1 {
		t.Errorf("%d apps with sums of %d and %d, want %d and %d", len(all), accepted, total, apps, apps+upstreams)
	}
}

// An app that is not current, and that nobody uses, is not kept in memory; its counts are.
func TestAppsThatAreGoneAreNotKept(t *testing.T) {
	r := &Recorder{}
	for i := range 20 {
		app, err := lbproxy.New("web", []lbproxy.Upstream{{Addr: fmt.Sprintf("10.0.0.%d:80", i)}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Track(app)
		r.seen[weak.Make(app)].last.Upstreams[0].Total = 1 // as if it had had a connection
		app.Close()
	}
	for range 10 {
		r.stats(nil, time.Now())
		runtime.GC()
	}
	if n := len(r.seen); n > 0 {
		t.Errorf("%d apps are kept", n)
	}
	if all := r.stats(nil, time.Now()).Apps; len(all) != 1 || all[0].Current || len(all[0].gone) != 20 {
		t.Errorf("%+v, want the counts of 20 upstreams", all)
	}
}
