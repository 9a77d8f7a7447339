package mtlsserver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// withAdmin adds an admin with everything to a lab's configuration.
func withAdmin(t testing.TB) func(*lab) {
	dir, err := os.MkdirTemp("", "admin") // a socket's path must be short
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.WriteFile(filepath.Join(dir, "token"), []byte("0123456789abcdef\n"), 0o600))
	return func(l *lab) {
		l.config.Admin = &Admin{
			Listen: "127.0.0.1:0", Socket: filepath.Join(dir, "sock"),
			Token: filepath.Join(dir, "token"), Hosts: []string{"lb.example"},
		}
	}
}

// ask sends a request to the admin's socket.
func (l *lab) ask(t testing.TB, method, path string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", l.config.Admin.Socket)
		},
	}}
	return answered(t, client, method, "http://socket"+path)
}

func answered(t testing.TB, client *http.Client, method, url string) (int, string) {
	t.Helper()
	r, err := http.NewRequest(method, url, nil)
	must(t, err)
	answer, err := client.Do(r)
	must(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(t, err)
	return answer.StatusCode, string(body)
}

func (l *lab) stats(t testing.TB) (s admin.Stats) {
	t.Helper()
	_, body := l.ask(t, "GET", "/api/stats")
	must(t, json.Unmarshal([]byte(body), &s))
	return s
}

// awaitStats returns the stats as soon as they are as ok wants them.
func (l *lab) awaitStats(t testing.TB, what string, ok func(admin.Stats) bool) admin.Stats {
	t.Helper()
	for late := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		s := l.stats(t)
		if ok(s) {
			return s
		}
		if time.Now().After(late) {
			t.Fatalf("still not %s: %+v", what, s)
		}
	}
}

