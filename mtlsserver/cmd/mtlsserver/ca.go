package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// loadCA returns the CA that signs in dir, and the number of CAs in dir's config.json. It is the
// last CA in tls.ca, or ca.pem if there is no config.json; its key is in the file beside it. loadCA
// fails if others can read the key.
func loadCA(dir string) (ca *tls.Certificate, among int, err error) {
	path := filepath.Join(dir, "ca.pem")
	config, err := mtlsserver.Load(filepath.Join(dir, "config.json"))
	switch {
	case err == nil:
		among = len(config.TLS.CA)
		path = within(dir, config.TLS.CA[among-1])
	case !errors.Is(err, fs.ErrNotExist):
		return nil, 0, err
	}
	key := keyBeside(path)
	pair, err := tls.LoadX509KeyPair(path, key)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: name a folder that mtlsserver init made", err)
	}
	info, err := os.Stat(key)
	if err != nil {
		return nil, 0, err
	}
	if mode := info.Mode().Perm(); runtime.GOOS != "windows" && mode&0o077 != 0 {
		return nil, 0, fmt.Errorf("%q: mode %#o gives others access to the key: chmod 600 it",
			key, mode)
	}
	return &pair, among, nil
}

// keyBeside returns the path of the key that belongs to a certificate's file.
func keyBeside(path string) string { return strings.TrimSuffix(path, filepath.Ext(path)) + ".key" }

// within resolves a path in a configuration that is in dir.
func within(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// readCertificate returns the first certificate of a file.
func readCertificate(path string) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: want a certificate in PEM", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

// userSerial returns the entry for a certificate that ca has issued. The entry names the CA if
// there is more than one.
func userSerial(serial string, ca *x509.Certificate, among int) mtlsserver.UserSerial {
	if among < 2 {
		return mtlsserver.UserSerial{Serial: serial}
	}
	return mtlsserver.UserSerial{Serial: serial, CA: mtlsserver.KeyID(ca)}
}
