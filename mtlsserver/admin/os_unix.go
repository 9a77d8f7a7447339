//go:build unix

package admin

import (
	"io/fs"
	"os"
	"syscall"
)

// ownedByUs reports whether a file is this user's, or root's. For root it is true of any file:
// root edits the configuration of a server that runs as another user, and asks it.
func ownedByUs(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	us := os.Geteuid()
	return ok && (us == 0 || stat.Uid == 0 || int(stat.Uid) == us)
}
