package mtlsserver

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// A Reason says in a word what became of a connection. The set is closed: these, and every [lbproxy.EndReason].
type Reason string

const (
	// The client is not known, and nothing of what it said is proved.
	TooManyHandshakes  Reason = "too-many-handshakes"   // Handshake.MaxConcurrent
	TooManyFromAddress Reason = "too-many-from-address" // Handshake.MaxPerAddress
	HandshakeTimeout   Reason = "handshake-timeout"     // Handshake.Timeout
	HandshakeTooLarge  Reason = "handshake-too-large"   // Handshake.MaxBytes
	NotTLS             Reason = "not-tls"
	OldTLS             Reason = "old-tls"           // before 1.3
	NoCertificate      Reason = "no-certificate"    //
	BadCertificate     Reason = "bad-certificate"   // cannot be parsed, as with a negative serial
	UnknownCA          Reason = "unknown-ca"        // self-signed, or by an issuer that is not the CA
	NotYetValid        Reason = "not-yet-valid"     //
	Expired            Reason = "expired"           // also one that expired while its connection was open
	NotDirect          Reason = "not-direct"        // not issued by the CA itself: serials are unique to an issuer
	IsCA               Reason = "is-ca"             // what may sign certificates is not a client
	BadKeyUsage        Reason = "bad-key-usage"     // no digitalSignature
	BadExtKeyUsage     Reason = "bad-ext-key-usage" // does not list clientAuth
	WeakKey            Reason = "weak-key"          // not RSA of 2048 bits or more, P-256, P-384, P-521, or Ed25519
	BadSerial          Reason = "bad-serial"        // not positive, or more than 20 octets
	UnknownSerial      Reason = "unknown-serial"    // of no user
	AppNotAllowed      Reason = "app-not-allowed"   // the user may not reach this app
	NoProof            Reason = "no-proof"          // the client does not hold the certificate's key
	ClientGone         Reason = "client-gone"       // ended the connection before its handshake was done
	ClientAlert        Reason = "client-alert"      // refused the server, as when it does not trust its certificate
	HandshakeFailed    Reason = "handshake-failed"  // otherwise
	AppRemoved         Reason = "app-removed"       // by a reload, before the handshake
	Revoked            Reason = "revoked"           // by a reload: the user, serial, app or right is gone, or the CA
)

// A Refusal is the error that says why a client is refused, or its connection ended.
type Refusal struct {
	Reason Reason
	Serial Serial // what the client claims, if that is why it is refused
	Err    error  // what the reason was found in, if there is more to say
}

func (r *Refusal) Error() string {
	if r.Err != nil {
		return fmt.Sprintf("mtlsserver: refused: %s: %v", r.Reason, r.Err)
	}
	return "mtlsserver: refused: " + string(r.Reason)
}

func (r *Refusal) Unwrap() error { return r.Err }

// Users knows who holds which certificate. Lookup is called during handshakes, by clients that have proved nothing
// yet: it must answer from memory. It must be safe for concurrent use.
type Users interface {
	Lookup(Serial) (*User, bool)
}

// StaticUsers are the users of a list, by each of their serials.
type StaticUsers map[Serial]*User

// Lookup implements [Users].
func (u StaticUsers) Lookup(serial Serial) (*User, bool) {
	user, ok := u[serial]
	return user, ok
}

// An Identity is who a client is.
type Identity struct {
	User    *User
	Serial  Serial
	Expires time.Time // when the certificate does, or its CA
}

// An Authenticator decides who a client is and what it may reach. It serves any listener whose tls.Config has
// RequireAndVerifyClientCert, as ClientCAs CA alone, as MinVersion VersionTLS13, and SessionTicketsDisabled: with tickets,
// clients that use them are refused by turns, for Identify takes no session that was resumed.
type Authenticator struct {
	CA    *x509.Certificate
	Users Users
}

// Identify returns who the client of a verified connection is, if it may reach app; else the error is a [*Refusal].
// It is a function of its arguments that keeps nothing: call it in tls.Config.VerifyConnection, which has the client
// told by an alert; but there the client has not proved yet that it holds the certificate's key. Act upon an Identity
// only when the handshake is done, and decide anew for each connection.
func (a *Authenticator) Identify(cs tls.ConnectionState, app string) (*Identity, error) {
	refuse := func(r Reason) (*Identity, error) { return nil, &Refusal{Reason: r} }
	switch {
	case cs.Version != tls.VersionTLS13:
		return refuse(OldTLS)
	case cs.DidResume: // then nobody has looked at the certificate
		return refuse(NoProof)
	case len(cs.PeerCertificates) == 0:
		return refuse(NoCertificate)
	}
	leaf := cs.PeerCertificates[0]
	switch {
	case leaf.IsCA, leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return refuse(IsCA)
	case !slices.ContainsFunc(cs.VerifiedChains, func(chain []*x509.Certificate) bool {
		return len(chain) == 2 && chain[0].Equal(leaf) && chain[1].Equal(a.CA)
	}):
		return refuse(NotDirect)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return refuse(BadKeyUsage)
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return refuse(BadExtKeyUsage)
	case !strong(leaf.PublicKey):
		return refuse(WeakKey)
	}
	serial, err := SerialOf(leaf)
	if err != nil {
		return refuse(BadSerial)
	}
	user, ok := a.Users.Lookup(serial)
	if !ok {
		return nil, &Refusal{Reason: UnknownSerial, Serial: serial}
	}
	if !slices.Contains(user.Apps, app) {
		return nil, &Refusal{Reason: AppNotAllowed, Serial: serial}
	}
	expires := leaf.NotAfter
	if a.CA.NotAfter.Before(expires) {
		expires = a.CA.NotAfter
	}
	return &Identity{user, serial, expires}, nil
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
