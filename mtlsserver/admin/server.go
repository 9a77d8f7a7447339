package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/connlimit"
)

// Listen says where a [Server] listens.
type Listen struct {
	// Addr is an IP address or localhost, and a port, such as "127.0.0.1:9090". Empty means none.
	Addr string

	// Anywhere allows an Addr that is not loopback. Other machines may then read /healthz, /readyz
	// and /metrics, and nothing else. Prometheus must scrape by IP address, or Options.Hosts must
	// have the name.
	Anywhere bool

	// Socket is the path of a Unix socket, whose clients may make changes. Empty means none.
	Socket string
}

// A Server answers admin requests. Slow or many clients delay only each other: requests have
// timeouts, and each listener has at most 64 open connections.
type Server struct {
	http  http.Server
	addr  net.Addr
	inode fs.FileInfo // of the socket
	path  string
	done  sync.WaitGroup
}

// Serve listens and serves h, which [Handler] made, until Close. If it cannot listen, it serves
// nothing, and the error is a [*ListenError]. With the zero Listen it listens nowhere.
func Serve(at Listen, h http.Handler) (*Server, error) {
	if errs := at.Check(); len(errs) > 0 {
		return nil, errs[0]
	}
	s := &Server{path: at.Socket}
	s.http = http.Server{
		Handler:        s.restrict(h),
		ReadTimeout:    5 * time.Second,
		WriteTimeout:   time.Minute, // a reload may be slow
		IdleTimeout:    30 * time.Second,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       log.New(io.Discard, "", 0), // errors of clients; the answers report them
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if socket, ok := c.(*connlimit.Conn).Conn.(*net.UnixConn); ok {
				return context.WithValue(ctx, socketKey{}, "unix socket"+peerOf(socket))
			}
			return ctx
		},
	}
	var listeners []net.Listener
	if at.Addr != "" {
		l, err := net.Listen("tcp", at.Addr)
		if err != nil {
			err = fmt.Errorf("%w: change it, or end the program that uses it", err)
			return nil, &ListenError{"listen", err}
		}
		s.addr = l.Addr()
		listeners = append(listeners, l)
	}
	if at.Socket != "" {
		l, err := s.listenSocket()
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, &ListenError{"socket", err}
		}
		listeners = append(listeners, l)
	}
	for _, l := range listeners {
		s.done.Go(func() { _ = s.http.Serve(connlimit.Listener(l, 64)) })
	}
	return s, nil
}

// Addr returns the TCP address at which s listens, or nil if there is none.
func (s *Server) Addr() net.Addr { return s.addr }

// Close closes the listeners, waits up to a second for requests, and closes the rest. It always
// returns nil.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s.removeSocket()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	s.done.Wait()
	return nil
}

// A ListenError is a problem with a field of a [Listen].
type ListenError struct {
	Field string // "listen" or "socket"
	Err   error
}

// Error returns the field and the problem.
func (e *ListenError) Error() string { return "admin: " + e.Field + ": " + e.Err.Error() }

// Unwrap returns e.Err.
func (e *ListenError) Unwrap() error { return e.Err }

// Check returns the problems of at that it can find without listening.
func (at Listen) Check() (errs []*ListenError) {
	if at.Addr != "" {
		if err := checkAddr(at.Addr, at.Anywhere); err != nil {
			errs = append(errs, &ListenError{"listen", err})
		}
	}
	if at.Socket != "" {
		if err := checkSocket(at.Socket); err != nil {
			errs = append(errs, &ListenError{"socket", err})
		}
	}
	return errs
}

func checkAddr(addr string, anywhere bool) error {
	host, port, err := net.SplitHostPort(addr)
	_, portErr := net.LookupPort("tcp", port)
	ip, ipErr := netip.ParseAddr(host)
	switch {
	case err != nil || portErr != nil || port == "",
		ipErr != nil && host != "" && host != "localhost":
		return fmt.Errorf(`%q: want an IP address or localhost, and a port, such as "127.0.0.1:9090"`,
			addr)
	case !anywhere && host != "localhost" && !ip.IsLoopback():
		return fmt.Errorf("%q: not loopback, so others may see who is connected: use 127.0.0.1, "+
			"or set Listen.Anywhere for health and metrics alone", addr)
	}
	return nil
}

// checkSocket refuses a path where other users could put a socket of their own, or where a file
// exists that is not this user's socket.
func checkSocket(path string) error {
	folder := filepath.Dir(path)
	in, err := os.Stat(folder)
	if err != nil {
		return fmt.Errorf("%q: %w: make the folder", path, errors.Unwrap(err))
	}
	if runtime.GOOS != "windows" && (in.Mode().Perm()&0o022 != 0 || !ownedByUs(in)) {
		return fmt.Errorf("%q: others may write the folder %q, which has mode %#o: "+
			"use one that only this user may write, such as after chmod 700",
			path, folder, in.Mode().Perm())
	}
	there, err := os.Lstat(path)
	switch {
	case len(path) > 100:
		return fmt.Errorf("%q: too long for a socket: use at most 100 bytes", path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("%q: %w: make it possible to look there", path, errors.Unwrap(err))
	case there.Mode().Type() != fs.ModeSocket || !ownedByUs(there):
		return fmt.Errorf("%q: something else is there: remove it, or use another name", path)
	}
	return nil
}

// listenSocket makes the socket, unless another server answers there.
func (s *Server) listenSocket() (net.Listener, error) {
	c, err := net.DialTimeout("unix", s.path, time.Second)
	if err == nil {
		c.Close()
	}
	if err == nil || os.IsTimeout(err) || errors.Is(err, syscall.EAGAIN) { // its queue is full
		return nil, fmt.Errorf("%q: another server answers there: end it, or use another name", s.path)
	}
	l, err := s.makeSocket()
	if err != nil {
		return nil, fmt.Errorf("%w: use a folder where this user may make a socket", err)
	}
	return l, nil
}

// makeSocket binds the socket under a temporary name, sets its mode, and renames it. So nobody can
// connect before the mode is set, and a socket left behind by a crash is replaced.
func (s *Server) makeSocket() (net.Listener, error) {
	draft := s.path + "~"
	os.Remove(draft)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: draft, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(draft, 0o600); err == nil {
		if s.inode, err = os.Lstat(draft); err == nil {
			err = os.Rename(draft, s.path)
		}
	}
	if err != nil {
		l.Close()
		os.Remove(draft)
		return nil, err
	}
	return l, nil
}

// removeSocket removes the socket, unless another server has replaced it.
func (s *Server) removeSocket() {
	if there, err := os.Lstat(s.path); s.inode != nil && err == nil && os.SameFile(there, s.inode) {
		os.Remove(s.path)
	}
}

type socketKey struct{}

// bySocket describes the sender of a request through a Server's Unix socket; empty for other
// requests.
func bySocket(r *http.Request) string {
	who, _ := r.Context().Value(socketKey{}).(string)
	return who
}

// restrict allows other machines to read health and metrics only.
func (s *Server) restrict(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _ := netip.ParseAddrPort(r.RemoteAddr)
		switch r.URL.Path {
		case "/healthz", "/readyz", "/metrics":
		default:
			if bySocket(r) == "" && !from.Addr().Unmap().IsLoopback() {
				text(w, http.StatusForbidden,
					"From other machines only /healthz, /readyz and /metrics can be read.\n")
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}
