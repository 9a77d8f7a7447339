package mtlsserver

import (
	"fmt"
	"log/slog"
	"reflect"
	"strings"
)

// Changes are the effects of a reload.
type Changes struct {
	Users     Change `json:"users"`     // names
	Apps      Change `json:"apps"`      // ids
	Upstreams Change `json:"upstreams"` // "app/addr"

	// Certificates are keys in the Config, such as "tls.cert". A client CA is named by its file, as
	// in "tls.ca:ca-2.pem", because its index may change when others come or go.
	Certificates Change `json:"certificates"`

	Ended int `json:"ended"` // connections ended as no longer allowed
}

// A Change lists the names of added, removed and changed things, in the configuration's order.
type Change struct {
	Added   []string `json:"added,omitempty"`
	Removed []string `json:"removed,omitempty"`
	Changed []string `json:"changed,omitempty"`
}

// String returns the change in the form "+alice -bob ~carol". It shows 20 names and counts the
// rest.
func (c Change) String() string {
	var all []string
	for _, part := range []struct {
		sign  string
		names []string
	}{{"+", c.Added}, {"-", c.Removed}, {"~", c.Changed}} {
		for _, name := range part.names {
			all = append(all, part.sign+name)
		}
	}
	const most = 20
	if len(all) > most {
		all = append(all[:most], fmt.Sprintf("and %d more", len(all)-most))
	}
	return strings.Join(all, " ")
}

// attrs returns the changes that are not empty as log attributes.
func (c Changes) attrs() (attrs []slog.Attr) {
	for _, part := range []struct {
		key    string
		change Change
	}{
		{"users", c.Users},
		{"apps", c.Apps},
		{"upstreams", c.Upstreams},
		{"certificates", c.Certificates},
	} {
		if text := part.change.String(); text != "" {
			attrs = append(attrs, slog.String(part.key, text))
		}
	}
	return append(attrs, slog.Int("ended", c.Ended))
}

// changesOf compares the configurations of two snapshots.
func changesOf(old, now *snapshot) (c Changes) {
	user := func(u User) string { return u.Name }
	app := func(a App) string { return a.ID }
	upstream := func(u appUpstream) string { return u.app + "/" + u.Addr }
	certificate := func(c Certificate) string { return c.Key }
	c.Users = diff(old.config.Users, now.config.Users, user)
	withoutUpstreams := func(apps []App) (all []App) {
		for _, a := range apps {
			a.Upstreams = nil
			all = append(all, a)
		}
		return all
	}
	c.Apps = diff(withoutUpstreams(old.config.Apps), withoutUpstreams(now.config.Apps), app)
	c.Upstreams = diff(upstreamsOf(old.config), upstreamsOf(now.config), upstream)
	c.Certificates = diff(certificatesOf(old), certificatesOf(now), certificate)
	return c
}

type appUpstream struct {
	app string
	Upstream
}

func upstreamsOf(c *Config) (all []appUpstream) {
	for _, app := range c.Apps {
		for _, u := range app.Upstreams {
			all = append(all, appUpstream{app.ID, u})
		}
	}
	return all
}

// certificatesOf returns the certificates of a snapshot with the keys that Changes has, and without
// the names of their files: a file that was only renamed is no change, except for a client CA,
// whose key has the name.
func certificatesOf(n *snapshot) (all []Certificate) {
	for _, c := range n.certificates {
		if key, _, _ := strings.Cut(c.Key, "["); key == "tls.ca" {
			c.Key = key + ":" + c.File
		}
		c.File = ""
		all = append(all, c)
	}
	return all
}

// diff compares two lists by the names of their elements.
func diff[T any](old, now []T, name func(T) string) (c Change) {
	was := map[string]T{}
	for _, x := range old {
		was[name(x)] = x
	}
	is := map[string]bool{}
	for _, x := range now {
		is[name(x)] = true
		if before, ok := was[name(x)]; !ok {
			c.Added = append(c.Added, name(x))
		} else if !reflect.DeepEqual(before, x) {
			c.Changed = append(c.Changed, name(x))
		}
	}
	for _, x := range old {
		if !is[name(x)] {
			c.Removed = append(c.Removed, name(x))
		}
	}
	return c
}
