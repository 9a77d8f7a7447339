package mtlsserver

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// dialFrom connects to addr from a loopback address. Linux has all of 127.0.0.0/8.
func dialFrom(a, b, c byte, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, a, b, c)}}
	return d.Dial("tcp", addr)
}

// needLoopback skips t on systems without all of 127.0.0.0/8.
func needLoopback(t *testing.T, addr string) {
	t.Helper()
	c, err := dialFrom(1, 1, 1, addr)
	if err != nil && strings.Contains(err.Error(), "assign requested address") {
		t.Skip("127.1.1.1 is not ours here")
	}
	must(t, err)
	c.Close()
}

// silent opens n connections from 50 addresses that send nothing.
func (l *lab) silent(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		c, err := dialFrom(1, 0, byte(1+i%50), l.addr("web"))
		must(t, err)
		t.Cleanup(func() { c.Close() })
	}
	proxytest.Eventually(t, "all silent connections are accepted", func() bool {
		return l.server.Apps()["web"].Stats().Open >= n
	})
}

// 1,000 connections from 50 addresses send nothing. They take no handshake place from a client and
// little memory; the bound covers both of their ends.
func TestSilentStrangersDoNotKeepClientsOut(t *testing.T) {
	const strangers, most = 1000, 24 << 10
	l := newLab(t, nil)
	needLoopback(t, l.addr("web"))
	before := memoryInUse()
	l.silent(t, strangers)
	if each := (memoryInUse() - before) / strangers; each > most && !proxytest.Race {
		t.Errorf("a silent connection takes %d bytes, want at most %d", each, most)
	} else {
		t.Logf("a silent connection takes %d bytes, both ends together", each)
	}
	for range 50 {
		l.in(t, "web", &l.alice).Close()
	}
	if open := l.server.Apps()["web"].Stats().Open; open < strangers {
		t.Errorf("%d connections are open, want the %d strangers still waiting", open, strangers)
	}
}

// memoryInUse returns the bytes of heap and stacks.
func memoryInUse() int64 {
	heap := proxytest.HeapInUse()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return heap + int64(m.StackInuse)
}

// Strangers stay silent, drip bytes, or make a slow handshake from an address of their own, and
// come back a second after they were cut. Clients who were there before them get through, even with
// a round trip of 200 ms. TestNewClientsGetInBesideStrangers is about new ones.
func TestStrangersOfAllKindsDoNotKeepClientsOut(t *testing.T) {
	silent, drips, slow, duration := 1000, 500, 2000, 2*time.Second
	if testing.Short() {
		silent, drips, slow, duration = 200, 100, 400, time.Second
	}
	l := newLab(t, nil)
	addr := l.addr("web")
	needLoopback(t, addr)
	come := func(d time.Duration) (near, far *visits) {
		near, far = &visits{}, &visits{}
		end := time.Now().Add(d)
		var clients sync.WaitGroup
		for i := range 32 {
			clients.Go(func() {
				for again := true; again; again = time.Now().Before(end) {
					far.add(l.visit(delayed(dialFrom(5, 0, byte(1+i), addr))))
				}
			})
		}
		for again := true; again; again = time.Now().Before(end) {
			near.add(l.visit(dialFrom(2, 0, 1, addr)))
			time.Sleep(10 * time.Millisecond)
		}
		clients.Wait()
		return near, far
	}
	quietNear, quietFar := come(duration / 4)

	over := make(chan struct{})
	var strangers sync.WaitGroup
	defer strangers.Wait()
	defer close(over)
	l.silent(t, silent)
	const each = 20 // strangers that a goroutine plays
	for first := 0; first < drips+slow; first += each {
		strangers.Go(func() {
			// not all at once
			time.Sleep(time.Second * time.Duration(first) / time.Duration(drips+slow))
			var conns [each]net.Conn
			for tick := time.Tick(time.Second); ; {
				for i := range conns {
					n := first + i
					from := [3]byte{3, 0, byte(1 + n%50)} // the drips have 50 addresses
					if n >= drips {
						from = [3]byte{4, byte(n / 200), byte(1 + n%200)}
					}
					conns[i] = drip(conns[i], from, addr)
				}
				select {
				case <-tick:
				case <-over:
					for _, c := range conns {
						if c != nil {
							c.Close()
						}
					}
					return
				}
			}
		})
	}
	gate := l.server.current.Load().gate
	proxytest.Eventually(t, "many strangers have lost their place", func() bool {
		gate.mu.Lock()
		defer gate.mu.Unlock()
		return gate.remembered[failed].Len() > slow/4
	})

	near, far := come(duration)
	for name, v := range map[string]*visits{
		"nearby": near, "nearby, without strangers": quietNear,
		"200 ms away": far, "200 ms away, without strangers": quietFar,
	} {
		t.Logf("%s: %v", name, v)
		if failed := len(v.errs); failed*100 > len(v.took)+failed {
			t.Errorf("%s: %d clients got in, %d did not: %v", name, len(v.took), failed, v.errs[0])
		}
	}
}

// drip sends another byte of a ClientHello that never ends, over a new connection if c is nil. It
// returns nil if the connection was cut.
func drip(c net.Conn, from [3]byte, addr string) net.Conn {
	b := []byte{0}
	if c == nil {
		var err error
		if c, err = dialFrom(from[0], from[1], from[2], addr); err != nil {
			return nil
		}
		b = []byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3} // how a long one begins
	}
	if _, err := c.Write(b); err != nil {
		c.Close()
		return nil
	}
	return c
}

