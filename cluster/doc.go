// Package cluster lets several lbproxy processes act as one: they share limits, spread connections
// evenly together and follow one configuration. They keep the shared state in a Redis or Valkey
// server, the store.
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
// No connection depends on the store. A new connection waits for the store for at most
// [Options.Timeout]. The store counts as away after a refused connection, or two calls in a row
// without an answer. Then nothing waits for it: each [Limit] follows its [Outage] policy, balancing
// uses the last known counts, and the configuration stays. A probe every 100 ms finds the store
// when it is back. If the store has lost its data, each proxy writes its part again within a
// second.
//
// # The store is trusted
//
// Anyone who can write to the store decides who may connect, and to what. Give the proxies a user
// of their own in the store, and use TLS. docs/cluster.md shows both.
package cluster
