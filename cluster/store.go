package cluster

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
)

// ErrAway is wrapped by the errors of calls while the store cannot be reached, which also say why.
var ErrAway = errors.New("the store cannot be reached")

// ErrClosed is returned by calls after [Store.Close].
var ErrClosed = errors.New("cluster: the store was closed")

// Options change how a [Store] works. A nil *Options and the zero Options mean the defaults.
type Options struct {
	// Name is the cluster's name: letters, digits, '.', '_' and '-'. Proxies with the same name
	// share everything; one server may serve several clusters. Empty means "lbproxy".
	Name string

	// Timeout bounds how long a new connection waits for the store. 0 means 50 ms.
	Timeout time.Duration

	// TLS is used if the URL begins with rediss:// or valkeys://. nil means that the store's
	// certificate must be for the URL's host and issued by one of the system's roots.
	TLS *tls.Config

	// Peers is the number of proxies N until a [Member] learns it from the store. While the store
	// is away, [Share] gives each proxy one part in N of a limit. 0 means 1.
	Peers int

	// Logger gets a line when the store is lost and when it is back. nil means slog.Default().
	Logger *slog.Logger
}

// A Store is a connection to the state that proxies share. All methods are safe for concurrent use.
type Store struct {
	// The Store is connected while client is not nil. A failed call removes the client (lose) and
	// starts a goroutine (probe) that tries to set a new one.
	client  atomic.Pointer[client]
	name    string // of the cluster
	id      string // of this Store, by which open limits count its connections
	addr    string // for errors and logs, without a password
	opts    Options
	redis   rueidis.ClientOption
	peers   atomic.Int64 // the number of proxies; at least 1
	limits  flusher
	serial  atomic.Uint64 // of limiters
	config  watched
	ctx     context.Context // ends with Close
	close   context.CancelCauseFunc
	running sync.WaitGroup

	calls, failures, timeouts atomic.Uint64
	alone, turnedAway         atomic.Uint64

	mu     sync.Mutex // guards the fields below; never held over a call or a log line
	closed bool
	err    error     // why it is away; nil while it is connected
	since  time.Time // when it was connected, or lost
}

// A client is one connection, or in a Redis Cluster one to each node. After an error it is
// replaced.
type client struct {
	rueidis.Client
	late atomic.Int32 // calls in a row without an answer
}

const (
	probeEvery = 100 * time.Millisecond
	// After maxLate calls in a row without an answer the store counts as away. A single slow call
	// means nothing: on a busy machine a few in thousands are slow.
	maxLate = 2
)

// Dial returns the Store at storeURL, the URL of a Redis or Valkey server:
//
//	redis://user:password@host:6379          rediss:// for TLS
//	redis://host:6379?addr=host2:6379        nodes of a Redis Cluster, two at least
//	redis://host:26379?master_set=mymaster   Sentinels
//	unix:///run/redis.sock
//
// Dial tries for a second to reach the server. If that fails, the Store tries again every 100 ms;
// [Store.Ping] returns the problem. Dial fails only if storeURL or opts are invalid. The caller
// must call Close.
func Dial(storeURL string, opts *Options) (*Store, error) {
	s := &Store{id: rand.Text()[:12], since: time.Now()}
	if opts != nil {
		s.opts = *opts
	}
	s.name = cmp.Or(s.opts.Name, "lbproxy")
	s.opts.Timeout = cmp.Or(s.opts.Timeout, 50*time.Millisecond)
	switch {
	case strings.ContainsFunc(s.name, func(r rune) bool { return !isNameRune(r) }):
		return nil, fmt.Errorf("cluster: Options.Name %q: want letters, digits, '.', '_' and '-'",
			s.name)
	case s.opts.Timeout < 0:
		return nil, fmt.Errorf("cluster: Options.Timeout %v is negative: "+
			"use 0 for the default of 50ms", s.opts.Timeout)
	case s.opts.Peers < 0:
		return nil, fmt.Errorf("cluster: Options.Peers %d is negative: use 0 for the default of 1",
			s.opts.Peers)
	}
	s.peers.Store(int64(max(s.opts.Peers, 1)))
	if err := s.parse(storeURL); err != nil {
		return nil, err
	}
	s.ctx, s.close = context.WithCancelCause(context.Background())
	s.config.changed = make(chan struct{}, 1)
	s.limits.init(s)
	s.err = errors.New("not connected yet")
	if err := s.connect(max(time.Second, s.opts.Timeout)); err != nil {
		s.err = err
		s.log().Warn("cluster: the store is away, trying again",
			"store", s.addr, "err", s.clean(err))
		s.running.Go(s.probe)
	}
	s.running.Go(s.limits.run)
	return s, nil
}

func isNameRune(r rune) bool {
	return r < 128 && (r == '.' || r == '_' || r == '-' || '0' <= r && r <= '9' ||
		'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z')
}

