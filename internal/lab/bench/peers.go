package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A peer is a proxy to measure. command writes its configuration and returns its command line.
type peer struct {
	name, version string
	command       func(c conf) ([]string, error)
}

// A conf is the task of a peer.
type conf struct {
	dir       string // the peer's folder
	listen    string
	upstreams []string
	conns     int // at most so many at once
	// certs is the folder with ca.pem, server.pem, server.key, client.pem and client.key; "" without
	// TLS.
	certs string
}

func (c conf) write(name, format string, args ...any) (string, error) {
	path := filepath.Join(c.dir, name)
	return path, os.WriteFile(path, fmt.Appendf(nil, format, args...), 0o600)
}

const module = "github.com/danielepagano/lbproxy/"

// build builds lbproxy's own programs and, for TLS, makes the certificates with them.
func (b *bench) build(ctx context.Context) (peer, error) {
	program, pkg := filepath.Join(b.dir, "basic"), "examples/basic"
	if b.mtls {
		program, pkg = filepath.Join(b.dir, "mtlsserver"), "mtlsserver/cmd/mtlsserver"
	}
	if runtime.GOOS == "windows" {
		program += ".exe"
	}
	commands := [][]string{{"go", "build", "-o", program, module + pkg}}
	if b.mtls {
		b.certs = filepath.Join(b.dir, "certs")
		commands = append(commands, []string{program, "init", b.certs},
			[]string{program, "issue", "-dir", b.certs, "-name", "client", "-apps", "web"})
	}
	for _, argv := range commands {
		b.progress("%s", strings.Join(argv, " "))
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return peer{}, fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
		}
	}
	if b.mtls {
		if err := b.clientTLS(); err != nil {
			return peer{}, err
		}
		return peer{name: "mtlsserver",
			command: func(c conf) ([]string, error) { return mtlsserver(program, c) }}, nil
	}
	return peer{name: "lbproxy", command: func(c conf) ([]string, error) {
		argv := []string{program, "-listen", c.listen}
		for _, u := range c.upstreams {
			argv = append(argv, "-upstream", u)
		}
		return argv, nil
	}}, nil
}

// onLoops is own with event loops.
func onLoops(own peer) peer {
	return peer{name: own.name + ", loops", command: func(c conf) ([]string, error) {
		argv, err := own.command(c)
		return append(argv, "-loops"), err
	}}
}

// versus returns the peer that -versus describes.
func versus(own peer, description string) peer {
	name, command, _ := strings.Cut(description, "=")
	argv := strings.Fields(command)
	return peer{name: name, command: func(c conf) ([]string, error) {
		ours, err := own.command(c)
		if argv[0] == "basic" {
			return append(ours, argv[1:]...), err
		}
		return slices.Concat(argv, ours[1:]), err
	}}
}

func mtlsserver(program string, c conf) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(c.certs, "config.json"))
	if err != nil {
		return nil, err
	}
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	type object = map[string]any
	var upstreams []object
	for _, u := range c.upstreams {
		upstreams = append(upstreams, object{"addr": u})
	}
	config["apps"] = []object{{"id": "web", "listen": c.listen, "upstreams": upstreams}}
	config["handshake"] = object{"maxPerAddress": 256} // all clients share one address
	config["tls"] = object{
		"cert": filepath.Join(c.certs, "server.pem"),
		"key":  filepath.Join(c.certs, "server.key"),
		"ca":   filepath.Join(c.certs, "ca.pem"),
	}
	if text, err = json.Marshal(config); err != nil {
		return nil, err
	}
	path, err := c.write("config.json", "%s", text)
	return []string{program, "run", "-config", path}, err
}

func baselinePeer() peer {
	return peer{name: "io.Copy", command: func(c conf) ([]string, error) {
		self, err := os.Executable()
		argv := []string{self, baselineArg, c.listen, "", "", ""}
		if c.certs != "" {
			for i, name := range []string{"server.pem", "server.key", "ca.pem"} {
				argv[3+i] = filepath.Join(c.certs, name)
			}
		}
		return append(argv, c.upstreams...), err
	}}
}

