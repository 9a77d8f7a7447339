package mtlsserver

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// A Serial is a certificate's serial number in canonical form: lower-case hex without leading
// zeros.
type Serial string

const maxOctets = 20 // RFC 5280, section 4.1.2.2

// SerialOf returns the serial of cert. It fails if the serial is not positive or has more than 20
// octets.
func SerialOf(cert *x509.Certificate) (Serial, error) {
	n := cert.SerialNumber
	switch {
	case n == nil || n.Sign() <= 0:
		return "", errors.New("the serial is not positive")
	case n.BitLen() > maxOctets*8:
		return "", fmt.Errorf("the serial has more than %d octets", maxOctets)
	}
	return Serial(n.Text(16)), nil
}

// ParseSerial reads a serial as tools print it: in hex, with or without a leading 0x and colons
// between the octets ("openssl x509 -serial" and "-text"), or in decimal after "dec:". It refuses
// unmarked digits that could be hex or decimal, unless both mean the same number.
func ParseSerial(text string) (Serial, error) {
	wrong := func(format string, args ...any) (Serial, error) {
		return "", fmt.Errorf("serial %.60q: "+format, append([]any{text}, args...)...)
	}
	digits, marked := strings.CutPrefix(strings.ToLower(text), "0x")
	base, most := 16, 2*maxOctets
	if decimal, ok := strings.CutPrefix(text, "dec:"); ok {
		digits, base, most, marked = decimal, 10, 49, true // 2^160 has 49 digits
	} else if octets := strings.Split(digits, ":"); len(octets) > 1 {
		if slices.ContainsFunc(octets, func(octet string) bool { return len(octet) != 2 }) {
			return wrong("want two hex digits between colons")
		}
		digits, marked = strings.Join(octets, ""), true
	}
	if len(digits) > most {
		return wrong("too long: want at most %d octets, which are %d hex digits",
			maxOctets, 2*maxOctets)
	}
	n, ok := new(big.Int).SetString(digits, base)
	decimal, either := new(big.Int).SetString(digits, 10)
	switch {
	case !ok || strings.ContainsAny(digits, "+-"):
		return wrong("want hex as in 3A:0F, 3a0f or 0x3a0f, or decimal as in dec:4660")
	case n.Sign() == 0:
		return wrong("zero: want the certificate's own, which is positive")
	case n.BitLen() > 8*maxOctets:
		return wrong("too long: want at most %d octets", maxOctets)
	case either && !marked && decimal.Cmp(n) != 0:
		return wrong("write 0x%s if it is hex, dec:%s (which is 0x%x) if it is decimal",
			digits, digits, decimal)
	}
	return Serial(n.Text(16)), nil
}
