package proxyproto

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// unhex returns the bytes of hexadecimal text with spaces.
func unhex(s string) string {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return string(b)
}

const ones = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

// signature is that of version 2, as section 2.2 of the protocol's text gives it.
var signature = unhex("0D0A0D0A 000D0A51 5549540A")

// v2 returns a header of version 2 that goes on with the given bytes.
func v2(s string) string { return signature + unhex(s) }

// The expected bytes are written by hand after the protocol's text.
func TestAppend(t *testing.T) {
	v4, v4Dest := ap("192.168.0.1:56324"), ap("192.168.0.11:443")
	v6, v6Dest := ap("[2001:db8::1]:56324"), ap("[2001:db8:0:1::b]:443")
	const unknown, line4 = "PROXY UNKNOWN\r\n", "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
	local := v2("20 00 0000")
	long := strings.Repeat("x", MaxValue)
	addresses4 := unhex("C0A80001 C0A8000B DC04 01BB")
	for _, tt := range []struct {
		name         string
		header       Header
		line, binary string
	}{
		{"TCP over IPv4, the example of section 2.1", Header{Source: v4, Dest: v4Dest},
			line4,
			v2("21 11 000C") + addresses4},
		{"TCP over IPv6", Header{Source: v6, Dest: v6Dest},
			"PROXY TCP6 2001:db8::1 2001:db8:0:1::b 56324 443\r\n",
			v2("21 21 0024 " +
				"20010DB8000000000000000000000001 20010DB800000001000000000000000B DC04 01BB")},
		{"IPv4-mapped, as sockets for both families have it",
			Header{Source: ap("[::ffff:192.168.0.1]:56324"), Dest: ap("[::ffff:192.168.0.11]:443")},
			line4,
			v2("21 11 000C") + addresses4},
		{"IPv6 to IPv4", Header{Source: v6, Dest: v4Dest}, unknown,
			v2("21 21 0024 " +
				"20010DB8000000000000000000000001 00000000000000000000FFFFC0A8000B DC04 01BB")},
		{"IPv4 to IPv6", Header{Source: v4, Dest: v6Dest}, unknown,
			v2("21 21 0024 " +
				"00000000000000000000FFFFC0A80001 20010DB800000001000000000000000B DC04 01BB")},
		{"a zone", Header{Source: ap("[fe80::1%eth0]:1"), Dest: ap("[fe80::2%eth0]:65535")},
			"PROXY TCP6 fe80::1 fe80::2 1 65535\r\n",
			v2("21 21 0024 " +
				"FE800000000000000000000000000001 FE800000000000000000000000000002 0001 FFFF")},
		{"the longest addresses",
			Header{Source: ap("[" + ones + "]:65535"), Dest: ap("[" + ones + "]:65535")},
			"PROXY TCP6 " + ones + " " + ones + " 65535 65535\r\n",
			v2("21 21 0024") + strings.Repeat("\xff", 36)},
		{"nothing known", Header{}, unknown, local},
		{"no destination", Header{Source: v4, ClientID: "ann"}, unknown, local},
		{"no source", Header{Dest: v4}, unknown, local},
		{"a health check",
			Header{Local: true, Source: v4, Dest: v4Dest, ClientID: "ann", TLS: new(TLS)},
			unknown, local},
		{"an id", Header{Source: v4, Dest: v4Dest, ClientID: "ann"},
			line4,
			v2("21 11 0012") + addresses4 + unhex("E0 0003") + "ann"},
		{"the longest id", Header{Source: v4, Dest: v4Dest, ClientID: long},
			line4,
			v2("21 11 040F") + addresses4 + unhex("E0 0400") + long},
		{"an id that is too long", Header{Source: v4, Dest: v4Dest, ClientID: long + "x"},
			line4,
			v2("21 11 000C") + addresses4},
		{"a verified client",
			Header{Source: v4, Dest: v4Dest, ClientID: "ann",
				TLS: &TLS{Version: tls.VersionTLS13, Verified: true, CN: "ann"}},
			line4,
			v2("21 11 002A") + addresses4 +
				unhex("20 0015 07 00000000 21 0007") + "TLSv1.3" + unhex("22 0003") + "ann" +
				unhex("E0 0003") + "ann"},
		{"a certificate that was not verified",
			Header{Source: v4, Dest: v4Dest, TLS: &TLS{Version: tls.VersionTLS12, CN: "ann"}},
			line4,
			v2("21 11 0024") + addresses4 +
				unhex("20 0015 07 00000001 21 0007") + "TLSv1.2" + unhex("22 0003") + "ann"},
		{"TLS without a certificate",
			Header{Source: v4, Dest: v4Dest, TLS: &TLS{Version: tls.VersionTLS10}},
			line4,
			v2("21 11 001C") + addresses4 + unhex("20 000D 01 00000001 21 0005") + "TLSv1"},
		{"a certificate without a name",
			Header{Source: v4, Dest: v4Dest, TLS: &TLS{Version: tls.VersionTLS11, Verified: true}},
			line4,
			v2("21 11 001E") + addresses4 + unhex("20 000F 07 00000000 21 0007") + "TLSv1.1"},
	} {
		if got := string(tt.header.AppendV1([]byte("before "))); got != "before "+tt.line {
			t.Errorf("%s: version 1\n got %q\nwant %q", tt.name, got, "before "+tt.line)
		}
		if got := string(tt.header.AppendV2([]byte("before "))); got != "before "+tt.binary {
			t.Errorf("%s: version 2\n got %x\nwant %x", tt.name, got, "before "+tt.binary)
		}
	}
}

