// Package interop has no code, only tests: software that others wrote speaks through examples/basic
// and mtlsserver, or watches them: Chromium opens the status page, Prometheus scrapes the metrics.
// Every byte is compared, no log of either side may complain, and the proxy's own log must say of
// each connection that it ended as expected. In internal/lab:
//
//	go test ./interop                       what is installed; the rest is skipped by name
//	LBPROXY_INTEROP=all go test ./interop   a missing program is a failure
//	LBPROXY_SCREENSHOTS=DIR go test ./interop -run StatusPage   keeps pictures of the pages in DIR
//
// The programs are those of the Debian packages postgresql, redis-server, redis-tools, iperf3,
// iperf, openssh-server, openssh-client, rsync, nginx-light, libnginx-mod-stream, haproxy, varnish,
// curl, openssl, python3, nodejs, chromium and prometheus. Everything runs on loopback, on free
// ports, in folders of its own, and ends with its test.
package interop
