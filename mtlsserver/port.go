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
	asked     chan struct{} // for another connection; what is accepted unasked would be an error of long ago to whoever asks
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
	p := &port{Listener: l, asked: make(chan struct{}), accepted: make(chan accepted), closing: make(chan struct{})}
	p.accepting.Go(p.accept)
	return p
}

// accept hands connections, and what goes wrong, to those who wait for them, until the last share is closed.
func (p *port) accept() {
	for {
		select {
		case <-p.asked:
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

func (s *share) Accept() (net.Conn, error) {
	select {
	case <-s.closed: // before all else: what comes now is for those who still listen
		return nil, net.ErrClosed
	default:
	}
	for asked := s.asked; ; {
		select {
		case asked <- struct{}{}:
			asked = nil
		case a := <-s.accepted:
			return a.Conn, a.err
		case <-s.closed:
			return nil, net.ErrClosed
		}
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
