package mtlsserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

// A Config says what a [Server] serves and to whom. Load reads one from a file; one may as well be made in Go.
// Validate finds what is wrong with it.
type Config struct {
	TLS          Files         `json:"tls"`
	Apps         []App         `json:"apps"`
	Users        []User        `json:"users"`
	Handshake    Handshake     `json:"handshake"`
	DrainTimeout time.Duration `json:"drainTimeout"` // how long a drain waits for connections to end; 0 means 30 seconds

	source // what Load read, if it was Load that made it
}

// Files are paths of PEM files, relative to the file that Load read, if it was Load that made the Config. Key must not be
// readable by other users of the machine, CA holds exactly one certificate: the issuer of all clients.
type Files struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
	CA   string `json:"ca"`
}

// An App is a service that is listened for and forwarded to upstreams.
type App struct {
	ID          string        `json:"id"`
	Listen      string        `json:"listen"`      // "host:port"; port 0 is any free one
	IdleTimeout time.Duration `json:"idleTimeout"` // 0 means the default of lbproxy.Options
	HealthCheck *HealthCheck  `json:"healthCheck"` // nil means none
	Upstreams   []Upstream    `json:"upstreams"`
}

// A HealthCheck has an app's upstreams dialled at intervals. Zero values mean the defaults of lbproxy.HealthCheck.
type HealthCheck struct {
	Interval time.Duration `json:"interval"`
	Timeout  time.Duration `json:"timeout"`
	Rise     int           `json:"rise"` // checks in a row that have to go well for an upstream to be up again
	Fall     int           `json:"fall"` // and that have to fail for it to be down
}

// An Upstream is an lbproxy.Upstream as it is written in a file.
type Upstream struct {
	Addr     string       `json:"addr"`
	Weight   int          `json:"weight"`
	MaxConns int          `json:"maxConns"`
	TLS      *UpstreamTLS `json:"tls"` // nil means plain TCP
}

// UpstreamTLS has TLS spoken to an upstream, which must prove to be ServerName (empty: the host of Addr) by a
// certificate from CA (empty: any of the system's roots). Cert and Key, if set, prove the proxy to it.
type UpstreamTLS struct {
	CA         string `json:"ca"`
	Cert       string `json:"cert"`
	Key        string `json:"key"`
	ServerName string `json:"serverName"`
}

// A User is who the holder of a certificate is, and what they may reach.
type User struct {
	Name      string           `json:"name"`
	Serials   []string         `json:"serials"`             // of the certificates, in any form that ParseSerial takes
	Apps      []string         `json:"apps"`                // ids of those that may be reached
	Limit     *Limit           `json:"limit,omitempty"`     // shared by all apps; nil means none
	AppLimits map[string]Limit `json:"appLimits,omitempty"` // by app id; each is for that app alone
}

// A Limit bounds what a user does. Fields that are zero set no bound; Burst and Every go together.
type Limit struct {
	Burst          int           `json:"burst"`          // connections opened at once,
	Every          time.Duration `json:"every"`          // and the time in which one more is regained
	Open           int           `json:"open"`           // connections open at once
	BytesPerSecond int64         `json:"bytesPerSecond"` // both directions together
}

// Handshake bounds what clients may use up before it is known who they are.
type Handshake struct {
	Timeout       time.Duration `json:"timeout"`       // 0 means 10 seconds
	MaxConcurrent int           `json:"maxConcurrent"` // handshakes at once; 0 means 256
	MaxPerAddress int           `json:"maxPerAddress"` // of those from one address (IPv6: /64); 0 means 16
	MaxBytes      int           `json:"maxBytes"`      // bytes read from a client; 0 means 16384
}

// Validate reads the files that c names and returns all problems, a line each.
func (c *Config) Validate() error {
	_, err := c.materials()
	return err
}

// Materials are what a Config's files and texts stand for, read once and found to be right.
type materials struct {
	ca        *x509.Certificate
	server    tls.Certificate
	upstreams [][]lbproxy.Upstream // of each of Config.Apps
	users     StaticUsers          // the elements of Config.Users
}

// materials is Validate with what was found to be right.
func (c *Config) materials() (*materials, error) {
	r := &report{config: c}
	return r.check(), errors.Join(r.problems...)
}

// check reads what the Config names and returns what it all stands for; that is of use only if nothing is wrong.
func (r *report) check() *materials {
	c, m := r.config, &materials{users: StaticUsers{}}
	m.server = r.pair("tls", c.TLS.Cert, c.TLS.Key, x509.ExtKeyUsageServerAuth)
	m.ca = r.ca("tls.ca", c.TLS.CA)
	if len(c.Apps) == 0 {
		r.add("apps", "none: give at least one")
	}
	ids, listens := map[string]string{}, map[string]string{}
	for i, app := range c.Apps {
		key := fmt.Sprintf("apps[%d]", i)
		r.unique(ids, key+".id", app.ID)
		r.positive(key, app)
		if app.HealthCheck != nil {
			r.positive(key+".healthCheck", *app.HealthCheck)
		}
		switch n := portOf(app.Listen); {
		case n < 0:
			r.add(key+".listen", `%q: want host:port, such as "127.0.0.1:9443", port 0 for any that is free`, app.Listen)
		case n != 0:
			r.unique(listens, key+".listen", app.Listen)
		}
		m.upstreams = append(m.upstreams, r.upstreams(key+".upstreams", app.Upstreams))
	}
	names, serials := map[string]string{}, map[string]string{}
	for i := range c.Users {
		user, key := &c.Users[i], fmt.Sprintf("users[%d]", i)
		r.unique(names, key+".name", user.Name)
		r.rights(key, user, ids)
		for j, text := range user.Serials {
			key := fmt.Sprintf("%s.serials[%d]", key, j)
			serial, err := ParseSerial(text)
			if err != nil {
				r.add(key, "%v", err)
			} else if first, twice := serials[string(serial)]; twice {
				r.add(key, "%q is the serial of %s too: remove one of the two", text, first)
			} else {
				serials[string(serial)] = fmt.Sprintf("%s (%q)", key, text)
				m.users[serial] = user
			}
		}
	}
	r.positive("handshake", c.Handshake)
	r.positive("", *c)
	return m
}

