// Package cluster lets several lbproxy processes act as one: they share limits, learn of each other, even out
// what local least connections cannot see, and follow one configuration. What they share is kept in a Redis or
// Valkey server that they all reach.
//
//	store, err := cluster.Dial(os.Getenv("LBPROXY_STORE"), nil) // redis://user:password@host:6379
//	if err != nil {
//		log.Fatal(err) // the URL is wrong; a store that cannot be reached is no error
//	}
//	defer store.Close()
//	member, err := store.Join(cluster.Self{Addr: "10.0.0.5", Apps: apps})
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer member.Leave()
//	c.RateLimit = store.Limit("alice", cluster.Limit{Burst: 100, Every: time.Second / 400})
//
// # When the store is away
//
// Everything in the store is soft, and no connection depends on it. An open waits for the store for at most
// [Options.Timeout]. Once a connection to the store was refused or two calls in a row got no answer, nothing
// waits any more: each [Limit] goes on by its [Outage] policy, balancing by what was known last, and the
// configuration stays as it is. A probe every 100 ms finds the store when it is back. What it has forgotten by
// then is put there again by the next beat, within a second.
//
// # The store is trusted
//
// Whoever may write to the store decides who may connect, and where to. Give the proxies a user of their own
// there, and TLS.
package cluster
