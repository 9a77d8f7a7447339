package admin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

const token = "0123456789abcdef"

func withToken(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }

func header(key, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(key, value) }
}

// changeable returns a handler that offers every change, and its log.
func changeable(apps ...*lbproxy.LBProxyApp) (http.Handler, *proxytest.Buffer) {
	log := &proxytest.Buffer{}
	return admin.Handler(listOf(apps...), &admin.Options{
		Hosts: []string{"lb.example"}, Token: token, Logger: slog.New(slog.NewTextHandler(log, nil)),
		Drain: func(app, upstream string, drain bool) error {
			if app != "web" {
				return admin.ErrNotFound
			}
			return nil
		},
		Reload: func() (any, error) {
			return nil, errors.New("config.json:3: apps: none\nconfig.json:4: users: none")
		},
	}), log
}

// The status of a failed reload does not depend on what its error wraps.
func TestReloadThatDoesNotFindSomething(t *testing.T) {
	h := admin.Handler(listOf(), &admin.Options{Token: token,
		Reload: func() (any, error) { return nil, fmt.Errorf("CA: %w", admin.ErrNotFound) }})
	for range 20 {
		request := httptest.NewRequest("POST", "http://localhost/api/reload", nil)
		withToken(request)
		answer := httptest.NewRecorder()
		h.ServeHTTP(answer, request)
		if answer.Code != http.StatusUnprocessableEntity {
			t.Fatalf("%d %s, want 422", answer.Code, answer.Body)
		}
	}
}

// awaitLine waits for a line of log that has all the texts.
func awaitLine(t *testing.T, log *proxytest.Buffer, texts ...string) {
	t.Helper()
	proxytest.Eventually(t, fmt.Sprintf("a line with %q", texts), func() bool {
		for line := range strings.Lines(log.String()) {
			missing := false
			for _, text := range texts {
				missing = missing || !strings.Contains(line, text)
			}
			if !missing {
				return true
			}
		}
		return false
	})
}

// A web site can resolve its own name to 127.0.0.1 (DNS rebinding), but cannot make a browser send
// another name.
func TestForeignHostIsRefused(t *testing.T) {
	h, _ := changeable(newApp(t, "web", nil, "127.0.0.1:1"))
	for host, want := range map[string]int{
		"127.0.0.1": 200, "127.0.0.1:9090": 200, "[::1]:9090": 200, "[::1]": 200, "10.1.2.3:80": 200,
		"localhost": 200, "LocalHost:9090": 200, "lb.example": 200, "LB.example:9090": 200,
		"": 421, "evil.example": 421, "evil.example:9090": 421, "localhost.evil.example": 421,
		"127.0.0.1.evil.example": 421, "evil-localhost": 421, "localhost:9090:1": 421,
	} {
		for _, path := range []string{"/", "/metrics", "/healthz", "/api/stats", "/static/style.css"} {
			if got := ask(h, "GET", path, func(r *http.Request) { r.Host = host }).Code; got != want {
				t.Errorf("GET %s by %q: %d, want %d", path, host, got, want)
			}
		}
	}
}