func TestReadGoodHeaders(t *testing.T) {
	v4 := Header{Source: ap("192.168.0.1:56324"), Dest: ap("192.168.0.11:443")}
	v6 := Header{Source: ap("[2001:db8::1]:56324"), Dest: ap("[2001:db8::b]:443")}
	addresses4 := unhex("C0A80001 C0A8000B DC04 01BB")
	addresses6 := unhex("20010DB8000000000000000000000001 " +
		"20010DB800000000000000000000000B DC04 01BB")
	for _, tt := range []struct {
		name, text string
		want       Header
	}{
		{"the example of section 2.1", "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", v4},
		{"the shortest line with addresses", "PROXY TCP6 :: :: 0 0\r\n",
			Header{Source: ap("[::]:0"), Dest: ap("[::]:0")}},
		{"IPv6", "PROXY TCP6 2001:db8::1 2001:db8::b 56324 443\r\n", v6},
		{"IPv6 in full and in upper case",
			"PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 2001:DB8:0:0:0:0:0:B " +
				"56324 443\r\n", v6},
		{"IPv4-mapped", "PROXY TCP6 ::ffff:192.168.0.1 ::ffff:c0a8:b 56324 443\r\n", v4},
		{"the longest line", "PROXY TCP6 " + ones + " " + ones + " 65535 65535\r\n",
			Header{Source: ap("[" + ones + "]:65535"), Dest: ap("[" + ones + "]:65535")}},
		{"unknown", "PROXY UNKNOWN\r\n", Header{}},
		{"unknown, with something", "PROXY UNKNOWN 1 2\r\n", Header{}},
		{"unknown, the longest line", "PROXY UNKNOWN " + ones + " " + ones + " 65535 65535\r\n",
			Header{}},

		{"v2, IPv4", v2("21 11 000C") + addresses4, v4},
		{"v2, IPv6", v2("21 21 0024") + addresses6, v6},
		{"v2, IPv4-mapped", v2("21 21 0024" +
			"00000000000000000000FFFFC0A80001 00000000000000000000FFFFC0A8000B DC04 01BB"), v4},
		{"v2, with values", v2("21 11 0012") + addresses4 + unhex("E0 0003 616E6E"), v4},
		{"v2, with values that end too soon", v2("21 11 000F") + addresses4 + unhex("E0 FFFF"), v4},
		{"v2, with 4 KiB of values", v2("21 11 100C") + addresses4 + strings.Repeat("x", 4<<10),
			v4},
		{"v2, as long as it may be", v2("21 31 10D8") + strings.Repeat("x", 216+4<<10), Header{}},
		{"v2, UDP over IPv4", v2("21 12 000C") + addresses4, Header{}},
		{"v2, UDP over IPv6", v2("21 22 0024") + addresses6, Header{}},
		{"v2, no protocol", v2("21 10 000C") + addresses4, Header{}},
		{"v2, Unix stream", v2("21 31 00D8") + strings.Repeat("/", 216), Header{}},
		{"v2, Unix datagram", v2("21 32 00D8") + strings.Repeat("/", 216), Header{}},
		{"v2, unspecified", v2("21 00 0000"), Header{}},
		{"v2, unspecified, with something", v2("21 00 0003 010203"), Header{}},
		{"v2, LOCAL", v2("20 00 0000"), Header{Local: true}},
		{"v2, LOCAL with addresses", v2("20 11 000C") + addresses4, Header{Local: true}},
		{"v2, LOCAL with less than addresses", v2("20 21 0001 FF"), Header{Local: true}},
	} {
		for _, how := range []func(io.Reader) io.Reader{
			nil, iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader,
		} {
			for _, after := range []string{"", "\r\n", "after"} {
				all := strings.NewReader(tt.text + after)
				r := io.Reader(all)
				if how != nil {
					r = how(r)
				}
				h, err := Read(r)
				if err != nil || *h != tt.want {
					t.Errorf("%s: %+v, %v, want %+v", tt.name, h, err, tt.want)
					continue
				}
				if rest, err := io.ReadAll(r); string(rest) != after || err != nil {
					t.Errorf("%s: %q is left, %v, want %q", tt.name, rest, err, after)
				}
			}
		}
	}
}

