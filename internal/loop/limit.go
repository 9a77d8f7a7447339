//go:build linux && !lbproxy_portable

package loop

import (
	"time"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// A limit is the state of a session whose handler may hold it. Most sessions have none.
type limit struct {
	pacer [2]relay.Pacer // for what comes from each side
	began [2]int64       // clock at which a side began to be held
	until [2]int64       // clock until which it is held; 0: it is not
}

// Limit bounds the bytes that move before the handler's first verdict. It is called before the
// session is started, if the handler's verdicts may have a wait or a chunk: those of other sessions
// are not obeyed.
func (s *Session) Limit(chunk int) {
	s.limit = &limit{}
	for i := range s.limit.pacer {
		s.limit.pacer[i].Chunk = chunk
	}
}

// Chunk returns how many bytes may move at once; 0: there is no bound. It is called by Leave.
func (s *Session) Chunk() int {
	if s.limit == nil {
		return 0
	}
	return least(s.limit.pacer[client].Chunk, s.limit.pacer[server].Chunk)
}

// least returns the smaller of a and b, of which 0 stands for none.
func least[T int | int64](a, b T) T {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// room returns how many bytes a read of side i may ask for.
func (s *Session) room(i int) int {
	if s.limit == nil {
		return bufferSize
	}
	return s.limit.pacer[i].Limit(bufferSize)
}

// isHeld reports whether nothing may move from side i for now. The bytes of a failed side are
// not held: time is short.
func (s *Session) isHeld(i int) bool {
	return s.limit != nil && s.limit.until[i] != 0 && s.phase == open
}

// obey holds side i, of which n bytes were written, if v asks for it.
func (l *loop) obey(s *Session, i, n int, v relay.Verdict) {
	lim := s.limit
	if lim == nil || s.phase != open {
		return
	}
	if pause := lim.pacer[i].Moved(n, v.Wait, v.Chunk); pause > 0 {
		lim.began[i] = relay.Clock()
		lim.until[i] = lim.began[i] + int64(min(pause, forever))
		l.setTimer(s, lim.next())
	}
}

const forever = 100 * 365 * 24 * time.Hour

// next is when the next side is let go; 0: none is held.
func (lim *limit) next() int64 { return least(lim.until[client], lim.until[server]) }

// letGo ends the holds whose time is over.
func (l *loop) letGo(s *Session) {
	lim := s.limit
	for i := range lim.until {
		if lim.until[i] != 0 && lim.until[i] <= l.now {
			lim.pacer[i].Paused(time.Duration(l.now - lim.began[i]))
			lim.until[i] = 0
		}
	}
	l.setTimer(s, lim.next())
	s.idle.last = l.now
	l.relay(s)
}
