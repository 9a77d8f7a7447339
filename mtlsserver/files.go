package mtlsserver

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// pair reads a certificate and its key, which are to be good for usage.
func (r *report) pair(key, certFile, keyFile string, usage x509.ExtKeyUsage) (pair tls.Certificate) {
	certText, keyText := r.file(key+".cert", certFile, false), r.file(key+".key", keyFile, true)
	if certText == nil || keyText == nil {
		return pair
	}
	leaf, err := certificate(certText, false)
	switch {
	case err != nil:
		r.add(key+".cert", "%q: %v", certFile, err)
		return pair
	case !slices.Contains(leaf.ExtKeyUsage, usage):
		r.add(key+".cert", "%q: its extended key usage lacks %v: make one that has it", certFile, usage)
	case usage == x509.ExtKeyUsageServerAuth && len(leaf.DNSNames)+len(leaf.IPAddresses) == 0:
		r.add(key+".cert", "%q: it names no host (subjectAltName), so no client would take it: make one that does", certFile)
	}
	if pair, err = tls.X509KeyPair(certText, keyText); err != nil {
		r.add(key+".key", "%q: %v: want the key of the certificate in %q, not encrypted", keyFile, err, certFile)
	}
	return pair
}

// ca reads a file that holds one certificate and nothing else, that of an authority. Whatever else a file may hold,
// such as a block that is broken, x509.CertPool would skip without a word.
func (r *report) ca(key, path string) *x509.Certificate {
	text := r.file(key, path, false)
	if text == nil {
		return nil
	}
	cert, err := certificate(text, true)
	switch {
	case err != nil:
		r.add(key, "%q: %v", path, err)
		return nil
	case !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		r.add(key, "%q: not an authority's: want CA:TRUE and key usage keyCertSign", path)
	}
	return cert
}

// certificate returns the first one in PEM text, or the only one, if it is in date.
func certificate(text []byte, only bool) (*x509.Certificate, error) {
	text = bytes.TrimSpace(text)
	block, rest := pem.Decode(text)
	switch {
	case only && (block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 || len(rest) > 0 ||
		!bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) || bytes.Count(text, []byte("-----BEGIN")) > 1):
		return nil, errors.New("want exactly one CERTIFICATE block in PEM and nothing else: openssl x509 -in FILE prints one")
	case block == nil || block.Type != "CERTIFICATE":
		return nil, errors.New("want a certificate in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: make a new one, or copy it anew", err)
	}
	if err := inDate(cert); err != nil {
		return nil, err
	}
	return cert, nil
}

func poolOf(ca *x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return pool
}

func inDate(cert *x509.Certificate) error {
	switch now := time.Now(); {
	case now.Before(cert.NotBefore):
		return fmt.Errorf("not valid before %s: wait, or set the clock", cert.NotBefore.UTC().Format(time.RFC3339))
	case now.After(cert.NotAfter):
		return fmt.Errorf("expired at %s: make a new one", cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// file returns what is in a file, or nil if that was not to be had. Its path is relative to that of the Config.
func (r *report) file(key, path string, secret bool) []byte {
	switch {
	case path == "":
		r.add(key, "missing: name its file")
		return nil
	case strings.Contains(path, "-----BEGIN"):
		r.add(key, "want the name of a file, got what belongs into one")
		return nil
	case !filepath.IsAbs(path):
		path = filepath.Join(r.config.dir, path)
	}
	text, err := readFile(path, secret)
	if err != nil {
		r.add(key, "%v", err)
		return nil
	}
	return text
}

// readFile reads a regular file of sane size. A secret one must not be open to other users of the machine; where that
// is not said by mode bits it is not looked at.
func readFile(path string, secret bool) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil: // as ReadFile's would be
	case !info.Mode().IsRegular(): // opening a pipe would wait
		return nil, fmt.Errorf("%q: not a file: name one", path)
	case info.Size() > 8<<20:
		return nil, fmt.Errorf("%q: larger than 8 MiB: name the right file", path)
	case secret && runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%q: mode %#o lets others at the key: chmod 600 it", path, info.Mode().Perm())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%q: %w: name a file that can be read", path, errors.Unwrap(err))
	}
	return text, nil
}
