package mtlsserver

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A Reason says in one word why a connection ended. It is one of the constants, or the text of an
// [lbproxy.EndReason].
type Reason string

const (
	// The handshake made way for others (Handshake.MaxConcurrent).
	TooManyHandshakes Reason = "too-many-handshakes"

	TooManyFromAddress Reason = "too-many-from-address" // Handshake.MaxPerAddress
	HandshakeTimeout   Reason = "handshake-timeout"     // Handshake.Timeout
	HandshakeTooLarge  Reason = "handshake-too-large"   // Handshake.MaxBytes

	// A trusted balancer sent no valid PROXY protocol header (App.AcceptProxy).
	NoProxyHeader Reason = "no-proxy-header"

	NotTLS          Reason = "not-tls"           // the first bytes are not TLS
	OldTLS          Reason = "old-tls"           // TLS before 1.3
	WrongServerName Reason = "wrong-server-name" // see AppTLS.ServerName

	// The certificate is missing, or it is not one that this server accepts from clients.
	NoCertificate    Reason = "no-certificate"    // the client sent none
	BadCertificate   Reason = "bad-certificate"   // cannot be parsed, as with a negative serial
	UnknownExtension Reason = "unknown-extension" // has an unknown critical extension
	WeakSignature    Reason = "weak-signature"    // signed with SHA-1 or worse
	UnknownCA        Reason = "unknown-ca"        // self-signed, or issued by another CA
	NotYetValid      Reason = "not-yet-valid"     // its NotBefore is in the future
	Expired          Reason = "expired"           // at the handshake, or later
	NotDirect        Reason = "not-direct"        // issued by an intermediate CA
	IsCA             Reason = "is-ca"             // it may sign other certificates
	BadKeyUsage      Reason = "bad-key-usage"     // no digitalSignature
	BadExtKeyUsage   Reason = "bad-ext-key-usage" // does not list clientAuth
	WeakKey          Reason = "weak-key"          // below RSA 2048 or P-256, or unknown
	BadSerial        Reason = "bad-serial"        // not positive, or more than 20 octets

	UnknownSerial    Reason = "unknown-serial"    // no user has this serial
	OtherCertificate Reason = "other-certificate" // the serial is listed for another certificate
	AppNotAllowed    Reason = "app-not-allowed"   // the user may not reach this app

	NoProof         Reason = "no-proof"         // the client does not hold the certificate's key
	ClientGone      Reason = "client-gone"      // the client left before the handshake was done
	ClientAlert     Reason = "client-alert"     // the client refused our certificate, for example
	HandshakeFailed Reason = "handshake-failed" // any other failure

	AppRemoved Reason = "app-removed" // by a reload, before the handshake was done
	Revoked    Reason = "revoked"     // by a reload that removed the user, serial, app, right or CA
)

// allReasons are the constants above. Each has a metric from the start, so that the first refusal
// shows as an increase.
var allReasons = []Reason{
	TooManyHandshakes, TooManyFromAddress, HandshakeTimeout, HandshakeTooLarge, NoProxyHeader,
	NotTLS, OldTLS, WrongServerName, NoCertificate, BadCertificate, UnknownExtension,
	WeakSignature, UnknownCA, NotYetValid, Expired, NotDirect, IsCA, BadKeyUsage, BadExtKeyUsage,
	WeakKey, BadSerial, UnknownSerial, OtherCertificate, AppNotAllowed, NoProof, ClientGone,
	ClientAlert, HandshakeFailed, AppRemoved, Revoked,
}

// String returns the reason's word.
func (r Reason) String() string { return string(r) }

// A Refusal is the error for a client that is refused or whose connection the server has ended.
type Refusal struct {
	Reason Reason
	Err    error // details; may be nil

	// Claim is the certificate that the client presented, if it could be parsed. User is the name
	// of the user who holds it, if there is one. The client may not have proved either.
	Claim *Claim
	User  string
}

// Error returns the reason and the details.
func (r *Refusal) Error() string {
	if r.Err != nil {
		return fmt.Sprintf("mtlsserver: refused: %s: %v", r.Reason, r.Err)
	}
	return "mtlsserver: refused: " + string(r.Reason)
}

// Unwrap returns r.Err.
func (r *Refusal) Unwrap() error { return r.Err }

