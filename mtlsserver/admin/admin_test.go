package admin_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

// newApp returns an app that is closed when the test ends.
func newApp(t testing.TB, id string, opts *lbproxy.Options, addrs ...string) *lbproxy.LBProxyApp {
	t.Helper()
	if opts == nil {
		opts = &lbproxy.Options{}
	}
	opts.Logger = slog.New(slog.DiscardHandler)
	var upstreams []lbproxy.Upstream
	for _, addr := range addrs {
		upstreams = append(upstreams, lbproxy.Upstream{Addr: addr})
	}
	app, err := lbproxy.New(id, upstreams, opts)
	proxytest.Must(t, err)
	t.Cleanup(func() { app.Close() })
	return app
}

// serve makes app serve on a new listener and returns its address.
func serve(t testing.TB, app *lbproxy.LBProxyApp) string {
	t.Helper()
	l := proxytest.Listen(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = app.Serve(l, nil)
	}()
	t.Cleanup(func() {
		app.Close()
		<-done
	})
	return l.Addr().String()
}

func listOf(apps ...*lbproxy.LBProxyApp) func() []*lbproxy.LBProxyApp {
	return func() []*lbproxy.LBProxyApp { return apps }
}

// ask sends a request to h, by default as curl on the same machine would.
func ask(
	h http.Handler, method, target string, change ...func(*http.Request),
) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	r.Host = "127.0.0.1:9090"
	for _, f := range change {
		f(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func get(t testing.TB, h http.Handler, target string) string {
	t.Helper()
	w := ask(h, "GET", target)
	if w.Code != http.StatusOK {
		t.Fatalf("GET %s: %d %s", target, w.Code, w.Body)
	}
	return w.Body.String()
}

func stats(t testing.TB, h http.Handler) (s admin.Stats) {
	t.Helper()
	proxytest.Must(t, json.Unmarshal([]byte(get(t, h, "/api/stats")), &s))
	return s
}

const label = `[a-z]+="(?:[^"\\\n]|\\[\\"n])*"`

var sample = regexp.MustCompile(`^([a-z_]+(?:\{` + label + `(?:,` + label + `)*\})?) (\S+)$`)

// metrics parses the metrics, and fails if the text is not in Prometheus's format.
func metrics(t testing.TB, text string) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	family := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			family, _, _ = strings.Cut(name, " ")
		}
		if strings.HasPrefix(line, "# ") {
			continue
		}
		parts := sample.FindStringSubmatch(line)
		if parts == nil || !strings.HasPrefix(line, family) {
			t.Fatalf("not a sample of %s: %q", family, line)
		}
		if _, twice := all[parts[1]]; twice {
			t.Fatalf("twice: %q", line)
		}
		value, err := strconv.ParseFloat(parts[2], 64)
		proxytest.Must(t, err)
		all[parts[1]] = value
	}
	return all
}

// sumOf adds the samples whose names begin with prefix.
func sumOf(all map[string]float64, prefix string) (sum float64) {
	for name, value := range all {
		if strings.HasPrefix(name, prefix) {
			sum += value
		}
	}
	return sum
}

