package lbproxy

import (
	"crypto/tls"
	"net"
)

// tlsDial connects, and returns when the handshake is done.
func tlsDial(addr string, config *tls.Config) (net.Conn, error) {
	c, err := tls.Dial("tcp", addr, config)
	if err != nil {
		return nil, err // not a nil pointer in an interface
	}
	return c, nil
}
