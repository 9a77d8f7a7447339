package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A putter is the command put.
type putter struct {
	*command
	from      int64 // negative: the version in force
	dir       string
	unchecked bool
}

func (p *putter) put(ctx context.Context, s *cluster.Store, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	now, err := s.Config(ctx) // before the check, so that a change during it is a conflict
	if err != nil {
		return err
	}
	from := now.Version
	if p.from >= 0 {
		from = p.from
	}
	if !p.unchecked {
		dir := p.dir
		if dir == "" {
			dir = filepath.Dir(path)
		}
		if _, err := mtlsserver.Parse(path, dir, text); err != nil {
			return fmt.Errorf("nothing was put:\n%w", err)
		}
	}
	version, err := s.Put(ctx, from, text, whoAmI())
	if errors.Is(err, cluster.ErrConflict) {
		return fmt.Errorf("%w: lbcluster get shows it", err)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "version %d\n", version)
	return nil
}

func whoAmI() string {
	host, _ := os.Hostname()
	if u, err := user.Current(); err == nil {
		return u.Username + "@" + host
	}
	return host
}

func (c *command) get(ctx context.Context, s *cluster.Store) error {
	conf, err := s.Config(ctx)
	if err == nil && conf.Version == 0 {
		err = errors.New("there is no configuration: lbcluster put puts one")
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stderr, "version %d, put by %s at %s\n", conf.Version, conf.By,
		conf.At.Format("2006-01-02 15:04:05"))
	_, err = c.stdout.Write(conf.Text)
	return err
}
