package mtlsserver

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// A file that is taken for a CA has exactly the block of that certificate, so that no tool reads another one from it.
func FuzzPEM(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		f.Fatal(err)
	}
	one := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	f.Add(one)
	f.Add(append(bytes.Clone(one), one...))
	f.Add(append([]byte("-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n"), one...))
	f.Add(append([]byte("text\n"), one...))
	f.Add(append(bytes.Clone(one), "text"...))
	f.Add(bytes.Replace(one, []byte("-----\n"), []byte("-----\nProc-Type: 4,ENCRYPTED\n\n"), 1))
	f.Add(bytes.ReplaceAll(one, []byte("\n"), []byte("\r\n")))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		cert, err := certificate(text, true)
		if err != nil {
			if cert != nil {
				t.Fatal("a certificate and an error")
			}
			return
		}
		if n := bytes.Count(text, []byte("-----BEGIN")); n != 1 {
			t.Fatalf("taken with %d blocks", n)
		}
		letters := strings.Fields(string(text))
		if again := strings.Fields(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))); strings.Join(letters, "") != strings.Join(again, "") {
			t.Fatalf("taken: %q", text)
		}
		if first, err := certificate(text, false); err != nil || !first.Equal(cert) {
			t.Fatalf("the first is %v, %v", first, err)
		}
	})
}

func TestReadFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no mode bits")
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		mode   os.FileMode
		secret bool
		want   string
	}{
		{0o600, true, ""},
		{0o400, true, ""},
		{0o700, true, ""},
		{0o604, true, "mode 0604 lets others at the key: chmod 600 it"},
		{0o640, true, "mode 0640"},
		{0o620, true, "mode 0620"},
		{0o644, false, ""},
	} {
		if err := os.Chmod(path, step.mode); err != nil {
			t.Fatal(err)
		}
		text, err := readFile(path, step.secret)
		if err == nil && (string(text) != "text" || step.want != "") || err != nil && (step.want == "" || !strings.Contains(err.Error(), step.want)) {
			t.Errorf("mode %#o: %q, %v, want %q", step.mode, text, err, step.want)
		}
	}
}

func TestInDate(t *testing.T) {
	now := time.Now()
	for _, step := range []struct {
		from, to time.Duration
		want     string
	}{
		{-time.Hour, time.Hour, ""},
		{time.Hour, 2 * time.Hour, "not valid before " + now.Add(time.Hour).UTC().Format(time.RFC3339) + ": wait, or set the clock"},
		{-2 * time.Hour, -time.Hour, "expired at " + now.Add(-time.Hour).UTC().Format(time.RFC3339) + ": make a new one"},
	} {
		err := inDate(&x509.Certificate{NotBefore: now.Add(step.from), NotAfter: now.Add(step.to)})
		if err == nil && step.want != "" || err != nil && err.Error() != step.want {
			t.Errorf("%v to %v: %v, want %q", step.from, step.to, err, step.want)
		}
	}
}
