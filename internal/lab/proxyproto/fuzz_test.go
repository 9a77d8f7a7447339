package proxyproto

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	theirs "github.com/pires/go-proxyproto"
	"github.com/pires/go-proxyproto/tlvparse"

	ours "github.com/danielepagano/lbproxy/internal/proxyproto"
)

func init() {
	theirs.MaxV2HeaderSize = 216 + 4<<10 // as ours; the specification sets no bound
}

// A difference is a kind of header for which the two readers may differ.
type difference struct {
	specification string // the sentence of doc/proxy-protocol.txt
	covers        func(b []byte) bool
	// accepted names the reader that accepts such a header; if both do, we call it unknown.
	byUs, byThem bool
}

var differences = []difference{
	{
		"The receiver must not tolerate a single CR or LF character to end the line when a complete " +
			"CRLF sequence is expected.",
		func(b []byte) bool {
			line, _, _ := bytes.Cut(b, []byte("\n"))
			return bytes.HasPrefix(b, []byte("PROXY UNKNOWN ")) && bytes.Count(line, []byte("\r")) > 1
		}, false, true,
	},
	{
		"For other commands, the receiver is free to accept the connection anyway and use the real " +
			"endpoints addresses or to reject the connection.",
		func(b []byte) bool { return isV2(b, 0x21) && (b[13]>>4 == 0 || b[13]&0xF == 0) }, true, false,
	},
	{
		"The receiver must accept this connection as valid and must use the real connection endpoints " +
			"and discard the protocol block including the family which is ignored.",
		func(b []byte) bool {
			return isV2(b, 0x20) && b[13] != 0 && (b[13]>>4 == 0 || b[13]&0xF == 0)
		}, true, false,
	},
	{
		"A receiver is not required to implement other ones, provided that it automatically falls " +
			"back to the UNSPEC mode for the valid combinations above that it does not support.",
		func(b []byte) bool { return isV2(b, 0x21) && (b[13]>>4 == 3 || b[13]&0xF == 2) }, true, true,
	},
}

func isV2(b []byte, command byte) bool {
	return len(b) >= 16 && bytes.HasPrefix(b, theirs.SIGV2) && b[12] == command
}

// FuzzReadersAgree lets both readers read the same bytes. Both must refuse them, or find the same
// addresses and leave the same bytes behind the header.
func FuzzReadersAgree(f *testing.F) {
	v2 := string(theirs.SIGV2)
	four, six := "\x7f\x00\x00\x01\x7f\x00\x00\x02\x00\x01\xff\xff", strings.Repeat("\xfe", 36)
	for _, s := range []string{
		"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n",
		"PROXY TCP6 2001:db8::1 ::ffff:1.2.3.4 1 65535\r\n",
		"PROXY TCP6 fe80::1%1 1.2.3.4 01 65536\r\n",
		"PROXY UNKNOWN\r\n",
		"PROXY UNKNOWN a\rb\r\n",
		"PROXY UNKNOWN " + strings.Repeat("f", 91) + "\r\n",
		v2 + "\x21\x11\x00\x0c" + four + "after",
		v2 + "\x21\x11\x00\x12" + four + "\xe0\x00\x03ann",
		v2 + "\x21\x21\x00\x24" + six,
		v2 + "\x21\x12\x00\x0c" + four,
		v2 + "\x21\x32\x00\xd8" + strings.Repeat(six, 6),
		v2 + "\x21\x00\x00\x03\x01\x02\x03",
		v2 + "\x21\x10\x00\x0c" + four,
		v2 + "\x20\x00\x00\x00",
		v2 + "\x20\x11\x00\x01\xff",
		v2 + "\x20\x10\x00\x0c" + four,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		rest, buffered := bytes.NewReader(b), bufio.NewReaderSize(bytes.NewReader(b), 8<<10)
		h, err := ours.Read(rest)
		theirHeader, theirErr := theirs.Read(buffered)
		for _, d := range differences {
			if !d.covers(b) || d.byUs != (err == nil) || d.byThem != (theirErr == nil) {
				continue
			}
			if err == nil && h.Source.IsValid() {
				t.Fatalf("%q: we read %+v, want no address", b, h)
			}
			if err != nil || theirErr != nil {
				return
			}
			theirHeader.SourceAddr, theirHeader.DestinationAddr = nil, nil // of UDP, or paths
		}
		if (err == nil) != (theirErr == nil) {
			t.Fatalf("%q: we say %v, they %v", b, err, theirErr)
		}
		if err != nil {
			return
		}
		want := ours.Header{Local: theirHeader.Version == 2 && theirHeader.Command.IsLocal()}
		if source, dest, ok := theirHeader.TCPAddrs(); ok && !want.Local {
			want.Source, want.Dest = plain(source), plain(dest)
		}
		if *h != want {
			t.Fatalf("%q: we read %+v, they %+v", b, h, want)
		}
		ourRest, _ := io.ReadAll(rest)
		theirRest, _ := io.ReadAll(buffered)
		if !bytes.Equal(ourRest, theirRest) {
			t.Fatalf("%q: we leave %q, they %q", b, ourRest, theirRest)
		}
	})
}

