package mtlsserver

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// pair reads a certificate, which must allow usage, and its key.
func (r *report) pair(
	key, certFile, keyFile string, usage x509.ExtKeyUsage,
) (pair tls.Certificate) {
	certText, keyText := r.file(key+".cert", certFile, false), r.file(key+".key", keyFile, true)
	if certText == nil || keyText == nil {
		return pair
	}
	leaf := r.certificate(key+".cert", certFile, certText, false)
	switch {
	case leaf == nil:
		return pair
	case !slices.Contains(leaf.ExtKeyUsage, usage):
		r.add(key+".cert", "%q: its extended key usage lacks %v: make one that has it",
			certFile, usage)
	case usage == x509.ExtKeyUsageServerAuth && len(leaf.DNSNames)+len(leaf.IPAddresses) == 0:
		r.add(key+".cert", "%q: it names no host (subjectAltName), so no client would accept it: "+
			"make one that does", certFile)
	}
	pair, err := tls.X509KeyPair(certText, keyText)
	if err != nil {
		r.add(key+".key", "%q: %v: want the key of the certificate in %q, not encrypted",
			keyFile, err, certFile)
	}
	return pair
}

// ca reads a file that must hold the certificate of a CA and nothing else. x509.CertPool would
// silently skip anything else, such as a broken block.
func (r *report) ca(key, path string) *x509.Certificate {
	text := r.file(key, path, false)
	if text == nil {
		return nil
	}
	cert := r.certificate(key, path, text, true)
	if cert != nil && (!cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0) {
		r.add(key, "%q: not a CA's certificate: want CA:TRUE and key usage keyCertSign", path)
	}
	return cert
}

// certificate returns the first certificate in a file's text and records it for dates. If only is
// set, the text must hold nothing else.
func (r *report) certificate(key, path string, text []byte, only bool) *x509.Certificate {
	cert, err := certificate(text, only)
	if err != nil {
		r.add(key, "%q: %v", path, err)
		return nil
	}
	r.certs = append(r.certs, Certificate{
		Key:       key,
		File:      path,
		Subject:   cert.Subject.String(),
		NotBefore: cert.NotBefore,
		NotAfter:  cert.NotAfter,
		text:      sha256.Sum256(text),
	})
	return cert
}

func certificate(text []byte, only bool) (*x509.Certificate, error) {
	text = bytes.TrimSpace(text)
	block, rest := pem.Decode(text)
	is := block != nil && block.Type == "CERTIFICATE"
	// pem.Decode skips text before the block, and blocks that it cannot decode.
	alone := is && len(block.Headers) == 0 && len(rest) == 0 &&
		bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")) &&
		bytes.Count(text, []byte("-----BEGIN")) == 1
	switch {
	case only && !alone:
		return nil, errors.New("want exactly one CERTIFICATE block in PEM and nothing else: " +
			"openssl x509 -in FILE prints one")
	case !is:
		return nil, errors.New("want a certificate in PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: make a new one, or copy it again", err)
	}
	return cert, nil
}

func poolOf(cas ...*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range cas {
		pool.AddCert(ca)
	}
	return pool
}

func digestOf(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// file returns the text of a file whose path is relative to the Config's folder. If the file cannot
// be read, it adds a problem and returns nil.
func (r *report) file(key, path string, secret bool) []byte {
	switch {
	case path == "":
		r.add(key, "missing: name its file")
		return nil
	case strings.Contains(path, "-----BEGIN"):
		r.add(key, "want the name of a file, got its content")
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

// readFile reads a regular file of at most 8 MiB. It fails if other users of the machine can write
// or replace the file, or read a secret one. On Windows, which has no mode bits, it cannot check.
func readFile(path string, secret bool) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil: // ReadFile reports the error
	case !info.Mode().IsRegular(): // opening a pipe would wait
		return nil, fmt.Errorf("%q: not a file: name one", path)
	case info.Size() > 8<<20:
		return nil, fmt.Errorf("%q: larger than 8 MiB: name the right file", path)
	case runtime.GOOS != "windows":
		if err := checkModes(path, info, secret); err != nil {
			return nil, err
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%q: %w: name a file that can be read", path, errors.Unwrap(err))
	}
	return text, nil
}

// checkModes returns an error for a file that users outside its owner and group can write or
// replace. Only the owner may read a secret file. As an exception its group may read it if root
// owns it, because Kubernetes mounts secrets that way for processes that are not root.
func checkModes(path string, info fs.FileInfo, secret bool) error {
	mode := info.Mode().Perm()
	switch {
	case secret && mode&0o077 != 0 && (mode&0o037 != 0 || !ownedByRoot(info)):
		return fmt.Errorf("%q: mode %#o gives others access: chmod 600 it", path, mode)
	case mode&0o002 != 0:
		return fmt.Errorf("%q: mode %#o lets others write it: chmod o-w it", path, mode)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil // ReadFile reports the error
	}
	for _, folder := range []string{filepath.Dir(path), filepath.Dir(real)} {
		info, err := os.Stat(folder)
		if err != nil {
			continue
		}
		mode, sticky := info.Mode().Perm(), info.Mode()&fs.ModeSticky != 0
		if mode&0o002 != 0 && !sticky && !readOnly(folder) {
			return fmt.Errorf("%q: others may replace it, as the folder %q has mode %#o: "+
				"chmod o-w the folder", path, folder, mode)
		}
	}
	return nil
}
