package mtlsserver

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxyproto"
	"github.com/danielepagano/lbproxy/internal/strictjson"
)

// A report checks a Config and collects the problems with it.
type report struct {
	config   *Config
	problems strictjson.Problems
	certs    []Certificate // read so far
}

// add adds a problem with the value at key.
func (r *report) add(key, format string, args ...any) {
	r.problems.Add(r.config.doc, key, format, args...)
}

// err returns an error with a line for each problem; nil if there are none.
func (r *report) err() error {
	var errs []error
	for _, p := range r.problems {
		if p.Line > 0 {
			errs = append(errs, fmt.Errorf("%s:%d: %s", r.config.file, p.Line, p))
		} else {
			errs = append(errs, errors.New(p.String()))
		}
	}
	return errors.Join(errs...)
}

// dates adds a problem for each certificate that is out of date. It returns those whose file is in
// force already, without a problem.
func (r *report) dates(inForce []Certificate) (expired []Certificate) {
	now := time.Now()
	for _, c := range r.certs {
		wrong := c.outOfDate(now)
		if wrong == "" {
			continue
		}
		if slices.ContainsFunc(inForce, func(old Certificate) bool { return old.text == c.text }) {
			expired = append(expired, c)
		} else {
			r.add(c.Key, "%q: %s", c.File, wrong)
		}
	}
	return expired
}

// listed implements Users for the users of a Config.
type listed map[certKey]listedUser

type certKey struct {
	ca     string // its KeyID
	serial Serial
}

type listedUser struct {
	user   *User
	sha256 string // of the certificate; empty accepts any with that serial
}

// Lookup implements [Users].
func (l listed) Lookup(c Claim) (*User, bool) {
	u, ok := l[certKey{c.CA, c.Serial}]
	return u.user, ok && (u.sha256 == "" || u.sha256 == digestOf(c.Cert.Raw))
}

// check checks the Config together with the files that it names, and returns their contents. The
// snapshot is incomplete if there are problems, and lacks what reload adds.
func (r *report) check() *snapshot {
	c := r.config
	server := r.pair("tls", c.TLS.Cert, c.TLS.Key, x509.ExtKeyUsageServerAuth)
	cas := r.cas()
	snap := &snapshot{config: c, tls: clientTLS(server, cas), apps: map[string]*appRules{}}
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
			r.add(key+".listen", `%q: want host:port, such as "127.0.0.1:9443", `+
				`port 0 for any that is free`, app.Listen)
		case n != 0:
			r.unique(listens, key+".listen", app.Listen)
		}
		r.clients(key, &app, server.Leaf)
		upstreams := r.upstreams(key+".upstreams", app.Upstreams)
		snap.apps[app.ID] = &appRules{
			conf:        &app,
			configured:  slices.Clone(upstreams),
			upstreams:   upstreams,
			acceptProxy: r.acceptProxy(key+".acceptProxy", app.AcceptProxy),
		}
	}
	users := listed{}
	names, serials := map[string]string{}, map[certKey]string{}
	for i := range c.Users {
		user, key := &c.Users[i], fmt.Sprintf("users[%d]", i)
		r.unique(names, key+".name", user.Name)
		r.rights(key, user, ids)
		for j, s := range user.Serials {
			r.serial(fmt.Sprintf("%s.serials[%d]", key, j), s, user, cas, users, serials)
		}
	}
	if c.DefaultLimit != nil {
		r.limit("defaultLimit", *c.DefaultLimit)
	}
	snap.auth = Authenticator{CAs: cas, Users: users}
	snap.adminToken = r.admin(listens)
	r.positive("handshake", c.Handshake)
	r.positive("", *c)
	snap.certificates = r.certs
	return snap
}

// clients checks an app's requirements for its clients. server is the server's certificate.
func (r *report) clients(key string, app *App, server *x509.Certificate) {
	_, known := closeNotifies[app.CloseNotify]
	if !known || app.CloseNotify == "" && r.config.doc.Has(key+".closeNotify") {
		r.add(key+".closeNotify", `%q: want "required", "idle" or "optional"`, app.CloseNotify)
	}
	if app.TLS == nil {
		return
	}
	key += ".tls.serverName"
	if name := app.TLS.ServerName; name == "" {
		r.add(key, "empty: give a name, or remove tls for any")
	} else if server != nil && server.VerifyHostname(name) != nil {
		r.add(key, "%q: the certificate in tls.cert is not for this name: "+
			"want a name that it has, or make one that has this", name)
	}
}

