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
//		log.Fatal(err) // connections had to be reset
//	}
//
// An app is one listener with its upstreams. A user is a list of certificate serials and of the
// apps that they may reach. Removing a user from the list revokes it: new clients are refused, and
// [Server.Reload] resets the connections that the new list does not allow. To authenticate clients
// of a listener of your own, use an [Authenticator].
//
// # What it defends against
//
// Anyone may connect. A client has no rights until it has proved that it holds the key of a
// certificate that the CA itself has issued, for a user who may reach this app. Until then it costs
// a few kilobytes for a few seconds (see [Handshake]): the server dials no upstream for it and
// charges no user's limit, even if the client shows somebody else's certificate.
//
// A refused client gets an alert or a reset. The alert is certificate_required for a missing
// certificate and bad_certificate for every problem with one; only the log gives the reason. In TLS
// 1.3 the client's handshake has succeeded by then, so its first read returns the alert.
//
// An admitted client reaches that app only, within its user's limits. Its connections are reset,
// whether it reads or not, when its certificate expires, or when a reload removes its serial, its
// user, the app from the user, or the CA.
//
// The holder of the CA's key can pose as any user. Anyone who can write the configuration, or a
// file that it names, is an administrator. A thief of a certificate without its key can learn
// whether the certificate is listed. Many addresses together can fill the places for handshakes;
// the networks that hold the most lose theirs first, so that others still get in.
//
// # What it does not do
//
// It does not use revocation lists or OCSP: the list of users decides who is allowed. It accepts no
// intermediate CAs, because a serial is unique for one issuer only; no TLS 1.2; and no session
// tickets, because a ticket would outlive the proof of identity. It does not fetch certificates
// (ACME) and does not route by name (SNI, ALPN).
//
// # Logs
//
// Each accepted connection is logged once, as "connection", when it has ended, with the app, the
// client's address, the reason and the duration. A client that has proved its identity adds user,
// serial, upstream, and the bytes sent and received. A client refused for its certificate adds
// claimed_serial, claimed_subject and claimed_issuer. The detail is the text of an error, printable
// and cut short. The duration is a [time.Duration], which slog's JSONHandler writes in nanoseconds;
// the command mtlsserver writes seconds.
//
// The reason is a [Reason] or an lbproxy.EndReason. The reason client-closed means that the client
// left without close_notify while no data was in flight, as many clients do. Each reason for a
// refusal gets at most 10 lines a second ([Options].RefusalLines); further refusals are counted.
package mtlsserver
