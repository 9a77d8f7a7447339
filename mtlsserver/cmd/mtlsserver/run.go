package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/danielepagano/lbproxy/internal/logqueue"
	"github.com/danielepagano/lbproxy/internal/systemd"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

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

// run serves with a log in the given format on stderr.
func (s *server) run(format string, verbose bool, stderr io.Writer) error {
	if format != "json" && format != "text" {
		return fmt.Errorf("mtlsserver run: -log %q: want json or text", format)
	}
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	logger := func(w io.Writer) *slog.Logger {
		opts := &slog.HandlerOptions{Level: level}
		if format == "text" {
			return slog.New(slog.NewTextHandler(w, opts))
		}
		opts.ReplaceAttr = seconds
		return slog.New(slog.NewJSONHandler(w, opts))
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

// seconds replaces a duration by its number of seconds, because slog writes nanoseconds.
func seconds(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.Float64Value(a.Value.Duration().Seconds())
	}
	return a
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
