// Command lbcluster runs several mtlsservers as one: it puts a configuration into the store that
// they share, runs servers that follow it, shows them, and names them in DNS.
//
//	lbcluster put [-from N] [-dir DIR | -unchecked] CONFIG.json
//	lbcluster get
//	lbcluster run -dir DIR [-host ADDR] [-advertise ADDR] …
//	lbcluster ls [-json]
//	lbcluster zone -zone NAME -ns NAME[=ADDR] -out FILE [-then COMMAND]
//	lbcluster dns -zone NAME -listen ADDR [-ns NAME[=ADDR]]
//
// lbcluster -h describes each command. docs/cluster.md says when you need a cluster.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
)

const usage = `lbcluster runs several mtlsservers as one. They share a Redis or Valkey server.

  lbcluster put [-from N] [-dir DIR | -unchecked] CONFIG.json
        check a configuration, as for a proxy whose files are in DIR (default: the
        folder of CONFIG.json), and put it in force; with -from only if version N
        is still in force
  lbcluster get
        print the configuration in force
  lbcluster run -dir DIR [-host ADDR] [-advertise ADDR] [-id NAME] [-capacity N]
                [-outage share|open|closed] [-exact] [-timeout 50ms] [-lame 3s]
                [-log json|text] [-v]
        serve the configuration in force; DIR has the certificates and keys, and
        keeps the last good configuration
        -host       replaces the host in each "listen"
        -advertise  where clients find this proxy, for gateways (default: -host)
        -id         its unique name (default: made from the host's name)
        -capacity   gateways leave out a proxy with so many connections
        -outage     while the store is away, let in this proxy's share (default),
                    everybody (open) or nobody (closed)
        -exact      ask the store for each connection, instead of borrowing ahead
        -timeout    the longest that a connection waits for the store (default 50ms)
        -lame       how long to accept clients after SIGTERM (default 3s), until
                    gateways and resolvers have forgotten this proxy
  lbcluster ls [-json]
        show proxies and upstreams
  lbcluster zone -zone NAME -ns NAME[=ADDR] -out FILE [-then COMMAND] [-ttl 1s]
        keep a zone file for a DNS server, which names the live proxies; run COMMAND
        after each change
  lbcluster dns -zone NAME -listen ADDR [-ns NAME[=ADDR]] [-ttl 1s]
        serve DNS, naming the live proxies

All take:
  -store URL     of the store, without a password (default: $LBPROXY_STORE, which may have one)
                 redis://user:password@host:6379, or rediss:// for TLS
  -cluster NAME  which of several clusters in the store (default lbproxy)
For TLS, $LBPROXY_STORE_CA, $LBPROXY_STORE_CERT and $LBPROXY_STORE_KEY may name PEM files.

It exits with 0 on success, 1 if run had to reset connections, and 2 after an error.
`

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	signal.Ignore(syscall.SIGPIPE) // keep serving when the reader of the log has gone
	os.Exit(run(os.Args[1:], os.Getenv, signals, os.Stdout, os.Stderr))
}

// errReset is the error of a drain that had to reset connections.
type errReset struct{ error }

// run is main with its environment as arguments. It returns the exit code.
func run(args []string, getenv func(string) string, signals <-chan os.Signal,
	stdout, stderr io.Writer) int {
	c := &command{getenv: getenv, signals: signals, stdout: stdout, stderr: stderr}
	err := c.run(args)
	var reset errReset
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return 0
	case errors.As(err, &reset):
		return 1 // already logged
	}
	fmt.Fprintln(stderr, err)
	return 2
}

// A command holds the state that all subcommands share.
type command struct {
	getenv         func(string) string
	signals        <-chan os.Signal
	stdout, stderr io.Writer

	storeURL, cluster string
	format            string
	verbose           bool
	timeout           time.Duration
}