// A Claim is a certificate as Users look it up: by its serial and its issuer.
type Claim struct {
	Cert   *x509.Certificate
	Serial Serial // Cert's; empty if it is not valid
	CA     string // the KeyID of Cert's issuer; empty if Authenticator.CAs lacks the issuer
}

// KeyID returns the SHA-256 of a certificate's public key (its SubjectPublicKeyInfo) in hex. A
// user's serials name their CA by it. It stays the same when the CA is renewed with its key.
func KeyID(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Users is a store of the holders of certificates. Lookup returns the user who holds the claimed
// certificate and true, or nil and false if there is none. If the store lists the serial for
// another certificate, Lookup may return that certificate's user and false.
//
// Handshakes call Lookup before the client has proved anything, so it must answer from memory. It
// must be safe for concurrent use. The User it returns must not change; a later call may return
// another one.
type Users interface {
	Lookup(Claim) (*User, bool)
}

// StaticUsers maps each serial to its user, for a server with a single CA.
type StaticUsers map[Serial]*User

// Lookup implements [Users].
func (u StaticUsers) Lookup(c Claim) (*User, bool) {
	user, ok := u[c.Serial]
	return user, ok
}

// An Identity names the user and the certificate of a client.
type Identity struct {
	User    *User
	Serial  Serial
	Expires time.Time // when the certificate or its CA expires, whichever is first

	claim Claim
	ca    *x509.Certificate
}

// An Authenticator identifies clients by their certificates and decides which apps they may reach.
// Use it with a tls.Config that has RequireAnyClientCert, MinVersion VersionTLS13 and
// SessionTicketsDisabled. Identify refuses resumed sessions, so without SessionTicketsDisabled
// about half of the connections of a client with tickets would fail.
//
// Identify verifies the certificate itself, against CAs alone. RequireAndVerifyClientCert works
// too, but then crypto/tls verifies the certificate as well, and anyone can make that cost 30 ms
// of CPU by sending a long chain.
type Authenticator struct {
	CAs   []*x509.Certificate // the issuers of clients' certificates
	Users Users
}

// Identify returns the identity of a connection's client if it may reach app. Otherwise it returns
// a [*Refusal]. Call it for each connection, best in tls.Config.VerifyConnection: crypto/tls sends
// the client an alert for its error. At that point the client has not proved that it holds the
// certificate's key, so use the Identity only after the handshake has succeeded.
func (a *Authenticator) Identify(cs tls.ConnectionState, app string) (*Identity, error) {
	switch {
	case cs.Version != tls.VersionTLS13:
		return nil, &Refusal{Reason: OldTLS}
	case cs.DidResume: // nobody has looked at the certificate
		return nil, &Refusal{Reason: NoProof}
	case len(cs.PeerCertificates) == 0:
		return nil, &Refusal{Reason: NoCertificate}
	}
	leaf := cs.PeerCertificates[0]
	claim := Claim{Cert: leaf}
	claim.Serial, _ = SerialOf(leaf)
	isIssuer := func(ca *x509.Certificate) bool { return issues(ca, leaf) }
	if i := slices.IndexFunc(a.CAs, isIssuer); i >= 0 {
		claim.CA = KeyID(a.CAs[i])
	}
	ca, reason, err := a.verify(leaf, cs.PeerCertificates[1:])
	if reason == "" {
		claim.CA = KeyID(ca)
		reason = usable(leaf)
	}
	if reason != "" {
		refusal := &Refusal{Reason: reason, Err: err, Claim: &claim}
		if claim.CA != "" && claim.Serial != "" {
			if user, _ := a.Users.Lookup(claim); user != nil {
				refusal.User = user.Name
			}
		}
		return nil, refusal
	}
	return a.authorize(claim, ca, app)
}

// recheck returns the current identity of a client that Identify has accepted, if it may still
// reach app. It does not verify the signature again: a CA of the same name and key would accept it.
func (a *Authenticator) recheck(id *Identity, app string) (*Identity, error) {
	for _, ca := range a.CAs {
		sameName := bytes.Equal(ca.RawSubject, id.ca.RawSubject)
		sameKey := bytes.Equal(ca.RawSubjectPublicKeyInfo, id.ca.RawSubjectPublicKeyInfo)
		if sameName && sameKey {
			return a.authorize(id.claim, ca, app)
		}
	}
	return nil, &Refusal{Reason: UnknownCA, Claim: &id.claim}
}

// authorize looks up the user of a certificate that ca has issued, and checks the user's apps.
func (a *Authenticator) authorize(
	claim Claim, ca *x509.Certificate, app string,
) (*Identity, error) {
	user, ok := a.Users.Lookup(claim)
	switch {
	case user == nil:
		return nil, &Refusal{Reason: UnknownSerial, Claim: &claim}
	case !ok:
		return nil, &Refusal{Reason: OtherCertificate, Claim: &claim, User: user.Name}
	case !slices.Contains(user.Apps, app):
		return nil, &Refusal{Reason: AppNotAllowed, Claim: &claim, User: user.Name}
	}
	expires := claim.Cert.NotAfter
	if ca.NotAfter.Before(expires) {
		expires = ca.NotAfter
	}
	return &Identity{user, claim.Serial, expires, claim, ca}, nil
}

// issues reports whether leaf names ca as its issuer.
func issues(ca, leaf *x509.Certificate) bool { return bytes.Equal(ca.RawSubject, leaf.RawIssuer) }

// verify returns the CA that has issued leaf directly, or the reason why none has. It checks at
// most one signature among the client's other certificates, and with our CA's key: a long chain
// costs the client nothing to send, but would cost the server much to verify.
func (a *Authenticator) verify(
	leaf *x509.Certificate, others []*x509.Certificate,
) (ca *x509.Certificate, _ Reason, err error) {
	switch now := time.Now(); {
	case len(leaf.UnhandledCriticalExtensions) > 0:
		id := leaf.UnhandledCriticalExtensions[0]
		return nil, UnknownExtension, fmt.Errorf("critical extension %v", id)
	case now.Before(leaf.NotBefore):
		from := leaf.NotBefore.UTC().Format(time.RFC3339)
		return nil, NotYetValid, fmt.Errorf("valid from %s", from)
	case now.After(leaf.NotAfter):
		until := leaf.NotAfter.UTC().Format(time.RFC3339)
		return nil, Expired, fmt.Errorf("expired at %s", until)
	}
	err = errors.New("no CA of this server has its issuer's name")
	for _, ca := range a.CAs {
		if !issues(ca, leaf) {
			continue
		}
		if slices.Contains(weakSignatures, leaf.SignatureAlgorithm) {
			return nil, WeakSignature, fmt.Errorf("signed with %v", leaf.SignatureAlgorithm)
		}
		_, err = leaf.Verify(x509.VerifyOptions{
			Roots:     poolOf(ca),
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err == nil {
			return ca, "", nil
		}
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
			return nil, invalidReason(invalid), err
		}
	}
	if a.certified(leaf, others) {
		return nil, NotDirect, nil
	}
	return nil, UnknownCA, err
}

var weakSignatures = []x509.SignatureAlgorithm{
	x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1,
}

// invalidReason returns the Reason for a certificate that the CA has signed and crypto/x509 finds
// invalid. The expired certificate may also be the CA's.
func invalidReason(invalid x509.CertificateInvalidError) Reason {
	switch invalid.Reason {
	case x509.IncompatibleUsage:
		return BadExtKeyUsage
	case x509.Expired:
		if time.Now().Before(invalid.Cert.NotBefore) {
			return NotYetValid
		}
		return Expired
	}
	return NotDirect
}

// certified reports whether leaf's issuer is among others, and one of a.CAs has signed one of them.
func (a *Authenticator) certified(leaf *x509.Certificate, others []*x509.Certificate) bool {
	if !slices.ContainsFunc(others, func(c *x509.Certificate) bool { return issues(c, leaf) }) {
		return false
	}
	for _, c := range others {
		for _, ca := range a.CAs {
			if issues(ca, c) && !c.Equal(ca) {
				return c.CheckSignatureFrom(ca) == nil
			}
		}
	}
	return false
}

// usable returns the reason why leaf cannot be a client's certificate; empty if it can.
func usable(leaf *x509.Certificate) Reason {
	switch {
	case leaf.IsCA, leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return IsCA
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return BadKeyUsage
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return BadExtKeyUsage
	case !strong(leaf.PublicKey):
		return WeakKey
	}
	if _, err := SerialOf(leaf); err != nil {
		return BadSerial
	}
	return ""
}

func strong(key any) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= 2048
	case *ecdsa.PublicKey:
		return key.Curve.Params().BitSize >= 256
	case ed25519.PublicKey:
		return true
	}
	return false
}
