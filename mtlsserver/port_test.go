package mtlsserver

import (
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestAClosedShareAcceptsNothing(t *testing.T) {
	for range 100 {
		a, err := bind("127.0.0.1:0")
		must(t, err)
		b := a.port.share()
		a.Close()
		c, err := net.Dial("tcp", a.Addr().String())
		must(t, err)
		if got, err := a.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("%v, %v", got, err)
		}
		got, err := b.Accept() // whose it is
		must(t, err)
		got.Close()
		c.Close()
		b.Close()
	}
}

// A fedListener accepts what is put into it.
type fedListener struct {
	net.Listener
	conns  chan net.Conn
	closed chan struct{}
}

func (l *fedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *fedListener) Close() error { close(l.closed); return nil }

// Whoever takes a connection that another share has asked for, and then is closed, does not leave that one waiting.
func TestEachShareThatAcceptsIsServedInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &fedListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		p := newPort(l)
		gone := p.share()
		accepting := map[*share]bool{}
		accepted := make(chan *share)
		accept := func(s *share) {
			go func() {
				if _, err := s.Accept(); err == nil {
					accepted <- s
				}
			}()
			synctest.Wait()
		}
		accept(gone)
		for range 3 {
			s := p.share()
			accepting[s] = true
			accept(s)
		}
		must(t, gone.Close()) // which has asked
		for len(accepting) > 0 {
			l.conns <- nil
			synctest.Wait()
			select {
			case s := <-accepted:
				delete(accepting, s)
				must(t, s.Close())
			default:
				t.Fatalf("%d accept, and there is a connection, but none gets it", len(accepting))
			}
		}
	})
}

// A listenerUntil fails until a time, and then is silent.
type listenerUntil struct {
	net.Listener
	until  time.Time
	closed chan struct{}
}

func (l *listenerUntil) Accept() (net.Conn, error) {
	if time.Now().Before(l.until) {
		return nil, errors.New("too many open files")
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *listenerUntil) Close() error { close(l.closed); return nil }

// Who waits between one Accept and the next, as lbproxy does after an error, is not told of an error from before.
func TestAPortHasNoErrorsInStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listenerUntil{until: time.Now().Add(time.Minute), closed: make(chan struct{})}
		p := newPort(l)
		s := p.share()
		for time.Now().Before(l.until) {
			if _, err := s.Accept(); err == nil {
				t.Fatal("no error")
			}
			time.Sleep(time.Second)
		}
		over := make(chan error)
		go func() {
			_, err := s.Accept()
			over <- err
		}()
		synctest.Wait()
		select {
		case err := <-over:
			t.Errorf("a minute late: %v", err)
		default:
		}
		s.Close()
		if err := <-over; err == nil {
			t.Error("it accepts after Close")
		}
	})
}

// A slowListener is closed before it hands out what it has accepted.
type slowListener struct {
	net.Listener
	has, closed chan struct{}
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	close(l.has)
	<-l.closed
	return c, err
}

func (l *slowListener) Close() error {
	defer close(l.closed)
	return l.Listener.Close()
}

// It is neither in the system's queue nor with anybody who would close it.
func TestAConnectionThatNobodyHasTakenIsClosedWithThePort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	slow := &slowListener{l, make(chan struct{}), make(chan struct{})}
	s := newPort(slow).share()
	over := make(chan error)
	go func() {
		_, err := s.Accept()
		over <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer c.Close()
	<-slow.has
	must(t, s.Close())
	if err := <-over; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept returns %v", err)
	}
	must(t, ended(c))
}
