package main

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// TestMain runs the command when a test starts the program as a process.
func TestMain(m *testing.M) {
	if os.Getenv("MTLSSERVER_MAIN") != "" {
		main()
	}
	proxytest.Main(m)
}

// A parent may read the output until the server is ready and then go away. Neither a reload nor a
// log line ends or stops the server then. The signals are real here.
func TestRunServesOnWhenNobodyReadsItsOutput(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no signals")
	}
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "-config", config)
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	addr := strings.TrimSpace(strings.TrimPrefix(line, `app "web" listens on`))
	if _, _, splitErr := net.SplitHostPort(addr); err != nil || splitErr != nil {
		t.Fatalf("ready: %q, %v", line, err)
	}
	stdout.Close()
	errs := bufio.NewReader(stderr)
	for range 3 {
		cmd.Process.Signal(syscall.SIGHUP)
		for line := ""; !strings.Contains(line, `"reloaded"`); {
			if line, err = errs.ReadString('\n'); err != nil {
				t.Fatalf("after the last line %q: %v", line, err)
			}
		}
	}
	stderr.Close()
	for range 3 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(c, "no TLS\n")
		io.Copy(io.Discard, c)
		c.Close()
	}
	c, _, err := dial(dir, "alice", addr)
	if err != nil {
		t.Fatalf("after a line that nobody reads: %v", err)
	}
	c.Close()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}
