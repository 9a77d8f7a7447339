//go:build !unix

package mtlsserver

import (
	"io/fs"
	"net"
)

func ownedByRoot(fs.FileInfo) bool { return false }
func readOnly(string) bool         { return false }

// awaitByte does not wait: on these systems a client takes a place before its first byte.
func awaitByte(net.Conn) error { return nil }