// visit makes a client's handshake over raw, unless err says that there is none, and an exchange.
// It returns how long that took.
func (l *lab) visit(raw net.Conn, err error) (time.Duration, error) {
	if err != nil {
		return 0, err
	}
	defer raw.Close()
	start := time.Now()
	raw.SetDeadline(start.Add(patience))
	c := tls.Client(raw, l.clientConfig(&l.alice))
	if err = greeted(c, "web"); err == nil {
		err = echoed(c)
	}
	return time.Since(start), err
}

// visits hold the durations of visits and the errors of failed ones.
type visits struct {
	mu   sync.Mutex
	took []time.Duration
	errs []error
}

func (v *visits) add(took time.Duration, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		v.errs = append(v.errs, err)
	} else {
		v.took = append(v.took, took)
	}
}

func (v *visits) String() string {
	n := len(v.took)
	if n == 0 {
		return "no visits"
	}
	slices.Sort(v.took)
	part := func(percent int) time.Duration {
		return v.took[n*percent/100].Round(time.Millisecond / 10)
	}
	return fmt.Sprintf("%d of %d visits, median %v, 99%% within %v", n, n+len(v.errs), part(50),
		part(99))
}

// delayed returns a connection over which bytes take 100 ms to and from c, unless err says that
// there is no c.
func delayed(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	client, end := net.Pipe()
	go carry(c, end)
	go carry(end, c)
	return client, nil
}

// carry copies src to dst, each piece 100 ms after it came, and then closes both.
func carry(dst, src net.Conn) {
	type piece struct {
		bytes []byte
		due   time.Time
	}
	pieces := make(chan piece, 100)
	go func() {
		defer close(pieces)
		for b := make([]byte, 32<<10); ; {
			n, err := src.Read(b)
			if err != nil {
				return
			}
			pieces <- piece{bytes.Clone(b[:n]), time.Now().Add(100 * time.Millisecond)}
		}
	}()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := dst.Write(p.bytes); err != nil {
			src.Close() // ends the reads; bytes still under way are discarded
		}
	}
	dst.Close()
	src.Close()
}

// The server ignores the certificates that a client presents beside its leaf, so refusing a chain
// costs no more than refusing the leaf. Verifying a chain made to cost much would take a hundred
// signatures.
func TestRefusalOfAChainIsCheap(t *testing.T) {
	ca := newAuthority(t, "CA")
	foreign := newAuthority(t, "CA") // of the same name
	leaf := foreign.issue(t, leafOf(0xa11ce))
	auth := Authenticator{CAs: []*x509.Certificate{ca.cert}, Users: listed{}}
	alone := tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf.Leaf}}
	chained := alone
	for sub := foreign; len(chained.PeerCertificates) < 60; {
		sub = sub.certify(t, "CA")
		chained.PeerCertificates = append(chained.PeerCertificates, sub.cert)
	}
	refuse := func(cs tls.ConnectionState) float64 {
		return testing.AllocsPerRun(10, func() {
			if _, err := auth.Identify(cs, "web"); err == nil {
				t.Fatal("a foreign certificate was let in")
			}
		})
	}
	// Allocations count the work without a clock: verifying a signature allocates.
	if one, many := refuse(alone), refuse(chained); many > 2.2*one {
		t.Errorf("refusing a chain takes %v allocations, a leaf alone %v", many, one)
	}
}

// A server certificate and the CA of an upstream have expired since they were loaded. They stay in
// force, and users can still be removed.
func TestExpiredFilesDoNotBlockARemoval(t *testing.T) {
	t.Parallel()
	keys := []string{"tls.cert", "apps[1].upstreams[0].tls.ca"}
	l := newLab(t, func(l *lab) {
		expires := time.Now().Add(2 * time.Second)
		soon := serverOf(7)
		soon.NotAfter = expires
		l.config.TLS.Cert, l.config.TLS.Key = writePEM(t, t.TempDir(), "soon", l.ca.issue(t, soon))
		ca := newAuthority(t, "upstream CA").renewed(t, func(c *x509.Certificate) {
			c.NotAfter = expires
		})
		file, _ := writePEM(t, l.dir, "upstream-ca",
			tls.Certificate{Certificate: [][]byte{ca.cert.Raw}})
		l.config.Apps[1].Upstreams[0].TLS = &UpstreamTLS{CA: file}
	})
	var last time.Time
	for _, cert := range l.server.Certificates() {
		if slices.Contains(keys, cert.Key) {
			last = cert.NotAfter
		}
	}
	for _, key := range keys {
		l.log.await(t, "a warning of expiry", func(e entry) bool {
			return e["msg"] == "certificate expires soon" && e["key"] == key
		})
	}
	c := l.dial(t, "web", &l.alice)
	must(t, greeted(c, "web"))
	time.Sleep(time.Until(last) + 1100*time.Millisecond) // the wall clock decides
	changes, err := l.server.Reload(l.with(func(c *Config) { c.Users = c.Users[1:] }))
	must(t, err)
	if len(changes.Users.Removed) != 1 || changes.Ended != 1 {
		t.Errorf("changes %+v, want alice removed and her connection ended", changes)
	}
	l.wantReason(t, c, string(Revoked))
	raw, err := net.Dial("tcp", l.addr("web"))
	must(t, err)
	defer raw.Close()
	config := l.clientConfig(&l.alice)
	config.InsecureSkipVerify = true // the client would mind the expired certificate
	l.wantReason(t, tls.Client(raw, config), string(UnknownSerial))
}
