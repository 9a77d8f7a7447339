package lbproxy_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Tests of a whole process's memory run the proxy in a child: this program, started again with the
// address of an upstream in this variable.
const memoryChild = "LBPROXY_TEST_MEMORY_CHILD"

func init() {
	if upstream := os.Getenv(memoryChild); upstream != "" {
		if err := serveUntilStdinEnds(upstream); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// serveUntilStdinEnds serves upstream over TCP and over TLS, and prints where.
func serveUntilStdinEnds(upstream string) error {
	config, _ := proxytest.TLSConfigs()
	handshake := lbproxy.HandshakeTLS(config, nil)
	a, err := lbproxy.New("child", []lbproxy.Upstream{{Addr: upstream}}, &lbproxy.Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err == nil {
				err = smallBuffers(c)
			}
			return c, err
		},
	})
	if err != nil {
		return err
	}
	served := make(chan error)
	for _, overTLS := range []bool{false, true} {
		admit := func(_ context.Context, c *lbproxy.Conn) error { return smallBuffers(c.Client) }
		if overTLS {
			plain := admit
			admit = func(ctx context.Context, c *lbproxy.Conn) error {
				return errors.Join(plain(ctx, c), handshake(ctx, c))
			}
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		go func() { served <- a.Serve(l, admit) }()
	}
	os.Stdin.Read(make([]byte, 1))
	a.Close()
	return errors.Join(unlessClosed(<-served), unlessClosed(<-served))
}

func unlessClosed(err error) error {
	if err == lbproxy.ErrAppClosed {
		return nil
	}
	return err
}

// smallBuffers bounds c's socket buffers, which may grow to megabytes for each connection by
// default.
func smallBuffers(c net.Conn) error {
	tcp := c.(*net.TCPConn)
	return errors.Join(tcp.SetReadBuffer(64<<10), tcp.SetWriteBuffer(64<<10))
}

// memoryFactor is how many times more memory a program takes under the race detector.
func memoryFactor() int {
	if proxytest.Race {
		return 10
	}
	return 1
}

// A memoryProxy is a child whose upstream sends without end.
type memoryProxy struct {
	addrs [2]string // over TCP, over TLS
	pid   int
}

func newMemoryProxy(t *testing.T, env ...string) memoryProxy {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Env = append(cmd.Env, memoryChild+"="+proxytest.Upstream(t, func(c *net.TCPConn) {
		smallBuffers(c)
		proxytest.Pattern(0).Send(c, 1<<40)
	}))
	stdin, err := cmd.StdinPipe()
	proxytest.Must(t, err)
	stdout, err := cmd.StdoutPipe()
	proxytest.Must(t, err)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	proxytest.Must(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child: %v\n%s", err, stderr.String())
		}
	})
	p := memoryProxy{pid: cmd.Process.Pid}
	lines := bufio.NewReader(stdout)
	for i := range p.addrs {
		line, err := lines.ReadString('\n')
		proxytest.Must(t, err)
		p.addrs[i] = strings.TrimSpace(line)
	}
	return p
}

// read connects, over TCP if i is even and over TLS if it is odd, and reads n bytes.
func (p memoryProxy) read(t *testing.T, i int, n int64) (net.Conn, error) {
	tcp, err := net.DialTimeout("tcp", p.addrs[i%2], proxytest.Patience)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { tcp.Close() })
	smallBuffers(tcp)
	tcp.SetDeadline(time.Now().Add(4 * proxytest.Patience))
	var c net.Conn = tcp
	if i%2 == 1 {
		c = tls.Client(tcp, &tls.Config{InsecureSkipVerify: true})
	}
	b := make([]byte, 32<<10)
	for got := int64(0); got < n; {
		m, err := c.Read(b)
		if err != nil {
			return c, fmt.Errorf("after %d bytes: %w", got, err)
		}
		if err := proxytest.Pattern(0).Check(got, b[:m]); err != nil {
			return c, err
		}
		got += int64(m)
	}
	return c, nil
}

// resident returns how many bytes of memory the process has.
func (p memoryProxy) resident(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.pid) + "/statm")
	proxytest.Must(t, err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	proxytest.Must(t, err)
	return pages * os.Getpagesize()
}

func TestSlowReadersDoNotGrowTheProcess(t *testing.T) {
	t.Parallel()
	most := 2 * 64 << 10 * memoryFactor() // bytes for each
	const runtime = 2 << 20               // bytes, however many there are
	readers, seconds := 200, 2
	if testing.Short() {
		readers, seconds = 50, 1
	}
	for kind, name := range []string{"TCP", "TLS"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newMemoryProxy(t)
			c, err := p.read(t, kind, 1<<20) // the first one allocates more
			proxytest.Must(t, err)
			c.Close()
			before := p.resident(t)
			var reading sync.WaitGroup
			for i := range readers {
				c, err := p.read(t, kind, 200_000) // enough to be taken for bulk
				proxytest.Must(t, err)
				reading.Go(func() {
					for range seconds {
						if _, err := io.ReadFull(c, make([]byte, 1<<10)); err != nil {
							t.Errorf("reader %d: %v", i, err)
						}
						<-time.After(time.Second) // a kilobyte a second
					}
				})
			}
			reading.Wait()
			if each := (p.resident(t) - before - runtime) / readers; each > most {
				t.Errorf("the process grew by %d KiB a reader, want at most %d", each>>10, most>>10)
			}
		})
	}
}

func TestProcessShortOfMemoryKeepsServing(t *testing.T) {
	t.Parallel()
	const fast, bulk = 4, 16 << 20
	limit := 24 << 20 * memoryFactor() // less than 300 connections could use
	slow := 300
	if testing.Short() || proxytest.Race {
		slow = 50
	}
	p := newMemoryProxy(t, fmt.Sprint("GOMEMLIMIT=", limit))
	var slowOnes []net.Conn
	for i := range slow { // their data fills all buffers
		c, err := p.read(t, i, 100_000)
		if err != nil {
			t.Fatalf("slow reader %d: %v", i, err)
		}
		slowOnes = append(slowOnes, c)
	}
	var wg sync.WaitGroup
	for i := range fast {
		wg.Go(func() {
			if _, err := p.read(t, i, bulk); err != nil {
				t.Errorf("fast reader %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if resident, most := p.resident(t), 3*limit; resident > most {
		t.Errorf("the process has %d MiB with %d readers, want at most %d",
			resident>>20, slow+fast, most>>20)
	}
	for _, c := range slowOnes {
		c.Close()
	}
	for i := range 2 {
		if _, err := p.read(t, i, bulk/8); err != nil {
			t.Errorf("afterwards: %v", err)
		}
	}
}