func TestReadRefusesBadHeaders(t *testing.T) {
	addresses4 := unhex("C0A80001 C0A8000B DC04 01BB")
	for _, tt := range []struct {
		text, want string
		taken      int // bytes that may be taken before the error; 0: all
	}{
		{"", "ends after 0 bytes", 0},
		{"PROXY", `ends after 5 bytes, "PROXY": unexpected EOF`, 0},
		{"PROXY TCP4 1.2.3.4", "ends after 18 bytes", 0},
		{"GET / HTTP/1.1\r\n", `"GET / HTTP/1" is not the beginning of one`, 12},
		{"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n", "is not the beginning", 12},
		{"PROXY\tTCP4 1.2.3.4 1.2.3.4 1 1\r\n", "is not the beginning", 12},
		{"PROXY  TCP4 1.2.3.4 1.2.3.4 1 1\r\n", `protocol ""`, 0},
		{"PROXY TCP5 1.2.3.4 1.2.3.4 1 1\r\n",
			`protocol "TCP5" is none of TCP4, TCP6 and UNKNOWN`, 0},
		{"PROXY tcp4 1.2.3.4 1.2.3.4 1 1\r\n", `protocol "tcp4"`, 0},
		{"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n", `protocol "UDP4"`, 0},
		{"PROXY UNKNOWNX\r\n", `protocol "UNKNOWNX"`, 0},
		{"PROXY TCP4 1.2.3.4\r\n", "want a protocol, two addresses and two ports", 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "want a protocol", 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 \r\n", "want a protocol", 0},
		{"PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n", "want a protocol", 0},
		{"PROXY TCP4 1.2.3.04 1.2.3.4 1 1\r\n", `"1.2.3.04" is not an address of TCP4`, 0},
		{"PROXY TCP4 1.2.3.256 1.2.3.4 1 1\r\n", "is not an address", 0},
		{"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n", "is not an address", 0},
		{"PROXY TCP4 ::1 1.2.3.4 1 1\r\n", "is not an address", 0},
		{"PROXY TCP4 1.2.3.4 ::ffff:1.2.3.4 1 1\r\n", "is not an address", 0},
		{"PROXY TCP6 1.2.3.4 ::1 1 1\r\n", `"1.2.3.4" is not an address of TCP6`, 0},
		{"PROXY TCP6 ::1 fe80::1%eth0 1 1\r\n", `"fe80::1%eth0" is not an address`, 0},
		{"PROXY TCP6 1::2::3 ::1 1 1\r\n", "is not an address", 0},
		{"PROXY TCP6 [::1] ::1 1 1\r\n", "is not an address", 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n", `"01" is not a port`, 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", `"65536" is not a port`, 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 -1 1\r\n", "is not a port", 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 +1 1\r\n", "is not a port", 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1 \r\n", `"" is not a port`, 0},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\nGET / HTTP/1.1\r\n\r\n",
			"CR or LF that is not a CRLF", 33},
		{"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\rGET / HTTP/1.1\r\n\r\n",
			"CR or LF that is not a CRLF", 33},
		{"PROXY UNKNOWN\nGET / HTTP/1.1\r\n\r\n", "CR or LF that is not a CRLF", 15},
		{"PROXY \r\n\r\n\r\n\r\n\r\n", `protocol "\r\n\r\n"`, 12},
		{"PROXY UNKNOWN " + strings.Repeat("x", 200), "no CRLF in the first 107 bytes", 107},
		{"PROXY UNKNOWN " + strings.Repeat("x", 107-15) + "\r\n",
			"no CRLF in the first 107 bytes", 107},
		{"PROXY UNKNOWN " + strings.Repeat("x", 107-15), "ends after 106 bytes", 0},

		{signature[:11], "ends after 11 bytes", 0},
		{signature[:11] + "\r", "is not the beginning", 0},
		{signature, "ends after 12 bytes", 0},
		{v2("21 11 00"), "ends after 15 bytes", 0},
		{v2("11 11 000C") + addresses4, "version and command 0x11", 16},
		{v2("31 11 000C") + addresses4, "version and command 0x31", 16},
		{v2("22 11 000C") + addresses4, "version and command 0x22, want 0x20 or 0x21", 16},
		{v2("21 41 000C") + addresses4, "0x41 is no address family and protocol", 16},
		{v2("21 13 000C") + addresses4, "0x13 is no", 16},
		{v2("20 FF 0000"), "0xff is no", 16},
		{v2("21 11 000B") + addresses4, "length 11, want at least 12", 16},
		{v2("21 12 000B") + addresses4, "length 11, want at least 12", 16},
		{v2("21 21 0023") + addresses4, "length 35, want at least 36", 16},
		{v2("21 31 00D7") + addresses4, "length 215, want at least 216", 16},
		{v2("21 11 10D9") + addresses4, "length 4313, want at most 4312", 16},
		{v2("20 00 FFFF") + addresses4, "length 65535, want at most 4312", 16},
		{v2("21 11 000C") + addresses4[:11], "ends after 11 bytes", 0},
		{v2("20 00 0001"), "ends after 0 bytes", 0},
	} {
		r := strings.NewReader(tt.text)
		h, err := Read(r)
		if err == nil || h != nil || !strings.Contains(err.Error(), tt.want) ||
			!strings.HasPrefix(err.Error(), "PROXY header: ") {
			t.Errorf("%q: %+v, %v, want an error that says %q", tt.text, h, err, tt.want)
		}
		if taken := len(tt.text) - r.Len(); tt.taken != 0 && taken > tt.taken {
			t.Errorf("%q: took %d bytes, want at most %d", tt.text, taken, tt.taken)
		}
		if strings.HasPrefix(tt.want, "ends") && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: %v is not an unexpected EOF", tt.text, err)
		}
	}
}

