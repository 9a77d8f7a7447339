// Package gateway names the live proxies of a cluster in DNS.
//
// It names live proxies that are neither draining nor full, in random order, up to 64 of them. If
// all are draining or full, it names them anyway. Load has no other effect: resolvers cache
// answers, so naming only the least loaded proxies would send all clients to the same few.
//
// A zone has these names. Proxies whose address is a name have SRV records only.
//
//	ZONE            A, AAAA  all proxies
//	_APP._tcp.ZONE  SRV      proxies that serve the app, with its port; weighted by free capacity
//	ID.ZONE         A, AAAA  one proxy
//
// A [File] keeps the zone in a file for any DNS server that reads zone files. A [Server] is a small
// DNS server.
package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/miekg/dns"
)

const (
	most     = 64   // proxies named at once
	safeSize = 1232 // bytes of UDP that pass every network (DNS Flag Day 2020)
)

// A Zone says how proxies are named. It must not change once it is in use.
type Zone struct {
	// Name is the zone's name, such as "lb.example.com". It is required.
	Name string

	// NS are the names of the zone's DNS servers, at least one. A name in the zone itself needs its
	// address too: "ns1.example.com", but "ns1.lb.example.com=192.0.2.1".
	NS []string

	// TTL is how long resolvers cache an answer, in whole seconds, up to a day. 0 means 1 second,
	// negative means no caching.
	TTL time.Duration
}

// Check returns an error if z is invalid.
func (z *Zone) Check() error {
	if z == nil || z.Name == "" {
		return errors.New("gateway: no zone: give its name, such as lb.example.com")
	}
	if !hostname(z.Name) {
		return fmt.Errorf("gateway: zone %q: want a domain name such as lb.example.com", z.Name)
	}
	if len(z.NS) == 0 {
		return errors.New("gateway: no name servers: give the name of one at least")
	}
	for _, ns := range z.NS {
		name, addr, given := strings.Cut(ns, "=")
		if !hostname(name) {
			return fmt.Errorf("gateway: name server %q: want a name, or name=address", ns)
		}
		if _, err := netip.ParseAddr(addr); given && err != nil {
			return fmt.Errorf("gateway: name server %q: %q is not an IP address", ns, addr)
		}
	}
	if z.TTL > 24*time.Hour {
		return fmt.Errorf(
			"gateway: TTL %v: want a day at most: resolvers name a dead proxy for so long", z.TTL)
	}
	return nil
}

// hostname reports whether name is made of labels, perhaps with a dot at the end.
func hostname(name string) bool {
	name = strings.TrimSuffix(name, ".")
	for l := range strings.SplitSeq(name, ".") {
		if !label(l) || strings.Trim(l, "-") != l {
			return false
		}
	}
	return len(name) < 254
}

func (z *Zone) ttl() uint32 { return uint32(max(cmp.Or(z.TTL, time.Second), 0) / time.Second) }

func (z *Zone) header(name string, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: z.ttl()}
}

// A set holds the records of a zone at one moment. It is immutable.
type set struct {
	zone    *Zone
	origin  string // the zone's name in canonical form
	alive   bool   // it names a proxy
	records map[string]map[uint16][]dns.RR
	seen    map[string]bool // records, as lines
}

