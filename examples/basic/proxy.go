package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

func newApp(conf config, log *slog.Logger) (*lbproxy.LBProxyApp, error) {
	opts := &lbproxy.Options{Logger: log, IdleTimeout: conf.idle}
	if conf.idle == 0 {
		opts.IdleTimeout = -1 // never: a zero Option is its default
	}
	app, err := lbproxy.New("basic", conf.upstreams, opts)
	if err != nil {
		return nil, fmt.Errorf("-upstream: %w", err)
	}
	return app, nil
}

// serve serves clients until a signal comes and every connection has ended. A second signal breaks them.
func serve(app *lbproxy.LBProxyApp, conf config, log *slog.Logger, signals <-chan os.Signal, stdout io.Writer) error {
	l, err := lbproxy.Listen(conf.listen)
	if err != nil {
		return fmt.Errorf("%w: choose another -listen", err)
	}
	var upstreams []string
	for _, u := range app.Stats().Upstreams {
		upstreams = append(upstreams, fmt.Sprintf("%s (weight %d)", u.Addr, u.Weight))
	}
	fmt.Fprintf(stdout, "listening on %s, upstreams %s\n", l.Addr(), strings.Join(upstreams, ", "))

	served := make(chan error, 1)
	go func() { served <- app.Serve(l, conf.limits.admit()) }()
	select {
	case err := <-served: // before it was told to: something closed l
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
		app.Close() // which ends the Shutdown, too
		<-drained
	}
	<-served
	s := app.Stats()
	log.Info("stopped", "accepted", s.Accepted, "refused", s.Refused, "failed", s.Failed)
	return nil
}

// limits are what one client address may do. The zero limits are none.
type limits struct {
	rate      float64 // connections opened per second
	burst     int     // connections opened at once
	open      int     // connections open at once
	bandwidth int64   // bytes per second, both directions together
}

// maxClients bounds the memory that limits take. Beyond it a newcomer takes the place of a client that is idle.
const maxClients = 100_000

// admit returns what has Serve hold each client address to l. It is nil if there is nothing to hold it to.
func (l limits) admit() lbproxy.AdmitFunc {
	if l == (limits{}) {
		return nil
	}
	clients := lbproxy.NewClientLimits(maxClients, l.manager)
	return func(_ context.Context, c net.Conn) (context.Context, lbproxy.Conn, error) {
		addr, ok := c.RemoteAddr().(*net.TCPAddr)
		if !ok {
			return nil, lbproxy.Conn{}, fmt.Errorf("client address %v: want TCP", c.RemoteAddr())
		}
		ip := addr.AddrPort().Addr().Unmap().String() // 10.0.0.1 is also ::ffff:10.0.0.1 where we listen on both
		return nil, lbproxy.Conn{Client: c, ClientID: ip, RateLimit: clients.For(ip)}, nil
	}
}

// manager makes what one client is held to.
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
