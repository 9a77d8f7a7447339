package connlimit

import (
	"errors"
	"io"
	"net"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

func TestListenerClosesConnectionsBeyondItsPlaces(t *testing.T) {
	tcp := proxytest.Listen(t)
	l := Listener(tcp, 2)
	accepted := make(chan net.Conn)
	ended := make(chan error)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn { return proxytest.Dial(t, tcp.Addr().String()) }
	dial()
	first := proxytest.Receive(t, "the first connection", accepted)
	dial()
	second := proxytest.Receive(t, "the second connection", accepted)
	defer second.Close()
	if _, err := dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the third read %v, want EOF", err)
	}
	first.Close()
	first.Close() // gives no second place
	dial()
	defer proxytest.Receive(t, "the fourth connection", accepted).Close()
	if _, err := dial().Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the fifth read %v, want EOF", err)
	}
	l.Close()
	if err := proxytest.Receive(t, "the end", ended); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v, want net.ErrClosed", err)
	}
}
