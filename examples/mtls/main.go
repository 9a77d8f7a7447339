// Mtls shows a server that identifies users by the serials of their certificates. It prints which
// clients reach which app, and that revoking a user ends the user's open connection.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

func main() {
	if err := run(os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "mtls")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ca, err := newAuthority()
	if err != nil {
		return err
	}
	files, err := ca.writeFiles(dir)
	if err != nil {
		return err
	}
	var upstreams upstreams
	defer upstreams.close()
	config := &mtlsserver.Config{
		TLS: files,
		Apps: []mtlsserver.App{
			{ID: "web", Listen: "127.0.0.1:0", Upstreams: upstreams.add("web-1", "web-2")},
			{ID: "db", Listen: "127.0.0.1:0", Upstreams: upstreams.add("db-1")},
		},
		Users: []mtlsserver.User{
			{
				Name:    "reporting",
				Serials: []mtlsserver.UserSerial{{Serial: "0x4d2"}},
				Apps:    []string{"web"},
			},
			{
				Name:    "alice",
				Serials: []mtlsserver.UserSerial{{Serial: "A1:1C:E0"}},
				Apps:    []string{"web", "db"},
			},
		},
	}
	if upstreams.err != nil {
		return upstreams.err
	}
	reasons := make(reasons, 1)
	server, err := mtlsserver.New(config, &mtlsserver.Options{Logger: slog.New(reasons)})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Run(ctx) }()
	defer func() {
		stop()
		err = cmp.Or(err, <-served)
	}()

	reporting, err := ca.issue(client(0x4d2))
	if err != nil {
		return err
	}
	alice, err := ca.issue(client(0xa11ce0))
	if err != nil {
		return err
	}
	other, err := newAuthority()
	if err != nil {
		return err
	}
	forged, err := other.issue(client(0xa11ce0))
	if err != nil {
		return err
	}

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "client\tapp\tclient sees\tlogged reason\n")
	connect := func(app string, certs ...tls.Certificate) (net.Conn, string) {
		c, greeting, err := dial(server.Addrs()[app], ca, certs)
		if err != nil {
			return nil, outcome(err)
		}
		return c, greeting
	}
	visit := func(who, app string, certs ...tls.Certificate) {
		c, sees := connect(app, certs...)
		if c != nil {
			c.Close()
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", who, app, sees, <-reasons)
	}

	live, sees := connect("web", alice)
	if live == nil {
		return errors.New("alice: " + sees)
	}
	defer live.Close()
	fmt.Fprintf(table, "alice\tweb\t%s\t(nothing yet)\n", sees)
	visit("reporting", "web", reporting)
	visit("reporting", "db", reporting)
	visit("alice's serial, other CA", "web", forged)
	visit("no certificate", "web")

	revoked := *config
	revoked.Users = config.Users[:1]
	if _, err := server.Reload(&revoked); err != nil {
		return err
	}
	_, err = live.Read(make([]byte, 1))
	fmt.Fprintf(table, "alice, now revoked\tweb\t%s\t%s\n", outcome(err), <-reasons)
	visit("alice, once more", "web", alice)
	visit("reporting", "web", reporting)
	return table.Flush()
}

// dial connects to app and returns the connection and the first bytes from it. With TLS 1.3 a
// refused client gets the alert when it reads.
func dial(addr net.Addr, ca *authority, certs []tls.Certificate) (net.Conn, string, error) {
	c, err := tls.Dial("tcp", addr.String(), &tls.Config{RootCAs: ca.pool(), Certificates: certs})
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	greeting := make([]byte, 100)
	n, err := c.Read(greeting)
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimSpace(string(greeting[:n])), nil
}

// outcome describes the end of a connection as its client sees it.
func outcome(err error) string {
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "remote error" {
		// The text is the server's alert.
		return strings.TrimPrefix(op.Err.Error(), "tls: ")
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "nothing for 5s"
	}
	return "the connection ends"
}

// reasons is a slog.Handler that passes on the reason of each connection's end.
type reasons chan string

func (r reasons) Handle(_ context.Context, line slog.Record) error {
	line.Attrs(func(a slog.Attr) bool {
		if a.Key == "reason" {
			r <- a.Value.String()
		}
		return a.Key != "reason"
	})
	return nil
}

func (r reasons) Enabled(context.Context, slog.Level) bool { return true }
func (r reasons) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r reasons) WithGroup(string) slog.Handler            { return r }

// upstreams are servers that send their name and then echo.
type upstreams struct {
	listeners []net.Listener
	running   sync.WaitGroup
	err       error
}

func (u *upstreams) add(names ...string) (started []mtlsserver.Upstream) {
	for _, name := range names {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			u.err = err
			return nil
		}
		u.listeners = append(u.listeners, l)
		u.running.Go(func() { u.serve(l, name) })
		started = append(started, mtlsserver.Upstream{Addr: l.Addr().String()})
	}
	return started
}

func (u *upstreams) serve(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		u.running.Go(func() {
			defer c.Close()
			fmt.Fprintln(c, name, "answers")
			io.Copy(c, c)
		})
	}
}

func (u *upstreams) close() {
	for _, l := range u.listeners {
		l.Close()
	}
	u.running.Wait()
}
