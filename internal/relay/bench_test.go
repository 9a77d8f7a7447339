package relay

import (
	"testing"
	"time"
)

// BenchmarkSweep measures one look at 100,000 relays, with system calls for none of them, as after
// the first quarter of their silence, and for all. A sweep rests 19 times as long as it takes.
func BenchmarkSweep(b *testing.B) {
	for _, ask := range []bool{false, true} {
		b.Run(map[bool]string{false: "silent", true: "ask"}[ask], func(b *testing.B) {
			_, ours := duplex(b)
			e := NewEngine(Config{Idle: time.Minute})
			e.closed = true // no timer
			one := newEnd(ours)
			for range 100_000 {
				r := &Relay{client: one, server: one}
				r.touch()
				e.add(r)
			}
			for b.Loop() {
				if ask {
					for _, r := range e.relays {
						now := Clock() - int64(20*time.Second)
						r.last.Store(now)
						r.idle.asked = now - 1
					}
				}
				e.sweeping.Add(1)
				e.sweep()
			}
		})
	}
}
