package mtlsserver

import (
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy"
)

func listenTCP(_, addr string) (net.Listener, error) { return lbproxy.Listen(addr) }

func TestAClosedShareAcceptsNothing(t *testing.T) {
	for range 100 {
		a, err := bind(listenTCP, "web", "127.0.0.1:0")
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

// A fedListener accepts the connections that the test puts into it.
type fedListener struct {
	net.Listener
	conns  chan net.Conn
	closed chan struct{}
	late   chan struct{} // holds an element while the deadline has passed
}

func newFedListener() *fedListener {
	return &fedListener{conns: make(chan net.Conn), closed: make(chan struct{}),
		late: make(chan struct{}, 1)}
}

func (l *fedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.late:
		return nil, os.ErrDeadlineExceeded
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *fedListener) SetDeadline(t time.Time) error {
	select {
	case <-l.late:
	default:
	}
	if !t.IsZero() {
		l.late <- struct{}{}
	}
	return nil
}

func (l *fedListener) Close() error { close(l.closed); return nil }

// A pipe end stands for a connection.
func someConn(t *testing.T) net.Conn {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return a
}

// A share that is closed during Accept does not block the other shares.
func TestEveryAcceptingShareGetsAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newFedListener()
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
		must(t, gone.Close())
		for len(accepting) > 0 {
			l.conns <- someConn(t)
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

// Close ends the share's Accept at once, while another share keeps the port open.
func TestCloseEndsAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPort(newFedListener())
		s, other := p.share(), p.share()
		ended := make(chan error, 1)
		go func() {
			_, err := s.Accept()
			ended <- err
		}()
		synctest.Wait()
		must(t, s.Close())
		synctest.Wait()
		select {
		case err := <-ended:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept: %v, want %v", err, net.ErrClosed)
			}
		default:
			t.Error("Accept waits for a connection")
		}
		must(t, other.Close())
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

func (l *listenerUntil) SetDeadline(time.Time) error { return nil }
func (l *listenerUntil) Close() error                { close(l.closed); return nil }

// A share that pauses between two Accepts, as lbproxy does after an error, does not get that error
// again later.
func TestPortReturnsNoStaleError(t *testing.T) {
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

// A slowListener is closed before it returns the connection that it has accepted.
type slowListener struct {
	*net.TCPListener
	has, closed chan struct{}
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	close(l.has)
	<-l.closed
	return c, err
}

func (l *slowListener) Close() error {
	defer close(l.closed)
	return l.TCPListener.Close()
}

// The connection is neither in the system's queue nor with another share.
func TestConnAcceptedWhileTheLastShareClosesIsReturned(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	slow := &slowListener{l.(*net.TCPListener), make(chan struct{}), make(chan struct{})}
	s := newPort(slow).share()
	accepted := make(chan net.Conn, 1)
	over := make(chan error)
	go func() {
		c, err := s.Accept()
		accepted <- c
		over <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer c.Close()
	<-slow.has
	must(t, s.Close())
	must(t, <-over)
	got := <-accepted
	defer got.Close()
	if got.RemoteAddr().String() != c.LocalAddr().String() {
		t.Errorf("it is a connection of %v, want %v", got.RemoteAddr(), c.LocalAddr())
	}
	if c, err := s.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("then Accept returns %v, %v", c, err)
	}
}

// A plainListener has no deadlines.
type plainListener struct{ net.Listener }

func TestOptionsListen(t *testing.T) {
	l := newLab(t, nil)
	tcp, err := lbproxy.Listen("127.0.0.1:0")
	must(t, err)
	for _, row := range []struct {
		listener net.Listener
		err      error
		want     string
	}{
		{nil, errors.New("no room"), `mtlsserver: app "web": no room`},
		{nil, nil,
			`mtlsserver: app "web": Options.Listen returned a <nil>, which has no SetDeadline`},
		{plainListener{tcp}, nil, "returned a mtlsserver.plainListener, which has no SetDeadline"},
	} {
		_, err := New(l.config, &Options{Listen: func(app, addr string) (net.Listener, error) {
			if app != "web" {
				return lbproxy.Listen(addr)
			}
			return row.listener, row.err
		}})
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%v, want %s", err, row.want)
		}
	}
	if _, err := tcp.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener that is of no use is open: %v", err)
	}
}

// Shares replace each other 2,000 times while clients connect. Each connection is accepted once,
// and none is reset.
func TestHandOver(t *testing.T) {
	s, err := bind(listenTCP, "web", "127.0.0.1:0")
	must(t, err)
	addr := s.Addr().String()
	var accepting, connecting sync.WaitGroup
	serve := func(s *share) {
		accepting.Go(func() {
			for {
				c, err := s.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				c.Write([]byte{'x'})
				c.Close()
			}
		})
	}
	serve(s)
	stop := make(chan struct{})
	served := make([]int, 3)
	for i := range served {
		connecting.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(patience))
				if _, err := c.Read(make([]byte, 1)); err != nil {
					t.Error(err)
				}
				c.Close()
				served[i]++
			}
		})
	}
	for range 2000 {
		next := s.port.share()
		serve(next)
		must(t, s.Close())
		s = next
	}
	close(stop)
	connecting.Wait()
	must(t, s.Close())
	accepting.Wait()
	t.Logf("served %v", served)
}
