//go:build !linux

package systemd

import (
	"errors"
	"net"
)

// Notify does nothing here.
func Notify(...string) error { return nil }

// Reloading returns no state here.
func Reloading() string { return "" }

// Sockets returns none here.
func Sockets() ([]Socket, error) { return nil, nil }

// Listen is never called here: there are no sockets.
func (s Socket) Listen() (net.Listener, error) { return nil, errors.ErrUnsupported }
