package relay

import (
	"net"
	"os"
)

// A FileConn is a TCP connection that is an os.File, which takes a descriptor as it is: package net
// would duplicate it, ask for its addresses, and fail when there is no descriptor left.
type FileConn struct {
	*os.File
	Local, Remote net.Addr
	Shut          bool // the stream to the peer has ended; a relay does not end it again
}

// NewFileConn returns a conn that owns fd, a connected socket that does not block.
func NewFileConn(fd int, local, remote net.Addr) *FileConn {
	return &FileConn{File: os.NewFile(uintptr(fd), "tcp"), Local: local, Remote: remote}
}

func (c *FileConn) LocalAddr() net.Addr  { return c.Local }
func (c *FileConn) RemoteAddr() net.Addr { return c.Remote }
