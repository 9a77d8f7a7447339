package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestRevoke(t *testing.T) {
	dir, config := setUp(t)
	for _, name := range []string{"alice", "bob", "bob", "carol"} {
		must(t, "issue", "-dir", dir, "-name", name, "-apps", "web")
	}
	serial := func(stem string) string {
		return strings.TrimSpace(must(t, "serial", filepath.Join(dir, stem+".pem")))
	}
	s := start(t, "run", "-config", config)
	open := func(stem string) *ended {
		c, _, err := dial(dir, stem, s.addrs["web"])
		if err != nil {
			t.Fatalf("%s: %v", stem, err)
		}
		t.Cleanup(func() { c.Close() })
		return &ended{c}
	}
	alice, bob, bob2, carol := open("alice"), open("bob"), open("bob-2"), open("carol")
	before := contents(t, dir)["config.json"]

	// One serial, however it is written.
	said := must(t, "revoke", "-dir", dir, "-name", "bob", "-serial",
		strings.ToUpper(strings.TrimPrefix(serial("bob"), "0x"))+"")
	if !has(said, `Removed serial `+serial("bob")+` of user "bob"`) {
		t.Errorf("revoke says %q", said)
	}
	want := strings.Replace(before, `"`+serial("bob")+`", `, "", 1)
	if got := contents(t, dir)["config.json"]; got != want {
		t.Errorf("config.json is\n%s\nwant\n%s", got, want)
	}
	// Whole users, the last one included.
	if said := must(t, "revoke", "-dir", dir, "-name", "alice"); !has(said,
		`Removed user "alice" with serial `+serial("alice")+
			"…\nTheir connections end at mtlsserver reload or SIGHUP.\n") {
		t.Errorf("revoke says %q", said)
	}
	s.signals <- syscall.SIGHUP
	s.await(t, `"msg":"reloaded"`, `"ended":2`)
	alice.verify(t, true)
	bob.verify(t, true)
	bob2.verify(t, false)
	carol.verify(t, false)
	must(t, "revoke", "-dir", dir, "-name", "carol")
	must(t, "revoke", "-dir", dir, "-name", "bob", "-serial", serial("bob-2"))
	if text := contents(t, dir)["config.json"]; !has(text, `"users": [`) ||
		strings.Contains(text, "serials") {
		t.Errorf("config.json is\n%s", text)
	}
	must(t, "check", "-config", config)
	must(t, "issue", "-dir", dir, "-name", "dave", "-apps", "web")
	must(t, "check", "-config", config)
	s.signals <- syscall.SIGHUP
	s.await(t, `"msg":"reloaded"`, `"ended":2`)
	carol.verify(t, true)
	s.stop(t, 0)
}

func TestRevokeThatFails(t *testing.T) {
	for _, row := range []struct {
		args []string
		want string
	}{
		{[]string{"-name", "nobody"}, `-name "nobody": no such user in `},
		{[]string{"-name", "al\nice"}, `-name "al\nice": no such user in `},
		{[]string{"-name", "alice", "-serial", "zz"}, `-serial: serial "zz": want hex`},
		{[]string{"-name", "alice", "-serial", "10"},
			`-serial: serial "10": write 0x10 if it is hex`},
		{[]string{"-name", "alice", "-serial", "0xb"},
			`-serial "0xb": user "alice" does not have it: mtlsserver users -config `},
		{[]string{}, `-name is missing`},
	} {
		dir := folder(t)
		code, stdout, stderr := try(append([]string{"revoke", "-dir", dir}, row.args...)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, row.want) ||
			strings.Count(stderr, "\n") != 1 {
			t.Errorf("%v: exit code %d, %q, %q, want %q", row.args, code, stdout, stderr, row.want)
		}
		if all := contents(t, dir); all["config.json"] != good || len(all) != len(pems()) {
			t.Errorf("%v: the folder has changed", row.args)
		}
	}
	if code, _, stderr := try("revoke", "-dir", t.TempDir(), "-name", "x"); code != 2 ||
		!strings.Contains(stderr, "config.json: no such file") {
		t.Errorf("no configuration: exit code %d, %q", code, stderr)
	}
}