// closeNotifies are the values of App.CloseNotify.
var closeNotifies = map[string]lbproxy.CloseNotify{
	"": lbproxy.CloseNotifyRequired, "required": lbproxy.CloseNotifyRequired,
	"idle": lbproxy.CloseNotifyIdle, "optional": lbproxy.CloseNotifyOptional,
}

// acceptProxy returns the AdmitFunc for an app's AcceptProxy; nil if it is empty.
func (r *report) acceptProxy(key string, texts []string) lbproxy.AdmitFunc {
	var trusted []netip.Prefix
	if len(texts) == 0 && r.config.doc.Has(key) {
		r.add(key, `none: give a network, such as "10.0.0.0/8", or remove it`)
	}
	for i, text := range texts {
		p, err := netip.ParsePrefix(text)
		_, tooWide := proxyproto.NewTrust([]netip.Prefix{p}) // as lbproxy.AcceptProxy asks
		switch key := fmt.Sprintf("%s[%d]", key, i); {
		case err != nil:
			r.add(key, `%q: want a network, such as "10.0.0.0/8", `+
				`or "10.0.0.1/32" for one address`, text)
		case tooWide != nil:
			r.add(key, "%q: want fewer than all addresses: anybody could claim to be anyone", text)
		default:
			trusted = append(trusted, p)
		}
	}
	if len(trusted) == 0 {
		return nil
	}
	return lbproxy.AcceptProxy(trusted, nil)
}

// portOf returns the port of a "host:port", or -1 if the text does not have that form. Port 0
// stands for any free one.
func portOf(listen string) int {
	host, port, err := net.SplitHostPort(listen)
	n, portErr := net.LookupPort("tcp", port)
	if err != nil || portErr != nil || port == "" || strings.ContainsAny(host, " \t\r\n") {
		return -1
	}
	return n
}

// upstreams converts the upstreams of an app and lets lbproxy.New check them.
func (r *report) upstreams(key string, upstreams []Upstream) (all []lbproxy.Upstream) {
	addrs := map[string]string{}
	for i, u := range upstreams {
		key := fmt.Sprintf("%s[%d]", key, i)
		one := u.lbproxy()
		if u.TLS != nil {
			one.TLS = r.upstreamTLS(key+".tls", u.TLS)
		}
		r.positive(key, u) // lbproxy allows 0; here a written 0 is a mistake
		if u.Weight > 1_000_000 {
			r.add(key+".weight", "%d: want 1 to 1000000", u.Weight)
		}
		if u.ProxyProtocol > 2 {
			r.add(key+".proxyProtocol", "%d: want 1 or 2, or leave it out for none",
				u.ProxyProtocol)
		}
		r.unique(addrs, key+".addr", u.Addr)
		if wrong := invalid(lbproxy.Upstream{Addr: u.Addr}); wrong != "" {
			wrong = strings.TrimPrefix(wrong, fmt.Sprintf("upstream 0: Addr %q: ", u.Addr))
			r.add(key+".addr", "%q: %s", u.Addr, wrong)
		}
		all = append(all, one)
	}
	if wrong := invalid(all...); wrong != "" { // an empty list, or what the checks above lack
		r.add(key, "%s", wrong)
	}
	return all
}

// invalid returns the problem that lbproxy.New finds with upstreams.
func invalid(upstreams ...lbproxy.Upstream) string {
	_, err := lbproxy.New("-", upstreams, nil)
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(err.Error(), `lbproxy: app "-": `)
}

