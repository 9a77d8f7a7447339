//go:build linux

package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// both returns two upstreams at the same server, so that any choice is right.
func both(port string) []string {
	return []string{"127.0.0.1:" + port, net.JoinHostPort("::1", port)}
}

func TestPostgreSQL(t *testing.T) {
	initdb, postgres := need(t, "initdb", "postgresql"), need(t, "postgres", "postgresql")
	psql, pgbench := need(t, "psql", "postgresql"), need(t, "pgbench", "postgresql")
	dir, port := folder(t), freePort(t)
	data := filepath.Join(dir, "data")
	proxytest.Must(t, os.Mkdir(data, 0o700))
	const me = "postgres" // it refuses to run as root
	t.Setenv("PGHOST", "127.0.0.1")
	t.Setenv("PGUSER", me)
	t.Setenv("PGDATABASE", me)
	output(t, as(t, me, data, command(t, initdb, "-A", "trust", "-U", me, "-N", "-D", data)))
	server := start(t, as(t, me, data, command(t, postgres, "-D", data, "-p", port,
		"-c", "listen_addresses=127.0.0.1,::1", "-c", "unix_socket_directories=", "-c", "fsync=off",
		"-c", "log_connections=on", "-c", "log_disconnections=on")), both(port)...)
	server.signal = syscall.SIGINT
	p := startBasic(t, both(port)...)
	ask := func(port, sql string) string {
		return quiet(t, command(t, psql, "-X", "-q", "-At", "-p", port, "-c", sql))
	}
	ask(port, "select 1")
	bench := func(args ...string) {
		t.Helper()
		argv := append([]string{pgbench, "-p", p.port()}, args...)
		stdout, stderr := output(t, command(t, argv...))
		if !strings.Contains(stdout, "number of failed transactions: 0 ") {
			t.Errorf("pgbench %v: %s%s", args, stdout, stderr)
		}
		wantNone(t, "pgbench", stderr, "error", "fatal", "lost", "closed", "aborted")
	}
	output(t, command(t, pgbench, "-i", "-q", "-p", p.port()))
	bench("-n", "-c", "10", "-t", "100")
	bench("-n", "-c", "10", "-t", "20", "-C") // connects anew each time
	bench("-n", "-c", "10", "-t", "500", "-S")
	for _, sql := range []string{
		"select sum(abalance) from pgbench_accounts",
		"select sum(delta), count(*) from pgbench_history",
		"copy (select i, md5(i::text) from generate_series(1, 300000) i) to stdout", // 12 MB
	} {
		direct, proxied := ask(port, sql), ask(p.port(), sql)
		if direct != proxied {
			t.Errorf("%s: %d bytes through the proxy, %d without", sql, len(proxied), len(direct))
		}
	}
	const sleep = "select pg_sleep(300)"
	cancelled := command(t, psql, "-X", "-p", p.port(), "-c", sleep)
	var said bytes.Buffer
	cancelled.Stderr = &said
	proxytest.Must(t, cancelled.Start())
	proxytest.Eventually(t, "the query runs", func() bool {
		return ask(port, "select count(*) from pg_stat_activity where query = '"+sleep+"'") == "1\n"
	})
	cancelled.Process.Signal(os.Interrupt) // psql sends a request to cancel on a new connection
	cancelled.Wait()
	if !strings.Contains(said.String(), "canceling statement due to user request") {
		t.Errorf("a cancelled query: %s", said.String())
	}
	p.wantEnds(t, 220, "done")
	log := server.stop(t)
	log = strings.Replace(log, "canceling statement due to user request", "", 1)
	wantNone(t, "PostgreSQL", log,
		"unexpected EOF", "reset", "could not", "terminating", "canceling", "broken pipe")
}