// haproxy finds HAProxy, or returns an error that says how to get it. With option splice-auto it
// splices depending on the load.
func haproxy(name, options string) (peer, error) {
	program, err := find("haproxy",
		"Debian and Ubuntu: apt install haproxy; macOS: brew install haproxy")
	if err != nil {
		return peer{}, err
	}
	return peer{name, firstLine(program, "-v"), func(c conf) ([]string, error) {
		tls := ""
		if c.certs != "" {
			var both []byte
			for _, name := range []string{"server.pem", "server.key"} {
				text, err := os.ReadFile(filepath.Join(c.certs, name))
				if err != nil {
					return nil, err
				}
				both = append(both, text...)
			}
			crt, err := c.write("server.both", "%s", both)
			if err != nil {
				return nil, err
			}
			tls = fmt.Sprintf("ssl crt %s ca-file %s verify required "+
				"ssl-min-ver TLSv1.3 no-tls-tickets ciphersuites TLS_AES_128_GCM_SHA256",
				crt, filepath.Join(c.certs, "ca.pem"))
		}
		var servers strings.Builder
		for i, u := range c.upstreams {
			fmt.Fprintf(&servers, "\tserver s%d %s\n", i, u)
		}
		path, err := c.write("haproxy.cfg", `global
	no strict-limits
	nbthread %d
	maxconn %d
defaults
	mode tcp
	option splice-auto
	%s
	timeout connect 5s
	timeout client 1h
	timeout server 1h
listen bench
	bind %s %s
	balance leastconn
%s`, runtime.NumCPU(), c.conns, options, c.listen, tls, &servers)
		return []string{program, "-db", "-f", path}, err
	}}, nil
}

// nginx finds an nginx that can forward TCP, or returns an error that says how to get it.
func nginx() (peer, error) {
	const get = "Debian and Ubuntu: apt install nginx libnginx-mod-stream; macOS: brew install nginx"
	program, err := find("nginx", get)
	if err != nil {
		return peer{}, err
	}
	out, _ := exec.Command(program, "-V").CombinedOutput()
	options, load := strings.Fields(string(out)), ""
	static, modules := false, "/usr/lib/nginx/modules"
	for _, option := range options {
		static = static || option == "--with-stream"
		if path, ok := strings.CutPrefix(option, "--modules-path="); ok {
			modules = path
		}
	}
	if !static {
		module := filepath.Join(modules, "ngx_stream_module.so")
		if _, err := os.Stat(module); err != nil {
			return peer{}, fmt.Errorf(
				"nginx is there, its stream module is not (%s), and is left out. %s", module, get)
		}
		load = "load_module " + module + ";"
	}
	return peer{"nginx", firstLine(program, "-v"), func(c conf) ([]string, error) {
		ssl, tls := "", ""
		if c.certs != "" {
			ssl = "ssl"
			tls = fmt.Sprintf(`ssl_certificate %[1]s/server.pem; ssl_certificate_key %[1]s/server.key;
		ssl_client_certificate %[1]s/ca.pem; ssl_verify_client on;
		ssl_protocols TLSv1.3; ssl_session_tickets off;`, c.certs)
		}
		path, err := c.write("nginx.conf", `%s
worker_processes %d;
pid %[3]s/nginx.pid;
error_log %[3]s/nginx.log;
events { worker_connections %[4]d; }
stream {
	upstream bench { least_conn; server %[5]s; }
	server { listen %[6]s %[7]s; %[8]s proxy_timeout 1h; proxy_pass bench; }
}
`, load, runtime.NumCPU(), c.dir, 2*c.conns, strings.Join(c.upstreams, "; server "),
			c.listen, ssl, tls)
		return []string{program, "-p", c.dir, "-c", path, "-g", "daemon off;"}, err
	}}, nil
}

