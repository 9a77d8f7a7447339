package admin

import (
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

// metrics writes the text format of Prometheus.
func (h *handler) metrics(w http.ResponseWriter, _ *http.Request) {
	s := h.stats()
	size := 10_000
	for _, a := range s.Apps {
		size += 1500 * (1 + len(a.Upstreams) + len(a.gone)) // growing would copy the text often
	}
	t := exposition{text: make([]byte, 0, size)}
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version
	}
	t.family("lbproxy_build_info", "gauge", "The versions of the program and of Go; the value is 1.")
	t.add(1, "version", version, "goversion", runtime.Version())
	t.apps(s.Apps)
	t.upstreams(s.Apps)
	h.durations(&t, s.Apps)
	if h.Info != nil {
		t.info(s.Info)
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(t.text)
}

func (t *exposition) apps(apps []App) {
	t.family("lbproxy_open_connections", "gauge", "Connections now, those not yet admitted included.")
	for _, a := range apps {
		t.add(uint64(a.Open), "app", a.ID)
	}
	t.family("lbproxy_accepted_connections_total", "counter", "Connections that were accepted.")
	for _, a := range apps {
		t.add(a.Accepted, "app", a.ID)
	}
	t.family("lbproxy_connections_total", "counter", "Connections that have ended, by how.")
	for _, a := range apps {
		for _, end := range sorted(a.Ends) {
			t.add(a.Ends[end], "app", a.ID, "end", string(end))
		}
	}
	t.family("lbproxy_refused_total", "counter", "Connections that were not served, by reason.")
	for _, a := range apps {
		t.add(a.NotAdmitted, "app", a.ID, "reason", "not-admitted")
		t.add(a.Refused, "app", a.ID, "reason", "rate-limited")
		t.add(a.Failed, "app", a.ID, "reason", "no-upstream")
	}
	t.family("lbproxy_bytes_total", "counter", "Bytes sent to upstreams, and received from them.")
	for _, a := range apps {
		t.add(a.Sent, "app", a.ID, "direction", "sent")
		t.add(a.Received, "app", a.ID, "direction", "received")
	}
}

var states = []lbproxy.UpstreamState{lbproxy.StateUp, lbproxy.StateCooling, lbproxy.StateDown}

// upstreams writes gauges for present upstreams, and counters for present and removed ones.
func (t *exposition) upstreams(apps []App) {
	each := func(gone bool, f func(app string, u *Upstream)) {
		for i := range apps {
			for j := range apps[i].Upstreams {
				f(apps[i].ID, &apps[i].Upstreams[j])
			}
			for _, addr := range sorted(apps[i].gone) {
				if u := apps[i].gone[addr]; gone {
					f(apps[i].ID, &u)
				}
			}
		}
	}
	t.family("lbproxy_upstream_state", "gauge", "1 for the state that it is in, 0 for the others.")
	each(false, func(app string, u *Upstream) {
		for _, state := range states {
			t.add(one(u.State == state), "app", app, "upstream", u.Addr, "state", string(state))
		}
	})
	for _, m := range []struct {
		name, kind, help string
		of               func(*Upstream) uint64
	}{
		{"draining", "gauge", "1 if it is draining or removed.",
			func(u *Upstream) uint64 { return one(u.Drain || u.Removed) }},
		{"weight", "gauge", "Its weight.",
			func(u *Upstream) uint64 { return uint64(u.Weight) }},
		{"open_connections", "gauge", "Connections now, dials included.",
			func(u *Upstream) uint64 { return uint64(u.Open) }},
		{"connections_total", "counter", "Connections that it was chosen for.",
			func(u *Upstream) uint64 { return u.Total }},
		{"dial_failures_total", "counter", "Dials that failed by its fault.",
			func(u *Upstream) uint64 { return u.Failed }},
	} {
		t.family("lbproxy_upstream_"+m.name, m.kind, m.help)
		each(m.kind == "counter", func(app string, u *Upstream) {
			t.add(m.of(u), "app", app, "upstream", u.Addr)
		})
	}
	t.family("lbproxy_upstream_bytes_total", "counter", "Bytes sent to it, and received from it.")
	each(true, func(app string, u *Upstream) {
		t.add(u.Sent, "app", app, "upstream", u.Addr, "direction", "sent")
		t.add(u.Received, "app", app, "upstream", u.Addr, "direction", "received")
	})
}

func one(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

func (h *handler) durations(t *exposition, apps []App) {
	for _, m := range []struct {
		name, help string
		bounds     []time.Duration
		of         func(*times) *histogram
	}{
		{"dial", "How long successful dials took.", dialBounds[:],
			func(t *times) *histogram { return &t.dials }},
		{"connection", "How long connections lasted.", connBounds[:],
			func(t *times) *histogram { return &t.conns }},
	} {
		t.family("lbproxy_"+m.name+"_duration_seconds", "histogram", m.help)
		for _, a := range apps {
			if v, ok := h.Recorder.times.Load(a.ID); ok {
				t.histogram(m.of(v.(*times)), m.bounds, a.ID)
			}
		}
	}
}

func (t *exposition) info(info Info) {
	t.family("mtlsserver_refused_total", "counter", "Clients refused, or cut off later, by reason.")
	for _, reason := range sorted(info.Refused) {
		t.add(info.Refused[reason], "reason", reason)
	}
	t.family("mtlsserver_user_connections", "gauge", "Open connections of users who have any.")
	const most = 1000 // users with a metric each; the others share one
	for _, u := range info.Users[:min(most, len(info.Users))] {
		t.add(uint64(u.Open), "user", u.Name, "app", u.App)
	}
	others := map[string]uint64{}
	for _, u := range info.Users[min(most, len(info.Users)):] {
		others[u.App] += uint64(u.Open)
	}
	for _, app := range sorted(others) {
		t.add(others[app], "user", "", "app", app)
	}
	t.family("mtlsserver_certificate_expiry_timestamp_seconds", "gauge",
		"When it expires; of several in a file, the first to expire.")
	ends := map[string]time.Time{}
	for _, c := range info.Certificates {
		if at, ok := ends[c.File]; !ok || c.NotAfter.Before(at) {
			ends[c.File] = c.NotAfter
		}
	}
	for _, file := range sorted(ends) {
		t.add(uint64(max(ends[file].Unix(), 0)), "file", file)
	}
	for _, section := range info.Sections {
		for _, fact := range section.Facts {
			if fact.Metric == "" {
				continue
			}
			kind := "gauge"
			if strings.HasSuffix(fact.Metric, "_total") {
				kind = "counter"
			}
			t.family(fact.Metric, kind, fact.Help)
			t.text = append(append(t.text, fact.Metric...), ' ')
			t.text = append(strconv.AppendFloat(t.text, fact.Number, 'g', -1, 64), '\n')
		}
	}
}

// An exposition is a text of metrics.
type exposition struct {
	text []byte
	name string // of the family
}

// family begins the metrics of a name.
func (t *exposition) family(name, kind, help string) {
	t.name = name
	t.text = append(t.text, "# HELP "+name+" "+help+"\n# TYPE "+name+" "+kind+"\n"...)
}

// add adds a metric with labels, which are names and values.
func (t *exposition) add(value uint64, labels ...string) {
	t.sample("", labels)
	t.text = append(strconv.AppendUint(t.text, value, 10), '\n')
}

func (t *exposition) sample(suffix string, labels []string) {
	t.text = append(append(t.text, t.name...), suffix...)
	for i := 0; i < len(labels); i += 2 {
		t.text = append(t.text, ",{"[one(i == 0)])
		t.text = append(append(t.text, labels[i]...), `="`...)
		t.text = append(append(t.text, escape(labels[i+1])...), '"')
	}
	t.text = append(t.text, "} "...)
}

// escape writes the value of a label.
func escape(s string) string {
	if s = clean(s); strings.ContainsAny(s, `\"`) {
		s = strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s)
	}
	return s
}

func (t *exposition) histogram(h *histogram, bounds []time.Duration, app string) {
	sum := uint64(0)
	for i, bound := range append(slices.Clone(bounds), -1) {
		sum += h.counts[i].Load()
		le := "+Inf"
		if bound >= 0 {
			le = strconv.FormatFloat(bound.Seconds(), 'g', -1, 64)
		}
		t.sample("_bucket", []string{"app", app, "le", le})
		t.text = append(strconv.AppendUint(t.text, sum, 10), '\n')
	}
	t.sample("_sum", []string{"app", app})
	t.text = strconv.AppendFloat(t.text, time.Duration(h.sum.Load()).Seconds(), 'g', -1, 64)
	t.text = append(t.text, '\n')
	t.sample("_count", []string{"app", app})
	t.text = append(strconv.AppendUint(t.text, sum, 10), '\n')
}
