//go:build !linux || lbproxy_portable

package lbproxy

// portable says that the system does not tell what is on its way in a socket: a reset right after
// data waits a second, and an idle connection waits with a buffer in hand.
const portable = true
