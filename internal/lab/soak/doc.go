// Package soak has no code, only a test: it churns connections through lbproxy and mtlsserver, over real sockets of the
// loopback interface, while faults are injected at both ends, in the dials, in the accepting and in the configuration,
// and checks every byte, every end and every count.
//
//	go test ./internal/soak                               a small one, some seconds
//	go test -race -v -timeout 10m ./internal/soak -push   20,000 plain and 5,000 mTLS connections
//	go test -v -timeout 2h ./internal/soak -long          1,000,000 and 250,000
//
// With -v it prints a line every few seconds and a table of figures at the end. Flags:
//
//	-conns N       so many connections, plain and mTLS ones together; every fifth is mTLS
//	-duration D    start no more connections after so long
//	-inflight N    connections at once
//	-seed N        repeat the plans of an earlier run, which has printed its seed
//
// What a connection does (how much it sends each way, in which pieces, who ends first, which fault strikes where) is a
// function of the seed and its number, so it is the same again with the same seed; what happens at the same time is not.
package soak
