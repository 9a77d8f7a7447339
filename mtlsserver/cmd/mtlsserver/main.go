// Command mtlsserver is a TCP load balancer that knows its clients by certificate.
//
//	mtlsserver init DIR [-host NAME,IP]
//	mtlsserver issue -dir DIR -name NAME -apps ID,ID [-csr FILE] [-days N] [-print]
//	mtlsserver renew -dir DIR [-host NAME,IP] [-days N]
//	mtlsserver revoke -dir DIR -name NAME [-serial S]
//	mtlsserver rotate -dir DIR [-drop CA.pem]
//	mtlsserver users -config FILE
//	mtlsserver serial CERT.pem
//	mtlsserver check -config FILE
//	mtlsserver run -config FILE [-log json|text] [-v]
//	mtlsserver status -config FILE
//	mtlsserver reload -config FILE
//	mtlsserver version
//
// mtlsserver -h says what each command does. A configuration is a [mtlsserver.Config] in JSON.
// Package mtlsserver also describes the lines of the log.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/internal/systemd"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

const usage = `mtlsserver is a TCP load balancer that knows its clients by certificate.

  mtlsserver init DIR [-host NAME,IP]
        make a CA, a server certificate and a config.json to start from
  mtlsserver issue -dir DIR -name NAME -apps ID,ID [-csr FILE] [-days N]
                   [-print]
        make a client certificate and key, and enter the user in config.json
        (-print: print the entry instead)
  mtlsserver renew -dir DIR [-host NAME,IP] [-days N]
        make a new server certificate and key, and name them in config.json
        (no -host: for the same names)
  mtlsserver revoke -dir DIR -name NAME [-serial S]
        remove a user, or one of the user's serials, from config.json
  mtlsserver rotate -dir DIR [-drop CA.pem]
        add a new CA, which signs all new certificates; with -drop, remove an
        old CA and its serials
  mtlsserver users -config FILE
        print the users, one certificate a line
  mtlsserver serial CERT.pem
        print the serial of a certificate for config.json, or a CA's id, by
        which serials name the CA
  mtlsserver check -config FILE
        print every problem of a configuration, without binding its addresses
  mtlsserver run -config FILE [-log json|text] [-v]
        serve; SIGHUP reloads the configuration, SIGINT and SIGTERM drain, a
        second SIGINT or SIGTERM ends the server at once
  mtlsserver status -config FILE
        print the running server's apps, upstreams, users and certificates,
        from the admin in its configuration
  mtlsserver reload -config FILE
        reload the running server's configuration through its admin, and print
        the changes (+ added, - removed, ~ changed) or the problems
  mtlsserver version
        print how this program was built

It exits with 0 on success; with 1 if a drain or a second signal reset
connections, a status is not ready, or a reload was refused; with 2 if the
command line, the configuration or an address is wrong, or no server answers.
`

func main() {
	signals := make(chan os.Signal)
	// Signals end the command serial, which may wait for a pipe. They must not end other commands,
	// which would leave files half written.
	if len(os.Args) < 2 || os.Args[1] != "serial" {
		// A signal is lost if its channel is full. One pending reload is enough, but each of the
		// first two signals to end has an effect.
		reloads, ends := make(chan os.Signal, 1), make(chan os.Signal, 2)
		signal.Notify(reloads, syscall.SIGHUP)
		signal.Notify(ends, syscall.SIGINT, syscall.SIGTERM)
		go func() {
			for {
				select {
				case sig := <-reloads:
					signals <- sig
				case sig := <-ends:
					signals <- sig
				}
			}
		}()
	}
	signal.Ignore(syscall.SIGPIPE) // keep serving when the reader of the log has gone
	os.Exit(run(os.Args[1:], signals, os.Stdout, os.Stderr))
}

func run(args []string, signals <-chan os.Signal, stdout, stderr io.Writer) int {
	err := command(args, signals, stdout, stderr)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return 0
	}
	if errors.Is(err, errReported) {
		return 1
	}
	fmt.Fprintln(stderr, err)
	return 2
}

// errReported means that the log or the output has reported the failure already.
var errReported = errors.New("already reported")

