package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
)

// The status page, the API and the metrics of a proxy show the store, its peers and the policy.
func TestAdminShowsTheCluster(t *testing.T) {
	server := storetest.Redis(t)
	env := map[string]string{"LBPROXY_STORE": server.URL()}
	p := newPKI(t)
	text := strings.Replace(config(named(t, "red"), ""), `"drainTimeout"`,
		`"admin": {"socket": "admin.sock"}, "drainTimeout"`, 1)
	putConfig(t, env, text, "-dir", p.dir)
	startProxy(t, env, p, "-id", "east", "-outage", "closed", "-lame", "10ms")
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(p.dir, "admin.sock"))
		},
	}}
	defer client.CloseIdleConnections()
	shows := func(path string, want ...string) {
		t.Helper()
		storetest.Await(t, path, func() error {
			answer, err := client.Get("http://lb" + path)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			body, err := io.ReadAll(answer.Body)
			if err != nil {
				return err
			}
			for _, text := range want {
				if !strings.Contains(string(body), text) {
					return storetest.Errorf("no %q in %s", text, body)
				}
			}
			return nil
		})
	}
	shows("/", "<h2>Store</h2>", "<dd>"+server.URL()+"</dd>", "<dd>connected</dd>", "<dd>closed</dd>",
		"<dd>east</dd>", "<dd>1 of 1</dd>", "<dt>Configuration</dt><dd>1</dd>")
	shows("/metrics", "\nlbcluster_store_connected 1\n", "\nlbcluster_proxies 1\n",
		"\nlbcluster_configuration_version 1\n", "# TYPE lbcluster_store_calls_total counter\n",
		"\nlbcluster_lag_seconds 0.")
	shows("/api/stats", `"name":"Place","value":"1 of 1"`)
	server.Kill()
	shows("/metrics", "\nlbcluster_store_connected 0\n")
	shows("/", `<dd class="bad">away</dd>`)
}
