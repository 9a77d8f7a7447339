// Package proxyproto has no code, only tests: this module's reader and writer of the PROXY protocol
// and those of github.com/pires/go-proxyproto say the same of the same bytes. Where they do not,
// the test names the sentence of HAProxy's doc/proxy-protocol.txt that lets them differ.
package proxyproto
