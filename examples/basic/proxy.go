package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func newApp(conf config, log *slog.Logger) (*lbproxy.LBProxyApp, error) {
	opts := conf.options()
	opts.Logger = log
	if conf.recorder != nil {
		conf.recorder.Record("basic", opts)
	}
	app, err := lbproxy.New("basic", conf.upstreams, opts)
	if err != nil {
		return nil, fmt.Errorf("-upstream: %w", err)
	}
	return app, nil
}

func (c config) options() *lbproxy.Options {
	opts := &lbproxy.Options{
		MaxConns: c.maxConns, DialTimeout: c.dial, FailTimeout: c.fail, IdleTimeout: c.idle,
		Loops: c.loops,
	}
	if c.idle == 0 {
		opts.IdleTimeout = -1 // never; 0 would mean the default
	}
	if c.check > 0 {
		// An upstream is down after two failed checks in a row. Each begins at most half of c.check
		// after the previous one and takes at most as long, so both have failed after twice c.check.
		half := max(c.check/2, 1)
		opts.HealthCheck = &lbproxy.HealthCheck{Interval: half, Timeout: half, Fall: 2}
	}
	return opts
}

// serve serves clients until a signal comes and every connection has ended. A second signal resets
// the open connections, and then serve returns an error.
func serve(
	app *lbproxy.LBProxyApp,
	conf config,
	log *slog.Logger,
	signals <-chan os.Signal,
	stdout io.Writer,
) error {
	l, err := lbproxy.Listen(conf.listen)
	if err != nil {
		return fmt.Errorf("%w: choose another -listen", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "listening on %s, upstreams:\n", l.Addr())
	for _, u := range app.Stats().Upstreams {
		fmt.Fprintf(&b, "  %s, weight %d\n", u.Addr, u.Weight)
	}
	page, err := conf.serveAdmin(app, log)
	if err != nil {
		l.Close()
		return err
	}
	if page != nil {
		defer page.Close() // when the last connection has ended
		fmt.Fprintf(&b, "status page at http://%s/\n", page.Addr())
	}
	io.WriteString(stdout, b.String())

	served := make(chan error, 1)
	go func() { served <- app.Serve(l, conf.limits.admit()) }()
	select {
	case err := <-served: // without a signal: Accept has failed
		app.Close()
		return err
	case <-signals:
	}

	log.Info("draining: interrupt again to break open connections", "open", app.Stats().Open)
	drained := make(chan error, 1)
	go func() { drained <- app.Shutdown(context.Background()) }()
	select {
	case <-drained:
	case <-signals:
		app.Close() // ends Shutdown too
		<-drained
	}
	<-served
	s := app.Stats()
	reset := s.Ends[lbproxy.EndClosed] // by Close
	log.Info("stopped",
		"accepted", s.Accepted, "refused", s.Refused, "failed", s.Failed, "reset", reset)
	if reset > 0 {
		return fmt.Errorf("connections were still open and have been reset: %d", reset)
	}
	return nil
}

// serveAdmin serves the status page of app, if conf has an address for it.
func (c config) serveAdmin(app *lbproxy.LBProxyApp, log *slog.Logger) (*admin.Server, error) {
	if c.admin == "" {
		return nil, nil
	}
	apps := func() []*lbproxy.LBProxyApp { return []*lbproxy.LBProxyApp{app} }
	h := admin.Handler(apps, &admin.Options{Recorder: c.recorder, Logger: log})
	s, err := admin.Serve(admin.Listen{Addr: c.admin}, h)
	if err != nil {
		return nil, fmt.Errorf("%w: choose another -admin", err)
	}
	return s, nil
}

// limits bound each client, by its network. Zero fields set no bound.
type limits struct {
	rate      float64 // connections opened per second
	burst     int     // connections opened at once
	open      int     // connections open at once
	bandwidth int64   // bytes per second, both directions together
}

// maxClients bounds the memory of the limits. Beyond it a new client takes the place of an idle
// one.
const maxClients = 100_000

// admit returns an AdmitFunc that limits each client by l, or nil if there are no limits.
func (l limits) admit() lbproxy.AdmitFunc {
	if l == (limits{}) {
		return nil
	}
	clients := lbproxy.NewClientLimits(maxClients, l.manager)
	return func(_ context.Context, c *lbproxy.Conn) error {
		addr, ok := c.Client.RemoteAddr().(*net.TCPAddr)
		if !ok {
			return fmt.Errorf("client address %v: want TCP", c.Client.RemoteAddr())
		}
		// On a listener for IPv6 and IPv4, 10.0.0.1 may appear as ::ffff:10.0.0.1.
		ip := addr.AddrPort().Addr().Unmap()
		c.ClientID, c.RateLimit = ip.String(), clients.For(network(ip))
		return nil
	}
}

// network returns the network that a client with the address ip may have to itself: a whole /64 of
// IPv6, a single address of IPv4.
func network(ip netip.Addr) string {
	prefix, _ := ip.Prefix(min(ip.BitLen(), 64))
	return prefix.String()
}

// manager returns a manager for the limits of one client.
func (l limits) manager(string) lbproxy.RateLimitManager {
	var managers []lbproxy.RateLimitManager
	if l.rate > 0 {
		every := time.Duration(float64(time.Second) / l.rate)
		managers = append(managers, &lbproxy.TokenBucket{Burst: l.burst, Every: every})
	}
	if l.open > 0 {
		managers = append(managers, &lbproxy.OpenLimit{Max: l.open})
	}
	if l.bandwidth > 0 {
		managers = append(managers, &lbproxy.Bandwidth{BytesPerSecond: l.bandwidth})
	}
	return lbproxy.All(managers...)
}
