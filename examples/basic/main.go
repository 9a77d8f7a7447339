// Basic is a TCP load balancer in one command, and a first program to copy from.
//
//	basic -listen :8080 -upstream 10.0.0.1:80 -upstream 10.0.0.2:80,weight=2
//
// Each client goes to the upstream with the fewest connections. Ties go to the upstream named
// first, so clients that come one at a time all get the first one.
//
// Basic serves until it is interrupted, then waits for open connections to end; a second interrupt
// resets them. Without flags it demonstrates lbproxy in a short story, with its own servers and
// clients on loopback.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	// Keep serving when the reader of the output has gone, as after "basic ... | head -1".
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(run(os.Args[1:], signals, os.Stdout, os.Stderr))
}

// run is main with its inputs and outputs as arguments. It returns the exit code.
func run(args []string, signals <-chan os.Signal, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		log := newLogger(stderr, slog.LevelError) // not the warning of green's failure
		return exitCode(demo(stdout, log), stderr)
	}
	conf, err := parse(args)
	// Lines wait in a bounded queue, so that signals work even if nobody reads standard error.
	queue := logqueue.NewWriter(stderr, func(n uint64) []byte {
		return fmt.Appendf(nil, "basic: log lines were dropped: %d\n", n)
	})
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = queue.Close(ctx)
	}()
	log := newLogger(queue, conf.level)
	var app *lbproxy.LBProxyApp
	if err == nil {
		app, err = newApp(conf, log)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "basic: %v: run with -h for help\n", err)
		return 2
	}
	return exitCode(serve(app, conf, log, signals, stdout), queue)
}