func TestReadWrapsErrors(t *testing.T) {
	for _, text := range []string{"", "PROXY TCP4 1", signature, signature + "\x20"} {
		_, err := Read(io.MultiReader(strings.NewReader(text),
			iotest.ErrReader(os.ErrDeadlineExceeded)))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: %v does not wrap the conn's error", text, err)
		}
	}
}

// A peer that is not a proxy and waits for an answer is refused by its first bytes.
func TestReadStopsAtTheFirstWrongByte(t *testing.T) {
	for _, text := range []string{"S", "PROXX", "\r\n\r\n\r", "EHLO"} {
		client, server := net.Pipe()
		go client.Write([]byte(text))
		if _, err := Read(server); err == nil ||
			!strings.Contains(err.Error(), "is not the beginning") {
			t.Errorf("%q: %v", text, err)
		}
		client.Close()
		server.Close()
	}
}

func TestTrust(t *testing.T) {
	prefixes := func(ss ...string) (ps []netip.Prefix) {
		for _, s := range ss {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		return ps
	}
	trust, err := NewTrust(prefixes("10.1.2.3/8", "192.0.2.7/32", "2001:db8::/32", "fe80::/10",
		"::ffff:172.16.0.0/108"))
	if err != nil {
		t.Fatal(err)
	}
	tcp := func(s string) net.Addr { return net.TCPAddrFromAddrPort(ap(s)) }
	for _, tt := range []struct {
		addr net.Addr
		want bool
	}{
		{tcp("10.255.0.1:1"), true},
		{tcp("[::ffff:10.255.0.1]:1"), true},
		{tcp("11.0.0.1:1"), false},
		{tcp("[::ffff:11.0.0.1]:1"), false},
		{tcp("192.0.2.7:1"), true},
		{tcp("192.0.2.8:1"), false},
		{tcp("[2001:db8::1]:1"), true},
		{tcp("[2001:db9::1]:1"), false},
		{tcp("[fe80::1%eth0]:1"), true},
		{tcp("172.16.9.9:1"), true},
		{tcp("[::ffff:172.16.9.9]:1"), true},
		{tcp("172.32.0.1:1"), false},
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}, true}, // of 16 bytes
		{&net.TCPAddr{}, false},
		{(*net.TCPAddr)(nil), false},
		{nil, false},
		{&net.UnixAddr{Name: "10.0.0.1:1", Net: "unix"}, false},
		{&net.UDPAddr{IP: net.IPv4(10, 0, 0, 1)}, false},
		{textAddr{"tcp", "10.0.0.1:1"}, true},
		{textAddr{"tcp", "10.0.0.1"}, false},
		{textAddr{"pipe", "10.0.0.1:1"}, false},
	} {
		if got := trust.Contains(tt.addr); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.addr, got, tt.want)
		}
		if tt.want && (Trust{}).Contains(tt.addr) {
			t.Errorf("the zero Trust trusts %v", tt.addr)
		}
	}
	for _, tt := range []struct {
		prefixes []netip.Prefix
		want     string
	}{
		{nil, "no prefix"},
		{[]netip.Prefix{{}}, "prefix 0 is not valid"},
		{prefixes("10.0.0.0/8", "0.0.0.0/0"), "prefix 1, 0.0.0.0/0, would trust everybody"},
		{prefixes("::/0"), "would trust everybody"},
		{prefixes("::ffff:0:0/96"), "would trust everybody"},
	} {
		if _, err := NewTrust(tt.prefixes); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want an error that says %q", tt.prefixes, err, tt.want)
		}
	}
}

