// Package lbproxy spreads TCP connections over a group of upstream servers, by least connections, and copies bytes
// both ways.
//
//	app, err := lbproxy.New("db", []lbproxy.Upstream{{Addr: "10.0.0.1:5432"}, {Addr: "10.0.0.2:5432", Weight: 2}}, nil)
//	if err != nil {
//		log.Fatal(err)
//	}
//	l, err := lbproxy.Listen(":5432")
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Fatal(app.Serve(l, nil))
//
// An [LBProxyApp] is one application: a name and the servers that provide it. [LBProxyApp.Serve] accepts from a
// listener; [LBProxyApp.ServeConn] serves one connection that the caller accepted, authenticated or unwrapped itself.
// All methods of all types here are safe for concurrent use.
//
// # Who gets the next connection
//
// The upstream with the lowest (open+1)/Weight; of equals, the one that comes first in the slice. Choosing and
// counting are one step, before the dial, so connections that open at the same time see each other. Upstreams at their
// MaxConns are passed over.
//
// When a dial fails the next best upstream is tried, each at most once for a connection: the client does not notice
// while one of them answers. One that failed is passed over for [Options].FailTimeout, unless all are; then one
// connection tries it while the others go on passing it over. After an outage it gets at most every second new
// connection, until another upstream has as few. An error that is the proxy's own, such as having run out of
// descriptors, is not held against an upstream.
//
// [Options].HealthCheck has upstreams checked as well, whether or not anybody connects. One that is down by its checks
// gets no connection until they find it up again; if all are down there is none to be had: [ErrNoUpstream].
//
// # What clients and upstreams see
//
// A stream that ends well on one side ends well on the other, and the opposite one goes on for as long as bytes flow;
// [Options].IdleTimeout, over both directions, is the only bound. A stream that is cut never looks whole: when a side
// fails, what came from it before is delivered (for at most a second) and then the other side is reset. A client that
// cannot be served, or is over its limit, is reset as well; if that is quick it shows as an error of the client's
// dial. Where there are no resets, as with Unix sockets, closing has to do. A TLS client that just stops, without
// close_notify, is told from one that ended if it is a [TLSConn]; a tls.Conn does not say.
//
// # Limits
//
// A [RateLimitManager] is asked when a connection opens and told of the bytes it moves; it may refuse, cut, or slow it.
// [TokenBucket], [OpenLimit] and [Bandwidth] are such managers, [All] combines them, [ClientLimits] keeps one for each
// client, and one of your own has a single method.
//
// # Who owns and closes what
//
// ServeConn closes the client's connection, Serve its listener, always. [LBProxyApp.Shutdown] waits for connections to
// end by themselves, [LBProxyApp.Close] breaks them; no goroutine, descriptor or timer is left when Close has returned.
// Library functions return errors and do not log them; Serve, whose connections have nobody to return to, logs a line
// for each to [Options].Logger and hands their [Result] to [Options].OnDone.
//
// # On Linux
//
// Bulk from one TCP connection to another moves in the kernel, by splice(2), whatever limits and counters there are. An
// idle pair of TCP connections holds its two descriptors, no buffer and no pipe. Elsewhere, and for connections that
// are neither a *net.TCPConn nor a [TLSConn] over one, bytes pass through pooled buffers, of which one that waits for
// bytes holds one. A wrapper around a TCP connection hides what it is: pass the connection itself if you can.
//
// # What it does not do
//
// It knows nothing of HTTP, UDP, certificates, users, files or flags. It neither queues connections for a full upstream
// nor retries once bytes have flowed, nor keeps connections to upstreams for reuse.
package lbproxy
