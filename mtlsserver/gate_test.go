package mtlsserver

import (
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestSlowAndSilentHandshakesDoNotKeepOthersOut(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	const hostile, addresses = 500, 10
	var silent []net.Conn
	var slow sync.WaitGroup
	for i := range hostile {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%addresses))}}
		c, err := d.Dial("tcp", l.addr("web"))
		if errors.Is(err, os.ErrInvalid) || err != nil &&
			strings.Contains(err.Error(), "assign requested address") {
			t.Skip("127.0.0.2 is not ours here")
		}
		if errors.Is(err, syscall.ECONNRESET) {
			continue // one too many from its address
		}
		must(t, err)
		defer c.Close()
		if i%2 == 0 {
			slow.Go(func() { dribble(t, c) })
			continue
		}
		silent = append(silent, c)
	}
	start := time.Now()
	for range 20 {
		l.in(t, "web", &l.alice).Close()
	}
	t.Logf("20 legitimate clients took %v", time.Since(start))
	for _, c := range silent {
		must(t, ended(c))
	}
	slow.Wait()
	l.stop()
	must(t, <-l.ran)
	l.ran <- nil
	count := map[string]int{}
	for _, e := range l.log.all() {
		count[e["reason"]]++
	}
	if n := count[string(HandshakeTimeout)] + count[string(TooManyFromAddress)]; n != hostile ||
		count[string(HandshakeTimeout)] < 16*addresses {
		t.Errorf("reasons %v", count)
	}
}

// dribble sends a hello byte by byte, which must not extend the deadline. It returns when c has
// ended.
func dribble(t *testing.T, c net.Conn) {
	every := time.NewTicker(50 * time.Millisecond)
	defer every.Stop()
	text := []byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc, 3, 3} // how a long one begins
	for late := time.Now().Add(3 * patience); ; text = []byte{0} {
		if _, err := c.Write(text); err != nil {
			return // a read would find what looks like an end
		}
		if <-every.C; time.Now().After(late) {
			t.Error("a slow handshake was let go on")
			return
		}
	}
}

func TestNetwork(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1":                  "192.0.2.1/32",
		"::ffff:192.0.2.1":           "192.0.2.1/32",
		"2001:db8:1:2:3:4:5:6":       "2001:db8:1:2::/64",
		"fe80::1:2:3:4":              "fe80::/64",
		"::1":                        "::/64",
		"64:ff9b:1:fffe:ffff::1":     "64:ff9b:1:fffe::/64",
		"2001:db8:1:2:ffff:ffff::ff": "2001:db8:1:2::/64",
	} {
		a := &net.TCPAddr{IP: net.ParseIP(text), Port: 1,
			Zone: strings.Repeat("eth0", strings.Count(text, "fe80"))}
		if near, _ := networksOf(addrOf(a)); near.String() != want {
			t.Errorf("%s is in %s, want %s", text, near, want)
		}
	}
}

// A client whose deadline has passed still gets a free place, so that the log says that its
// handshake was late, not that its address had too many.
func TestFreePlaceComesBeforeTheDeadline(t *testing.T) {
	g := newGate(Handshake{Timeout: time.Minute, MaxConcurrent: 1, MaxPerAddress: 1})
	for range 100 {
		v := g.wait(someConn(t), addrOf(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}))
		if err := g.enter(t.Context(), v, time.Now().Add(-time.Second)); err != nil {
			t.Fatal(err)
		}
		must(t, g.leave(v, true))
	}
}
