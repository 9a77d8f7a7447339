//go:build linux

package interop

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// A tally has the clients' own counts.
type tally struct {
	served, refused, bytes atomic.Int64
}

// use is one client: it sends n bytes, and reads them back.
func (y *tally) use(o *operated, n int64) (net.Conn, error) {
	c, err := o.dial()
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	sent := make(chan error, 1)
	go func() {
		_, err := proxytest.Pattern(n).Send(c, n)
		sent <- err
	}()
	err = proxytest.Pattern(n).Exactly(io.LimitReader(c, n), n)
	if sendErr := <-sent; err == nil {
		err = sendErr
	}
	y.served.Add(1)
	y.bytes.Add(n)
	return c, err
}

// stranger is a client without certificate.
func (y *tally) stranger(addr string, config *tls.Config) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	if _, err = tls.Client(c, config).Read(make([]byte, 1)); err == nil {
		return fmt.Errorf("a client without certificate was served")
	}
	y.refused.Add(1)
	return nil
}

// Page, metrics and API agree with the clients' own counts, and no counter ever falls, over a
// reload, an app that is replaced and an upstream that is removed while clients come and go.
func TestNumbersEqualTheClientsCounts(t *testing.T) {
	for _, program := range []string{"basic", "mtlsserver"} {
		t.Run(program, func(t *testing.T) {
			total := int64(10_000)
			if testing.Short() {
				total = 500
			}
			const held, workers = 20, 8
			b := newTab(t)
			up := []string{proxytest.Upstream(t, proxytest.Echo), proxytest.Upstream(t, proxytest.Echo)}
			o := startOperated(t, program, up...)
			var y tally
			for i := range int64(held) {
				c, err := y.use(o, 1+i)
				proxytest.Must(t, err)
				defer c.Close()
			}
			o.watchCounters(t)

			var turn atomic.Int64
			var clients sync.WaitGroup
			defer clients.Wait()
			var anonymous *tls.Config
			if o.mtls != nil {
				anonymous = o.mtls.clientConfig(t)
				anonymous.Certificates = nil
			}
			for range workers {
				clients.Go(func() {
					for i := turn.Add(1); i <= total; i = turn.Add(1) {
						if i%10 == 0 && anonymous != nil {
							if err := y.stranger(o.addr, anonymous); err != nil {
								t.Error(err)
							}
							continue
						}
						c, err := y.use(o, 1+i*7919%5000)
						if err != nil {
							t.Error(err)
						}
						if c != nil {
							c.Close()
						}
					}
				})
			}
			if o.mtls != nil {
				for i, edit := range []func(config, app object){
					func(config, _ object) { config["logAdmissions"] = true },
					func(_, app object) { app["idleTimeout"] = "30m" }, // another app takes over
					func(_, app object) { app["upstreams"] = []object{{"addr": up[0]}} },
				} {
					for turn.Load() < total*int64(i+1)/4 && !t.Failed() {
						time.Sleep(time.Millisecond)
					}
					o.mtls.edit(t, edit)
					o.mtls.change(t, "reload")
				}
			}
			clients.Wait()
			if t.Failed() {
				t.FailNow()
			}

			want := numbers{
				"open": held, "accepted": y.served.Load() + y.refused.Load(),
				"notAdmitted": y.refused.Load(), "of upstreams": y.served.Load(),
				"sent": y.bytes.Load(), "received": y.bytes.Load(),
				"bytes of upstreams": 2 * y.bytes.Load(),
			}
			if want["accepted"] != total+held {
				t.Errorf("the clients counted %d, want %d", want["accepted"], total+held)
			}
			proxytest.Eventually(t, "only those that stay are open", func() bool {
				return o.numbersOfAPI(t)["open"] == held
			})
			b.open(o.url)
			for where, got := range map[string]numbers{
				"API": o.numbersOfAPI(t), "metrics": o.numbersOfMetrics(t), "page": b.numbers(),
			} {
				if !maps.Equal(got, want) {
					t.Errorf("%s: %v, want %v", where, got, want)
				}
			}
			if o.mtls == nil {
				return
			}
			samples, err := o.metrics()
			proxytest.Must(t, err)
			for name, want := range map[string]int64{
				`mtlsserver_refused_total{reason="no-certificate"}`:   y.refused.Load(),
				`mtlsserver_user_connections{user="alice",app="web"}`: held,
			} {
				if samples[name] != float64(want) {
					t.Errorf("%s is %v, want %d", name, samples[name], want)
				}
			}
		})
	}
}

// numbers are the sums of a program that has one app.
type numbers map[string]int64

