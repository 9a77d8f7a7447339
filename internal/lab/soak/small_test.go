package soak

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

// What a small machine has little of: places in the queue of a listener, and memory. Descriptors have a test in the
// root package.

// echoServer starts an upstream that answers with what it is sent.
func echoServer(t testing.TB) (addr string) {
	return serverDoing(t, func(c *net.TCPConn) { io.Copy(c, struct{ io.Reader }{c}) })
}

func serverDoing(t testing.TB, handle func(*net.TCPConn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func echoed(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte{'x'}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

func TestAFullAcceptQueueDelaysAndLosesNothing(t *testing.T) {
	const most = 2
	a, err := lbproxy.New("small", []lbproxy.Upstream{{Addr: echoServer(t)}}, &lbproxy.Options{MaxConns: most, Logger: slog.New(slog.DiscardHandler)})
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	if !setBacklog(l, 1) {
		l.Close()
		t.Skip("there is no way to make the queue small")
	}
	serve(t, a, l)

	dial := func(patience time.Duration) net.Conn {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		if err != nil {
			return nil
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	var holding, waiting []net.Conn
	for range most {
		c := dial(patience)
		must(t, echoed(c))
		holding = append(holding, c)
	}
	turnedAway := 0
	for range 8 { // more than the queue takes; the system has the others try again, and they give up
		if c := dial(200 * time.Millisecond); c != nil {
			waiting = append(waiting, c)
		} else {
			turnedAway++
		}
	}
	if turnedAway == 0 || len(waiting) == 0 {
		t.Fatalf("%d got into the queue, %d did not: want some of both", len(waiting), turnedAway)
	}
	if s := a.Stats(); s.Open != most {
		t.Errorf("%d open, want %d", s.Open, most)
	}
	for _, c := range holding {
		c.Close()
	}
	for i, c := range waiting {
		if err := echoed(c); err != nil {
			t.Errorf("number %d in the queue: %v", i, err)
		}
		c.Close()
	}
	c := dial(patience)
	if c == nil {
		t.Fatal("nobody can connect any more")
	}
	must(t, echoed(c))
}

const childVariable = "LBPROXY_SOAK_CHILD"

// childMain is what this test's program does when a test runs it as a child: it serves an upstream, over TCP and over
// TLS, until its standard input ends.
func childMain() {
	fatal := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	fatal(err)
	cert := certificate(1, "child")
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	fatal(err)
	conf := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	a, err := lbproxy.New("child", []lbproxy.Upstream{{Addr: os.Getenv(childVariable)}}, &lbproxy.Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err == nil {
				err = smallBuffers(c)
			}
			return c, err
		},
	})
	fatal(err)
	done := make(chan error)
	for _, overTLS := range []bool{false, true} {
		admit := func(ctx context.Context, c net.Conn) (context.Context, lbproxy.Conn, error) {
			if err := smallBuffers(c); err != nil || !overTLS {
				return nil, lbproxy.Conn{}, err
			}
			t := lbproxy.TLSServer(c, conf, 0)
			return nil, lbproxy.Conn{Client: t}, t.HandshakeContext(ctx)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		fatal(err)
		fmt.Println(l.Addr())
		go func() { done <- a.Serve(l, admit) }()
	}
	os.Stdin.Read(make([]byte, 1))
	a.Close()
	for range 2 {
		if err := <-done; err != lbproxy.ErrAppClosed {
			fatal(err)
		}
	}
	os.Exit(0)
}

// serve has a serve what l accepts, until the test ends.
func serve(t *testing.T, a *lbproxy.LBProxyApp, l net.Listener) {
	served := make(chan error, 1)
	go func() { served <- a.Serve(l, nil) }()
	t.Cleanup(func() {
		a.Close()
		if err := <-served; !errors.Is(err, lbproxy.ErrAppClosed) {
			t.Error(err)
		}
	})
}

// smallBuffers bounds what the system keeps for c: megabytes for each connection, else, of what all of it has for TCP.
func smallBuffers(c net.Conn) error {
	tcp := c.(*net.TCPConn)
	return errors.Join(tcp.SetReadBuffer(64<<10), tcp.SetWriteBuffer(64<<10))
}

// child starts a child with an upstream that sends without end, and returns where it listens, over TCP and over TLS.
func child(t *testing.T, env ...string) (addrs [2]string, pid int) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), env...), childVariable+"="+serverDoing(t, func(c *net.TCPConn) {
		smallBuffers(c)
		for sent := int64(0); ; {
			n, err := c.Write(stream{}.at(sent, 256<<10))
			if sent += int64(n); err != nil {
				return
			}
		}
	}))
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child: %v\n%s", err, stderr.String())
		}
	})
	lines := bufio.NewReader(stdout)
	for i := range addrs {
		line, err := lines.ReadString('\n')
		must(t, err)
		addrs[i] = strings.TrimSpace(line)
	}
	return addrs, cmd.Process.Pid
}

// reader connects to a child, over TCP and TLS in turns, and receives n bytes.
func reader(t *testing.T, addrs [2]string, i int, n int64) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", addrs[i%2], patience)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	smallBuffers(c)
	c.SetDeadline(time.Now().Add(giveUp))
	if i%2 == 1 {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	}
	buffer := make([]byte, 32<<10)
	for got := int64(0); got < n; {
		m, err := c.Read(buffer)
		if err != nil {
			return c, fmt.Errorf("after %d bytes: %w", got, err)
		}
		if wrong := (stream{}).check(got, buffer[:m]); wrong != "" {
			return c, errors.New(wrong)
		}
		got += int64(m)
	}
	return c, nil
}

func TestAProcessShortOfMemoryServesOn(t *testing.T) {
	slow := 300
	if testing.Short() || memoryFactor > 1 { // with the race detector there is no telling what is short
		slow = 50
	}
	const (
		limit = 24 // MiB: less than 300 connections need
		fast  = 4
		bulk  = 16 << 20
	)
	addrs, pid := child(t, "GOMEMLIMIT="+fmt.Sprint(limit*memoryFactor)+"MiB")
	reader := func(i int, n int64) (net.Conn, error) { return reader(t, addrs, i, n) }
	var slowOnes []net.Conn
	for i := range slow { // they have had something, and read no more; what they are sent fills all buffers there are
		c, err := reader(i, 100_000)
		if err != nil {
			t.Fatalf("slow reader %d: %v", i, err)
		}
		slowOnes = append(slowOnes, c)
	}
	var wg sync.WaitGroup
	for i := range fast {
		wg.Go(func() {
			if _, err := reader(i, bulk); err != nil {
				t.Errorf("fast reader %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	resident := residentMiB(pid)
	t.Logf("the child has %d MiB of memory with %d connections whose clients do not read", resident, slow)
	if most := 3 * limit * memoryFactor; resident > most {
		t.Errorf("the child has %d MiB of memory, want at most %d", resident, most)
	}
	for _, c := range slowOnes {
		c.Close()
	}
	for i := range 2 {
		if _, err := reader(i, bulk/8); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
}
