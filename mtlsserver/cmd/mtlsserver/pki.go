package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

const (
	day        = 24 * time.Hour
	caLife     = 3650 * day
	serverLife = 824 // days; some clients accept 825 at most, and NotBefore is an hour ago
	clientLife = 365 // days, unless -days says otherwise
)

const firstConfig = `{
  "tls": {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"},
  "apps": [
    {"id": "web", "listen": "127.0.0.1:9443",
     "upstreams": [{"addr": "127.0.0.1:8001"}, {"addr": "127.0.0.1:8002"}],
     "healthCheck": {"interval": "5s", "timeout": "2s"}}
  ],
  "users": []%s
}
`

const firstAdmin = `,
  "admin": {"socket": "admin.sock"}`

// serverTemplate returns the template of a server certificate for hosts and for localhost.
func serverTemplate(hosts []string, life time.Duration) (*x509.Certificate, error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "mtlsserver"}, NotAfter: time.Now().Add(life),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range append([]string{"localhost", "127.0.0.1", "::1"}, hosts...) {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else if host == "" || strings.ContainsAny(host, "/@: ") {
			return nil, fmt.Errorf("-host %q: want host names or addresses, separated by commas",
				host)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	return template, nil
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(caLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, MaxPathLenZero: true,
	}
}

// initialize makes a CA, a server certificate and a config.json in a folder that has none of them.
func initialize(dir string, hosts []string, stdout io.Writer) error {
	template, err := serverTemplate(hosts, serverLife*day)
	if err != nil {
		return err
	}
	ca, caFiles, err := sign("ca", caTemplate("mtlsserver CA"), nil)
	if err != nil {
		return err
	}
	_, serverFiles, err := sign("server", template, ca)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	config := file{name: "config.json", text: fmt.Appendf(nil, firstConfig, firstAdmin)}
	unfit := checkSocket(dir)
	if unfit != nil {
		config.text = fmt.Appendf(nil, firstConfig, "")
	}
	if err := writeNew(dir, slices.Concat(caFiles, serverFiles, []file{config})); err != nil {
		return fmt.Errorf("%w: init overwrites no file: name a new folder", err)
	}
	fmt.Fprintf(stdout, "Made a CA (the holder of ca.key can make users), a server certificate "+
		"and config.json in %[1]s. Next:"+`
  mtlsserver issue -dir %[1]s -name alice -apps web
  mtlsserver run -config %[2]s
`, dir, filepath.Join(dir, "config.json"))
	if unfit != nil {
		fmt.Fprintf(stdout, "The configuration has no admin, as its socket cannot be there: %v.\n",
			unfit)
	}
	return nil
}

// checkSocket returns an error if the socket of firstAdmin cannot be in dir.
func checkSocket(dir string) error {
	path, err := filepath.Abs(filepath.Join(dir, "admin.sock"))
	if err != nil {
		return err
	}
	for _, err := range (admin.Listen{Socket: path}).Check() {
		return err.Err
	}
	return nil
}

// A file is to be written by a command. Everybody may read it if its name ends in .pem.
type file struct {
	name string
	text []byte
	like string // the file whose owner it gets, since the server may run as another user
}

// sign makes a key and a certificate for it. The issuer is ca, or the certificate itself if ca is
// nil. sign returns both and their files, the key's first.
func sign(
	stem string, template *x509.Certificate, ca *tls.Certificate,
) (*tls.Certificate, []file, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if ca == nil {
		ca = &tls.Certificate{Leaf: template, PrivateKey: key}
	}
	cert, err := certify(stem, template, key.Public(), ca)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	keyText := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	pair, err := tls.X509KeyPair(cert.text, keyText)
	return &pair, []file{{name: stem + ".key", text: keyText}, cert}, err
}

// certify makes a certificate for a key and returns its file. It completes the template.
func certify(
	stem string, template *x509.Certificate, key crypto.PublicKey, ca *tls.Certificate,
) (file, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return file{}, err
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour) // clocks differ
	template.BasicConstraintsValid = true
	if template.NotAfter.After(ca.Leaf.NotAfter) {
		template.NotAfter = ca.Leaf.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, key, ca.PrivateKey)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return file{name: stem + ".pem", text: text}, err
}

