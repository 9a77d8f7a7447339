package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster"
)

// A proxy is an app that is a member of the cluster.
type proxy struct {
	id       string
	store    *cluster.Store
	watch    *cluster.Watch
	member   *cluster.Member
	app      *lbproxy.LBProxyApp
	listener net.Listener
	serving  sync.WaitGroup
	once     sync.Once
}

func startProxy(ctx context.Context, id, storeURL string, log *slog.Logger,
	sabotage string) (*proxy, error) {
	p := &proxy{id: id}
	var err error
	if p.listener, err = lbproxy.Listen("127.0.0.1:0"); err != nil {
		return nil, err
	}
	p.store, err = cluster.Dial(storeURL, &cluster.Options{Timeout: patience, Logger: log})
	if err != nil {
		return nil, err
	}
	p.watch, err = p.store.Watch(ctx, cluster.Watcher{Apply: func(c cluster.Config) error {
		if sabotage == "config" && p.app != nil { // ignore all but the first configuration
			return nil
		}
		return p.apply(c, log)
	}})
	if err != nil {
		return nil, err
	}
	port := p.listener.Addr().(*net.TCPAddr).Port
	p.member, err = p.store.Join(cluster.Self{
		ID: id, Addr: "127.0.0.1", Config: p.watch.Running,
		Ports: func() map[string]int { return map[string]int{"demo": port} },
		Apps: func() map[string]*lbproxy.LBProxyApp {
			return map[string]*lbproxy.LBProxyApp{"demo": p.app}
		},
	})
	if err != nil {
		return nil, err
	}
	scope := "" // both proxies share alice's limit
	if sabotage == "limit" {
		scope = id
	}
	alice := p.store.Limit(scope+"alice", cluster.Limit{Burst: 6, Every: time.Hour})
	p.serving.Go(func() {
		p.app.Serve(p.listener, func(_ context.Context, c *lbproxy.Conn) (err error) {
			c.Client.SetReadDeadline(time.Now().Add(patience))
			c.ClientID, err = readLine(c.Client)
			c.Client.SetReadDeadline(time.Time{})
			if c.ClientID == "alice" {
				c.RateLimit = alice
			}
			return err
		})
	})
	return p, nil
}

// apply makes the lines of a configuration the upstreams.
func (p *proxy) apply(c cluster.Config, log *slog.Logger) (err error) {
	var upstreams []lbproxy.Upstream
	for addr := range strings.Lines(string(c.Text)) {
		upstreams = append(upstreams, lbproxy.Upstream{Addr: strings.TrimSpace(addr)})
	}
	if p.app == nil {
		p.app, err = lbproxy.New("demo", upstreams, &lbproxy.Options{Logger: log})
		return err
	}
	return p.app.SetUpstreams(upstreams)
}

// kill ends p as kill -9 would: its connections break, and it does not leave the cluster.
func (p *proxy) kill() {
	p.once.Do(func() {
		p.store.Close()
		p.watch.Stop()
		p.member.Leave()
		p.listener.Close()
		p.app.Close()
		p.serving.Wait()
	})
}

// enter connects a client and returns the name of the server that greets it.
func (p *proxy) enter(client string) (net.Conn, string, error) {
	c, err := net.DialTimeout("tcp", p.listener.Addr().String(), patience)
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintln(c, client)
	server, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		c.Close()
		return nil, "", err
	}
	return c, strings.TrimSpace(server), nil
}

// visit is enter for a client that leaves at once.
func (p *proxy) visit(client string) (server string, err error) {
	c, server, err := p.enter(client)
	if err == nil {
		c.Close()
	}
	return server, err
}

// readLine reads a line from c, and no byte more.
func readLine(c net.Conn) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < 100; {
		if _, err := io.ReadFull(c, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("the line is too long")
}

func expectEnd(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		return errors.New("there is more to read")
	} else if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return err
	}
	return nil
}

// greet runs a server that sends each client its name and holds the connection.
func greet(l net.Listener, name string) (stop func()) {
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				fmt.Fprintln(c, name)
				io.Copy(io.Discard, c)
			})
		}
	})
	return func() {
		l.Close()
		all.Wait()
	}
}
