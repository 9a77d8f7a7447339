package mtlsserver

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/internal/strictjson"
)

// A Config configures a [Server]: its apps, its users and its limits. Load and Parse read a Config
// from JSON; a program may also build one. Parse accepts the JSON that json.Marshal makes of it.
type Config struct {
	TLS          Files     `json:"tls"`
	Apps         []App     `json:"apps"`
	Users        []User    `json:"users"`
	DefaultLimit *Limit    `json:"defaultLimit,omitzero"` // of users without a Limit
	Handshake    Handshake `json:"handshake,omitzero"`

	// DrainTimeout bounds how long a drain waits for connections to end. 0 means 30 seconds.
	DrainTimeout time.Duration `json:"drainTimeout,omitzero"`

	// LogAdmissions logs a line when a client is admitted, besides the line that every connection
	// gets when it has ended.
	LogAdmissions bool `json:"logAdmissions,omitzero"`

	Admin *Admin `json:"admin,omitzero"` // the status page and its API; nil means none

	// AdminAnywhere lets Admin.Listen be more than a loopback address. Other machines may then read
	// /healthz, /readyz and /metrics, and nothing else.
	AdminAnywhere bool `json:"adminAnywhere,omitzero"`

	source
}

// A source is the text that a Config was parsed from. It is zero for a Config built in Go.
type source struct {
	file string // named in problems
	dir  string // the folder of relative paths
	doc  *strictjson.Doc
}