func TestChangesNeedPermissionAndTheSameOrigin(t *testing.T) {
	h, log := changeable(newApp(t, "web", nil, "127.0.0.1:1"))
	const drain = "/api/drain?app=web&upstream=127.0.0.1:1"
	for _, row := range []struct {
		name, method, target string
		change               []func(*http.Request)
		want                 int
	}{
		{"with the token", "POST", drain, []func(*http.Request){withToken}, 200},
		{"with the token, of the same origin", "POST", drain,
			[]func(*http.Request){withToken, header("Origin", "http://127.0.0.1:9090")}, 200},
		{"without a token", "POST", drain, nil, 403},
		{"with an empty token", "POST", drain,
			[]func(*http.Request){header("Authorization", "Bearer ")}, 403},
		{"with a wrong token", "POST", drain,
			[]func(*http.Request){header("Authorization", "Bearer 0123456789abcdeF")}, 403},
		{"with part of the token", "POST", drain,
			[]func(*http.Request){header("Authorization", "Bearer 0123456789abcde")}, 403},
		{"with the token as a password", "POST", drain,
			[]func(*http.Request){func(r *http.Request) { r.SetBasicAuth("", token) }}, 403},
		{"of another origin", "POST", drain,
			[]func(*http.Request){withToken, header("Origin", "http://evil.example")}, 403},
		{"of another site", "POST", drain,
			[]func(*http.Request){withToken, header("Sec-Fetch-Site", "cross-site")}, 403},
		{"by GET", "GET", drain, []func(*http.Request){withToken}, 405},
		{"without an upstream", "POST", "/api/drain?app=web", []func(*http.Request){withToken}, 400},
		{"of another app", "POST", "/api/undrain?app=db&upstream=x:1",
			[]func(*http.Request){withToken}, 404},
		{"a bad query", "POST", "/api/drain?app=%zz", []func(*http.Request){withToken}, 400},
		{"all connections", "POST", "/api/end?app=web", []func(*http.Request){withToken}, 400},
		{"a bad configuration", "POST", "/api/reload", []func(*http.Request){withToken}, 422},
		{"what is not there", "POST", "/api/stop", []func(*http.Request){withToken}, 404},
	} {
		if w := ask(h, row.method, row.target, row.change...); w.Code != row.want {
			t.Errorf("%s: %d %s, want %d", row.name, w.Code, w.Body, row.want)
		}
	}
	awaitLine(t, log, "change=drain", "by=192.0.2.1:1234", "app=web", "upstream=127.0.0.1:1",
		"level=INFO")
	awaitLine(t, log, "change=drain", "by=192.0.2.1:1234", "not allowed", "level=WARN")
	awaitLine(t, log, "change=reload", `config.json:3: apps: none\\nconfig.json:4: users: none`)

	// Without Options.Token every token is wrong. Without Options.Drain and Reload the handler does
	// not offer them.
	bare := admin.Handler(listOf(), &admin.Options{Logger: slog.New(slog.DiscardHandler)})
	if w := ask(bare, "POST", drain, header("Authorization", "Bearer ")); w.Code != 403 {
		t.Errorf("no token in the options: %d, want 403", w.Code)
	}
	quiet := slog.New(slog.DiscardHandler)
	only := admin.Handler(listOf(), &admin.Options{Token: token, Logger: quiet})
	for _, target := range []string{drain, "/api/reload"} {
		if w := ask(only, "POST", target, withToken); w.Code != 501 {
			t.Errorf("POST %s: %d %s, want 501", target, w.Code, w.Body)
		}
	}
}

// An argument that was ignored would show, or end, more connections than were meant.
func TestWrongArgumentsAreRefused(t *testing.T) {
	h, _ := changeable(newApp(t, "web", nil, "127.0.0.1:1"))
	for target, want := range map[string]string{
		"GET /api/stats?breif=1": `unknown argument "breif": want brief`,
		"GET /api/conns?usr=bob": `unknown argument "usr": ` +
			`want app, user, upstream, client, offset or limit`,
		"GET /api/conns?user=%zz":       `invalid URL escape "%zz"`,
		"GET /api/conns?user=":          `user is empty: give a value, or leave it out`,
		"GET /api/conns?offset=x":       `offset "x": want 0 to 2147483647`,
		"GET /api/conns?offset=-1":      `offset "-1": want 0 to 2147483647`,
		"GET /api/conns?limit=0":        `limit "0": want 1 to 1000`,
		"GET /api/conns?limit=1001":     `limit "1001": want 1 to 1000`,
		"POST /api/end?user=a&ap=b":     `unknown argument "ap": want app, user, upstream or client`,
		"POST /api/end?user=a&app=":     `app is empty: give a value, or leave it out`,
		"POST /api/end?user=a&user=b":   `user is given 2 times: give it once`,
		"POST /api/drain?upstream=a":    `app is missing`,
		"POST /api/drain?addr=a":        `unknown argument "addr": want app or upstream`,
		"POST /api/undrain?app=a&on=no": `unknown argument "on": want app or upstream`,
		"POST /api/reload?app=a":        `unknown argument "app": want none`,
	} {
		method, path, _ := strings.Cut(target, " ")
		w := ask(h, method, path, withToken)
		var answer struct{ Error string }
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || w.Code != 400 ||
			answer.Error != "bad request: "+want {
			t.Errorf("%s: %d %s, %v, want 400 %s", target, w.Code, w.Body, err, want)
		}
	}
	r := httptest.NewRequest("POST", "http://localhost/api/end?user=a", strings.NewReader("{}"))
	r.Header.Set("Content-Type", "application/json")
	withToken(r)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "application/json") {
		t.Errorf("a body that is not a form: %d %s", w.Code, w.Body)
	}
	w = ask(h, "POST", "/api/drain?app=db&upstream=a:1", withToken)
	const unknown = "there is no such app or upstream: /api/stats lists them"
	if w.Code != 404 || !strings.Contains(w.Body.String(), unknown) {
		t.Errorf("an unknown app: %d %s, want 404 %s", w.Code, w.Body, unknown)
	}
	// People may type anything into the address of a page.
	get(t, h, "/conns?usr=bob&app=&offset=x&limit=0")
}

