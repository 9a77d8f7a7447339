package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
)

// list is the command ls.
func (c *command) list(ctx context.Context, s *cluster.Store, asJSON bool) error {
	t, err := s.Tally(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		enc := json.NewEncoder(c.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(t)
	}
	proxies := fmt.Sprintf("%d proxies", len(t.Proxies))
	if len(t.Proxies) == 1 {
		proxies = "1 proxy"
	}
	fmt.Fprintf(c.stdout, "%s: %s, configuration %d\n", s.Status().Addr, proxies, t.Config)
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	if len(t.Proxies) > 0 {
		fmt.Fprintln(w, "\nPROXY\tADDRESS\tSTATE\tOPEN\tCONFIG\tBEAT")
	}
	for _, p := range t.Proxies {
		state, open := "live", strconv.Itoa(p.Open)
		if p.Capacity > 0 {
			open += "/" + strconv.Itoa(p.Capacity)
			if p.Open >= p.Capacity {
				state = "full"
			}
		}
		if p.Draining {
			state = "draining"
		}
		config := strconv.FormatInt(p.Config, 10)
		if p.Problem != "" {
			first, _, _ := strings.Cut(p.Problem, "\n")
			config += " (" + printable(first) + ")"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%v ago\n", p.ID, printable(addresses(p)), state, open,
			config, p.Age.Round(10*time.Millisecond))
	}
	if len(t.Upstreams) > 0 {
		fmt.Fprintln(w, "\nAPP\tUPSTREAM\tOPEN\tBY PROXY")
	}
	for _, u := range t.Upstreams {
		var by []string
		for _, id := range slices.Sorted(maps.Keys(u.By)) {
			by = append(by, fmt.Sprintf("%s %d", id, u.By[id]))
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", printable(u.App), printable(u.Addr), u.Open,
			strings.Join(by, ", "))
	}
	return w.Flush()
}

// addresses returns the addresses of p's apps.
func addresses(p cluster.Proxy) string {
	if len(p.Ports) == 0 {
		return p.Addr
	}
	var all []string
	for _, app := range slices.Sorted(maps.Keys(p.Ports)) {
		all = append(all, app+" "+net.JoinHostPort(p.Addr, strconv.Itoa(p.Ports[app])))
	}
	return strings.Join(all, ", ")
}

// printable escapes control characters, so that writers of the store cannot act upon the terminal.
func printable(s string) string {
	q := strconv.QuoteToGraphic(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
