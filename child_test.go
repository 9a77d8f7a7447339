package lbproxy

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// childMain is the main function of a child process: it serves the given upstream until its
// standard input ends.
func childMain(upstream string) {
	a, err := New("child", []Upstream{{Addr: upstream}}, &Options{Loops: useLoops()})
	if err != nil {
		panic(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(l.Addr())
	time.AfterFunc(time.Minute, func() { os.Exit(1) }) // in case the parent was killed
	done := make(chan error)
	go func() { done <- a.Serve(l, nil) }()
	os.Stdin.Read(make([]byte, 1))
	a.Close()
	fmt.Println(<-done)
	os.Exit(0)
}

func TestServeRecoversWhenDescriptorsAreFree(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there is no limit of descriptors to set")
	}
	cmd := exec.Command("sh", "-c", `ulimit -n 40 && exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "LBPROXY_TEST_CHILD="+upstreamDoing(t, echo))
	stdin, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	addr, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err, stderr.String())
	}
	addr = strings.TrimSpace(addr)
	var conns []net.Conn
	served := func() bool {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return false // reset as soon as it was accepted
		}
		conns = append(conns, c)
		c.SetDeadline(time.Now().Add(100 * time.Millisecond))
		c.Write([]byte("x"))
		_, err = c.Read(make([]byte, 1))
		return err == nil
	}
	stuck := 0
	// far more than it can have; the others wait or are reset
	for n := 0; n < 60 && stuck < 10; n++ {
		if !served() {
			stuck++
		}
	}
	if stuck == 0 {
		t.Fatal("the child never ran out of descriptors")
	}
	for _, c := range conns {
		c.Close()
	}
	late, start := lateness(), time.Now()
	for !served() && time.Since(start) < 20*time.Second {
		// Waiting connections come first, and some of them take descriptors without getting enough.
	}
	if took := time.Since(start) - late(); took > 1500*time.Millisecond {
		t.Errorf("not served before %v, want at most the second that Serve waits, and half a "+
			"second more",
			took)
	}
	conns[len(conns)-1].Close()
	stdin.Close()
	if line, _ := lines.ReadString('\n'); line != ErrAppClosed.Error()+"\n" {
		t.Errorf("Serve returned %q", line)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if n := strings.Count(stderr.String(), "cannot accept"); n < 1 || n > 20 {
		t.Errorf("%d log lines about it:\n%s", n, stderr.String())
	}
}

// blockingMain is another: the client's socket blocks, and must not block the garbage collector.
func blockingMain() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	a, err := New("child", []Upstream{{Addr: l.Addr().String()}}, nil) // nobody accepts from it
	if err != nil {
		panic(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		panic(err)
	}
	c, err := l.Accept()
	if err != nil {
		panic(err)
	}
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		panic(err)
	}
	f.Fd() // this does it
	done := make(chan Result)
	go func() {
		r, _ := a.ServeConn(context.Background(), &Conn{Client: c})
		done <- r
	}()
	for a.Stats().Upstreams[0].Open == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // so that the upload waits; otherwise this tests nothing
	runtime.GC()
	client.Close()
	a.Close()
	fmt.Println("done:", (<-done).End)
	os.Exit(0)
}

func TestBlockingSocketDoesNotStopTheProcess(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), "LBPROXY_TEST_CHILD=blocking")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "done: ") {
		t.Errorf("%v: %s", err, out)
	}
}
