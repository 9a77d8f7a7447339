package mtlsserver

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// A Serial is a certificate's serial number in canonical form: lower-case hex without leading zeros.
type Serial string

const maxOctets = 20 // RFC 5280, section 4.1.2.2

// SerialOf returns the serial of cert. It fails if that is not positive or has more than 20 octets.
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

// ParseSerial reads a serial as tools print it: in hex, with or without 0x in front and colons between the octets
// ("openssl x509 -serial" and "-text"), or in decimal after "dec:". Digits alone are refused where the two readings
// differ.
func ParseSerial(text string) (Serial, error) {
	if digits, ok := strings.CutPrefix(text, "dec:"); ok {
		if digits == "" || strings.Trim(digits, "0123456789") != "" {
			return "", fmt.Errorf("serial %q: want decimal digits after dec", text)
		}
		if len(digits) > 49 { // of 2^160
			return "", tooLong(text)
		}
		n, _ := new(big.Int).SetString(digits, 10)
		return canonical(text, n)
	}
	hex, marked := strings.CutPrefix(strings.ToLower(text), "0x")
	if strings.Contains(hex, ":") {
		octets := strings.Split(hex, ":")
		for _, octet := range octets {
			if len(octet) != 2 {
				return "", fmt.Errorf("serial %q: want two hex digits between colons", text)
			}
		}
		hex, marked = strings.Join(octets, ""), true
	}
	if hex == "" || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", fmt.Errorf("serial %q: want hex as in 3A:0F, 3a0f or 0x3a0f, or decimal as in dec:4660", text)
	}
	if len(hex) > 2*maxOctets {
		return "", tooLong(text)
	}
	n, _ := new(big.Int).SetString(hex, 16)
	if decimal, ok := new(big.Int).SetString(hex, 10); ok && !marked && decimal.Cmp(n) != 0 {
		return "", fmt.Errorf("serial %q: write 0x%s if it is hex, dec:%s (which is 0x%x) if it is decimal", text, hex, hex, decimal)
	}
	return canonical(text, n)
}

func canonical(text string, n *big.Int) (Serial, error) {
	switch {
	case n.Sign() == 0:
		return "", fmt.Errorf("serial %q: zero: want the certificate's own, which is positive", text)
	case n.BitLen() > maxOctets*8:
		return "", tooLong(text)
	}
	return Serial(n.Text(16)), nil
}

func tooLong(text string) error {
	return fmt.Errorf("serial %.60q: too long: want at most %d octets, which are %d hex digits", text, maxOctets, 2*maxOctets)
}
