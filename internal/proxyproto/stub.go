package proxyproto

import (
	"errors"
	"io"
	"net"
	"net/netip"
)

type Header struct {
	Local        bool
	Source, Dest netip.AddrPort
	TLS          *TLSInfo
	ClientID     string
}
type TLSInfo struct {
	Version  string
	Verified bool
	CN       string
}

func (h *Header) AppendV1(b []byte) []byte { return b }
func (h *Header) AppendV2(b []byte) []byte { return b }
func Read(r io.Reader) (*Header, error)    { return nil, errors.New("stub") }

type Trust []netip.Prefix

func NewTrust(p []netip.Prefix) (Trust, error) { return p, nil }
func (t Trust) Contains(a net.Addr) bool       { return false }
