// Package admin shows the state of lbproxy apps over HTTP: a status page for people, metrics for
// Prometheus, and JSON for programs. A program mounts it in a mux of its own in one line:
//
//	mux.Handle("/lb/", http.StripPrefix("/lb", admin.Handler(apps, nil)))
//
// Package mtlsserver serves it at the addresses under "admin" in its configuration. This package
// imports lbproxy and the standard library only.
//
// # Reading
//
//	GET /           the status page; it works without JavaScript
//	GET /conns      the open connections, as a page
//	GET /metrics    the text format of Prometheus; docs/metrics.md lists the metrics
//	GET /healthz    200 while the program answers
//	GET /readyz     200, or 503 and why: an app is draining (Shutdown or Close was called), or has
//	                no upstream that is up and not draining, or Options.Info says NotReady
//	GET /api/stats  a [Stats] in JSON; ?brief=1 leaves out upstreams, users and certificates
//	GET /api/conns  a [Conns] in JSON: ?app, user, upstream and client filter; offset and limit
//	                (default 100, at most 1,000) select a page
//
// Counters never fall: removed apps and upstreams keep their counts. The counts of up to 1,000
// removed apps, and of 1,000 removed upstreams of each app, keep their names; the rest are summed
// under app="" and upstream="".
//
// The Host of a request must be an IP address, localhost or one of Options.Hosts, except on a Unix
// socket. Otherwise the answer is 421. So Prometheus must scrape by IP address, or Options.Hosts
// must have the name that it uses.
//
// # Changing
//
// Each change is a POST with its arguments in the query or as a form. It is logged with its sender.
//
//	POST /api/drain    app, upstream: it gets no new connections
//	POST /api/undrain  app, upstream: it gets them again
//	POST /api/end      app, user, upstream, client: resets the connections that match all given
//	                   arguments; user, upstream or client is required: {"ended": 3}
//	POST /api/reload   reloads the configuration and then answers with the changes:
//	                   {"users": {"added": ["bob"]}, …, "ended": 0}
//
// A request may make changes if it comes through the Unix socket of a [Server], or if it has
// "Authorization: Bearer TOKEN" with the token of Options.Token. The answer is JSON.
//
// # Errors
//
// The answer to a failed request to /api is {"error": "…"}, with status 400 for an argument that is
// missing, unknown, empty, repeated or invalid, or a body that is not a form; 403 without
// permission; 404 for an unknown app or upstream; 422 for an error of Options.Reload, such as the
// problems of a configuration, one a line; 500 for another error of Options.Drain; and 501 for a
// change that the program does not offer. The pages ignore arguments that they cannot use.
//
// Other failures are plain text, under /api, too: 403 for a change that a page of another origin
// asks for and, from a [Server], for a request of another machine; 404 for an unknown path; 405 for
// another method; 413 for a Content-Length of more than 64 KiB; and 421 for a Host that is not
// allowed.
package admin
