//go:build !linux || lbproxy_portable

package loop

import (
	"errors"
	"net"
	"syscall"

	"github.com/danielepagano/lbproxy/internal/relay"
)

// What follows is never called here: NewGroup fails.

type Group struct{}

func NewGroup(relay.Config, int) (*Group, error) { return nil, errors.ErrUnsupported }
func (*Group) Close()                            {}
func (*Group) Start(*Session)                    {}
func (*Group) Started() int64                    { return 0 }

type Listener struct{}

type Accepted struct {
	FD            int
	Local, Remote net.Addr
}

func (*Group) NewListener(*net.TCPListener, func(Accepted) bool) (*Listener, error) {
	return nil, errors.ErrUnsupported
}
func (*Listener) Close()                    {}
func (*Accepted) Start(*Session)            {}
func (*Listener) Accept() (Accepted, error) { return Accepted{}, errors.ErrUnsupported }

type Session struct{}

func NewSession(int, Handler) *Session           { return nil }
func (*Session) Counts() (sent, received int64)  { return 0, 0 }
func (*Session) Abort(error)                     {}
func (*Session) Resume()                         {}
func (*Session) Dials() uint32                   { return 0 }
func (*Session) CancelDial(uint32, error)        {}
func (*Session) Limit(int)                       {}
func (*Session) Chunk() int                      { return 0 }
func (*Session) Shut() (atClient, atServer bool) { return false, false }

func Duplicate(syscall.Conn) (int, error) { return -1, errors.ErrUnsupported }
func Reset(int)                           {}
