//go:build race

package proxytest

// Race reports whether the race detector is on: memory use is then about ten times as high.
const Race = true
