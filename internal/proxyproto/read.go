package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

const (
	maxV1 = 107           // bytes of a line, CRLF included
	maxV2 = 2*108 + 4<<10 // bytes after the first 16: the longest addresses, and 4 KiB of values
)

// addressesLength is the length in bytes of the addresses and ports, for each family of version 2.
var addressesLength = [4]int{0, 2*4 + 2*2, 2*16 + 2*2, 2 * 108}

// Read reads one header, of either version, from r. It reads no byte beyond the header. As soon as
// the bytes read cannot begin a header, it returns an error that quotes them. If r fails, it wraps
// r's error. Read has no timeout of its own: set a deadline on r.
func Read(r io.Reader) (*Header, error) {
	b := make([]byte, 0, maxV1)
	for len(b) < len(signatureV2) { // every header is at least as long
		n, err := io.ReadAtLeast(r, b[len(b):len(signatureV2)], 1)
		if err != nil {
			return nil, cut(b, err)
		}
		b = b[:len(b)+n]
		if !agree(b, signatureV1) && !agree(b, signatureV2) {
			return nil, fmt.Errorf("PROXY header: %q is not the beginning of one", b)
		}
	}
	if b[0] == signatureV1[0] {
		return readV1(r, b)
	}
	return readV2(r, b)
}

// agree reports whether b and signature are equal up to the length of the shorter one.
func agree(b []byte, signature string) bool {
	n := min(len(b), len(signature))
	return string(b[:n]) == signature[:n]
}

// cut returns the error for a header that broke off after b, because reading failed with err.
func cut(b []byte, err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("PROXY header: ends after %d bytes, %q: %w", len(b), b, err)
}

// readMore appends n bytes from r to b.
func readMore(r io.Reader, b []byte, n int) ([]byte, error) {
	n, err := io.ReadFull(r, b[len(b):len(b)+n])
	b = b[:len(b)+n]
	if err != nil {
		return b, cut(b, err)
	}
	return b, nil
}

// readV1 reads the rest of a header of version 1 that begins with b.
func readV1(r io.Reader, b []byte) (*Header, error) {
	for seen := 0; !bytes.HasSuffix(b, []byte("\r\n")); {
		for ; seen < len(b); seen++ {
			lf, afterCR := b[seen] == '\n', seen > 0 && b[seen-1] == '\r'
			if lf != afterCR {
				return nil, fmt.Errorf("PROXY header: %q has a CR or LF that is not a CRLF", b)
			}
		}
		if len(b) == maxV1 {
			return nil, fmt.Errorf("PROXY header: no CRLF in the first %d bytes, %q", maxV1, b)
		}
		n := min(2, maxV1-len(b)) // at least the CRLF is to come
		if b[len(b)-1] == '\r' {
			n = 1
		}
		var err error
		if b, err = readMore(r, b, n); err != nil {
			return nil, err
		}
	}
	line := string(b[:len(b)-2])
	rest := strings.TrimPrefix(line, signatureV1)
	if rest == "UNKNOWN" || strings.HasPrefix(rest, "UNKNOWN ") {
		return new(Header), nil // the protocol says to ignore the rest of the line
	}
	h, err := parseV1(strings.Split(rest, " "))
	if err != nil {
		return nil, fmt.Errorf("PROXY header: %q: %w", line, err)
	}
	return h, nil
}

func parseV1(fields []string) (*Header, error) {
	if fields[0] != "TCP4" && fields[0] != "TCP6" {
		return nil, fmt.Errorf("protocol %q is none of TCP4, TCP6 and UNKNOWN", fields[0])
	}
	if len(fields) != 5 {
		return nil, errors.New("want a protocol, two addresses and two ports, with single spaces")
	}
	var ends [2]netip.AddrPort
	for i := range ends {
		address, port := fields[1+i], fields[3+i]
		a, err := netip.ParseAddr(address)
		if err != nil || a.Is4() != (fields[0] == "TCP4") || a.Zone() != "" {
			return nil, fmt.Errorf("%q is not an address of %s", address, fields[0])
		}
		p, err := strconv.ParseUint(port, 10, 16)
		if err != nil || strconv.FormatUint(p, 10) != port {
			return nil, fmt.Errorf("%q is not a port", port)
		}
		ends[i] = plain(netip.AddrPortFrom(a, uint16(p)))
	}
	return &Header{Source: ends[0], Dest: ends[1]}, nil
}

// readV2 reads the rest of a header of version 2 after its signature b.
func readV2(r io.Reader, b []byte) (*Header, error) {
	b, err := readMore(r, b, 4)
	if err != nil {
		return nil, err
	}
	command, family, length := b[12], b[13], int(binary.BigEndian.Uint16(b[14:]))
	switch {
	case command != commandLocal && command != commandProxy:
		return nil, fmt.Errorf("PROXY header: version and command %#02x, want 0x20 or 0x21",
			command)
	case family>>4 > 3 || family&0xF > 2:
		return nil, fmt.Errorf("PROXY header: %#02x is no address family and protocol", family)
	case length > maxV2:
		return nil, fmt.Errorf("PROXY header: length %d, want at most %d", length, maxV2)
	case command == commandProxy && length < addressesLength[family>>4]:
		return nil, fmt.Errorf("PROXY header: length %d, "+
			"want at least %d for family and protocol %#02x",
			length, addressesLength[family>>4], family)
	}
	body, err := readMore(r, make([]byte, 0, length), length)
	if err != nil {
		return nil, err
	}
	if command == commandLocal {
		return &Header{Local: true}, nil
	}
	switch family {
	case familyTCP4:
		return &Header{
			Source: addrPort(body[:4], body[8:]),
			Dest:   addrPort(body[4:8], body[10:]),
		}, nil
	case familyTCP6:
		source, dest := addrPort(body[:16], body[32:]), addrPort(body[16:32], body[34:])
		return &Header{Source: source, Dest: dest}, nil
	}
	return new(Header), nil // UDP or Unix sockets: no TCP connection has such addresses
}

func addrPort(address, port []byte) netip.AddrPort {
	a, _ := netip.AddrFromSlice(address)
	return plain(netip.AddrPortFrom(a, binary.BigEndian.Uint16(port)))
}