func (c *command) run(args []string) error {
	if len(args) == 0 {
		return errors.New("lbcluster: no command: lbcluster -h lists them")
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard) // run prints the error
	flags.StringVar(&c.storeURL, "store", "", "")
	flags.StringVar(&c.cluster, "cluster", "", "")
	flags.StringVar(&c.format, "log", "text", "")
	flags.BoolVar(&c.verbose, "v", false, "")
	var do func(ctx context.Context, s *cluster.Store) error
	check := func() error { return nil } // checks the flags, before the store is dialed
	want := ""                           // the name of the argument, if the command takes one
	brief := true                        // the command makes one request and ends
	switch args[0] {
	case "put":
		p := putter{command: c}
		flags.Int64Var(&p.from, "from", -1, "")
		flags.StringVar(&p.dir, "dir", "", "")
		flags.BoolVar(&p.unchecked, "unchecked", false, "")
		want = "CONFIG.json"
		do = func(ctx context.Context, s *cluster.Store) error {
			return p.put(ctx, s, flags.Arg(0))
		}
	case "get":
		do = c.get
	case "run":
		r := newRunner(c, flags)
		check, do, brief = r.check, r.run, false
	case "ls":
		asJSON := flags.Bool("json", false, "")
		do = func(ctx context.Context, s *cluster.Store) error { return c.list(ctx, s, *asJSON) }
	case "zone":
		check, do = c.zone(flags)
		brief = false
	case "dns":
		check, do = c.dns(flags)
		brief = false
	case "-h", "-help", "--help", "help":
		return flag.ErrHelp
	default:
		return fmt.Errorf("lbcluster: unknown command %q: lbcluster -h lists them", args[0])
	}
	err := flags.Parse(args[1:])
	switch {
	case err != nil:
	case want == "" && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case want != "" && flags.NArg() != 1:
		err = fmt.Errorf("want one argument, %s", want)
	}
	if err != nil {
		return fmt.Errorf("lbcluster %s: %w: lbcluster -h helps", args[0], err)
	}
	var s *cluster.Store
	if err = check(); err == nil {
		s, err = c.dial(brief)
	}
	if err != nil {
		return fmt.Errorf("lbcluster %s: %w", args[0], err)
	}
	defer s.Close()
	if err := do(context.Background(), s); err != nil {
		return fmt.Errorf("lbcluster %s: %w", args[0], err)
	}
	return nil
}

// untilSignal returns a context that ends with the first signal.
func (c *command) untilSignal(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-c.signals:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// dial returns the store. It logs nothing for a brief command.
func (c *command) dial(brief bool) (*cluster.Store, error) {
	text := c.storeURL
	if u, err := url.Parse(text); err == nil && u.User != nil {
		if _, secret := u.User.Password(); secret {
			return nil, errors.New("-store has a password in it, which everybody can see in a list " +
				"of processes: put it into LBPROXY_STORE")
		}
	}
	if text == "" {
		text = c.getenv("LBPROXY_STORE")
	}
	if text == "" {
		return nil, errors.New("no store: " +
			"set LBPROXY_STORE, such as redis://user:password@host:6379")
	}
	log, err := c.logger()
	if err != nil {
		return nil, err
	}
	if brief { // the command's error says the same
		log = slog.New(slog.DiscardHandler)
	}
	conf, err := c.tls()
	if err != nil {
		return nil, err
	}
	return cluster.Dial(text,
		&cluster.Options{Name: c.cluster, Timeout: c.timeout, TLS: conf, Logger: log})
}

// tls returns the TLS configuration for the store from the environment; nil if it has none.
func (c *command) tls() (*tls.Config, error) {
	ca, cert, key := c.getenv("LBPROXY_STORE_CA"), c.getenv("LBPROXY_STORE_CERT"),
		c.getenv("LBPROXY_STORE_KEY")
	if ca+cert+key == "" {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		text, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("LBPROXY_STORE_CA: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("LBPROXY_STORE_CA: %s: want a certificate in PEM", ca)
		}
	}
	if cert+key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("LBPROXY_STORE_CERT and LBPROXY_STORE_KEY: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}

func (c *command) logger() (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if c.verbose {
		opts.Level = slog.LevelDebug
	}
	switch c.format {
	case "json":
		return slog.New(slog.NewJSONHandler(c.stderr, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(c.stderr, opts)), nil
	}
	return nil, fmt.Errorf("-log %q: want json or text", c.format)
}

// A list is a flag that may be given several times, or once with commas.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(text string) error {
	*l = append(*l, strings.Split(text, ",")...)
	return nil
}