func (r *report) upstreamTLS(key string, t *UpstreamTLS) *tls.Config {
	written := r.config.doc.Has
	conf := &tls.Config{ServerName: t.ServerName}
	if t.ServerName == "" && written(key+".serverName") {
		r.add(key+".serverName", "empty: give a name, or leave it out for the host of addr")
	}
	if t.CA != "" || written(key+".ca") {
		if ca := r.ca(key+".ca", t.CA); ca != nil {
			conf.RootCAs = poolOf(ca)
		}
	}
	if t.Cert != "" || t.Key != "" || written(key+".cert") || written(key+".key") {
		pair := r.pair(key, t.Cert, t.Key, x509.ExtKeyUsageClientAuth)
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf
}

// cas reads the CAs that issue clients' certificates.
func (r *report) cas() (cas []*x509.Certificate) {
	files := r.config.TLS.CA
	if len(files) == 0 {
		r.add("tls.ca", "missing: name its file")
	}
	byKey := map[string]string{} // their files
	for i, file := range files {
		key := "tls.ca"
		if at := fmt.Sprintf("tls.ca[%d]", i); len(files) > 1 || r.config.doc.Has(at) {
			key = at
		}
		ca := r.ca(key, file)
		if ca == nil {
			continue
		}
		if other, ok := byKey[KeyID(ca)]; ok {
			r.add(key, "%q: has the key of %q: keep one of the two", file, other)
		}
		byKey[KeyID(ca)] = file
		cas = append(cas, ca)
	}
	return cas
}

// serial adds a certificate of a user to users, unless it is invalid or listed already. seen maps
// each certificate to the key where it was listed first.
func (r *report) serial(
	key string, s UserSerial, user *User, cas []*x509.Certificate, users listed,
	seen map[certKey]string,
) {
	serial, err := ParseSerial(s.Serial)
	if err != nil {
		r.add(key, "%v", err)
		return
	}
	pin, ok := parseDigest(s.CertSHA256)
	if s.CertSHA256 != "" && !ok {
		r.add(key+".certSHA256", "%.80q: want the 64 hex digits that "+
			"openssl x509 -fingerprint -sha256 prints", s.CertSHA256)
	}
	at := certKey{serial: serial}
	ids := make([]string, len(cas))
	for i, ca := range cas {
		ids[i] = KeyID(ca)
	}
	switch id, ok := parseDigest(s.CA); {
	case s.CA == "" && len(ids) > 1:
		r.add(key, `%q: its CA is missing, and there are %d: write {"serial": %[1]q, "ca": "…"} `+
			`with what mtlsserver serial CA.pem prints`, s.Serial, len(ids))
	case s.CA == "" && len(ids) == 1:
		at.ca = ids[0]
	case s.CA != "" && !ok:
		r.add(key+".ca", "%.80q: want the 64 hex digits that mtlsserver serial CA.pem prints", s.CA)
	case s.CA != "" && len(ids) > 0 && !slices.Contains(ids, id):
		r.add(key+".ca", "%.80q: no CA in tls.ca has that key: "+
			"add its file there, or remove the serial", s.CA)
	default:
		at.ca = id
	}
	if first, twice := seen[at]; twice {
		r.add(key, "%q is the serial of %s too: remove one of the two", s.Serial, first)
		return
	}
	seen[at] = fmt.Sprintf("%s (%q)", key, s.Serial)
	users[at] = listedUser{user, pin}
}

// rights checks the apps and limits of a user. The keys of ids are the ids of all apps.
func (r *report) rights(key string, u *User, ids map[string]string) {
	if len(u.Serials) == 0 {
		r.add(key+".serials", "none: give the serial of the user's certificate, or remove the user")
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

// leftOut says what leaving out a key means, if that is no default.
var leftOut = map[string]string{
	"maxConns": "no bound", "burst": "no bound", "every": "no bound", "open": "no bound",
	"bytesPerSecond": "no bound", "proxyProtocol": "none",
}

// positive adds a problem for each negative number or duration in a struct, and for each zero that
// the text spells out: a written 0 would mean the default, which surprises.
func (r *report) positive(key string, of any) {
	for f, v := range reflect.ValueOf(of).Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		key := strings.TrimPrefix(key+"."+name, ".")
		if v.CanInt() && (v.Int() < 0 || v.Int() == 0 && r.config.doc.Has(key)) {
			r.add(key, "%v: want more than 0, or leave it out for %s", v,
				cmp.Or(leftOut[name], "the default"))
		}
	}
}

// unique adds a problem for an empty value, and for one that another key has already. seen maps
// each value to its first key.
func (r *report) unique(seen map[string]string, key, value string) {
	if first, twice := seen[value]; twice {
		r.add(key, "%q is already used by %s: change one of the two", value, first)
	} else if value == "" {
		r.add(key, "missing: give one")
	} else {
		seen[value] = key
	}
}