type textAddr struct{ network, text string }

func (a textAddr) Network() string { return a.network }
func (a textAddr) String() string  { return a.text }

func TestAppendDoesNotAllocateWhereThereIsRoom(t *testing.T) {
	h := &Header{Source: ap("192.0.2.1:1"), Dest: ap("192.0.2.2:2"), ClientID: "ann"}
	b := make([]byte, 0, 536)
	if n := testing.AllocsPerRun(100, func() { h.AppendV2(h.AppendV1(b[:0])) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Read does not panic for any bytes. It consumes the header and nothing else, in whatever pieces
// the bytes come.
func FuzzRead(f *testing.F) {
	f.Add([]byte("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n"))
	f.Add([]byte("PROXY TCP6 2001:db8::1 ::ffff:1.2.3.4 1 65535\r\n"))
	f.Add([]byte("PROXY UNKNOWN a\rb\nc\r\n"))
	f.Add([]byte(v2("21 11 0012 C0A80001 C0A8000B DC04 01BB E0 0003 616E6E 00")))
	f.Add([]byte(v2("21 21 0024") + strings.Repeat("\x01", 40)))
	f.Add([]byte(v2("20 00 0000")))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := Read(r)
		taken := b[:len(b)-r.Len()]
		slow, slowErr := Read(iotest.OneByteReader(bytes.NewReader(b)))
		if (err == nil) != (slowErr == nil) {
			t.Fatalf("%q: %v, byte by byte %v", b, err, slowErr)
		}
		if err != nil {
			return
		}
		if *h != *slow {
			t.Fatalf("%q: %+v, byte by byte %+v", b, h, slow)
		}
		if again, err := Read(bytes.NewReader(taken)); err != nil || *again != *h {
			t.Fatalf("%q: %+v, without what follows %+v, %v", b, h, again, err)
		}
		if _, err := Read(bytes.NewReader(taken[:len(taken)-1])); err == nil {
			t.Fatalf("%q: is a header without its last byte", taken)
		}
		switch {
		case string(taken[:6]) == "PROXY ":
			crlf := []byte("\r\n")
			if len(taken) > 107 || !bytes.HasSuffix(taken, crlf) || bytes.Count(taken, crlf) != 1 {
				t.Fatalf("took %q", taken)
			}
		case len(taken) != 16+int(taken[14])<<8+int(taken[15]) || len(taken) > 16+216+4<<10:
			t.Fatalf("took %d bytes: %q", len(taken), taken)
		}
		known := h.Source.IsValid()
		if h.Local && known || known != h.Dest.IsValid() || h.TLS != nil || h.ClientID != "" {
			t.Fatalf("%+v", h)
		}
	})
}

// Read returns the Header that was appended, without zones and names.
func FuzzRoundTrip(f *testing.F) {
	four, sixteen := []byte{192, 0, 2, 1}, bytes.Repeat([]byte{255}, 16)
	f.Add(four, four, uint16(1), uint16(65535), "ann", "eth0", uint16(tls.VersionTLS13), true)
	f.Add(sixteen, sixteen, uint16(0), uint16(443), strings.Repeat("x", 2000), "", uint16(0), false)
	f.Add(four, make([]byte, 16), uint16(0), uint16(443), "", "", uint16(7), false)
	f.Add([]byte{}, []byte{1}, uint16(0), uint16(443), "", "", uint16(7), false)
	f.Fuzz(func(t *testing.T, from, to []byte, fromPort, toPort uint16, name, zone string,
		version uint16, flag bool) {
		source, _ := netip.AddrFromSlice(from)
		dest, _ := netip.AddrFromSlice(to)
		h := &Header{
			Source: netip.AddrPortFrom(source.WithZone(zone), fromPort),
			Dest:   netip.AddrPortFrom(dest, toPort),
		}
		if flag {
			h.ClientID, h.TLS = name, &TLS{Version: version, CN: name, Verified: len(name)%2 == 0}
		}
		want := Header{Source: plain(h.Source), Dest: plain(h.Dest)}
		known := source.IsValid() && dest.IsValid()
		if !known {
			want = Header{Local: true}
		}
		binary := h.AppendV2(nil)
		if got, err := Read(bytes.NewReader(binary)); err != nil || *got != want ||
			len(binary) > 4<<10 {
			t.Fatalf("version 2: %+v, %v, want %+v", got, err, want)
		}
		if !known || want.Source.Addr().Is4() != want.Dest.Addr().Is4() {
			want = Header{}
		}
		line := h.AppendV1(nil)
		if got, err := Read(bytes.NewReader(line)); err != nil || *got != want {
			t.Fatalf("version 1: %q: %+v, %v, want %+v", line, got, err, want)
		}
	})
}
