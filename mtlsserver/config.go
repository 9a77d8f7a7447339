package mtlsserver

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/danielepagano/lbproxy"
)

// A Config says what a [Server] serves and to whom. Load reads one from a file; one may as well be made in Go, then
// paths are as given. Validate finds what is wrong with it.
type Config struct {
	TLS          Files         `json:"tls"`
	Apps         []App         `json:"apps"`
	Users        []User        `json:"users"`
	Handshake    Handshake     `json:"handshake"`
	DrainTimeout time.Duration `json:"drainTimeout"` // how long a drain waits for connections to end; 0 means 30 seconds

	file  string         // what Load read, and
	lines map[string]int // the line of each key written there, by its path: "apps[0].listen"
}

// Files are paths of PEM files; Load makes them absolute. Key must not be readable by other users of the machine, CA
// holds exactly one certificate: the issuer of all clients.
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
	Upstreams   []Upstream    `json:"upstreams"`
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
	Serials   []string         `json:"serials"` // of the certificates, in any form that ParseSerial takes
	Apps      []string         `json:"apps"`    // ids of those that may be reached
	Limit     *Limit           `json:"limit"`   // shared by all apps; nil means none
	AppLimits map[string]Limit `json:"appLimits"`
}

// A Limit bounds what a user does. Fields that are zero set no bound; Burst and Every go together.
type Limit struct {
	Burst          int           `json:"burst"` // connections opened at once,
	Every          time.Duration `json:"every"` // and the time in which one more is regained
	Open           int           `json:"open"`  // connections open at once
	BytesPerSecond int64         `json:"bytesPerSecond"`
}

// Handshake bounds what clients may use up before it is known who they are.
type Handshake struct {
	Timeout       time.Duration `json:"timeout"`       // 0 means 10 seconds
	MaxConcurrent int           `json:"maxConcurrent"` // handshakes at once; 0 means 256
	MaxPerAddress int           `json:"maxPerAddress"` // of those from one address (IPv6: /64); 0 means 16
	MaxBytes      int           `json:"maxBytes"`      // bytes read from a client; 0 means 16384
}

// Load reads the Config in a file of JSON, and everything that it names. It fails with all problems there are, a line
// each: syntax, keys that are unknown or written twice, values of the wrong type, and what Validate finds.
// Durations are written as Go's ("10s"), paths are relative to the file.
func Load(path string) (*Config, error) {
	text, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	c := &Config{file: path, lines: map[string]int{}}
	r := newReport(c)
	if err := r.parse(text); err != nil {
		return nil, err
	}
	c.check(r)
	if len(r.problems) > 0 {
		return nil, errors.Join(r.problems...)
	}
	return c, nil
}

// Validate reads the files that c names and returns all problems, a line each.
func (c *Config) Validate() error {
	_, err := c.materials()
	return err
}

// materials is Validate with what was found to be right.
func (c *Config) materials() (*materials, error) {
	r := newReport(c)
	m := c.check(r)
	return m, errors.Join(r.problems...)
}

// parse reads text into r's Config. An error means that it is no JSON at all.
func (r *report) parse(text []byte) error {
	var all json.RawMessage
	err := json.Unmarshal(text, &all) // checks the syntax to the end, and bounds the depth
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		line := 1 + bytes.Count(text[:min(int(syntax.Offset), len(text))], []byte("\n"))
		return fmt.Errorf("%s:%d: not JSON: %w: mend it there or shortly before", r.config.file, line, err)
	}
	if !utf8.Valid(text) {
		return fmt.Errorf("%s: not UTF-8: save it as that", r.config.file)
	}
	p := &parser{report: r, Decoder: json.NewDecoder(bytes.NewReader(text)), text: text, line: 1}
	p.UseNumber()
	p.value("", reflect.ValueOf(r.config).Elem())
	for _, key := range []string{"tls", "apps", "users"} {
		if !r.written(key) {
			r.add(key, "missing: it is required")
		}
	}
	return nil
}

// A report collects what is wrong with a Config.
type report struct {
	config   *Config
	keys     map[string]bool
	problems []error
}

func newReport(c *Config) *report { return &report{config: c, keys: map[string]bool{}} }

// add says what is wrong with the value at key, unless something is known to be wrong there, around it, or in it: then
// this may be but what follows from that.
func (r *report) add(key, format string, args ...any) {
	for known := range r.keys {
		if within(key, known) || within(known, key) {
			return
		}
	}
	r.keys[key] = true
	r.note(key, format, args...)
}

func within(key, outer string) bool {
	rest, ok := strings.CutPrefix(key, outer)
	return ok && (outer == "" || rest == "" || strings.ContainsAny(rest[:1], ".["))
}

// note says so in any case.
func (r *report) note(key, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if key != "" {
		text = key + ": " + text
	}
	if r.config.file != "" {
		for r.config.lines[key] == 0 && key != "" { // what is missing is missing in what is around it
			key = key[:max(strings.LastIndexAny(key, ".["), 0)]
		}
		text = fmt.Sprintf("%s:%d: %s", r.config.file, r.config.lines[key], text)
	}
	r.problems = append(r.problems, errors.New(text))
}

