// Package admin shows the state of lbproxy apps over HTTP: a status page for people, metrics for
// Prometheus, JSON for programs. A program mounts it in a mux of its own in one line:
//
//	mux.Handle("/lb/", http.StripPrefix("/lb", admin.Handler(apps, nil)))
//
// Package mtlsserver imports this package, and serves it as its configuration says ("admin"). This
// package imports lbproxy and the standard library, and knows a server only by [Options].
//
// # What can be read
//
//	GET /           the status page; it works without JavaScript
//	GET /conns      the open connections, as a page
//	GET /metrics    the text format of Prometheus
//	GET /healthz    200 while the program answers
//	GET /readyz     200, or 503 and why: draining, or an app without an upstream that is up
//	GET /api/stats  a [Stats] in JSON; ?brief=1 leaves out upstreams, users and certificates
//	GET /api/conns  a [Conns] in JSON: ?app, user, upstream and client select, offset and limit
//	                (at most 1,000; by default 100) page
//
// Counters never fall: the counts of apps and upstreams are kept when they are gone. 1,000 apps,
// and 1,000 upstreams of each, keep their names; others are summed under no name.
//
// # What can be changed
//
// Each change is a POST with its arguments in the query or as a form, and is logged with who asked.
//
//	POST /api/drain    app, upstream: it gets no new connections
//	POST /api/undrain  app, upstream: it gets them again
//	POST /api/end      app, user, upstream, client: resets the connections that match all given
//	                   arguments; user, upstream or client is required: {"ended": 3}
//	POST /api/reload   reloads the configuration and then answers with the changes:
//	                   {"users": {"added": ["bob"]}, …, "ended": 0}
//
// A request may make changes if it comes by the Unix socket of a [Server], or if it has
// "Authorization: Bearer TOKEN" and Options.Token is set. The answer is JSON. A request that
// fails is answered by {"error": "…"}: 400 for an argument, 403 without permission, 404 for an app
// or upstream that is not there, 422 for a configuration that is refused, with a line for each
// problem, and 501 for a change that the program does not offer.
package admin
