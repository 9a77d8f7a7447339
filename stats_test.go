package lbproxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// These tests are about an app's reports on connections: Stats, Conns, and a Result for each.

// mixedApp is an app in whose connections all kinds of things happen, as their ClientIDs say.
func mixedApp(t *testing.T) (a *LBProxyApp, results <-chan Result,
	come func(what string) *duplexConn) {
	refused := errors.New("refused")
	a, results = newApp(t, Options{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			switch ConnFromContext(ctx).ClientID {
			case "undialable":
				return nil, context.Canceled // not the upstream's fault, so it stays up
			case "unlucky":
				return nil, refused
			}
			return dialFake(echoFake)(ctx, network, addr)
		}, FailTimeout: -1}, "u:1", "v:1")
	whats := make(chan string, 1)
	arrive := comeFake(t, a, func(_ context.Context, c *Conn) error {
		switch c.ClientID = <-whats; c.ClientID {
		case "rejected":
			return refused
		case "limited":
			c.RateLimit = new(OpenLimit)
		case "cut":
			c.RateLimit = rateFunc(func(_ context.Context, e Event) Decision {
				return Decision{Exceeded: e.Kind == EventData}
			})
		case "panic":
			panic("boom")
		}
		return nil
	})
	var mu sync.Mutex
	return a, results, func(what string) *duplexConn {
		mu.Lock()
		defer mu.Unlock()
		whats <- what
		return arrive()
	}
}

var mixedEnds = map[string]EndReason{
	"plain": EndDone, "rejected": EndNotAdmitted, "limited": EndRateLimited, "cut": EndRateLimited,
	"undialable": EndDialFailed, "unlucky": EndDialFailed, "panic": EndCanceled,
}

// Every connection that was accepted has one Result, whatever becomes of it, and Stats counts it as
// the Result says.
func TestEveryConnectionHasOneResultAndIsCountedOnce(t *testing.T) {
	a, results, come := mixedApp(t)
	whats := slices.Sorted(maps.Keys(mixedEnds))
	const rounds = 30
	stop := make(chan bool)
	var looking sync.WaitGroup
	for range 2 {
		looking.Go(func() {
			for last := a.Stats(); ; {
				s := a.Stats()
				wantSum(t, s)
				for end, n := range last.Ends {
					if s.Ends[end] < n {
						t.Errorf("%s fell from %d to %d", end, n, s.Ends[end])
					}
				}
				if s.Sent < last.Sent || s.Received < last.Received || s.Accepted < last.Accepted ||
					s.Refused < last.Refused || s.NotAdmitted < last.NotAdmitted ||
					s.Failed < last.Failed {
					t.Errorf("a counter fell: %+v, was %+v", s, last)
				}
				open := 0
				for _, u := range s.Upstreams {
					open += u.Open
				}
				if open > s.Open {
					t.Errorf("%d open at upstreams, %d in all", open, s.Open)
				}
				last = s
				select {
				case <-stop:
					return
				default:
					runtime.Gosched()
				}
			}
		})
	}
	looking.Go(func() { // upstreams that come and go
		for i := 0; ; i++ {
			a.SetUpstreams([]Upstream{{Addr: fmt.Sprintf("u:%d", 1+i%3)}, {Addr: "v:1"}})
			select {
			case <-stop:
				return
			default:
				runtime.Gosched()
			}
		}
	})
	var clients sync.WaitGroup
	for range rounds {
		for _, what := range whats {
			c := come(what)
			clients.Go(func() {
				c.SetDeadline(time.Now().Add(20 * time.Second))
				c.Write([]byte("x"))
				c.Read(make([]byte, 1))
				c.Close()
			})
		}
	}
	clients.Wait()
	got := map[string]int{}
	sums := map[EndReason]uint64{}
	for range rounds * len(whats) {
		r := <-results
		what := r.Conn.ClientID
		got[what]++
		sums[r.End]++
		if r.End != mixedEnds[what] || r.ClientID != what || (r.Err == nil) != (r.End == EndDone) {
			t.Errorf("%s: %+v", what, r)
		}
	}
	close(stop)
	looking.Wait()
	a.Close()
	if len(results) > 0 {
		t.Errorf("%d results too many", len(results))
	}
	for _, what := range whats {
		if got[what] != rounds {
			t.Errorf("%d results of %q, want %d", got[what], what, rounds)
		}
	}
	s := a.Stats()
	wantSum(t, s)
	for _, end := range endReasons {
		if s.Ends[end] != sums[end] {
			t.Errorf("Stats has %d %q, the results %d", s.Ends[end], end, sums[end])
		}
	}
	// A connection that was cut was served, so it is in none of these.
	if s.NotAdmitted != rounds || s.Refused != rounds || s.Failed != 2*rounds {
		t.Errorf("not admitted %d, refused %d, failed %d; want %d, %d, %d",
			s.NotAdmitted, s.Refused, s.Failed, rounds, rounds, 2*rounds)
	}
}

