// Package soak has only a test. It sends connections through lbproxy and mtlsserver over loopback,
// injects faults at both ends, in dials, in accepting and in the configuration, and checks every
// byte, every end and every count. It needs Linux. In internal/lab:
//
//	go test ./soak                                      a small run, some seconds
//	go test -race -v -timeout 10m ./soak -conns 25000   20,000 plain, 5,000 mTLS connections
//	go test -v -timeout 2h ./soak -conns 1250000        1,000,000 and 250,000
//
// With -v it prints a line every few seconds and a table of figures at the end. Flags:
//
//	-conns N       connections in all; every fifth is mTLS
//	-duration D    stop starting connections after D
//	-inflight N    connections at once
//	-seed N        repeat the plans of an earlier run, which has printed its seed
//
// The plan of a connection (how much it sends each way, in which pieces, who ends first, which
// fault strikes where) is a function of the seed and its number, so the same seed gives the same
// plans. Their timing differs from run to run.
package soak
