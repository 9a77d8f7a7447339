package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

func certificateIn(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Some clients refuse a server certificate that is valid for more than 825 days.
func TestServerCertificateIsValidFor825DaysAtMost(t *testing.T) {
	dir, _ := setUp(t)
	cert := certificateIn(t, filepath.Join(dir, "server.pem"))
	if life := cert.NotAfter.Sub(cert.NotBefore); life > 825*day || life < 824*day {
		t.Errorf("it is valid for %v", life)
	}
}

// A client may keep its private key to itself and send a request.
func TestIssueSignsARequest(t *testing.T) {
	dir, config := setUp(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	request := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	write(t, dir, "alice.csr", request)
	csr := filepath.Join(dir, "alice.csr")
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web", "-csr", csr, "-days", "30")
	cert := certificateIn(t, filepath.Join(dir, "alice.pem"))
	if !key.PublicKey.Equal(cert.PublicKey) {
		t.Error("the certificate is for another key")
	}
	if left := time.Until(cert.NotAfter); left > 30*day || left < 29*day {
		t.Errorf("it is valid for %v more, want 30 days", left)
	}
	if exists(dir, "alice.key") {
		t.Error("a private key was made")
	}
	must(t, "check", "-config", config)

	write(t, dir, "bad.csr", bytes.Replace(request, []byte("REQUEST"), []byte("QUESTION"), 2))
	for _, row := range []struct {
		args []string
		want string
	}{
		{[]string{"-csr", filepath.Join(dir, "bad.csr")},
			"bad.csr: want a certificate request in PEM"},
		{[]string{"-csr", filepath.Join(dir, "none.csr")}, "none.csr: no such file"},
		{[]string{"-days", "0"}, "-days 0: want 1 to 3650"},
	} {
		args := append([]string{"issue", "-dir", dir, "-name", "bob", "-apps", "web"}, row.args...)
		if code, _, stderr := try(args...); code != 2 || !strings.Contains(stderr, row.want) {
			t.Errorf("%v: exit code %d, %q, want %q", row.args, code, stderr, row.want)
		}
	}
}

func TestIssueRefusesACAKeyThatOthersCanRead(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no mode bits")
	}
	dir, _ := setUp(t)
	if err := os.Chmod(filepath.Join(dir, "ca.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := try("issue", "-dir", dir, "-name", "alice", "-apps", "web")
	if code != 2 || !strings.Contains(stderr,
		"ca.key\": mode 0644 gives others access to the key: chmod 600 it") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

func TestTwentyIssuesAtOnce(t *testing.T) {
	dir, config := setUp(t)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if code, _, stderr := try("issue", "-dir", dir, "-name", "alice", "-apps",
				"web"); code != 0 {
				t.Errorf("exit code %d: %s", code, stderr)
			}
		})
	}
	all.Wait()
	c, err := mtlsserver.Load(config)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Users) != 1 || len(c.Users[0].Serials) != 20 {
		t.Errorf("users %+v, want alice with 20 serials", c.Users)
	}
}
