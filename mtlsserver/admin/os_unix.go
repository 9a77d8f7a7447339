//go:build unix

package admin

import (
	"io/fs"
	"os"
	"syscall"
)

// ownedByUs reports whether a file belongs to this user or to root. For root it is always true:
// root edits the configuration of a server that runs as another user, and uses its socket.
func ownedByUs(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	us := os.Geteuid()
	return ok && (us == 0 || stat.Uid == 0 || int(stat.Uid) == us)
}
