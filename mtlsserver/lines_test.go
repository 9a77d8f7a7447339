package mtlsserver

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

// reasons are the words that a line may have.
var reasons = append([]Reason{
	Reason(lbproxy.EndDone), Reason(lbproxy.EndRateLimited), Reason(lbproxy.EndNoUpstream),
	Reason(lbproxy.EndDialFailed), Reason(lbproxy.EndClientError), Reason(lbproxy.EndClientClosed),
	Reason(lbproxy.EndUpstreamError), Reason(lbproxy.EndIdleTimeout), Reason(lbproxy.EndCanceled),
	Reason(lbproxy.EndClosed),
}, allReasons...)

// A reason missing in allReasons would have no metric before its first refusal.
func TestAllReasonsAreMetricsFromTheStart(t *testing.T) {
	source, err := os.ReadFile("identity.go")
	must(t, err)
	l := newLab(t, withAdmin(t))
	_, metrics := l.ask(t, "GET", "/metrics")
	declared := regexp.MustCompile(` Reason += "(.+)"`).FindAllStringSubmatch(string(source), -1)
	for _, match := range declared {
		want := fmt.Sprintf("mtlsserver_refused_total{reason=%q} 0\n", match[1])
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if len(declared) == 0 || len(declared) != len(allReasons) {
		t.Errorf("%d reasons are declared, %d in allReasons", len(declared), len(allReasons))
	}
	if _, page := l.ask(t, "GET", "/"); strings.Contains(page, "Refused clients") {
		t.Error("the page has refused clients, and there are none")
	}
}

// Clients of all kinds connect while reloads replace apps and users, and at last the server is
// closed. Each connection has one line with a known reason, and no goroutine or descriptor leaks.
func TestEveryConnectionHasExactlyOneLine(t *testing.T) {
	l := newLab(t, func(l *lab) {
		// all may wait: none is reset while it dials
		l.config.Handshake = Handshake{Timeout: time.Second, MaxConcurrent: 50, MaxPerAddress: 40}
	})
	stranger := newAuthority(t, "stranger").issue(t, leafOf(0xa11ce))
	kinds := []func(net.Conn){
		func(c net.Conn) { echoed(c) }, // no TLS
		func(c net.Conn) { c.Close() },
		func(c net.Conn) { c.(*net.TCPConn).SetLinger(0) },
		func(c net.Conn) { io.Copy(io.Discard, c) }, // silent
		func(c net.Conn) { greeted(tls.Client(c, l.clientConfig(nil)), "web") },
		func(c net.Conn) { greeted(tls.Client(c, l.clientConfig(&stranger)), "web") },
		func(c net.Conn) { greeted(tls.Client(c, l.clientConfig(&l.alice)), "web") },
		// until it is cut
		func(c net.Conn) { io.Copy(io.Discard, tls.Client(c, l.clientConfig(&l.alice))) },
		func(c net.Conn) { ended2(tls.Client(c, l.clientConfig(&l.alice))) },
	}
	addr := l.addr("web")
	conns := map[string]int{} // by the client's address: the system may give a port twice
	var clients sync.WaitGroup
	for i := range 20 * len(kinds) {
		c, err := net.Dial("tcp", addr)
		must(t, err)
		conns[c.LocalAddr().String()]++
		clients.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			kinds[i%len(kinds)](c)
		})
		if i%6 == 5 {
			l.reload(t, l.with(func(c *Config) {
				c.Apps[0].IdleTimeout = time.Duration(1+i%4) * time.Minute
				if i%5 == 4 {
					c.Users = nil
				}
			}))
		}
	}
	// Connections are accepted in order: when this one was served, all earlier ones were accepted.
	// A replaced app has admitted its connections when its Serve returns.
	l.reload(t, l.with(func(*Config) {}))
	last, err := net.Dial("tcp", addr)
	must(t, err)
	defer last.Close()
	must(t, greeted(tls.Client(last, l.clientConfig(&l.alice)), "web"))
	stacks := make([]byte, 8<<20)
	for bytes.Count(stacks[:runtime.Stack(stacks, true)],
		[]byte(".(*LBProxyApp).Serve(")) > len(l.server.Addrs()) {
		time.Sleep(time.Millisecond)
	}
	l.server.Close()
	clients.Wait()
	lines := map[string]int{}
	for _, e := range l.log.all() {
		if e["msg"] == "connection" {
			lines[e["client"]]++
		}
		if e["msg"] == "connection" && !slices.Contains(reasons, Reason(e["reason"])) {
			t.Errorf("line %v: its reason is not of the set", e)
		}
	}
	for addr, n := range conns {
		if lines[addr] != n {
			t.Errorf("%s has %d lines for %d connections", addr, lines[addr], n)
		}
	}
}

// A hook that calls runtime.Goexit must not make its handshake look complete.
func TestHandshakeThatDoesNotReturnIsRefused(t *testing.T) {
	l := newLab(t, withSpend)
	snap := *l.server.current.Load()
	users, first := snap.auth.Users, true
	snap.auth.Users = lookup(func(c Claim) (*User, bool) {
		if first { // in the handshake, before the client has proved anything
			first = false
			runtime.Goexit()
		}
		return users.Lookup(c)
	})
	l.server.current.Store(&snap)
	c := l.dial(t, "web", &l.alice)
	if err := greeted(c, "web"); err == nil {
		t.Error("it is in")
	}
	c.Close()
	if e := l.log.of(t, c.LocalAddr()); e["reason"] != string(HandshakeFailed) || e["user"] != "" {
		t.Errorf("line %v, want %s, and nobody's name", e, HandshakeFailed)
	}
	if l.web.dialled.Load() > 0 || !l.untouched(t) {
		t.Error("an upstream was dialed, or a limit charged")
	}
}
