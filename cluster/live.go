package cluster

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"
)

//go:embed live.lua
var liveText string

var liveScript = rueidis.NewLuaScript(liveText)

// A Proxy is a member of the cluster as the others know it.
type Proxy struct {
	ID       string         `json:"id"`
	Addr     string         `json:"addr"`     // its host: an IP address or a name; may be empty
	Ports    map[string]int `json:"ports"`    // where its apps listen
	Open     int            `json:"open"`     // connections
	Capacity int            `json:"capacity"` // 0: no bound
	Draining bool           `json:"draining"`
	Config   int64          `json:"config"`            // version in force; 0: none of the store's
	Problem  string         `json:"problem,omitempty"` // why it does not run the store's
	Since    time.Time      `json:"since"`             // when it joined, by its own clock
	Version  string         `json:"version,omitempty"` // of the program
	Lease    time.Duration  `json:"lease"`             // how long a beat is valid

	Age time.Duration `json:"age"` // of its last beat; set by Live
}

// An Upstream has the number of connections that all proxies together have open to an upstream.
type Upstream struct {
	App  string         `json:"app"`
	Addr string         `json:"addr"`
	Open int            `json:"open"`
	By   map[string]int `json:"by,omitempty"` // Open by proxy; set by Tally
}

// A Tally is a snapshot of a cluster.
type Tally struct {
	Time      time.Time  `json:"time"`      // by the store's clock
	Config    int64      `json:"config"`    // the version in the store; 0 if there is none
	Proxies   []Proxy    `json:"proxies"`   // by ID
	Upstreams []Upstream `json:"upstreams"` // by app and address; those with connections only
}

// Live returns the live proxies and the sums of their open connections. It is cheap enough to call
// twice a second.
func (s *Store) Live(ctx context.Context) (Tally, error) { return s.live(ctx, "") }

// Tally is like Live and also sets [Upstream.By], the connections of each proxy.
func (s *Store) Tally(ctx context.Context) (Tally, error) { return s.live(ctx, "all") }

func (s *Store) live(ctx context.Context, what string) (t Tally, err error) {
	v, err := s.script(ctx, s.patience(), liveScript, []string{s.key("live")}, s.key(""), what)
	if err == nil && len(v) != 6 {
		err = fmt.Errorf("cluster: the store answers with %d values instead of 6", len(v))
	}
	if err != nil {
		return t, err
	}
	now, _ := v[0].AsInt64()
	t.Time = time.UnixMilli(now)
	t.Config, _ = v[4].AsInt64()
	infos, _ := v[2].AsStrMap()
	leases, _ := v[1].AsStrSlice()
	for i := 0; i+1 < len(leases); i += 2 {
		p := Proxy{ID: leases[i]}
		json.Unmarshal([]byte(infos[p.ID]), &p) // fields that do not decode stay zero
		end, _ := strconv.ParseInt(leases[i+1], 10, 64)
		p.ID, p.Age = leases[i], max(p.Lease-time.Duration(end-now)*time.Millisecond, 0)
		t.Proxies = append(t.Proxies, p)
	}
	slices.SortFunc(t.Proxies, func(a, b Proxy) int { return cmp.Compare(a.ID, b.ID) })

	sums, _ := v[3].AsStrMap()
	at := map[string]int{}
	for _, field := range slices.Sorted(maps.Keys(sums)) {
		app, addr := unfield(field)
		n, _ := strconv.Atoi(sums[field])
		at[field] = len(t.Upstreams)
		t.Upstreams = append(t.Upstreams, Upstream{App: app, Addr: addr, Open: n})
	}
	own, _ := v[5].ToArray()
	for i := 0; i+1 < len(own); i += 2 {
		id, _ := own[i].ToString()
		counts, _ := own[i+1].AsStrMap()
		for field, text := range counts {
			if i, ok := at[field]; ok {
				u := &t.Upstreams[i]
				if u.By == nil {
					u.By = map[string]int{}
				}
				u.By[id], _ = strconv.Atoi(text)
			}
		}
	}
	return t, nil
}

// field returns the store's name for an upstream of an app. An address has no space.
func field(app, addr string) string { return app + " " + addr }

func unfield(field string) (app, addr string) {
	i := strings.LastIndexByte(field, ' ')
	return field[:max(i, 0)], field[i+1:]
}