func TestRedis(t *testing.T) {
	redis, cli := need(t, "redis-server", "redis-server"), need(t, "redis-cli", "redis-tools")
	bench := need(t, "redis-benchmark", "redis-tools")
	dir, port := folder(t), freePort(t)
	server := start(t, command(t, redis, "--port", port, "--bind", "127.0.0.1", "::1", "--save", "",
		"--dir", dir, "--loglevel", "verbose"), both(port)...)
	p := startBasic(t, both(port)...)
	for _, args := range []string{"-n 20000", "-n 100000 -P 16", "-n 2000 -k 0"} {
		argv := []string{bench, "-h", "127.0.0.1", "-p", p.port(), "-q", "-c", "50",
			"-t", "ping,set,get"}
		stdout, stderr := output(t, command(t, append(argv, strings.Fields(args)...)...))
		// It asks for configuration before each run, which is no error even where it is not allowed.
		wantNone(t, "redis-benchmark "+args, stdout+stderr, "error", "reset", "closed", "refused")
		if n := strings.Count(stdout, "requests per second"); n < 3 {
			t.Errorf("redis-benchmark %s: %d results\n%s", args, n, stdout)
		}
	}
	path, value := patternFile(t, dir, 50<<20)
	file, err := os.Open(path)
	proxytest.Must(t, err)
	defer file.Close()
	set := command(t, cli, "-h", "127.0.0.1", "-p", p.port(), "-x", "set", "large")
	set.Stdin = file
	if got := quiet(t, set); got != "OK\n" {
		t.Errorf("set: %q", got)
	}
	got := quiet(t, command(t, cli, "-h", "127.0.0.1", "-p", p.port(), "--raw", "get", "large"))
	if got != string(value)+"\n" {
		t.Errorf("a value of %d bytes came back as other %d bytes", len(value), len(got))
	}
	p.wantEnds(t, 6000, "done")
	wantNone(t, "Redis", server.stop(t), "error", "reset", "# .*client", "protocol")
}

func TestIperf3(t *testing.T) {
	iperf := need(t, "iperf3", "iperf3")
	port := freePort(t)
	server := start(t, command(t, iperf, "--forceflush", "-s", "-B", "127.0.0.1", "-p", port))
	p := startBasic(t, "127.0.0.1:"+port)
	type sum struct{ Bytes int64 }
	var report struct {
		Error string
		End   struct {
			Sent     sum `json:"sum_sent"`
			Received sum `json:"sum_received"`
		}
	}
	measure := func(args ...string) {
		t.Helper()
		argv := []string{iperf, "-c", "127.0.0.1", "-p", p.port(), "-J", "-t", "1", "-b", "200M"}
		stdout, _ := output(t, command(t, append(argv, args...)...))
		if err := json.Unmarshal([]byte(stdout), &report); err != nil || report.Error != "" {
			t.Errorf("iperf3 %s: %v, %s", args, err, report.Error)
		}
	}
	for i, args := range []string{"-R", "-P 4"} {
		server.await(t, fmt.Sprintf(`(listening on \d+ \(test #%d\))`, i+1)) // else it is busy
		measure(strings.Fields(args)...)
		if report.End.Sent.Bytes == 0 || report.End.Received.Bytes == 0 {
			t.Errorf("iperf3 %s: %+v", args, report.End)
		}
	}
	// At the end of a test iperf3 closes its data streams with bytes in them, which resets them.
	p.wantEnds(t, 2+5, "done", "client-error", "upstream-error")
	wantNone(t, "iperf3", server.stop(t), "error", "unable")
}

