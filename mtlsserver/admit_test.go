package mtlsserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
)

// An alert in plain text is not taken for a broken protocol.
func TestReasonOfATLSError(t *testing.T) {
	certified := tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}
	for _, test := range []struct {
		op, text string
		state    tls.ConnectionState
		want     Reason
	}{
		{"remote error", "tls: unknown certificate authority", tls.ConnectionState{}, ClientAlert},
		{"local error", "tls: bad record MAC", tls.ConnectionState{}, ClientAlert},
		{"local error", "tls: bad record MAC", certified, HandshakeFailed},
		{"local error", "tls: unexpected message", tls.ConnectionState{}, HandshakeFailed},
		{"read", "connection reset by peer", tls.ConnectionState{}, ClientGone},
	} {
		err := &net.OpError{Op: test.op, Err: errors.New(test.text)}
		if got := refusalOf(err, test.state).Reason; got != test.want {
			t.Errorf("%v: %s, want %s", err, got, test.want)
		}
	}
}
