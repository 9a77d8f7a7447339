package main

import (
	"log/slog"
	"os"
	"path/filepath"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// These stand in for mtlsserver.Parse, Options.NewLimit and Server.Apps.

func parse(name, dir string, text []byte) (*mtlsserver.Config, error) {
	f := filepath.Join(dir, ".parse.json")
	if err := os.WriteFile(f, text, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(f)
	return mtlsserver.Load(f)
}

func newServer(c *mtlsserver.Config, log *slog.Logger, limit func(user, app string, l mtlsserver.Limit) lbproxy.RateLimitManager) (*mtlsserver.Server, error) {
	return mtlsserver.New(c, &mtlsserver.Options{Logger: log})
}

func apps(s *mtlsserver.Server) map[string]*lbproxy.LBProxyApp { return nil }
