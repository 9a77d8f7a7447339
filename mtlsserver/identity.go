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

// A Reason says in a word what became of a connection. The set is closed: these, and every
// [lbproxy.EndReason].
type Reason string

const (
	// The client is not known, and nothing it said is proved.
	TooManyHandshakes  Reason = "too-many-handshakes"   // made way for another (Handshake.MaxConcurrent)
	TooManyFromAddress Reason = "too-many-from-address" // Handshake.MaxPerAddress
	HandshakeTimeout   Reason = "handshake-timeout"     // Handshake.Timeout
	HandshakeTooLarge  Reason = "handshake-too-large"   // Handshake.MaxBytes
	NoProxyHeader      Reason = "no-proxy-header"       // a trusted peer sent no proper PROXY header (App.AcceptProxy)
	NotTLS             Reason = "not-tls"               // what came first is not TLS
	OldTLS             Reason = "old-tls"               // before 1.3
	WrongServerName    Reason = "wrong-server-name"     // the client wants another server (App.TLS.ServerName)
	NoCertificate      Reason = "no-certificate"        // the client presents none
	BadCertificate     Reason = "bad-certificate"       // cannot be parsed, as with a negative serial
	UnknownExtension   Reason = "unknown-extension"     // has a critical extension that is not known here
	WeakSignature      Reason = "weak-signature"        // signed by SHA-1 or worse
	UnknownCA          Reason = "unknown-ca"            // self-signed, or by an issuer that is no CA of ours
	NotYetValid        Reason = "not-yet-valid"         // its date is in the future
	Expired            Reason = "expired"               // also if it expired while its connection was open
	NotDirect          Reason = "not-direct"            // issued below the CA: serials are unique to an issuer
	IsCA               Reason = "is-ca"                 // a certificate that may sign others is no client
	BadKeyUsage        Reason = "bad-key-usage"         // no digitalSignature
	BadExtKeyUsage     Reason = "bad-ext-key-usage"     // does not list clientAuth
	WeakKey            Reason = "weak-key"              // not RSA of 2048 bits or more, P-256, P-384, P-521, or Ed25519
	BadSerial          Reason = "bad-serial"            // not positive, or more than 20 octets
	UnknownSerial      Reason = "unknown-serial"        // of no user
	OtherCertificate   Reason = "other-certificate"     // the serial is listed for another certificate
	AppNotAllowed      Reason = "app-not-allowed"       // the user may not reach this app
	NoProof            Reason = "no-proof"              // the client does not hold the certificate's key
	ClientGone         Reason = "client-gone"           // ended the connection before its handshake was done
	ClientAlert        Reason = "client-alert"          // refused the server, as when it does not trust its certificate
	HandshakeFailed    Reason = "handshake-failed"      // otherwise
	AppRemoved         Reason = "app-removed"           // by a reload, before the handshake was done
	Revoked            Reason = "revoked"               // by a reload: the user, serial, app or right is gone, or the CA
)

// allReasons are the constants above. Each is a metric from the start, so that the first refusal is
// an increase.
var allReasons = []Reason{
	TooManyHandshakes, TooManyFromAddress, HandshakeTimeout, HandshakeTooLarge, NoProxyHeader, NotTLS,
	OldTLS, WrongServerName, NoCertificate, BadCertificate, UnknownExtension, WeakSignature, UnknownCA,
	NotYetValid, Expired, NotDirect, IsCA, BadKeyUsage, BadExtKeyUsage, WeakKey, BadSerial,
	UnknownSerial, OtherCertificate, AppNotAllowed, NoProof, ClientGone, ClientAlert, HandshakeFailed,
	AppRemoved, Revoked,
}

// String returns the reason's word.
func (r Reason) String() string { return string(r) }

// A Refusal is the error that says why a client is refused, or its connection ended.
type Refusal struct {
	Reason Reason
	Err    error // details; may be nil

	// What the client claims, without proof: its certificate, if it was parsed, and the name of
	// the user whose certificate that would be, if there is one.
	Claim *Claim
	User  string
}

func (r *Refusal) Error() string {
	if r.Err != nil {
		return fmt.Sprintf("mtlsserver: refused: %s: %v", r.Reason, r.Err)
	}
	return "mtlsserver: refused: " + string(r.Reason)
}

func (r *Refusal) Unwrap() error { return r.Err }

