package main

import (
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/alicebob/miniredis/v2"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

// A process is a command at work.
type process struct {
	signals     chan os.Signal
	stdout, log proxytest.Buffer
	code        chan int
}

func begin(t *testing.T, env map[string]string, args ...string) *process {
	p := &process{signals: make(chan os.Signal, 2), code: make(chan int, 1)}
	go func() {
		p.code <- run(args, func(k string) string { return env[k] }, p.signals, &p.stdout, &p.log)
	}()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%v: %s%s", args, &p.stdout, &p.log)
		}
	})
	return p
}

func (p *process) end(t *testing.T) int {
	t.Helper()
	return proxytest.Receive(t, "the end of the command", p.code)
}

// command runs one to its end.
func lbcluster(t *testing.T, env map[string]string, args ...string,
) (code int, stdout, stderr string) {
	t.Helper()
	p := begin(t, env, args...)
	code = p.end(t)
	return code, p.stdout.String(), p.log.String()
}

func TestWrongCommandLines(t *testing.T) {
	env := map[string]string{"LBPROXY_STORE": "redis://127.0.0.1:1"}
	for _, c := range []struct{ args, want string }{
		{"", "no command"}, {"what", "unknown command"}, {"ls extra", "unexpected argument"},
		{"put", "want one argument"},
		{"ls -x", "not defined"}, {"run", "-dir is missing"},
		{"run -dir . -host h:1", "without a port"},
		{"run -dir . -outage no", "want share, open or closed"},
		{"run -dir . -log x", "want json or text"}, {"zone", "-out is missing"},
		{"zone -out f", "no zone"}, {"dns", "-listen is missing"},
		{"dns -zone a.test", "-listen is missing"}, {"dns -listen 127.0.0.1:0", "no zone"},
		{"zone -out f -zone a.test", "no name servers"},
		{"ls -store redis://u:geheim@h:1", "everybody can see"},
		{"put /no/such/file", "no such file"},
	} {
		code, _, stderr := lbcluster(t, env, strings.Fields(c.args)...)
		if code != 2 || !strings.Contains(stderr, c.want) || strings.Contains(stderr, "geheim") ||
			strings.Count(stderr, "\n") != 1 { // the store was not dialed
			t.Errorf("%s: %d %s", c.args, code, stderr)
		}
	}
	if code, _, stderr := lbcluster(t, env, "dns", "-zone", "a.test", "-listen", "nowhere"); code != 2 ||
		!strings.Contains(stderr, "nowhere: missing port") || !strings.Contains(stderr, "192.0.2.1:53") {
		t.Error(code, stderr)
	}
	if code, _, stderr := lbcluster(t, nil, "ls"); code != 2 ||
		!strings.Contains(stderr, "set LBPROXY_STORE") {
		t.Error(code, stderr)
	}
	if code, stdout, _ := lbcluster(t, nil, "-h"); code != 0 ||
		!strings.Contains(stdout, "lbcluster zone") {
		t.Error(code, stdout)
	}
	if code, _, stderr := lbcluster(t, env, "ls"); code != 2 ||
		!strings.Contains(stderr, "redis://127.0.0.1:1") || !strings.Contains(stderr, "refused") {
		t.Error(code, stderr)
	}
}

func TestPutGetLs(t *testing.T) {
	server := miniredis.RunT(t)
	env := map[string]string{"LBPROXY_STORE": "redis://" + server.Addr()}
	if code, _, stderr := lbcluster(t, env, "get"); code != 2 ||
		!strings.Contains(stderr, "no configuration") {
		t.Error(code, stderr)
	}
	file := storetest.WriteFile(t, "config.json", "{}\n")
	if code, _, stderr := lbcluster(t, env, "put", file); code != 2 ||
		!strings.Contains(stderr, "nothing was put") || !strings.Contains(stderr, "tls") {
		t.Error(code, stderr)
	}
	if code, stdout, stderr := lbcluster(t, env, "put", "-unchecked", file); code != 0 ||
		stdout != "version 1\n" {
		t.Error(code, stdout, stderr)
	}
	if code, stdout, stderr := lbcluster(t, env, "get"); code != 0 || stdout != "{}\n" ||
		!strings.Contains(stderr, "version 1, put by ") {
		t.Error(code, stdout, stderr)
	}
	if code, _, stderr := lbcluster(t, env, "put", "-unchecked", "-from", "0", file); code != 2 ||
		!strings.Contains(stderr, "somebody else") || !strings.Contains(stderr, "lbcluster get") {
		t.Error(code, stderr)
	}
	if code, _, stderr := lbcluster(t, env, "put", "-unchecked", "-from", "1", file); code != 0 {
		t.Error(code, stderr)
	}

	s, err := cluster.Dial("redis://"+server.Addr(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m, err := s.Join(cluster.Self{ID: "one", Addr: "10.0.0.5", Capacity: 10,
		Ports:  func() map[string]int { return map[string]int{"web": 9443} },
		Config: func() (int64, string) { return 1, "version 2: no\x1b[2Jgood\nmore" }})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Leave()
	storetest.Await(t, "ls shows it", func() error {
		_, stdout, _ := lbcluster(t, env, "ls")
		for _, want := range []string{"1 proxy, configuration 2", "one", "web 10.0.0.5:9443",
			"live", "0/10", `1 (version 2: no\x1b[2Jgood)`, "ms ago"} {
			if !strings.Contains(stdout, want) {
				return storetest.Errorf("no %q in %s", want, stdout)
			}
		}
		return nil
	})
	_, stdout, _ := lbcluster(t, env, "ls", "-json")
	var tally cluster.Tally
	if err := json.Unmarshal([]byte(stdout), &tally); err != nil || len(tally.Proxies) != 1 ||
		tally.Proxies[0].Ports["web"] != 9443 {
		t.Error(err, stdout)
	}
}

func TestZoneAndDNSEndWithASignal(t *testing.T) {
	server := miniredis.RunT(t)
	env := map[string]string{"LBPROXY_STORE": "redis://" + server.Addr()}
	out := t.TempDir() + "/zone"
	p := begin(t, env, "zone", "-zone", "lb.test", "-ns", "ns.test", "-out", out, "-then",
		"cp "+out+" "+out+".copied")
	storetest.Await(t, "the zone is written and copied", func() error {
		_, err := os.Stat(out + ".copied")
		return err
	})
	d := begin(t, env, "dns", "-zone", "lb.test", "-listen", "127.0.0.1:0")
	storetest.Await(t, "it serves", func() error {
		text := d.stdout.String()
		return storetest.Want(strings.Contains(text, "lb.test is served at 127.0.0.1:"), text)
	})
	for _, p := range []*process{p, d} {
		p.signals <- syscall.SIGTERM
		if code := p.end(t); code != 0 {
			t.Error("exit", code, p.log.String())
		}
	}
}
