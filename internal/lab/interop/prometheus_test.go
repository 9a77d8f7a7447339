//go:build linux

package interop

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

const alerts = "../../../docs/alerts.yml"

func TestAlertRules(t *testing.T) {
	promtool := need(t, "promtool", "prometheus")
	quiet(t, command(t, promtool, "check", "rules", alerts))
	out, _ := output(t, command(t, promtool, "test", "rules", "testdata/alerts_test.yml"))
	if !strings.Contains(out, "SUCCESS") {
		t.Errorf("promtool test rules says %s", out)
	}
	// Each alert is among those that are to fire, and those that are not.
	rules, tests := string(readFile(t, alerts)), string(readFile(t, "testdata/alerts_test.yml"))
	for line := range strings.Lines(rules) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "- alert: ")
		if !ok {
			continue
		}
		fires := strings.Count(tests, "alertname: "+name+"\n        exp_alerts:")
		if quiet := strings.Count(tests, "alertname: "+name+"}"); fires == 0 || quiet == 0 {
			t.Errorf("%s: %d tests fire, %d do not; want both", name, fires, quiet)
		}
	}
}

// A prometheus scrapes proxies twice a second.
type prometheus struct {
	t   *testing.T
	url string
}

func startPrometheus(t *testing.T, targets ...string) *prometheus {
	t.Helper()
	program, dir, addr := need(t, "prometheus", "prometheus"), folder(t), "127.0.0.1:"+freePort(t)
	rules, err := filepath.Abs(alerts)
	proxytest.Must(t, err)
	list, err := json.Marshal(targets)
	proxytest.Must(t, err)
	config := write(t, dir, "prometheus.yml", fmt.Sprintf(`
global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}
rule_files: [%s]
scrape_configs:
  - job_name: lbproxy
    static_configs: [{targets: %s}]
`, rules, list))
	start(t, command(t, program, "--config.file="+config, "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+addr), addr)
	proxytest.Eventually(t, "Prometheus is ready", func() bool {
		r, err := http.Get("http://" + addr + "/-/ready")
		proxytest.Must(t, err)
		defer r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
	return &prometheus{t, "http://" + addr + "/api/v1/"}
}

// ask stores the answer of the HTTP API in data.
func (p *prometheus) ask(path string, data any) {
	p.t.Helper()
	r, err := http.Get(p.url + path)
	proxytest.Must(p.t, err)
	defer r.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	proxytest.Must(p.t, json.NewDecoder(r.Body).Decode(&answer))
	if answer.Status != "success" {
		p.t.Fatalf("%s: %s %s", path, answer.Status, answer.Error)
	}
}

// query returns the values of an expression, by the label that is to tell them apart.
func (p *prometheus) query(expression, label string) map[string]float64 {
	p.t.Helper()
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	p.ask("query?query="+url.QueryEscape(expression), &data)
	values := map[string]float64{}
	for _, r := range data.Result {
		text, _ := r.Value[1].(string)
		value, err := strconv.ParseFloat(text, 64)
		proxytest.Must(p.t, err)
		values[r.Metric[label]] = value
	}
	return values
}

// await waits until ok accepts the values of an expression.
func (p *prometheus) await(expression, label string, ok func(map[string]float64) bool) {
	p.t.Helper()
	var values map[string]float64
	defer func() {
		if p.t.Failed() {
			p.t.Logf("%s by %s was %v", expression, label, values)
		}
	}()
	proxytest.Eventually(p.t, expression, func() bool {
		values = p.query(expression, label)
		return ok(values)
	})
}

func TestPrometheusScrapesAndAnswers(t *testing.T) {
	promtool := need(t, "promtool", "prometheus")
	good, dead := proxytest.Upstream(t, proxytest.Echo), proxytest.RefusingAddr(t)
	basic := startOperated(t, "basic", good, dead)
	mutual := startOperated(t, "mtlsserver", good, dead)
	host := func(o *operated) string { return strings.Trim(strings.TrimPrefix(o.url, "http://"), "/") }
	p := startPrometheus(t, host(basic), host(mutual))
	both := func(ok func(float64) bool) func(map[string]float64) bool {
		return func(values map[string]float64) bool {
			return len(values) == 2 && ok(values["basic"]) && ok(values["web"])
		}
	}
	positive := func(n float64) bool { return n > 0 }

	p.await("up", "instance", func(up map[string]float64) bool {
		return up[host(basic)] == 1 && up[host(mutual)] == 1
	})
	// The zero before it makes the first refusal an increase.
	p.await(`mtlsserver_refused_total{reason="no-certificate"}`, "reason",
		func(n map[string]float64) bool { return len(n) == 1 && n["no-certificate"] == 0 })
	config := mutual.mtls.clientConfig(t)
	config.Certificates = nil
	if c, err := tls.Dial("tcp", mutual.addr, config); err == nil {
		if _, err = c.Read(make([]byte, 1)); err == nil {
			t.Error("a client without certificate was served")
		}
		c.Close()
	}
	p.await(`increase(mtlsserver_refused_total[1m]) > 0`, "reason",
		func(n map[string]float64) bool { return len(n) == 1 && n["no-certificate"] > 0 })

	basic.load(t)
	mutual.load(t)
	for _, rate := range []string{
		"rate(lbproxy_accepted_connections_total[10s])",
		"sum by (app) (rate(lbproxy_bytes_total[10s]))",
		`rate(lbproxy_connections_total{end="done"}[10s])`,
		"rate(lbproxy_dial_duration_seconds_count[10s])",
		"histogram_quantile(0.9, rate(lbproxy_connection_duration_seconds_bucket[10s]))",
	} {
		p.await(rate, "app", both(positive))
	}
	for _, app := range []string{"basic", "web"} {
		p.await(fmt.Sprintf(`lbproxy_upstream_state{app=%q,state="up"}`, app), "upstream",
			func(up map[string]float64) bool { return len(up) == 2 && up[good] == 1 && up[dead] == 0 })
		p.await(fmt.Sprintf(`rate(lbproxy_upstream_connections_total{app=%q}[10s])`, app), "upstream",
			func(rate map[string]float64) bool { return rate[good] > 0 && rate[dead] < rate[good] })
	}
	p.await("mtlsserver_certificate_expiry_timestamp_seconds - time() > 100 * 86400", "file",
		func(left map[string]float64) bool { return len(left) == 2 })
	p.await("mtlsserver_user_connections", "user",
		func(open map[string]float64) bool { return open["alice"] >= 5 })

	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	proxytest.Eventually(t, "the alert for an upstream that is down is pending", func() bool {
		p.ask("rules", &rules)
		for _, r := range rules.Groups[0].Rules {
			if r.Health == "err" {
				t.Fatalf("%s: %s", r.Name, r.LastError)
			}
			if r.Name == "LbproxyUpstreamDown" && r.State == "pending" {
				return true
			}
		}
		return false
	})
	for _, o := range []*operated{basic, mutual} {
		check := command(t, promtool, "check", "metrics")
		check.Stdin = strings.NewReader(o.fetch(t, "metrics"))
		if said := quiet(t, check); said != "" {
			t.Errorf("promtool check metrics says %s", said)
		}
	}
}