func command(args []string, signals <-chan os.Signal, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New("mtlsserver: no command: mtlsserver -h lists them")
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	var do func(arg string) error
	want := "" // the name of the command's argument, if it takes one
	switch args[0] {
	case "init":
		var hosts list
		flags.Var(&hosts, "host", "")
		want, do = "DIR", func(dir string) error { return initialize(dir, hosts, stdout) }
	case "issue":
		var i issuer
		flags.StringVar(&i.dir, "dir", "", required)
		flags.StringVar(&i.name, "name", "", required)
		flags.Var(&i.apps, "apps", required)
		flags.BoolVar(&i.print, "print", false, "")
		flags.StringVar(&i.csr, "csr", "", "")
		flags.IntVar(&i.days, "days", clientLife, "")
		do = func(string) error { return i.issue(stdout, stderr) }
	case "renew":
		var r renewal
		flags.StringVar(&r.dir, "dir", "", required)
		flags.Var(&r.hosts, "host", "")
		flags.IntVar(&r.days, "days", serverLife, "")
		do = func(string) error { return r.renew(stdout) }
	case "revoke":
		dir := flags.String("dir", "", required)
		name := flags.String("name", "", required)
		serial := flags.String("serial", "", "")
		do = func(string) error { return revoke(*dir, *name, *serial, stdout) }
	case "rotate":
		dir := flags.String("dir", "", required)
		drop := flags.String("drop", "", "")
		do = func(string) error {
			if *drop != "" {
				return dropCA(*dir, *drop, stdout)
			}
			return addCA(*dir, stdout)
		}
	case "users":
		config := flags.String("config", "", required)
		do = func(string) error { return users(*config, stdout) }
	case "status":
		config := flags.String("config", "", required)
		do = func(string) error { return status(*config, stdout) }
	case "reload":
		config := flags.String("config", "", required)
		do = func(string) error { return reload(*config, stdout, stderr) }
	case "version":
		do = func(string) error { fmt.Fprintln(stdout, buildInfo()); return nil }
	case "serial":
		want, do = "CERT.pem", func(path string) error { return printSerial(path, stdout) }
	case "check":
		config := flags.String("config", "", required)
		do = func(string) error {
			c, err := mtlsserver.Load(*config)
			if err == nil {
				err = c.Validate()
			}
			if err == nil {
				fmt.Fprintf(stdout, "%s: no problems found\n", *config)
			}
			return err
		}
	case "run":
		s := server{signals: signals, stdout: stdout}
		flags.StringVar(&s.config, "config", "", required)
		format := flags.String("log", "json", "")
		verbose := flags.Bool("v", false, "")
		do = func(string) error {
			level := slog.LevelInfo
			if *verbose {
				level = slog.LevelDebug
			}
			logger := func(w io.Writer) *slog.Logger {
				opts := &slog.HandlerOptions{Level: level}
				if *format == "text" {
					return slog.New(slog.NewTextHandler(w, opts))
				}
				opts.ReplaceAttr = seconds
				return slog.New(slog.NewJSONHandler(w, opts))
			}
			if *format != "json" && *format != "text" {
				return fmt.Errorf("mtlsserver run: -log %q: want json or text", *format)
			}
			// A reader of the log that stalls must delay neither connections nor signals.
			queue := logqueue.NewWriter(stderr, func(n uint64) []byte {
				var b bytes.Buffer
				logger(&b).Error("log lines were dropped", "lines", n)
				return b.Bytes()
			})
			defer func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				_ = queue.Close(ctx)
			}()
			s.log = logger(queue)
			return s.serve()
		}
	case "-h", "-help", "--help", "help":
		return flag.ErrHelp
	default:
		return fmt.Errorf("mtlsserver: unknown command %q: mtlsserver -h lists them", args[0])
	}
	arg, err := parse(flags, args[1:], want)
	if err != nil {
		return fmt.Errorf("mtlsserver %s: %w: mtlsserver -h helps", args[0], err)
	}
	err = do(arg)
	if err == nil || args[0] == "check" || args[0] == "run" {
		return err // begins with the name of a file
	}
	return fmt.Errorf("mtlsserver %s: %w", args[0], err)
}

// seconds replaces a duration by its number of seconds, because slog writes nanoseconds.
func seconds(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.Float64Value(a.Value.Duration().Seconds())
	}
	return a
}

const required = "required"

// parse reads flags, and an argument named want, if any, before, between or after them.
func parse(flags *flag.FlagSet, args []string, want string) (arg string, err error) {
	flags.SetOutput(io.Discard) // the error says it all
	for len(args) > 0 && err == nil {
		err = flags.Parse(args)
		if args = flags.Args(); err == nil && len(args) > 0 {
			if want == "" || arg != "" {
				return "", fmt.Errorf("unexpected argument %q", args[0])
			}
			arg, args = args[0], args[1:]
		}
	}
	flags.VisitAll(func(f *flag.Flag) {
		if err == nil && f.Usage == required && f.Value.String() == "" {
			err = fmt.Errorf("-%s is missing", f.Name)
		}
	})
	if err == nil && want != "" && arg == "" {
		err = fmt.Errorf("%s is missing", want)
	}
	return arg, err
}

// A list is a flag that may be given several times, or once with commas.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(text string) error {
	*l = append(*l, strings.Split(text, ",")...)
	return nil
}