// A Claim is what a certificate says about its holder.
type Claim struct {
	Cert   *x509.Certificate
	Serial Serial // of Cert; empty if that is not valid
	CA     string // the KeyID of Cert's issuer; empty if that is no CA of ours
}

// KeyID returns the SHA-256 of a certificate's public key (its SubjectPublicKeyInfo) in hex. It
// names a CA in a user's serials, and stays the same when the CA is renewed with its key.
func KeyID(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Users knows who holds which certificate. Lookup returns the user and true, or false if there is
// none. If the serial is a user's and the certificate is not, it may return that user and false.
//
// Lookup is called during handshakes, by clients that have proved nothing yet, so it must answer
// from memory. It must be safe for concurrent use. The User it returns must not change; a later
// call may return another one.
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

// An Identity is who a client is.
type Identity struct {
	User    *User
	Serial  Serial
	Expires time.Time // when the certificate does, or its CA

	claim Claim
	ca    *x509.Certificate
}

// An Authenticator decides who a client is and what it may reach. It serves any listener whose
// tls.Config has RequireAnyClientCert (or RequireAndVerifyClientCert), MinVersion VersionTLS13 and
// SessionTicketsDisabled: Identify refuses resumed sessions, so clients with tickets would be
// refused by turns.
//
// Identify verifies the certificate itself, against CAs alone. RequireAndVerifyClientCert makes
// crypto/tls verify it as well, which lets anybody spend 30 ms of CPU by a chain of their own.
type Authenticator struct {
	CAs   []*x509.Certificate // each issues clients' certificates; a Claim says which did
	Users Users
}

// Identify returns who the client of a connection is, if it may reach app; else the error is a
// [*Refusal]. It depends on its arguments and the time alone and keeps nothing, so that it may be
// called in tls.Config.VerifyConnection, which tells the client of a refusal by an alert. There
// the client has not proved yet that it holds the certificate's key: act upon an Identity only
// when the handshake is done, and decide anew for each connection.
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
	if i := slices.IndexFunc(a.CAs, func(ca *x509.Certificate) bool { return issues(ca, leaf) }); i >= 0 {
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

// recheck returns who the client of an earlier Identity is now, if it may still reach app. The
// signature is not verified again: a CA of the same name and key would find it as good as then.
func (a *Authenticator) recheck(id *Identity, app string) (*Identity, error) {
	for _, ca := range a.CAs {
		if bytes.Equal(ca.RawSubject, id.ca.RawSubject) && bytes.Equal(ca.RawSubjectPublicKeyInfo, id.ca.RawSubjectPublicKeyInfo) {
			return a.authorize(id.claim, ca, app)
		}
	}
	return nil, &Refusal{Reason: UnknownCA, Claim: &id.claim}
}

// authorize looks up the user of a certificate that ca has issued.
func (a *Authenticator) authorize(claim Claim, ca *x509.Certificate, app string) (*Identity, error) {
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

// verify returns the CA that has issued leaf itself, or why there is none. Of the client's other
// certificates no signature is checked but one, by our CA's key: it costs the client nothing to
// send a chain that takes long.
func (a *Authenticator) verify(leaf *x509.Certificate, others []*x509.Certificate) (ca *x509.Certificate, _ Reason, err error) {
	switch now := time.Now(); {
	case len(leaf.UnhandledCriticalExtensions) > 0:
		return nil, UnknownExtension, fmt.Errorf("critical extension %v", leaf.UnhandledCriticalExtensions[0])
	case now.Before(leaf.NotBefore):
		return nil, NotYetValid, fmt.Errorf("valid from %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return nil, Expired, fmt.Errorf("expired at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	err = errors.New("no CA of this server has its issuer's name")
	for _, ca := range a.CAs {
		if !issues(ca, leaf) {
			continue
		}
		if slices.Contains(weakSignatures, leaf.SignatureAlgorithm) {
			return nil, WeakSignature, fmt.Errorf("signed with %v", leaf.SignatureAlgorithm)
		}
		_, err = leaf.Verify(x509.VerifyOptions{Roots: poolOf(ca), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
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

// invalidReason names what is wrong with a certificate that the CA has signed, or with the CA.
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

// certified reports whether leaf's issuer is among others, and a CA of ours has signed one of them.
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

// usable says what is wrong with a certificate as a client's, if anything.
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