// find looks for a program in PATH and in the folders that ordinary users do not have in it.
func find(name, get string) (string, error) {
	for _, dir := range []string{"", "/usr/sbin", "/usr/local/sbin", "/usr/local/bin",
		"/opt/homebrew/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed and is left out. %s", name, get)
}

func firstLine(program, arg string) string {
	out, _ := exec.Command(program, arg).CombinedOutput()
	line, _, _ := strings.Cut(string(out), "\n")
	line, _, _ = strings.Cut(line, " - ") // HAProxy's continues with a link
	return strings.TrimPrefix(line, "nginx version: ")
}

// A process is a running peer.
type process struct {
	name string
	cmd  *exec.Cmd

	dial, dialNagle func() (net.Conn, error)
}

// start starts a peer in front of upstreams.
func (b *bench) start(p peer, upstreams []string) (*process, error) {
	dir, err := os.MkdirTemp(b.dir, "")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // for a port that is free
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	argv, err := p.command(conf{dir, addr, upstreams, b.idle + 100, b.certs})
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, own()
	cmd.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(runtime.NumCPU()))
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	run := &process{name: p.name, cmd: cmd, dial: b.dialer(addr, true),
		dialNagle: b.dialer(addr, false)}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		c, err := run.dial()
		if err == nil {
			c.Close()
			return run, nil
		}
		if time.Now().After(deadline) {
			run.stop()
			text, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("%s does not serve: %w\n%s", p.name, err, bytes.TrimSpace(text))
		}
	}
}

// stop asks a process to end, then makes it.
func (p *process) stop() {
	terminate(p.cmd.Process.Pid)
	timer := time.AfterFunc(time.Second, func() { kill(p.cmd.Process.Pid) })
	p.cmd.Wait()
	timer.Stop()
}

func stopAll(running *[]*process) {
	for _, p := range *running {
		p.stop()
	}
}

// dialer returns the clients' dial function, with TCP_NODELAY, as is usual in Go, or without.
func (b *bench) dialer(addr string, noDelay bool) func() (net.Conn, error) {
	return func() (net.Conn, error) {
		raw, err := net.DialTimeout("tcp", addr, patience)
		if err != nil {
			return nil, err
		}
		raw.(*net.TCPConn).SetNoDelay(noDelay)
		if b.certs == "" {
			return raw, nil
		}
		c := tls.Client(raw, b.client)
		raw.SetDeadline(time.Now().Add(patience))
		if err := c.Handshake(); err != nil {
			raw.Close()
			return nil, err
		}
		return c, nil
	}
}

// clientTLS sets the clients' TLS configuration for all peers, with X25519, which all have.
func (b *bench) clientTLS() error {
	pool, err := certPool(filepath.Join(b.certs, "ca.pem"))
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(b.certs, "client.pem"),
		filepath.Join(b.certs, "client.key"))
	b.client = &tls.Config{
		RootCAs: pool, Certificates: []tls.Certificate{pair}, ServerName: "localhost",
		MinVersion: tls.VersionTLS13, CurvePreferences: []tls.CurveID{tls.X25519},
	}
	return err
}

// listen starts four upstreams, or for -scale one with many addresses.
func (b *bench) listen() error {
	addr, listeners, config := "127.0.0.1:0", 4, new(net.ListenConfig)
	if b.scale {
		addr, listeners, config.Control = "0.0.0.0:0", 1, onLoopback
	}
	for range listeners {
		l, err := config.Listen(context.Background(), "tcp4", addr)
		if err != nil {
			return err
		}
		b.listeners = append(b.listeners, l)
		b.upstreams = append(b.upstreams, l.Addr().String())
		go answer(l)
	}
	if b.scale {
		port := b.listeners[0].Addr().(*net.TCPAddr).Port
		b.upstreams = nil
		for i := range manyUpstreams {
			b.upstreams = append(b.upstreams, fmt.Sprintf("127.1.%d.%d:%d", i/250, 1+i%250, port))
		}
	}
	return nil
}

func (b *bench) stopListening() {
	for _, l := range b.listeners {
		l.Close()
	}
}