// parse reads the store's URL. Its errors never contain the URL, which may have a password.
func (s *Store) parse(text string) error {
	const want = "want redis://user:password@host:6379, or rediss:// for TLS"
	u, err := url.Parse(text)
	schemes := []string{"redis", "rediss", "valkey", "valkeys", "unix"}
	if err != nil || !slices.Contains(schemes, u.Scheme) {
		return errors.New("cluster: cannot parse the store's URL " +
			"(it is not shown for its password): " + want)
	}
	s.addr = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	if s.redis, err = rueidis.ParseURL(text); err != nil {
		return fmt.Errorf("cluster: the store's URL %s: %s", s.addr,
			s.clean(fmt.Errorf("%w: %s", err, want)))
	}
	o := &s.redis
	if s.opts.TLS != nil {
		if o.TLSConfig == nil {
			return fmt.Errorf("cluster: the store's URL %s: "+
				"it is not for TLS, but Options.TLS is set: use rediss://", s.addr)
		}
		name := o.TLSConfig.ServerName
		o.TLSConfig = s.opts.TLS.Clone()
		o.TLSConfig.ServerName = cmp.Or(o.TLSConfig.ServerName, name)
	}
	o.ClientName = cmp.Or(o.ClientName, "lbproxy")
	// Redis 7.0 does not have CLIENT SETINFO, not even in its ACLs.
	o.ClientSetInfo = rueidis.DisableClientSetInfo
	// No value is read twice.
	o.DisableCache = true
	// A client is waiting: after a failure, the Outage policy decides at once.
	o.DisableRetry = true
	// Otherwise a call that times out would close the connection.
	o.AlwaysPipelining = true
	// Use one connection: it is up or down as a whole, and calls stay in order.
	o.PipelineMultiplex = -1
	o.ForceSingleClient = o.Sentinel.MasterSet == "" && len(o.InitAddress) == 1
	o.Sentinel.TopologyRefreshInterval = 5 * time.Second
	o.Dialer.KeepAlive = time.Second
	// Close a silent connection after this time, even without calls.
	o.ConnWriteTimeout = 2 * time.Second
	return nil
}

// connect sets a new client after a test of it. The test writes, because a server that is loading
// its data, or has become a replica, is of no use.
func (s *Store) connect(timeout time.Duration) error {
	o := s.redis
	o.Dialer.Timeout = timeout
	c, err := rueidis.NewClient(o)
	if err == nil {
		ctx, cancel := context.WithTimeout(s.ctx, timeout)
		defer cancel()
		err = c.Do(ctx, c.B().Set().Key(s.key("probe")).Value("1").Px(time.Minute).Build()).Error()
	}
	if err != nil {
		if c != nil {
			c.Close()
		}
		return err
	}
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.client.Store(&client{Client: c})
		s.err, s.since = nil, time.Now()
	}
	s.mu.Unlock()
	if closed {
		c.Close()
		return ErrClosed
	}
	return nil
}

// lose removes c, unless it has been removed already.
func (s *Store) lose(c *client, why error) {
	s.mu.Lock()
	lost := !s.closed && s.client.CompareAndSwap(c, nil)
	if lost {
		s.err, s.since = why, time.Now()
		s.running.Go(c.Close) // it may wait a second for a silent server
		s.running.Go(s.probe)
	}
	s.mu.Unlock()
	if lost {
		s.log().Warn("cluster: the store is away, limits follow their policies",
			"store", s.addr, "err", s.clean(why))
	}
}

// probe tries to connect until the store is back.
func (s *Store) probe() {
	every := time.NewTicker(probeEvery)
	defer every.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-every.C:
		}
		err := s.connect(max(5*s.opts.Timeout, 250*time.Millisecond))
		if err == nil {
			s.log().Info("cluster: the store is back", "store", s.addr)
			return
		}
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
	}
}

// A caller makes one call.
type caller = func(context.Context, rueidis.Client) rueidis.RedisResult

