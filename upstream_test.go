package lbproxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// text describes a change without its time.
func (c UpstreamChange) text() string {
	s := fmt.Sprintf("%s/%s %s>%s", c.App, c.Addr, c.From, c.To)
	if c.Drain {
		s += " drain"
	}
	if c.Removed {
		s += " removed"
	}
	if c.Err != nil {
		s += " " + c.Err.Error()
	}
	return s
}

func TestOnUpstreamReportsChangesInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWard()
		refuse := map[string]bool{}
		var got []string
		var last time.Time
		a, _ := newCheckedApp(t, HealthCheck{Check: w.check, Interval: time.Second}, Options{
			OnUpstream: func(c UpstreamChange) {
				got = append(got, c.text())
				if c.Time.Before(last) || c.Time != time.Now() {
					t.Errorf("%+v comes after %v, now is %v", c, last, time.Now())
				}
				last = c.Time
			},
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if refuse[addr] {
					return nil, errors.New("refused")
				}
				return dialFake(echoFake)(ctx, network, addr)
			},
		}, "a:1", "b:1")
		connect := func() {
			c := serveFake(t.Context(), a, &Conn{})
			ping(t, c)
			c.Close()
			<-c.result
		}
		for _, step := range []struct {
			what string
			then func()
			want string
		}{
			{"New is told of to nobody", func() {}, ""},
			{"a dial fails", func() {
				refuse["a:1"] = true
				connect()
			}, "test/a:1 up>cooling refused"},
			{"the trial fails", func() { time.Sleep(10 * time.Second); connect() }, ""},
			{"the trial works", func() {
				refuse["a:1"] = false
				time.Sleep(10 * time.Second)
				connect()
			},
				"test/a:1 cooling>up"},
			{"checks fail", func() { w.set(errSick, "b:1"); time.Sleep(10 * time.Second) },
				"test/b:1 up>down sick"},
			{"the same set", func() {
				a.SetUpstreams([]Upstream{{Addr: "a:1"}, {Addr: "b:1", Weight: 2}})
			},
				""},
			{"b drains", func() {
				a.SetUpstreams([]Upstream{{Addr: "a:1"}, {Addr: "b:1", Drain: true}})
			},
				"test/b:1 down>down drain sick"},
			{"checks pass", func() { w.set(nil, "b:1"); time.Sleep(10 * time.Second) },
				"test/b:1 down>up drain"},
			{"b drains no more", func() {
				a.SetUpstreams([]Upstream{{Addr: "a:1"}, {Addr: "b:1"}})
			},
				"test/b:1 up>up"},
			{"b is down", func() { w.set(errSick, "b:1"); time.Sleep(10 * time.Second) },
				"test/b:1 up>down sick"},
			{"b is removed", func() { a.SetUpstreams([]Upstream{{Addr: "a:1"}}) },
				"test/b:1 down>up removed"},
			{"c is added", func() { a.SetUpstreams([]Upstream{{Addr: "c:1"}, {Addr: "a:1"}}) },
				"test/c:1 >up"},
		} {
			got = nil
			step.then()
			synctest.Wait()
			if s := strings.Join(got, ", "); s != step.want {
				t.Errorf("%s: %s, want %s", step.what, s, step.want)
			}
		}
	})
}

func TestChangesMergeWhileOnUpstreamIsBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan bool)
		var got []string
		a, _ := newApp(t, Options{OnUpstream: func(c UpstreamChange) {
			got = append(got, c.text())
			<-goOn
		}}, "a:1")
		add := func(addr string, from, to UpstreamState, removed bool) {
			a.balancer.changes.add(UpstreamChange{Addr: addr, From: from, To: to, Removed: removed})
		}
		add("a:1", StateUp, StateCooling, false)
		synctest.Wait() // the hook is called with it
		for range 1000 {
			add("a:1", StateCooling, StateUp, false)
			add("b:1", StateUp, StateDown, false)
			add("c:1", StateUp, StateCooling, false)
			add("b:1", StateDown, StateUp, false)
			add("a:1", StateUp, StateCooling, false)
		}
		add("b:1", StateUp, StateUp, true)
		if n := a.balancer.changes.waiting.Len(); n != 3 {
			t.Errorf("%d changes of 3 upstreams wait", n)
		}
		close(goOn)
		synctest.Wait()
		want := "test/a:1 up>cooling, test/c:1 up>cooling, test/a:1 cooling>cooling, " +
			"test/b:1 up>up removed"
		if s := strings.Join(got, ", "); s != want {
			t.Errorf("got  %s\nwant %s", s, want)
		}
		got = nil
		add("a:1", StateCooling, StateUp, false)
		synctest.Wait()
		if s := strings.Join(got, ", "); s != "test/a:1 cooling>up" {
			t.Errorf("after it was idle: %s", s)
		}
	})
}

func TestBlockedOnUpstreamDelaysNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		goOn := make(chan bool)
		d := newHoleDialer()
		d.set("a:1", true)
		a, _ := newApp(t, Options{DialTimeout: time.Second, DialContext: d.dial,
			OnUpstream: func(UpstreamChange) { <-goOn }}, "a:1", "b:1")
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		a.SetUpstreams([]Upstream{{Addr: "b:1"}})
		a.Stats()
		a.Close()
		if r := <-c.result; r.End != EndClosed {
			t.Errorf("%+v", r)
		}
		close(goOn)
	})
}

func TestOnUpstreamMayCallTheAppAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a *LBProxyApp
		calls := 0
		a, _ = newApp(t, Options{OnUpstream: func(c UpstreamChange) {
			if calls++; calls < 5 {
				a.SetUpstreams([]Upstream{{Addr: "a:1", Drain: !c.Drain}})
			} else {
				a.Close()
			}
		}}, "a:1")
		a.SetUpstreams([]Upstream{{Addr: "a:1", Drain: true}})
		synctest.Wait()
		if calls != 5 {
			t.Errorf("%d calls", calls)
		}
	})
}

func TestOnUpstreamIsCalledAgainAfterAPanic(t *testing.T) {
	for name, fail := range map[string]func(){"panic": func() { panic("boom") },
		"Goexit": runtime.Goexit} {
		synctest.Test(t, func(t *testing.T) {
			var log proxytest.Buffer
			var got []string
			a, _ := newApp(t, Options{
				Logger: slog.New(slog.NewTextHandler(&log, nil)),
				OnUpstream: func(c UpstreamChange) {
					got = append(got, c.Addr)
					fail()
				}}, "a:1")
			a.SetUpstreams([]Upstream{{Addr: "b:1"}})
			synctest.Wait()
			if s := strings.Join(got, " "); s != "b:1 a:1" {
				t.Errorf("%s: calls for %s", name, s)
			}
			wantLines(t, &log,
				map[string]int{"panic in a hook": 2, "hook=Options.OnUpstream": 2, "stack=": 2,
					"app=test": 2})

			b, _ := newApp(t, Options{
				Logger: slog.New(panicHandler{}), OnUpstream: func(UpstreamChange) {
					fail()
				}}, "a:1")
			b.SetUpstreams([]Upstream{{Addr: "b:1"}})
		})
	}
}

func TestUpstreamDialMatchesTheDefaultCheck(t *testing.T) {
	serverTLS, clientTLS := tlsConfigs(t)
	clientTLS.ServerName = ""
	plain := upstreamDoing(t, echo)
	secure := upstreamDoing(t, func(c *net.TCPConn) {
		tc := tls.Server(c, serverTLS)
		io.Copy(tc, tc)
		tc.Close()
	})
	for _, u := range []Upstream{{Addr: plain}, {Addr: secure, TLS: clientTLS}} {
		c, err := u.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ping(t, c)
		c.Close()
	}
	if clientTLS.ServerName != "" {
		t.Errorf("the caller's tls.Config has ServerName %q now", clientTLS.ServerName)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		u    Upstream
		ctx  context.Context
		want string
	}{
		{Upstream{Addr: proxytest.RefusingAddr(t)}, t.Context(), "refused"},
		{Upstream{Addr: secure, TLS: &tls.Config{}}, t.Context(),
			"TLS: tls: failed to verify certificate"},
		{Upstream{Addr: "10.0.0.1"}, t.Context(), "missing port"},
		{Upstream{Addr: "10.0.0.1", TLS: &tls.Config{}}, t.Context(), "missing port"},
		{Upstream{}, t.Context(), "missing"},
		{Upstream{Addr: plain}, canceled, "canceled"},
		{Upstream{Addr: secure, TLS: clientTLS}, canceled, "canceled"},
	} {
		if c, err := tc.u.Dial(tc.ctx); c != nil || err == nil ||
			!strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, %v; want an error with %q", tc.u, c, err, tc.want)
		}
	}
}

