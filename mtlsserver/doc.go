// Package mtlsserver is a TCP load balancer that knows its clients: mutual TLS 1.3 in front of lbproxy, who a client is
// by its certificate's serial, and what it may reach by app.
//
//	config, err := mtlsserver.Load("config.json")
//	if err != nil {
//		log.Fatal(err)
//	}
//	server, err := mtlsserver.New(config, nil)
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Fatal(server.Run(ctx))
//
// Each app has a listener and upstreams, each user the serials of certificates and the apps they may reach. The list
// of users is what revokes: whoever is not on it, is not let in, and [Server.Reload] ends the connections that a new
// list does not allow. An [Authenticator] decides the same for any other listener.
//
// # What it defends against
//
// Anyone may connect. Until a client has proved that it holds the key of a certificate which the configured CA itself
// issued for a user who may reach this app, it costs at most some kilobytes for some seconds ([Handshake]), no upstream
// is dialled for it and nobody's limit charged, also not when it shows a certificate that is somebody else's. It learns
// that it is refused, by an alert or a reset, and of why no more than crypto/tls says by itself, such as
// certificate_required or unknown_ca: what is decided here is always bad_certificate, and the log says what it was.
// With TLS 1.3 a client learns of it when it first reads, not from its handshake. A client that is let in reaches that
// app and nothing else, within its user's limits, until its certificate, serial, user, right or CA is gone: then both
// sides of its connections are reset, whether it reads or not. Whoever has the CA's key is everyone, and whoever can
// write the configuration or its files is the administrator. Who holds only a certificate, without its key, can learn
// whether it is on the list. That an address, or many, use up all handshakes that may be in progress at once is bounded,
// not prevented.
//
// Not here: certificate revocation lists and OCSP, as the list of users is a list of who is allowed; intermediate CAs,
// as a serial names one certificate only of one issuer; TLS 1.2; session resumption, as a ticket would outlive what it
// proved; getting certificates, from ACME or elsewhere; routing by name (SNI, ALPN).
//
// # Logs
//
// Each connection that was accepted has one line, "connection", when it is over: app, client, reason and duration; after
// its client has proved who it is also user, serial, upstream, sent and received; claimed_serial if it was refused for
// what it claims; detail, which is an error's text, printable and cut short. The duration is a [time.Duration], which
// slog's JSONHandler writes as nanoseconds. The reason is a [Reason] or an lbproxy.EndReason; client-error with
// "unexpected EOF" is a client that stopped without saying so in TLS (close_notify), as many do. A flood of clients is a
// flood of lines: to thin those out is for the handler of [Options].Logger.
package mtlsserver