// iperf 2 sends both ways on one connection. The --bidir of iperf3 has two, which its server tells
// apart by their order, and a proxy need not keep that.
func TestIperf2InBothDirections(t *testing.T) {
	iperf := need(t, "iperf", "iperf")
	addr := "127.0.0.1:" + freePort(t)
	_, port, _ := net.SplitHostPort(addr)
	server := start(t, command(t, iperf, "-s", "-B", "127.0.0.1", "-p", port, "-y", "C"))
	waitFor(t, addr)
	p := startBasic(t, addr)
	stdout, _ := output(t, command(t, iperf, "-c", "127.0.0.1", "-p", p.port(),
		"--full-duplex", "-t", "1", "-b", "200M", "-y", "C"))
	// Each direction has a line: time, addresses and ports, id, interval, bytes, rate.
	var bytes []int64
	for line := range strings.Lines(stdout) {
		if fields := strings.Split(line, ","); len(fields) == 9 {
			n, _ := strconv.ParseInt(fields[7], 10, 64)
			bytes = append(bytes, n)
		}
	}
	if len(bytes) != 2 || slices.Min(bytes) == 0 {
		t.Errorf("bytes sent and received: %v\n%s", bytes, stdout)
	}
	p.wantEnds(t, 1, "done")
	wantNone(t, "iperf", server.stop(t), "error", "reset")
}

