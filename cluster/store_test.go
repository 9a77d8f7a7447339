package cluster

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) {
	if what := os.Getenv("CHILD"); what != "" {
		child(what)
		return
	}
	// Most tests mostly wait, so run more of them at once. A flag of the command line still wins.
	flag.Set("test.parallel", "12")
	proxytest.Main(m)
}

// dial returns a store of the test's own.
func dial(t testing.TB, url string, opts *Options) (*Store, *proxytest.Buffer) {
	t.Helper()
	var o Options
	if opts != nil {
		o = *opts
	}
	l := new(proxytest.Buffer)
	o.Logger = slog.New(slog.NewTextHandler(l, nil))
	s, err := Dial(url, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, l
}

func TestDialRefusesWrongOptions(t *testing.T) {
	for _, c := range []struct {
		url  string
		opts Options
		want string
	}{
		{"", Options{}, "cannot parse"},
		{"http://h:1", Options{}, "cannot parse"},
		{"geheim@h:1", Options{}, "cannot parse"},
		{"geheim:h", Options{}, "cannot parse"},
		{"redis://u:geheim@h:port", Options{}, "cannot parse"},
		{"redis://u:geheim@h:1/x/y", Options{}, "invalid URL path"},
		{"redis://h:1", Options{Name: "a b"}, "want letters"},
		{"redis://h:1", Options{Timeout: -1}, "negative"},
		{"redis://h:1", Options{Peers: -1}, "negative"},
	} {
		s, err := Dial(c.url, &c.opts)
		if err == nil {
			s.Close()
			t.Errorf("%q %+v: no error", c.url, c.opts)
		} else if !strings.Contains(err.Error(), c.want) ||
			strings.Contains(err.Error(), "geheim") {
			t.Errorf("%q: %v", c.url, err)
		}
	}
}

func TestStoreThatIsAwayIsFoundLater(t *testing.T) {
	server := storetest.Redis(t)
	server.Kill()
	s, l := dial(t, server.URL(), nil)
	if err := s.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatal("Ping of a dead store:", err)
	}
	if st := s.Status(); st.Connected || st.Err == "" {
		t.Fatalf("%+v", st)
	}
	server.Start()
	storetest.Await(t, "the store is found", func() error { return s.Ping(t.Context()) })
	if st := s.Status(); !st.Connected || st.Err != "" {
		t.Fatalf("%+v", st)
	}
	if text := l.String(); !strings.Contains(text, "away") || !strings.Contains(text, "back") {
		t.Error(text)
	}
}

func TestWrongPasswordIsAClearErrorAndNowhereShown(t *testing.T) {
	server := storetest.Redis(t, "--requirepass", "right-one")
	addr := strings.TrimPrefix(server.URL(), "redis://")
	s, l := dial(t, "redis://:wrong-one@"+addr, nil)
	err := s.Ping(t.Context())
	if err == nil || !strings.Contains(err.Error(), "WRONGPASS") ||
		!strings.Contains(err.Error(), "check the user") {
		t.Fatal(err)
	}
	none, _ := dial(t, "redis://"+addr, nil)
	if err := none.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Fatal(err)
	}
	right, _ := dial(t, "redis://:right-one@"+addr, nil)
	if err := right.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{err.Error(), l.String(), s.Status().Err, s.Status().Addr} {
		if strings.Contains(text, "wrong-one") {
			t.Error("the password is shown:", text)
		}
	}
}

// The error of an unreachable store names the problem.
func TestErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	server := storetest.Redis(t)
	web := httptest.NewServer(nil)
	defer web.Close()
	hangsUp := proxytest.Upstream(t, func(c *net.TCPConn) { c.Read(make([]byte, 100)) })
	for url, want := range map[string]string{
		"rediss://" + server.Addr:                           "does the store speak TLS there?",
		"redis://" + strings.TrimPrefix(web.URL, "http://"): "no Redis or Valkey server",
		"redis://" + hangsUp:                                "use rediss://",
		"redis://" + proxytest.RefusingAddr(t): "refused: " +
			"start it, or correct the address in its URL",
		"unix:///no/such/socket": "start it, or correct",
	} {
		s, _ := dial(t, url, nil)
		if err := s.Ping(t.Context()); !errors.Is(err, ErrAway) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", url, err, want)
		}
	}
}

// One slow call means nothing; two in a row open the breaker, and a probe closes it.
func TestBreaker(t *testing.T) {
	t.Parallel()
	server := storetest.Redis(t)
	wire := storetest.NewWire(t, server.Addr)
	s, _ := dial(t, wire.URL(), nil)
	wire.Cut()
	began := time.Now()
	if err := s.Ping(t.Context()); err == nil { // waits for longer than an open does
		t.Fatal("a black hole answers")
	}
	if d := time.Since(began); d < 900*time.Millisecond {
		t.Fatal("Ping waited for", d)
	}
	if !s.Status().Connected {
		t.Fatal("one slow call opens the breaker")
	}
	wire.Heal()
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal("after one slow call:", err)
	}
	wire.Cut()
	m := s.Limit("k", Limit{Burst: 100, Every: time.Millisecond, Exact: true})
	for range 2 {
		began := time.Now()
		report(t, m, 1)
		if d := time.Since(began); d < 45*time.Millisecond || d > time.Second {
			t.Errorf("an open waited for %v, want 50ms", d)
		}
	}
	if s.Status().Connected {
		t.Fatal("two calls without an answer, and the breaker is closed")
	}
	calls := s.Status().Calls
	for range 100 {
		report(t, m, -1)
	}
	if s.Status().Calls != calls {
		t.Error("calls are made while the breaker is open")
	}
	wire.Heal()
	storetest.Await(t, "the breaker closes", func() error { return s.Ping(t.Context()) })
}

func TestCloseLeavesNothing(t *testing.T) {
	storetest.Each(t, func(t *testing.T, url string) {
		s, _ := dial(t, url, nil)
		m := s.Limit("k", Limit{Burst: 100, Every: time.Second, Open: 50, BytesPerSecond: 1000})
		report(t, m, 1)
		for range 2 {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Ping(context.Background()); err != ErrClosed {
			t.Error("Ping of a closed store:", err)
		}
		report(t, m, 1) // by its policy
	})
}
