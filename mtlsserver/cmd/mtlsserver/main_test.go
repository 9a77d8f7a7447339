package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A process is a command that runs until it is stopped.
type process struct {
	signals chan os.Signal
	addrs   map[string]string // of the apps, when it became ready
	out     lines             // its output once it is ready
	errs    lines
	code    chan int
}

// start returns when the server is ready. The server ends with the test, if not before.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{signals: make(chan os.Signal, 8), addrs: map[string]string{},
		out: make(lines, 1000), errs: make(lines, 10000), code: make(chan int, 1)}
	ready := make(lines, 1000)
	over := make(chan struct{})
	go func() {
		defer close(over)
		p.code <- run(args, p.signals, ready, p.errs)
	}()
	t.Cleanup(func() {
		p.signals <- os.Interrupt
		p.signals <- os.Interrupt // does not wait for connections
		<-over
	})
	deadline := time.After(20 * time.Second)
	for len(p.addrs) < strings.Count(configOf(args), `"id"`) {
		select {
		case line := <-ready:
			id, addr, ok := strings.Cut(strings.TrimPrefix(line, "app "), " listens on ")
			if id, err := strconv.Unquote(id); ok && err == nil {
				p.addrs[id] = addr
				continue
			}
			t.Fatalf("not a line that says what listens: %q", line)
		case code := <-p.code:
			t.Fatalf("exit code %d before it was ready: %s", code, p.errs.all())
		case <-deadline:
			t.Fatalf("not ready: %s", p.errs.all())
		}
	}
	p.out = ready
	return p
}

func configOf(args []string) string {
	for i, arg := range args {
		if arg == "-config" {
			text, _ := os.ReadFile(args[i+1])
			return string(text)
		}
	}
	return ""
}

// await returns a line of the log that has all the texts, as soon as there is one.
func (p *process) await(t *testing.T, texts ...string) string {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case line := <-p.errs:
			noSecrets(t, line)
			plain := line
			var fields map[string]any
			if json.Unmarshal([]byte(line), &fields) == nil {
				plain += fmt.Sprint(fields["problem"])
			}
			all := true
			for _, text := range texts {
				all = all && has(plain, text)
			}
			if all {
				return line
			}
			if strings.Contains(line, "reload") {
				t.Logf("another line: %s", plain)
			}
		case code := <-p.code:
			t.Fatalf("exit code %d instead of a line with %q", code, texts)
		case <-deadline:
			t.Fatalf("no line with %q", texts)
		}
	}
}

func (p *process) stop(t *testing.T, want int) {
	t.Helper()
	p.signals <- os.Interrupt
	p.exit(t, want)
}

func (p *process) exit(t *testing.T, want int) {
	t.Helper()
	select {
	case code := <-p.code:
		if code != want {
			t.Errorf("exit code %d, want %d: %s", code, want, p.errs.all())
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
}

// Lines are the lines of a log.
type lines chan string

func (l lines) Write(text []byte) (int, error) {
	for line := range strings.SplitSeq(strings.TrimSuffix(string(text), "\n"), "\n") {
		l <- line
	}
	return len(text), nil
}

func (l lines) all() string {
	var all []string
	for {
		select {
		case line := <-l:
			all = append(all, line)
		default:
			return strings.Join(all, "\n")
		}
	}
}

// ended is a connection to an echo that may have been ended by the server.
type ended struct{ *tls.Conn }

func (c *ended) verify(t *testing.T, want bool) {
	t.Helper()
	_, err := c.Write([]byte("x"))
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || want != (err != nil) {
		t.Errorf("it has ended by %v, want ended: %v", err, want)
	}
}

func TestDurationsAreSecondsInJSONAndReadableInText(t *testing.T) {
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	for format, of := range map[string]func(line string) (seconds float64, err error){
		"json": func(line string) (float64, error) {
			var fields struct{ Duration float64 }
			err := json.Unmarshal([]byte(line), &fields)
			return fields.Duration, err
		},
		"text": func(line string) (float64, error) {
			_, after, _ := strings.Cut(line, " duration=")
			text, _, _ := strings.Cut(after, " ")
			d, err := time.ParseDuration(text)
			return d.Seconds(), err
		},
	} {
		p := start(t, "run", "-config", config, "-log", format)
		c, _, err := dial(dir, "alice", p.addrs["web"])
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		line := p.await(t, "connection", "alice")
		if s, err := of(line); err != nil || s <= 0 || s > 1000 {
			t.Errorf("%s: a duration of %v s, %v: %s", format, s, err, line)
		}
		p.stop(t, 0)
	}
}

func TestUsageFitsATerminal(t *testing.T) {
	for line := range strings.Lines(usage) {
		if n := len(strings.TrimSuffix(line, "\n")); n > 79 {
			t.Errorf("%d columns, want at most 79: %s", n, line)
		}
	}
}
