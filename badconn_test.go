package lbproxy

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A badConn panics in one of its methods.
type badConn struct {
	*proxytest.PipeConn
	bad string
}

func (c badConn) call(method string) {
	if method == c.bad {
		panic("boom")
	}
}

func (c badConn) Read(b []byte) (int, error) {
	c.call("Read")
	return c.PipeConn.Read(b)
}

func (c badConn) CloseWrite() error {
	c.call("CloseWrite")
	return c.PipeConn.CloseWrite()
}

func (c badConn) SetDeadline(t time.Time) error {
	c.call("SetDeadline")
	return c.PipeConn.SetDeadline(t)
}

func (c badConn) SetReadDeadline(t time.Time) error {
	c.call("SetReadDeadline")
	return c.PipeConn.SetReadDeadline(t)
}

func (c badConn) Close() error {
	c.PipeConn.Close()
	c.call("Close")
	return nil
}

// A badLayer panics when it is asked for the conn below.
type badLayer struct{ badConn }

func (badLayer) NetConn() net.Conn { panic("boom") }

// TestServeSurvivesConnsThatPanic has a client's conn panic in a method that is called at a certain
// point of its life. The panic is logged, and nothing waits for the connection.
func TestServeSurvivesConnsThatPanic(t *testing.T) {
	for _, tc := range []struct{ method, when string }{
		{"Read", "dialing"},
		{"Close", "admitting"},
		{"Close", "rejected"},
		{"Close", "refused"},
		{"NetConn", "dialing"},
		{"NetConn", "admitting"},
		{"NetConn", "rejected"},
		{"NetConn", "refused"},
		{"SetReadDeadline", "last word"},
		{"SetDeadline", "last word"},
		{"CloseWrite", "last word"},
		{"Close", "last word"},
		{"NetConn", "last word"},
	} {
		t.Run(tc.method+" while "+tc.when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log proxytest.Buffer
				up := Upstream{Addr: "u:1", Drain: tc.when == "refused" || tc.when == "last word"}
				a, results := newAppOver(t, Options{
					Logger: textLogger(&log), MaxConns: 1,
					DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
						<-ctx.Done()
						return nil, ctx.Err()
					},
				}, up)
				client, ours := proxytest.Pipe()
				defer client.Close()
				var bad net.Conn = badConn{ours, tc.method}
				if tc.method == "NetConn" {
					bad = badLayer{badConn{ours, ""}}
				}
				accepted := make(chan net.Conn, 1)
				accepted <- bad
				l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
					select {
					case c := <-accepted:
						return c, nil
					case <-closed:
						return nil, net.ErrClosed
					}
				})
				go a.Serve(l, func(ctx context.Context, c *Conn) error {
					switch tc.when {
					case "admitting":
						<-ctx.Done()
					case "rejected":
						return errKicked
					case "last word":
						c.OnRefused = func(net.Conn, error) {}
					}
					return nil
				})
				synctest.Wait()
				a.Close()
				<-results
				synctest.Wait()
				if s := a.Stats(); s.Open != 0 || len(a.slots) != 0 || len(a.running()) != 0 {
					t.Errorf("%d slots, %d last words, %+v", len(a.slots), len(a.running()), s)
				}
				if !strings.Contains(log.String(), "boom") {
					t.Errorf("the log lacks the panic:\n%s", log.String())
				}
			})
		})
	}
}

// TestServeSurvivesAConnThatPanicsWhenTheAppStops has a listener return a conn after the app has
// been closed. Serve resets it on its own goroutine.
func TestServeSurvivesAConnThatPanicsWhenTheAppStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log proxytest.Buffer
		a, _ := newAppOver(t, Options{Logger: textLogger(&log)}, Upstream{Addr: "u:1"})
		client, ours := proxytest.Pipe()
		defer client.Close()
		l := newScriptedListener(func(closed <-chan struct{}) (net.Conn, error) {
			<-closed
			return badConn{ours, "Close"}, nil
		})
		served := make(chan error, 1)
		go func() { served <- a.Serve(l, nil) }()
		synctest.Wait()
		a.Close()
		if err := <-served; err != ErrAppClosed {
			t.Errorf("Serve: %v", err)
		}
		synctest.Wait()
		if !strings.Contains(log.String(), "boom") {
			t.Errorf("the log lacks the panic:\n%s", log.String())
		}
	})
}
