//go:build linux

package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// An mtls is a running mtlsserver and the folder with the files of its client, alice: ca.pem,
// alice.pem and alice.key.
type mtls struct {
	*proxy
	dir string
}

// An object is one of config.json.
type object = map[string]any

// startMTLS starts mtlsserver in front of upstream. An empty closeNotify is left out.
func startMTLS(t *testing.T, closeNotify, upstream string) *mtls {
	t.Helper()
	app := object{
		"id": "web", "listen": "127.0.0.1:0", "upstreams": []object{{"addr": upstream}},
	}
	if closeNotify != "" {
		app["closeNotify"] = closeNotify
	}
	return startApps(t, nil, app)
}

// startApps starts mtlsserver with apps, and more, as in config.json. Alice may use all of apps;
// clients use the first.
func startApps(t *testing.T, more object, apps ...object) *mtls {
	t.Helper()
	var ids []string
	for _, app := range apps {
		ids = append(ids, app["id"].(string))
	}
	program, dir := filepath.Join(bin, "mtlsserver"), filepath.Join(folder(t), "pki")
	output(t, command(t, program, "init", dir))
	output(t, command(t, program, "issue", "-dir", dir, "-name", "alice", "-apps", "web"))
	text, err := os.ReadFile(filepath.Join(dir, "config.json"))
	proxytest.Must(t, err)
	var config object
	proxytest.Must(t, json.Unmarshal(text, &config))
	config["apps"] = apps
	config["users"].([]any)[0].(object)["apps"] = ids
	maps.Copy(config, more)
	text, err = json.Marshal(config)
	proxytest.Must(t, err)
	path := write(t, dir, "config.json", string(text))
	m := &mtls{&proxy{daemon: start(t, exec.Command(program, "run", "-v", "-config", path))}, dir}
	m.addr = m.addrOf(t, ids[0])
	return m
}

// addrOf returns the address of an app.
func (m *mtls) addrOf(t *testing.T, app string) string {
	t.Helper()
	return m.await(t, fmt.Sprintf(`app %q listens on (\S+)`, app))
}

func (m *mtls) file(name string) string { return filepath.Join(m.dir, name) }

// python returns a command that runs a script. It finds context, an ssl.SSLContext with the
// certificate, port, and out, which is binary standard output.
func (m *mtls) python(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	return command(t, need(t, "python3", "python3"), "-c", fmt.Sprintf(`
import http.client, socket, ssl, sys, urllib.request
context = ssl.create_default_context(cafile=%q)
context.load_cert_chain(%q, %q)
port, out = %s, sys.stdout.buffer
%s`, m.file("ca.pem"), m.file("alice.pem"), m.file("alice.key"), m.port(), script))
}

// node returns a command that runs a script. It finds https, and options for a request.
func (m *mtls) node(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	return command(t, need(t, "node", "nodejs"), "-e", fmt.Sprintf(`
const https = require('https'), fs = require('fs');
const options = {host: 'localhost', port: %s, family: 4, ca: fs.readFileSync(%q),
	cert: fs.readFileSync(%q), key: fs.readFileSync(%q)};
%s`, m.port(), m.file("ca.pem"), m.file("alice.pem"), m.file("alice.key"), script))
}

// curl returns a command that asks for path.
func (m *mtls) curl(t *testing.T, path string, options ...string) *exec.Cmd {
	t.Helper()
	argv := []string{need(t, "curl", "curl"), "-sS", "--cacert", m.file("ca.pem")}
	argv = append(append(argv, options...), "https://"+m.addr+"/"+path)
	return command(t, argv...)
}

func (m *mtls) withCert() []string {
	return []string{"--cert", m.file("alice.pem"), "--key", m.file("alice.key")}
}

func (m *mtls) openssl(t *testing.T, options ...string) *exec.Cmd {
	t.Helper()
	argv := []string{need(t, "openssl", "openssl"), "s_client", "-quiet", "-verify_quiet",
		"-verify_return_error", "-CAfile", m.file("ca.pem"), "-connect", m.addr}
	return command(t, append(argv, options...)...)
}

// nginx returns the address of an nginx that forwards to m.
func (m *mtls) nginx(t *testing.T) (addr string, d *daemon, log string) {
	t.Helper()
	addr = "127.0.0.1:" + freePort(t)
	d, log = startNginx(t, folder(t), fmt.Sprintf(`
	upstream mtls { server %s; keepalive 4; keepalive_timeout 100ms; }
	server {
		listen %s;
		location / {
			proxy_pass https://mtls; proxy_http_version 1.1; proxy_set_header Connection "";
			proxy_request_buffering off; proxy_buffering off;
			proxy_ssl_protocols TLSv1.3; proxy_ssl_name localhost; proxy_ssl_verify on;
			proxy_ssl_trusted_certificate %[3]s/ca.pem;
			proxy_ssl_certificate %[3]s/alice.pem; proxy_ssl_certificate_key %[3]s/alice.key;
		}
	}`, m.addr, addr, m.dir), addr)
	return addr, d, log
}