func TestConnsAreSelectedPagedAndEnded(t *testing.T) {
	addr, other := proxytest.Upstream(t, proxytest.Echo), proxytest.Upstream(t, proxytest.Echo)
	web := newApp(t, "web", nil, addr)
	db := newApp(t, "db", nil, other)
	h, log := changeable(web, db)
	results := make(chan lbproxy.Result, 10)
	var clients []net.Conn
	for i := range 10 {
		app, user := web, fmt.Sprint("user", i%2)
		if i >= 8 {
			app = db
		}
		client, accepted := proxytest.Duplex(t)
		clients = append(clients, client)
		go app.ServeConn(context.Background(), &lbproxy.Conn{
			Client: accepted, ClientID: user, OnDone: func(r lbproxy.Result) { results <- r },
		})
		proxytest.Must(t, proxytest.Ping(client))
	}
	conns := func(query string) (c admin.Conns) {
		t.Helper()
		proxytest.Must(t, json.Unmarshal([]byte(get(t, h, "/api/conns"+query)), &c))
		return c
	}
	for query, want := range map[string]int{
		"": 10, "?app=web": 8, "?app=nobody": 0, "?user=user1": 5, "?user=user1&app=db": 1,
		"?upstream=" + addr: 8, "?client=" + clients[3].LocalAddr().String(): 1,
		"?limit=1000": 10, "?offset=9": 1, "?offset=10": 0, "?offset=2147483647": 0,
	} {
		if got := conns(query); len(got.Conns) != want || got.Next != 0 {
			t.Errorf("%q: %d, next %d, want %d", query, len(got.Conns), got.Next, want)
		}
	}
	seen := map[string]bool{}
	for next, pages := 0, 0; pages == 0 || next > 0; pages++ {
		page := conns(fmt.Sprintf("?limit=3&offset=%d", next))
		for _, c := range page.Conns {
			seen[c.Client] = true
		}
		next = page.Next
		if pages > 4 {
			t.Fatal("the pages do not end")
		}
	}
	if len(seen) != 10 {
		t.Errorf("all pages have %d clients, want 10", len(seen))
	}
	var one admin.Conn
	proxytest.Eventually(t, "the answer is counted", func() bool { // the client may have it before
		one = conns("?app=db&user=user0").Conns[0]
		return one.Received > 0
	})
	if one.App != "db" || one.User != "user0" || one.Upstream != other ||
		one.State != lbproxy.ConnOpen ||
		one.Client != clients[8].LocalAddr().String() || time.Since(one.Since) > time.Hour ||
		one.Sent == 0 {
		t.Errorf("%+v", one)
	}
	page := get(t, h, "/conns?user=user0&app=db")
	if !strings.Contains(page, one.Client) || strings.Contains(page, clients[0].LocalAddr().String()) {
		t.Errorf("the page of connections is wrong: %s", page)
	}

	w := ask(h, "POST", "/api/end?user=user1&upstream="+addr, withToken)
	if got := strings.TrimSpace(w.Body.String()); got != `{"ended":4}` {
		t.Errorf("end: %d %s", w.Code, got)
	}
	for range 4 {
		r := proxytest.Receive(t, "the end of a connection", results)
		if r.End != lbproxy.EndCanceled || !errors.Is(r.Err, admin.ErrEnded) || r.ClientID != "user1" {
			t.Errorf("ended: %v", r)
		}
	}
	awaitLine(t, log, "change=end", "user=user1", "upstream="+addr)
	if w := ask(h, "POST", "/api/end?user=user0&ap=db", withToken); w.Code != 400 {
		t.Errorf("end with a misspelled argument: %d %s", w.Code, w.Body)
	}
	if got := conns(""); len(got.Conns) != 6 {
		t.Errorf("%d connections are left, want 6", len(got.Conns))
	}
	for _, c := range clients {
		c.Close()
	}
}