func TestEndsAreTheCallers(t *testing.T) {
	a, _ := newApp(t, Options{}, "u:1")
	first := a.Stats()
	for _, end := range endReasons {
		if n, ok := first.Ends[end]; n != 0 || !ok {
			t.Errorf("%q: %d, %v", end, n, ok)
		}
		first.Ends[end] = 7
	}
	first.Ends["mine"] = 1
	wantSum(t, a.Stats())
}

func TestSumsIncludeLiveConnectionsAndNeverFall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		wantSums := func(when string, bytes, total uint64) {
			t.Helper()
			synctest.Wait()
			s := a.Stats()
			if s.Sent != bytes || s.Received != bytes {
				t.Errorf("%s: sent %d, received %d, want %d", when, s.Sent, s.Received, bytes)
			}
			sum := s.Gone
			for _, u := range s.Upstreams {
				sum.Total += u.Total
				sum.Sent += u.Sent
			}
			if sum.Total != total || sum.Sent != bytes {
				t.Errorf("%s: upstreams had %d connections and %d bytes, want %d and %d",
					when, sum.Total, sum.Sent, total, bytes)
			}
		}
		s := serveFake(t.Context(), a, new(Conn))
		ping(t, s)
		wantSums("open", 1, 1)
		a.SetUpstreams([]Upstream{{Addr: "v:1"}})
		ping(t, s)
		wantSums("its upstream is removed", 2, 1)
		s.Close()
		<-s.result
		wantSums("over", 2, 1)
		other := serveFake(t.Context(), a, new(Conn))
		ping(t, other)
		wantSums("another", 3, 2)
		other.Close()
		<-other.result
		a.SetUpstreams([]Upstream{{Addr: "u:1"}})
		wantSums("the first upstream is back", 3, 2)
	})
}

// idleSessions gives a so many sessions that do nothing. Connections would take too much.
func idleSessions(a *LBProxyApp, n int) (end func()) {
	var all []*session
	for range n {
		s := a.begin(context.Background(), &Conn{})
		s.state = ConnOpen
		a.enter(s)
		all = append(all, s)
	}
	return func() {
		for _, s := range all {
			s.result = &Result{End: EndDone}
			a.exit(s)
			a.leave()
		}
	}
}

// Its cost must not depend on the connections: compare the two, and 100,000 with 1 ms.
func BenchmarkStatsOfConnections(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprintf("connections=%d", n), func(b *testing.B) {
			a, err := New("bench", []Upstream{{Addr: "u:1"}, {Addr: "v:1"}}, nil)
			if err != nil {
				b.Fatal(err)
			}
			end := idleSessions(a, n)
			b.ReportAllocs()
			for b.Loop() {
				if s := a.Stats(); s.Open != n {
					b.Fatal(s.Open)
				}
			}
			end()
			a.Close()
		})
	}
}

