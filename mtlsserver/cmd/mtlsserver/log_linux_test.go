package main

import (
	"encoding/json"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Connections have two lines each, or are refused, while nobody reads standard error. Neither lines
// nor connections pile up, and once it is read again, it says how many lines are missing.
func TestUnreadLogTakesBoundedMemory(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes thousands of handshakes to fill the queue")
	}
	const admitted = 2_200 // 4,400 lines: more than the queue holds
	const conns = 2 * admitted
	dir, config := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	replace(t, config, `"users": [`, `"logAdmissions": true, "users": [`)
	who, err := loadClient(dir, "alice")
	proxytest.Must(t, err)
	p := runWithFullLog(t, config)
	var resident int64
	var descriptors int
	for i := range conns {
		if i == conns/2 {
			resident, descriptors = proxytest.ProcessUse(t, p.cmd.Process.Pid)
		}
		if i%(conns/admitted) == 0 {
			alice, _, err := who.dial(p.addr)
			if err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			alice.Close()
		} else {
			p.refused(t)
		}
	}
	proxytest.WantNoGrowth(t, p.cmd.Process.Pid, resident, descriptors)

	text := make(chan string, 1)
	go func() {
		io.CopyN(io.Discard, p.log, p.filler)
		log, _ := io.ReadAll(p.log)
		text <- string(log)
	}()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	var written, dropped int
	for line := range strings.Lines(proxytest.Receive(t, "the end of the log", text)) {
		var fields struct {
			Msg   string
			Lines int
		}
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Errorf("%q: %v", line, err)
		}
		if fields.Msg == "log lines were dropped" {
			dropped += fields.Lines
		} else {
			written++
		}
	}
	// How many lines the refused have depends on the time: one each at most.
	if dropped == 0 || written+dropped < 2*admitted || written+dropped > admitted+conns+100 {
		t.Errorf("%d lines were written and %d reported as dropped, want at least %d together",
			written, dropped, 2*admitted)
	}
}
