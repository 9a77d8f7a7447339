// Package interop has only tests. Third-party software speaks through examples/basic and
// mtlsserver, or watches them: Chromium opens the status page, Prometheus scrapes the metrics. The
// tests compare every byte, accept no complaint in a log of either side, and check the end of each
// connection in the proxy's log. In internal/lab:
//
//	go test ./interop                       skips tests of missing programs, by name
//	LBPROXY_INTEROP=all go test ./interop   a missing program is a failure
//	LBPROXY_SCREENSHOTS=DIR go test ./interop -run StatusPage   keeps pictures of the pages in DIR
//
// The programs come from the Debian packages postgresql, redis-server, redis-tools, iperf3, iperf,
// openssh-server, openssh-client, rsync, nginx-light, libnginx-mod-stream, haproxy, varnish, curl,
// openssl, python3, nodejs, chromium and prometheus. Each runs on loopback, on free ports, in a
// folder of its own, and ends with its test.
package interop