// A server is the state of the command run.
type server struct {
	config  string
	signals <-chan os.Signal
	log     *slog.Logger
	stdout  io.Writer
	sockets passedSockets

	reloading sync.Mutex         // held by reload: one at a time; guards srv
	srv       *mtlsserver.Server // set once
}

func (s *server) serve() error {
	config, err := mtlsserver.Load(s.config)
	if err != nil {
		return err
	}
	sockets, err := systemd.Sockets()
	if err == nil {
		err = passedSockets(sockets).unused(config)
	}
	if err != nil {
		return err
	}
	s.sockets = sockets
	ctx, drain := context.WithCancel(context.Background())
	defer drain()
	s.reloading.Lock() // New begins to listen for administrators
	srv, err := mtlsserver.New(config, &mtlsserver.Options{
		Logger: s.log, Listen: s.sockets.listen,
		Reload: func() (mtlsserver.Changes, error) { return s.reload(ctx) },
	})
	s.srv = srv
	s.reloading.Unlock()
	if err != nil {
		return s.explain(err)
	}
	b := buildInfo()
	s.log.Info("starting",
		"version", b.version, "revision", b.revision, "modified", b.modified, "go", b.goVersion)
	s.ready(srv, config, s.stdout)
	s.notify(systemd.Ready, "STATUS=serving")
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	for {
		select {
		case err := <-done:
			if err != nil {
				s.log.Warn("stopped", "err", err)
				return errReported
			}
			s.log.Info("stopped")
			return nil
		case sig := <-s.signals:
			switch {
			case sig == syscall.SIGHUP:
				_, _ = s.reload(ctx) // reload logs its error
			case ctx.Err() == nil:
				s.log.Info("draining", "signal", sig.String())
				s.notify(systemd.Stopping, "STATUS=draining")
				drain()
			default:
				s.log.Info("closing", "signal", sig.String())
				srv.Close()
			}
		}
	}
}

func (s *server) ready(srv *mtlsserver.Server, config *mtlsserver.Config, w io.Writer) {
	addrs := srv.Addrs()
	for _, app := range config.Apps {
		s.log.Debug("listening",
			"app", app.ID, "addr", addrs[app.ID].String(), "upstreams", len(app.Upstreams))
		fmt.Fprintf(w, "app %q listens on %v\n", app.ID, addrs[app.ID])
	}
	if addr := srv.AdminAddr(); addr != nil {
		fmt.Fprintf(w, "admin listens on %v\n", addr)
	}
}

// reload reloads the configuration, unless ctx has ended.
func (s *server) reload(ctx context.Context) (changes mtlsserver.Changes, err error) {
	s.reloading.Lock() // so that an older file never replaces a newer one
	defer s.reloading.Unlock()
	if ctx.Err() != nil {
		s.log.Warn("too late to reload")
		return changes, errors.New("too late to reload: the server is stopping")
	}
	s.notify(systemd.Reloading(), "STATUS=reloading")
	status := "STATUS=serving"
	defer func() { s.notify(systemd.Ready, status) }()
	config, err := mtlsserver.Load(s.config)
	if err == nil {
		changes, err = s.srv.Reload(config)
		err = s.explain(err)
	}
	if err != nil {
		status = "STATUS=serving; the last reload failed: " + firstLine(err)
		for problem := range strings.SplitSeq(err.Error(), "\n") {
			s.log.Error("reload failed, the configuration stays as it was", "problem", problem)
		}
		return changes, err
	}
	if err := s.sockets.unused(config); err != nil { // must not keep a revocation from taking effect
		s.log.Warn("a socket is not used", "err", err)
	}
	s.ready(s.srv, config, io.Discard) // standard output may have no reader any more
	return changes, nil
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// explain adds a remedy to the error of an address that cannot be bound.
func (s *server) explain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "listen" {
		return err
	}
	remedy := "change that app's listen, or end the program that uses the address"
	_, unknown := errors.AsType[*net.DNSError](err)
	switch {
	case unknown || errors.Is(err, syscall.EADDRNOTAVAIL):
		remedy = "change that app's listen to an address of this machine"
	case errors.Is(err, os.ErrPermission):
		remedy = "change that app's listen to a port that this user may bind, " +
			"such as one above 1023"
	}
	return fmt.Errorf("%s: %w: %s", s.config, err, remedy)
}

// printSerial prints the serial of a certificate, or the KeyID of a CA's, for a configuration.
func printSerial(path string, stdout io.Writer) error {
	cert, err := readCertificate(path)
	if err != nil {
		return err
	}
	if cert.IsCA {
		fmt.Fprintln(stdout, mtlsserver.KeyID(cert))
		return nil
	}
	serial, err := mtlsserver.SerialOf(cert)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	fmt.Fprintf(stdout, "0x%s\n", serial)
	return nil
}
