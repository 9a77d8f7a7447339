// Package systemd talks to the service manager that has started the process: it reports when the
// service is ready, reloads or stops (sd_notify), and takes over the manager's sockets (socket
// activation). Without such a manager, and on systems other than Linux, it does nothing.
package systemd

import "net"

// States of a service, for [Notify].
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
)

// A Socket is a listening TCP socket that the manager has bound. The manager keeps it open, so that
// clients can connect while no process of the service runs.
type Socket struct {
	Descriptor int
	Name       string   // FileDescriptorName= of the socket unit; the unit's own name without
	Addr       net.Addr // the address that it listens on
}