// Files are paths of PEM files. In a Config from Load they are relative to its file. Other users
// of the machine must not be able to read Key, or to write any of the files.
type Files struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`

	// CA are the files of the CAs that issue clients' certificates, one certificate a file. With
	// more than one CA every UserSerial must name its own, because another CA may issue the same
	// serial. In JSON a single file may be written without the list.
	CA []string `json:"ca" strictjson:"single"`
}

// An App is a service: an address to listen on, and the upstreams that its connections go to. Zero
// timeouts mean the defaults of lbproxy.Options.
type App struct {
	ID          string        `json:"id"`
	Listen      string        `json:"listen"`            // "host:port"; port 0 is any free one
	MaxConns    int           `json:"maxConns,omitzero"` // handshakes included; 0 means no bound
	IdleTimeout time.Duration `json:"idleTimeout,omitzero"`
	DialTimeout time.Duration `json:"dialTimeout,omitzero"`
	FailTimeout time.Duration `json:"failTimeout,omitzero"`

	// CloseNotify says how to treat a client that closes its connection without TLS's
	// close_notify: "required", "idle" or "optional", as lbproxy.CloseNotify has them. Empty means
	// "required".
	CloseNotify string `json:"closeNotify,omitzero"`

	// AcceptProxy are the networks, such as "10.0.0.0/8", of balancers in front of this one. They
	// must send a PROXY protocol header, and the address in it counts as the client's.
	AcceptProxy []string `json:"acceptProxy,omitzero"`

	TLS         *AppTLS      `json:"tls,omitzero"`         // nil means the defaults
	HealthCheck *HealthCheck `json:"healthCheck,omitzero"` // nil means none
	Upstreams   []Upstream   `json:"upstreams"`
}

// AppTLS are an app's requirements for its clients' TLS.
type AppTLS struct {
	// ServerName is the server name (SNI) that clients may ask for. A client that asks for another
	// name is refused, because somebody may have redirected it from another app. A client without
	// SNI is accepted. Empty means any name.
	ServerName string `json:"serverName,omitzero"`
}

// A HealthCheck makes an app dial its upstreams at intervals. Zero values mean the defaults of
// lbproxy.HealthCheck.
type HealthCheck struct {
	Interval time.Duration `json:"interval,omitzero"`
	Timeout  time.Duration `json:"timeout,omitzero"`
	Rise     int           `json:"rise,omitzero"` // successes in a row that bring an upstream up
	Fall     int           `json:"fall,omitzero"` // failures in a row that bring it down
}

// An Upstream is an lbproxy.Upstream in the form of a configuration file.
type Upstream struct {
	Addr          string       `json:"addr"`
	Weight        int          `json:"weight,omitzero"`
	MaxConns      int          `json:"maxConns,omitzero"`
	Drain         bool         `json:"drain,omitzero"`
	ProxyProtocol int          `json:"proxyProtocol,omitzero"` // 1 or 2; 0 means none
	TLS           *UpstreamTLS `json:"tls,omitzero"`           // nil means plain TCP
}

// UpstreamTLS makes the server speak TLS to an upstream. The upstream's certificate must be for
// ServerName (empty means the host of Addr) and issued by CA (empty means the system's roots). Cert
// and Key, if set, authenticate the server to the upstream.
type UpstreamTLS struct {
	CA         string `json:"ca,omitzero"`
	Cert       string `json:"cert,omitzero"`
	Key        string `json:"key,omitzero"`
	ServerName string `json:"serverName,omitzero"`
}

// A User is the holder of certificates, with the apps that they may reach.
type User struct {
	Name      string           `json:"name"`
	Serials   []UserSerial     `json:"serials"`
	Apps      []string         `json:"apps"`               // ids of the apps that they may reach
	Limit     *Limit           `json:"limit,omitzero"`     // all apps together; nil: DefaultLimit
	AppLimits map[string]Limit `json:"appLimits,omitzero"` // by app id; each for that app alone
}

// A UserSerial names a certificate of a user. In JSON it may be the serial alone.
type UserSerial struct {
	Serial string `json:"serial" strictjson:"short"` // in any form that ParseSerial takes
	CA     string `json:"ca,omitzero"`               // its issuer's KeyID; empty means the only CA

	// CertSHA256, if set, is the SHA-256 of the certificate in hex. Another certificate with the
	// same serial is then refused.
	CertSHA256 string `json:"certSHA256,omitzero"`
}

// A Limit bounds a user's connections and bytes. Zero fields set no bound; Burst and Every go
// together.
type Limit struct {
	Burst          int           `json:"burst,omitzero"`          // most new connections at once
	Every          time.Duration `json:"every,omitzero"`          // time to refill one of them
	Open           int           `json:"open,omitzero"`           // most open connections at once
	BytesPerSecond int64         `json:"bytesPerSecond,omitzero"` // both directions together
}

// Handshake bounds the resources of clients that have not authenticated yet. A client holds a place
// from its first byte to the end of its handshake. When all places are taken, one handshake makes
// way, perhaps the newcomer's: one of an address (IPv6: network) that has failed lately and is not
// known to have finished one, else one of the address that holds most places. Among equals, an
// address that has finished one is spared, and a handshake keeps its place for half a second. A
// client that has sent nothing costs a socket; 16,384 of them may wait.
type Handshake struct {
	Timeout       time.Duration `json:"timeout,omitzero"`       // from accept on; 0: 10s
	MaxConcurrent int           `json:"maxConcurrent,omitzero"` // places; 0: 256
	MaxPerAddress int           `json:"maxPerAddress,omitzero"` // an address or IPv6 /64; 0: 16
	MaxBytes      int           `json:"maxBytes,omitzero"`      // read from a client; 0: 16384
}

// Admin says where package admin serves its page, metrics and API. It serves before the apps do,
// and until the last connection has ended.
type Admin struct {
	Listen string `json:"listen,omitzero"` // "127.0.0.1:9090", see Token; empty means none
	Socket string `json:"socket,omitzero"` // a Unix socket, read and write; empty means none

	// Token names a file that others cannot read. It holds 16 characters or more; a request to
	// Listen with that bearer token may change things. Empty means that no request to Listen may.
	Token string `json:"token,omitzero"`

	// Hosts are host names that requests to Listen may have, besides localhost and IP addresses.
	Hosts []string `json:"hosts,omitzero"`
}

// MarshalJSON implements json.Marshaler. Durations are texts, as Load reads them.
func (c Config) MarshalJSON() ([]byte, error) { return strictjson.Encode(c) }

// MarshalJSON implements json.Marshaler, as for Config.
func (a App) MarshalJSON() ([]byte, error) { return strictjson.Encode(a) }

// MarshalJSON implements json.Marshaler, as for Config.
func (u User) MarshalJSON() ([]byte, error) { return strictjson.Encode(u) }

// MarshalJSON implements json.Marshaler, as for Config.
func (l Limit) MarshalJSON() ([]byte, error) { return strictjson.Encode(l) }

// MarshalJSON implements json.Marshaler, as for Config.
func (h Handshake) MarshalJSON() ([]byte, error) { return strictjson.Encode(h) }

// MarshalJSON implements json.Marshaler, as for Config.
func (h HealthCheck) MarshalJSON() ([]byte, error) { return strictjson.Encode(h) }

// Load reads a Config from a JSON file and checks it together with the files that it names.
// Durations are written as in Go ("10s"); paths are relative to the file. The error lists all
// problems, one a line: syntax, unknown keys, duplicate keys, values of the wrong type, and the
// problems that Validate finds, except for the dates of certificates, which [New] and
// [Server.Reload] check.
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

// Parse is like Load for a text in memory. Each line of the error begins with name; paths are
// relative to dir.
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

// Validate checks c together with the files that it names. The error lists all problems, one a
// line, including certificates that are out of date.
func (c *Config) Validate() error {
	r := &report{config: c}
	r.check()
	r.dates(nil)
	return r.err()
}

// Certificates returns the certificates that c names and their dates. It fails as Validate does.
func (c *Config) Certificates() ([]Certificate, error) {
	r := &report{config: c}
	snap := r.check()
	return snap.certificates, r.err()
}

// A Certificate describes a certificate that a Config names: the server's, a CA's, or one for
// upstreams.
type Certificate struct {
	Key       string // where the Config names it, such as "tls.cert"
	File      string
	Subject   string
	NotBefore time.Time
	NotAfter  time.Time

	text [32]byte // the SHA-256 of the file
}

// outOfDate describes why c is not valid at a time, and what to do; empty if it is valid.
func (c *Certificate) outOfDate(now time.Time) string {
	switch {
	case now.Before(c.NotBefore):
		from := c.NotBefore.UTC().Format(time.RFC3339)
		return fmt.Sprintf("not valid before %s: wait, or set the clock", from)
	case now.After(c.NotAfter):
		until := c.NotAfter.UTC().Format(time.RFC3339)
		return fmt.Sprintf("expired at %s: make a new one", until)
	}
	return ""
}

// parseDigest reads a SHA-256 as tools print it: hex in either case, with or without colons.
func parseDigest(text string) (string, bool) {
	digest := strings.ToLower(strings.ReplaceAll(text, ":", ""))
	return digest, len(digest) == 64 && strings.Trim(digest, "0123456789abcdef") == ""
}
