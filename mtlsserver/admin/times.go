package admin

import (
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
)

var (
	dialBounds = [...]time.Duration{
		500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
		10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
		250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond,
		5 * time.Second,
	}
	connBounds = [...]time.Duration{
		10 * time.Millisecond, 100 * time.Millisecond, time.Second, 10 * time.Second, time.Minute,
		10 * time.Minute, time.Hour, 6 * time.Hour, 24 * time.Hour,
	}
)

// times are the durations of an app's dials and connections.
type times struct{ dials, conns histogram }

// A histogram counts durations by their bounds; dialBounds is the longest list.
type histogram struct {
	counts [len(dialBounds) + 1]atomic.Uint64 // up to each bound, and beyond the last
	sum    atomic.Int64
}

func (h *histogram) observe(d time.Duration, bounds []time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
}

func (h *histogram) add(other *histogram) {
	for i := range h.counts {
		h.counts[i].Add(other.counts[i].Load())
	}
	h.sum.Add(other.sum.Load())
}

// Record wraps opts.OnDone, so that r records the durations of the app's dials and connections when
// a connection has ended. It returns opts, or new Options if opts is nil. id is the app's id.
func (r *Recorder) Record(id string, opts *lbproxy.Options) *lbproxy.Options {
	if opts == nil {
		opts = &lbproxy.Options{}
	}
	r.timesOf(id)
	done := opts.OnDone
	opts.OnDone = func(result lbproxy.Result) {
		t := r.timesOf(id) // not the first ones: forget may have moved them
		t.conns.observe(result.Duration, connBounds[:])
		if result.DialTime > 0 {
			t.dials.observe(result.DialTime, dialBounds[:])
		}
		if done != nil {
			done(result)
		}
	}
	return opts
}

// timesOf returns the durations of an id, and makes them if there are none.
func (r *Recorder) timesOf(id string) *times {
	v, ok := r.times.Load(id)
	if !ok {
		v, _ = r.times.LoadOrStore(id, &times{})
	}
	return v.(*times)
}

// forgetTimes moves the durations of an id to the empty id.
func (r *Recorder) forgetTimes(id string) {
	v, ok := r.times.LoadAndDelete(id)
	if !ok {
		return
	}
	t, rest := v.(*times), r.timesOf("")
	rest.dials.add(&t.dials)
	rest.conns.add(&t.conns)
}
