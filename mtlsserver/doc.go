// Package mtlsserver is a TCP load balancer that knows its clients: it puts mutual TLS 1.3 in front
// of lbproxy. The serial number of a client's certificate says who the client is, and a list of
// users says which apps each of them may reach.
//
//	config, err := mtlsserver.Load("config.json")
//	if err != nil {
//		log.Fatal(err)
//	}
//	server, err := mtlsserver.New(config, nil)
//	if err != nil {
//		log.Fatal(err)
//	}
//	if err := server.Run(ctx); err != nil {
//		log.Fatal(err) // connections had to be cut
//	}
//
// Each app has one listener and its upstreams. Each user has the serials of certificates and the
// apps that these may reach. The list of users is also how users are revoked: a client that is not
// on it is refused, and [Server.Reload] resets the connections that a new list does not allow. To
// authenticate clients of a listener of your own, use an [Authenticator].
//
// # What it defends against
//
// Anyone may connect. A client has no rights until it has proved that it holds the key of a
// certificate that the CA itself has issued, for a user who may reach this app. Until then it costs
// a few kilobytes for a few seconds (see [Handshake]): no upstream is dialled for it, and no user's
// limit is charged, even if it shows the certificate of somebody else.
//
// A client that is refused gets an alert or a reset. The alert is certificate_required if there was
// no certificate, and bad_certificate whatever is wrong with one; only the log says what it was. In
// TLS 1.3 the client's handshake has succeeded by then: it meets the alert in its first read.
//
// A client that is let in reaches that app only, within its user's limits. Its connections are
// reset, whether it reads or not, when its certificate expires, or when a reload removes its
// serial, its user, the app from the user, or the CA.
//
// The holder of the CA's key can be any user. Whoever can write the configuration, or a file that
// it names, is the administrator. Somebody who has a certificate without its key can learn whether
// it is on the list. Many addresses together can use up the places for handshakes; those who hold
// most lose theirs first, so that others still get in.
//
// # What it does not do
//
// It knows no revocation lists and no OCSP, since the list of users says who is allowed. It takes
// no intermediate CAs, since a serial is unique for one issuer only; no TLS 1.2; and no session
// tickets, which would outlive what the client has proved. It does not fetch certificates (ACME),
// and does not route by name (SNI, ALPN).
//
// # Logs
//
// Each accepted connection is logged once, as "connection", when it is over, with the app, the
// client's address, the reason for the end and the duration. If the client has proved its identity,
// there are also user, serial, upstream, and the bytes sent and received. If it was refused for its
// certificate, there are claimed_serial, claimed_subject and claimed_issuer. The detail is the
// text of an error, printable and cut short. The duration is a [time.Duration], which slog's
// JSONHandler writes in nanoseconds; the command mtlsserver writes seconds.
//
// The reason is a [Reason] or an lbproxy.EndReason; client-closed is a client that went without
// close_notify while nothing was under way, as many do. Refusals have at most 10 lines a second for
// each reason ([Options].RefusalLines); the others are counted.
package mtlsserver
