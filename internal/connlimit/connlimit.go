// Package connlimit bounds how many connections of a listener are open at once.
package connlimit

import (
	"net"
	"sync"
)

// Listener returns a listener that accepts from l. While most connections are open, it closes each
// new one at once, so that nobody waits. The connections are *Conns.
func Listener(l net.Listener, most int) net.Listener {
	return &listener{l, make(chan struct{}, most)}
}

type listener struct {
	net.Listener
	places chan struct{} // holds an element for each open connection
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.places <- struct{}{}:
			return &Conn{c, sync.OnceFunc(func() { <-l.places })}, nil
		default:
			c.Close()
		}
	}
}

// A Conn is a connection that holds a place.
type Conn struct {
	net.Conn
	leave func()
}

// Close closes the connection and gives its place back.
func (c *Conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
