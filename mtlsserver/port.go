package mtlsserver

import (
	"net"
	"sync"

	"github.com/danielepagano/lbproxy"
)

// A port is an address that is bound. Proxies have shares of it, so that it can pass from one to the next without being
// bound again, and what waits in its queue is not lost. (They cannot have duplicates of the descriptor: making one has
// the original block for a moment, and an Accept that does so then is not ended by Close.)
type port struct {
	net.Listener
	turn      chan bool     // has whether a connection has been asked for, but while a share accepts: then that has it
	ask       chan struct{} // for a connection; what is accepted unasked would be an error of long ago to whoever asks
	accepted  chan accepted
	closing   chan struct{} // closed with the last share
	accepting sync.WaitGroup

	mu     sync.Mutex
	shares int
}

type accepted struct {
	net.Conn
	err error
}

// bind returns the first share of a new port.
func bind(addr string) (*share, error) {
	l, err := lbproxy.Listen(addr)
	if err != nil {
		return nil, err
	}
	return newPort(l).share(), nil
}

func newPort(l net.Listener) *port {
	p := &port{
		Listener: l, turn: make(chan bool, 1), ask: make(chan struct{}), accepted: make(chan accepted), closing: make(chan struct{}),
	}
	p.turn <- false
	p.accepting.Go(p.accept)
	return p
}

// accept hands a connection, or what goes wrong, to whoever accepts, each time it is asked, until the last share is closed.
func (p *port) accept() {
	for {
		select {
		case <-p.ask:
		case <-p.closing:
			return
		}
		c, err := p.Listener.Accept()
		select {
		case p.accepted <- accepted{c, err}:
		case <-p.closing:
			if err == nil {
				c.(*net.TCPConn).SetLinger(0) // as the system does to those in the queue
				c.Close()
			}
			return
		}
	}
}

func (p *port) share() *share {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shares++
	return &share{port: p, closed: make(chan struct{})}
}

// A share is a listener on a port that others may be listening on.
type share struct {
	*port
	once   sync.Once
	closed chan struct{}
}

// Accept waits for its turn: of two that accept at once, one could get what the other has asked for.
func (s *share) Accept() (net.Conn, error) {
	select {
	case <-s.closed: // before all else: what comes now is for those who still listen
		return nil, net.ErrClosed
	default:
	}
	asked := false
	select {
	case asked = <-s.turn:
	case <-s.closed:
		return nil, net.ErrClosed
	}
	defer func() { s.turn <- asked }()
	if !asked {
		select {
		case s.ask <- struct{}{}:
			asked = true
		case <-s.closed:
			return nil, net.ErrClosed
		}
	}
	select {
	case a := <-s.accepted:
		asked = false
		return a.Conn, a.err
	case <-s.closed: // the next one gets what this one has asked for
		return nil, net.ErrClosed
	}
}

// Close ends Accept; that of the last share closes the port.
func (s *share) Close() error {
	s.once.Do(func() {
		close(s.closed)
		s.mu.Lock()
		s.shares--
		last := s.shares == 0
		s.mu.Unlock()
		if last {
			close(s.closing)
			s.Listener.Close()
			s.accepting.Wait()
		}
	})
	return nil
}
