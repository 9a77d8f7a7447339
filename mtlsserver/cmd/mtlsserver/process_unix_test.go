//go:build unix

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// The command serial may wait for a certificate from a pipe or a terminal; a signal ends it.
func TestSerialCanBeInterrupted(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Skip(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "serial", pipe)
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	// A child ignores SIGINT if its parent does, as in the background of a shell script.
	noted := make(chan os.Signal, 1)
	signal.Notify(noted, os.Interrupt)
	err := cmd.Start()
	signal.Stop(noted)
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(pipe, os.O_WRONLY, 0) // returns when it is being read
	if err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(os.Interrupt)
	over := make(chan error, 1)
	go func() { over <- cmd.Wait() }()
	select {
	case err := <-over:
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok ||
			exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on reading")
	}
	w.Close()
}

// Many reload signals do not hide a signal to end.
func TestSIGTERMIsHeardAfterManySIGHUPs(t *testing.T) {
	_, config := setUp(t)
	var users []string // so that a reload takes its time
	for i := range 4000 {
		users = append(users,
			fmt.Sprintf(`{"name": "u%d", "serials": ["0x%x"], "apps": ["web"]}`, i, i+1))
	}
	replace(t, config, `"users": []`, `"users": [`+strings.Join(users, ",\n")+`]`)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "-config", config)
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 2_000 {
		cmd.Process.Signal(syscall.SIGHUP)
		// the system does not keep two of a kind
		for sent := time.Now(); time.Since(sent) < 100*time.Microsecond; {
		}
	}
	cmd.Process.Signal(syscall.SIGTERM)
	over := make(chan error, 1)
	go func() { over <- cmd.Wait() }()
	select {
	case err := <-over:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it goes on")
	}
}

// A fullLog is a server that runs while nobody reads its standard error.
type fullLog struct {
	cmd    *exec.Cmd
	addr   string   // of the app web
	log    *os.File // filler bytes, then what it writes to standard error
	filler int64
}

func runWithFullLog(t *testing.T, config string) *fullLog {
	t.Helper()
	p := &fullLog{cmd: exec.Command(os.Args[0], "run", "-config", config)}
	r, w, filler := proxytest.FullPipe(t)
	p.log, p.filler, p.cmd.Stderr = r, filler, w
	p.cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	stdout, err := p.cmd.StdoutPipe()
	proxytest.Must(t, err)
	proxytest.Must(t, p.cmd.Start())
	w.Close()
	t.Cleanup(func() { p.cmd.Process.Kill() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("ready: %q, %v", line, err)
	}
	p.addr = strings.TrimSpace(strings.TrimPrefix(line, `app "web" listens on`))
	return p
}

// refused makes a connection that is refused, and returns when it has been.
func (p *fullLog) refused(t *testing.T) {
	t.Helper()
	c, err := net.Dial("tcp", p.addr)
	proxytest.Must(t, err)
	defer c.Close()
	io.WriteString(c, "no TLS\n")
	io.Copy(io.Discard, c)
}

// A standard error that nobody reads, such as a stalled log collector, stops only the log.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	for _, second := range []bool{false, true} {
		dir, config := setUp(t)
		must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
		must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "web")
		p := runWithFullLog(t, config)
		for range 200 { // before there was a bound, each had a line
			p.refused(t)
		}
		alice, _, err := dial(dir, "alice", p.addr)
		if err != nil {
			t.Fatalf("serving has stopped: %v", err)
		}
		defer alice.Close()
		bob, _, err := dial(dir, "bob", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer bob.Close()

		text, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		without := regexp.MustCompile(`(?s),\s*\{"name":\s*"bob".*?\}`).ReplaceAll(text, nil)
		if bytes.Equal(without, text) {
			t.Fatalf("bob is not in\n%s", text)
		}
		if err := os.WriteFile(config, without, 0o600); err != nil {
			t.Fatal(err)
		}
		p.cmd.Process.Signal(syscall.SIGHUP)
		bob.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := bob.Read(make([]byte, 1)); err == nil ||
			errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("bob, who is revoked, reads %v", err)
		}
		p.cmd.Process.Signal(syscall.SIGTERM)
		if second {
			p.cmd.Process.Signal(syscall.SIGTERM)
			p.cmd.Process.Signal(syscall.SIGINT)
		} else {
			alice.Close()
		}
		over := make(chan error, 1)
		go func() { over <- p.cmd.Wait() }()
		select {
		case err := <-over:
			if exit, ok := errors.AsType[*exec.ExitError](err); second != (ok &&
				exit.ExitCode() == 1) {
				t.Errorf("second signal %v: it ended with %v", second, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("second signal %v: it goes on", second)
		}
	}
}