func TestSSHAndRsync(t *testing.T) {
	sshd, ssh := need(t, "sshd", "openssh-server"), need(t, "ssh", "openssh-client")
	keygen, rsync := need(t, "ssh-keygen", "openssh-client"), need(t, "rsync", "rsync")
	dir, port := folder(t), freePort(t)
	for _, name := range []string{"host", "user"} {
		output(t, command(t, keygen, "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, name)))
	}
	if os.Getuid() == 0 {
		proxytest.Must(t, os.MkdirAll("/run/sshd", 0o755)) // sshd insists on it
	}
	config := write(t, dir, "sshd_config", fmt.Sprintf(`Port %s
ListenAddress 127.0.0.1
ListenAddress ::1
HostKey %[2]s/host
AuthorizedKeysFile %[2]s/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
MaxStartups 100
`, port, dir))
	server := start(t, command(t, sshd, "-D", "-e", "-f", config))
	server.await(t, "(?s)(listening.*listening)")
	p := startBasic(t, both(port)...)
	me, err := user.Current()
	proxytest.Must(t, err)
	options := []string{
		"-F", "none", "-i", filepath.Join(dir, "user"), "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=" + filepath.Join(dir, "known"),
	}
	remote := func(words ...string) []string {
		argv := append([]string{ssh}, options...)
		return append(append(argv, "-p", p.port(), me.Username+"@127.0.0.1"), words...)
	}
	exit := command(t, remote("exit 7")...)
	if err := exit.Run(); exit.ProcessState.ExitCode() != 7 {
		t.Errorf("exit 7: %v", err)
	}
	path, content := patternFile(t, dir, 20<<20)
	cat := command(t, remote("cat")...) // ends when its standard input does
	cat.Stdin = bytes.NewReader(content)
	if got := quiet(t, cat); got != string(content) {
		t.Errorf("cat: %d bytes are other than the %d that were sent", len(got), len(content))
	}
	copied := filepath.Join(dir, "copied")
	for range 2 { // the second time only a difference is sent
		shell := ssh + " " + strings.Join(options, " ") + " -p " + p.port()
		quiet(t, command(t, rsync, "-a", "-e", shell, path, me.Username+"@127.0.0.1:"+copied))
		want, err := os.ReadFile(path)
		proxytest.Must(t, err)
		if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("rsync: %d bytes, %v, want %d", len(got), err, len(want))
		}
		changed := append(bytes.Clone(content[:5<<20]), content[6<<20:]...)
		proxytest.Must(t, os.WriteFile(path, append(changed, "more"...), 0o644))
	}
	p.wantEnds(t, 4, "done")
	wantNone(t, "sshd", server.stop(t), "reset", "error", "fatal", "timeout", "broken pipe")
}

// startNginx starts an nginx with the content of its http block, and returns its log's path.
func startNginx(t *testing.T, dir, http string, addrs ...string) (d *daemon, log string) {
	t.Helper()
	return startNginxWithStream(t, dir, http, "", addrs...)
}

// startNginxWithStream is startNginx with a stream block, unless its content is empty.
func startNginxWithStream(
	t *testing.T, dir, http, stream string, addrs ...string,
) (d *daemon, log string) {
	t.Helper()
	nginx := need(t, "nginx", "nginx-light")
	user, module := "", ""
	if stream != "" {
		const path = "/usr/lib/nginx/modules/ngx_stream_module.so"
		needFile(t, path, "libnginx-mod-stream")
		module, stream = "load_module "+path+";", "stream {"+stream+"}"
	}
	if os.Getuid() == 0 {
		user = "user root;"
	}
	dir, err := os.MkdirTemp(dir, "nginx")
	proxytest.Must(t, err)
	log = filepath.Join(dir, "error.log")
	config := write(t, dir, "nginx.conf", fmt.Sprintf(`%[4]s daemon off; worker_processes 1; %[1]s
pid %[2]s/pid; error_log %[2]s/error.log info;
events { worker_connections 1000; }
http {
	access_log off; client_max_body_size 0;
	client_body_temp_path %[2]s/body; proxy_temp_path %[2]s/proxy; fastcgi_temp_path %[2]s/f;
	uwsgi_temp_path %[2]s/u; scgi_temp_path %[2]s/s;
	%[3]s
}
%[5]s
`, user, dir, http, module, stream))
	return start(t, command(t, nginx, "-p", dir, "-c", config, "-e", log), addrs...), log
}

// nginxComplaints match nginx's log lines about broken connections and failed upstreams.
var nginxComplaints = []string{
	`\[(error|crit|alert|emerg)\]`, "reset", "prematurely", "broken pipe", "failed",
}

func TestNginxAndCurl(t *testing.T) {
	curl := need(t, "curl", "curl")
	dir := folder(t)
	path, content := patternFile(t, dir, 30<<20)
	name := filepath.Base(path)
	front, back := "127.0.0.1:"+freePort(t), "127.0.0.1:"+freePort(t)
	files := fmt.Sprintf("server { listen %s; root %s; }", back, dir)
	served, backLog := startNginx(t, dir, files, back)
	p := startBasic(t, back)
	client, frontLog := startNginx(t, dir, fmt.Sprintf(`
	upstream proxied { server %s; keepalive 4; }
	server {
		listen %s;
		location / { proxy_pass http://proxied; proxy_http_version 1.1; proxy_set_header Connection ""; }
	}`, p.addr, front), front)
	for _, addr := range []string{p.addr, front} { // curl -> proxy; curl -> nginx -> proxy
		url := "http://" + addr + "/" + name
		var wg sync.WaitGroup
		for i := range 8 {
			cmd := command(t, curl, "-sS", "--fail", url,
				"-o", fmt.Sprint(dir, "/got", i), "-r", fmt.Sprint(i*1000, "-"))
			wg.Go(func() {
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("curl %s: %v, %s", url, err, out)
				}
			})
		}
		wg.Wait()
		for i := range 8 {
			got, err := os.ReadFile(fmt.Sprint(dir, "/got", i))
			if err != nil || !bytes.Equal(got, content[i*1000:]) {
				t.Errorf("curl %s: %d bytes, %v, want %d", url, len(got), err, len(content)-i*1000)
			}
		}
		many := strings.Repeat("next\nurl = \""+url+"\"\nrange = 0-9\nsilent\nshow-error\n", 100)
		cmd := command(t, curl, "-K", "-")
		cmd.Stdin = strings.NewReader(strings.TrimPrefix(many, "next\n")) // on one connection
		if got := quiet(t, cmd); got != strings.Repeat(string(content[:10]), 100) {
			t.Errorf("100 requests on a connection: %d bytes", len(got))
		}
	}
	client.stop(t)
	p.wantEnds(t, 10, "done")
	served.stop(t)
	for whose, path := range map[string]string{
		"nginx as client": frontLog, "nginx as upstream": backLog,
	} {
		log, err := os.ReadFile(path)
		proxytest.Must(t, err)
		wantNone(t, whose, string(log), nginxComplaints...)
	}
}