// A panicking hook ends only its own request, and is logged.
func TestPanicOfAHookIsLogged(t *testing.T) {
	log := &proxytest.Buffer{}
	h := admin.Handler(listOf(), &admin.Options{
		Info: func() admin.Info { panic("no\nway") }, Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	s := start(t, admin.Listen{Addr: "127.0.0.1:0"}, h)
	for _, path := range []string{"/metrics", "/readyz"} {
		if answer, err := http.Get("http://" + s.Addr().String() + path); err == nil {
			answer.Body.Close()
			t.Errorf("%s was answered", path)
		}
	}
	answer, err := http.Get("http://" + s.Addr().String() + "/healthz")
	proxytest.Must(t, err)
	answer.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	awaitLine(t, log, "level=ERROR", "admin: panic", `panic="no\nway"`, "goroutine")
}

func TestReadyzSaysWhyNot(t *testing.T) {
	up := newApp(t, "web", nil, "127.0.0.1:1")
	down := newApp(t, "db", nil, "127.0.0.1:2")
	proxytest.Must(t, down.SetUpstreams([]lbproxy.Upstream{{Addr: "127.0.0.1:2", Drain: true}}))
	both := newApp(t, "both", &lbproxy.Options{
		HealthCheck: &lbproxy.HealthCheck{Interval: time.Millisecond, Fall: 1},
	}, proxytest.RefusingAddr(t))
	refusing := both.Stats().Upstreams[0].Addr
	proxytest.Must(t, both.SetUpstreams([]lbproxy.Upstream{
		{Addr: refusing}, {Addr: proxytest.Upstream(t, proxytest.Echo), Drain: true},
	}))
	proxytest.Eventually(t, "an upstream is down", func() bool {
		return both.Stats().Upstreams[0].State == lbproxy.StateDown
	})
	stopped, replaced := newApp(t, "mail", nil, "127.0.0.1:1"), newApp(t, "web", nil, "127.0.0.1:1")
	proxytest.Must(t, stopped.Shutdown(t.Context()))
	replaced.Close()
	recorder := &admin.Recorder{}
	recorder.Track(replaced)
	draining := func() admin.Info { return admin.Info{NotReady: "draining"} }
	for _, row := range []struct {
		apps []*lbproxy.LBProxyApp
		info func() admin.Info
		code int
		want string
	}{
		{[]*lbproxy.LBProxyApp{up}, nil, 200, "ready\n"},
		{[]*lbproxy.LBProxyApp{up, down}, nil, 503,
			"app db: no upstream takes connections: 1 draining\n"},
		{[]*lbproxy.LBProxyApp{both}, nil, 503,
			"app both: no upstream takes connections: 1 down, 1 draining\n"},
		{nil, nil, 503, "there are no apps\n"},
		{[]*lbproxy.LBProxyApp{up}, draining, 503, "draining\n"},
		{[]*lbproxy.LBProxyApp{up, stopped}, nil, 503, "app mail: draining\n"},
		{[]*lbproxy.LBProxyApp{stopped, down}, nil, 503,
			"app mail: draining\napp db: no upstream takes connections: 1 draining\n"},
		{[]*lbproxy.LBProxyApp{up, stopped}, draining, 503, "draining\n"},
	} {
		h := admin.Handler(listOf(row.apps...), &admin.Options{Info: row.info, Recorder: recorder})
		if w := ask(h, "GET", "/readyz"); w.Code != row.code || w.Body.String() != row.want {
			t.Errorf("%d %q, want %d %q", w.Code, w.Body, row.code, row.want)
		}
		if w := ask(h, "GET", "/healthz"); w.Code != 200 {
			t.Errorf("healthz: %d", w.Code)
		}
	}
}

// The page has nothing that its Content-Security-Policy forbids.
func TestPageKeepsItsPolicy(t *testing.T) {
	h := admin.Handler(listOf(newApp(t, "web", nil, "127.0.0.1:1")), nil)
	for _, path := range []string{"/", "/conns", "/static/style.css", "/static/script.js"} {
		w := ask(h, "GET", path)
		csp := w.Header().Get("Content-Security-Policy")
		if w.Code != 200 || !strings.HasPrefix(csp, "default-src 'none';") ||
			strings.Contains(csp, "unsafe") {
			t.Errorf("%s: %d, policy %q", path, w.Code, csp)
		}
		for _, bad := range []string{
			"style=", "<style", "onclick", "onload", "javascript:", "http://", "https://",
			"innerHTML", "eval("} {
			body := strings.ReplaceAll(w.Body.String(), "http://www.w3.org/2000/svg", "")
			if strings.Contains(body, bad) {
				t.Errorf("%s has %q", path, bad)
			}
		}
		if n := strings.Count(w.Body.String(), "<script"); strings.HasSuffix(path, "s") && n > 1 {
			t.Errorf("%s has %d scripts", path, n)
		}
	}
}

// fullInfo has a bit of everything, all named name.
func fullInfo(name string) func() admin.Info {
	return func() admin.Info {
		return admin.Info{
			Refused: map[string]uint64{name: 3, "unknown-ca": 5},
			Users:   []admin.User{{Name: name, App: name, Open: 2}, {Name: "bob", App: "web", Open: 1}},
			Certificates: []admin.Certificate{{
				Key: name, File: name, Subject: name,
				NotAfter: time.Now().Add(29*24*time.Hour + time.Minute),
			}},
		}
	}
}

func TestMetricsAreAsPrometheusWantsThem(t *testing.T) {
	recorder := &admin.Recorder{}
	app := newApp(t, "web", recorder.Record("web", nil),
		proxytest.Upstream(t, proxytest.Echo), proxytest.RefusingAddr(t))
	addr := serve(t, app)
	for range 2 { // one is over when the other has begun
		c := proxytest.Dial(t, addr)
		proxytest.Must(t, proxytest.Ping(c))
		if app.Stats().Accepted == 1 {
			c.Close()
			proxytest.Eventually(t, "the first is over", func() bool { return app.Stats().Open == 0 })
		}
	}
	h := admin.Handler(listOf(app), &admin.Options{
		Recorder: recorder, Info: fullInfo("alice \"the\\ admin\"\n"),
	})
	text := get(t, h, "/metrics")
	promtool(t, text)
	all := metrics(t, text)
	for name, want := range map[string]float64{
		`lbproxy_open_connections{app="web"}`:                                   1,
		`lbproxy_accepted_connections_total{app="web"}`:                         2,
		`lbproxy_connections_total{app="web",end="idle-timeout"}`:               0,
		`lbproxy_dial_duration_seconds_bucket{app="web",le="+Inf"}`:             1,
		`lbproxy_refused_total{app="web",reason="rate-limited"}`:                0,
		`mtlsserver_refused_total{reason="unknown-ca"}`:                         5,
		`mtlsserver_user_connections{user="bob",app="web"}`:                     1,
		`mtlsserver_refused_total{reason="\"alice \\\"the\\\\ admin\\\"\\n\""}`: 3,
	} {
		if got, ok := all[name]; !ok || got != want {
			t.Errorf("%s is %v, %t, want %v", name, got, ok, want)
		}
	}
	nothing := func() admin.Info { return admin.Info{} }
	promtool(t, get(t, admin.Handler(listOf(), &admin.Options{Info: nothing}), "/metrics"))
}

// A scrape that differs from the last one only in its order would look new to every diff and cache.
func TestMetricsKeepTheirOrder(t *testing.T) {
	recorder := &admin.Recorder{}
	for _, id := range []string{"e", "d", "c", "b", "a"} {
		recorder.Track(newApp(t, id, nil, "127.0.0.1:1")) // and removed
	}
	info := fullInfo("alice")() // once: its certificate expires at a time from now
	h := admin.Handler(listOf(newApp(t, "web", nil, "127.0.0.1:1")), &admin.Options{
		Recorder: recorder, Info: func() admin.Info { return info },
	})
	first := get(t, h, "/metrics")
	for range 5 {
		if next := get(t, h, "/metrics"); next != first {
			t.Fatalf("the order has changed from\n%s\nto\n%s", first, next)
		}
	}
}

// The labels of users are bounded for any number of users, and their sum is right.
func TestUsersInMetricsAreBounded(t *testing.T) {
	var users []admin.User
	for i := range 5000 {
		users = append(users, admin.User{Name: fmt.Sprint("user", i), App: "web", Open: 2})
	}
	info := func() admin.Info { return admin.Info{Users: users} }
	h := admin.Handler(listOf(), &admin.Options{Info: info})
	all := metrics(t, get(t, h, "/metrics"))
	n := 0
	for name := range all {
		if strings.HasPrefix(name, "mtlsserver_user_connections{") {
			n++
		}
	}
	if sum := sumOf(all, "mtlsserver_user_connections{"); n != 1001 || sum != 10000 {
		t.Errorf("%d series with a sum of %v, want 1001 and 10000", n, sum)
	}
	if page := get(t, h, "/"); strings.Count(page, "<tr>") != 101 ||
		!strings.Contains(page, "from=100") {
		t.Errorf("the page has %d rows, want 100 and a link to more", strings.Count(page, "<tr>")-1)
	}
	if page := get(t, h, "/?from=4950"); strings.Count(page, "<tr>") != 51 ||
		strings.Contains(page, "Further") {
		t.Errorf("the last page has %d rows, want 50 and no link to more",
			strings.Count(page, "<tr>")-1)
	}
}

// The page stays valid HTML and the metrics stay valid with any names and any text of peers.
func FuzzNames(f *testing.F) {
	for _, name := range []string{
		"web", "é", `"><script>alert(1)</script>`, "</title>", "&amp;", "javascript:alert(1)",
		"a\nb", "a\\", `\"`, "'", "\xff\xfe", "\u202eevil", "{{.}}", "a\x00b",
		"a,b=\"c\"} 1\nlbproxy_up 1", strings.Repeat("x", 5000),
	} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if name == "" {
			return
		}
		app := newApp(t, name, &lbproxy.Options{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				return nil, errors.New(name)
			},
		}, "127.0.0.1:1", "127.0.0.1:2")
		// The name becomes an upstream's if it can.
		_ = app.SetUpstreams([]lbproxy.Upstream{{Addr: name + ":80"}, {Addr: "127.0.0.1:1"}})
		_, accepted := net.Pipe()
		_, _ = app.ServeConn(context.Background(), &lbproxy.Conn{Client: accepted, ClientID: name})
		waiting := newApp(t, "waiting", &lbproxy.Options{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
		}, "127.0.0.1:1")
		client, accepted := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = waiting.ServeConn(context.Background(), &lbproxy.Conn{
				Client: accepted, ClientID: name, ClientAddr: named(name),
			})
		}()
		defer func() {
			client.Close()
			<-done
		}()
		h := admin.Handler(listOf(app, waiting), &admin.Options{Info: fullInfo(name)})
		metrics(t, get(t, h, "/metrics"))
		stats(t, h)
		proxytest.Eventually(t, "the connection is listed", func() bool {
			return strings.Contains(get(t, h, "/api/conns"), `"app":"waiting"`)
		})
		for _, path := range []string{"/", "/conns"} {
			page := get(t, h, path)
			for _, r := range page {
				if r != '\n' && !unicode.IsPrint(r) {
					t.Fatalf("%s has %q", path, r)
				}
			}
			if strings.Count(page, "<script") != 1 || strings.Count(page, "<title>") != 1 {
				t.Errorf("%s has a script or a title of the name's", path)
			}
		}
	})
}

