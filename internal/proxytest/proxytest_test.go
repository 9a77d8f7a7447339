package proxytest

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

func TestLeaksAreNamed(t *testing.T) {
	// The goroutines of the test itself count here, so this looks for one by its name only.
	stop, ended := make(chan struct{}), make(chan struct{})
	go leakedGoroutine(stop, ended)
	Eventually(t, "the goroutine runs", func() bool {
		return strings.Contains(strings.Join(Goroutines(), "\n"), "leakedGoroutine(")
	})
	if left := awaitNone(0, Descriptors()); !strings.Contains(left, "leakedGoroutine") {
		t.Errorf("a goroutine was left behind, and this was found: %s", left)
	}
	close(stop)
	<-ended
	if before := Descriptors(); before > 0 {
		// A garbage collection may close descriptors meanwhile, as those of the pipes that io.Copy
		// keeps. So this opens more than were open.
		for range before + 1 {
			f, err := os.Open(os.DevNull)
			Must(t, err)
			defer f.Close()
		}
		if now := Descriptors(); now <= before {
			t.Errorf("%d descriptors after opening %d more than %d", now, before+1, before)
		}
	}
}

func leakedGoroutine(stop, ended chan struct{}) { <-stop; close(ended) }

func TestPatternFindsEveryFault(t *testing.T) {
	const n = 9 << 20 // more than twice the noise
	var all bytes.Buffer
	sent, err := Pattern(7).Send(&all, n)
	if sent != n || err != nil {
		t.Fatalf("sent %d, %v", sent, err)
	}
	right := all.Bytes()
	Must(t, Pattern(7).Exactly(bytes.NewReader(right), n))
	for name, wrong := range map[string][]byte{
		"changed":   append(append(bytes.Clone(right[:n-1]), right[n-1]^1), right[n:]...),
		"lost":      append(bytes.Clone(right[:1000]), right[1001:]...),
		"doubled":   append(append(bytes.Clone(right[:1<<20]), right[1<<20-1]), right[1<<20:]...),
		"moved":     append(bytes.Clone(right[64<<10:128<<10]), right[64<<10:]...),
		"too short": right[:n-1],
		"too long":  append(bytes.Clone(right), right[0]),
	} {
		if err := Pattern(7).Exactly(bytes.NewReader(wrong), n); err == nil {
			t.Errorf("%s: not found", name)
		}
	}
	if Pattern(8).Check(0, right[:8]) == nil {
		t.Error("two patterns look the same")
	}
	reset := io.MultiReader(bytes.NewReader(right[:10]), errReader{syscall.ECONNRESET})
	if got, err := Pattern(7).Receive(reset); got != 10 || err != syscall.ECONNRESET {
		t.Errorf("received %d, %v", got, err)
	}
}

type errReader struct{ error }

func (r errReader) Read([]byte) (int, error) { return 0, r.error }

func TestDuplexAndUpstream(t *testing.T) {
	a, b := Duplex(t)
	go func() { Echo(b); b.Close() }()
	Must(t, Ping(a))
	a.CloseWrite()
	if rest, err := io.ReadAll(a); len(rest) > 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	c := Dial(t, Upstream(t, func(c *net.TCPConn) {
		Echo(c)
		c.SetLinger(0)
	}))
	Must(t, Ping(c))
	c.CloseWrite()
	Must(t, Cut(c))
	if c, err := net.Dial("tcp", RefusingAddr(t)); err == nil {
		c.Close()
		t.Error("somebody listens on RefusingAddr")
	}
}

func TestPipeHalfClosesAndResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe()
		go func() { io.Copy(b, b); b.SetLinger(0); b.Close() }()
		Must(t, Ping(a))
		Must(t, a.CloseWrite())
		if _, err := a.Read(make([]byte, 1)); err != syscall.ECONNRESET {
			t.Errorf("read after a reset: %v", err)
		}
		if _, err := b.Write([]byte("x")); err == nil {
			t.Error("wrote after Close")
		}
		a, b = Pipe()
		a.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read after its deadline: %v", err)
		}
		b.Close()
	})
}

func TestAuthority(t *testing.T) {
	ca := NewAuthority()
	handshake := func(server, client *tls.Config) error {
		a, b := Duplex(t)
		answered := make(chan error, 1)
		go func() {
			s := tls.Server(b, server)
			defer s.Close()
			answered <- s.Handshake()
		}()
		err := tls.Client(a, client).Handshake()
		return errors.Join(err, <-answered)
	}
	mutual := ca.ServerConfig()
	mutual.ClientAuth, mutual.ClientCAs = tls.RequireAndVerifyClientCert, ca.Pool()
	alice := ca.Client(Serial(0xa11ce), Name("alice"))
	if err := handshake(mutual, ca.ClientConfig(&alice)); err != nil {
		t.Error(err)
	}
	if serial := alice.Leaf.SerialNumber.Int64(); serial != 0xa11ce {
		t.Errorf("serial %x", serial)
	}
	expired := ca.Client(Valid(time.Unix(0, 0), time.Unix(1, 0)))
	stranger := NewAuthority().Client()
	below := ca.Sub().Client()
	for name, cert := range map[string]*tls.Certificate{
		"expired": &expired, "of another authority": &stranger, "of a sub-authority": &below,
	} {
		if handshake(mutual, ca.ClientConfig(cert)) == nil {
			t.Errorf("a certificate %s got in", name)
		}
	}
	certFile, keyFile := WritePEM(t, t.TempDir(), "alice", alice)
	if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		t.Error(err)
	}
}
