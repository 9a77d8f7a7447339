package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Each connection logs a line to a standard error that nobody reads. Neither lines nor connections
// pile up. Once it is read again, it says how many lines are missing.
func TestUnreadLogTakesBoundedMemory(t *testing.T) {
	t.Parallel()
	const conns = 6_000 // more than the queue and the pipe hold
	r, full, filler := proxytest.FullPipe(t)
	cmd := exec.Command(os.Args[0], "-v", "-listen", "127.0.0.1:0", "-upstream", echo(t))
	cmd.Env = append(os.Environ(), childVariable+"=1")
	stdout, err := cmd.StdoutPipe()
	proxytest.Must(t, err)
	cmd.Stderr = full
	proxytest.Must(t, cmd.Start())
	defer cmd.Process.Kill()
	full.Close()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	proxytest.Must(t, err)
	addr, _, _ := strings.Cut(strings.TrimPrefix(line, "listening on "), ",")

	var resident int64
	var descriptors int
	for i := range conns {
		if i == conns/2 {
			resident, descriptors = proxytest.ProcessUse(t, cmd.Process.Pid)
		}
		c := proxytest.Dial(t, addr)
		if answer, err := ask(c, "hello"); answer != "hello" {
			t.Fatalf("connection %d: answered %q, %v", i, answer, err)
		}
		c.Close()
	}
	proxytest.WantNoGrowth(t, cmd.Process.Pid, resident, descriptors)

	text := make(chan string, 1)
	go func() {
		io.CopyN(io.Discard, r, filler)
		log, _ := io.ReadAll(r)
		text <- string(log)
	}()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the command ended by %v", err)
	}
	log := proxytest.Receive(t, "the end of the log", text)
	written, dropped := 0, 0
	for line := range strings.Lines(log) {
		var n int
		if _, err := fmt.Sscanf(line, "basic: log lines were dropped: %d", &n); err != nil {
			n, written = 0, written+1
		}
		dropped += n
	}
	lines := conns + 2 // "draining", "stopped"
	if dropped == 0 || written+dropped != lines {
		t.Errorf("of %d lines, %d were written and %d reported as dropped", lines, written, dropped)
	}
}
