//go:build unix

package main

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A page of docs/ is followed in a folder in place of /etc/mtlsserver.
type follower struct {
	path    string   // PATH
	work    string   // where commands run
	inPlace []string // replacements in the page's text: pairs
}

func (f *follower) command(t *testing.T, text string) *exec.Cmd {
	t.Helper()
	text = strings.NewReplacer(f.inPlace...).Replace(text)
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", text)
	cmd.Dir = f.work
	cmd.Env = append(os.Environ(), "MTLSSERVER_MAIN=1", "PATH="+f.path)
	return cmd
}

// run runs the commands of a block, which must go well, and returns what they print.
func (f *follower) run(t *testing.T, text string) string {
	t.Helper()
	said, err := f.command(t, text).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", text, err, said)
	}
	return string(said)
}

// pick removes and returns the block of a page that contains a text.
func pick(t *testing.T, all *[]string, text string) string {
	t.Helper()
	i := slices.IndexFunc(*all, func(block string) bool { return strings.Contains(block, text) })
	if i < 0 {
		t.Fatalf("no block has %q", text)
	}
	block := (*all)[i]
	*all = slices.Delete(*all, i, i+1)
	return block
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
}

// serve runs commands the last of which is mtlsserver run, until the test ends.
func (f *follower) serve(t *testing.T, text string) (cmd *exec.Cmd, addr string, errs lines) {
	t.Helper()
	cmd = f.command(t, regexp.MustCompile(`(?m)^\S*mtlsserver run`).ReplaceAllString(text, "exec $0"))
	errs = make(lines, 10_000)
	cmd.Stderr = errs
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	said := bufio.NewReader(stdout)
	for {
		line, err := said.ReadString('\n')
		if err != nil {
			t.Fatalf("%s: %v\n%s", text, err, errs.all())
		}
		if addr, ok := strings.CutPrefix(line, `app "web" listens on `); ok {
			return cmd, strings.TrimSpace(addr), errs
		}
	}
}

