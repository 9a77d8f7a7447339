package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRenew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	must(t, "init", dir, "-host", "lb.example.org")
	config := filepath.Join(dir, "config.json")
	replace(t, config, "127.0.0.1:9443", "127.0.0.1:0", "127.0.0.1:8001", echo(t, "web"),
		`, {"addr": "127.0.0.1:8002"}`, "")
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	s := start(t, "run", "-config", config)
	before, _, err := dial(dir, "alice", s.addrs["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	old := contents(t, dir)

	said := must(t, "renew", "-dir", dir, "-days", "30")
	if !has(said, "server-2.pem…server-2.key…SIGHUP…server.pem…server.key") {
		t.Errorf("renew says %q", said)
	}
	cert := certificateIn(t, filepath.Join(dir, "server-2.pem"))
	if left := time.Until(cert.NotAfter); left > 30*day || left < 29*day {
		t.Errorf("it is valid for %v more, want 30 days", left)
	}
	first := certificateIn(t, filepath.Join(dir, "server.pem"))
	if !slices.Equal(cert.DNSNames, first.DNSNames) ||
		!slices.EqualFunc(cert.IPAddresses, first.IPAddresses, net.IP.Equal) {
		t.Errorf("it is for %v %v, was for %v %v", cert.DNSNames, cert.IPAddresses,
			first.DNSNames, first.IPAddresses)
	}
	now := contents(t, dir)
	for name, text := range old {
		if name != "config.json" && now[name] != text {
			t.Errorf("%s has changed", name)
		}
	}
	if want := strings.NewReplacer("server.pem", "server-2.pem", "server.key",
		"server-2.key").Replace(old["config.json"]); now["config.json"] != want {
		t.Errorf("config.json is\n%s\nwant\n%s", now["config.json"], want)
	}

	s.signals <- syscall.SIGHUP
	s.await(t, `"msg":"reloaded"`)
	after, _, err := dial(dir, "alice", s.addrs["web"])
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if got := after.ConnectionState().PeerCertificates[0]; !got.Equal(cert) {
		t.Error("the new certificate is not in force")
	}
	if _, err := before.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := before.Read(make([]byte, 1)); err != nil {
		t.Errorf("the connection from before has ended: %v", err)
	}
	before.Close()
	after.Close()
	s.stop(t, 0)

	// Other names may be asked for, and others may renew at the same time.
	must(t, "renew", "-dir", dir, "-host", "other.example.org,192.0.2.7")
	cert = certificateIn(t, filepath.Join(dir, "server-3.pem"))
	for host, want := range map[string]bool{"localhost": true, "other.example.org": true,
		"192.0.2.7": true, "lb.example.org": false} {
		if err := cert.VerifyHostname(host); want != (err == nil) {
			t.Errorf("%s: %v", host, err)
		}
	}
	must(t, "check", "-config", config)
}

func TestRenewThatFails(t *testing.T) {
	for _, row := range []struct {
		name  string
		args  []string
		spoil func(dir string)
		want  string
	}{
		{"no days", []string{"-days", "0"}, nil, "-days 0: want 1 to 824"},
		{"too many days", []string{"-days", "825"}, nil, "-days 825: want 1 to 824"},
		{"no host", []string{"-host", "a b"}, nil, `-host "a b": want host names`},
		{"no key of the CA", nil, func(dir string) {
			os.Remove(filepath.Join(dir, "ca.key"))
		}, "ca.key: no such file"},
		{"no configuration", nil, func(dir string) {
			os.Remove(filepath.Join(dir, "config.json"))
		}, "config.json\": no such file"},
		{"a certificate for no app", []string{"-host", "b.example.org"}, func(dir string) {
			replace(t, filepath.Join(dir, "config.json"), `"upstreams": [`,
				`"tls": {"serverName": "a.example.org"}, "upstreams": [`)
		}, `apps[0].tls.serverName: "a.example.org": ` +
			`the certificate in tls.cert is not for this name`},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "pki")
			must(t, "init", dir, "-host", "a.example.org")
			if row.spoil != nil {
				row.spoil(dir)
			}
			before := contents(t, dir)
			code, stdout, stderr := try(append([]string{"renew", "-dir", dir}, row.args...)...)
			if code != 2 || stdout != "" || !strings.Contains(stderr, row.want) ||
				strings.Count(stderr, "\n") != 1 {
				t.Errorf("exit code %d, %q, %q, want %q", code, stdout, stderr, row.want)
			}
			if after := contents(t, dir); !equal(before, after) {
				t.Errorf("the folder has changed: %d files, were %d", len(after), len(before))
			}
			noSecrets(t, stderr)
		})
	}
}

func equal(a, b map[string]string) bool {
	for name, text := range a {
		if b[name] != text {
			return false
		}
	}
	return len(a) == len(b)
}
