//go:build !lbproxy_portable

package lbproxy

const portable = false
