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
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A certificate may come from a pipe or a terminal. Who does not want to wait for it any longer need not.
func TestSerialCanBeInterrupted(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Skip(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "serial", pipe)
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	if err := cmd.Start(); err != nil {
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
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on reading")
	}
	w.Close()
}

// However often it is told to reload, it is not deaf to being told to end.
func TestSIGTERMIsHeardAfterManySIGHUPs(t *testing.T) {
	_, config := setUp(t)
	var users []string // so that a reload takes its time
	for i := range 4000 {
		users = append(users, fmt.Sprintf(`{"name": "u%d", "serials": ["0x%x"], "apps": ["web"]}`, i, i+1))
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
	for range 10_000 {
		cmd.Process.Signal(syscall.SIGHUP)
		for sent := time.Now(); time.Since(sent) < 100*time.Microsecond; { // the system does not keep two of a kind
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

// fullPipe returns both ends of a pipe that takes no byte more.
func fullPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	var fds [2]int
	if err := syscall.Pipe(fds[:]); err != nil {
		t.Fatal(err)
	}
	if err := syscall.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 4096); ; {
		if _, err := syscall.Write(fds[1], b); err == syscall.EAGAIN {
			if len(b) == 1 {
				break
			}
			b = b[:1]
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	r, w = os.NewFile(uintptr(fds[0]), "log"), os.NewFile(uintptr(fds[1]), "full pipe")
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// A standard error that nobody reads, such as a stalled log collector, stops nothing but the log.
func TestLogThatNobodyReads(t *testing.T) {
	for _, second := range []bool{false, true} {
		dir, config := setUp(t)
		must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
		must(t, "issue", "-dir", dir, "-name", "bob", "-apps", "web")
		cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "-config", config)
		cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		_, cmd.Stderr = fullPipe(t)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		line, err := bufio.NewReader(stdout).ReadString('\n')
		addr := strings.TrimSpace(strings.TrimPrefix(line, `app "web" listens on`))
		if err != nil {
			t.Fatalf("ready: %q, %v", line, err)
		}
		conns := 2_000
		if testing.Short() {
			conns = 200
		}
		for range conns { // each has a line
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, "no TLS\n")
			io.Copy(io.Discard, c) // until it is refused: an address has 16 places
			c.Close()
		}
		alice, _, err := dial(dir, "alice", addr)
		if err != nil {
			t.Fatalf("serving has stopped: %v", err)
		}
		defer alice.Close()
		bob, _, err := dial(dir, "bob", addr)
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
		cmd.Process.Signal(syscall.SIGHUP)
		bob.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := bob.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("bob, who is revoked, reads %v", err)
		}
		cmd.Process.Signal(syscall.SIGTERM)
		if second {
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Process.Signal(syscall.SIGINT)
		} else {
			alice.Close()
		}
		over := make(chan error, 1)
		go func() { over <- cmd.Wait() }()
		select {
		case err := <-over:
			if exit, ok := errors.AsType[*exec.ExitError](err); second != (ok && exit.ExitCode() == 1) {
				t.Errorf("second signal %v: it ended with %v", second, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("second signal %v: it goes on", second)
		}
	}
}
