// Ratelimit limits clients by their plans. In ten lines it adds a quota of bytes, which lbproxy
// does not have.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A quota is the number of bytes that a client may move in all. It cuts the connection that exceeds
// it and refuses later ones.
type quota struct {
	max  int64
	used atomic.Int64
}

func (q *quota) Report(_ context.Context, e lbproxy.Event) lbproxy.Decision {
	// Only EventData has Bytes.
	return lbproxy.Decision{Exceeded: q.used.Add(e.Bytes) > q.max}
}

// Idle keeps ClientLimits from forgetting a client that has used some of its quota.
func (q *quota) Idle() bool { return q.used.Load() == 0 }

func plan(client string) lbproxy.RateLimitManager {
	if client == "paula" { // a paying client
		return &lbproxy.OpenLimit{Max: 100}
	}
	return lbproxy.All(&lbproxy.TokenBucket{Burst: 3, Every: time.Hour}, &quota{max: 1000})
}

func main() {
	if err := run(os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(out io.Writer) error {
	upstream, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	var echoing sync.WaitGroup
	echoing.Go(func() { echo(upstream) })
	defer echoing.Wait()
	defer upstream.Close()

	app, err := lbproxy.New("echo", []lbproxy.Upstream{{Addr: upstream.Addr().String()}}, nil)
	if err != nil {
		return err
	}
	defer app.Close()
	limits := lbproxy.NewClientLimits(1000, plan)
	for _, visit := range []struct {
		client string
		bytes  int
	}{
		{"fred", 100}, {"fred", 2000}, {"fred", 1}, // more than his quota
		{"fay", 1}, {"fay", 1}, {"fay", 1}, {"fay", 1}, // more than three at once
		{"paula", 2000}, {"paula", 2000}, {"paula", 2000}, {"paula", 2000},
	} {
		client, conn, err := connect()
		if err != nil {
			return err
		}
		client.Write(make([]byte, visit.bytes)) // a failure shows in the outcome
		client.CloseWrite()
		r, _ := app.ServeConn(context.Background(), &lbproxy.Conn{
			Client: conn, ClientID: visit.client, RateLimit: limits.For(visit.client),
		})
		client.Close()
		fmt.Fprintf(out, "%-5s %4d bytes: %s\n", visit.client, visit.bytes, outcome(r))
	}
	return nil
}

func outcome(r lbproxy.Result) string {
	switch {
	case r.End == lbproxy.EndRateLimited && r.Attempts == 0:
		return "refused"
	case r.End == lbproxy.EndRateLimited:
		return "cut"
	}
	return string(r.End)
}

// connect returns both ends of a new connection: the client's, and the one that a server accepts.
func connect() (client *net.TCPConn, conn net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if client, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr)); err != nil {
		return nil, nil, err
	}
	conn, err = l.Accept()
	return client, conn, err
}

// echo sends back the bytes that it receives, from one client after the other.
func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	}
}
