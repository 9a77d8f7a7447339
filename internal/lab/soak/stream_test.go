package soak

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
)

// noise is what all streams are windows of. Its size is a prime, so that bytes that were moved by the size of any buffer
// do not look right.
var noise = func() []byte {
	b := make([]byte, 1<<22-3)
	rand.NewChaCha8([32]byte{'s', 'o', 'a', 'k'}).Read(b)
	return b
}()

// A stream is all that is sent one way on one connection. Each byte is a function of the connection's id, the direction
// and the offset.
type stream struct{ begin int64 }

const (
	fromClient   = 0
	fromUpstream = 1
)

func streamOf(id, direction uint64) stream {
	return stream{int64(mix(2*id+direction) % uint64(len(noise)))}
}

// mix is the finalizer of splitmix64: ids that are neighbours get values that are not.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// at returns the bytes from offset on: n of them or, where the noise begins again, fewer.
func (s stream) at(offset int64, n int) []byte {
	from := (s.begin + offset) % int64(len(noise))
	return noise[from:min(from+int64(n), int64(len(noise)))]
}

// check says what is wrong with b, received at offset; "" if nothing is.
func (s stream) check(offset int64, b []byte) string {
	for len(b) > 0 {
		want := s.at(offset, len(b))
		if !bytes.Equal(b[:len(want)], want) {
			i := 0
			for b[i] == want[i] {
				i++
			}
			return fmt.Sprintf("at offset %d there is %x, want %x", offset+int64(i), b[i:min(i+8, len(b))], want[i:min(i+8, len(want))])
		}
		b, offset = b[len(want):], offset+int64(len(want))
	}
	return ""
}

// A header is what a client sends first: it tells the upstream which connection this is.
const headerSize = 16

func header(seed, id uint64) []byte {
	b := binary.BigEndian.AppendUint64(nil, id)
	return binary.BigEndian.AppendUint64(b, mix(seed^mix(id)))
}

// headerID returns the id in a header.
func headerID(seed uint64, b []byte) (id uint64, ok bool) {
	id = binary.BigEndian.Uint64(b)
	return id, bytes.Equal(b, header(seed, id))
}

// greeting is what upstreams that speak first say.
var greeting = []byte("220 ready: speak")
