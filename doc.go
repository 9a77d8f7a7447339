// Package lbproxy is a TCP (layer 4) load balancer: it spreads client connections over a group of
// upstream servers by least connections, and copies bytes both ways.
//
//	app, err := lbproxy.New("db", []lbproxy.Upstream{
//		{Addr: "10.0.0.1:5432"},
//		{Addr: "10.0.0.2:5432", Weight: 2},
//	}, nil)
//	if err != nil {
//		log.Fatal(err)
//	}
//	l, err := lbproxy.Listen(":5432")
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Fatal(app.Serve(l, nil))
//
// An [LBProxyApp] is one application: a name and the servers that provide it. Other balancers call
// it a pool, a backend or a service. [LBProxyApp.Serve] accepts from a listener and asks an
// [AdmitFunc] about each connection; [LBProxyApp.ServeConn] serves one connection that the caller
// accepted. A [Conn] describes a connection and is a handle on it. All types are safe for
// concurrent use.
//
// # Who gets the next connection
//
// The upstream with the lowest load, (open+1)/Weight; of equals, the first in the slice. So one
// connection at a time always gets the first: open several at once to see them spread. Choosing and
// counting are one step, before the dial, so connections that open at the same time see each other.
// Upstreams that are full (MaxConns) or draining are skipped.
//
// When a dial fails, the next best upstream is tried, each at most once for a connection. A failed
// upstream is skipped for [Options].FailTimeout, unless every upstream has failed. When FailTimeout
// has passed, one connection probes it; others keep skipping it until the probe succeeds. Then the
// upstream is in slow start: it gets at most every second connection for as long as its load is the
// lowest. An error that is the proxy's own, such as running out of descriptors, does not count
// against an upstream.
//
// [Options].HealthCheck also checks upstreams when nobody connects. An upstream that is down gets
// no connection until its checks pass again, and dials to it that are in progress go on to the
// next upstream. If none is left, the error is [ErrNoUpstream].
//
// Several proxies that share upstreams tell their apps of each other with [LBProxyApp.SetPeers].
//
// # What clients and upstreams see
//
// When one side ends its stream, the other side is told (half-close), and the opposite stream goes
// on for as long as bytes flow; [Options].IdleTimeout, over both directions, is the only bound. A
// stream that is aborted never looks complete: when a side fails, the bytes it sent before are
// delivered, for at most a second, and then the other side is reset. Unix sockets have no reset;
// there the connection is closed.
//
// Connections are dialed concurrently, so an upstream may accept two of them in another order than
// their clients opened them.
//
// A client that is over its limit, or for whom there is no upstream, is reset. The reset may come
// before the client's connect returns; then connect fails. [Conn].OnRefused can send a final
// response first.
//
// With a [TLSConn], a client that closes without close_notify has aborted its stream, unless
// [CloseNotify] says otherwise. A tls.Conn cannot report the difference, so it looks like a normal
// end.
//
// # Limits
//
// A [RateLimitManager] receives an event when a connection opens, when bytes have moved, and when
// it closes; it may refuse, reset or slow the connection. [TokenBucket], [OpenLimit] and
// [Bandwidth] are such managers, [All] combines them, and [ClientLimits] keeps one for each client;
// to write your own, implement Report.
//
// # Who owns and closes what
//
// ServeConn closes the client's connection and Serve its listener, always. [LBProxyApp.Shutdown]
// waits for connections to end by themselves; [LBProxyApp.Close] resets them. When Close has
// returned, no goroutine or descriptor is left, except hooks that block where their documentation
// says so. An internal timer may remain for up to a second, without effect.
//
// Functions return errors and do not log them, except Serve: it has no caller for each connection,
// so it logs them to [Options].Logger. That log is for problems. For an access log use
// [Options].OnDone, which receives the [Result] of every connection, those of ServeConn included.
//
// No hook runs under a lock. An OnDone or a log that blocks holds no slot of [Options].MaxConns and
// no descriptor.
//
// # In production
//
// Set [Options].HealthCheck and [Options].OnDone, and drain with Shutdown.
// [LBProxyApp.SetUpstreams] reloads. Package [github.com/danielepagano/lbproxy/mtlsserver/admin] is
// an http.Handler with a status page, metrics for Prometheus and a readiness probe for any apps.
// Limit clients of IPv6 by their /64; see [ClientLimits]. Package
// [github.com/danielepagano/lbproxy/mtlsserver] is a whole server for clients with certificates.
//
// # On Linux
//
// Large transfers between two TCP connections move in the kernel, by splice(2), whatever limits and
// counters there are. An idle pair of TCP connections holds two descriptors, no buffer and no pipe.
// Elsewhere, and for connections that are neither a *net.TCPConn nor a [TLSConn] over one, bytes
// pass through pooled buffers; each idle direction holds one. A wrapper around a TCP connection
// hides what it is: pass the connection itself if you can.
//
// [Options].Loops, which is off by default and experimental, runs plain TCP on event loops. They
// are for many short or idle connections. A goroutine dump does not show such connections;
// [LBProxyApp.Conns] does.
//
// # What it does not do
//
// It knows nothing of HTTP, UDP, SNI routing, users, files or flags. It does not queue connections
// for a full upstream, retry once bytes have flowed, or keep connections to upstreams for reuse.
package lbproxy
