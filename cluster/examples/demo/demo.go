package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/cluster/gateway"
)

// patience is longer than any step should take: the demo fails rather than hangs.
const patience = 6 * time.Second

// demo tells the story on out. The first claim that does not hold ends it.
func demo(ctx context.Context, out io.Writer, log *slog.Logger, sabotage string) error {
	s := &story{ctx: ctx, out: out, log: log, sabotage: sabotage}
	defer s.end()
	for _, part := range []func() error{s.begin, s.limit, s.kill, s.config} {
		if err := part(); err != nil {
			return err
		}
	}
	s.say("\nThat was all. docs/cluster.md says what else there is, and what happens when")
	s.say("the store is away.")
	return nil
}

// A story is a demo in progress.
type story struct {
	ctx      context.Context
	out      io.Writer
	log      *slog.Logger
	sabotage string

	storeURL string
	store    *cluster.Store // the operator's
	servers  map[string]string
	proxies  []*proxy
	lookup   func(context.Context) ([]*net.SRV, error)
	ends     []func() // in reverse
}

func (s *story) later(f func()) { s.ends = append(s.ends, f) }

func (s *story) end() {
	for i := len(s.ends) - 1; i >= 0; i-- {
		s.ends[i]()
	}
}

func (s *story) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// begin starts everything.
func (s *story) begin() error {
	memory, err := miniredis.Run()
	if err != nil {
		return err
	}
	s.later(memory.Close)
	s.storeURL = "redis://" + memory.Addr()
	if s.store, err = cluster.Dial(s.storeURL, &cluster.Options{Logger: s.log}); err != nil {
		return err
	}
	s.later(func() { s.store.Close() })
	s.servers = map[string]string{}
	for _, name := range []string{"red", "green", "blue"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s.later(greet(l, name))
		s.servers[name] = l.Addr().String()
	}
	if err := s.put("red", "green"); err != nil {
		return err
	}
	for _, id := range []string{"east", "west"} {
		p, err := startProxy(s.ctx, id, s.storeURL, s.log, s.sabotage)
		if err != nil {
			return err
		}
		s.later(p.kill)
		s.proxies = append(s.proxies, p)
	}
	if err := s.openGateway(); err != nil {
		return err
	}
	s.say("A store in memory, three servers (red, green and blue), two proxies (east and")
	s.say("west), and a gateway that names the proxies in DNS. The configuration, which is")
	s.say("in the store, has red and green.")
	return s.await("the gateway names both proxies", func() string {
		return differ(s.named(), "east west")
	})
}

// limit shows that one limit holds over both proxies.
func (s *story) limit() error {
	s.say("\nAlice may open 6 connections. She tries twenty times, by east and west in turn.")
	in := map[string]int{}
	for i := range 20 {
		p := s.proxies[i%2]
		if _, err := p.visit("alice"); err == nil {
			in[p.id]++
		}
	}
	// A proxy returns borrowed, unused tokens within a fifth of a second.
	err := s.await("one limit holds across both proxies", func() string {
		for _, p := range s.proxies {
			if _, err := p.visit("alice"); err == nil {
				in[p.id]++
			}
		}
		return differ(fmt.Sprint(in["east"]+in["west"]), "6")
	})
	s.say("  She gets in %d times by east and %d times by west.", in["east"], in["west"])
	return err
}

// kill shows that clients of a dead proxy find the other by the gateway.
func (s *story) kill() error {
	s.say("\nBob asks the gateway for a proxy, and is connected.")
	c, p, err := s.arrive("bob")
	if err != nil {
		return fmt.Errorf("claim: a client finds a proxy by the gateway: %w", err)
	}
	defer c.Close()
	s.say("  He comes in by one of the two. It is killed, without a word to the store.")
	p.kill()
	began := time.Now()
	if err := expectEnd(c); err != nil {
		return fmt.Errorf("claim: bob's connection ends with its proxy: %w", err)
	}
	other := "east"
	if p.id == "east" {
		other = "west"
	}
	if err := s.await("the gateway names the dead proxy no more", func() string {
		return differ(s.named(), other)
	}); err != nil {
		return err
	}
	again, q, err := s.arrive("bob")
	if err == nil {
		again.Close()
		if q.id != other {
			err = fmt.Errorf("he came to %s", q.id)
		}
	}
	if err != nil {
		return fmt.Errorf("claim: bob comes back by the other proxy: %w", err)
	}
	s.say("  After %.1f s the gateway names only the other one, and bob comes back by that.",
		time.Since(began).Seconds())
	if p, err = startProxy(s.ctx, p.id, s.storeURL, s.log, s.sabotage); err != nil {
		return err
	}
	s.later(p.kill)
	for i := range s.proxies {
		if s.proxies[i].id == p.id {
			s.proxies[i] = p
		}
	}
	return s.await("a proxy that is started again is named again",
		func() string { return differ(s.named(), "east west") })
}

