package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// Notify sends all states, such as Ready and "STATUS=serving", to the manager in one message. It
// waits at most a second for a manager that does not read.
func Notify(states ...string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	if path[0] != '/' && path[0] != '@' {
		return fmt.Errorf("systemd: NOTIFY_SOCKET %q: want a path, or a name after @", path)
	}
	addr := &net.UnixAddr{Name: path, Net: "unixgram"} // a leading @ means an abstract socket
	c, err := net.DialUnix("unixgram", nil, addr)
	if err != nil {
		return fmt.Errorf("systemd: NOTIFY_SOCKET: %w", err)
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte(strings.Join(states, "\n"))); err != nil {
		return fmt.Errorf("systemd: NOTIFY_SOCKET: %w", err)
	}
	return nil
}

// Reloading returns the state of a service that has begun to reload. It holds the time, by which
// Type=notify-reload distinguishes this reload from an earlier one.
func Reloading() string {
	const monotonic = 1
	var now syscall.Timespec
	// The call cannot fail for a clock that exists.
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, monotonic, uintptr(unsafe.Pointer(&now)), 0)
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000)
}

const firstDescriptor = 3

// Sockets returns the sockets that the manager has passed to the process. It clears the variables
// that name them, so that neither a second call nor a child takes them too.
func Sockets() ([]Socket, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	names := os.Getenv("LISTEN_FDNAMES")
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // no sockets, or the parent's
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 10_000 {
		return nil, fmt.Errorf("systemd: LISTEN_FDS %.20q: want the number of descriptors", count)
	}
	named := strings.Split(names, ":")
	if names != "" && len(named) != n {
		return nil, fmt.Errorf("systemd: LISTEN_FDNAMES %.200q: want %d names", names, n)
	}
	var all []Socket
	for i := range n {
		s := Socket{Descriptor: firstDescriptor + i}
		if names != "" {
			s.Name = named[i]
		}
		syscall.CloseOnExec(s.Descriptor)
		l, err := s.Listen()
		if err != nil {
			return nil, err
		}
		s.Addr = l.Addr()
		l.Close()
		all = append(all, s)
	}
	return all, nil
}

// Listen returns a new listener on the socket. Closing the listener does not close the socket.
func (s Socket) Listen() (net.Listener, error) {
	l, err := s.listen()
	if err != nil {
		return nil, fmt.Errorf("systemd: descriptor %d (%q): %w: "+
			"want ListenStream= with an address and port, and Accept=no", s.Descriptor, s.Name, err)
	}
	return l, nil
}

func (s Socket) listen() (net.Listener, error) {
	listens, err := syscall.GetsockoptInt(s.Descriptor, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	switch {
	case err != nil:
		return nil, os.NewSyscallError("getsockopt", err)
	case listens == 0:
		return nil, errors.New("not a listening socket")
	}
	fd, err := syscall.Dup(s.Descriptor)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	syscall.CloseOnExec(fd)
	// Make the descriptor non-blocking before os.NewFile: otherwise Fd, which FileListener calls,
	// would make it blocking for a moment, and with it every listener on the socket.
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, os.NewSyscallError("setnonblock", err)
	}
	f := os.NewFile(uintptr(fd), s.Name)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	if _, ok := l.(*net.TCPListener); !ok {
		l.Close()
		return nil, fmt.Errorf("a %s socket", l.Addr().Network())
	}
	return l, nil
}
