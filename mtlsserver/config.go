package mtlsserver

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/internal/strictjson"
)

// A Config says what a [Server] serves and to whom. Load and Parse read one from JSON; it may as
// well be made in Go. Marshalled to JSON it can be read again.
type Config struct {
	TLS          Files         `json:"tls"`
	Apps         []App         `json:"apps"`
	Users        []User        `json:"users"`
	DefaultLimit *Limit        `json:"defaultLimit,omitzero"` // of users who have no Limit; nil means none
	Handshake    Handshake     `json:"handshake,omitzero"`
	DrainTimeout time.Duration `json:"drainTimeout,omitzero"` // how long a drain waits for connections; 0 means 30 seconds

	// LogAdmissions adds a line to the log when a client has been let in. Without, a connection
	// is in the log when it is over.
	LogAdmissions bool `json:"logAdmissions,omitzero"`

	Admin *Admin `json:"admin,omitzero"` // the status page and its API; nil means none

	// AdminAnywhere lets Admin.Listen be more than a loopback address. Other machines may then read
	// /healthz, /readyz and /metrics, and nothing else.
	AdminAnywhere bool `json:"adminAnywhere,omitzero"`

	source
}

// A source is the text that a Config was parsed from. The zero source is that of a Config made in
// Go.
type source struct {
	file string // for problems
	dir  string // what paths are relative to
	doc  *strictjson.Doc
}

