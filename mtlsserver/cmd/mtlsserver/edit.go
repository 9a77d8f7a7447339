package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/internal/strictjson"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A document is the text of a configuration that is being edited.
type document struct {
	*strictjson.Doc
	config *mtlsserver.Config
	text   []byte
	edits  []replacement
}

// A replacement replaces the bytes from one offset to another by text.
type replacement struct {
	from, to int
	text     string
}

// patience bounds how long edit waits for another command to finish its edit. Tests shorten it.
var patience = 20 * time.Second

// edit changes a config file, or the file that it links to, atomically. It waits up to patience for
// another command that edits the file. If change fails or leaves the configuration with problems,
// the file stays unchanged.
func edit(config string, change func(*document) error) error {
	path, err := filepath.EvalSymlinks(config)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	next := path + ".new"
	create := func() (*os.File, error) {
		return os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	}
	f, err := create()
	for late := time.Now().Add(patience); errors.Is(err, fs.ErrExist) && time.Now().Before(late); {
		time.Sleep(10 * time.Millisecond)
		f, err = create()
	}
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w: another command is editing the configuration: wait for it, "+
			"or remove this file if that command was interrupted", err)
	case err != nil:
		return fmt.Errorf("%w: the new configuration is written there first: "+
			"use a folder where this user may make that file", err)
	}
	err = rewrite(f, config, info, change)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		os.Remove(next)
	}
	return err
}

// rewrite writes the changed text of a config file to f, and gives f the file's owner and mode.
func rewrite(f *os.File, path string, info fs.FileInfo, change func(*document) error) error {
	config, err := mtlsserver.Load(path)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	doc, problems := strictjson.Decode(text, &mtlsserver.Config{})
	if len(problems) > 0 { // the file has changed since Load
		return fmt.Errorf("%s:%d: %s", path, problems[0].Line, problems[0])
	}
	d := &document{Doc: doc, config: config, text: text}
	if err := change(d); err != nil {
		return err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return err
	}
	text = d.edited()
	if _, err := mtlsserver.Parse(path, dir, text); err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, keepOwner(f, info), f.Chmod(info.Mode().Perm()), f.Sync())
}

// edited returns the text with all edits applied and every other byte unchanged.
func (d *document) edited() []byte {
	slices.SortFunc(d.edits, func(a, b replacement) int { return a.from - b.from })
	var text []byte
	at := 0
	for _, e := range d.edits {
		text = append(append(text, d.text[at:e.from]...), e.text...)
		at = e.to
	}
	return append(text, d.text[at:]...)
}

// replace replaces the value at a path.
func (d *document) replace(path, text string) {
	from, to, _ := d.Span(path)
	d.edits = append(d.edits, replacement{from, to, text})
}

// insert appends an item to the list at a path. If the list was empty, end follows the item.
func (d *document) insert(path, item, end string) {
	_, to, _ := d.Span(path)
	at := len(bytes.TrimRight(d.text[:to-1], " \t\r\n"))
	if d.text[at-1] != '[' {
		item, end = ","+item, ""
	}
	d.edits = append(d.edits, replacement{at, at, item + end})
}

// remove removes an item from the list at a path, together with a comma next to it.
func (d *document) remove(path string, i int) {
	span := func(i int) (from, to int, ok bool) { return d.Span(fmt.Sprintf("%s[%d]", path, i)) }
	from, to, _ := span(i)
	if _, end, ok := span(i - 1); ok {
		from = end
	} else if begin, _, ok := span(i + 1); ok {
		to = begin
	}
	d.edits = append(d.edits, replacement{from, to, ""})
}

// value returns the text of the value at a path.
func (d *document) value(path string) string {
	from, to, _ := d.Span(path)
	return string(d.text[from:to])
}

// user returns the index of the user with that name, or -1.
func (d *document) user(name string) int {
	return slices.IndexFunc(d.config.Users, func(u mtlsserver.User) bool { return u.Name == name })
}

// addUser adds a user to a config file; ca has issued the user's only certificate. If the file has
// a user of that name, with the same apps, it adds the serial to that user.
func addUser(u mtlsserver.User, ca *x509.Certificate, config string) error {
	return edit(config, func(d *document) error {
		u.Serials[0] = userSerial(u.Serials[0].Serial, ca, len(d.config.TLS.CA))
		i := d.user(u.Name)
		if i < 0 {
			entry, err := json.Marshal(u)
			d.insert("users", "\n    "+string(entry), "\n  ")
			return err
		}
		want := slices.Sorted(slices.Values(u.Apps))
		got := slices.Sorted(slices.Values(d.config.Users[i].Apps))
		if !slices.Equal(want, got) {
			return fmt.Errorf("-apps: user %q has apps %q, not %q: "+
				"change that in the configuration first", u.Name, got, want)
		}
		serial, err := strictjson.Encode(u.Serials[0])
		d.insert(fmt.Sprintf("users[%d].serials", i), " "+string(serial), "")
		return err
	})
}

// keepSerials replaces each serial of a user by the text that keep returns for it, or removes the
// serial if the text is empty. It returns the number of remaining serials.
func (d *document) keepSerials(user int, keep func(i int, text string) string) int {
	list := fmt.Sprintf("users[%d].serials", user)
	var kept []string
	for i := range d.config.Users[user].Serials {
		if text := keep(i, d.value(fmt.Sprintf("%s[%d]", list, i))); text != "" {
			kept = append(kept, text)
		}
	}
	d.replace(list, "["+strings.Join(kept, ", ")+"]")
	return len(kept)
}
