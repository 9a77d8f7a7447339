package main

import (
	"bytes"
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
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/internal/strictjson"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

const (
	day        = 24 * time.Hour
	caLife     = 3650 * day
	serverLife = 824 * day // some clients take no more than 825, and NotBefore is an hour ago
	clientLife = 365       // days, unless -days says otherwise
)

const firstConfig = `{
  "tls": {"cert": "server.pem", "key": "server.key", "ca": "ca.pem"},
  "apps": [
    {"id": "web", "listen": "127.0.0.1:9443",
     "upstreams": [{"addr": "127.0.0.1:8001"}, {"addr": "127.0.0.1:8002"}]}
  ],
  "users": []
}
`

// initialize makes what a server needs, in a folder that has none of it.
func initialize(dir string, hosts []string, stdout io.Writer) error {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "mtlsserver"}, NotAfter: time.Now().Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range append([]string{"localhost", "127.0.0.1", "::1"}, hosts...) {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else if host == "" || strings.ContainsAny(host, "/@: ") {
			return fmt.Errorf("-host %q: want host names or addresses, separated by commas", host)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	ca, caFiles, err := sign("ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: "mtlsserver CA"}, NotAfter: time.Now().Add(caLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, MaxPathLenZero: true,
	}, nil)
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
	if err := writeNew(dir, slices.Concat(caFiles, serverFiles, []file{{"config.json", []byte(firstConfig)}})); err != nil {
		return fmt.Errorf("%w: nothing is ever overwritten, name a new folder", err)
	}
	fmt.Fprintf(stdout, `Made a CA (whoever has ca.key can make users), a server certificate and config.json in %[1]s. Next:
  mtlsserver issue -dir %[1]s -name alice -apps web
  mtlsserver run -config %[2]s
`, dir, filepath.Join(dir, "config.json"))
	return nil
}

// A file is one to be made. If its name ends in .pem it is for all to read.
type file struct {
	name string
	text []byte
}

// sign makes a key, and a certificate for it that is issued by ca or, if that is nil, by itself. It
// returns them and their files.
func sign(stem string, template *x509.Certificate, ca *tls.Certificate) (*tls.Certificate, []file, error) {
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
	return &pair, []file{{stem + ".key", keyText}, cert}, err
}

// certify makes the certificate of a key, and returns its file.
func certify(stem string, template *x509.Certificate, key crypto.PublicKey, ca *tls.Certificate) (file, error) {
	var err error
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128)); err != nil {
		return file{}, err
	}
	template.NotBefore = time.Now().Add(-time.Hour) // clocks differ
	template.BasicConstraintsValid = true
	if template.NotAfter.After(ca.Leaf.NotAfter) {
		template.NotAfter = ca.Leaf.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, key, ca.PrivateKey)
	return file{stem + ".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, err
}