// Files are paths of PEM files. They are relative to the file that Load read, if it made the
// Config. Other users of the machine must not be able to read Key, nor to write any of them.
type Files struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`

	// CA are the issuers of all clients, one certificate a file. With more than one, every serial
	// of a user must say which it is of, so that the same serial by another issuer is nobody. In
	// JSON a single file may be written without the list.
	CA []string `json:"ca" strictjson:"single"`
}

// An App is a service that is listened for and forwarded to upstreams.
type App struct {
	ID          string        `json:"id"`
	Listen      string        `json:"listen"`               // "host:port"; port 0 is any free one
	MaxConns    int           `json:"maxConns,omitzero"`    // connections at once, handshakes included; 0 means no bound
	IdleTimeout time.Duration `json:"idleTimeout,omitzero"` // 0 means the default of lbproxy.Options, as for the next two
	DialTimeout time.Duration `json:"dialTimeout,omitzero"`
	FailTimeout time.Duration `json:"failTimeout,omitzero"`

	// CloseNotify says what becomes of a client that closes its connection without TLS's
	// close_notify: "required" (empty means that), "idle" or "optional". See
	// lbproxy.CloseNotify.
	CloseNotify string `json:"closeNotify,omitzero"`

	// AcceptProxy are the networks, such as "10.0.0.0/8", of balancers in front of this one. They
	// must send a PROXY protocol header, and the address in it counts as the client's.
	AcceptProxy []string `json:"acceptProxy,omitzero"`

	TLS         *AppTLS      `json:"tls,omitzero"`         // nil means the defaults
	HealthCheck *HealthCheck `json:"healthCheck,omitzero"` // nil means none
	Upstreams   []Upstream   `json:"upstreams"`
}

// AppTLS is what an app demands of its clients' TLS.
type AppTLS struct {
	// ServerName is the name that clients must mean. A client that asks for another one (SNI) is
	// refused: it was led here from another app. One that names none is not. Empty means any.
	ServerName string `json:"serverName,omitzero"`
}

// A HealthCheck makes an app dial its upstreams at intervals. Zero values mean the defaults of
// lbproxy.HealthCheck.
type HealthCheck struct {
	Interval time.Duration `json:"interval,omitzero"`
	Timeout  time.Duration `json:"timeout,omitzero"`
	Rise     int           `json:"rise,omitzero"` // successful checks in a row that bring an upstream up
	Fall     int           `json:"fall,omitzero"` // failed checks in a row that bring it down
}

// An Upstream is an lbproxy.Upstream as it is written in a file.
type Upstream struct {
	Addr          string       `json:"addr"`
	Weight        int          `json:"weight,omitzero"`
	MaxConns      int          `json:"maxConns,omitzero"`
	Drain         bool         `json:"drain,omitzero"`
	ProxyProtocol int          `json:"proxyProtocol,omitzero"` // 1 or 2; 0 means none
	TLS           *UpstreamTLS `json:"tls,omitzero"`           // nil means plain TCP
}

// UpstreamTLS makes the server speak TLS to an upstream, which must prove to be ServerName (empty:
// the host of Addr) by a certificate from CA (empty: the system's roots). Cert and Key, if set,
// prove the server to it.
type UpstreamTLS struct {
	CA         string `json:"ca,omitzero"`
	Cert       string `json:"cert,omitzero"`
	Key        string `json:"key,omitzero"`
	ServerName string `json:"serverName,omitzero"`
}

// A User is the holder of certificates, and what they may reach.
type User struct {
	Name      string           `json:"name"`
	Serials   []UserSerial     `json:"serials"`
	Apps      []string         `json:"apps"`               // ids of those that may be reached
	Limit     *Limit           `json:"limit,omitzero"`     // shared by all apps; nil means the Config's DefaultLimit
	AppLimits map[string]Limit `json:"appLimits,omitzero"` // by app id; each is for that app alone
}

// A UserSerial names a certificate of a user. In JSON it may be the serial alone.
type UserSerial struct {
	Serial     string `json:"serial" strictjson:"short"` // in any form that ParseSerial takes
	CA         string `json:"ca,omitzero"`               // the KeyID of its issuer; may be empty if there is one CA
	CertSHA256 string `json:"certSHA256,omitzero"`       // if set, the certificate's SHA-256 in hex: no other one is it
}

// A Limit bounds what a user does. Zero fields set no bound; Burst and Every go together.
type Limit struct {
	Burst          int           `json:"burst,omitzero"`          // connections opened at once,
	Every          time.Duration `json:"every,omitzero"`          // and the time in which one more is regained
	Open           int           `json:"open,omitzero"`           // connections open at once
	BytesPerSecond int64         `json:"bytesPerSecond,omitzero"` // both directions together
}

// Handshake bounds what clients may use before it is known who they are. A client needs a place
// from its first byte on. When all places are taken, the handshake that has lasted longest gives
// its place up, among those of the address (IPv6: network) that has most. Before its first byte a
// client costs a socket; 16,384 may be silent at once.
type Handshake struct {
	Timeout       time.Duration `json:"timeout,omitzero"`       // from accept to the end of the handshake; 0 means 10 seconds
	MaxConcurrent int           `json:"maxConcurrent,omitzero"` // places; 0 means 256
	MaxPerAddress int           `json:"maxPerAddress,omitzero"` // of those for one address (IPv6: /64); 0 means 16
	MaxBytes      int           `json:"maxBytes,omitzero"`      // bytes read from a client; 0 means 16384
}

// Admin says where package admin's page, metrics and API are served. They are there before the
// apps and until the last connection has ended.
type Admin struct {
	Listen string `json:"listen,omitzero"` // "127.0.0.1:9090": to read; empty means nowhere
	Socket string `json:"socket,omitzero"` // a Unix socket, to read and to change; empty means none

	// Token is a file that others cannot read. What is in it, 16 characters or more, permits
	// changes to requests to Listen that have it as their bearer token. Empty means none.
	Token string `json:"token,omitzero"`

	// Hosts are names by which Listen may be asked, besides localhost and IP addresses.
	Hosts []string `json:"hosts,omitzero"`
}

// MarshalJSON implements json.Marshaler. Durations are texts, as Load reads them.
func (c Config) MarshalJSON() ([]byte, error)      { return strictjson.Encode(c) }
func (a App) MarshalJSON() ([]byte, error)         { return strictjson.Encode(a) }
func (u User) MarshalJSON() ([]byte, error)        { return strictjson.Encode(u) }
func (l Limit) MarshalJSON() ([]byte, error)       { return strictjson.Encode(l) }
func (h Handshake) MarshalJSON() ([]byte, error)   { return strictjson.Encode(h) }
func (h HealthCheck) MarshalJSON() ([]byte, error) { return strictjson.Encode(h) }

// Load reads the Config in a file of JSON and checks it with the files that it names. It fails
// with all problems there are, a line each: syntax, unknown keys, keys written twice, values of the
// wrong type, and what Validate finds, except for certificates that are out of date. Those are for
// [New] and [Server.Reload] to judge. Durations are written as Go's ("10s"), paths are relative to
// the file.
func Load(path string) (*Config, error) {
	text, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return Parse(path, dir, text)
}

// Parse is Load for a text that is not in a file. Problems begin with name, and dir is the folder
// that paths are relative to.
func Parse(name, dir string, text []byte) (*Config, error) {
	c := &Config{source: source{file: name, dir: dir}}
	doc, problems := strictjson.Decode(text, c)
	c.doc = doc
	r := &report{config: c, problems: problems}
	if doc.Has("") { // it is JSON
		for _, key := range []string{"tls", "apps", "users"} {
			if !doc.Has(key) {
				r.add(key, "missing: it is required")
			}
		}
		r.check()
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// Validate reads the files that c names and returns all problems, a line each, also certificates
// that are out of date.
func (c *Config) Validate() error {
	r := &report{config: c}
	r.check()
	r.dates(nil)
	return r.err()
}

// Certificates returns the certificates that c names and their dates. It fails as Validate does.
func (c *Config) Certificates() ([]Certificate, error) {
	r := &report{config: c}
	m := r.check()
	return m.certificates, r.err()
}

// A Certificate is one that a Config names: the server's, a CA, or one for upstreams.
type Certificate struct {
	Key       string // where the Config names it, such as "tls.cert"
	File      string
	Subject   string
	NotBefore time.Time
	NotAfter  time.Time

	text [32]byte // the SHA-256 of the file
}

// outOfDate says what is wrong with c's dates, if anything.
func (c *Certificate) outOfDate(now time.Time) string {
	switch {
	case now.Before(c.NotBefore):
		return fmt.Sprintf("not valid before %s: wait, or set the clock", c.NotBefore.UTC().Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Sprintf("expired at %s: make a new one", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return ""
}

// parseDigest reads a SHA-256 as tools print it: hex in either case, with or without colons.
func parseDigest(text string) (string, bool) {
	digest := strings.ToLower(strings.ReplaceAll(text, ":", ""))
	return digest, len(digest) == 64 && strings.Trim(digest, "0123456789abcdef") == ""
}