// written reports whether the value at key is in the file, as opposed to being zero for want of it.
func (r *report) written(key string) bool { return r.config.lines[key] != 0 }

// A parser fills in a Config from JSON whose syntax is known to be right.
type parser struct {
	*report
	*json.Decoder
	text     []byte
	line, at int // text[:at] has been read, line is where that ends
}

// next reads a token and notes its line as that of key, if it is the first.
func (p *parser) next(key string) json.Token {
	token, _ := p.Token()
	to := int(p.InputOffset())
	p.line += bytes.Count(p.text[p.at:to], []byte("\n"))
	p.at = to
	if !p.written(key) {
		p.config.lines[key] = p.line
	}
	return token
}

// skip reads the rest of the value that token begins.
func (p *parser) skip(token json.Token) {
	for depth := 0; ; token = p.next("") {
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if depth == 0 {
			return
		}
	}
}

// value reads the next value, which key leads to, into v.
func (p *parser) value(key string, v reflect.Value) {
	token := p.next(key)
	if v.Kind() == reflect.Pointer && token == json.Delim('{') {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	text, isText := token.(string)
	number, _ := token.(json.Number)
	want, ok := "an object in { }", token == json.Delim('{')
	switch _, isDuration := v.Interface().(time.Duration); {
	case isDuration:
		d, err := time.ParseDuration(text)
		v.SetInt(int64(d))
		want, ok = `a duration such as "10s"`, err == nil
	case v.CanInt():
		n, err := strconv.ParseInt(number.String(), 10, v.Type().Bits())
		v.SetInt(n)
		want, ok = "a whole number", err == nil
	case v.Kind() == reflect.String:
		v.SetString(p.absolute(key, text))
		want, ok = "a text in quotes", isText
	case v.Kind() == reflect.Slice:
		if want, ok = "a list in [ ]", token == json.Delim('['); ok {
			p.list(key, v)
		}
	case ok:
		p.object(key, v)
	}
	if ok {
		return
	}
	got := fmt.Sprintf("%.40v", token)
	if isText {
		got = fmt.Sprintf("%.40q", text)
	} else if token == nil {
		got = "null"
	}
	p.add(key, "want %s, got %s", want, got)
	p.skip(token)
}

// absolute makes text absolute if key is that of a path, which is relative to the file.
func (p *parser) absolute(key, text string) string {
	switch filepath.Ext(key) {
	case ".cert", ".key", ".ca":
		abs, err := filepath.Abs(filepath.Join(filepath.Dir(p.config.file), text))
		if text != "" && !filepath.IsAbs(text) && err == nil {
			return abs
		}
	}
	return text
}

// list reads what comes after a [ to its end.
func (p *parser) list(key string, v reflect.Value) {
	for i := 0; p.More(); i++ {
		v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
		p.value(fmt.Sprintf("%s[%d]", key, i), v.Index(i))
	}
	p.next(key)
}

// object reads what comes after a { to its end, into a struct or a map.
func (p *parser) object(key string, v reflect.Value) {
	seen := map[string]bool{}
	for p.More() {
		name := p.next(key).(string)
		path := strings.TrimPrefix(key+"."+name, ".")
		if v.Kind() == reflect.Map || strconv.Quote(name) != `"`+name+`"` {
			path = fmt.Sprintf("%s[%q]", key, name)
		}
		into, known := member(v, name)
		switch {
		case seen[name]:
			p.note(path, "again in line %d: keep one of the two", p.line)
			p.skip(p.next(path))
		case !into.IsValid():
			token := p.next(path)
			p.add(path, "unknown key: want one of %s", known)
			p.skip(token)
		default:
			p.value(path, into)
			if v.Kind() == reflect.Map {
				v.SetMapIndex(reflect.ValueOf(name), into)
			}
		}
		seen[name] = true
	}
	p.next(key)
}

// member returns what the value of name is to be read into, and the names that a struct knows.
func member(v reflect.Value, name string) (into reflect.Value, names string) {
	if v.Kind() == reflect.Map {
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
		return reflect.New(v.Type().Elem()).Elem(), ""
	}
	for i := range v.NumField() {
		switch tag := v.Type().Field(i).Tag.Get("json"); tag {
		case "": // not of the file
		case name:
			into = v.Field(i)
			fallthrough
		default:
			names += ", " + tag
		}
	}
	return into, strings.TrimPrefix(names, ", ")
}

// check reads what c names and returns what it all stands for; that is of use only if nothing was found to be wrong.
func (c *Config) check(r *report) *materials {
	m := &materials{users: map[Serial]*User{}}
	m.server = r.pair("tls", c.TLS.Cert, c.TLS.Key, x509.ExtKeyUsageServerAuth)
	m.ca = r.ca("tls.ca", c.TLS.CA)
	if len(c.Apps) == 0 {
		r.add("apps", "none: give at least one")
	}
	ids, listens := map[string]string{}, map[string]string{}
	for i, app := range c.Apps {
		key := fmt.Sprintf("apps[%d]", i)
		r.unique(ids, key+".id", app.ID)
		r.positive(key+".idleTimeout", app.IdleTimeout)
		if _, port, err := net.SplitHostPort(app.Listen); err != nil {
			r.add(key+".listen", `%q: want host:port, such as "127.0.0.1:9443"`, app.Listen)
		} else if n, err := net.LookupPort("tcp", port); err != nil || port == "" {
			r.add(key+".listen", "%q: want a port from 1 to 65535, or 0 for any that is free", app.Listen)
		} else if n != 0 {
			r.unique(listens, key+".listen", app.Listen)
		}
		m.upstreams = append(m.upstreams, r.upstreams(key, &app))
	}
	names, serials := map[string]string{}, map[Serial]string{}
	for i := range c.Users {
		user, key := &c.Users[i], fmt.Sprintf("users[%d]", i)
		r.unique(names, key+".name", user.Name)
		r.user(key, user, ids)
		for j, text := range user.Serials {
			key := fmt.Sprintf("%s.serials[%d]", key, j)
			serial, err := ParseSerial(text)
			if err != nil {
				r.add(key, "%v", err)
			} else if first, twice := serials[serial]; twice {
				r.add(key, "%q is the serial of %s too: remove one of the two", text, first)
			} else {
				serials[serial] = fmt.Sprintf("%s (%q)", key, text)
				m.users[serial] = user
			}
		}
	}
	r.positive("handshake.timeout", c.Handshake.Timeout)
	r.positive("handshake.maxConcurrent", c.Handshake.MaxConcurrent)
	r.positive("handshake.maxPerAddress", c.Handshake.MaxPerAddress)
	r.positive("handshake.maxBytes", c.Handshake.MaxBytes)
	r.positive("drainTimeout", c.DrainTimeout)
	return m
}

// upstreams has lbproxy say what is wrong with those of an app.
func (r *report) upstreams(key string, app *App) (all []lbproxy.Upstream) {
	id := cmp.Or(app.ID, "-")
	valid := func(key, prefix string, upstreams ...lbproxy.Upstream) {
		if _, err := lbproxy.New(id, upstreams, nil); err != nil {
			r.add(key, "%s", strings.TrimPrefix(err.Error(), fmt.Sprintf("lbproxy: app %q: %s", id, prefix)))
		}
	}
	for i, u := range app.Upstreams {
		key := fmt.Sprintf("%s.upstreams[%d]", key, i)
		one := lbproxy.Upstream{Addr: u.Addr, Weight: u.Weight, MaxConns: u.MaxConns}
		if u.TLS != nil {
			one.TLS = r.upstreamTLS(key+".tls", u.TLS)
		}
		valid(key, "upstream 0: ", one)
		all = append(all, one)
	}
	valid(key+".upstreams", "", all...) // what it finds if each is right: two have the same Addr, or there are none
	return all
}

func (r *report) upstreamTLS(key string, t *UpstreamTLS) *tls.Config {
	conf := &tls.Config{ServerName: t.ServerName}
	if t.CA != "" || r.written(key+".ca") {
		if ca := r.ca(key+".ca", t.CA); ca != nil {
			conf.RootCAs = x509.NewCertPool()
			conf.RootCAs.AddCert(ca)
		}
	}
	if t.Cert != "" || t.Key != "" {
		conf.Certificates = []tls.Certificate{r.pair(key, t.Cert, t.Key, x509.ExtKeyUsageClientAuth)}
	}
	return conf
}

// user says what is wrong with u, but for its name and serials. The keys of ids are the apps there are.
func (r *report) user(key string, u *User, ids map[string]string) {
	if len(u.Serials) == 0 {
		r.add(key+".serials", "none: give that of the user's certificate, or remove the user")
	}
	if len(u.Apps) == 0 {
		r.add(key+".apps", "none: give the id of one at least, or remove the user")
	}
	for i, id := range u.Apps {
		if _, ok := ids[id]; !ok {
			r.add(fmt.Sprintf("%s.apps[%d]", key, i), "there is no app %q: want one of %q", id, slices.Sorted(maps.Keys(ids)))
		}
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
	r.positive(key+".burst", l.Burst)
	r.positive(key+".every", l.Every)
	r.positive(key+".open", l.Open)
	r.positive(key+".bytesPerSecond", l.BytesPerSecond)
	switch {
	case l == Limit{}:
		r.add(key, "limits nothing: set burst and every, open or bytesPerSecond, or remove it")
	case (l.Burst == 0) != (l.Every == 0):
		r.add(key, "burst and every go together: set both or neither")
	}
}

// positive refuses what is negative, and a zero that is written: the zero values here are defaults.
func (r *report) positive(key string, value any) {
	if n := reflect.ValueOf(value).Int(); n < 0 || n == 0 && r.written(key) {
		r.add(key, "%v: want more than 0, or leave it out for the default", value)
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
