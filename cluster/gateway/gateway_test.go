package gateway

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/miekg/dns"
)

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "4") // the tests mostly wait
	proxytest.Main(m)
}

// A source returns the proxies that the test sets.
type source struct {
	mu    sync.Mutex
	tally cluster.Tally
	err   error
}

func (s *source) Live(context.Context) (cluster.Tally, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tally, s.err
}

func (s *source) set(err error, proxies ...cluster.Proxy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tally.Proxies, s.err = proxies, err
}

var testZone = &Zone{Name: "LB.test", NS: []string{"ns1.lb.test=192.0.2.53", "ns.elsewhere.test"}}

func proxies(n int) (all []cluster.Proxy) {
	for i := range n {
		all = append(all, cluster.Proxy{
			ID: fmt.Sprintf("proxy-%d", i), Addr: fmt.Sprintf("10.0.%d.%d", i/250, i%250+1),
			Ports: map[string]int{"web": 9443},
		})
	}
	return all
}

func TestWrongZonesAreRefused(t *testing.T) {
	for _, z := range []Zone{
		{}, {Name: "."}, {Name: "a b", NS: []string{"n"}}, {Name: "a.test"},
		{Name: "a.test", NS: []string{""}},
		{Name: "a.test", NS: []string{"n=x"}}, {Name: "a.test", NS: []string{"n;$INCLUDE"}},
		{Name: "a.test", NS: []string{"n"}, TTL: 25 * time.Hour},
		{Name: "*.test", NS: []string{"n"}}, {Name: "a.test/b", NS: []string{"n"}},
		{Name: "a..test", NS: []string{"n"}}, {Name: "-a.test", NS: []string{"n"}},
		{Name: strings.Repeat("a", 64) + ".test", NS: []string{"n"}},
		{Name: strings.Repeat("a.", 130) + "test", NS: []string{"n"}},
	} {
		if z.Check() == nil {
			t.Errorf("%+v passes", z)
		}
	}
	if (*Zone)(nil).Check() == nil {
		t.Error("no zone passes")
	}
	if err := testZone.Check(); err != nil {
		t.Error(err)
	}
}

func TestWhoIsNamed(t *testing.T) {
	all := proxies(4)
	all[0].Draining = true
	all[1].Capacity, all[1].Open = 10, 10
	all[2].Capacity, all[2].Open = 10, 9
	all[3].Addr, all[3].Ports = "2001:db8::1", map[string]int{"web": 1, "not a label": 2}
	text := testZone.Text(cluster.Tally{Proxies: all}, 7)
	for _, want := range []string{
		"lb.test.\t1\tIN\tSOA\tns1.lb.test. hostmaster.lb.test. 7 60 5 86400 1",
		"lb.test.\t1\tIN\tNS\tns.elsewhere.test.",
		"ns1.lb.test.\t1\tIN\tA\t192.0.2.53", "\nlb.test.\t1\tIN\tA\t10.0.0.3\n",
		"\nlb.test.\t1\tIN\tAAAA\t2001:db8::1\n",
		"_web._tcp.lb.test.\t1\tIN\tSRV\t0 101 9443 proxy-2.lb.test.",
		"SRV\t0 1001 1 proxy-3.lb.test.", "proxy-0.lb.test.\t1\tIN\tA\t10.0.0.1",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("not in the zone: %s", want)
		}
	}
	for _, no := range []string{"\nlb.test.\t1\tIN\tA\t10.0.0.1\n",
		"\nlb.test.\t1\tIN\tA\t10.0.0.2\n", "proxy-0.lb.test.\n", "label"} {
		if strings.Contains(text, no) {
			t.Errorf("in the zone: %q", no)
		}
	}
	// A draining or full proxy is better than none.
	text = testZone.Text(cluster.Tally{Proxies: all[:2]}, 7)
	if !strings.Contains(text, "\nlb.test.\t1\tIN\tA\t10.0.0.1\n") ||
		!strings.Contains(text, "\nlb.test.\t1\tIN\tA\t10.0.0.2\n") {
		t.Error(text)
	}
	if t.Failed() {
		t.Log(text)
	}
}

func TestProxyKnownByName(t *testing.T) {
	text := testZone.Text(cluster.Tally{Proxies: []cluster.Proxy{{ID: "a", Addr: "Host.example.com",
		Ports: map[string]int{"web": 1}}}}, 7)
	if !strings.Contains(text, "SRV\t0 1001 1 host.example.com.") ||
		strings.Contains(text, "a.lb.test") {
		t.Error(text)
	}
	// An invalid name names no proxy.
	text = testZone.Text(cluster.Tally{Proxies: []cluster.Proxy{{ID: "a", Addr: "x\n$INCLUDE y",
		Ports: map[string]int{"web": 1}}}}, 7)
	if strings.Contains(text, "INCLUDE") || strings.Contains(text, "SRV") {
		t.Error(text)
	}
}