// config shows that both proxies follow the store.
func (s *story) config() error {
	s.say("\nThe operator puts another configuration into the store: blue alone.")
	if err := s.put("blue"); err != nil {
		return err
	}
	err := s.await("both proxies follow the configuration in the store", func() string {
		for _, p := range s.proxies {
			if name, err := p.visit("carol"); err != nil || name != "blue" {
				return fmt.Sprintf("%s sends carol to %s", p.id,
					cmp.Or(name, fmt.Sprint("nobody: ", err)))
			}
		}
		return ""
	})
	if err != nil {
		return err
	}
	s.say("  Both proxies send everybody to blue.")
	if _, err := s.store.Put(s.ctx, 1, nil, "somebody else"); err == nil {
		return fmt.Errorf("claim: nobody can replace version 2 unseen: it was replaced")
	}
	s.say("  Somebody who has seen only the first one wants to replace it, and is refused.")
	return nil
}

// await waits until a claim holds. check returns how it does not hold, or an empty text.
func (s *story) await(claim string, check func() string) error {
	end := time.Now().Add(patience)
	for {
		wrong := check()
		switch {
		case wrong == "":
			return nil
		case s.ctx.Err() != nil:
			return s.ctx.Err()
		case time.Now().After(end):
			return fmt.Errorf("claim: %s\n  That is not so: %s", claim, wrong)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func differ(got, want string) string {
	if got == want {
		return ""
	}
	return fmt.Sprintf("it is %q and should be %q", got, want)
}

// put puts a configuration with these servers.
func (s *story) put(names ...string) error {
	c, err := s.store.Config(s.ctx)
	if err == nil {
		var addrs []string
		for _, name := range names {
			addrs = append(addrs, s.servers[name])
		}
		_, err = s.store.Put(s.ctx, c.Version, []byte(strings.Join(addrs, "\n")), "the operator")
	}
	return err
}

// openGateway starts a DNS server, and a resolver that asks it.
func (s *story) openGateway() error {
	var source gateway.Source = s.store
	if s.sabotage == "kill" { // the gateway never notices a dead proxy
		source = &frozen{source: s.store}
	}
	zone := &gateway.Zone{Name: "lb.test", NS: []string{"ns.lb.test=127.0.0.1"}}
	d, err := gateway.Listen("127.0.0.1:0", zone, source, s.log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { d.Serve(ctx) })
	s.later(func() { cancel(); serving.Wait() })
	toGateway := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, d.Addr())
	}
	r := net.Resolver{PreferGo: true, Dial: toGateway}
	s.lookup = func(ctx context.Context) ([]*net.SRV, error) {
		_, srvs, err := r.LookupSRV(ctx, "demo", "tcp", "lb.test")
		return srvs, err
	}
	return nil
}

// frozen repeats the last state that had two proxies.
type frozen struct {
	source gateway.Source
	last   cluster.Tally
}

func (f *frozen) Live(ctx context.Context) (t cluster.Tally, err error) {
	if len(f.last.Proxies) < 2 {
		f.last, err = f.source.Live(ctx)
	}
	return f.last, err
}

// named returns the proxies that the gateway names, in order.
func (s *story) named() string {
	srvs, _ := s.lookup(s.ctx)
	var ids []string
	for _, p := range s.proxies {
		for _, srv := range srvs {
			if id, _, _ := strings.Cut(srv.Target, "."); id == p.id {
				ids = append(ids, id)
			}
		}
	}
	return strings.Join(ids, " ")
}

// arrive connects a client by the gateway's first answer.
func (s *story) arrive(client string) (net.Conn, *proxy, error) {
	srvs, err := s.lookup(s.ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range s.proxies {
		if id, _, _ := strings.Cut(srvs[0].Target, "."); id == p.id {
			c, _, err := p.enter(client)
			return c, p, err
		}
	}
	return nil, nil, fmt.Errorf("the gateway names %s", srvs[0].Target)
}
