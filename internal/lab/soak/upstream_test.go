//go:build linux

package soak

import (
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A server is an upstream. It learns from a client's header which connection it has, and plays the
// upstream's scripts.
type server struct {
	run    *run
	addr   string
	tls    *tls.Config // nil: plain
	greets bool        // speaks first
	slow   bool        // takes its time to accept

	wg    sync.WaitGroup
	mu    sync.Mutex
	l     net.Listener // nil while it is down
	conns map[*net.TCPConn]struct{}
}

// newServer starts a server, after change, if not nil, has changed it.
func newServer(t testing.TB, r *run, change func(*server)) *server {
	t.Helper()
	s := &server{run: r, addr: proxytest.FreeAddr(t), conns: map[*net.TCPConn]struct{}{}}
	if change != nil {
		change(s)
	}
	proxytest.Must(t, s.start())
	return s
}

// start makes s listen, on the address that it had before.
func (s *server) start() error {
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.l = l
	s.mu.Unlock()
	s.wg.Go(func() {
		for {
			if s.slow {
				time.Sleep(rand.N(10 * time.Millisecond))
			}
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err != nil {
				s.run.fail("upstream %s cannot accept: %v", s.addr, err)
				return
			}
			s.wg.Go(func() { s.serve(c.(*net.TCPConn)) })
		}
	})
	return nil
}

// kill acts as the end of a killed process: it resets all connections and closes the listener.
func (s *server) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.l.Close()
	s.l = nil
	for c := range s.conns {
		c.SetLinger(0)
		c.Close()
	}
}

// stop closes the listener and waits for connections to end.
func (s *server) stop() {
	s.mu.Lock()
	if s.l != nil {
		s.l.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *server) serve(tcp *net.TCPConn) {
	s.mu.Lock()
	if s.l == nil { // killed meanwhile
		tcp.SetLinger(0)
		tcp.Close()
		s.mu.Unlock()
		return
	}
	s.conns[tcp] = struct{}{}
	s.mu.Unlock()
	defer func() {
		tcp.Close()
		s.mu.Lock()
		delete(s.conns, tcp)
		s.mu.Unlock()
	}()
	tcp.SetDeadline(time.Now().Add(giveUp))
	who := &end{net: tcp, tcp: tcp}
	if s.tls != nil {
		if who.overTLS(tls.Server, s.tls) != nil {
			return // nobody's; its client reports the loss
		}
	}
	if s.greets {
		if _, err := who.net.Write(greeting); err != nil {
			return
		}
	}
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(who.net, b); err != nil {
		return
	}
	id, ok := headerID(s.run.seed, b)
	c := s.run.find(id)
	if !ok || c == nil {
		s.run.fail("upstream %s received %x, which is no connection's header", s.addr, b)
		return
	}
	if c.seen.Swap(true) {
		s.run.fail("connection %d has reached an upstream twice", id)
		return
	}
	defer close(c.upstreamDone)
	c.down.net, c.down.tcp = who.net, tcp
	if c.upstream != nil { // else it should not be here, which has been noted
		c.down.play(c.upstream)
	}
}
