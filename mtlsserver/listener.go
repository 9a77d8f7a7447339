package mtlsserver

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// A port is a listening socket that passes from one share to the next, so that a reload neither
// binds it again nor loses what waits in its queue. One share accepts at a time. To have it stop,
// the socket gets a deadline that has passed, which wakes Accept and closes nothing.
//
// (Shares cannot have duplicates of the descriptor: File sets the original to block for a moment,
// and an Accept that begins then is not ended by Close.)
type port struct {
	deadlineListener
	turn chan struct{} // holds an element while no share accepts

	mu        sync.Mutex // held over SetDeadline, which does not wait
	shares    int        // not closed yet
	accepting *share     // the one whose Accept may be waiting
	left      net.Conn   // accepted for a share that was closed meanwhile
}

// A deadlineListener is what a port needs of a *net.TCPListener.
type deadlineListener interface {
	net.Listener
	SetDeadline(time.Time) error
}

// bind returns the first share of a new port, whose listener listen returns.
func bind(listen func(app, addr string) (net.Listener, error), app, addr string) (*share, error) {
	l, err := listen(app, addr)
	if err != nil {
		return nil, err
	}
	d, ok := l.(deadlineListener)
	if !ok {
		if l != nil {
			l.Close()
		}
		return nil, fmt.Errorf("Options.Listen returned a %T, which has no SetDeadline: "+
			"return one of package net", l)
	}
	return newPort(d).share(), nil
}

func newPort(l deadlineListener) *port {
	p := &port{deadlineListener: l, turn: make(chan struct{}, 1)}
	p.turn <- struct{}{}
	return p
}

func (p *port) share() *share {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shares++
	return &share{port: p, closed: make(chan struct{})}
}

// A share is a listener on a port that other shares may be listening on.
type share struct {
	*port
	once   sync.Once
	closed chan struct{}
}

// Accept returns the next connection when it is the share's turn.
func (s *share) Accept() (net.Conn, error) {
	select {
	case <-s.turn:
	case <-s.closed:
		return nil, net.ErrClosed
	}
	defer func() { s.turn <- struct{}{} }()
	for {
		c, err := s.begin()
		if c != nil || err != nil {
			return c, err
		}
		c, err = s.deadlineListener.Accept()
		if !s.end(c) {
			return nil, net.ErrClosed
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		} // else the deadline was for the share before
	}
}

// begin makes s the share that accepts, or returns a connection that was left for it.
func (s *share) begin() (c net.Conn, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosed() {
		return nil, net.ErrClosed
	}
	if c, s.left = s.left, nil; c == nil {
		s.accepting = s
		s.SetDeadline(time.Time{})
	}
	return c, nil
}

// end ends what begin began, and reports whether Accept returns what it has. If s was closed
// meanwhile, it leaves c to the next share. If there is none, c is still for s: the socket may have
// been handed over by another process, which keeps it open, and then no client may be lost.
func (s *share) end(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepting = nil
	if !s.isClosed() {
		return true
	}
	if s.shares == 0 {
		return c != nil
	}
	s.left = c
	return false
}

func (s *share) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// Close ends Accept. When the last share is closed the socket is, too.
func (s *share) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		close(s.closed)
		if s.accepting == s {
			s.SetDeadline(time.Unix(1, 0))
		}
		if s.shares--; s.shares == 0 {
			s.deadlineListener.Close()
			reset(s.left)
		}
	})
	return nil
}

// reset closes a connection as the system does with those in the queue of a socket that is closed.
func reset(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(0)
	}
	if c != nil {
		c.Close()
	}
}
