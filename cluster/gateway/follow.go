package gateway

import (
	"context"
	"log/slog"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
)

// pollEvery is the time between reads of the live proxies. A dead proxy counts as live until its
// lease of 3 s expires.
const pollEvery = 500 * time.Millisecond

// A Source returns the live proxies. A [cluster.Store] is one.
type Source interface {
	Live(context.Context) (cluster.Tally, error)
}

// follow calls f with the live proxies twice a second until ctx ends. While source fails, the last
// list stays valid, and the log says so.
func follow(ctx context.Context, source Source, log *slog.Logger, f func(cluster.Tally)) {
	every := time.NewTicker(pollEvery)
	defer every.Stop()
	blind := false
	for {
		t, err := source.Live(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if blind {
				log.Info("gateway: the store is back")
			}
			f(t)
		case !blind:
			log.Warn("gateway: the store is away, names stay as they are", "err", err)
		}
		blind = err != nil
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
	}
}

func orDefault(log *slog.Logger) *slog.Logger {
	if log != nil {
		return log
	}
	return slog.Default()
}