// readRequest returns the key of a certificate request in PEM whose holder has proved to have it.
func readRequest(path string) (crypto.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("%s: want a certificate request in PEM, as openssl req -new makes it", path)
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
		f, err := os.OpenFile(filepath.Join(dir, file.name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err == nil {
			made = files[:i+1]
			_, err = f.Write(file.text)
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

// An issuer is what the command issue was told.
type issuer struct {
	dir, name string
	apps      list
	csr       string // a request to sign; empty: a key is made
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
	ca, err := loadCA(i.dir)
	if err != nil {
		return err
	}
	stem, serial, files, err := i.create(ca)
	if err != nil {
		return err
	}
	user := mtlsserver.User{Name: i.name, Serials: []mtlsserver.UserSerial{{Serial: "0x" + string(serial)}}, Apps: i.apps}
	made := "Made " + filepath.Join(i.dir, stem) + ".pem"
	if i.csr == "" {
		made += " and " + filepath.Join(i.dir, stem) + ".key"
	}
	if i.print {
		fmt.Fprintln(stderr, made+".") // stdout is for the entry alone
		return json.NewEncoder(stdout).Encode(user)
	}
	config := filepath.Join(i.dir, "config.json")
	if err := enter(user, config); err != nil {
		remove(i.dir, files)
		return err
	}
	fmt.Fprintf(stdout, "%s, and entered user %q with serial %s in %s.\nA server that is running takes it up at SIGHUP.\n",
		made, i.name, user.Serials[0].Serial, config)
	return nil
}

// loadCA returns the CA that init made in dir. Others must not be able to read its key.
func loadCA(dir string) (*tls.Certificate, error) {
	key := filepath.Join(dir, "ca.key")
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.pem"), key)
	if err != nil {
		return nil, fmt.Errorf("%w: name a folder that mtlsserver init made", err)
	}
	info, err := os.Stat(key)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); runtime.GOOS != "windows" && mode&0o077 != 0 {
		return nil, fmt.Errorf("%q: mode %#o lets others at the key: chmod 600 it", key, mode)
	}
	return &ca, nil
}

// create makes the certificate and, unless there is a request, its key, under the first name that is
// free, also when others do the same.
func (i *issuer) create(ca *tls.Certificate) (stem string, serial mtlsserver.Serial, files []file, err error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: i.name}, NotAfter: time.Now().Add(time.Duration(i.days) * day),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	var key crypto.PublicKey
	if i.csr != "" {
		if key, err = readRequest(i.csr); err != nil {
			return "", "", nil, err
		}
	}
	stem = i.name
	for n := 2; ; n++ {
		if key == nil {
			_, files, err = sign(stem, template, ca)
		} else {
			files = make([]file, 1)
			files[0], err = certify(stem, template, key, ca)
		}
		if err == nil && !exists(i.dir, stem+".pem") && !exists(i.dir, stem+".key") {
			err = writeNew(i.dir, files)
		} else if err == nil {
			err = fs.ErrExist
		}
		if !errors.Is(err, fs.ErrExist) {
			break
		}
		stem = fmt.Sprintf("%s-%d", i.name, n)
	}
	if err != nil {
		return "", "", nil, err
	}
	serial, err = mtlsserver.SerialOf(template)
	return stem, serial, files, err
}

func exists(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return err == nil
}

// patience is how long enter waits for others who change the configuration; less in tests.
var patience = 20 * time.Second

// enter puts user into a config file, or what that is a link to. Others see that as it was or as it
// will be. While somebody else does this, it waits, for 20 seconds at most.
func enter(user mtlsserver.User, config string) error {
	path, err := filepath.EvalSymlinks(config)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	for late := time.Now().Add(patience); errors.Is(err, fs.ErrExist) && time.Now().Before(late); {
		time.Sleep(10 * time.Millisecond)
		f, err = os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	}
	if err != nil {
		return fmt.Errorf("%w: another issue is at work, or was cut off: then remove that file", err)
	}
	err = rewrite(f, user, config, info)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		os.Remove(next)
	}
	return err
}

// rewrite writes to f what is in a config file, with user in it, and makes it that file's owner's, with its mode.
func rewrite(f *os.File, user mtlsserver.User, path string, info fs.FileInfo) error {
	if _, err := mtlsserver.Load(path); err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if text, err = withUser(text, user); err != nil {
		return fmt.Errorf("-apps: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return err
	}
	if _, err := mtlsserver.Parse(path, dir, text); err != nil {
		return fmt.Errorf("-apps: %w", err)
	}
	_, err = f.Write(text)
	return errors.Join(err, keepOwner(f, info), f.Chmod(info.Mode().Perm()), f.Sync())
}

// withUser returns the text of a configuration with a user in it who has u's name, serials and apps. If there is one of
// that name, who must have the same apps, only the serials are added. Every other byte stays as it is.
func withUser(text []byte, u mtlsserver.User) ([]byte, error) {
	var c mtlsserver.Config
	doc, problems := strictjson.Decode(text, &c)
	if len(problems) > 0 {
		return nil, fmt.Errorf("line %d: %s", problems[0].Line, problems[0])
	}
	i := slices.IndexFunc(c.Users, func(known mtlsserver.User) bool { return known.Name == u.Name })
	if i < 0 {
		entry, err := json.Marshal(u)
		return insert(text, doc, "users", "\n    "+string(entry), "\n  "), err
	}
	want, got := slices.Sorted(slices.Values(u.Apps)), slices.Sorted(slices.Values(c.Users[i].Apps))
	if !slices.Equal(want, got) {
		return nil, fmt.Errorf("user %q has apps %q, not %q: change that in the configuration first", u.Name, got, want)
	}
	list, err := json.Marshal(u)
	if err != nil {
		return nil, err
	}
	var entry struct {
		Serials json.RawMessage `json:"serials"`
	}
	err = json.Unmarshal(list, &entry)
	serials := bytes.Trim(entry.Serials, "[]")
	return insert(text, doc, fmt.Sprintf("users[%d].serials", i), " "+string(serials), ""), err
}

// insert adds an item to a list, and end before the ] if the list was empty.
func insert(text []byte, doc *strictjson.Doc, list, item, end string) []byte {
	_, to, _ := doc.Span(list)
	head := bytes.TrimRight(text[:to-1], " \t\r\n")
	tail := text[len(head):]
	if head[len(head)-1] != '[' {
		item, end = ","+item, ""
	}
	return slices.Concat(head, []byte(item+end), tail)
}
