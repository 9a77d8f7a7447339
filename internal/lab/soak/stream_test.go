//go:build linux

package soak

import (
	"bytes"
	"encoding/binary"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

const (
	fromClient   = 0
	fromUpstream = 1
)

// streamOf returns the bytes that connection id carries in a direction.
func streamOf(id, direction uint64) proxytest.Pattern { return proxytest.Pattern(2*id + direction) }

// A header begins a client's stream. It tells the upstream which connection this is.
const headerSize = 16

func header(seed, id uint64) []byte {
	b := binary.BigEndian.AppendUint64(nil, id)
	return binary.BigEndian.AppendUint64(b, proxytest.Mix(seed^proxytest.Mix(id)))
}

// headerID returns the id in a header.
func headerID(seed uint64, b []byte) (id uint64, ok bool) {
	id = binary.BigEndian.Uint64(b)
	return id, bytes.Equal(b, header(seed, id))
}

// greeting is the first message of upstreams that speak first.
var greeting = []byte("220 ready: speak")
