// Package cluster lets several lbproxy processes act as one: they share limits, spread connections
// evenly together and follow one configuration. What they share is kept in a Redis or Valkey server
// that all of them can reach.
//
//	store, err := cluster.Dial("redis://user:password@host:6379", nil)
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
// No connection depends on the store. A connection that opens waits for it for at most
// [Options.Timeout]. After a refused connection, or two calls in a row without an answer, nothing
// waits: each [Limit] follows its [Outage] policy, balancing uses the last known counts, and the
// configuration stays. A probe every 100 ms finds the store when it is back. If it has lost its
// data, the next beat of each proxy, within a second, writes it again.
//
// # The store is trusted
//
// Whoever may write to the store decides who may connect, and to what. Give the proxies a user of
// their own there, and use TLS. docs/cluster.md shows both.
package cluster
