package admin

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
)

// Stats is the answer of /api/stats.
type Stats struct {
	Time    time.Time `json:"time"`
	Apps    []App     `json:"apps"`
	History []Sample  `json:"history"` // of the last minutes, oldest first
	Info
}

// An App has the sums of the counters of all apps with one id: the current app and its
// predecessors. The fields are as in lbproxy.Stats.
type App struct {
	ID          string                       `json:"id"`
	Current     bool                         `json:"current"`
	Stopping    bool                         `json:"stopping,omitempty"`
	Open        int                          `json:"open"`
	Accepted    uint64                       `json:"accepted"`
	NotAdmitted uint64                       `json:"notAdmitted"`
	Refused     uint64                       `json:"refused"`
	Failed      uint64                       `json:"failed"`
	Sent        uint64                       `json:"sent"`
	Received    uint64                       `json:"received"`
	Ends        map[lbproxy.EndReason]uint64 `json:"ends"`
	Upstreams   []Upstream                   `json:"upstreams,omitempty"`
	Gone        Upstream                     `json:"gone"` // the sums of removed upstreams

	rows map[string]int      // indexes in Upstreams, by Addr
	gone map[string]Upstream // removed upstreams, by Addr
	all  Upstream            // the sums of all upstreams, present and removed
}

// An Upstream has the counters and the state of an app's upstream, as in lbproxy.UpstreamStats.
type Upstream struct {
	Addr     string                `json:"addr,omitempty"`
	State    lbproxy.UpstreamState `json:"state,omitempty"`
	Since    time.Time             `json:"since,omitzero"`
	Error    string                `json:"error,omitempty"` // why it is cooling or down
	Weight   int                   `json:"weight,omitempty"`
	Drain    bool                  `json:"drain,omitempty"`
	Removed  bool                  `json:"removed,omitempty"` // but it has connections
	Open     int                   `json:"open"`
	Total    uint64                `json:"total"`
	Failed   uint64                `json:"failed"`
	Sent     uint64                `json:"sent"`
	Received uint64                `json:"received"`
}

// A Sample is a point of the curves: sums over all apps.
type Sample struct {
	Time     time.Time `json:"time"`
	Open     int       `json:"open"`
	Accepted uint64    `json:"accepted"`
	Bytes    uint64    `json:"bytes"` // both directions together
}

// Info describes a server apart from its apps.
type Info struct {
	NotReady     string            `json:"notReady,omitempty"` // why it takes no connections
	Refused      map[string]uint64 `json:"refused,omitempty"`  // clients, by reason
	Users        []User            `json:"users,omitempty"`    // who have connections open
	Certificates []Certificate     `json:"certificates,omitempty"`
	Sections     []Section         `json:"sections,omitempty"`
}

// A Section has facts about the program, such as the state of a store that it uses.
type Section struct {
	Title string `json:"title"`
	Facts []Fact `json:"facts"`
}

// A Fact is a line of a Section, and may be a metric: a counter if its name ends in _total, else a
// gauge.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"` // for people; empty: the fact is a metric only
	Bad   bool   `json:"bad,omitempty"`

	Metric string  `json:"metric,omitempty"` // its name; empty: none
	Help   string  `json:"-"`
	Number float64 `json:"number,omitempty"` // its value
}

// A User has connections open to an app.
type User struct {
	Name string `json:"name"`
	App  string `json:"app"`
	Open int    `json:"open"`
}

// A Certificate describes a certificate that the server uses.
type Certificate struct {
	Key      string    `json:"key"` // where the configuration names it
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"notAfter"`
}

// Days returns the number of days until c expires; negative if it has expired.
func (c Certificate) Days() int { return int(math.Floor(time.Until(c.NotAfter).Hours() / 24)) }

// Problems returns the reasons why the server is not ready, as /readyz lists them.
func (s Stats) Problems() (all []string) {
	if s.NotReady != "" {
		all = append(all, s.NotReady)
	}
	current := 0
	for _, a := range s.Apps {
		if !a.Current {
			continue
		}
		current++
		if a.Stopping {
			if s.NotReady == "" { // otherwise it has said so for all apps
				all = append(all, "app "+clean(a.ID)+": draining")
			}
		} else if why, ok := a.noUpstream(); ok {
			all = append(all, "app "+clean(a.ID)+": no upstream takes connections: "+why)
		}
	}
	if current == 0 {
		all = append(all, "there are no apps")
	}
	return all
}

// noUpstream reports whether no upstream of a takes connections, and why: "1 down, 1 draining". An
// upstream that is both counts as down, because undraining it would not help.
func (a *App) noUpstream() (why string, ok bool) {
	count := map[string]int{}
	for _, u := range a.Upstreams {
		switch {
		case u.Removed:
		case u.State != lbproxy.StateUp:
			count[string(u.State)]++
		case u.Drain:
			count["draining"]++
		default:
			return "", false
		}
	}
	var parts []string
	for _, state := range sorted(count) {
		parts = append(parts, fmt.Sprintf("%d %s", count[state], state))
	}
	return strings.Join(parts, ", "), true
}

// Conns is the answer of /api/conns.
type Conns struct {
	Conns []Conn `json:"conns"`
	Next  int    `json:"next,omitempty"` // the offset of the next page; 0 if there is none
}

// A Conn is an open connection.
type Conn struct {
	App      string            `json:"app"`
	Client   string            `json:"client"` // its address
	User     string            `json:"user,omitempty"`
	Upstream string            `json:"upstream,omitempty"`
	State    lbproxy.ConnState `json:"state"`
	Since    time.Time         `json:"since"`
	Sent     uint64            `json:"sent"`
	Received uint64            `json:"received"`
}

// Age returns how long c has been open, in whole seconds.
func (c Conn) Age() time.Duration { return time.Since(c.Since).Truncate(time.Second) }