// portOf returns the port of a "host:port", 0 if that is any that is free, or -1 if it is no such text.
func portOf(listen string) int {
	host, port, err := net.SplitHostPort(listen)
	n, portErr := net.LookupPort("tcp", port)
	if err != nil || portErr != nil || port == "" || strings.ContainsAny(host, " \t\r\n") {
		return -1
	}
	return n
}

// upstreams has lbproxy say what is wrong with those of an app.
func (r *report) upstreams(key string, upstreams []Upstream) (all []lbproxy.Upstream) {
	valid := func(key, prefix string, upstreams ...lbproxy.Upstream) {
		if _, err := lbproxy.New("-", upstreams, nil); err != nil {
			r.add(key, "%s", strings.TrimPrefix(err.Error(), `lbproxy: app "-": `+prefix))
		}
	}
	for i, u := range upstreams {
		key := fmt.Sprintf("%s[%d]", key, i)
		one := lbproxy.Upstream{Addr: u.Addr, Weight: u.Weight, MaxConns: u.MaxConns}
		if u.TLS != nil {
			one.TLS = r.upstreamTLS(key+".tls", u.TLS)
		}
		r.positive(key, u) // first: lbproxy would say that 0 is right, which must not be written here
		valid(key, "upstream 0: ", one)
		all = append(all, one)
	}
	valid(key, "", all...) // what it finds if each is right: two have the same Addr, or there are none
	return all
}

func (r *report) upstreamTLS(key string, t *UpstreamTLS) *tls.Config {
	conf := &tls.Config{ServerName: t.ServerName}
	if t.ServerName == "" && r.config.written(key+".serverName") {
		r.add(key+".serverName", "empty: give a name, or leave it out for the host of addr")
	}
	if t.CA != "" || r.config.written(key+".ca") {
		if ca := r.ca(key+".ca", t.CA); ca != nil {
			conf.RootCAs = poolOf(ca)
		}
	}
	if t.Cert != "" || t.Key != "" || r.config.written(key+".cert") || r.config.written(key+".key") {
		conf.Certificates = []tls.Certificate{r.pair(key, t.Cert, t.Key, x509.ExtKeyUsageClientAuth)}
	}
	return conf
}

// rights says what is wrong with what u may do. The keys of ids are the apps there are.
func (r *report) rights(key string, u *User, ids map[string]string) {
	if len(u.Serials) == 0 {
		r.add(key+".serials", "none: give that of the user's certificate, or remove the user")
	}
	if len(u.Apps) == 0 {
		r.add(key+".apps", "none: give the id of one at least, or remove the user")
	}
	seen := map[string]string{}
	for i, id := range u.Apps {
		key := fmt.Sprintf("%s.apps[%d]", key, i)
		if _, ok := ids[id]; !ok {
			r.add(key, "there is no app %q: want one of %q", id, slices.Sorted(maps.Keys(ids)))
		}
		r.unique(seen, key, id)
	}
	if u.Limit != nil {
		r.limit(key+".limit", *u.Limit)
	}
	for _, id := range slices.Sorted(maps.Keys(u.AppLimits)) {
		key := fmt.Sprintf("%s.appLimits[%q]", key, id)
		if !slices.Contains(u.Apps, id) {
			r.add(key, "the user may not reach this app: add it to apps, or remove the limit")
		}
		r.limit(key, u.AppLimits[id])
	}
}

func (r *report) limit(key string, l Limit) {
	r.positive(key, l)
	switch {
	case l == Limit{}:
		r.add(key, "limits nothing: set burst and every, open or bytesPerSecond, or remove it")
	case (l.Burst == 0) != (l.Every == 0):
		r.add(key, "burst and every go together: set both or neither")
	}
}

// positive refuses, among the numbers and durations of a struct, what is negative, and a zero that is written: zero
// values are defaults.
func (r *report) positive(key string, of any) {
	for f, v := range reflect.ValueOf(of).Fields() {
		key := strings.TrimPrefix(key+"."+f.Tag.Get("json"), ".")
		if v.CanInt() && (v.Int() < 0 || v.Int() == 0 && r.config.written(key)) {
			r.add(key, "%v: want more than 0, or leave it out for the default", v)
		}
	}
}

// unique refuses what is empty or in seen, which says where, and otherwise puts it there.
func (r *report) unique(seen map[string]string, key, value string) {
	if first, twice := seen[value]; twice {
		r.add(key, "%q is that of %s already: change one of the two", value, first)
	} else if value == "" {
		r.add(key, "missing: give one")
	} else {
		seen[value] = key
	}
}