func (o *operated) numbersOfAPI(t *testing.T) numbers {
	t.Helper()
	var s admin.Stats
	proxytest.Must(t, json.Unmarshal([]byte(o.fetch(t, "api/stats")), &s))
	if len(s.Apps) != 1 {
		t.Fatalf("the API has %d apps, want one", len(s.Apps))
	}
	a := s.Apps[0]
	n := numbers{
		"open": int64(a.Open), "accepted": int64(a.Accepted), "notAdmitted": int64(a.NotAdmitted),
		"sent": int64(a.Sent), "received": int64(a.Received),
	}
	for _, u := range append(a.Upstreams, a.Gone) {
		n["of upstreams"] += int64(u.Total)
		n["bytes of upstreams"] += int64(u.Sent + u.Received)
	}
	return n
}

func (o *operated) numbersOfMetrics(t *testing.T) numbers {
	t.Helper()
	samples, err := o.metrics()
	proxytest.Must(t, err)
	n := numbers{}
	for name, value := range samples {
		for prefix, key := range map[string]string{
			"lbproxy_open_connections{":                                       "open",
			"lbproxy_accepted_connections_total{":                             "accepted",
			"lbproxy_upstream_connections_total{":                             "of upstreams",
			"lbproxy_upstream_bytes_total{":                                   "bytes of upstreams",
			`lbproxy_bytes_total{app="` + o.app + `",direction="sent"`:        "sent",
			`lbproxy_bytes_total{app="` + o.app + `",direction="received"`:    "received",
			`lbproxy_refused_total{app="` + o.app + `",reason="not-admitted"`: "notAdmitted",
		} {
			if strings.HasPrefix(name, prefix) {
				n[key] += int64(value)
			}
		}
	}
	return n
}

// numbers reads them from the page.
func (b *tab) numbers() (n numbers) {
	b.t.Helper()
	b.eval(`(() => {
		const value = (e) => Number(e.querySelector("data").value), n = {};
		const keys = {Open: "open", Accepted: "accepted", "Not admitted": "notAdmitted",
			Sent: "sent", Received: "received"};
		for (const dt of document.querySelectorAll(".app > dl dt"))
			if (keys[dt.textContent]) n[keys[dt.textContent]] = value(dt.nextElementSibling);
		n["of upstreams"] = n["bytes of upstreams"] = 0;
		for (const row of document.querySelectorAll("tr[data-upstream]")) {
			n["of upstreams"] += value(row.querySelector(".total"));
			for (const cell of row.querySelectorAll(".bytes")) n["bytes of upstreams"] += value(cell);
		}
		const gone = [...document.querySelectorAll(".gone data")].map((e) => Number(e.value));
		if (gone.length) {
			n["of upstreams"] += gone[0];
			n["bytes of upstreams"] += gone[2] + gone[3];
		}
		return n;
	})()`, &n)
	return n
}

// parseMetrics returns the samples of a text, by name and labels.
func parseMetrics(text string) (map[string]float64, error) {
	samples := map[string]float64{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, err
		}
		samples[line[:i]] = value
	}
	return samples, nil
}

func (o *operated) metrics() (map[string]float64, error) {
	text, err := o.get("metrics")
	if err != nil {
		return nil, err
	}
	return parseMetrics(text)
}

// watchCounters scrapes until the test ends. No counter may fall or vanish.
func (o *operated) watchCounters(t *testing.T) {
	t.Helper()
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for last := map[string]float64{}; ; {
			now, err := o.metrics()
			if err != nil {
				t.Error(err)
				return
			}
			for name, n := range last {
				if got, ok := now[name]; !ok || got < n {
					t.Errorf("%s was %v, and is %v (%v)", name, n, got, ok)
				}
			}
			last = now
			maps.DeleteFunc(last, func(name string, _ float64) bool {
				name, _, _ = strings.Cut(name, "{")
				return !strings.HasSuffix(name, "_total") && !strings.HasSuffix(name, "_count") &&
					!strings.HasSuffix(name, "_sum") && !strings.HasSuffix(name, "_bucket")
			})
			select {
			case <-over:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() {
		close(over)
		<-ended
	})
}

// edit changes the configuration and its first app.
func (m *mtls) edit(t *testing.T, change func(config, app object)) {
	t.Helper()
	var config object
	proxytest.Must(t, json.Unmarshal(readFile(t, m.file("config.json")), &config))
	change(config, config["apps"].([]any)[0].(object))
	text, err := json.Marshal(config)
	proxytest.Must(t, err)
	proxytest.Must(t, os.WriteFile(m.file("config.json"), text, 0o600))
}
