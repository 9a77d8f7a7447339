package mtlsserver

import (
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
)

func TestParseSerial(t *testing.T) {
	f40, max160 := strings.Repeat("f", 40), "dec:1461501637330902918203684832716283019655932542975"
	for _, step := range []struct {
		text string
		want string // the serial, or a part of the error
	}{
		// As openssl x509 -serial and -text, and others, print it.
		{"0ABCDEF0123456789ABCDEF012345678", "abcdef0123456789abcdef012345678"},
		{"0a:bc:de", "abcde"},
		{"12:34", "1234"},
		{"0x1234", "1234"},
		{"0X00ab", "ab"},
		{"0x3A:0F", "3a0f"},
		{"3a0f", "3a0f"},
		{"dec:4660", "1234"},
		{"dec:004660", "1234"},
		// Digits alone, where both readings agree.
		{"5", "5"},
		{"007", "7"},
		// The largest there is.
		{f40, f40},
		{max160, f40},

		{"1234", "write 0x1234 if it is hex, dec:1234 (which is 0x4d2) if it is decimal"},
		{"10", "write 0x10 if it is hex, dec:10 (which is 0xa) if it is decimal"},
		{f40 + "f", "too long: want at most 20 octets, which are 40 hex digits"},
		{"0" + f40, "too long"},
		{strings.Repeat("0", 41), "too long"},
		{"dec:1461501637330902918203684832716283019655932542976", "too long"},
		{"dec:" + strings.Repeat("9", 1000), "too long"},
		{strings.Repeat("a", 1000), "too long"},
		{"0", "zero"},
		{"0x0", "zero"},
		{"00:00", "zero"},
		{"dec:0", "zero"},
		{"", "want hex"},
		{"0x", "want hex"},
		{"dec:", "or decimal as in dec:4660"},
		{"dec:0x12", "or decimal as in dec:4660"},
		{"dec:+12", "or decimal as in dec:4660"},
		{"DEC:12", "want two hex digits between colons"},
		{"+1234", "want hex"},
		{"-3a", "want hex"},
		{"0x-3a", "want hex"},
		{"3a_0f", "want hex"},
		{"0b11x", "want hex"},
		{"0o17", "want hex"},
		{" 3a0f", "want hex"},
		{"3a0f\n", "want hex"},
		{"3a 0f", "want hex"},
		{"٣a", "want hex"},
		{"serial=3A0F", "want hex"},
		{"a:bc", "want two hex digits between colons"},
		{"3a:0f:", "want two hex digits between colons"},
		{":3a", "want two hex digits between colons"},
		{"3a::0f", "want two hex digits between colons"},
		{"3a:+f", "want hex"},
		{"3a:0x", "want hex"},
	} {
		got, err := ParseSerial(step.text)
		switch {
		case err == nil && string(got) != step.want:
			t.Errorf("ParseSerial(%.80q) = %q, want %q", step.text, got, step.want)
		case err != nil && !strings.Contains(err.Error(), step.want):
			t.Errorf("ParseSerial(%.80q): error %q, want %q in it", step.text, err, step.want)
		case err != nil && (got != "" || len(err.Error()) > 200):
			t.Errorf("ParseSerial(%.80q) = %q, with an error of %d bytes", step.text, got,
				len(err.Error()))
		}
	}
}

func TestSerialOf(t *testing.T) {
	one := big.NewInt(1)
	for _, step := range []struct {
		serial *big.Int
		want   string
	}{
		{one, "1"},
		{big.NewInt(0x0abc), "abc"},
		{new(big.Int).Sub(new(big.Int).Lsh(one, 160), one), strings.Repeat("f", 40)},
		{new(big.Int).Lsh(one, 160), "more than 20 octets"},
		{new(big.Int), "not positive"},
		{big.NewInt(-1), "not positive"},
		{nil, "not positive"},
	} {
		got, err := SerialOf(&x509.Certificate{SerialNumber: step.serial})
		if err == nil && string(got) != step.want || err != nil &&
			!strings.Contains(err.Error(), step.want) {
			t.Errorf("SerialOf(%v) = %q, %v, want %q", step.serial, got, err, step.want)
		}
	}
}

// A serial that ParseSerial accepts is canonical, equals big.Int's reading, and is accepted again
// in every form that tools print.
func FuzzParseSerial(f *testing.F) {
	for _, text := range []string{"3A:0F", "0x1234", "dec:4660", "1234", "0", "-1", "a_b", "0x",
		":", strings.Repeat("f", 41)} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		serial, err := ParseSerial(text)
		if err != nil {
			if serial != "" || strings.ContainsAny(err.Error(), "\n\r\x1b") {
				t.Fatalf("ParseSerial(%q) = %q, %q", text, serial, err)
			}
			return
		}
		n, ok := new(big.Int).SetString(string(serial), 16)
		if !ok || n.Sign() <= 0 || n.BitLen() > 160 || n.Text(16) != string(serial) {
			t.Fatalf("ParseSerial(%q) = %q, which is not canonical", text, serial)
		}
		if digits, decimal := strings.CutPrefix(text, "dec:"); decimal {
			if want, _ := new(big.Int).SetString(digits, 10); want.Cmp(n) != 0 {
				t.Fatalf("ParseSerial(%q) = %q", text, serial)
			}
		}
		octets := n.Bytes()
		colons := make([]string, len(octets))
		for i, octet := range octets {
			colons[i] = string("0123456789ABCDEF"[octet>>4]) + string("0123456789ABCDEF"[octet&15])
		}
		forms := []string{"0x" + string(serial), "dec:" + n.String()}
		if len(octets) > 1 {
			forms = append(forms, strings.Join(colons, ":"))
		}
		for _, form := range forms {
			if again, err := ParseSerial(form); again != serial {
				t.Fatalf("ParseSerial(%q) = %q, %v, want %q as of %q", form, again, err, serial,
					text)
			}
		}
		if cert, err := SerialOf(&x509.Certificate{SerialNumber: n}); cert != serial {
			t.Fatalf("SerialOf(%v) = %q, %v, want %q", n, cert, err, serial)
		}
	})
}
