package mtlsserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A program runs a server of its own. Alice reaches web until a reload removes her.
func Example() {
	dir, err := os.MkdirTemp("", "mtlsserver")
	check(err)
	defer os.RemoveAll(dir)
	ca := certify(dir, "ca", 1, nil, 0)
	certify(dir, "server", 2, &ca, x509.ExtKeyUsageServerAuth)
	alice := certify(dir, "alice", 0xa11ce, &ca, x509.ExtKeyUsageClientAuth)

	config := &mtlsserver.Config{
		TLS: mtlsserver.Files{
			Cert: filepath.Join(dir, "server.pem"), Key: filepath.Join(dir, "server.key"),
			CA: []string{filepath.Join(dir, "ca.pem")},
		},
		Apps: []mtlsserver.App{{
			ID: "web", Listen: "127.0.0.1:0",
			Upstreams: []mtlsserver.Upstream{{Addr: upstream("hello from web\n")}},
		}},
		Users: []mtlsserver.User{{Name: "alice",
			Serials: []mtlsserver.UserSerial{{Serial: "0A:11:CE"}}, Apps: []string{"web"}}},
	}
	server, err := mtlsserver.New(config,
		&mtlsserver.Options{Logger: slog.New(slog.DiscardHandler)})
	check(err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- server.Run(ctx) }()

	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	get := func() {
		c, err := tls.Dial("tcp", server.Addrs()["web"].String(), &tls.Config{
			ServerName: "localhost", RootCAs: roots, Certificates: []tls.Certificate{alice},
		})
		check(err) // a refused client does not learn it here, but when it reads
		defer c.Close()
		answer, err := io.ReadAll(c)
		fmt.Printf("%s%v\n", answer, err)
	}
	get()
	changes, err := server.Reload(&mtlsserver.Config{TLS: config.TLS, Apps: config.Apps})
	check(err)
	fmt.Println("users", changes.Users)
	get()

	cancel()
	fmt.Println(<-ran)

	// Output:
	// hello from web
	// <nil>
	// users -alice
	// remote error: tls: bad certificate
	// <nil>
}

// A program's own listener identifies its clients. VerifyConnection makes crypto/tls send a refused
// client an alert; only the end of the handshake proves that the client holds its key.
func ExampleAuthenticator() {
	dir, err := os.MkdirTemp("", "mtlsserver")
	check(err)
	defer os.RemoveAll(dir)
	ca := certify(dir, "ca", 1, nil, 0)
	server := certify(dir, "server", 2, &ca, x509.ExtKeyUsageServerAuth)
	client := certify(dir, "alice", 0xa11ce, &ca, x509.ExtKeyUsageClientAuth)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)

	auth := mtlsserver.Authenticator{CAs: []*x509.Certificate{ca.Leaf},
		Users: mtlsserver.StaticUsers{
			"a11ce": {Name: "alice", Apps: []string{"web"}},
		}}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{server}, MinVersion: tls.VersionTLS13,
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequireAnyClientCert, // Identify verifies it
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := auth.Identify(cs, "web")
			return err
		},
	})
	check(err)
	defer l.Close()
	go func() {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{
			ServerName: "localhost", RootCAs: roots, Certificates: []tls.Certificate{client},
		})
		check(err)
		defer c.Close()
		io.Copy(io.Discard, c)
	}()

	c, err := l.Accept()
	check(err)
	defer c.Close()
	check(c.(*tls.Conn).Handshake())
	for _, app := range []string{"web", "db"} {
		id, err := auth.Identify(c.(*tls.Conn).ConnectionState(), app)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(id.User.Name, "may reach", app)
	}
	// Output:
	// alice may reach web
	// mtlsserver: refused: app-not-allowed
}

// certify makes a certificate and writes it and its key into dir. Without a ca it is self-signed.
func certify(dir, name string, serial int64, ca *tls.Certificate,
	usage x509.ExtKeyUsage) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		BasicConstraintsValid: true,
		NotBefore:             time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	if ca == nil {
		template.IsCA, template.KeyUsage, template.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
		ca = &tls.Certificate{Leaf: template, PrivateKey: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, key.Public(), ca.PrivateKey)
	check(err)
	leaf, err := x509.ParseCertificate(der)
	check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name +
			".key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		check(os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600))
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// upstream serves text to one client and returns its address.
func upstream(text string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	go func() {
		defer l.Close()
		c, err := l.Accept()
		check(err)
		defer c.Close()
		io.WriteString(c, text)
	}()
	return l.Addr().String()
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
