//go:build !linux

package soak

import "net"

const canName = false

func addrOf(uint64) *net.TCPAddr         { return nil }
func idOf(net.Addr) (id uint64, ok bool) { return 0, false }
func unsent(*net.TCPConn) int            { return 0 }
func wasReset(*net.TCPConn) bool         { return false }
func setBacklog(net.Listener, int) bool  { return false }
func descriptors() int                   { return 0 }
func residentMiB(int) int                { return 0 }