func TestConnsReturnsEachOpenConnOnce(t *testing.T) {
	a, err := New("test", []Upstream{{Addr: "u:1"}}, &Options{Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	const lasting = 2500 // more than are looked at under one lock
	fixed := map[*Conn]bool{}
	for range lasting {
		s := a.begin(t.Context(), &Conn{})
		s.state = ConnOpen
		a.enter(s)
		fixed[s.conn] = true
		if rand.N(3) == 0 {
			defer idleSessions(a, 1)()
		}
	}
	stop := make(chan bool)
	var others sync.WaitGroup
	for range 2 { // come and go
		others.Go(func() {
			for {
				idleSessions(a, 20)()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for range 20 {
		seen := map[*Conn]int{}
		for c := range a.Conns() {
			seen[c]++
			if len(seen)%500 == 0 { // another iteration inside does not disturb it
				inner := 0
				for range a.Conns() {
					if inner++; inner == 1200 {
						break
					}
				}
			}
		}
		for c := range fixed {
			if seen[c] != 1 {
				t.Fatalf("one that is open came %d times", seen[c])
			}
		}
		for _, n := range seen {
			if n > 1 {
				t.Fatalf("one came %d times", n)
			}
		}
	}
	close(stop)
	others.Wait()
	for e := a.sessions.Front(); e != nil; {
		next := e.Next()
		if s, ok := e.Value.(*session); !ok {
			t.Error("an iteration has left something behind")
		} else if fixed[s.conn] {
			s.result = &Result{End: EndDone}
			a.exit(s)
			a.leave()
		}
		e = next
	}
}

func TestConnsHoldsNoLockInTheBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		var all []served
		for i := range 5 {
			all = append(all, serveFake(t.Context(), a, &Conn{ClientID: fmt.Sprint(i)}))
			synctest.Wait()
		}
		ids := ""
		for c := range a.Conns() {
			ids += c.ClientID
			if c.ClientID == "1" || c.ClientID == "3" {
				c.Abort(errKicked)
				<-all[int(c.ClientID[0]-'0')].result
			}
			a.Stats()
		}
		if ids != "01234" {
			t.Errorf("order %s, want the oldest first", ids)
		}
		ids = ""
		for c := range a.Conns() {
			ids += c.ClientID
		}
		if ids != "024" {
			t.Errorf("left are %s", ids)
		}
		conns := a.Conns()
		for c := range conns {
			c.Abort(nil)
			break
		}
		n := 0
		for range conns {
			n++
		}
		if n > 3 || n < 2 {
			t.Errorf("%d come in a second iteration", n)
		}
		for c := range a.Conns() {
			a.Close() // in the loop
			c.Abort(nil)
		}
		if s := a.Stats(); s.Ends[EndCanceled] < 3 || s.Open != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestConnsOmitsEndedConns(t *testing.T) {
	a, err := New("test", []Upstream{{Addr: "u:1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := a.begin(t.Context(), &Conn{Client: addrConn{}})
	s.accepted = true
	a.enter(s)
	s.endBy(&ending{EndNotAdmitted, errKicked})
	s.settle() // and still to be counted out
	for range a.Conns() {
		t.Error("one came that was rejected")
	}
	a.exit(s)
	a.leave()
}

func TestConnsOmitsConnsThatAreNotAdmitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "u:1")
		goOn := make(chan bool)
		come := comeFake(t, a, func(context.Context, *Conn) error {
			<-goOn
			return nil
		})
		c := come()
		synctest.Wait()
		for range a.Conns() {
			t.Error("one came that was not admitted")
		}
		goOn <- true
		synctest.Wait()
		n := 0
		for range a.Conns() {
			n++
		}
		if n != 1 {
			t.Errorf("%d come, want the one that was admitted", n)
		}
		c.Close()
	})
}

// A lock that is held for long would stop accepting. Each stretch is a bounded number of steps.
func TestConnsLooksAtAThousandUnderOneLock(t *testing.T) {
	a, err := New("test", []Upstream{{Addr: "u:1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer idleSessions(a, 3000)()
	n := 0
	for range a.walk() {
		if n++; n%1000 == 0 {
			// Those looked at under the last lock are before the marker.
			before := 0
			a.mu.Lock()
			for e := a.sessions.Front(); e.Value != nil; e = e.Next() {
				before++
			}
			a.mu.Unlock()
			if before > n {
				t.Fatalf("%d were looked at when %d had come", before, n)
			}
		}
	}
}

func TestResultTellsTheTimesAndTheConn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, results := newApp(t, Options{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				time.Sleep(time.Second)
				return dialFake(echoFake)(ctx, network, addr)
			}}, "u:1")
		start := time.Now()
		c := comeFake(t, a, func(_ context.Context, c *Conn) error {
			c.ClientAddr = &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 9}
			time.Sleep(2 * time.Second)
			return nil
		})()
		ping(t, c)
		time.Sleep(4 * time.Second)
		c.Close()
		r := <-results
		r.Conn = nil
		if want := (Result{
			App: "test", Client: "192.0.2.1:9", Upstream: "u:1", Attempts: 1, DialTime: time.Second,
			Start: start, Duration: 7 * time.Second, Sent: 1, Received: 1, End: EndDone,
		}); r != want {
			t.Errorf("%+v,\nwant %+v", r, want)
		}
	})
}

func TestResultIsAnAccessLog(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewJSONHandler(&log, nil))
	r := Result{
		Conn: new(Conn), App: "db", ClientID: "ann\n", Client: "192.0.2.1:9", Upstream: "u:1",
		Attempts: 2,
		Duration: 1500 * time.Millisecond, Sent: 3, Received: 4, End: EndClientError,
		Err: io.ErrUnexpectedEOF,
	}
	logger.Info("done", "conn", r)
	logger.Info("done", "conn", Result{App: "db", End: EndDone})
	var lines []map[string]any
	for d := json.NewDecoder(&log); d.More(); {
		var line map[string]any
		if err := d.Decode(&line); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line["conn"].(map[string]any))
	}
	for i, want := range []string{
		"map[app:db attempts:2 client:192.0.2.1:9 client_id:ann\n duration:1.5e+09 " +
			"end:client-error err:unexpected EOF received:4 sent:3 upstream:u:1]",
		"map[app:db attempts:0 client: duration:0 end:done received:0 sent:0 upstream:]",
	} {
		if got := fmt.Sprint(lines[i]); got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestEnumsHaveStrings(t *testing.T) {
	for want, v := range map[string]fmt.Stringer{
		"client-closed": EndClientClosed, "dialing": ConnDialing, "upload": Upload,
		"data":    EventData,
		"cooling": StateCooling, "idle": CloseNotifyIdle, "CloseNotify(9)": CloseNotify(9),
	} {
		if v.String() != want {
			t.Errorf("%q, want %q", v.String(), want)
		}
	}
}

// A Conn that a program keeps after its end must not keep the connection's memory.
func TestAKeptConnIsSmall(t *testing.T) {
	const most, conns = 512, 4_000
	serverTLS, clientTLS := tlsConfigs(t)
	handshake := HandshakeTLS(serverTLS, nil)
	for _, tc := range []struct {
		name  string
		admit AdmitFunc
		conns int
		most  int64
		dial  func(addr string) (net.Conn, error)
	}{
		{"plain", nil, conns, most, func(addr string) (net.Conn, error) {
			return net.Dial("tcp", addr)
		}},
		{"rejected", func(context.Context, *Conn) error { return errKicked }, conns / 10, most,
			func(addr string) (net.Conn, error) { return net.Dial("tcp", addr) }},
		// What crypto/tls says of the handshake stays, and its buffers, of 10 KiB and more, do not.
		{"TLS", handshake, 200, 6 << 10, func(addr string) (net.Conn, error) {
			return tlsDial(addr, clientTLS)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var mu sync.Mutex
			kept := make([]*Conn, 0, tc.conns)
			var done sync.WaitGroup
			a, err := New("test", []Upstream{{Addr: upstreamDoing(t, func(c *net.TCPConn) {})}},
				&Options{
					Logger: quiet,
					OnDone: func(r Result) {
						mu.Lock()
						defer mu.Unlock()
						kept = append(kept, r.Conn)
						done.Done()
					},
				})
			if err != nil {
				t.Fatal(err)
			}
			addr := serve(t, a, tc.admit)
			const atOnce = 64 // where portable, each that is rejected takes a second
			come := func(conns int) {
				var clients sync.WaitGroup
				var next atomic.Int32
				for range atOnce {
					clients.Go(func() {
						for next.Add(1) <= int32(conns) {
							done.Add(1)
							c, err := tc.dial(addr)
							if err != nil {
								continue // reset at once, and so served
							}
							io.Copy(io.Discard, c)
							c.Close()
						}
					})
				}
				clients.Wait()
				done.Wait()
			}
			come(atOnce) // what the runtime keeps of goroutines is made, and not counted
			mu.Lock()
			clear(kept)
			kept = kept[:0]
			mu.Unlock()
			before := proxytest.HeapInUse()
			come(tc.conns)
			a.Close()
			if grown := (proxytest.HeapInUse() - before) / int64(tc.conns); grown > tc.most {
				t.Errorf("a kept Conn takes %d bytes, want at most %d", grown, tc.most)
			} else {
				t.Logf("%d bytes", grown)
			}
			for _, c := range kept {
				if c.Client.RemoteAddr() == nil || c.Client.LocalAddr().String() != addr ||
					c.Info().State != ConnOver {
					t.Fatalf("%+v", c)
				}
				if s, ok := c.Client.(*TLSConn); ok &&
					(!s.ConnectionState().HandshakeComplete || s.NetConn() != nil) {
					t.Fatal("it does not know its handshake any more, or has not let go")
				}
			}
			if len(kept) != tc.conns ||
				strings.Contains(fmt.Sprintf("%T", kept[0].Client), "TCPConn") {
				t.Errorf("%d of %d, with a %T", len(kept), tc.conns, kept[0].Client)
			}
		})
	}
}
