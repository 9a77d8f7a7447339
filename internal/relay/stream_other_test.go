//go:build !linux || lbproxy_portable

package relay

import (
	"testing"
	"time"
)

// Where nobody knows what has arrived, a second from the last write must do, or half of it if the
// rest is needed for closing.
func TestLingerWithoutMeasure(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		quiet         time.Duration
		complete      bool
		atLeast, most time.Duration
	}{
		{2 * LingerTime, false, 0, LingerTime},
		{0, true, LingerTime / 2, time.Hour},
	} {
		to := stuck(t)
		start := time.Now()
		r := &Relay{refs: 9, client: to}
		r.timer = time.NewTimer(time.Hour)
		r.last.Store(Clock() - int64(row.quiet))
		d := direction{relay: r, to: &to, source: Server}
		if r.failed = Server; row.complete {
			r.failed = Client // which has no half-close
		}
		d.linger()
		if took := time.Since(start); took < row.atLeast || took > row.most || r.refs != 8 {
			t.Errorf("%+v: it took %v, %d references", row, took, r.refs)
		}
	}
}
