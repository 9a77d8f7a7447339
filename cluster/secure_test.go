package cluster

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Everything works over TLS, for a user with only the rights in docs/cluster.md.
func TestTLSAndACL(t *testing.T) {
	ca := proxytest.NewAuthority()
	dir := t.TempDir()
	caFile, _ := proxytest.WritePEM(t, dir, "ca",
		tls.Certificate{Certificate: [][]byte{ca.Cert.Raw}})
	certFile, keyFile := proxytest.WritePEM(t, dir, "server", ca.Server())
	acl := filepath.Join(dir, "users.acl")
	if err := os.WriteFile(acl, []byte(aclOf(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := proxytest.FreeAddr(t)
	storetest.Redis(t, "--tls-port", addr[strings.LastIndexByte(addr, ':')+1:], "--tls-cert-file",
		certFile, "--tls-key-file", keyFile,
		"--tls-ca-cert-file", caFile, "--tls-auth-clients", "yes", "--aclfile", acl)
	client := ca.Client()
	conf := ca.ClientConfig(&client)
	url := func(password string) string { return "rediss://lbproxy:" + password + "@" + addr }

	wrongUser, l := dial(t, url("secret-one"), &Options{TLS: conf})
	refused := func(s *Store, why string) {
		t.Helper()
		storetest.Await(t, "the error says "+why, func() error { // or that a busy store was too slow
			err := s.Ping(t.Context())
			if err == nil || strings.Contains(err.Error(), "secret-one") {
				t.Fatalf("the error is %v, want one that says %s, without the password", err, why)
			}
			return storetest.Want(strings.Contains(err.Error(), why), err.Error())
		})
	}
	refused(wrongUser, "WRONGPASS")
	if strings.Contains(l.String(), "secret-one") {
		t.Errorf("the log has the password: %s", l)
	}
	stranger, _ := dial(t, url("change-me"), &Options{TLS: &tls.Config{ServerName: "localhost"}})
	refused(stranger, "give the CA")
	anonymous, _ := dial(t, url("change-me"), &Options{TLS: ca.ClientConfig(nil)})
	if err := anonymous.Ping(t.Context()); err == nil {
		t.Error("the store wants a certificate, and there was none")
	}
	if _, err := Dial("redis://"+addr, &Options{TLS: conf}); err == nil ||
		!strings.Contains(err.Error(), "use rediss://") {
		t.Error(err)
	}

	s, _ := dial(t, url("change-me"), &Options{TLS: conf, Timeout: storetest.Patience})
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := s.Limit("k", Limit{Burst: 2, Every: never, Open: 5})
	if in := count(t, 5, m); in != 2 {
		t.Error(in, "let in, of 2")
	}
	put(t, s, "one")
	w, err := s.Watch(t.Context(), Watcher{Apply: func(Config) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	member, err := s.Join(Self{Interval: 20 * time.Millisecond, Config: w.Running,
		Apps: func() map[string]*lbproxy.LBProxyApp { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer member.Leave()
	storetest.Await(t, "it is a member", func() error {
		tally, err := s.Tally(t.Context())
		if err == nil && (len(tally.Proxies) != 1 || tally.Proxies[0].Config != 1) {
			err = storetest.Errorf("%+v", tally)
		}
		return err
	})
	if st := s.Status(); st.Failures != 0 {
		t.Errorf("%+v %s", st, member.Place().Err)
	}
}

// aclOf returns the user that docs/cluster.md shows.
func aclOf(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../docs/cluster.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "user lbproxy ") {
			return "user default off\n" + line
		}
	}
	t.Fatal("docs/cluster.md shows no user")
	return ""
}
