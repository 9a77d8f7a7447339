package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A Recorder keeps all sums of removed apps and upstreams, and a bounded number of their names.
func TestPastIsBoundedAndKeepsItsSums(t *testing.T) {
	r := &Recorder{}
	r.stats(nil, time.Now())
	const apps, upstreams = 2 * maxGone, 2 * maxGone
	for i := range apps {
		a := newApp(fmt.Sprint("app", i))
		a.Accepted, a.all = 1, Upstream{Total: 1, Sent: 3}
		a.keep(Upstream{Addr: fmt.Sprint("u", i), Total: 1, Sent: 3}, maxGone)
		r.of(a.ID).merge(a, false, maxGone)
	}
	for i := range upstreams {
		r.of("web").keep(Upstream{Addr: fmt.Sprint("u", i), Total: 1, Sent: 3}, maxGone)
	}
	r.of("web").all = Upstream{Total: upstreams, Sent: 3 * upstreams}
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
		t.Errorf("%d apps with sums of %d and %d, want %d and %d",
			len(all), accepted, total, apps, apps+upstreams)
	}
}

// The durations of an id go with its name, and a connection may still add to them.
func TestTimesAreBoundedAndKeepTheirSums(t *testing.T) {
	r := &Recorder{}
	const apps = 2 * maxGone
	var late []lbproxy.Options
	for i := range apps {
		id := fmt.Sprint("app", i)
		opts := r.Record(id, nil)
		opts.OnDone(lbproxy.Result{Duration: time.Second, DialTime: time.Millisecond})
		late = append(late, *opts)
		r.of(id)
	}
	r.stats(nil, time.Now())
	for _, opts := range late[:10] {
		opts.OnDone(lbproxy.Result{Duration: time.Second, DialTime: time.Millisecond})
	}
	ids, conns, dials := 0, uint64(0), uint64(0)
	r.times.Range(func(_, v any) bool {
		ids++
		conns += v.(*times).conns.counts[2].Load() // up to a second
		dials += v.(*times).dials.counts[1].Load()
		return true
	})
	if ids > maxGone+10 || conns != apps+10 || dials != apps+10 {
		t.Errorf("%d ids with %d connections and %d dials, want %d of each", ids, conns, dials,
			apps+10)
	}
	if v, ok := r.times.Load(""); !ok || v.(*times).conns.sum.Load() < int64(time.Second) {
		t.Error("the durations of the ids without a name are lost")
	}
}

// A removed app is kept for a minute; its counts are kept for ever.
func TestAppsThatAreGoneAreNotKept(t *testing.T) {
	r, now := &Recorder{}, time.Now()
	fails := func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no dial here")
	}
	for i := range 20 {
		upstreams := []lbproxy.Upstream{{Addr: fmt.Sprintf("10.0.0.%d:80", i)}}
		app, err := lbproxy.New("web", upstreams, &lbproxy.Options{DialContext: fails})
		if err != nil {
			t.Fatal(err)
		}
		r.Track(app)
		client, _ := net.Pipe()
		if r, _ := app.ServeConn(t.Context(), &lbproxy.Conn{Client: client}); r.Attempts != 1 {
			t.Fatalf("%+v", r)
		}
	}
	for _, step := range []struct {
		after time.Duration
		kept  int
	}{{0, 20}, {keepApp, 20}, {time.Second, 0}, {time.Hour, 0}} {
		now = now.Add(step.after)
		apps := r.stats(nil, now).Apps
		if len(apps) != 1 || apps[0].Current || len(apps[0].gone) != 20 ||
			apps[0].Gone.Total != 20 || len(r.seen) != step.kept {
			t.Errorf("after %v: %d kept, %+v, want %d and the counts of 20 upstreams",
				step.after, len(r.seen), apps, step.kept)
		}
	}
}

// A removed app is kept while it has a connection, and so are the counts it adds meanwhile.
func TestAppWithAConnectionIsKept(t *testing.T) {
	app, err := lbproxy.New("web", []lbproxy.Upstream{{Addr: "10.0.0.1:80"}}, &lbproxy.Options{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, client := net.Pipe()
	conn := &lbproxy.Conn{Client: client}
	done := make(chan bool)
	go func() {
		_, _ = app.ServeConn(context.Background(), conn)
		close(done)
	}()
	r, now := &Recorder{}, time.Now()
	r.Track(app)
	for r.stats(nil, now).Apps[0].Upstreams == nil { // a row while it has the connection
		time.Sleep(time.Millisecond)
	}
	if apps := r.stats(nil, now.Add(time.Hour)).Apps; apps[0].Open != 1 ||
		!apps[0].Upstreams[0].Removed || len(r.all(nil)) != 1 {
		t.Errorf("after an hour: %+v", apps)
	}
	conn.Abort(nil)
	<-done
	if apps := r.stats(nil, now.Add(2*time.Hour)).Apps; len(r.seen) != 0 ||
		apps[0].Open != 0 || apps[0].Ends[lbproxy.EndCanceled] != 1 {
		t.Errorf("after its end: %d kept, %+v", len(r.seen), apps)
	}
	app.Close()
}

// The curves cover the last minutes, however often the page is requested.
func TestHistoryIsBounded(t *testing.T) {
	r, now := &Recorder{}, time.Now()
	for range 10 * maxSamples {
		now = now.Add(sampleEvery / 4)
		r.stats(nil, now)
	}
	got := r.stats(nil, now).History
	if len(got) != maxSamples || got[0].Time.Before(now.Add(-maxSamples*sampleEvery)) ||
		now.Sub(got[maxSamples-1].Time) >= sampleEvery {
		t.Errorf("%d samples from %v to %v, at %v", len(got), got[0].Time, got[len(got)-1].Time, now)
	}
}

// An upstream may be gone after its connections were counted and before their bytes were.
func TestPageShowsBytesOfUpstreamsGoneWithoutConnections(t *testing.T) {
	w := httptest.NewRecorder()
	render(w, "status", view{Stats: Stats{Apps: []App{{ID: "web", Gone: Upstream{Received: 5}}}}})
	if want := `<data value="5">5 B</data> received.`; !strings.Contains(w.Body.String(), want) {
		t.Errorf("the page lacks %s:\n%s", want, w.Body)
	}
}
