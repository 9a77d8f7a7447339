// Package proxytest holds helpers for the tests of this module: a leak check, upstreams, pairs of
// connections, streams whose every byte can be checked, and certificates.
//
// Functions with a testing.TB fail the test on an error and clean up when the test ends. The others
// panic, because Examples and child processes have no testing.TB.
package proxytest

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Patience bounds how long a test waits for an expected event. It is long because a busy machine
// may not run a test for seconds; a test that passes does not wait so long.
const Patience = 20 * time.Second

// Main runs the tests, and exits with status 1 if they pass and leave a goroutine or a descriptor
// behind. Tests that call t.Parallel run 16 at a time unless -parallel is given, because they are
// those that wait. A package uses Main in one line:
//
//	func TestMain(m *testing.M) { proxytest.Main(m) }
func Main(m interface{ Run() int }) {
	flag.Set("test.parallel", "16") // Run parses the command line, which overrides this
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close() // makes the runtime's poller open its descriptors, which stay open
	}
	files := Descriptors()
	code := m.Run()
	if code == 0 && !fuzzing() { // package testing leaves goroutines behind when it fuzzes
		if left := awaitNone(Patience, files); left != "" {
			fmt.Fprintln(os.Stderr, "proxytest: the tests passed and left this behind:\n"+left)
			code = 1
		}
	}
	os.Exit(code)
}

func fuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != f.DefValue {
			return true
		}
	}
	return false
}

// awaitNone waits until no other goroutine runs and no more descriptors than files are open. It
// returns a description of the leaks that remain after patience, or "".
func awaitNone(patience time.Duration, files int) string {
	for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		runtime.GC() // closes the pipes that io.Copy keeps in a pool
		stacks, extra := Goroutines(), Descriptors()-files
		if len(stacks) == 0 && extra <= 0 {
			return ""
		}
		if time.Now().After(late) {
			return fmt.Sprintf("%d descriptors and %d goroutines\n%s",
				extra, len(stacks), strings.Join(stacks, "\n\n"))
		}
	}
}

// Goroutines returns the stacks of all goroutines except the caller's and those that the standard
// library never ends.
func Goroutines() []string {
	buf := make([]byte, 1<<20)
	n := runtime.Stack(buf, true)
	for n == len(buf) {
		buf = make([]byte, 2*len(buf))
		n = runtime.Stack(buf, true)
	}
	stacks := strings.Split(strings.TrimSpace(string(buf[:n])), "\n\n")
	return slices.DeleteFunc(stacks[1:], func(stack string) bool {
		return strings.Contains(stack, "os/signal.loop") // runs from the first Notify on
	})
}

// Descriptors returns the number of open descriptors, or 0 on systems without /proc.
func Descriptors() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(entries) - 1 // without the one that reads the folder
}

// HeapInUse returns the bytes of live objects on the heap. It collects garbage until that frees no
// more, because objects in a sync.Pool survive the first collection.
func HeapInUse() int64 {
	for last := int64(math.MaxInt64); ; {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		now := int64(m.HeapAlloc)
		if now >= last {
			return last
		}
		last = now
	}
}

// Eventually polls ok until it returns true, and fails the test with what if it does not within
// Patience. Use it only for states that no channel reports.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for late := time.Now().Add(Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("after %v still not: %s", Patience, what)
		}
	}
}

// Receive returns the next value of c, and fails the test if there is none within Patience.
func Receive[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	late := time.NewTimer(Patience)
	defer late.Stop()
	select {
	case v := <-c:
		return v
	case <-late.C:
		t.Fatalf("after %v still not: %s", Patience, what)
		panic("unreachable")
	}
}

// Must fails the test if err is not nil.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Listen listens on a free port of 127.0.0.1 until the test ends.
func Listen(t testing.TB) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Must(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// taken has the addresses that FreeAddr has returned.
var taken sync.Map

// FreeAddr returns an address of 127.0.0.1 that was free a moment ago, and that no other call
// returns. Its port is below those that the kernel hands out, so that nobody gets it by chance
// before the test listens there, or while a server is away.
func FreeAddr(t testing.TB) string {
	t.Helper()
	syscall.ForkLock.RLock() // see ListenAgain
	defer syscall.ForkLock.RUnlock()
	for range 1000 {
		addr := fmt.Sprintf("127.0.0.1:%d", 11000+rand.IntN(20000))
		if _, known := taken.LoadOrStore(addr, true); known {
			continue
		}
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
	t.Fatal("no port is free")
	return ""
}

// ListenAgain listens at an address whose listener was closed before. A child that was forked before
// the close holds the socket, too, until it calls exec. ListenAgain waits for that.
func ListenAgain(t testing.TB, addr string) net.Listener {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := net.Listen("tcp", addr)
	Must(t, err)
	return l
}

// RefusingAddr returns a loopback address where nobody listens.
func RefusingAddr(t testing.TB) string {
	t.Helper()
	return FreeAddr(t)
}

// Dial connects to addr. The connection has a deadline of Patience, so that no test hangs, and is
// closed when the test ends.
func Dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, Patience)
	Must(t, err)
	t.Cleanup(func() { c.Close() })
	Must(t, c.SetDeadline(time.Now().Add(Patience)))
	return c.(*net.TCPConn)
}

// Duplex returns the two ends of a TCP connection on loopback. Both are closed when the test ends.
func Duplex(t testing.TB) (dialled, accepted *net.TCPConn) {
	t.Helper()
	l := Listen(t)
	defer l.Close()
	dialled = Dial(t, l.Addr().String())
	accepted, err := l.AcceptTCP()
	Must(t, err)
	t.Cleanup(func() { accepted.Close() })
	Must(t, accepted.SetDeadline(time.Now().Add(Patience)))
	return dialled, accepted
}

// Upstream starts a server that calls handle for each connection, each on a goroutine of its own,
// and closes the connection after it. It returns the server's address. When the test ends it stops
// accepting and waits for every handle, so handle must return once its connection has ended.
func Upstream(t testing.TB, handle func(*net.TCPConn)) string {
	t.Helper()
	l := Listen(t)
	stop := Serve(l, func(c net.Conn) { handle(c.(*net.TCPConn)) })
	t.Cleanup(stop)
	return l.Addr().String()
}

// Serve calls handle for each connection that l accepts, until stop is called. Stop closes l and
// waits for every handle.
func Serve(l net.Listener, handle func(net.Conn)) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	return func() { l.Close(); wg.Wait() }
}

// Echo sends back what c receives, to the end.
func Echo(c *net.TCPConn) { io.Copy(c, c) }

// Ping sends one byte and waits for it to come back.
func Ping(c net.Conn) error {
	if _, err := c.Write([]byte{'p'}); err != nil {
		return err
	}
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	if b[0] != 'p' {
		return fmt.Errorf("proxytest: %q came back, want %q", b, "p")
	}
	return nil
}

// Cut reads c to its end and returns an error unless a reset or another failure ends it. A stream
// that was cut must end, and must not end as if it were complete.
func Cut(c net.Conn) error {
	switch n, err := io.Copy(io.Discard, c); {
	case err == nil:
		return fmt.Errorf("proxytest: a clean end after %d bytes, want a failure", n)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("proxytest: still open after %d bytes", n)
	}
	return nil
}

// ReadReset reads c until it is reset, and returns what came before. It fails the test if c ends in
// any other way.
func ReadReset(t testing.TB, c io.Reader) []byte {
	t.Helper()
	b, err := io.ReadAll(c)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d bytes, then %v; want a reset", len(b), err)
	}
	return b
}
