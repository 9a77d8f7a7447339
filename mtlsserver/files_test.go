package mtlsserver

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// A file that certificate accepts as a CA has exactly one block, so that no tool reads another
// certificate from it.
func FuzzPEM(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
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
		joined := strings.Join(strings.Fields(string(text)), "")
		body, begun := strings.CutPrefix(joined, "-----BEGINCERTIFICATE-----")
		body, ended := strings.CutSuffix(body, "-----ENDCERTIFICATE-----")
		// The last letter has bits that readers ignore: two texts may be the same bytes.
		der, err := base64.StdEncoding.DecodeString(body)
		if !begun || !ended || err != nil || !bytes.Equal(der, cert.Raw) {
			t.Fatalf("taken: %q: %v", text, err)
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
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	if err := os.WriteFile(path, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		mode   os.FileMode
		secret bool
		folder os.FileMode
		want   string
	}{
		{0o600, true, 0o755, ""},
		{0o400, true, 0o700, ""},
		{0o700, true, 0o755, ""},
		{0o604, true, 0o755, "mode 0604 gives others access: chmod 600 it"},
		{0o620, true, 0o755, "mode 0620"},
		{0o660, true, 0o755, "mode 0660"},
		{0o644, false, 0o755, ""},
		{0o664, false, 0o775, ""},
		{0o646, false, 0o755, "mode 0646 lets others write it: chmod o-w it"},
		{0o644, false, 0o777, `others may replace it, as the folder "` + dir +
			`" has mode 0777: chmod o-w the folder`},
		{0o600, true, 0o777, "others may replace it"},
		{0o644, false, 0o777 | os.ModeSticky, ""},
	} {
		if err := os.Chmod(path, step.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, step.folder); err != nil {
			t.Fatal(err)
		}
		text, err := readFile(path, step.secret)
		if err == nil && (string(text) != "text" || step.want != "") || err != nil &&
			(step.want == "" || !strings.Contains(err.Error(), step.want)) {
			t.Errorf("mode %#o in %v: %q, %v, want %q", step.mode, step.folder, text, err,
				step.want)
		}
	}
}

func TestReadFileIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, nil, 0o600))
	const most = 8 << 20
	for size, ok := range map[int64]bool{most: true, most + 1: false} {
		must(t, os.Truncate(path, size))
		if text, err := readFile(path, false); (err == nil) != ok || ok && len(text) != most {
			t.Errorf("of %d bytes %d are read: %v", size, len(text), err)
		}
	}
}

// Root gives a group access to a key by its mode, as Kubernetes does.
func TestAGroupMayReadAKeyThatRootOwns(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has files that root owns")
	}
	path := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(path, []byte("text"), 0o600))
	for _, step := range []struct {
		mode  os.FileMode
		owner int
		ok    bool
	}{{0o440, 0, true}, {0o640, 0, true}, {0o660, 0, false}, {0o644, 0, false},
		{0o640, 1234, false}} {
		must(t, os.Chmod(path, step.mode))
		must(t, os.Chown(path, step.owner, 1234))
		if _, err := readFile(path, true); (err == nil) != step.ok {
			t.Errorf("mode %#o of user %d: %v, want it read: %v", step.mode, step.owner, err,
				step.ok)
		}
	}
}

func TestOutOfDate(t *testing.T) {
	now := time.Now()
	for _, step := range []struct {
		from, to time.Duration
		want     string
	}{
		{-time.Hour, time.Hour, ""},
		{time.Hour, 2 * time.Hour, "not valid before " +
			now.Add(time.Hour).UTC().Format(time.RFC3339) + ": wait, or set the clock"},
		{-2 * time.Hour, -time.Hour, "expired at " +
			now.Add(-time.Hour).UTC().Format(time.RFC3339) + ": make a new one"},
	} {
		c := Certificate{NotBefore: now.Add(step.from), NotAfter: now.Add(step.to)}
		if got := c.outOfDate(now); got != step.want {
			t.Errorf("%v to %v: %q, want %q", step.from, step.to, got, step.want)
		}
	}
}

// A certificate that is out of date is a problem unless the same file is in force already.
func TestDatesOfFilesInForce(t *testing.T) {
	cert := func(text byte) Certificate {
		return Certificate{Key: "tls.cert", NotAfter: time.Now().Add(-1), text: [32]byte{text}}
	}
	r := &report{config: new(Config), certs: []Certificate{cert(1), cert(2)}}
	expired := r.dates([]Certificate{cert(0), cert(2)})
	if len(expired) != 1 || expired[0].text != cert(2).text || len(r.problems) != 1 {
		t.Errorf("%d in force are out of date, %d problems; want one each", len(expired),
			len(r.problems))
	}
}
