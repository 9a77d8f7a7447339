//go:build !linux

package lbproxy

import (
	"net"
	"sync/atomic"
	"time"
)

// platform is what a pump needs to move bytes here: nothing.
type platform struct{}

func (p *pump) move() (n int, readErr, writeErr error) { return p.copyChunk() }

// pipePool is for splicing, which there is none of here.
type pipePool struct{}

func (*pipePool) close() {}

// unsent reports whether c still has bytes to send. There is no portable way to ask, so they are given as long as
// there is.
func unsent(c net.Conn) bool {
	_, ok := bottom(c).(*net.TCPConn)
	return ok
}

// wasReset gives a write to c that may have taken the error of a reset time to come back with it.
func wasReset(_ net.Conn, writing *atomic.Bool) bool {
	for range 10 {
		if !writing.Load() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return false
}
