package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A runner is the command run: an mtlsserver that follows the configuration in the store.
type runner struct {
	*command
	dir, host, advertise, id, outage string
	capacity                         int
	exact                            bool
	lame                             time.Duration

	log    *slog.Logger
	store  *cluster.Store
	policy cluster.Outage
	watch  atomic.Pointer[cluster.Watch]  // nil until the first configuration is in force
	member atomic.Pointer[cluster.Member] // nil until the proxy has joined

	mu      sync.Mutex // held while a configuration is applied
	server  *mtlsserver.Server
	running cluster.Config
	sharing int // the number of proxies that share each upstream's maxConns
}

func newRunner(c *command, flags *flag.FlagSet) *runner {
	r := &runner{command: c}
	flags.StringVar(&r.dir, "dir", "", "")
	flags.StringVar(&r.host, "host", "", "")
	flags.StringVar(&r.advertise, "advertise", "", "")
	flags.StringVar(&r.id, "id", "", "")
	flags.StringVar(&r.outage, "outage", "share", "")
	flags.IntVar(&r.capacity, "capacity", 0, "")
	flags.BoolVar(&r.exact, "exact", false, "")
	flags.DurationVar(&c.timeout, "timeout", 0, "")
	flags.DurationVar(&r.lame, "lame", 3*time.Second, "")
	return r
}

// check checks the flags and sets r.policy.
func (r *runner) check() error {
	if r.dir == "" {
		return errors.New("-dir is missing: name the folder of certificates and keys")
	}
	switch r.outage {
	case "share":
	case "open":
		r.policy = cluster.Open
	case "closed":
		r.policy = cluster.Closed
	default:
		return fmt.Errorf("-outage %q: want share, open or closed", r.outage)
	}
	if _, _, err := net.SplitHostPort(r.host); err == nil {
		return fmt.Errorf("-host %q: want an address or a name, without a port: "+
			"the configuration has the ports", r.host)
	}
	return nil
}

func (r *runner) run(ctx context.Context, s *cluster.Store) (err error) {
	r.store = s
	if r.log, err = r.logger(); err != nil {
		return err
	}
	if ip, err := netip.ParseAddr(r.host); r.advertise == "" &&
		(err != nil || !ip.IsUnspecified()) {
		r.advertise = r.host
	}
	r.sharing = 1
	if t, err := s.Live(ctx); err == nil {
		r.sharing += len(t.Proxies)
	}
	file := filepath.Join(r.dir, "config.last-good.json")
	watch, err := s.Watch(ctx, cluster.Watcher{File: file, Apply: r.apply})
	if err != nil {
		return err
	}
	defer watch.Stop()
	defer r.server.Close()
	r.watch.Store(watch)
	member, err := s.Join(cluster.Self{
		ID: cmp.Or(r.id, hostID()), Addr: r.advertise, Capacity: r.capacity, Version: version(),
		Ports: r.ports, Apps: r.apps, Config: watch.Running,
	})
	if err != nil {
		return err
	}
	defer member.Leave()
	r.member.Store(member)
	fmt.Fprintf(r.stdout, "proxy %s:\n", member.Place().ID)
	for app, addr := range r.server.Addrs() {
		fmt.Fprintf(r.stdout, "app %q listens on %v\n", app, addr)
	}
	return r.serve(ctx, member)
}

// serve serves until a signal starts a drain. A second signal ends it at once.
func (r *runner) serve(ctx context.Context, member *cluster.Member) error {
	ctx, drain := context.WithCancel(ctx)
	defer drain()
	done := make(chan error, 1)
	go func() { done <- r.server.Run(ctx) }()
	every := time.NewTicker(time.Second)
	defer every.Stop()
	var lame <-chan time.Time
	signals := 0
	for {
		select {
		case err := <-done:
			if err != nil {
				r.log.Warn("stopped", "err", err)
				return errReset{err}
			}
			r.log.Info("stopped")
			return nil
		case <-every.C:
			if n := member.Place().Count; n > 0 && signals == 0 {
				r.rescale(n)
			}
		case <-lame:
			drain()
		case sig := <-r.signals:
			switch signals++; signals {
			case 1:
				r.log.Info("draining", "signal", sig.String(), "accepting for", r.lame)
				member.Drain()
				lame = time.After(r.lame)
			default:
				r.log.Info("closing", "signal", sig.String())
				r.server.Close()
			}
		}
	}
}

// apply implements cluster.Watcher.Apply.
func (r *runner) apply(c cluster.Config) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.load(c); err != nil {
		return err
	}
	r.running = c
	return nil
}

// rescale divides each upstream's maxConns between n proxies.
func (r *runner) rescale(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n == r.sharing {
		return
	}
	was := r.sharing
	r.sharing = n
	if err := r.load(r.running); err != nil {
		r.sharing = was
		r.log.Error("the configuration in force no longer loads: maxConns stay as they are",
			"problem", err)
	}
}

// load makes c the server's configuration. The caller holds mu.
func (r *runner) load(c cluster.Config) error {
	conf, err := mtlsserver.Parse(fmt.Sprintf("configuration %d", c.Version), r.dir, c.Text)
	if err != nil {
		return err
	}
	adapt(conf, r.host, r.sharing)
	if r.server == nil {
		r.server, err = mtlsserver.New(conf, &mtlsserver.Options{
			Logger: r.log, NewLimit: r.limit, Sections: r.sections,
		})
		return err
	}
	_, err = r.server.Reload(conf)
	return err
}

// adapt turns a configuration for all proxies into one for a single proxy of n.
func adapt(conf *mtlsserver.Config, host string, n int) {
	for i := range conf.Apps {
		app := &conf.Apps[i]
		if _, port, err := net.SplitHostPort(app.Listen); err == nil && host != "" {
			app.Listen = net.JoinHostPort(host, port)
		}
		for i := range app.Upstreams { // the bound protects the upstream from all proxies together
			if u := &app.Upstreams[i]; u.MaxConns > 0 {
				u.MaxConns = max(u.MaxConns/n, 1)
			}
		}
	}
}

// limit implements mtlsserver.Options.NewLimit.
func (r *runner) limit(user, app string, l mtlsserver.Limit) lbproxy.RateLimitManager {
	return r.store.Limit(strconv.Quote(user)+" "+strconv.Quote(app), cluster.Limit{
		Burst: l.Burst, Every: l.Every, Open: l.Open, BytesPerSecond: l.BytesPerSecond,
		Exact: r.exact, Outage: r.policy,
	})
}

func (r *runner) ports() map[string]int {
	ports := map[string]int{}
	for app, addr := range r.server.Addrs() {
		if tcp, ok := addr.(*net.TCPAddr); ok {
			ports[app] = tcp.Port
		}
	}
	return ports
}

func (r *runner) apps() map[string]*lbproxy.LBProxyApp { return r.server.Apps() }

// hostID returns an ID made from the host's name and random letters, because a host may run several
// proxies.
func hostID() string {
	name, _ := os.Hostname()
	name, _, _ = strings.Cut(strings.ToLower(name), ".")
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, name)
	return strings.Trim(name[:min(len(name), 50)]+"-"+strings.ToLower(rand.Text()[:5]), "-")
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return ""
}
