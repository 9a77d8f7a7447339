package gateway

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// daemon runs a program until the test ends, and shows its output if the test fails.
func daemon(t *testing.T, program string, args ...string) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command(storetest.Need(t, program), args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", program, &out)
		}
	})
}

// resolve returns the addresses that the server at addr has for the zone.
func resolve(addr string) (ips []string, err error) {
	m := new(dns.Msg).SetQuestion("lb.test.", dns.TypeA)
	m.SetEdns0(safeSize, false)
	r, _, err := (&dns.Client{Timeout: time.Second}).Exchange(m, addr)
	if err != nil {
		return nil, err
	}
	for _, rr := range r.Answer {
		if a, ok := rr.(*dns.A); ok {
			ips = append(ips, a.A.String())
		}
	}
	if r.Rcode != dns.RcodeSuccess || len(ips) == 0 {
		return nil, fmt.Errorf("%s, %d addresses", dns.RcodeToString[r.Rcode], len(ips))
	}
	return ips, nil
}

func has(addr, ip string, want bool) func() error {
	return func() error {
		ips, err := resolve(addr)
		if err == nil && strings.Contains(" "+strings.Join(ips, " ")+" ", " "+ip+" ") != want {
			err = fmt.Errorf("%v", ips)
		}
		return err
	}
}

// unbound starts an unbound that asks the servers at these addresses.
func unbound(t *testing.T, to ...string) string {
	addr := proxytest.FreeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	conf := storetest.WriteFile(t, "unbound.conf", fmt.Sprintf(`server:
  interface: 127.0.0.1
  port: %s
  username: ""
  chroot: ""
  directory: "%s"
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  do-not-query-localhost: no
  module-config: "iterator"
  domain-insecure: "test."
  local-zone: "test." nodefault
remote-control:
  control-enable: no
stub-zone:
  name: "lb.test."
  stub-addr: %s
`, port, t.TempDir(), strings.ReplaceAll(strings.Join(to, "\n  stub-addr: "), ".1:", ".1@")))
	daemon(t, "unbound", "-d", "-c", conf)
	return addr
}

func dnsmasq(t *testing.T, to string) string {
	addr := proxytest.FreeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	daemon(t, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv",
		"--no-hosts", "--pid-file=", "--user=",
		"--listen-address=127.0.0.1", "--bind-interfaces", "--port="+port,
		"--server=/lb.test/"+strings.Replace(to, ":", "#", 1))
	return addr
}

