//go:build unix

package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// An administrator issues, and a server that is somebody else's can still read its configuration.
func TestIssueKeepsTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can have a file be somebody else's")
	}
	dir := folder(t)
	config := filepath.Join(dir, "config.json")
	if err := os.Chown(config, 1234, 5678); err != nil {
		t.Fatal(err)
	}
	must(t, "issue", "-dir", dir, "-name", "carol", "-apps", "web")
	info, err := os.Stat(config)
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 1234 || owner.Gid != 5678 || info.Mode() != 0o600 {
		t.Errorf("config.json is of %d:%d, mode %v, was of 1234:5678, mode 0600", owner.Uid, owner.Gid, info.Mode())
	}
}