// readRequest returns the public key of a certificate request in PEM. The request's signature
// proves that its holder has the private key.
func readRequest(path string) (crypto.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("%s: want a certificate request in PEM, "+
			"as openssl req -new makes it", path)
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: make a new request", path, err)
	}
	return request.PublicKey, nil
}

// writeNew makes all files or none of them, and overwrites none.
func writeNew(dir string, files []file) error {
	for i, file := range files {
		mode := fs.FileMode(0o600)
		if strings.HasSuffix(file.name, ".pem") {
			mode = 0o644
		}
		made := files[:i]
		path := filepath.Join(dir, file.name)
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err == nil {
			made = files[:i+1]
			_, err = f.Write(file.text)
			if info, statErr := os.Stat(file.like); err == nil && statErr == nil {
				err = keepOwner(f, info)
			}
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			remove(dir, made)
			return err
		}
	}
	return nil
}

func remove(dir string, files []file) {
	for _, file := range files {
		os.Remove(filepath.Join(dir, file.name))
	}
}

// An issuer holds the flags of the command issue.
type issuer struct {
	dir, name string
	apps      list
	csr       string // the file of a request to sign; empty: make a key
	days      int    // the certificate's life
	print     bool
}

func (i *issuer) issue(stdout, stderr io.Writer) error {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.@"
	if strings.Trim(i.name, letters) != "" || strings.ContainsAny(i.name[:1], "-.") {
		return fmt.Errorf("-name %q: want letters, digits and -_.@, as it names files", i.name)
	}
	if i.days < 1 || i.days > 3650 {
		return fmt.Errorf("-days %d: want 1 to 3650", i.days)
	}
	ca, among, err := loadCA(i.dir)
	if err != nil {
		return err
	}
	stem, serial, files, err := i.create(ca)
	if err != nil {
		return err
	}
	user := mtlsserver.User{Name: i.name, Apps: i.apps,
		Serials: []mtlsserver.UserSerial{userSerial("0x"+string(serial), ca.Leaf, among)}}
	made := "Made " + filepath.Join(i.dir, stem) + ".pem"
	if i.csr == "" {
		made += " and " + filepath.Join(i.dir, stem) + ".key"
	}
	if i.print {
		fmt.Fprintln(stderr, made+".") // stdout gets the entry only
		return json.NewEncoder(stdout).Encode(user)
	}
	config := filepath.Join(i.dir, "config.json")
	if err := addUser(user, ca.Leaf, config); err != nil {
		remove(i.dir, files)
		return err
	}
	fmt.Fprintf(stdout, "%s, and entered user %q with serial %s in %s.\n"+
		"A running server uses it after mtlsserver reload or SIGHUP.\n",
		made, i.name, user.Serials[0].Serial, config)
	return nil
}

// create makes the certificate and, unless there is a request, its key. It writes them under the
// first free name.
func (i *issuer) create(
	ca *tls.Certificate,
) (stem string, serial mtlsserver.Serial, files []file, err error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: i.name},
		NotAfter:    time.Now().Add(time.Duration(i.days) * day),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	var key crypto.PublicKey
	if i.csr != "" {
		if key, err = readRequest(i.csr); err != nil {
			return "", "", nil, err
		}
	}
	stem, files, err = writeFree(i.dir, i.name, func(stem string) (files []file, err error) {
		if key == nil {
			_, files, err = sign(stem, template, ca)
			return files, err
		}
		cert, err := certify(stem, template, key, ca)
		return []file{cert}, err
	})
	if err != nil {
		return "", "", nil, err
	}
	serial, err = mtlsserver.SerialOf(template)
	return stem, serial, files, err
}

// writeFree writes the files that make returns for a stem: the first free one of name, name-2,
// name-3 and so on. Other commands may do the same at the same time.
func writeFree(
	dir, name string, make func(stem string) ([]file, error),
) (stem string, files []file, err error) {
	stem = name
	for n := 2; ; n++ {
		if exists(dir, stem+".pem") || exists(dir, stem+".key") {
			err = fs.ErrExist
		} else if files, err = make(stem); err == nil {
			err = writeNew(dir, files)
		}
		if !errors.Is(err, fs.ErrExist) {
			return stem, files, err
		}
		stem = fmt.Sprintf("%s-%d", name, n)
	}
}

func exists(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return err == nil
}