func exitCode(err error, stderr io.Writer) int {
	if err != nil {
		fmt.Fprintf(stderr, "basic: %v\n", err)
		return 1
	}
	return 0
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// A config holds the values of the flags.
type config struct {
	listen    string
	upstreams []lbproxy.Upstream
	limits    limits
	level     slog.Level

	dial, fail, idle, check time.Duration
	maxConns                int
	loops                   bool

	admin    string          // the address of the status page; empty: none
	recorder *admin.Recorder // nil without admin
}

const usage = `usage: basic -listen ADDR -upstream ADDR[,weight=N] [-upstream ...] [flags]
       basic              (a demonstration on loopback)

  -listen ADDR            the address for clients: 127.0.0.1:8080 or :8080;
                          port 0 takes a free one
  -upstream ADDR[,weight=N]
                          a server for the connections; weight 2 gets twice as
                          many as weight 1, the default
  -max-conns N            accept no more while N are open (default: no limit)
  -idle DURATION          end a connection that moves no data for so long
                          (default 1h; 0: never)
  -dial-timeout DURATION  how long an upstream may take to answer a dial
                          before the next is tried (default 5s)
  -fail-timeout DURATION  skip an upstream for so long after a failed dial
                          (default 10s)
  -check DURATION         dial each upstream at intervals, and notice within
                          twice this time that it is gone (default: never)
  -admin ADDR             serve a status page and metrics at a loopback
                          address, such as 127.0.0.1:9090 (default: nowhere)
  -loops                  run connections on event loops: experimental, Linux
  -v                      log every connection

Limits for each client address (IPv6: /64), none by default:

  -rate N                 open N connections per second (0.5: one every 2
                          seconds) ...
  -burst N                ... and N at once after an idle period (default: a
                          second's worth)
  -open N                 have N connections open at once
  -bandwidth N            move N bytes per second, both directions together
`

func (c *config) flags() *flag.FlagSet {
	f := flag.NewFlagSet("basic", flag.ContinueOnError)
	f.SetOutput(io.Discard) // run prints all errors in one form
	f.Func("listen", "", c.setListen)
	f.Func("upstream", "", c.addUpstream)
	f.Func("max-conns", "", number(&c.maxConns, strconv.Atoi,
		"want a whole number of connections, or 0 for no limit"))
	f.Func("idle", "", number(&c.idle, time.ParseDuration,
		"want a duration such as 90s or 10m, or 0 for never"))
	f.Func("dial-timeout", "", number(&c.dial, time.ParseDuration,
		"want a duration such as 2s, or 0 for the default"))
	f.Func("fail-timeout", "", number(&c.fail, time.ParseDuration,
		"want a duration such as 10s, or 0 for the default"))
	f.Func("check", "", number(&c.check, time.ParseDuration,
		"want a duration such as 1s, or 0 for never"))
	f.Func("admin", "", c.setAdmin)
	f.BoolFunc("loops", "", onOff(&c.loops))
	f.BoolFunc("v", "", c.setVerbose)
	l := &c.limits
	f.Func("rate", "", number(&l.rate, parseRate,
		"want connections per second, 0.001 to 1000000, or 0 for no limit"))
	f.Func("burst", "", number(&l.burst, strconv.Atoi,
		"want a whole number of connections, or 0 for the default"))
	f.Func("open", "", number(&l.open, strconv.Atoi,
		"want a whole number of connections, or 0 for no limit"))
	f.Func("bandwidth", "", number(&l.bandwidth, parseBytes,
		"want whole bytes per second, or 0 for no limit"))
	return f
}

func parse(args []string) (config, error) {
	c := config{idle: time.Hour}
	flags := c.flags()
	if err := flags.Parse(args); err != nil {
		return c, err
	}
	switch {
	case flags.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q: there are only flags", flags.Arg(0))
	case c.listen == "":
		return c, errors.New("-listen is missing: say where clients come in, " +
			"such as -listen 127.0.0.1:8080")
	case len(c.upstreams) == 0:
		return c, errors.New("-upstream is missing: say where to send clients, " +
			"such as -upstream 10.0.0.1:80")
	case c.limits.burst > 0 && c.limits.rate == 0:
		return c, fmt.Errorf("-burst %d without -rate: say how fast it is refilled, "+
			"such as -rate 10", c.limits.burst)
	}
	if c.limits.burst == 0 {
		c.limits.burst = int(math.Ceil(c.limits.rate))
	}
	return c, nil
}

func (c *config) setListen(s string) error {
	_, _, err := net.SplitHostPort(s)
	if err == nil {
		_, err = net.ResolveTCPAddr("tcp", s)
	}
	if err != nil {
		return fmt.Errorf("%w: want an address of this machine, "+
			"such as 127.0.0.1:8080 or :8080", err)
	}
	c.listen = s
	return nil
}

// addUpstream parses an upstream. lbproxy.New checks its address.
func (c *config) addUpstream(s string) error {
	addr, option, given := strings.Cut(s, ",")
	u := lbproxy.Upstream{Addr: addr}
	if given {
		n, isWeight := strings.CutPrefix(option, "weight=")
		weight, err := strconv.Atoi(n)
		if !isWeight || err != nil || weight < 1 {
			return errors.New("want host:port or host:port,weight=N, where N is 1 or more")
		}
		u.Weight = weight
	}
	c.upstreams = append(c.upstreams, u)
	return nil
}

func (c *config) setAdmin(s string) error {
	if errs := (admin.Listen{Addr: s}).Check(); len(errs) > 0 || s == "" {
		return errors.New("want a loopback address, such as 127.0.0.1:9090")
	}
	c.admin, c.recorder = s, &admin.Recorder{}
	return nil
}

func (c *config) setVerbose(s string) error {
	var on bool
	if err := onOff(&on)(s); err != nil {
		return err
	}
	if on {
		c.level = slog.LevelDebug
	}
	return nil
}

func onOff(p *bool) func(string) error {
	return func(s string) (err error) {
		if *p, err = strconv.ParseBool(s); err != nil {
			return errors.New("want true or false, or nothing")
		}
		return nil
	}
}

// number returns a function that sets p to the value of a flag, which must not be negative.
func number[N int | int64 | float64 | time.Duration](
	p *N, parse func(string) (N, error), want string,
) func(string) error {
	return func(s string) error {
		n, err := parse(s)
		if err != nil || n < 0 {
			return errors.New(want)
		}
		*p = n
		return nil
	}
}

func parseBytes(s string) (int64, error) { return strconv.ParseInt(s, 10, 64) }

// parseRate accepts the rates whose time between two connections a time.Duration can express.
func parseRate(s string) (float64, error) {
	n, err := strconv.ParseFloat(s, 64)
	if err == nil && n != 0 && !(n >= 0.001 && n <= 1e6) { // also true for NaN
		err = strconv.ErrRange
	}
	return n, err
}