func plain(a *net.TCPAddr) netip.AddrPort {
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// FuzzWritersAgree checks that both writers write the same header, byte for byte, and that each
// reader reads it.
func FuzzWritersAgree(f *testing.F) {
	four, six := []byte{192, 0, 2, 1}, bytes.Repeat([]byte{0xfd}, 16)
	mapped := append(append(make([]byte, 10), 255, 255), four...)
	f.Add(four, four, uint16(1), uint16(65535), "ann", uint16(tls.VersionTLS13), true)
	f.Add(six, six, uint16(0), uint16(443), strings.Repeat("x", 2000), uint16(tls.VersionTLS12), false)
	f.Add(mapped, four, uint16(0), uint16(443), "", uint16(0), false)
	f.Add(six, four, uint16(0), uint16(443), "a", uint16(7), true)
	f.Add([]byte{}, []byte{1}, uint16(0), uint16(443), "", uint16(7), false)
	f.Fuzz(func(t *testing.T, from, to []byte, fromPort, toPort uint16, name string,
		version uint16, verified bool) {
		name = strings.ToValidUTF8(name, "?") // as crypto/x509 has names
		source, _ := netip.AddrFromSlice(from)
		dest, _ := netip.AddrFromSlice(to)
		h := ours.Header{
			Source: netip.AddrPortFrom(source, fromPort), Dest: netip.AddrPortFrom(dest, toPort),
			ClientID: name,
		}
		if version != 0 {
			h.TLS = &ours.TLS{Version: version, Verified: verified, CN: name}
		}
		addr := func(a netip.AddrPort) net.Addr {
			if !a.IsValid() {
				return nil
			}
			return net.TCPAddrFromAddrPort(a)
		}
		for v, b := range map[byte][]byte{1: h.AppendV1(nil), 2: h.AppendV2(nil)} {
			read, err := theirs.Read(bufio.NewReader(bytes.NewReader(b)))
			if err != nil {
				t.Fatalf("%q: they do not read it: %v", b, err)
			}
			want := theirs.HeaderProxyFromAddrs(v, addr(h.Source), addr(h.Dest))
			if v == 1 && source.Unmap().Is4() != dest.Unmap().Is4() {
				// "It is the same format as the layer 3 source address and matches the same family." They
				// write the IPv4 address as IPv6; we say that it is "not possible to correctly fill the
				// PROXY line".
				want = theirs.HeaderProxyFromAddrs(v, nil, nil)
			}
			if v == 2 && want.Command.IsProxy() {
				checkTLVs(t, &h, read)
				tlvs, err := read.TLVs()
				if err == nil {
					err = want.SetTLVs(tlvs)
				}
				if err != nil {
					t.Fatalf("%q: %v", b, err)
				}
			}
			format, err := want.Format()
			if err != nil || !bytes.Equal(b, format) {
				t.Fatalf("version %d: we write %q, they %q, %v", v, b, format, err)
			}
			got, err := ours.Read(bytes.NewReader(format))
			if err != nil || got.Source.IsValid() != want.Command.IsProxy() ||
				got.Source.IsValid() && (got.Source != plain(net.TCPAddrFromAddrPort(h.Source)) ||
					got.Dest != plain(net.TCPAddrFromAddrPort(h.Dest))) {
				t.Fatalf("%q: we read %+v, %v, want %+v", format, got, err, h)
			}
		}
	})
}

// checkTLVs compares h's TLVs of the client with those that their reader finds.
func checkTLVs(t *testing.T, h *ours.Header, read *theirs.Header) {
	t.Helper()
	tlvs, err := read.TLVs()
	if err != nil {
		t.Fatal(err)
	}
	short := func(name string) string {
		if len(name) > ours.MaxValue {
			return ""
		}
		return name
	}
	id := ""
	for _, tlv := range tlvs {
		if tlv.Type == theirs.PP2_TYPE_MIN_CUSTOM {
			id = string(tlv.Value)
		}
	}
	if id != short(h.ClientID) {
		t.Fatalf("id %q, want %q", id, h.ClientID)
	}
	said, ok := tlvparse.FindSSL(tlvs)
	if ok != (h.TLS != nil) {
		t.Fatalf("TLS: %v, want %+v", ok, h.TLS)
	}
	if !ok {
		return
	}
	version, _ := said.SSLVersion()
	cn, _ := said.ClientCN()
	names := map[uint16]string{tls.VersionTLS10: "TLSv1", tls.VersionTLS11: "TLSv1.1",
		tls.VersionTLS12: "TLSv1.2", tls.VersionTLS13: "TLSv1.3"}
	if want := names[h.TLS.Version]; want != "" && version != want {
		t.Fatalf("TLS version %q, want %q", version, want)
	}
	cert := h.TLS.Verified || h.TLS.CN != ""
	if cn != short(h.TLS.CN) || said.Verified() != h.TLS.Verified || !said.ClientSSL() ||
		said.ClientCertConn() != cert || said.ClientCertSess() != cert {
		t.Fatalf("TLS %+v, want %+v", said, h.TLS)
	}
}
