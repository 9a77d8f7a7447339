package mtlsserver

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"testing"
	"time"
)

// 1,000 connections from 50 addresses say nothing. None takes a handshake place from a client.
func TestSilentStrangersDoNotKeepClientsOut(t *testing.T) {
	l := newLab(t, nil)
	const strangers, addresses = 1000, 50
	for i := range strangers {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%addresses))}}
		c, err := d.Dial("tcp", l.addr("web"))
		if err != nil && strings.Contains(err.Error(), "assign requested address") {
			t.Skip("127.0.1.1 is not ours here")
		}
		must(t, err)
		defer c.Close()
	}
	for range 50 {
		l.in(t, "web", &l.alice).Close()
	}
	if open := l.server.Apps()["web"].Stats().Open; open < strangers {
		t.Errorf("%d connections are open, want the %d strangers still waiting", open, strangers)
	}
}

// What a client presents beside its leaf is not looked at, so refusing it costs no more than
// refusing the leaf. A chain of the client's own making would take a hundred signatures to verify.
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

// A server certificate that has expired since it was loaded stays in force, and users can still be
// removed.
func TestExpiredFilesDoNotBlockARemoval(t *testing.T) {
	l := newLab(t, func(l *lab) {
		soon := serverOf(7)
		soon.NotAfter = time.Now().Add(2 * time.Second)
		l.config.TLS.Cert, l.config.TLS.Key = writePEM(t, t.TempDir(), "soon", l.ca.issue(t, soon))
	})
	l.log.await(t, "a warning of expiry", func(e entry) bool {
		return e["msg"] == "certificate expires soon" && e["key"] == "tls.cert"
	})
	c := l.dial(t, "web", &l.alice)
	must(t, greeted(c, "web"))
	for _, cert := range l.server.Certificates() {
		if cert.Key == "tls.cert" {
			time.Sleep(time.Until(cert.NotAfter) + 1100*time.Millisecond) // the wall clock decides
		}
	}
	changes, err := l.server.Reload(l.with(func(c *Config) { c.Users = c.Users[1:] }))
	must(t, err)
	if len(changes.Users.Removed) != 1 || changes.Ended != 1 {
		t.Errorf("changes %+v, want alice removed and her connection ended", changes)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	must(t, ended(c))
}
