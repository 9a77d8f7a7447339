package proxytest

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
)

// A Pattern is an endless stream of bytes. Each byte is a function of the pattern and its offset,
// so that Check finds a byte that is lost, doubled, changed or from another stream.
type Pattern uint64

// noise holds the bytes that all patterns are windows of. Its size is a prime, so that bytes that
// were displaced by the size of a buffer differ.
var noise = sync.OnceValue(func() []byte {
	b := make([]byte, 1<<22-3)
	rand.NewChaCha8([32]byte{'p'}).Read(b)
	return b
})

// Mix returns a hash of x: the values of neighbours are unrelated.
func Mix(x uint64) uint64 { // the finalizer of splitmix64
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// At returns bytes of the stream from offset on: n, or fewer at the end of the noise, but at least
// one if n is positive. The caller must not change them.
func (p Pattern) At(offset int64, n int) []byte {
	noise := noise()
	size := int64(len(noise))
	from := (int64(Mix(uint64(p))%uint64(size)) + offset) % size
	return noise[from:min(from+int64(n), size)]
}

// Check compares b, received at offset, with the stream. The error names the first byte that
// differs.
func (p Pattern) Check(offset int64, b []byte) error {
	for len(b) > 0 {
		want := p.At(offset, len(b))
		if !bytes.Equal(b[:len(want)], want) {
			i := 0
			for b[i] == want[i] {
				i++
			}
			return fmt.Errorf("proxytest: at offset %d there is %x, want %x",
				offset+int64(i), b[i:min(i+8, len(b))], want[i:min(i+8, len(want))])
		}
		b, offset = b[len(want):], offset+int64(len(want))
	}
	return nil
}

// Send writes the first n bytes of the stream to w, and returns the number of bytes written.
func (p Pattern) Send(w io.Writer, n int64) (sent int64, err error) {
	for sent < n && err == nil {
		var m int
		m, err = w.Write(p.At(sent, int(min(n-sent, 64<<10))))
		sent += int64(m)
	}
	return sent, err
}

// Receive reads r to its end and returns the number of bytes. It returns an error if a byte differs
// from the stream, or if r ends with an error.
func (p Pattern) Receive(r io.Reader) (n int64, err error) {
	b := make([]byte, 64<<10)
	for {
		m, err := r.Read(b)
		if wrong := p.Check(n, b[:m]); wrong != nil {
			return n, wrong
		}
		n += int64(m)
		if err == io.EOF {
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
}

// Exactly reads r to its end. It returns an error unless r yields exactly the first n bytes of the
// stream.
func (p Pattern) Exactly(r io.Reader, n int64) error {
	got, err := p.Receive(r)
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", got, n, err)
	}
	if got != n {
		return fmt.Errorf("proxytest: a clean end after %d bytes, want %d", got, n)
	}
	return nil
}
