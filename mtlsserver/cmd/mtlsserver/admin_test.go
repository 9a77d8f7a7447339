package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A reload through the socket is answered when it is done, with the changes or every problem.
func TestReloadByTheSocket(t *testing.T) {
	dir := folder(t)
	short, err := os.MkdirTemp("", "admin") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	socket := filepath.Join(short, "sock")
	withAdmin := strings.Replace(good, `"drainTimeout"`,
		`"admin": {"socket": "`+socket+`"}, "drainTimeout"`, 1)
	write(t, dir, "config.json", []byte(withAdmin))
	config := filepath.Join(dir, "config.json")
	s := start(t, "run", "-config", config)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	reload := func() (int, string) {
		t.Helper()
		answer, err := client.Post("http://socket/api/reload", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, strings.TrimSpace(string(body))
	}

	if code, _, stderr := try("check", "-config", config); code != 0 {
		t.Errorf("check beside the running server: exit code %d: %s", code, stderr)
	}
	if code, _, stderr := try("run", "-config", config); code != 2 ||
		!has(stderr, "config.json:16: admin.socket: …another server answers there: "+
			"end it, or use another name\n") {
		t.Errorf("a second server: exit code %d: %s", code, stderr)
	}
	replace(t, config, `"name": "bob"`, `"name": "carol"`)
	if code, body := reload(); code != 200 ||
		!strings.HasPrefix(body, `{"users":{"added":["carol"],"removed":["bob"]},"apps":{}`) ||
		!strings.HasSuffix(body, `"ended":0}`) {
		t.Errorf("a good one: %d %s", code, body)
	}
	s.await(t, "reloaded", "+carol -bob")
	write(t, dir, "config.json", []byte("{}"))
	if code, body := reload(); code != 422 ||
		!has(body, `{"error":"…config.json:1: tls: missing…\n…config.json:1: apps: missing`) {
		t.Errorf("a bad one: %d %s", code, body)
	}
	s.await(t, "reload failed", "apps: missing")
	s.stop(t, 0)
}
