//go:build unix

package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// An administrator issues a certificate, and the server of another user can still read its
// configuration.
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
	owned(t, config, 1234, 5678, 0o600)
}

func owned(t *testing.T, path string, uid, gid uint32, mode os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t); owner.Uid != uid || owner.Gid != gid ||
		info.Mode() != mode {
		t.Errorf("%s is of %d:%d, mode %v, want %d:%d, mode %v", filepath.Base(path), owner.Uid,
			owner.Gid, info.Mode(), uid, gid, mode)
	}
}

// The same holds for files that replace a file of the server.
func TestRenewAndRotateKeepTheOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can have a file be somebody else's")
	}
	dir := folder(t)
	// root keeps ca.key
	for name, gid := range map[string]int{"config.json": 1, "server.pem": 2, "server.key": 3,
		"ca.pem": 4} {
		if err := os.Chown(filepath.Join(dir, name), 1234, gid); err != nil {
			t.Fatal(err)
		}
	}
	must(t, "renew", "-dir", dir)
	must(t, "rotate", "-dir", dir)
	must(t, "revoke", "-dir", dir, "-name", "bob")
	owned(t, filepath.Join(dir, "config.json"), 1234, 1, 0o600)
	owned(t, filepath.Join(dir, "server-2.pem"), 1234, 2, 0o644)
	owned(t, filepath.Join(dir, "server-2.key"), 1234, 3, 0o600)
	owned(t, filepath.Join(dir, "ca-2.pem"), 1234, 4, 0o644)
	owned(t, filepath.Join(dir, "ca-2.key"), 0, 0, 0o600)
}
