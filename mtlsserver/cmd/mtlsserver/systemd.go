package main

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/systemd"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// passedSockets are the sockets that the service manager has passed to the process. The server uses
// them instead of binding its own.
type passedSockets []systemd.Socket

// of returns the socket of an app: the one with the app's id as its name, or the one at its
// address.
func (h passedSockets) of(app, addr string) (systemd.Socket, bool) {
	i := slices.IndexFunc(h, func(s systemd.Socket) bool { return s.Name == app })
	if i < 0 {
		i = slices.IndexFunc(h, func(s systemd.Socket) bool { return listensAt(s.Addr, addr) })
	}
	if i < 0 {
		return systemd.Socket{}, false
	}
	return h[i], true
}

// listen is the Listen of mtlsserver.Options.
func (h passedSockets) listen(app, addr string) (net.Listener, error) {
	if s, ok := h.of(app, addr); ok {
		return s.Listen()
	}
	return lbproxy.Listen(addr)
}

// unused returns an error with the sockets that no app of c uses, and a remedy; nil if there are
// none.
func (h passedSockets) unused(c *mtlsserver.Config) error {
	used := map[int]string{}
	var ids []string
	for _, app := range c.Apps {
		ids = append(ids, app.ID)
		s, ok := h.of(app.ID, app.Listen)
		if first, twice := used[s.Descriptor]; ok && twice {
			return fmt.Errorf("descriptor %d (%q, %v) is for both apps %q and %q: "+
				"name one by each FileDescriptorName=", s.Descriptor, s.Name, s.Addr, first, app.ID)
		} else if ok {
			used[s.Descriptor] = app.ID
		}
	}
	var all []string
	for _, s := range h {
		if _, ok := used[s.Descriptor]; !ok {
			all = append(all, fmt.Sprintf("%d (%q, %v)", s.Descriptor, s.Name, s.Addr))
		}
	}
	if len(all) == 0 {
		return nil
	}
	slices.Sort(ids)
	return fmt.Errorf("no app for descriptor %s: set FileDescriptorName= of its socket unit "+
		"to one of %q that has no other, or ListenStream= to that app's listen",
		strings.Join(all, ", "), ids)
}

// listensAt reports whether listening on addr, a "host:port", would make a socket at the address
// at.
func listensAt(at net.Addr, addr string) bool {
	is, ok := at.(*net.TCPAddr)
	want, err := net.ResolveTCPAddr("tcp", addr)
	if !ok || err != nil || is.Port != want.Port {
		return false
	}
	wantAny := want.IP == nil || want.IP.IsUnspecified()
	return is.IP.Equal(want.IP) || is.IP.IsUnspecified() && wantAny
}

// notify reports the server's state to the service manager, if there is one.
func (s *server) notify(states ...string) {
	if err := systemd.Notify(states...); err != nil {
		s.log.Warn("the service manager could not be told", "err", err)
	}
}