// TestOperate runs the commands of docs/operate.md in their order. It names those that it cannot
// run, because they need systemd as process 1, or Docker.
func TestOperate(t *testing.T) {
	t.Parallel()
	needs(t, "curl", "openssl")
	folder, err := os.MkdirTemp("", "lb") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	dir := filepath.Join(folder, "pki")
	config := filepath.Join(dir, "config.json")
	upstream := echo(t, "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok")
	bin := filepath.Join(t.TempDir(), "mtlsserver")
	f := &follower{
		path: filepath.Dir(bin) + ":" + os.Getenv("PATH"), work: t.TempDir(),
		inPlace: []string{
			"/usr/local/bin/mtlsserver", bin, "/etc/mtlsserver", dir, "127.0.0.1:8001", upstream,
		},
	}
	steps := blocks(t, "operate.md")

	install := pick(t, &steps, "go build")
	build, rest, _ := strings.Cut(install, "\n")
	if testing.Short() { // it takes its time
		f.path = installed(t)
	} else {
		f.run(t, "cd "+root(t)+"\nexport GOFLAGS=-buildvcs=false\n"+build)
	}
	if said := f.run(t, rest); !has(said, "mtlsserver …go1.…Made a CA") {
		t.Errorf("it says %q", said)
	}
	text, err := os.ReadFile(config)
	if err != nil || !strings.Contains(string(text), firstAdmin) {
		t.Fatalf("config.json is\n%s", text)
	}
	replace(t, config, "127.0.0.1:9443", "127.0.0.1:0",
		"127.0.0.1:8001", upstream, `, {"addr": "127.0.0.1:8002"}`, "")
	cmd, addr, errs := f.serve(t, pick(t, &steps, "mtlsserver run"))
	f.inPlace = append(f.inPlace, "localhost:9443", addr)

	verifyUnits(t, pick(t, &steps, "systemctl")) // instead of running it
	if said := f.run(t, pick(t, &steps, "-name alice")); !has(said,
		"Reloaded, and ended 0 connections.\n  users  +alice\n") {
		t.Errorf("alice: %s", said)
	}
	if said := f.run(t, pick(t, &steps, "--cacert")); !strings.HasSuffix(said, "ok\n") {
		t.Errorf("curl: %s", said)
	}
	proxytest.Eventually(t, "curl's connection is over", func() bool {
		return !strings.Contains(must(t, "status", "-config", config), "\nalice ")
	})
	alice, _, err := dial(dir, "alice", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer alice.Close()

	if said := f.run(t, pick(t, &steps, "openssl req")); !has(said, "  users  +bob\n") {
		t.Errorf("bob: %s", said)
	}
	if err := os.Rename(filepath.Join(f.work, "bob.key"), filepath.Join(dir, "bob.key")); err != nil {
		t.Fatal(err)
	}
	bob, _, err := dial(dir, "bob", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer bob.Close()
	said := f.run(t, pick(t, &steps, "mtlsserver revoke"))
	if !has(said, "Reloaded, and ended 1 connection.\n  users …-bob\n …certificates …~tls.cert\n") ||
		!has(said, "USER …\nalice ") || strings.Contains(said, "\nbob ") {
		t.Errorf("revoke and renew: %s", said)
	}
	(&ended{bob}).verify(t, true)
	(&ended{alice}).verify(t, false)

	said = f.run(t, pick(t, &steps, "mtlsserver status"))
	if !has(said, "ready\n…alice …web …1\n…lbproxy_open_connections…") ||
		!has(said, `"user":"alice","upstream":"`+upstream) {
		t.Errorf("watching: %s", said)
	}
	said = f.run(t, pick(t, &steps, "/api/drain"))
	if !has(said, `{}…{"conns":[{"app":"web",…"user":"alice"…]}`) {
		t.Errorf("drain: %s", said)
	}
	if code, stdout, _ := try("status", "-config", config); code != 1 ||
		!has(stdout, "not ready: app web: no upstream takes connections: 1 draining\n…up,drain") {
		t.Errorf("while it is drained: %d\n%s", code, stdout)
	}
	f.run(t, pick(t, &steps, "/api/undrain"))
	must(t, "status", "-config", config)
	if said := f.run(t, pick(t, &steps, "/api/end")); !has(said, `{"ended":1}`) {
		t.Errorf("end: %s", said)
	}
	(&ended{alice}).verify(t, true)

	if c, _, err := dial(dir, "bob", addr); err == nil {
		c.Close()
		t.Error("bob is let in")
	}
	p := &process{errs: errs}
	line := p.await(t, `"reason":"unknown-serial"`)
	journal := filepath.Join(f.work, "log")
	write(t, f.work, "log", []byte(line+"\n"))
	f.inPlace = append(f.inPlace, "journalctl -u mtlsserver -o cat", "cat "+journal)
	if said := f.run(t, pick(t, &steps, "journalctl")); strings.TrimSpace(said) != line {
		t.Errorf("of the log: %q", said)
	}
	verifyDocker(t, pick(t, &steps, "docker")) // instead of running it
	if len(steps) > 0 {
		t.Errorf("not run: %q", steps)
	}

	// The page has the optional keys of config.json as JSON.
	for i, part := range strings.Split(page(t), "```") {
		if addition, ok := strings.CutPrefix(part, "json\n"); ok && i%2 == 1 {
			key, _, _ := strings.Cut(addition, ":")
			if key == `"admin"` {
				replace(t, config, strings.TrimPrefix(firstAdmin, ",\n  "), strings.TrimSpace(addition))
			} else {
				replace(t, config, `"users":`, strings.TrimSpace(addition)+`, "users":`)
			}
		}
	}
	replace(t, config, "127.0.0.1:9090", "127.0.0.1:0") // it may be taken
	must(t, "check", "-config", config)
	must(t, "reload", "-config", config)
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// The test runs the README's commands for the server, in another folder, on other ports, and with
// another upstream than Python's.
func TestREADME(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it builds the program")
	}
	needs(t, "curl")
	folder, err := os.MkdirTemp("", "lb") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	steps := blocks(t, "../README.md")
	const python = "python3 -m http.server -b 127.0.0.1 8001 &\n"
	upstream := echo(t, "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok")
	ports := "sed -e s/:9443/:0/ -e s/127.0.0.1:8001/" + upstream +
		"/ /tmp/lb/config.json >/tmp/lb/new\ncat /tmp/lb/new >/tmp/lb/config.json\n"
	text := pick(t, &steps, "mtlsserver init")
	if !has(text, python+"…mtlsserver init /tmp/lb\n…mtlsserver issue") {
		t.Fatalf("the commands are\n%s", text)
	}
	text = strings.NewReplacer(python, "", "init /tmp/lb\n", "init /tmp/lb\n"+ports).Replace(text)
	bin := filepath.Join(folder, "bin") + "/"
	f := &follower{path: os.Getenv("PATH"), work: root(t), inPlace: []string{
		"go build", "go build -buildvcs=false",
		" bin/", " " + bin, "\nbin/", "\n" + bin, "exec bin/", "exec " + bin,
		"/tmp/lb", filepath.Join(folder, "lb"),
	}}
	cmd, addr, _ := f.serve(t, text)
	f.inPlace = append(f.inPlace, "localhost:9443", addr)
	text = pick(t, &steps, "curl")
	if said, want := f.run(t, text), "ok…ready\n…web …127.0.0.1:8002"; !has(said, want) {
		t.Errorf("%s: %s, want %q", text, said, want)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func root(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func page(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../../docs/operate.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// verifyUnits checks that commands copy units that are there, and enable them for the user that
// they make. TestUnitsAreValid checks the units themselves.
func verifyUnits(t *testing.T, commands string) {
	t.Helper()
	copies := strings.Join(regexp.MustCompile(`(?m)^cp .*$`).FindAllString(commands, -1), "\n")
	copied, _, ok := strings.Cut(copies, " /etc/systemd/system/")
	var units []string
	for _, path := range strings.Fields(copied)[1:] {
		text, err := os.ReadFile(filepath.Join(root(t), path))
		if err != nil {
			t.Error(err)
		}
		units = append(units, filepath.Base(path))
		if strings.HasSuffix(path, ".service") &&
			!has(string(text), "ExecStart=/usr/local/bin/mtlsserver run "+
				"-config /etc/mtlsserver/config.json\n"+
				"User=mtlsserver\n…ReadWritePaths=/etc/mtlsserver\n") {
			t.Errorf("%s is not for what the page has made", path)
		}
	}
	slices.Reverse(units)
	if !ok || len(units) != 2 || !has(commands, "useradd … mtlsserver\n"+
		"chown -R mtlsserver: /etc/mtlsserver\n"+
		"…systemctl daemon-reload\n"+
		"systemctl enable --now "+strings.Join(units, " ")+"\n") {
		t.Errorf("it does not install %q: %s", units, commands)
	}
}

// verifyDocker checks that commands fit the Dockerfile. TestContainer runs the image's command.
func verifyDocker(t *testing.T, commands string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(t), "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	if !has(string(text), "USER 65532:65532\n"+
		`ENTRYPOINT ["/mtlsserver"]`+"\n"+
		`CMD ["run", "-config", "/etc/mtlsserver/config.json"]`) ||
		!strings.Contains(page(t), "user 65532") {
		t.Error("the Dockerfile has another user or path")
	}
	for line := range strings.Lines(commands) {
		args, ok := strings.CutPrefix(line, "docker exec lb /mtlsserver ")
		if !ok {
			continue
		}
		code, _, stderr := try(strings.Fields(args)...)
		if code != 2 || !strings.Contains(stderr, "/etc/mtlsserver/config.json") {
			t.Errorf("%s: exit code %d, %s", line, code, stderr) // there is no such file here
		}
	}
}

// cells returns the first cells of the tables between two headings of the page, and fails if
// another cell is empty.
func cells(t *testing.T, from, to string) (all []string) {
	t.Helper()
	_, part, ok := strings.Cut(page(t), "\n"+from+"\n")
	part, _, toOK := strings.Cut(part, "\n"+to+"\n")
	if !ok || !toOK {
		t.Fatalf("no part %q to %q", from, to)
	}
	for line := range strings.Lines(part) {
		row := strings.Split(strings.Trim(line, "|\n"), "|")
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		for _, cell := range row {
			if strings.TrimSpace(cell) == "" {
				t.Errorf("an empty cell: %s", line)
			}
		}
		for _, code := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[0], -1) {
			all = append(all, code[1])
		}
	}
	slices.Sort(all)
	return all
}

// literals returns the matches of a pattern in the Go files of folders, without tests.
func literals(t *testing.T, pattern string, folders ...string) (all []string) {
	t.Helper()
	for _, folder := range folders {
		files, err := filepath.Glob(filepath.Join(root(t), folder, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no Go files: %v", folder, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, found := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
				all = append(all, found[1])
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// The tables have every reason that the log may have, once, and no other. A connection that is not
// admitted has a reason of mtlsserver's.
func TestOperateHasEveryReason(t *testing.T) {
	want := literals(t, `(?m)^\t\w+ +Reason = "([^"]+)"`, "mtlsserver")
	ends := literals(t, `(?m)^\tEnd\w+ +EndReason = "([^"]+)"`, "")
	if len(want) < 30 || len(ends) < 10 {
		t.Fatalf("only %d and %d reasons were found", len(want), len(ends))
	}
	ends = slices.DeleteFunc(ends, func(end string) bool { return end == "not-admitted" })
	want = append(want, ends...)
	slices.Sort(want)
	got := cells(t, "## Debug a refused client", "## The lines of the log")
	if !slices.Equal(got, want) {
		t.Errorf("the page has\n%q, want\n%q", got, want)
	}
}

// The page has every message that the server logs without -v, and no other. The server has no use
// for lbproxy's event loops.
func TestOperateHasEveryLineOfTheLog(t *testing.T) {
	want := literals(t, `(?:\bsay\((?:slog\.Level\w+|level), |`+
		`\blog\.(?:Info|Warn|Error)\(|\blog\((?:r, )?slog\.Level\w+, )"([^"]+)"`,
		"", "mtlsserver", "mtlsserver/admin", "mtlsserver/cmd/mtlsserver")
	want = slices.DeleteFunc(want, func(line string) bool {
		return line == "lbproxy: no event loops: connections run on goroutines"
	})
	want = append(want, literals(t, `text :?= "(certificate [^"]+)"`, "mtlsserver")...)
	want = append(want, literals(t, `logger\(&b\)\.Error\("([^"]+)"`, "mtlsserver/cmd/mtlsserver")...)
	want = append(want, literals(t, `h\.log\(r, level, "([^"]+)"`, "mtlsserver/admin")...)
	slices.Sort(want)
	got := cells(t, "## The lines of the log", "## Limits for the open internet")
	if !slices.Equal(got, want) {
		t.Errorf("the page has\n%q, want\n%q", got, want)
	}
}
