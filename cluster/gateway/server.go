package gateway

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/danielepagano/lbproxy/internal/connlimit"
	"github.com/miekg/dns"
)

// A Server is an authoritative DNS server for one zone. It refuses all other names, and zone
// transfers. Before the first proxy is known, and when all are dead, it answers SERVFAIL, which
// resolvers cache only briefly. It answers each network (IPv4 /24, IPv6 /56) at most 50 times a
// second by UDP, and then tells clients to use TCP, so that nobody can use it to flood others.
type Server struct {
	zone   *Zone
	source Source
	log    *slog.Logger
	udp    net.PacketConn
	tcp    net.Listener
	now    atomic.Pointer[set]
	rates  rates
}

// Listen returns a server for zone that listens on addr, a "host:port", by UDP and by TCP. The
// caller must call Serve. A nil log means slog.Default().
func Listen(addr string, zone *Zone, source Source, log *slog.Logger) (*Server, error) {
	if err := zone.Check(); err != nil {
		return nil, err
	}
	s := &Server{zone: zone, source: source, log: orDefault(log)}
	s.rates.seed = maphash.MakeSeed()
	host, port, _ := net.SplitHostPort(addr)
	for try := 0; ; try++ {
		tcp, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		_, got, _ := net.SplitHostPort(tcp.Addr().String())
		udp, err := net.ListenPacket("udp", net.JoinHostPort(host, got))
		if err == nil {
			s.tcp, s.udp = tcp, udp
			break
		}
		tcp.Close()
		if port != "0" || try == 10 { // for port 0, try another that both protocols can use
			return nil, err
		}
	}
	s.tcp = connlimit.Listener(s.tcp, 256)
	return s, nil
}

// Addr returns the address at which s listens.
func (s *Server) Addr() string { return s.udp.LocalAddr().String() }

// Serve answers until ctx ends, and then returns nil. It always closes the ports. It must be called
// exactly once.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	servers := []*dns.Server{
		{PacketConn: s.udp, Handler: dns.HandlerFunc(s.serveUDP), UDPSize: safeSize},
		{Listener: s.tcp, Handler: dns.HandlerFunc(s.serveTCP), ReadTimeout: 2 * time.Second,
			WriteTimeout: 2 * time.Second, MaxTCPQueries: 128,
			IdleTimeout: func() time.Duration { return 5 * time.Second }},
	}
	errs := make(chan error, len(servers))
	var running sync.WaitGroup
	for _, d := range servers {
		started := make(chan struct{})
		d.NotifyStartedFunc = func() { close(started) }
		running.Go(func() { errs <- d.ActivateAndServe() })
		<-started // Shutdown fails before that
	}
	running.Go(func() { follow(ctx, s.source, s.log, s.learn) })
	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	cancel()
	for _, d := range servers {
		d.Shutdown()
	}
	running.Wait()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (s *Server) learn(t cluster.Tally) {
	next := s.zone.set(t, uint32(time.Now().Unix()))
	if old := s.now.Load(); old == nil || old.alive != next.alive {
		s.log.Info("gateway: naming proxies", "zone", s.zone.Name, "proxies", len(t.Proxies))
	}
	s.now.Store(next)
}

// serveUDP bounds its answers: the source address of a question may be forged.
func (s *Server) serveUDP(w dns.ResponseWriter, r *dns.Msg) {
	size := dns.MinMsgSize
	if o := r.IsEdns0(); o != nil {
		size = min(max(int(o.UDPSize()), size), safeSize)
	}
	addr, _ := w.RemoteAddr().(*net.UDPAddr)
	if addr == nil || !s.rates.allow(addr.AddrPort().Addr(), time.Now()) {
		m := new(dns.Msg).SetReply(r) // as small as the question; a real client asks again by TCP
		m.Truncated = true
		w.WriteMsg(m)
		return
	}
	w.WriteMsg(s.reply(r, size))
}

func (s *Server) serveTCP(w dns.ResponseWriter, r *dns.Msg) {
	w.WriteMsg(s.reply(r, dns.MaxMsgSize-1))
}

// reply answers r, which has one question.
func (s *Server) reply(r *dns.Msg, size int) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	m.Authoritative = true
	if o := r.IsEdns0(); o != nil {
		m.SetEdns0(safeSize, false)
		if o.Version() != 0 {
			m.Rcode = dns.RcodeBadVers
			return m
		}
	}
	if r.Opcode != dns.OpcodeQuery || len(r.Question) != 1 {
		m.Rcode, m.Authoritative = dns.RcodeNotImplemented, false
		return m
	}
	q, now := r.Question[0], s.now.Load()
	name := strings.ToLower(q.Name)
	switch {
	case q.Qclass != dns.ClassINET, !dns.IsSubDomain(dns.CanonicalName(s.zone.Name), name),
		q.Qtype == dns.TypeAXFR, q.Qtype == dns.TypeIXFR:
		m.Rcode, m.Authoritative = dns.RcodeRefused, false
		return m
	case now == nil:
		m.Rcode, m.Authoritative = dns.RcodeServerFailure, false
		return m
	case q.Qtype == dns.TypeANY: // RFC 8482: a minimal answer
		m.Answer = []dns.RR{&dns.HINFO{Hdr: s.zone.header(q.Name, dns.TypeHINFO), Cpu: "RFC8482"}}
		return m
	}
	now.answer(m, size)
	if len(m.Answer) > 0 {
		return m
	}
	if !now.alive && q.Qtype != dns.TypeNS && q.Qtype != dns.TypeSOA {
		m.Rcode, m.Authoritative = dns.RcodeServerFailure, false
		return m
	}
	m.Ns = now.records[now.origin][dns.TypeSOA]
	if !now.has(name) {
		m.Rcode = dns.RcodeNameError
	}
	return m
}

// has reports whether there is a record with this name or a name below it.
func (s *set) has(name string) bool {
	if s.records[name] != nil {
		return true
	}
	for known := range s.records {
		if strings.HasSuffix(known, "."+name) {
			return true
		}
	}
	return false
}

// rates bounds the answers by UDP to each network, and so the flood that forged source addresses
// can cause there. It has a fixed size; networks that share a place share its rate.
type rates struct {
	seed   maphash.Seed
	places [4096]struct{ second, answers atomic.Int64 }
}

const answersPerSecond = 50 // a resolver asks for each name and type once per TTL

func (r *rates) allow(ip netip.Addr, now time.Time) bool {
	ip = ip.Unmap()
	bits := 56
	if ip.Is4() {
		bits = 24
	}
	network, _ := ip.Prefix(bits)
	p := &r.places[maphash.Comparable(r.seed, network)%uint64(len(r.places))]
	if second := now.Unix(); p.second.Swap(second) != second {
		p.answers.Store(0)
	}
	return p.answers.Add(1) <= answersPerSecond
}
