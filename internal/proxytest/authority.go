package proxytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// An Authority signs certificates.
type Authority struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// An Option changes a certificate's template before it is signed.
type Option func(*x509.Certificate)

// Serial sets the serial number.
func Serial(n int64) Option {
	return func(c *x509.Certificate) { c.SerialNumber = big.NewInt(n) }
}

// Name sets the common name.
func Name(name string) Option {
	return func(c *x509.Certificate) { c.Subject.CommonName = name }
}

// Valid sets the dates.
func Valid(from, until time.Time) Option {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, until }
}

// NewAuthority returns a root with a new key.
func NewAuthority(options ...Option) *Authority {
	key := NewKey()
	template := caTemplate("proxytest", options)
	return &Authority{sign(template, template, key.Public(), key), key}
}

// Sub returns an authority below a.
func (a *Authority) Sub(options ...Option) *Authority {
	key := NewKey()
	return &Authority{sign(caTemplate("sub", options), a.Cert, key.Public(), a.Key), key}
}

// Server returns a certificate of a server at localhost, 127.0.0.1 and ::1.
func (a *Authority) Server(options ...Option) tls.Certificate {
	return a.Issue(ServerTemplate(options...), NewKey())
}

// Client returns a certificate of a client.
func (a *Authority) Client(options ...Option) tls.Certificate {
	return a.Issue(ClientTemplate(options...), NewKey())
}

// Issue signs template for key. The result has a Leaf, and a chain of one certificate.
func (a *Authority) Issue(template *x509.Certificate, key crypto.Signer) tls.Certificate {
	leaf := sign(template, a.Cert, key.Public(), a.Key)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// Pool returns a pool that holds a's certificate only.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.Cert)
	return pool
}

// ServerConfig returns the configuration of a server with a new certificate.
func (a *Authority) ServerConfig() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.Server()}}
}

// ClientConfig returns the configuration of a client that trusts a and connects to localhost. It
// presents cert, whatever the server asks for, unless cert is nil.
func (a *Authority) ClientConfig(cert *tls.Certificate) *tls.Config {
	c := &tls.Config{RootCAs: a.Pool(), ServerName: "localhost"}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		}
	}
	return c
}

// TLSConfigs returns the configurations of a server called localhost and of a client that trusts
// it.
func TLSConfigs() (server, client *tls.Config) {
	a := NewAuthority()
	return a.ServerConfig(), a.ClientConfig(nil)
}

// NewKey returns a new key on P-256.
func NewKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	return key
}

// WritePEM writes dir/name.pem and, if cert has a private key, dir/name.key, both with mode 0600.
func WritePEM(t testing.TB, dir, name string, cert tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	var text []byte
	for _, der := range cert.Certificate {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	Must(t, os.WriteFile(certFile, text, 0o600))
	if cert.PrivateKey != nil {
		der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		Must(t, err)
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		Must(t, os.WriteFile(keyFile, text, 0o600))
	}
	return certFile, keyFile
}

// TLS returns the authority's certificate without its key, for WritePEM.
func (a *Authority) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{a.Cert.Raw}, Leaf: a.Cert}
}

// ClientTemplate returns the template of a valid client certificate.
func ClientTemplate(options ...Option) *x509.Certificate {
	return apply(template("client", x509.ExtKeyUsageClientAuth), options)
}

// ServerTemplate returns the template of a valid server certificate.
func ServerTemplate(options ...Option) *x509.Certificate {
	c := template("server", x509.ExtKeyUsageServerAuth)
	c.DNSNames = []string{"localhost"}
	c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	return apply(c, options)
}

func caTemplate(name string, options []Option) *x509.Certificate {
	c := template(name)
	c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	return apply(c, options)
}

var serials atomic.Int64

// template returns a template whose dates also suit synctest, whose clock begins in 2000.
func template(name string, usage ...x509.ExtKeyUsage) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1000 + serials.Add(1)), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:  time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage:  x509.KeyUsageDigitalSignature, ExtKeyUsage: usage, BasicConstraintsValid: true,
	}
}

func apply(c *x509.Certificate, options []Option) *x509.Certificate {
	for _, change := range options {
		change(c)
	}
	return c
}

func sign(c, parent *x509.Certificate, public any, key crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, key)
	check(err)
	cert, err := x509.ParseCertificate(der)
	check(err)
	return cert
}

func check(err error) {
	if err != nil {
		panic("proxytest: " + err.Error())
	}
}
