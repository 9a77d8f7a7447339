// Package proxyproto writes and reads the headers of the PROXY protocol, versions 1 and 2, by which
// a proxy tells the next server who its client is. The protocol's text is doc/proxy-protocol.txt of
// HAProxy.
package proxyproto

import (
	"crypto/tls"
	"encoding/binary"
	"net/netip"
	"strconv"
)

// A Header is the content of a PROXY protocol header. The zero Header says that the client is
// unknown.
type Header struct {
	// Local says that the sender connects on its own behalf, as a health check does. The receiver
	// then uses the addresses of the connection and ignores the other fields.
	Local bool

	// Source is the client's address, Dest the address that it connected to. If either is invalid,
	// both are unknown, as for clients that do not use TCP. Zones are not transmitted.
	// Read returns IPv4-mapped IPv6 addresses as IPv4.
	Source, Dest netip.AddrPort

	// TLS and ClientID are sent by AppendV2, if the addresses are known. Read ignores them.
	TLS      *TLS   // nil: the client does not speak TLS
	ClientID string // sent as type 0xE0, unless it is empty or longer than MaxValue
}

// TLS describes the client's TLS connection, as HAProxy's send-proxy-v2-ssl-cn does.
type TLS struct {
	Version  uint16 // as in tls.ConnectionState
	Verified bool   // the client has a certificate and it was verified
	CN       string // the common name in its certificate; left out if longer than MaxValue
}

// MaxValue is the longest name in bytes that AppendV2 sends. It leaves out a longer name instead of
// cutting it, because the beginning of a name may be another client's name.
const MaxValue = 1 << 10

const (
	signatureV1 = "PROXY "
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"

	commandLocal = 0x20 // version 2 in the upper four bits
	commandProxy = 0x21

	familyUnknown = 0x00
	familyTCP4    = 0x11
	familyTCP6    = 0x21

	typeTLS        = 0x20
	typeTLSVersion = 0x21
	typeTLSCN      = 0x22
	typeClientID   = 0xE0 // the first type for applications

	clientTLS         = 0x01
	clientCertConn    = 0x02 // a certificate came on this connection
	clientCertSession = 0x04 // or on an earlier one of the session
)

// AppendV1 appends h in version 1, a line of text, to b. The line is "PROXY UNKNOWN" unless both
// addresses are known and of the same family.
func (h *Header) AppendV1(b []byte) []byte {
	source, dest, ok := h.addresses()
	if !ok || source.Addr().Is4() != dest.Addr().Is4() {
		return append(b, "PROXY UNKNOWN\r\n"...)
	}
	b = append(b, "PROXY TCP6 "...)
	if source.Addr().Is4() {
		b[len(b)-2] = '4'
	}
	b = append(source.Addr().AppendTo(b), ' ')
	b = append(dest.Addr().AppendTo(b), ' ')
	b = strconv.AppendUint(b, uint64(source.Port()), 10)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(dest.Port()), 10)
	return append(b, "\r\n"...)
}

// AppendV2 appends h in version 2 to b. Unless both addresses are known it appends a LOCAL header
// without addresses. If one address is IPv4 and one is IPv6, it sends the IPv4 one as IPv4-mapped.
// The header is shorter than 4 KiB, the most that nginx accepts.
func (h *Header) AppendV2(b []byte) []byte {
	b = append(b, signatureV2...)
	source, dest, ok := h.addresses()
	if !ok {
		return append(b, commandLocal, familyUnknown, 0, 0)
	}
	start := len(b) + 4
	if source.Addr().Is4() && dest.Addr().Is4() {
		b = append(b, commandProxy, familyTCP4, 0, 0)
		b = append(b, source.Addr().AsSlice()...)
		b = append(b, dest.Addr().AsSlice()...)
	} else {
		b = append(b, commandProxy, familyTCP6, 0, 0)
		from, to := source.Addr().As16(), dest.Addr().As16()
		b = append(b, from[:]...)
		b = append(b, to[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, source.Port())
	b = binary.BigEndian.AppendUint16(b, dest.Port())
	if h.TLS != nil {
		b = appendValue(b, typeTLS, h.TLS.append(nil))
	}
	b = appendName(b, typeClientID, h.ClientID)
	binary.BigEndian.PutUint16(b[start-2:], uint16(len(b)-start))
	return b
}

// append appends the value of the type PP2_TYPE_SSL to b.
func (t *TLS) append(b []byte) []byte {
	client, verify := byte(clientTLS), uint32(1) // not 0: not verified
	if t.Verified {
		verify = 0
	}
	if t.Verified || t.CN != "" {
		client |= clientCertConn | clientCertSession
	}
	b = append(b, client)
	b = binary.BigEndian.AppendUint32(b, verify)
	b = appendName(b, typeTLSVersion, versionName(t.Version))
	return appendName(b, typeTLSCN, t.CN)
}

// versionName returns OpenSSL's name for a version of TLS, which HAProxy sends too.
func versionName(version uint16) string {
	switch version {
	case tls.VersionTLS10:
		return "TLSv1"
	case tls.VersionTLS11:
		return "TLSv1.1"
	case tls.VersionTLS12:
		return "TLSv1.2"
	case tls.VersionTLS13:
		return "TLSv1.3"
	}
	return tls.VersionName(version)
}

// appendName appends s as a value, unless it is empty or longer than MaxValue.
func appendName(b []byte, kind byte, s string) []byte {
	if s == "" || len(s) > MaxValue {
		return b
	}
	return appendValue(b, kind, []byte(s))
}

func appendValue(b []byte, kind byte, value []byte) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint16(b, uint16(len(value)))
	return append(b, value...)
}

// addresses returns the addresses to send, and whether both are known.
func (h *Header) addresses() (source, dest netip.AddrPort, ok bool) {
	if h.Local || !h.Source.IsValid() || !h.Dest.IsValid() {
		return source, dest, false
	}
	return plain(h.Source), plain(h.Dest), true
}

// plain returns a without a zone, and as IPv4 if it is IPv4-mapped.
func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone("").Unmap(), a.Port())
}