// Each client downloads and uploads. A client may leave without close_notify when all is done: it
// loses nothing and causes no error.
func TestMutualTLSWithClientsOfOthers(t *testing.T) {
	const size = 20 << 20
	m := startMTLS(t, "", newOrigin(t).addr)
	path, content := patternFile(t, folder(t), size)
	get := fmt.Sprint(size)
	want := func(t *testing.T, cmd *exec.Cmd, want string) {
		t.Helper()
		if got := quiet(t, cmd); got != want {
			t.Errorf("%d bytes came, want other %d", len(got), len(want))
		}
	}
	t.Run("curl", func(t *testing.T) {
		want(t, m.curl(t, get, m.withCert()...), string(content))
		want(t, m.curl(t, "", append(m.withCert(), "--data-binary", "@"+path)...), get)
	})
	t.Run("Python", func(t *testing.T) {
		want(t, m.python(t, `
for i in range(10):
	request = urllib.request.urlopen(f'https://localhost:{port}/`+get+`', context=context)
	body = request.read()
out.write(body)`), string(content))
		want(t, m.python(t, `
c = http.client.HTTPSConnection('localhost', port, context=context)
c.request('POST', '/', open('`+path+`', 'rb').read())
out.write(c.getresponse().read())`), get)
	})
	t.Run("Node", func(t *testing.T) {
		want(t, m.node(t, `https.get({...options, path: '/`+get+`'}, r => r.pipe(process.stdout));`),
			string(content))
		want(t, m.node(t, `
const body = fs.readFileSync('`+path+`');
const headers = {'Content-Length': body.length};
https.request({...options, method: 'POST', headers}, r => r.pipe(process.stdout)).end(body);`), get)
	})
	t.Run("openssl", func(t *testing.T) {
		cmd := m.openssl(t, "-cert", m.file("alice.pem"), "-key", m.file("alice.key"))
		cmd.Stdin = strings.NewReader("GET /" + get + " HTTP/1.0\r\n\r\n")
		out, _ := output(t, cmd) // -quiet: it goes on until the server ends the stream
		if _, body, _ := strings.Cut(out, "\r\n\r\n"); body != string(content) {
			t.Errorf("%d bytes came, want other %d", len(body), size)
		}
	})
	t.Run("nginx", func(t *testing.T) {
		addr, d, log := m.nginx(t)
		curl := need(t, "curl", "curl")
		for range 5 {
			want(t, command(t, curl, "-sS", "http://"+addr+"/"+get), string(content))
		}
		want(t, command(t, curl, "-sS", "--data-binary", "@"+path, "http://"+addr+"/"), get)
		d.stop(t)
		text, err := os.ReadFile(log)
		proxytest.Must(t, err)
		wantNone(t, "nginx", string(text), nginxComplaints...)
	})
	m.wantEnds(t, 1, "done", "client-closed")
}

// A client without a certificate learns why it is refused.
func TestRefusedClientsOfOthersSeeTheAlert(t *testing.T) {
	m := startMTLS(t, "", newOrigin(t).addr)
	refused := func(t *testing.T, cmd *exec.Cmd) {
		t.Helper()
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Run(); err == nil || !strings.Contains(said.String(), "certificate required") {
			t.Errorf("%s: %v, %s", cmd.Path, err, tail(said.String()))
		}
	}
	t.Run("curl", func(t *testing.T) { refused(t, m.curl(t, "1")) })
	t.Run("openssl", func(t *testing.T) {
		cmd := m.openssl(t)
		r, w, err := os.Pipe() // which stays open: at its end openssl would leave
		proxytest.Must(t, err)
		defer r.Close()
		defer w.Close()
		cmd.Stdin = r
		refused(t, cmd)
	})
	t.Run("Python", func(t *testing.T) {
		refused(t, m.python(t, `
context = ssl.create_default_context(cafile='`+m.file("ca.pem")+`')
c = context.wrap_socket(socket.create_connection(('127.0.0.1', port)), server_hostname='localhost')
c.recv(1)`))
	})
	t.Run("Node", func(t *testing.T) {
		refused(t, m.node(t, `
delete options.cert; delete options.key;
https.get(options, () => {}).on('error', e => { console.error(e.message); process.exit(1) });`))
	})
	m.wantEnds(t, 1, "no-certificate")
}

// Python leaves Nagle's algorithm on: its first bytes wait until the end of the handshake is
// acknowledged, which takes the server's system at least 40 ms if it sends nothing itself. Even on
// a busy machine some of many exchanges are faster.
func TestFirstExchangeDoesNotWaitForADelayedAcknowledgement(t *testing.T) {
	m := startMTLS(t, "", newOrigin(t).addr)
	got := quiet(t, m.python(t, `
import time
for i in range(100):
	raw = socket.create_connection(('127.0.0.1', port))
	c = context.wrap_socket(raw, server_hostname='localhost')
	begin = time.monotonic()
	c.sendall(b'GET /1 HTTP/1.1\r\n\r\n')
	c.recv(1)
	took = (time.monotonic() - begin) * 1000
	c.close()
	if took < 35:
		break
print(took < 35, took)`))
	if !strings.HasPrefix(got, "True") {
		t.Errorf("each of 100 first exchanges took 35 ms or more: %s", got)
	}
}
