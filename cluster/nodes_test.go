package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/rueidis"

	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// command sends a server a command that the package does not use, and returns the answer.
func command(t *testing.T, server *storetest.Server, words ...string) string {
	t.Helper()
	c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{server.Addr},
		DisableCache:      true,
		ForceSingleClient: true, ClientSetInfo: rueidis.DisableClientSetInfo})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	result := c.Do(context.Background(), c.B().Arbitrary(words...).Build())
	if err := result.Error(); err != nil {
		t.Fatal(words, err)
	}
	text, _ := result.ToString()
	return text
}

// The primary dies, and Sentinel makes its replica the next one.
func TestFailover(t *testing.T) {
	t.Parallel()
	primary := storetest.Redis(t, "--repl-diskless-sync-delay", "0")
	host, port, _ := strings.Cut(primary.Addr, ":")
	replica := storetest.Redis(t, "--replicaof", host, port)
	storetest.Await(t, "the replica is one", func() error {
		info := command(t, replica, "INFO", "replication")
		return storetest.Want(strings.Contains(info, "master_link_status:up"), info)
	})
	sentinel := storetest.Sentinel(t, fmt.Sprintf(`sentinel monitor mymaster %s %s 1
sentinel down-after-milliseconds mymaster 500
sentinel failover-timeout mymaster 3000
`, host, port))
	storetest.Await(t, "Sentinel knows the replica", func() error {
		_, port, _ := strings.Cut(replica.Addr, ":")
		info := command(t, sentinel, "INFO", "sentinel")
		return storetest.Want(strings.Contains(info, "slaves=1"), port+": "+info)
	})

	s, _ := dial(t, sentinel.URL()+"?master_set=mymaster", calm)
	m, err := s.Join(Self{ID: "one", Interval: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Leave()
	l := s.Limit("k", Limit{Burst: 10, Every: never, Exact: true})
	if in := count(t, 4, l); in != 4 {
		t.Fatalf("%d let in, of 4", in)
	}
	if v, err := s.Put(t.Context(), 0, []byte("text"), "ann"); v != 1 || err != nil {
		t.Fatal(v, err)
	}
	primary.Kill()
	began := time.Now()
	storetest.Await(t, "the store is away", func() error {
		return storetest.Want(s.Ping(t.Context()) != nil, "connected")
	})
	storetest.Await(t, "the replica is found", func() error { return s.Ping(t.Context()) })
	t.Log("the store was away for", time.Since(began))
	if c, err := s.Config(t.Context()); err != nil || c.Version != 1 || string(c.Text) != "text" {
		t.Error("the configuration is lost:", c, err)
	}
	storetest.Await(t, "it is a member there", func() error {
		tally, err := s.Live(t.Context())
		return errors.Join(err, storetest.Want(len(tally.Proxies) == 1, "not yet"))
	})
	// Only the last spends may be lost. Without the store the part was one in one.
	if in := count(t, 20, l); in < 6 || in > 10 {
		t.Errorf("%d more let in, of the 6 that are left, or some that are lost", in)
	}
}

// Keys are on several nodes of a Redis Cluster.
func TestRedisCluster(t *testing.T) {
	t.Parallel()
	var nodes [2]*storetest.Server
	var host, port, bus string // of the last one
	for i, slots := range [][]string{{"0", "8191"}, {"8192", "16383"}} {
		_, bus, _ = strings.Cut(proxytest.FreeAddr(t), ":")
		nodes[i] = storetest.Redis(t, "--cluster-enabled", "yes", "--cluster-port", bus)
		host, port, _ = strings.Cut(nodes[i].Addr, ":")
		command(t, nodes[i], append([]string{"CLUSTER", "ADDSLOTSRANGE"}, slots...)...)
	}
	command(t, nodes[0], "CLUSTER", "MEET", host, port, bus)
	for _, n := range nodes {
		storetest.Await(t, "the cluster has come together", func() error {
			info := command(t, n, "CLUSTER", "INFO")
			return storetest.Want(strings.Contains(info, "cluster_state:ok"), info)
		})
	}
	one, _ := dial(t, nodes[1].URL(), calm) // the probe's key may be on this one, or not
	s, _ := dial(t, nodes[0].URL()+"?addr="+nodes[1].Addr, calm)
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := one.Ping(t.Context()); err != nil &&
		!strings.Contains(err.Error(), "give a second one") {
		t.Error(err)
	}
	for i := range 20 { // on both
		m := s.Limit(fmt.Sprint(i), Limit{Burst: 3, Every: never, Open: 5})
		if in := count(t, 5, m); in != 3 {
			t.Errorf("key %d: %d let in, of 3", i, in)
		}
	}
	put(t, s, "text")
	if c, err := s.Config(t.Context()); err != nil || string(c.Text) != "text" {
		t.Error(c, err)
	}
	m, err := s.Join(Self{ID: "one", Interval: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Leave()
	storetest.Await(t, "it is a member", func() error {
		tally, err := s.Tally(t.Context())
		return errors.Join(err, storetest.Want(len(tally.Proxies) == 1, "not yet"))
	})
	if st := s.Status(); st.Failures != 0 {
		t.Errorf("%+v", st)
	}
}