// do makes one call, bounded by timeout, and counts its outcome. After an error the caller goes on
// without the store.
func (s *Store) do(ctx context.Context, timeout time.Duration, call caller,
) ([]rueidis.RedisMessage, error) {
	c := s.client.Load()
	if c == nil {
		return nil, s.away()
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	s.calls.Add(1)
	result := call(ctx, c)
	err := result.Error()
	if err == nil || rueidis.IsRedisNil(err) {
		if c.late.Load() != 0 {
			c.late.Store(0)
		}
		values, _ := result.ToArray() // callers ignore answers that are no arrays
		return values, nil
	}
	s.failures.Add(1)
	switch refused, answered := rueidis.IsRedisErr(err); {
	case errors.Is(err, context.Canceled):
	case errors.Is(err, context.DeadlineExceeded):
		s.timeouts.Add(1)
		if c.late.Add(1) >= maxLate {
			s.lose(c, fmt.Errorf("%d calls in a row were not answered within %v", maxLate, timeout))
		}
	case answered && !unavailable(refused):
		s.log().Warn("cluster: the store refuses a call", "store", s.addr, "err", s.clean(err))
	default:
		s.lose(c, err)
	}
	return nil, s.wrap(err)
}

// unavailable reports whether the error means that the server is of no use at present.
func unavailable(err *rueidis.RedisError) bool {
	code, _, _ := strings.Cut(err.Error(), " ")
	switch code {
	case "LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "MISCONF",
		"NOREPLICAS", "NOAUTH":
		return true
	}
	return false
}

// script is do for a script whose keys are all on one node.
func (s *Store) script(ctx context.Context, timeout time.Duration, script *rueidis.Lua,
	keys []string, args ...string) ([]rueidis.RedisMessage, error) {
	return s.do(ctx, timeout, func(ctx context.Context, c rueidis.Client) rueidis.RedisResult {
		return script.Exec(ctx, c, keys, args)
	})
}

// key returns the cluster's key of that name. All of the cluster's keys are on one node.
func (s *Store) key(name string) string { return "{" + s.name + "}:" + name }

// Ping makes one call to the store. Its error says why the store cannot be used, and what to do.
func (s *Store) Ping(ctx context.Context) error {
	ping := func(ctx context.Context, c rueidis.Client) rueidis.RedisResult {
		return c.Do(ctx, c.B().Ping().Build())
	}
	_, err := s.do(ctx, time.Second, ping)
	return err
}

// away returns the error of calls while there is no client.
func (s *Store) away() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	return s.wrap(s.err)
}

// wrap adds the store's address to an error, and a remedy to the common ones.
func (s *Store) wrap(err error) error {
	if err == nil {
		return nil
	}
	text, remedy := strings.TrimSuffix(s.clean(err), "."), ""
	_, unknown := errors.AsType[*tls.CertificateVerificationError](err)
	op, _ := errors.AsType[*net.OpError](err)
	switch {
	case op != nil && op.Op == "dial":
		remedy = ": start it, or correct the address in its URL"
	case strings.HasPrefix(text, "WRONGPASS"), strings.HasPrefix(text, "NOAUTH"):
		remedy = ": check the user and the password in the store's URL"
	case strings.HasPrefix(text, "NOPERM"):
		remedy = ": the user needs more rights in the store"
	case strings.HasPrefix(text, "MOVED"):
		remedy = ": this is a node of a Redis Cluster: give a second one, as ?addr=host:port"
	case unknown:
		remedy = ": give the CA that signed the store's certificate"
	case s.redis.TLSConfig == nil && errors.Is(err, io.EOF):
		remedy = ": if the store wants TLS, use rediss://"
	case s.redis.TLSConfig != nil && errors.Is(err, context.DeadlineExceeded):
		remedy = ": does the store speak TLS there?"
	case strings.HasPrefix(text, "received unknown message type"):
		remedy = ": this is no Redis or Valkey server"
	}
	if _, ok := rueidis.IsRedisErr(err); !ok || remedy != "" {
		return fmt.Errorf("cluster: store %s: %w: %s%s", s.addr, ErrAway, text, remedy)
	}
	return fmt.Errorf("cluster: store %s: %s", s.addr, text)
}

// clean returns err's text with the password removed, in case a library adds it.
func (s *Store) clean(err error) string {
	text := err.Error()
	for _, secret := range []string{s.redis.Password, s.redis.Sentinel.Password} {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "***")
		}
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Timeout() {
		text += " (a firewall, or the host is down)"
	}
	return text
}

func (s *Store) log() *slog.Logger {
	if s.opts.Logger != nil {
		return s.opts.Logger
	}
	return slog.Default()
}

// Close returns the tokens that limits have borrowed, closes the connection and waits for all
// goroutines of s. Members stop beating. Limits that are still in use follow their policies. Close
// always returns nil.
func (s *Store) Close() error {
	s.limits.stop()
	s.mu.Lock()
	already := s.closed
	s.closed = true
	s.since = time.Now()
	c := s.client.Swap(nil)
	s.mu.Unlock()
	s.close(ErrClosed)
	if c != nil && !already {
		c.Close()
	}
	s.running.Wait()
	return nil
}

// A Status is the state of a [Store] at one moment.
type Status struct {
	Addr      string    // the store's URL, without user and password
	Connected bool      // false: limits follow their policies
	Since     time.Time // when it was connected, or lost
	Err       string    // why it is not connected
	Peers     int       // the number of proxies that share the limits

	// The counters begin at Dial.
	Calls      uint64 // calls to the store
	Failures   uint64 // calls without a useful answer
	Timeouts   uint64 // failures because no answer came in time
	Alone      uint64 // connections admitted by a policy, without the store
	TurnedAway uint64 // connections refused by a policy
}

// Status returns the state of s. It makes no call.
func (s *Store) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := Status{
		Addr: s.addr, Connected: s.client.Load() != nil, Since: s.since, Peers: int(s.peers.Load()),
		Calls: s.calls.Load(), Failures: s.failures.Load(), Timeouts: s.timeouts.Load(),
		Alone: s.alone.Load(), TurnedAway: s.turnedAway.Load(),
	}
	if s.err != nil {
		status.Err = s.clean(s.err)
	}
	return status
}
