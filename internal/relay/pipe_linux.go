//go:build !lbproxy_portable

package relay

import (
	"sync"
	"syscall"
	"time"
)

// A splicer moves bytes from socket to socket through a pipe, by splice(2), so that bulk data does
// not pass through the process. It holds a pipe only while the pipe has bytes.
type splicer struct {
	d        *direction
	from, to *socket
	fill     func(fd uintptr) bool // made once, because a closure for each call would allocate
	drain    func(fd uintptr) bool
	pipe     *pipe
	held     int // bytes in pipe
	n        int // bytes that the last call moved
	errno    syscall.Errno
	small    int // moves in a row of less than a quarter of a buffer; two end splicing
}

// newSplicer returns a splicer for d, or nil if the sockets of d cannot be spliced.
func newSplicer(d *direction) *splicer {
	from, ok1 := d.from.stream.(*socket)
	to, ok2 := d.to.stream.(*socket)
	// splice has no MSG_DONTWAIT: a blocking descriptor would hold the goroutine in the system, and
	// Close would wait for it.
	if !ok1 || !ok2 || ask(from.raw, BlocksFD) || ask(to.raw, BlocksFD) {
		return nil
	}
	s := &splicer{d: d, from: from, to: to}
	s.fill, s.drain = s.fillReady, s.drainReady
	return s
}

// move moves one chunk.
func (s *splicer) move() (n int, readErr, writeErr error) {
	d, pipes := s.d, &s.d.relay.engine.pipes
	if err := s.from.raw.Read(s.fill); err != nil {
		return 0, err, nil
	}
	switch {
	case s.pipe == nil:
		s.stop()
		return 0, nil, nil
	case s.errno == syscall.EINVAL || s.errno == syscall.ENOSYS: // the kernel cannot splice these
		pipes.put(s.pipe)
		d.noSplice = true
		s.stop()
		return 0, nil, nil
	case s.errno != 0:
		pipes.put(s.pipe)
		return 0, s.from.opError("read", "splice", s.errno), nil
	}
	if s.small++; s.n >= LargeBuffer/4 {
		s.small = 0
	}
	if s.small >= 2 {
		s.stop()
	}
	n, s.held = s.n, s.n
	d.phase.Store(writing)
	for s.held > 0 && writeErr == nil {
		if writeErr = s.to.raw.Write(s.drain); writeErr == nil && s.errno != 0 {
			writeErr = s.to.opError("write", "splice", s.errno)
		}
	}
	if writeErr != nil { // copy sets the phase after it has recorded the error
		pipes.drop(s.pipe)
		return n - s.held, nil, writeErr
	}
	d.phase.Store(copying)
	pipes.put(s.pipe)
	return n, nil, nil
}

// stop makes the direction read and write again.
func (s *splicer) stop() { s.d.splicer, s.d.fullReads = nil, 0 }

// fillReady moves the available bytes into a pipe. If s has no pipe afterwards, the pool has none,
// or a read has to go on.
func (s *splicer) fillReady(fd uintptr) bool {
	pipes := &s.d.relay.engine.pipes
	if s.pipe = pipes.get(); s.pipe == nil {
		return true
	}
	most := maxChunk
	if smallAbout(Clock()) {
		most = sharedChunk
	}
	s.splice(int(fd), s.pipe.w, s.d.pacer.Limit(most))
	if s.n > 0 || s.errno != 0 && s.errno != syscall.EAGAIN {
		return true
	}
	// splice stops before an urgent byte: it returns EAGAIN, or 0 once the stream has ended, though
	// more bytes follow. A read skips the urgent byte, and finds an end, too.
	pipes.put(s.pipe)
	s.pipe = nil
	return pollFD(int(fd), syscall.EPOLLIN) != 0
}

func (s *splicer) drainReady(fd uintptr) bool {
	for s.held > 0 {
		s.splice(s.pipe.r, int(fd), s.held)
		if s.errno == syscall.EAGAIN {
			s.d.stuck()
			return false
		}
		if s.errno != 0 {
			return true
		}
		s.held -= s.n
		s.d.relay.touch()
	}
	return true
}

const (
	spliceMove     = 1 // SPLICE_F_MOVE
	spliceNonblock = 2 // SPLICE_F_NONBLOCK
)

func (s *splicer) splice(from, to, most int) {
	turn := takeTurn()
	defer giveTurn(turn)
	for {
		n, err := syscall.Splice(from, nil, to, nil, most, spliceMove|spliceNonblock)
		s.n = max(int(n), 0)
		if s.errno, _ = err.(syscall.Errno); s.errno != syscall.EINTR {
			return
		}
	}
}

// A pipe holds spliced bytes between two sockets.
type pipe struct{ r, w int }

func (p *pipe) close() {
	syscall.Close(p.r)
	syscall.Close(p.w)
}

// A pipePool keeps empty pipes for reuse. It closes those that were not needed for a second, so
// that an engine at rest holds none.
type pipePool struct {
	mu    sync.Mutex
	free  []*pipe
	all   int         // pipes in free and in use
	spare int         // the smallest length of free since trim last ran
	timer *time.Timer // runs trim; nil if there is nothing to trim
}

const (
	// With 512 KiB, bulk data takes a fifth less CPU time than with 256 KiB; 1 MiB is no better.
	pipeSize = 512 << 10

	// maxPipes of this size are as much as Linux grants an unprivileged user.
	maxPipes = 128
)

// get returns an empty pipe, or nil if maxPipes are in use or the system grants none.
func (pp *pipePool) get() *pipe {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	if last := len(pp.free) - 1; last >= 0 {
		p := pp.free[last]
		pp.free = pp.free[:last]
		pp.spare = min(pp.spare, last)
		return p
	}
	var fds [2]int
	if pp.all >= maxPipes || syscall.Pipe2(fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK) != nil {
		return nil
	}
	pp.all++
	// This may fail: beyond pipe-user-pages-soft a user gets small pipes, which work too.
	const setPipeSize = 1031 // F_SETPIPE_SZ
	syscall.Syscall(syscall.SYS_FCNTL, uintptr(fds[1]), setPipeSize, pipeSize)
	return &pipe{r: fds[0], w: fds[1]}
}

// drop closes a pipe that is not empty. Another stream must not use it, because it would get bytes
// of the last one, or find the pipe full and wait for ever.
func (pp *pipePool) drop(p *pipe) {
	p.close()
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.all--
}

// put takes back an empty pipe.
func (pp *pipePool) put(p *pipe) {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.free = append(pp.free, p)
	if pp.timer == nil {
		pp.timer = time.AfterFunc(time.Second, pp.trim)
	}
}

func (pp *pipePool) trim() {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	for _, p := range pp.free[:pp.spare] {
		p.close()
	}
	pp.all -= pp.spare
	pp.free = pp.free[:copy(pp.free, pp.free[pp.spare:])]
	if pp.spare = len(pp.free); pp.spare == 0 {
		pp.timer = nil
		return
	}
	pp.timer.Reset(time.Second)
}

// close closes the pipes. All of them are free.
func (pp *pipePool) close() {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	for _, p := range pp.free {
		p.close()
	}
	pp.all -= len(pp.free)
	pp.free, pp.spare = nil, 0
	if pp.timer != nil {
		pp.timer.Stop()
	}
}
