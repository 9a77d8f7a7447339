//go:build unix

package mtlsserver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"
)

// BenchmarkRefusal measures the cost of refusing a client, the client's own half of the handshake
// included. The clients have no certificate, one of a foreign CA, or a chain of their own CAs with
// our CA's name. cpu-ms/op does not depend on the load of the machine.
func BenchmarkRefusal(b *testing.B) {
	for _, row := range []struct {
		name  string
		chain int // CAs beside the leaf; negative: no certificate
		curve elliptic.Curve
	}{
		{"no certificate", -1, nil},
		{"leaf", 0, nil},
		{"14 P-256", 14, elliptic.P256()},
		{"14 P-521", 14, elliptic.P521()},
		{"32 P-521", 32, elliptic.P521()},
	} {
		b.Run(row.name, func(b *testing.B) {
			l := newLab(b, nil)
			var cert *tls.Certificate
			if row.chain >= 0 {
				c := newAuthority(b, l.ca.cert.Subject.CommonName).issue(b, leafOf(0xa11ce))
				if row.chain > 0 {
					c.Certificate = append(c.Certificate,
						sameNames(b, row.curve, row.chain, "ca")...)
				}
				cert = &c
			}
			start := processorTime(b)
			for b.Loop() {
				raw, err := net.Dial("tcp", l.addr("web"))
				must(b, err)
				c := tls.Client(raw, l.clientConfig(cert))
				if err := greeted(c, "web"); err == nil {
					b.Fatal("it was let in")
				}
				raw.Close()
			}
			b.ReportMetric((processorTime(b)-start).Seconds()*1000/float64(b.N), "cpu-ms/op")
		})
	}
}

// processorTime returns the CPU time that the process has used so far.
func processorTime(b *testing.B) time.Duration {
	var use syscall.Rusage
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &use))
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// sameNames returns CAs of the same name, each of which could have signed the one before.
func sameNames(b *testing.B, curve elliptic.Curve, n int, name string) (chain [][]byte) {
	subject := pkix.Name{CommonName: name}
	for i := range n {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		must(b, err)
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: subject,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
		must(b, err)
		chain = append(chain, der)
	}
	return chain
}

// BenchmarkFirstExchange measures the first exchange after a handshake, with TCP_NODELAY as Go and
// curl have it, and with Nagle's algorithm, as Python, Java and openssl have it.
func BenchmarkFirstExchange(b *testing.B) {
	for name, noDelay := range map[string]bool{"NODELAY": true, "Nagle": false} {
		b.Run(name, func(b *testing.B) {
			quiet, err := net.Listen("tcp", "127.0.0.1:0")
			must(b, err)
			defer quiet.Close()
			go func() { // an upstream that waits for its client to speak
				for {
					c, err := quiet.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						io.Copy(c, c)
					}()
				}
			}()
			l := newLab(b, func(l *lab) {
				l.config.Apps[0].Upstreams[0].Addr = quiet.Addr().String()
			})
			var took []time.Duration
			for b.Loop() {
				raw, err := net.Dial("tcp", l.addr("web"))
				must(b, err)
				must(b, raw.(*net.TCPConn).SetNoDelay(noDelay))
				c := tls.Client(raw, l.clientConfig(&l.alice))
				must(b, c.Handshake())
				start := time.Now()
				must(b, echoed(c))
				took = append(took, time.Since(start))
				raw.Close()
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/exchange")
		})
	}
}