// knot serves the zone in a file. It returns the server's address and a function that reloads the
// file.
func knot(t *testing.T, file string) (addr string, reload func(context.Context) error) {
	addr = proxytest.FreeAddr(t)
	knotc := storetest.Need(t, "knotc")
	dir, err := os.MkdirTemp("", "knot") // a socket's path has to be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := storetest.WriteFile(t, "knot.conf", fmt.Sprintf(`server:
    listen: %s
    rundir: %s
    automatic-acl: off
database:
    storage: %s
log:
  - target: stderr
    any: info
zone:
  - domain: lb.test
    file: %s
    zonefile-sync: -1
    zonefile-load: whole
    semantic-checks: on
    journal-content: none
`, strings.Replace(addr, ":", "@", 1), dir, dir, file))
	daemon(t, "knotd", "-c", conf)
	reload = func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, knotc, "-b", "-s", dir+"/knot.sock", "zone-reload",
			"lb.test").CombinedOutput()
		if err != nil {
			return fmt.Errorf("knotc: %w: %s", err, out)
		}
		return nil
	}
	return addr, reload
}

// A killed proxy is named for a bounded time, by our own server and by Knot, and through resolvers.
func TestKilledProxyIsNamedNoMore(t *testing.T) {
	t.Parallel()
	storetest.Need(t, "unbound")
	storetest.Need(t, "dnsmasq")
	storetest.Need(t, "knotd")
	redis := storetest.Redis(t)
	store, err := cluster.Dial(redis.URL(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	join := func(id, addr string) (*cluster.Member, *cluster.Store, *storetest.Wire) {
		wire := storetest.NewWire(t, redis.Addr)
		s, err := cluster.Dial(wire.URL(), nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.Join(cluster.Self{ID: id, Addr: addr,
			Ports: func() map[string]int { return map[string]int{"web": 1} }})
		if err != nil {
			t.Fatal(err)
		}
		return m, s, wire
	}
	var drains, dies func()
	for id, ip := range map[string]string{"stays": "10.0.0.1", "drains": "10.0.0.2",
		"dies": "10.0.0.3"} {
		m, s, wire := join(id, ip)
		defer s.Close()
		defer m.Leave()
		switch id {
		case "drains":
			drains = m.Drain
		case "dies":
			dies = wire.Cut // no goodbye
			defer wire.Heal()
		}
	}

	own := serve(t, store).Addr()
	file := filepath.Join(t.TempDir(), "lb.zone")
	if err := os.WriteFile(file, []byte(testZone.Text(cluster.Tally{}, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	knotAddr, reload := knot(t, file)
	ctx, cancel := context.WithCancel(context.Background())
	kept := make(chan error)
	go func() { kept <- (&File{Zone: testZone, Path: file, Then: reload}).Keep(ctx, store) }()
	defer func() {
		cancel()
		if err := <-kept; err != nil {
			t.Error(err)
		}
	}()
	servers := []struct{ name, addr string }{
		{"lbcluster dns", own}, {"Knot", knotAddr},
		{"unbound, lbcluster dns", unbound(t, own)}, {"unbound, Knot", unbound(t, knotAddr)},
		{"dnsmasq, lbcluster dns", dnsmasq(t, own)}, {"dnsmasq, Knot", dnsmasq(t, knotAddr)},
	}
	for _, s := range servers {
		for _, ip := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"} {
			storetest.Await(t, s.name+" has "+ip, has(s.addr, ip, true))
		}
	}
	gone := func(what, ip string, do func(), atMost time.Duration) {
		do()
		began := time.Now()
		left := map[string]bool{}
		for _, s := range servers {
			left[s.name] = true
		}
		storetest.Await(t, what+" is named no more", func() error {
			for _, s := range servers {
				if !left[s.name] || has(s.addr, ip, false)() != nil {
					continue
				}
				delete(left, s.name)
				took := time.Since(began).Round(10 * time.Millisecond)
				t.Logf("%s: named no more by %s after %v", what, s.name, took)
				if took > atMost+slack {
					t.Errorf("%s: named by %s for %v, want %v at most", what, s.name, took, atMost)
				}
			}
			return storetest.Want(len(left) == 0, fmt.Sprint(left))
		})
	}
	const ttl = time.Second
	gone("drained", "10.0.0.2", drains, 1500*time.Millisecond+ttl)
	gone("killed", "10.0.0.3", dies, 3500*time.Millisecond+ttl)
}

// slack is for a machine that is busy with something else.
const slack = 2 * time.Second

// A gateway dies. Resolvers ask the other one.
func TestKilledGatewayIsNotMissed(t *testing.T) {
	t.Parallel()
	storetest.Need(t, "unbound")
	src := new(source)
	src.set(nil, proxies(2)...)
	dead, stop := serveUntil(t, src)
	resolver := unbound(t, dead.Addr(), serve(t, src).Addr())
	storetest.Await(t, "the proxies are named", has(resolver, "10.0.0.1", true))
	stop()
	src.set(nil, proxies(1)...) // which an answer that is kept would not have
	for range 10 {              // whichever unbound prefers
		storetest.Await(t, "the other gateway names them", has(resolver, "10.0.0.2", false))
		time.Sleep(100 * time.Millisecond)
	}
	if err := has(resolver, "10.0.0.1", true)(); err != nil {
		t.Error(err)
	}
}

// Go's own resolver accepts the answers.
func TestGoResolver(t *testing.T) {
	src := new(source)
	src.set(nil, proxies(3)...)
	s := serve(t, src)
	toServer := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.Addr())
	}
	r := net.Resolver{PreferGo: true, Dial: toServer}
	storetest.Await(t, "SRV records are found", func() error {
		_, srvs, err := r.LookupSRV(t.Context(), "web", "tcp", "lb.test")
		if err == nil && (len(srvs) != 3 || srvs[0].Port != 9443) {
			err = fmt.Errorf("%+v", srvs)
		}
		return err
	})
	ips, err := r.LookupHost(t.Context(), "proxy-1.lb.test")
	if err != nil || len(ips) != 1 || ips[0] != "10.0.0.2" {
		t.Error(ips, err)
	}
	if _, err := r.LookupHost(t.Context(), "nobody.lb.test"); err == nil ||
		!err.(*net.DNSError).IsNotFound {
		t.Error(err)
	}
}