// serve runs a server of the test's own.
func serve(t *testing.T, src Source) *Server {
	t.Helper()
	s, _ := serveUntil(t, src)
	return s
}

// serveUntil runs a server until stop is called, or the test ends.
func serveUntil(t *testing.T, src Source) (s *Server, stop func()) {
	t.Helper()
	s, err := Listen("127.0.0.1:0", testZone, src, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

func ask(t *testing.T, s *Server, network string, bufsize uint16, name string,
	kind uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, kind)
	if bufsize > 0 {
		m.SetEdns0(bufsize, false)
	}
	c := dns.Client{Net: network, Timeout: storetest.Patience, UDPSize: bufsize}
	r, _, err := c.Exchange(m, s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestServer(t *testing.T) {
	t.Parallel()
	src := &source{err: errors.New("away")}
	s := serve(t, src)
	if r := ask(t, s, "udp", 0, "lb.test.", dns.TypeA); r.Rcode != dns.RcodeServerFailure {
		t.Error("before it knows of any proxy:", r)
	}
	src.set(nil, proxies(200)...)
	storetest.Await(t, "it knows of proxies", func() error {
		return storetest.Want(s.now.Load() != nil && s.now.Load().alive, "not yet")
	})
	for _, c := range []struct {
		network   string
		bufsize   uint16
		name      string
		kind      uint16
		rcode, n  int
		answering string
	}{
		{"udp", 0, "lb.test.", dns.TypeA, dns.RcodeSuccess, 29, ""},
		{"udp", 512, "LB.tEst.", dns.TypeA, dns.RcodeSuccess, 28, ""},
		{"udp", 4096, "lb.test.", dns.TypeA, dns.RcodeSuccess, 64, ""},
		{"tcp", 0, "lb.test.", dns.TypeA, dns.RcodeSuccess, 64, ""},
		{"udp", 1232, "_web._tcp.lb.test.", dns.TypeSRV, dns.RcodeSuccess, 20, ""},
		{"tcp", 0, "_web._tcp.lb.test.", dns.TypeSRV, dns.RcodeSuccess, 64, ""},
		{"udp", 0, "proxy-7.lb.test.", dns.TypeA, dns.RcodeSuccess, 1, "10.0.0.8"},
		{"udp", 0, "lb.test.", dns.TypeSOA, dns.RcodeSuccess, 1, "ns1.lb.test."},
		{"udp", 0, "lb.test.", dns.TypeNS, dns.RcodeSuccess, 2, ""},
		{"udp", 0, "lb.test.", dns.TypeANY, dns.RcodeSuccess, 1, "RFC8482"},
		{"udp", 0, "lb.test.", dns.TypeAAAA, dns.RcodeSuccess, 0, ""},
		{"udp", 0, "_tcp.lb.test.", dns.TypeA, dns.RcodeSuccess, 0, ""},
		{"udp", 0, "nobody.lb.test.", dns.TypeA, dns.RcodeNameError, 0, ""},
		{"udp", 0, "elsewhere.test.", dns.TypeA, dns.RcodeRefused, 0, ""},
		{"udp", 0, "test.", dns.TypeA, dns.RcodeRefused, 0, ""},
		{"tcp", 0, "lb.test.", dns.TypeAXFR, dns.RcodeRefused, 0, ""},
	} {
		r := ask(t, s, c.network, c.bufsize, c.name, c.kind)
		r.Compress = true // as it came
		few := len(r.Answer) < c.n || c.n < 20 && len(r.Answer) != c.n || len(r.Answer) > most
		if r.Rcode != c.rcode || few || r.Truncated || r.Len() > 4096 {
			t.Errorf("%s %d %s %s: %s, %d answers, %d bytes, truncated %v; want %s, %d", c.network,
				c.bufsize, c.name,
				dns.TypeToString[c.kind], dns.RcodeToString[r.Rcode], len(r.Answer), r.Len(),
				r.Truncated, dns.RcodeToString[c.rcode], c.n)
		}
		if c.answering != "" && !strings.Contains(r.Answer[0].String(), c.answering) {
			t.Errorf("%s: %v", c.name, r.Answer)
		}
		if c.network == "udp" && r.Len() > min(max(int(c.bufsize), 512), safeSize) {
			t.Errorf("%s: %d bytes", c.name, r.Len())
		}
		if len(r.Answer) == 0 && r.Rcode != dns.RcodeRefused && len(r.Ns) != 1 {
			t.Errorf("%s: no SOA, so for how long this is remembered is not said", c.name)
		}
	}

	// All of 200 are named, if not at once.
	seen := map[string]bool{}
	for range 100 {
		for _, rr := range ask(t, s, "tcp", 0, "lb.test.", dns.TypeA).Answer {
			seen[rr.(*dns.A).A.String()] = true
		}
	}
	if len(seen) != 200 {
		t.Errorf("%d of 200 proxies are named in 100 answers", len(seen))
	}

	src.set(nil)
	storetest.Await(t, "all are dead", func() error {
		if r := ask(t, s, "tcp", 0, "lb.test.", dns.TypeA); r.Rcode != dns.RcodeServerFailure {
			return errors.New(r.String())
		}
		return nil
	})
}

func TestServerGoesOnWithoutTheStore(t *testing.T) {
	t.Parallel()
	src := new(source)
	src.set(nil, proxies(1)...)
	s := serve(t, src)
	storetest.Await(t, "it knows of the proxy",
		func() error { return storetest.Want(s.now.Load() != nil, "not yet") })
	src.set(errors.New("away"))
	asked := s.now.Load()
	select { // two polls
	case <-time.After(2*pollEvery + 100*time.Millisecond):
	case <-t.Context().Done():
	}
	if r := ask(t, s, "udp", 0, "lb.test.", dns.TypeA); len(r.Answer) != 1 ||
		s.now.Load() != asked {
		t.Error(r)
	}
}

// Questions with forged addresses cause a bounded number of answers there; the rest are as small as
// the questions.
func TestAnswersToOneNetworkAreBounded(t *testing.T) {
	r := rates{seed: maphash.MakeSeed()}
	now := time.Now()
	allowed := func(ip string) (n int) {
		for range 1000 {
			if r.allow(netip.MustParseAddr(ip), now) {
				n++
			}
		}
		return n
	}
	if n := allowed("192.0.2.1"); n != answersPerSecond {
		t.Errorf("%d answers in a second", n)
	}
	if n := allowed("192.0.2.99") + allowed("::ffff:192.0.2.5"); n != 0 {
		t.Errorf("%d more to the same network", n)
	}
	if n := allowed("2001:db8:1:2ff::1") + allowed("2001:db8:1:200::1"); n != answersPerSecond {
		t.Errorf("%d answers to one /56", n)
	}
	now = now.Add(time.Second)
	if n := allowed("192.0.2.1"); n != answersPerSecond {
		t.Errorf("%d answers in the next second", n)
	}

	src := new(source)
	src.set(nil, proxies(64)...)
	s := serve(t, src)
	storetest.Await(t, "it knows of proxies",
		func() error { return storetest.Want(s.now.Load() != nil, "not yet") })
	c, err := net.Dial("udp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m := new(dns.Msg).SetQuestion("lb.test.", dns.TypeA)
	m.SetEdns0(1232, false)
	question, _ := m.Pack()
	storetest.Await(t, "an answer is no larger than the question", func() error {
		c.Write(question)
		buf := make([]byte, 4096)
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		return storetest.Want(n <= len(question) && buf[2]&2 != 0, fmt.Sprint(n, " bytes"))
	})
	if r := ask(t, s, "tcp", 0, "lb.test.", dns.TypeA); len(r.Answer) != 64 {
		t.Error("and by TCP there is one:", r)
	}
}

func TestFileIsWrittenWhenNamesChange(t *testing.T) {
	t.Parallel()
	src := new(source)
	src.set(nil, proxies(2)...)
	path := filepath.Join(t.TempDir(), "lb.zone")
	read := make(chan string, 10)
	failing := true
	f := &File{Zone: testZone, Path: path, Then: func(context.Context) error {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		if failing = !failing; failing {
			return errors.New("the server is restarting") // each second time
		}
		read <- string(text)
		return nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Keep(ctx, src) }()
	one := proxytest.Receive(t, "the first zone", read)
	if !strings.Contains(one, "10.0.0.1") || !strings.Contains(one, "10.0.0.2") {
		t.Error(one)
	}
	src.set(nil, proxies(1)...)
	two := proxytest.Receive(t, "the second, although the first time it was not read", read)
	if strings.Contains(two, "10.0.0.2") || serial(two) <= serial(one) {
		t.Error(two)
	}
	src.set(errors.New("away"))
	src.set(nil) // no proxy is live
	src.set(nil, proxies(3)...)
	if three := proxytest.Receive(t, "the third", read); !strings.Contains(three, "10.0.0.3") {
		t.Error(three)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
		t.Error("another user cannot read it:", info, err)
	}
	f.Path = filepath.Join(t.TempDir(), "no", "where")
	if err := f.Keep(t.Context(), src); err == nil {
		t.Error("a file that cannot be written is no error")
	}
}

func serial(zone string) (n uint32) {
	_, rest, _ := strings.Cut(zone, "hostmaster.lb.test. ")
	fmt.Sscan(rest, &n)
	return n
}
