package mtlsserver

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"testing"
	"time"
)

// Each guard has one case that is right in everything but what that guard looks at: without it the client is in.
func TestEachGuardOfTheDecisionRefusesWhatOnlyItRefuses(t *testing.T) {
	ca, other := newAuthority(t, "ca"), newAuthority(t, "ca")
	sub := ca.sub(t)
	a := &Authenticator{CA: ca.cert, Users: StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}}
	rsa1024, rsa2048 := mustKey(rsa.GenerateKey(rand.Reader, 1024)), mustKey(rsa.GenerateKey(rand.Reader, 2048))
	p224, p384 := mustKey(ecdsa.GenerateKey(elliptic.P224(), rand.Reader)), mustKey(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)

	type setup struct {
		leaf *x509.Certificate
		cs   tls.ConnectionState
		app  string
	}
	for _, test := range []struct {
		name   string
		change func(*setup)
		want   Reason
	}{
		{"nothing wrong", func(*setup) {}, ""},
		{"RSA-2048", func(s *setup) { s.leaf.PublicKey = rsa2048.Public() }, ""},
		{"P-384", func(s *setup) { s.leaf.PublicKey = p384.Public() }, ""},
		{"Ed25519", func(s *setup) { s.leaf.PublicKey = ed.Public() }, ""},
		{"a second chain, by way of a sub-CA", func(s *setup) {
			s.cs.VerifiedChains = append([][]*x509.Certificate{{s.leaf, sub.cert, ca.cert}}, s.cs.VerifiedChains...)
		}, ""},
		{"TLS 1.2", func(s *setup) { s.cs.Version = tls.VersionTLS12 }, OldTLS},
		{"resumed", func(s *setup) { s.cs.DidResume = true }, NoProof},
		{"no certificate", func(s *setup) { s.cs.PeerCertificates = nil }, NoCertificate},
		{"a CA's", func(s *setup) { s.leaf.IsCA = true }, IsCA},
		{"may sign certificates", func(s *setup) { s.leaf.KeyUsage |= x509.KeyUsageCertSign }, IsCA},
		{"may sign CRLs", func(s *setup) { s.leaf.KeyUsage |= x509.KeyUsageCRLSign }, IsCA},
		{"not verified", func(s *setup) { s.cs.VerifiedChains = nil }, NotDirect},
		{"by way of a sub-CA", func(s *setup) {
			s.cs.VerifiedChains = [][]*x509.Certificate{{s.leaf, sub.cert, ca.cert}}
		}, NotDirect},
		{"by a sub-CA in the pool", func(s *setup) { s.cs.VerifiedChains[0][1] = sub.cert }, NotDirect},
		{"by another CA of that name", func(s *setup) { s.cs.VerifiedChains[0][1] = other.cert }, NotDirect},
		{"the CA under another root", func(s *setup) { s.cs.VerifiedChains[0] = append(s.cs.VerifiedChains[0], other.cert) }, NotDirect},
		{"another's chain", func(s *setup) { s.cs.VerifiedChains[0][0] = sub.cert }, NotDirect},
		{"a root as its own chain", func(s *setup) { s.cs.VerifiedChains[0] = s.cs.VerifiedChains[0][:1] }, NotDirect},
		{"may not sign", func(s *setup) { s.leaf.KeyUsage = x509.KeyUsageKeyEncipherment }, BadKeyUsage},
		{"no extended key usage", func(s *setup) { s.leaf.ExtKeyUsage = nil }, BadExtKeyUsage},
		{"any extended key usage", func(s *setup) { s.leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, BadExtKeyUsage},
		{"server's", func(s *setup) { s.leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, BadExtKeyUsage},
		{"RSA-1024", func(s *setup) { s.leaf.PublicKey = rsa1024.Public() }, WeakKey},
		{"P-224", func(s *setup) { s.leaf.PublicKey = p224.Public() }, WeakKey},
		{"a key of no known kind", func(s *setup) { s.leaf.PublicKey = "key" }, WeakKey},
		{"serial 0", func(s *setup) { s.leaf.SerialNumber = new(big.Int) }, BadSerial},
		{"negative serial", func(s *setup) { s.leaf.SerialNumber = big.NewInt(-0xa11ce) }, BadSerial},
		{"serial of 21 octets", func(s *setup) { s.leaf.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }, BadSerial},
		{"nobody's serial", func(s *setup) { s.leaf.SerialNumber = big.NewInt(0xb0b) }, UnknownSerial},
		{"another app", func(s *setup) { s.app = "db" }, AppNotAllowed},
		{"no app", func(s *setup) { s.app = "" }, AppNotAllowed},
	} {
		t.Run(test.name, func(t *testing.T) {
			leaf := ca.issue(t, leafOf(0xa11ce)).Leaf
			s := &setup{leaf: leaf, app: "web", cs: tls.ConnectionState{
				Version:          tls.VersionTLS13,
				PeerCertificates: []*x509.Certificate{leaf},
				VerifiedChains:   [][]*x509.Certificate{{leaf, ca.cert}},
			}}
			test.change(s)
			id, err := a.Identify(s.cs, s.app)
			var refusal *Refusal
			switch {
			case test.want == "" && (err != nil || id.User.Name != "alice" || id.Serial != "a11ce"):
				t.Fatalf("Identify = %+v, %v, want alice", id, err)
			case test.want != "" && (!errors.As(err, &refusal) || refusal.Reason != test.want || id != nil):
				t.Fatalf("Identify = %+v, %v, want %s", id, err, test.want)
			}
		})
	}
}

func TestIdentityExpiresWithTheCertificateOrItsCA(t *testing.T) {
	ca := newAuthority(t, "ca")
	a := &Authenticator{CA: ca.cert, Users: StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}}
	for _, after := range []time.Duration{-time.Minute, time.Minute} {
		tmpl := leafOf(0xa11ce)
		tmpl.NotAfter = ca.cert.NotAfter.Add(after)
		leaf := ca.issue(t, tmpl).Leaf
		id, err := a.Identify(tls.ConnectionState{
			Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf, ca.cert}},
		}, "web")
		if want := ca.cert.NotAfter.Add(min(after, 0)); err != nil || !id.Expires.Equal(want) {
			t.Errorf("leaf %v after the CA: Identify = %+v, %v, want it to expire at %v", after, id, err, want)
		}
	}
}

func mustKey[K crypto.Signer](key K, err error) K {
	if err != nil {
		panic(err)
	}
	return key
}