type named string

func (n named) Network() string { return "tcp" }
func (n named) String() string  { return string(n) }

// An endless body counts the bytes that are read from it.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	e.read += len(p)
	return copy(p, bytes.Repeat([]byte("x"), len(p))), nil
}

// The handler does not read a gigabyte, with or without a Content-Length.
func TestHugeBodyIsNotRead(t *testing.T) {
	t.Parallel()
	h, _ := changeable()
	for length, most := range map[int64]int{1 << 30: 0, -1: 128 << 10} {
		body := &endless{}
		form := header("Content-Type", "application/x-www-form-urlencoded")
		w := ask(h, "POST", "/api/end", withToken, form, func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(body), length
		})
		if body.read > most || w.Code/100 != 4 {
			t.Errorf("length %d: %d bytes were read, want at most %d; %d %s",
				length, body.read, most, w.Code, w.Body)
		}
	}
	s := start(t, admin.Listen{Addr: "127.0.0.1:0"}, h)
	for _, head := range []string{"Content-Length: 1073741824", "Transfer-Encoding: chunked"} {
		c := proxytest.Dial(t, s.Addr().String())
		_, err := fmt.Fprintf(c, "POST /api/end HTTP/1.1\r\nHost: localhost\r\n"+
			"Content-Type: application/x-www-form-urlencoded\r\n"+
			"Authorization: Bearer %s\r\n%s\r\n\r\n", token, head)
		proxytest.Must(t, err)
		answered := make(chan string, 1)
		go func() {
			answer, _ := io.ReadAll(c)
			answered <- string(answer)
		}()
		chunk := append([]byte("10000\r\n"), append(bytes.Repeat([]byte("x"), 65536), "\r\n"...)...)
		sent := 0
		for err == nil && sent < 1<<30 {
			_, err = c.Write(chunk)
			sent += len(chunk)
		}
		answer := proxytest.Receive(t, "the answer", answered)
		if sent > 64<<20 || answer != "" && !strings.HasPrefix(answer, "HTTP/1.1 4") {
			t.Errorf("%s: %d bytes were taken, answer %.100q", head, sent, answer)
		}
	}
}

