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
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

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
		do = func(string) error { return s.run(*format, *verbose, stderr) }
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
