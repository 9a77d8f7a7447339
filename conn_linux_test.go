package lbproxy

import (
	"io"
	"net"
	"runtime"
	"testing"
)

func TestPipesAreBoundedAndNoneIsLost(t *testing.T) {
	before := openPipes()
	var pool pipePool
	inUse := make([]*pipe, maxPipes)
	for range 2 { // once with new pipes, once with used ones
		for i := range inUse {
			if inUse[i] = pool.get(); inUse[i] == nil {
				t.Fatalf("no pipe when %d are in use", i)
			}
		}
		if pool.get() != nil {
			t.Errorf("more than %d pipes", maxPipes)
		}
		pool.drop(inUse[0]) // for which there may be another one
		for _, p := range inUse[1:] {
			pool.put(p)
		}
	}
	pool.mu.Lock()
	pool.spare = len(pool.free)
	pool.mu.Unlock()
	pool.trim()
	if n := openPipes() - before; n != 0 || pool.all != 0 {
		t.Errorf("trimmed: %d descriptors are open, %d pipes counted", n, pool.all)
	}
	late, early := pool.get(), pool.get()
	pool.put(early)
	pool.close()
	pool.put(late)
	if n := openPipes() - before; n != 0 {
		t.Errorf("closed: %d descriptors are open", n)
	}
}

// What was written to a peer that has reset the connection is not waited for, and nothing more can be written.
func TestNothingIsUnsentToAPeerThatIsGone(t *testing.T) {
	l := listen(t)
	peer := dial(t, l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go c.Write(make([]byte, 64<<20)) // far more than the systems take
	for unsent(c) == 0 {
		runtime.Gosched()
	}
	peer.SetLinger(0)
	peer.Close()
	for reset := false; !reset; reset, _ = wasReset(c) {
		runtime.Gosched()
	}
	if n := unsent(c); n != 0 {
		t.Errorf("%d bytes are said to be on their way", n)
	}
	if n, err := direct(c).Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("writing: %d, %v; want an error", n, err)
	}
}

func TestNoPipeIsKeptWhenCloseReturns(t *testing.T) {
	a, _ := newApp(t, Options{}, upstreamDoing(t, func(c *net.TCPConn) { sendPattern(c, 8<<20) }))
	io.Copy(io.Discard, dial(t, serve(t, a, nil)))
	a.Close()
	a.pipes.mu.Lock()
	defer a.pipes.mu.Unlock()
	if a.pipes.all == 0 || len(a.pipes.free) > 0 {
		t.Errorf("%d pipes were made, %d are kept", a.pipes.all, len(a.pipes.free))
	}
}
