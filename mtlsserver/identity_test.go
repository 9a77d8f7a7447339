package mtlsserver

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"
	"time"
)

// Each case fails a single check and passes all others, so that the client would be admitted
// without that check.
func TestEachCheckRefusesAnOtherwiseGoodCertificate(t *testing.T) {
	ca, other := newAuthority(t, "ca"), newAuthority(t, "ca")
	sub, stranger := ca.sub(t), newAuthority(t, "stranger")
	subsub, twin := sub.sub(t), ca.certify(t, "ca")
	a := &Authenticator{CAs: []*x509.Certificate{ca.cert},
		Users: StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}}
	rsa1024 := mustKey(rsa.GenerateKey(rand.Reader, 1024))
	rsa2048 := mustKey(rsa.GenerateKey(rand.Reader, 2048))
	p224 := mustKey(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))
	p384 := mustKey(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)

	type setup struct {
		leaf  *x509.Certificate
		cs    tls.ConnectionState
		app   string
		by    *authority // issues another leaf, if set
		chain []*x509.Certificate
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
		{"unrelated certificates behind it", func(s *setup) {
			s.chain = []*x509.Certificate{sub.cert, other.cert, ca.cert}
		}, ""},
		{"TLS 1.2", func(s *setup) { s.cs.Version = tls.VersionTLS12 }, OldTLS},
		{"resumed", func(s *setup) { s.cs.DidResume = true }, NoProof},
		{"no certificate", func(s *setup) { s.cs.PeerCertificates = nil }, NoCertificate},
		{"an extension that nobody knows", func(s *setup) {
			s.leaf.UnhandledCriticalExtensions = []asn1.ObjectIdentifier{{1, 2, 3}}
		}, UnknownExtension},
		{"expired", func(s *setup) { s.leaf.NotAfter = time.Now().Add(-time.Second) }, Expired},
		{"not yet valid", func(s *setup) {
			s.leaf.NotBefore = time.Now().Add(time.Minute)
		}, NotYetValid},
		{"signed with SHA-1", func(s *setup) {
			s.leaf.SignatureAlgorithm = x509.ECDSAWithSHA1
		}, WeakSignature},
		{"a CA's", func(s *setup) { s.leaf.IsCA = true }, IsCA},
		{"may sign certificates", func(s *setup) {
			s.leaf.KeyUsage |= x509.KeyUsageCertSign
		}, IsCA},
		{"may sign CRLs", func(s *setup) { s.leaf.KeyUsage |= x509.KeyUsageCRLSign }, IsCA},
		{"the signature is another's", func(s *setup) {
			s.leaf.RawTBSCertificate = bytes.Replace(s.leaf.RawTBSCertificate,
				[]byte{0x0a, 0x11, 0xce}, []byte{0x0a, 0x11, 0xcf}, 1)
		}, UnknownCA},
		{"by a sub-CA that is sent along", func(s *setup) {
			s.by, s.chain = sub, []*x509.Certificate{sub.cert}
		}, NotDirect},
		{"by a sub-CA and the CA", func(s *setup) {
			s.by, s.chain = sub, []*x509.Certificate{ca.cert, sub.cert}
		}, NotDirect},
		{"by a sub-CA of a sub-CA", func(s *setup) {
			s.by, s.chain = subsub, []*x509.Certificate{subsub.cert, sub.cert}
		}, NotDirect},
		{"by a sub-CA that is not sent along", func(s *setup) { s.by = sub }, UnknownCA},
		{"by another CA of that name", func(s *setup) { s.by = other }, UnknownCA},
		{"by another CA of that name, which the CA has signed", func(s *setup) {
			s.by, s.chain = twin, []*x509.Certificate{twin.cert}
		}, NotDirect},
		{"by a stranger", func(s *setup) {
			s.by, s.chain = stranger, []*x509.Certificate{stranger.cert}
		}, UnknownCA},
		{"may not sign", func(s *setup) {
			s.leaf.KeyUsage = x509.KeyUsageKeyEncipherment
		}, BadKeyUsage},
		{"no extended key usage", func(s *setup) { s.leaf.ExtKeyUsage = nil }, BadExtKeyUsage},
		{"any extended key usage", func(s *setup) {
			s.leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}, BadExtKeyUsage},
		{"server's", func(s *setup) {
			s.leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, BadExtKeyUsage},
		{"RSA-1024", func(s *setup) { s.leaf.PublicKey = rsa1024.Public() }, WeakKey},
		{"P-224", func(s *setup) { s.leaf.PublicKey = p224.Public() }, WeakKey},
		{"a key of no known kind", func(s *setup) { s.leaf.PublicKey = "key" }, WeakKey},
		{"serial 0", func(s *setup) { s.leaf.SerialNumber = new(big.Int) }, BadSerial},
		{"negative serial", func(s *setup) {
			s.leaf.SerialNumber = big.NewInt(-0xa11ce)
		}, BadSerial},
		{"serial of 21 octets", func(s *setup) {
			s.leaf.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160)
		}, BadSerial},
		{"nobody's serial", func(s *setup) {
			s.leaf.SerialNumber = big.NewInt(0xb0b)
		}, UnknownSerial},
		{"another app", func(s *setup) { s.app = "db" }, AppNotAllowed},
		{"no app", func(s *setup) { s.app = "" }, AppNotAllowed},
	} {
		t.Run(test.name, func(t *testing.T) {
			leaf := ca.issue(t, leafOf(0xa11ce)).Leaf
			s := &setup{leaf: leaf, app: "web", cs: tls.ConnectionState{
				Version:          tls.VersionTLS13,
				PeerCertificates: []*x509.Certificate{leaf},
			}}
			test.change(s)
			if s.by != nil {
				s.cs.PeerCertificates[0] = s.by.issue(t, leafOf(0xa11ce)).Leaf
			}
			s.cs.PeerCertificates = append(s.cs.PeerCertificates, s.chain...)
			id, err := a.Identify(s.cs, s.app)
			var refusal *Refusal
			switch {
			case test.want == "" && (err != nil || id.User.Name != "alice" || id.Serial != "a11ce"):
				t.Fatalf("Identify = %+v, %v, want alice", id, err)
			case test.want != "" &&
				(!errors.As(err, &refusal) || refusal.Reason != test.want || id != nil):
				t.Fatalf("Identify = %+v, %v, want %s", id, err, test.want)
			}
		})
	}
}

