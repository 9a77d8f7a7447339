//go:build unix

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