// By the clients' own counts, over reloads that replace the app and remove an upstream.
func TestAdminsNumbersAreTrue(t *testing.T) {
	t.Parallel()
	l := newLab(t, withAdmin(t))
	kept := l.in(t, "web", &l.alice)
	const rounds, each = 4, 10
	use := func() {
		t.Helper()
		c := l.in(t, "web", &l.alice)
		must(t, c.CloseWrite())
		if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
	}
	last := map[string]uint64{}
	for round := range rounds {
		for range each {
			use()
			must(t, ended(l.dial(t, "web", nil))) // no certificate
		}
		s := l.stats(t)
		now := map[string]uint64{
			"accepted": s.Apps[0].Accepted, "sent": s.Apps[0].Sent,
			"refused": s.Refused[string(NoCertificate)],
		}
		for what, n := range last {
			if now[what] < n {
				t.Errorf("%s fell from %d to %d", what, n, now[what])
			}
		}
		last = now
		// This app comes and goes between two looks.
		l.reload(t, l.with(func(c *Config) {
			c.Apps[0].IdleTimeout = time.Duration(round+1) * time.Hour
		}))
		use()
		l.reload(t, l.with(func(c *Config) {
			c.Apps[0].IdleTimeout = time.Duration(round+1) * time.Minute // another app takes over
			if round%2 == 0 {
				c.Apps[0].Upstreams = []Upstream{{Addr: l.web.Addr().String(), Weight: 2}}
			} else {
				c.Apps[0].Upstreams = []Upstream{{Addr: newUpstream(t, "web", nil).Addr().String()}}
			}
		}))
	}
	const done, refused = rounds * (each + 1), rounds * each
	s := l.awaitStats(t, "all over but one", func(s admin.Stats) bool { return s.Apps[0].Open == 1 })
	web := s.Apps[0]
	if web.ID != "web" || web.Accepted != done+refused+1 || web.Ends[lbproxy.EndDone] != done ||
		web.NotAdmitted != refused || s.Refused[string(NoCertificate)] != refused ||
		web.Sent != 5*(done+1) {
		t.Errorf("%+v, refused %v; want %d done, %d refused and 1 open", web, s.Refused, done, refused)
	}
	total := web.Gone.Total
	for _, u := range web.Upstreams {
		total += u.Total
	}
	if total != done+1 {
		t.Errorf("upstreams had %d connections, want %d", total, done+1)
	}
	if len(s.Users) != 1 || s.Users[0] != (admin.User{Name: "alice", App: "web", Open: 1}) {
		t.Errorf("users: %v, want alice with one", s.Users)
	}
	if len(s.Certificates) != 2 || s.Certificates[0].Key != "tls.cert" ||
		s.Certificates[0].Days() != 59 {
		t.Errorf("certificates: %+v", s.Certificates)
	}
	_, metrics := l.ask(t, "GET", "/metrics")
	for _, want := range []string{
		fmt.Sprintf(`lbproxy_connections_total{app="web",end="done"} %d`, done),
		fmt.Sprintf(`lbproxy_connection_duration_seconds_count{app="web"} %d`, done+refused),
		fmt.Sprintf(`lbproxy_dial_duration_seconds_count{app="web"} %d`, done),
		fmt.Sprintf(`mtlsserver_refused_total{reason="no-certificate"} %d`, refused),
		`mtlsserver_user_connections{user="alice",app="web"} 1`,
		`mtlsserver_certificate_expiry_timestamp_seconds{file="` + l.config.TLS.Cert + `"} `,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	_, page := l.ask(t, "GET", "/")
	for _, want := range []string{
		fmt.Sprintf(`<dt>Accepted</dt><dd><data value="%d">`, done+refused+1),
		fmt.Sprintf(`<dt>no-certificate</dt><dd><data value="%d">`, refused),
		`<a href="conns?user=alice&amp;app=web">alice</a>`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	// The connection that the first app has, which was replaced, can be seen and ended.
	client := fmt.Sprintf(`"client":"%v"`, kept.LocalAddr())
	if _, conns := l.ask(t, "GET", "/api/conns?user=alice"); !strings.Contains(conns, client) {
		t.Errorf("conns: %s, want %s", conns, client)
	}
	code, body := l.ask(t, "POST", "/api/end?user=alice")
	if code != 200 || strings.TrimSpace(body) != `{"ended":1}` {
		t.Errorf("end: %d %s", code, body)
	}
	must(t, ended(kept))
	l.awaitStats(t, "nobody there", func(s admin.Stats) bool {
		return len(s.Users) == 0 && s.Apps[0].Open == 0
	})
}

// A reload that is asked for between New and Run is done when the server runs.
func TestReloadByAdminWaitsForRun(t *testing.T) {
	l := newLab(t, withAdmin(t))
	config := *l.config
	config.Admin = &Admin{Socket: l.config.Admin.Socket + "2"}
	s, err := New(&config, &Options{
		Logger: l.server.log, Reload: func() (Changes, error) { return Changes{Ended: 7}, nil },
	})
	must(t, err)
	c, err := net.Dial("unix", config.Admin.Socket)
	must(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "POST /api/reload HTTP/1.0\r\n\r\n")
	must(t, err)
	early := &lab{config: &config}
	if code, _ := early.ask(t, "GET", "/healthz"); code != 200 { // which came after it
		t.Errorf("healthz before Run: %d", code)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	answer, err := io.ReadAll(c)
	must(t, err)
	text := string(answer)
	if !strings.Contains(text, " 200 OK") || !strings.Contains(text, `"ended":7`) {
		t.Errorf("the answer is %q", text)
	}
	stop()
	must(t, <-ran)
}

func TestAdminIsThereBeforeTheAppsAndAfterThem(t *testing.T) {
	l := newLab(t, withAdmin(t))
	config := *l.config
	config.Admin = &Admin{Socket: l.config.Admin.Socket + "2"}
	s, err := New(&config, &Options{Logger: l.server.log})
	must(t, err)
	early := &lab{config: &config}
	if code, body := early.ask(t, "GET", "/readyz"); code != 503 || body != "not running yet\n" {
		t.Errorf("before Run: %d %q", code, body)
	}
	if code, _ := early.ask(t, "GET", "/healthz"); code != 200 {
		t.Errorf("healthz before Run: %d", code)
	}
	s.Close()
	if _, err := os.Stat(config.Admin.Socket); err == nil {
		t.Error("the socket is there after Close")
	}

	if code, body := l.ask(t, "GET", "/readyz"); code != 200 {
		t.Errorf("while it runs: %d %q", code, body)
	}
	c := l.in(t, "web", &l.alice)
	l.stop()
	for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		code, body := l.ask(t, "GET", "/readyz")
		if code == 503 && body == "draining\n" {
			break
		}
		if time.Now().After(late) {
			t.Fatalf("during the drain: %d %q", code, body)
		}
	}
	if s := l.stats(t); s.Apps[0].Open != 1 {
		t.Errorf("during the drain %d are open, want 1", s.Apps[0].Open)
	}
	c.Close()
	if err := <-l.ran; err != nil {
		t.Error(err)
	}
	l.ran <- nil // for the cleanup
	if _, err := os.Stat(l.config.Admin.Socket); err == nil {
		t.Error("the socket is there after Run")
	}
}

// A copy of a Config shares its lists, so a caller easily changes the Config in force as well.
func TestReloadOfAConfigThatWasChangedInPlace(t *testing.T) {
	l := newLab(t, func(l *lab) {
		l.config.Apps[0].Upstreams = append(l.config.Apps[0].Upstreams,
			Upstream{Addr: l.db.Addr().String()})
	})
	drained := func() (all []bool) {
		for _, u := range l.server.Apps()["web"].Stats().Upstreams {
			if !u.Removed {
				all = append(all, u.Drain)
			}
		}
		return all
	}
	c := *l.config
	c.Apps[0].Upstreams[1].Drain = true
	l.reload(t, &c)
	if got := drained(); !slices.Equal(got, []bool{false, true}) {
		t.Errorf("drained upstreams %v, want the second", got)
	}
	c.Apps[0].Upstreams = c.Apps[0].Upstreams[:1]
	l.reload(t, &c)
	if got := drained(); !slices.Equal(got, []bool{false}) {
		t.Errorf("drained upstreams %v, want one, not drained", got)
	}
}

func TestDrainByAdminHoldsOverReloads(t *testing.T) {
	second := newUpstream(t, "web", nil)
	l := newLab(t, func(l *lab) {
		withAdmin(t)(l)
		web := &l.config.Apps[0]
		web.Upstreams = append(web.Upstreams, Upstream{Addr: second.Addr().String()})
	})
	first := l.web.Addr().String()
	used := func(want string) {
		t.Helper()
		before := l.stats(t).Apps[0]
		c := l.in(t, "web", &l.alice)
		defer c.Close()
		for i, u := range l.stats(t).Apps[0].Upstreams {
			if (u.Total > before.Upstreams[i].Total) != (u.Addr == want) {
				t.Errorf("%s had %d and has %d connections; want one more at %s alone",
					u.Addr, before.Upstreams[i].Total, u.Total, want)
			}
		}
		c.CloseWrite()
		io.ReadAll(c)
		l.awaitStats(t, "closed", func(s admin.Stats) bool { return s.Apps[0].Open == 0 })
	}
	post := func(what string) {
		t.Helper()
		if code, body := l.ask(t, "POST", "/api/"+what+"?app=web&upstream="+first); code != 200 {
			t.Fatalf("%s: %d %s", what, code, body)
		}
	}
	used(first)
	post("drain")
	used(second.Addr().String())
	l.reload(t, l.with(func(c *Config) {}))
	used(second.Addr().String())
	// Another app takes over.
	l.reload(t, l.with(func(c *Config) { c.Apps[0].IdleTimeout = time.Minute }))
	if u := l.stats(t).Apps[0].Upstreams[0]; !u.Drain {
		t.Errorf("after the app was replaced: %+v", u)
	}
	post("undrain")
	used(first)
	l.reload(t, l.with(func(c *Config) {}))
	used(first)
	post("drain")
	l.reload(t, l.with(func(c *Config) {
		c.Apps[0].Upstreams = slices.Clone(c.Apps[0].Upstreams)
		c.Apps[0].Upstreams[0].Drain = true
	}))
	l.reload(t, l.with(func(c *Config) {})) // the configuration has taken over
	used(first)
	post("drain")
	l.reload(t, l.with(func(c *Config) { c.Apps[0].Upstreams = c.Apps[0].Upstreams[1:] }))
	l.reload(t, l.with(func(c *Config) {}))
	if s := l.stats(t).Apps[0].Upstreams[0]; s.Drain {
		t.Errorf("an upstream that was removed and is back is draining: %+v", s)
	}
	if code, _ := l.ask(t, "POST", "/api/drain?app=web&upstream=127.0.0.1:1"); code != 404 {
		t.Errorf("an upstream that is not there: %d, want 404", code)
	}
}

func TestReloadChangesTheAdmin(t *testing.T) {
	l := newLab(t, withAdmin(t))
	addr := l.server.AdminAddr().String()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	byToken := func(token string) int {
		r, err := http.NewRequest("POST", "http://"+addr+"/api/end?user=nobody", nil)
		must(t, err)
		r.Header.Set("Authorization", "Bearer "+token)
		answer, err := client.Do(r)
		must(t, err)
		answer.Body.Close()
		return answer.StatusCode
	}
	if got := byToken("0123456789abcdef"); got != 200 {
		t.Errorf("with the token: %d", got)
	}
	must(t, os.WriteFile(l.config.Admin.Token, []byte("another-token-of-24-char"), 0o600))
	l.reload(t, l.config)
	if got := l.server.AdminAddr().String(); got != addr {
		t.Errorf("it listens on %s, want %s as before", got, addr)
	}
	old, now := byToken("0123456789abcdef"), byToken("another-token-of-24-char")
	if old != 403 || now != 200 {
		t.Errorf("with the old token: %d, with the new: %d", old, now)
	}

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	_, err = l.server.Reload(l.with(func(c *Config) {
		c.Admin = &Admin{Listen: taken.Addr().String()}
	}))
	if err == nil || !strings.HasPrefix(err.Error(), "admin.listen: ") ||
		!strings.Contains(err.Error(), "in use: change it, or end the program that uses it") {
		t.Errorf("an address in use: %v", err)
	}
	if code, _ := l.ask(t, "GET", "/healthz"); code != 200 {
		t.Errorf("after a reload that failed: %d", code)
	}

	was := l.config.Admin.Socket
	moved := *l.config.Admin
	moved.Socket += "2"
	l.config.Admin = &moved
	l.reload(t, l.config)
	if code, _ := l.ask(t, "GET", "/healthz"); code != 200 {
		t.Errorf("at the new socket: %d", code)
	}
	gone := func(path string) {
		t.Helper()
		for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(path); err != nil {
				return
			}
			if time.Now().After(late) {
				t.Fatalf("%s is still there", path)
			}
		}
	}
	gone(was)
	l.reload(t, l.with(func(c *Config) { c.Admin = nil }))
	gone(moved.Socket)
	if got := l.server.AdminAddr(); got != nil {
		t.Errorf("without an admin it listens on %v", got)
	}
}
