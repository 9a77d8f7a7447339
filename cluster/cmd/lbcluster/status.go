package main

import (
	"fmt"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// sections implements mtlsserver.Options.Sections: the cluster on the status page and as metrics.
func (r *runner) sections() []admin.Section {
	return []admin.Section{r.storeFacts(), r.proxyFacts()}
}

func (r *runner) storeFacts() admin.Section {
	s := r.store.Status()
	state, connected := "connected", 1.0
	if !s.Connected {
		state, connected = "away", 0
	}
	count := func(name, metric, help string, n uint64) admin.Fact {
		return admin.Fact{
			Name: name, Value: fmt.Sprint(n), Metric: metric, Help: help, Number: float64(n),
		}
	}
	return admin.Section{Title: "Store", Facts: []admin.Fact{
		{Name: "Address", Value: s.Addr},
		{Name: "State", Value: state, Bad: !s.Connected, Metric: "lbcluster_store_connected",
			Help: "1 while the store answers.", Number: connected},
		{Name: "Since", Value: s.Since.UTC().Format(time.RFC3339)},
		{Name: "Problem", Value: s.Err, Bad: true},
		{Name: "Without the store", Value: r.outage},
		{Name: "Proxies that share limits", Value: fmt.Sprint(s.Peers), Metric: "lbcluster_peers",
			Help: "Proxies that share the limits, this one included.", Number: float64(s.Peers)},
		count("Calls", "lbcluster_store_calls_total", "Calls to the store.", s.Calls),
		count("Failures", "lbcluster_store_failures_total",
			"Calls without a useful answer.", s.Failures),
		count("Timeouts", "lbcluster_store_timeouts_total",
			"Calls without an answer in time.", s.Timeouts),
		count("Admitted without it", "lbcluster_alone_total",
			"Connections admitted by the policy, without the store.", s.Alone),
		count("Refused without it", "lbcluster_turned_away_total",
			"Connections refused by the policy, without the store.", s.TurnedAway),
	}}
}

func (r *runner) proxyFacts() admin.Section {
	section := admin.Section{Title: "Proxy"}
	if m := r.member.Load(); m != nil {
		p := m.Place()
		section.Facts = append(section.Facts,
			admin.Fact{Name: "Name", Value: p.ID},
			admin.Fact{
				Name: "Place", Value: fmt.Sprintf("%d of %d", p.Index+1, p.Count),
				Metric: "lbcluster_proxies", Help: "Live proxies, as the last beat said.",
				Number: float64(p.Count),
			},
			admin.Fact{
				Name: "Last beat", Value: fmt.Sprintf("%.1f s ago", p.Lag.Seconds()),
				Bad:    p.Lag > 5*time.Second,
				Metric: "lbcluster_lag_seconds", Help: "Time since the last beat that was answered.",
				Number: p.Lag.Seconds(),
			},
			admin.Fact{Name: "Problem", Value: p.Err, Bad: true})
	}
	if w := r.watch.Load(); w != nil {
		version, problem := w.Running()
		section.Facts = append(section.Facts,
			admin.Fact{
				Name: "Configuration", Value: fmt.Sprint(version),
				Metric: "lbcluster_configuration_version", Help: "The version in force.",
				Number: float64(version),
			},
			admin.Fact{Name: "Problem with it", Value: problem, Bad: true})
	}
	return section
}