func promtool(t testing.TB, text string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("promtool is not installed: not checked by it")
		return
	}
	cmd := exec.Command(path, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// fallen fails if a counter of before is smaller in now, or gone.
func fallen(t testing.TB, before, now map[string]float64) {
	t.Helper()
	for name, value := range before {
		bare, _, _ := strings.Cut(name, "{")
		switch {
		case !strings.HasSuffix(bare, "_total") && !strings.HasSuffix(bare, "_count") &&
			!strings.HasSuffix(bare, "_bucket"):
		case now[name] < value:
			t.Errorf("%s fell from %v to %v", name, value, now[name])
		}
	}
}

// Connections come and go while upstreams are removed and added and the app is replaced. In the end
// the page, the metrics and the API agree with what the clients counted, and no counter fell.
func TestSumsStayTrue(t *testing.T) {
	t.Parallel()
	const total = 2000
	a, b := proxytest.Upstream(t, proxytest.Echo), proxytest.Upstream(t, proxytest.Echo)
	recorder := &admin.Recorder{}
	var current atomic.Pointer[lbproxy.LBProxyApp]
	var front atomic.Pointer[string]
	replace := func(addrs ...string) {
		app := newApp(t, "web", recorder.Record("web", nil), addrs...)
		recorder.Track(app)
		addr := serve(t, app)
		old := current.Swap(app)
		front.Store(&addr)
		if old != nil {
			go func() { _ = old.Shutdown(context.Background()) }()
		}
	}
	replace(a, b)
	h := admin.Handler(func() []*lbproxy.LBProxyApp { return []*lbproxy.LBProxyApp{current.Load()} },
		&admin.Options{Recorder: recorder})

	const size = 10
	var served, next atomic.Int64
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() {
			for next.Add(1) <= int64(total) {
				for { // the app that listened there may just have been replaced
					c, err := net.Dial("tcp", *front.Load())
					if err != nil {
						continue
					}
					_, err = io.WriteString(c, strings.Repeat("x", size))
					if err == nil {
						err = c.(*net.TCPConn).CloseWrite()
					}
					got, readErr := io.ReadAll(c)
					c.Close()
					if err == nil && readErr == nil && len(got) == size {
						served.Add(1)
						break
					}
				}
			}
		})
	}
	over := make(chan struct{})
	go func() {
		clients.Wait()
		close(over)
	}()
	before := map[string]float64{}
	for step, done := 0, false; !done; step++ {
		switch step % 8 {
		case 1:
			proxytest.Must(t, current.Load().SetUpstreams([]lbproxy.Upstream{{Addr: a}}))
		case 3:
			upstreams := []lbproxy.Upstream{{Addr: b, Weight: 2}, {Addr: a}}
			proxytest.Must(t, current.Load().SetUpstreams(upstreams))
		case 5:
			replace(b)
		case 7:
			replace(a, b)
		}
		select {
		case <-over:
			done = true
		default:
		}
		now := metrics(t, get(t, h, "/metrics"))
		fallen(t, before, now)
		before = now
	}
	var s admin.Stats
	proxytest.Eventually(t, "no connection is open", func() bool {
		s = stats(t, h)
		return s.Apps[0].Open == 0
	})
	now := metrics(t, get(t, h, "/metrics"))
	fallen(t, before, now)

	app := s.Apps[0]
	n := float64(served.Load())
	if len(s.Apps) != 1 || app.Ends[lbproxy.EndDone] != uint64(n) || n != float64(total) {
		t.Errorf("API: %d apps, %v, want %v done", len(s.Apps), app.Ends, n)
	}
	ends := uint64(0)
	for _, n := range app.Ends {
		ends += n
	}
	upstreams := app.Gone
	for _, u := range app.Upstreams {
		upstreams.Total += u.Total
		upstreams.Sent += u.Sent
		upstreams.Received += u.Received
	}
	// A client that was cut may have had bytes moved.
	if ends != app.Accepted || upstreams.Received != app.Received ||
		upstreams.Sent != app.Sent || app.Received < size*uint64(n) {
		t.Errorf("API: accepted %d, ends %d; received %d, by upstreams %d; sent %d, by upstreams %d",
			app.Accepted, ends, app.Received, upstreams.Received, app.Sent, upstreams.Sent)
	}
	for prefix, want := range map[string]float64{
		`lbproxy_connections_total{app="web",end="done"}`: n,
		`lbproxy_connections_total{`:                      float64(app.Accepted),
		`lbproxy_accepted_connections_total`:              float64(app.Accepted),
		`lbproxy_connection_duration_seconds_count`:       float64(app.Accepted),
		`lbproxy_dial_duration_seconds_count`:             float64(app.Accepted),
		`lbproxy_upstream_connections_total{`:             float64(upstreams.Total),
		`lbproxy_bytes_total{`:                            float64(app.Sent + app.Received),
		`lbproxy_upstream_bytes_total{`:                   float64(app.Sent + app.Received),
	} {
		if got := sumOf(now, prefix); got != want {
			t.Errorf("metrics: %s is %v, want %v", prefix, got, want)
		}
	}
	page := get(t, h, "/")
	for _, want := range []string{
		fmt.Sprintf(`<dt>Accepted</dt><dd><data value="%d">`, app.Accepted),
		fmt.Sprintf(`<dt>done</dt><dd><data value="%v">`, n),
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
}
