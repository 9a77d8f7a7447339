package relay

import (
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestReleaseLeavesTheClientOpen(t *testing.T) {
	full := errors.New("full")
	for _, deaf := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			client, ours := proxytest.Pipe()
			h := newRecorder(nil)
			e := newEngine(t, Config{})
			if deaf {
				r := e.Start(noDeadline{ours}, h, 0)
				start := time.Now()
				if !r.Release(full) {
					t.Error("Release returned false")
				}
				// Only a reset ends the read of a conn that has no deadlines.
				if o := h.wait(t); o.Err != full || time.Since(start) != LingerTime {
					t.Errorf("%+v after %v", o, time.Since(start))
				}
				client.Close()
				return
			}
			r := e.Start(ours, h, 0)
			start := time.Now()
			if !r.Release(full) {
				t.Error("Release returned false")
			}
			if o := h.wait(t); o.Err != full || o.Failed != NoSide || time.Since(start) != 0 {
				t.Errorf("%+v after %v", o, time.Since(start))
			}
			r.Abort(nil) // which is too late
			time.Sleep(2 * LingerTime)
			go io.Copy(ours, ours)
			if err := proxytest.Ping(client); err != nil {
				t.Errorf("after Done: %v", err)
			}
			client.Close()
			ours.Close()
		})
	}
}

// noDeadline ignores deadlines.
type noDeadline struct{ *proxytest.PipeConn }

func (noDeadline) SetReadDeadline(time.Time) error { return nil }

func TestReleaseOfARelayThatIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		h := newRecorder(nil)
		r := newEngine(t, Config{}).Start(ours, h, 0)
		r.Abort(io.ErrClosedPipe)
		if r.Release(errors.New("full")) {
			t.Error("Release returned true")
		}
		if o := h.wait(t); o.Err != io.ErrClosedPipe {
			t.Errorf("%+v", o)
		}
		proxytest.ReadReset(t, client)
		client.Close()
	})
}

// LastWord resets a conn that has no deadlines on a goroutine that nobody can catch a panic of.
func TestPanicInCloseAfterTheLastWordIsTheCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ours := proxytest.Pipe()
		defer client.Close()
		defer func() {
			if p := recover(); p != "Close" {
				t.Errorf("LastWord panics with %v, want Close", p)
			}
		}()
		LastWord(lastWordPanics{panicAtReset{ours, "Close"}})
	})
}

// A lastWordPanics ignores deadlines, and panics when it is closed.
type lastWordPanics struct{ panicAtReset }

func (lastWordPanics) SetDeadline(time.Time) error { return nil }