func TestUpstreamDialEndsHandshakeWithItsContext(t *testing.T) {
	silent := upstreamDoing(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	c, err := Upstream{Addr: silent, TLS: &tls.Config{}}.Dial(ctx)
	if c != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", c, err)
	}
}

// A lookup that fails because the process has no descriptor left does not count against the
// upstream, in dials and in checks, with Go's resolver and C's. A child process runs out of
// descriptors.
func TestLookupWithoutDescriptorsIsALocalError(t *testing.T) {
	if os.Getenv("LBPROXY_TEST_LOOKUP") != "" {
		lookUpOutOfDescriptors()
	}
	if runtime.GOOS == "windows" {
		t.Skip("there is no limit of descriptors to set")
	}
	for _, resolver := range []string{"go", "cgo"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-c", `ulimit -n 40 && exec "$0" -test.run="^$1$"`,
			os.Args[0], t.Name())
		cmd.Env = append(os.Environ(), "LBPROXY_TEST_LOOKUP=1", "GODEBUG=netdns="+resolver)
		out, err := cmd.CombinedOutput()
		want := "checks: up up\ndials: 1 attempt, dial-failed, up 0, up 0\n"
		if _, got, _ := bytes.Cut(out, []byte("\n")); err != nil || string(got) != want {
			t.Errorf("%s resolver: %v:\n%swant after the first line\n%s", resolver, err, out, want)
		}
		t.Logf("%s resolver: %s", resolver, bytes.SplitN(out, []byte("\n"), 2)[0])
	}
}

// lookUpOutOfDescriptors prints the state of two upstreams with host names.
func lookUpOutOfDescriptors() {
	out := bufio.NewWriter(os.Stdout)
	client, ours := net.Pipe()
	var files []*os.File
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		files = append(files, f)
	}
	ups := []Upstream{{Addr: "localhost:9"}, {Addr: "two.invalid:9"}}
	var checks atomic.Int32
	a, err := New("child", ups, &Options{Logger: quiet, HealthCheck: &HealthCheck{
		Interval: time.Millisecond, Timeout: 20 * time.Second, Fall: 1,
		Check: func(ctx context.Context, u Upstream) error {
			c, err := u.Dial(ctx)
			if err == nil {
				c.Close()
			}
			checks.Add(1)
			return err
		},
	}})
	if err != nil {
		panic(err)
	}
	_, err = ups[0].Dial(context.Background())
	fmt.Fprintln(out, err)
	for checks.Load() < 10 {
		runtime.Gosched()
	}
	s := a.Stats().Upstreams
	fmt.Fprintf(out, "checks: %s %s\n", s[0].State, s[1].State)
	a.Close()

	a, err = New("child", ups, &Options{Logger: quiet})
	if err != nil {
		panic(err)
	}
	r, _ := a.ServeConn(context.Background(), &Conn{Client: ours})
	client.Close()
	s = a.Stats().Upstreams
	fmt.Fprintf(out, "dials: %d attempt, %s, %s %d, %s %d\n", r.Attempts, r.End,
		s[0].State, s[0].Failed, s[1].State, s[1].Failed)
	for _, f := range files {
		f.Close()
	}
	out.Flush()
	os.Exit(0)
}

func TestUpstreamsAreReadFromJSON(t *testing.T) {
	const text = `[{"addr": "a:1", "weight": 2, "maxConns": 3, "drain": true, "proxyProtocol": 1},
		{"Addr": "b:1"}]`
	decode := func(text string) (ups []Upstream, err error) {
		d := json.NewDecoder(strings.NewReader(text))
		d.DisallowUnknownFields()
		return ups, d.Decode(&ups)
	}
	want := []Upstream{{Addr: "a:1", Weight: 2, MaxConns: 3, Drain: true, ProxyProtocol: 1},
		{Addr: "b:1"}}
	got, err := decode(text)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	const insecure = `[{"addr": "a:1", "tls": {"InsecureSkipVerify": true}}]`
	if got, err := decode(insecure); err == nil {
		t.Errorf("the key tls is accepted: %+v", got)
	}
	if err := json.Unmarshal([]byte(insecure), &got); err != nil || got[0].TLS != nil {
		t.Errorf("%+v, %v, want no TLS", got, err)
	}
	want[1].TLS = &tls.Config{} // which has fields that JSON cannot write
	written, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	want[1].TLS = nil
	if got, err = decode(string(written)); err != nil || !slices.Equal(got, want) {
		t.Errorf("written and read: %+v, %v, want %+v", got, err, want)
	}
}
