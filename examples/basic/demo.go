package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/danielepagano/lbproxy"
)

// demo tells a story on out: three servers, an app in front of them, clients that come and go. The
// output is always the same, because ties go to the first upstream and because each step ends
// before the next one begins.
func demo(out io.Writer, log *slog.Logger) error {
	var servers []*server
	var upstreams []lbproxy.Upstream
	for _, name := range []string{"red", "green", "blue"} {
		server, err := startServer(name)
		if err != nil {
			return err
		}
		defer server.stop()
		servers = append(servers, server)
		upstreams = append(upstreams, lbproxy.Upstream{Addr: server.addr()})
	}
	green := servers[1]

	results := make(chan lbproxy.Result, 100) // room for every client: OnDone never waits
	app, err := lbproxy.New("demo", upstreams, &lbproxy.Options{
		Logger: log,
		OnDone: func(r lbproxy.Result) { results <- r },
	})
	if err != nil {
		return err
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	defer app.Close()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving.Go(func() { app.Serve(front, nil) })
	side, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving.Go(func() { app.Serve(side, limits{rate: 0.001, burst: 2}.admit()) })

	s := story{out: out, results: results, clients: map[string]net.Conn{}}
	defer s.abandon()

	s.say("Three servers, red, green and blue, behind one lbproxy app, over real TCP.")

	s.say("\nThree clients come one at a time, each when the one before has left.")
	s.say("Among servers with equally few connections, the first one is chosen:")
	s.visit(front, "amy", "ben", "cho")

	s.say("\nSix clients come and stay. Each gets the server with the fewest connections.")
	s.come(front, "ann", "bob", "cat")
	s.come(front, "dan", "eve", "fay")

	s.say("\nBob and eve leave. The next two take their places, not the next in turn.")
	s.leave("bob", "eve")
	s.come(front, "gil", "hal")

	s.say("\nEveryone leaves, and green is stopped. The next clients do not notice.")
	s.leave("ann", "cat", "dan", "fay", "gil", "hal")
	green.stop()
	s.come(front, "ida", "jon", "kim")
	r := s.leave("ida", "jon", "kim")
	s.say("  Jon took %d dials: green did not answer, so blue was tried.", r["jon"].Attempts)

	s.say("\nA second listener allows each address two connections at once. Three come.")
	s.come(side, "lou", "mia", "ned")
	s.leave("lou", "mia")

	s.say("\nEveryone is gone. These are the app's counts:")
	stats := app.Stats()
	s.table(stats.Upstreams, servers)
	s.say("  %d connections accepted, %d refused, %d failed: green's end cost no client.",
		stats.Accepted, stats.Refused, stats.Failed)
	return s.err
}

// A story is a demo in progress. Its first error is kept, and nothing happens after it.
type story struct {
	out     io.Writer
	results <-chan lbproxy.Result
	clients map[string]net.Conn // connected clients, by name
	err     error
}

// patience is longer than any step takes. As a deadline it makes the demo fail instead of hang.
const patience = 5 * time.Second

func (s *story) say(format string, args ...any) {
	if s.err == nil {
		_, s.err = fmt.Fprintf(s.out, format+"\n", args...)
	}
}

// come connects clients, one after the other, and prints which server each one gets.
func (s *story) come(l net.Listener, names ...string) {
	var served []string
	for _, name := range names {
		if s.err == nil {
			served = append(served, name+" -> "+s.connect(l, name))
		}
	}
	s.say("  %s", strings.Join(served, ", "))
}

// visit connects clients like come, but each client leaves before the next one comes.
func (s *story) visit(l net.Listener, names ...string) {
	var served []string
	for _, name := range names {
		if s.err == nil {
			served = append(served, name+" -> "+s.connect(l, name))
			s.leave(name)
		}
	}
	s.say("  %s", strings.Join(served, ", "))
}

// connect returns the name of the server that answers a client, or the reason why none does.
func (s *story) connect(l net.Listener, name string) string {
	c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
	if err == nil {
		var server string
		if server, err = ask(c, name); err == nil {
			s.clients[name] = c
			return server
		}
		c.Close()
	}
	// A refused client only sees that the connection breaks. The app knows the reason.
	return fmt.Sprintf("nobody (%s)", s.result().End)
}

func ask(c net.Conn, name string) (server string, err error) {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, name); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// leave disconnects clients and returns the results of their connections.
func (s *story) leave(names ...string) map[string]lbproxy.Result {
	results := map[string]lbproxy.Result{}
	for _, name := range names {
		c := s.clients[name]
		if c == nil && s.err == nil {
			s.err = fmt.Errorf("%s should have been served", name)
		}
		if s.err == nil {
			c.Close()
			delete(s.clients, name)
			results[name] = s.result()
		}
	}
	return results
}

// result waits until the app no longer counts a connection. Otherwise chance would decide whether a
// client that has just left still counts.
func (s *story) result() lbproxy.Result {
	select {
	case r := <-s.results:
		return r
	case <-time.After(patience):
		s.err = errors.New("a connection does not end")
		return lbproxy.Result{}
	}
}

// abandon closes the clients that are still connected after a failure.
func (s *story) abandon() {
	for _, c := range s.clients {
		c.Close()
	}
}

func (s *story) table(upstreams []lbproxy.UpstreamStats, servers []*server) {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	fmt.Fprint(t, "  UPSTREAM\tSTATE\tOPEN\tTOTAL\tFAILED\tSENT\tRECEIVED")
	for i, u := range upstreams { // in the order they were given to New
		fmt.Fprintf(t, "\n  %s\t%s\t%d\t%d\t%d\t%d B\t%d B",
			servers[i].name, u.State, u.Open, u.Total, u.Failed, u.Sent, u.Received)
	}
	t.Flush()
	s.say("%s", &b)
}

// A server answers each line with its name.
type server struct {
	name     string
	listener net.Listener
	running  sync.WaitGroup
}

func startServer(name string) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &server{name: name, listener: l}
	s.running.Go(s.run)
	return s, nil
}

func (s *server) addr() string { return s.listener.Addr().String() }

// stop waits for the server's clients to leave.
func (s *server) stop() {
	s.listener.Close()
	s.running.Wait()
}

func (s *server) run() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.running.Go(func() { s.answer(c) })
	}
}

func (s *server) answer(c net.Conn) {
	defer c.Close()
	for lines := bufio.NewScanner(c); lines.Scan(); {
		fmt.Fprintln(c, s.name)
	}
}