// docs/metrics.md has a row for each metric, with its type, its labels and its help.
func TestMetricsAreListed(t *testing.T) {
	recorder := &admin.Recorder{}
	app := newApp(t, "web", recorder.Record("web", nil), "127.0.0.1:1")
	h := admin.Handler(listOf(app), &admin.Options{Recorder: recorder, Info: fullInfo("alice")})
	type family struct{ kind, help string }
	families, labels := map[string]family{}, map[string]string{}
	help, name := "", ""
	for line := range strings.Lines(get(t, h, "/metrics")) {
		if text, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, help, _ = strings.Cut(strings.TrimSpace(text), " ")
		} else if text, ok := strings.CutPrefix(line, "# TYPE "+name+" "); ok {
			families[name] = family{strings.TrimSpace(text), help}
		} else if labels[name] == "" {
			var each []string
			for _, parts := range regexp.MustCompile(`([a-z]+)="`).FindAllStringSubmatch(line, -1) {
				if parts[1] != "le" { // all histograms have it
					each = append(each, "`"+parts[1]+"`")
				}
			}
			labels[name] = strings.Join(each, ", ")
		}
	}
	var want []string
	for name, f := range families {
		want = append(want, fmt.Sprintf("| `%s` | %s | %s | %s |", name, f.kind, labels[name], f.help))
	}
	slices.Sort(want)
	page, err := os.ReadFile("../../docs/metrics.md")
	proxytest.Must(t, err)
	got := regexp.MustCompile("(?m)^\\| `[a-z_]+` \\| (gauge|counter|histogram) \\|.*").
		FindAllString(string(page), -1)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("docs/metrics.md has the rows\n%s\nwant\n%s",
			strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
