package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/cluster/gateway"
)

func zoneFlags(flags *flag.FlagSet) *gateway.Zone {
	z := new(gateway.Zone)
	flags.StringVar(&z.Name, "zone", "", "")
	flags.Var((*list)(&z.NS), "ns", "")
	flags.DurationVar(&z.TTL, "ttl", time.Second, "")
	return z
}

// zone is the command of that name.
func (c *command) zone(flags *flag.FlagSet) (
	check func() error, do func(context.Context, *cluster.Store) error,
) {
	f := gateway.File{Zone: zoneFlags(flags)}
	flags.StringVar(&f.Path, "out", "", "")
	then := flags.String("then", "", "")
	check = func() error {
		if f.Path == "" {
			return errors.New("-out is missing: name the file to write")
		}
		return f.Zone.Check()
	}
	do = func(ctx context.Context, s *cluster.Store) error {
		log, err := c.logger()
		if err != nil {
			return err
		}
		f.Logger = log
		if *then != "" {
			f.Then = func(ctx context.Context) error { return shell(ctx, *then) }
		}
		ctx, stop := c.untilSignal(ctx)
		defer stop()
		return f.Keep(ctx, s)
	}
	return check, do
}

func shell(ctx context.Context, command string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// dns is the command of that name.
func (c *command) dns(flags *flag.FlagSet) (
	check func() error, do func(context.Context, *cluster.Store) error,
) {
	z := zoneFlags(flags)
	listen := flags.String("listen", "", "")
	check = func() error {
		if *listen == "" {
			return errors.New(`-listen is missing: say where to answer, such as 192.0.2.1:53`)
		}
		if len(z.NS) == 0 { // a zone needs a name server
			z.NS = []string{"ns." + z.Name}
			if host, _, err := net.SplitHostPort(*listen); err == nil {
				if ip, err := netip.ParseAddr(host); err == nil && !ip.IsUnspecified() {
					z.NS[0] += "=" + ip.String()
				}
			}
		}
		return z.Check()
	}
	do = func(ctx context.Context, s *cluster.Store) error {
		log, err := c.logger()
		if err != nil {
			return err
		}
		d, err := gateway.Listen(*listen, z, s, log)
		if err != nil {
			return fmt.Errorf("-listen: %w: want a free address of this machine, such as 192.0.2.1:53", err)
		}
		fmt.Fprintf(c.stdout, "zone %s is served at %s\n", z.Name, d.Addr())
		ctx, stop := c.untilSignal(ctx)
		defer stop()
		return d.Serve(ctx)
	}
	return check, do
}
