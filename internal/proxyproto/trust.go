package proxyproto

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Trust is a set of peers whose headers are believed. The zero value trusts nobody. It is safe for
// concurrent use.
type Trust struct{ prefixes []netip.Prefix }

// NewTrust returns a Trust of the peers in prefixes. A prefix of IPv4-mapped addresses stands for
// the IPv4 addresses. NewTrust fails if prefixes is empty, or if one of them has all addresses of a
// family: a trusted peer can claim any address.
func NewTrust(prefixes []netip.Prefix) (Trust, error) {
	if len(prefixes) == 0 {
		return Trust{}, errors.New("no prefix of trusted peers")
	}
	var t Trust
	for i, p := range prefixes {
		if !p.IsValid() {
			return Trust{}, fmt.Errorf("trusted peers: prefix %d is not valid", i)
		}
		plain := p
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			plain = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if plain.Bits() == 0 {
			return Trust{}, fmt.Errorf("trusted peers: prefix %d, %v, would trust everybody", i, p)
		}
		t.prefixes = append(t.prefixes, plain)
	}
	return t, nil
}

// Contains reports whether addr, as a conn's RemoteAddr returns it, is trusted. An address without
// an IP, such as a Unix socket's, is not.
func (t Trust) Contains(addr net.Addr) bool {
	a := plain(AddrPort(addr)).Addr() // a prefix contains no address with a zone
	for _, p := range t.prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// AddrPort returns the address and port of addr, for a Header. It returns the zero AddrPort if addr
// is nil or not a TCP address.
func AddrPort(addr net.Addr) netip.AddrPort {
	switch a := addr.(type) {
	case nil:
		return netip.AddrPort{}
	case *net.TCPAddr:
		return a.AddrPort() // zero for a nil *net.TCPAddr
	}
	switch addr.Network() {
	case "tcp", "tcp4", "tcp6":
		a, _ := netip.ParseAddrPort(addr.String())
		return a
	}
	return netip.AddrPort{}
}
