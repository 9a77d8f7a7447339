// Package proxyproto has only tests. They compare this module's reader and writer of the PROXY
// protocol with github.com/pires/go-proxyproto on the same bytes. Where the two differ, the test
// names the sentence of HAProxy's doc/proxy-protocol.txt that permits it.
package proxyproto