// A refusal names the user whose certificate it is, but only if a CA of this server is its issuer.
func TestRefusalNamesTheUserOfAKnownCA(t *testing.T) {
	first, second, stranger := newAuthority(t, "1"), newAuthority(t, "2"), newAuthority(t, "3")
	a := &Authenticator{CAs: []*x509.Certificate{first.cert, second.cert},
		Users: StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}}
	expired := leafOf(0xa11ce)
	expired.NotAfter = time.Now().Add(-time.Minute)
	for _, test := range []struct {
		name     string
		ca       *authority
		leaf     *x509.Certificate
		keyID    string
		wantUser string
	}{
		{"expired, of the first CA", first, expired, KeyID(first.cert), "alice"},
		{"expired, of the second CA", second, expired, KeyID(second.cert), "alice"},
		{"expired, of another CA", stranger, expired, "", ""},
		{"nobody's", first, leafOf(0xb0b), KeyID(first.cert), ""},
	} {
		_, err := a.Identify(tls.ConnectionState{Version: tls.VersionTLS13,
			PeerCertificates: []*x509.Certificate{test.ca.issue(t, test.leaf).Leaf}}, "web")
		refusal, ok := errors.AsType[*Refusal](err)
		if !ok || refusal.User != test.wantUser || refusal.Claim.CA != test.keyID {
			t.Errorf("%s: %+v, want user %q and the KeyID %q", test.name, err, test.wantUser,
				test.keyID)
		}
	}
}

func TestIdentityExpiresWithTheCertificateOrItsCA(t *testing.T) {
	ca := newAuthority(t, "ca")
	a := &Authenticator{CAs: []*x509.Certificate{ca.cert},
		Users: StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}}
	for _, after := range []time.Duration{-time.Minute, time.Minute} {
		tmpl := leafOf(0xa11ce)
		tmpl.NotAfter = ca.cert.NotAfter.Add(after)
		leaf := ca.issue(t, tmpl).Leaf
		id, err := a.Identify(tls.ConnectionState{
			Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{leaf},
		}, "web")
		if want := ca.cert.NotAfter.Add(min(after, 0)); err != nil || !id.Expires.Equal(want) {
			t.Errorf("leaf %v after the CA: Identify = %+v, %v, want it to expire at %v", after,
				id, err, want)
		}
	}
}

func mustKey[K crypto.Signer](key K, err error) K {
	if err != nil {
		panic(err)
	}
	return key
}

// A renewed CA has the old one's name and key, so its certificates stay valid until the new CA
// expires. A CA with another key is another CA.
func TestSignatureRemainsValidWhileACAHasItsNameAndKey(t *testing.T) {
	ca := newAuthority(t, "ca")
	users := StaticUsers{"a11ce": {Name: "alice", Apps: []string{"web"}}}
	a := &Authenticator{CAs: []*x509.Certificate{ca.cert}, Users: users}
	id, err := a.Identify(tls.ConnectionState{Version: tls.VersionTLS13,
		PeerCertificates: []*x509.Certificate{ca.issue(t, leafOf(0xa11ce)).Leaf}}, "web")
	must(t, err)
	renewed := ca.renewed(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Minute) })
	for _, test := range []struct {
		name string
		cas  []*x509.Certificate
		ok   bool
	}{
		{"the same", []*x509.Certificate{ca.cert}, true},
		{"renewed", []*x509.Certificate{newAuthority(t, "ca").cert, renewed.cert}, true},
		{"another of that name", []*x509.Certificate{newAuthority(t, "ca").cert}, false},
		{"the key with another name", []*x509.Certificate{ca.renewed(t, func(c *x509.Certificate) {
			c.Subject.CommonName = "new"
		}).cert}, false},
		{"none", nil, false},
	} {
		again, err := (&Authenticator{CAs: test.cas, Users: users}).recheck(id, "web")
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
		if test.name == "renewed" && !again.Expires.Equal(renewed.cert.NotAfter) {
			t.Errorf("it expires at %v, want the new CA's %v", again.Expires, renewed.cert.NotAfter)
		}
	}
}