// set returns the records for t.
func (z *Zone) set(t cluster.Tally, serial uint32) *set {
	s := &set{zone: z, origin: dns.CanonicalName(z.Name), records: map[string]map[uint16][]dns.RR{},
		seen: map[string]bool{}}
	first := ""
	for _, ns := range z.NS {
		name, addr, _ := strings.Cut(ns, "=")
		name = dns.CanonicalName(name)
		first = cmp.Or(first, name)
		s.add(&dns.NS{Hdr: z.header(s.origin, dns.TypeNS), Ns: name})
		if dns.IsSubDomain(s.origin, name) {
			s.address(name, addr)
		}
	}
	s.add(&dns.SOA{Hdr: z.header(s.origin, dns.TypeSOA), Ns: first, Mbox: "hostmaster." + s.origin,
		Serial: serial, Refresh: 60, Retry: 5, Expire: 86400, Minttl: z.ttl()})
	all := slices.DeleteFunc(slices.Clone(t.Proxies), func(p cluster.Proxy) bool {
		_, err := netip.ParseAddr(p.Addr)
		return err != nil && !hostname(p.Addr)
	})
	named := slices.DeleteFunc(slices.Clone(all), func(p cluster.Proxy) bool {
		return p.Draining || p.Capacity > 0 && p.Open >= p.Capacity
	})
	if len(named) == 0 {
		named = all // a full proxy is better than none
	}
	s.alive = len(named) > 0
	for _, p := range all {
		s.address(p.ID+"."+s.origin, p.Addr)
	}
	for _, p := range named {
		s.address(s.origin, p.Addr)
		target := p.ID + "." + s.origin
		if _, err := netip.ParseAddr(p.Addr); err != nil {
			target = dns.CanonicalName(p.Addr)
		}
		for app, port := range p.Ports {
			if name := "_" + app + "._tcp." + s.origin; label("_"+app) && app != "" && port > 0 {
				s.add(&dns.SRV{Hdr: z.header(strings.ToLower(name), dns.TypeSRV),
					Port: uint16(port), Target: target, Weight: weight(p)})
			}
		}
	}
	return s
}

// label reports whether l is a valid DNS label; an app's id may not be one.
func label(l string) bool {
	return l != "" && len(l) < 64 && !strings.ContainsFunc(l, func(r rune) bool {
		return r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') &&
			(r < 'A' || r > 'Z')
	})
}

// weight returns p's free part of its capacity, as an SRV weight. Without a bound all is free.
func weight(p cluster.Proxy) uint16 {
	if p.Capacity <= 0 {
		return 1001
	}
	return uint16(1 + 1000*max(p.Capacity-p.Open, 0)/p.Capacity)
}

// address adds the A or AAAA record of addr if addr is an IP address.
func (s *set) address(name, addr string) {
	ip, err := netip.ParseAddr(addr)
	switch ip = ip.Unmap(); {
	case err != nil || ip.Zone() != "":
	case ip.Is4():
		s.add(&dns.A{Hdr: s.zone.header(name, dns.TypeA), A: net.IP(ip.AsSlice())})
	default:
		s.add(&dns.AAAA{Hdr: s.zone.header(name, dns.TypeAAAA), AAAA: net.IP(ip.AsSlice())})
	}
}

func (s *set) add(rr dns.RR) {
	h := rr.Header()
	if s.records[h.Name] == nil {
		s.records[h.Name] = map[uint16][]dns.RR{}
	}
	if line := rr.String(); s.seen[line] { // two proxies at one address
		return
	} else {
		s.seen[line] = true
	}
	s.records[h.Name][h.Rrtype] = append(s.records[h.Name][h.Rrtype], rr)
}

// answer adds to m the records of its question's name and type: up to 64 in random order, and no
// more than fit into size bytes. Some of many proxies serve a client as well as all.
func (s *set) answer(m *dns.Msg, size int) {
	q := m.Question[0]
	all := slices.Clone(s.records[strings.ToLower(q.Name)][q.Qtype])
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:min(len(all), most)]
	m.Compress = true
	for m.Answer = all; len(m.Answer) > 1 && m.Len() > size; {
		m.Answer = m.Answer[:len(m.Answer)-1-len(m.Answer)/16]
	}
}

// Text returns the zone in the format of a zone file. z must have passed Check. A DNS server
// notices a change only if the serial has risen.
func (z *Zone) Text(t cluster.Tally, serial uint32) string {
	return z.set(t, serial).text()
}

func (s *set) text() string {
	var b strings.Builder
	b.WriteString("; lbcluster writes this whenever proxies come or go: changes here are lost.\n")
	for _, name := range slices.SortedFunc(maps.Keys(s.records), func(a, b string) int {
		// The SOA record must come first; its name is the shortest.
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	}) {
		kinds := s.records[name]
		for _, kind := range []uint16{dns.TypeSOA, dns.TypeNS, dns.TypeA, dns.TypeAAAA,
			dns.TypeSRV} {
			if len(kinds[kind]) == 0 {
				continue
			}
			m := new(dns.Msg).SetQuestion(name, kind)
			s.answer(m, safeSize)
			for _, rr := range m.Answer {
				fmt.Fprintln(&b, rr)
			}
		}
	}
	return b.String()
}
