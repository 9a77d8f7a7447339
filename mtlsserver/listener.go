package mtlsserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// A port is a listening socket that several shares accept from, one at a time. So a reload neither
// binds the address again nor loses connections in the listen queue. A deadline in the past wakes
// the accepting share without closing the socket.
//
// A duplicate of the descriptor for each share would not work: File puts the original into blocking
// mode for a moment, and Close does not end an Accept that begins then.
type port struct {
	deadlineListener
	turn chan struct{} // holds an element while no share accepts

	mu        sync.Mutex // held over SetDeadline, which does not wait
	shares    int        // open ones
	accepting *share     // the share whose Accept may be waiting
	left      net.Conn   // accepted by a share that was closed meanwhile
}

// A deadlineListener can end a pending Accept by a deadline, as a *net.TCPListener can.
type deadlineListener interface {
	net.Listener
	SetDeadline(time.Time) error
}

// bind calls listen and returns the first share of the listener's port.
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
	s := &share{port: p}
	s.closed, s.close = context.WithCancel(context.Background())
	return s
}

// A share is a listener on a port that other shares may use too.
type share struct {
	*port
	closed context.Context // ends when the share is closed
	close  func()          // ends closed; called under mu
}

// Accept returns the next connection when it is the share's turn.
func (s *share) Accept() (net.Conn, error) {
	select {
	case <-s.turn:
	case <-s.closed.Done():
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
		} // otherwise the deadline was meant for the previous share
	}
}

// begin makes s the accepting share, or returns the connection that the previous one left.
func (s *share) begin() (c net.Conn, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Err() != nil {
		return nil, net.ErrClosed
	}
	if c, s.left = s.left, nil; c == nil {
		s.accepting = s
		s.SetDeadline(time.Time{})
	}
	return c, nil
}

// end undoes begin and reports whether Accept should return c. If s was closed meanwhile, end
// leaves c to the next share. If s was the last share, Accept returns c: the socket may belong to
// a service manager, and then a restart must lose no client.
func (s *share) end(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepting = nil
	if s.closed.Err() == nil {
		return true
	}
	if s.shares == 0 {
		return c != nil
	}
	s.left = c
	return false
}

// Close ends Accept. The last share to be closed closes the socket.
func (s *share) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Err() != nil {
		return nil
	}
	s.close()
	if s.accepting == s {
		s.SetDeadline(time.Unix(1, 0))
	}
	if s.shares--; s.shares == 0 {
		s.deadlineListener.Close()
		reset(s.left)
	}
	return nil
}

// reset resets a connection, as the system resets queued connections when their socket is closed.
func reset(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(0)
	}
	if c != nil {
		c.Close()
	}
}
