package cluster

import (
	"fmt"
	"math"
	"strconv"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
)

// length is how long limits are measured: as long as docs/cluster.md says, or shorter.
func length() time.Duration {
	if testing.Short() {
		return 2 * time.Second
	}
	return 5 * time.Second
}

func sum(of []int) (n int) {
	for _, one := range of {
		n += one
	}
	return n
}

// Four processes share a limit. Each has three times as many connections to open as it may.
func TestFourProcessesShareALimit(t *testing.T) {
	const burst, rate = 100, 400
	for name, exact := range map[string]bool{"leased": false, "exact": true} {
		for demand, first := range map[string]float64{"even": 1, "skewed": 9} {
			t.Run(name+" "+demand, func(t *testing.T) {
				t.Parallel() // most of it is waiting
				j := job{
					URL: storetest.Redis(t).URL(), Peers: 4, Timeout: storetest.Patience,
					For:   length(),
					Limit: Limit{Burst: burst, Every: time.Second / rate, Exact: exact},
				}
				var proxies []proxy
				for _, part := range []float64{first, 1, 1, 1} {
					j.Rate = 1200 * part / (first + 3)
					proxies = append(proxies, start(t, j))
				}
				begin(t, proxies...)
				in, calls := 0, uint64(0)
				var last, held time.Duration
				var each []int
				for _, p := range proxies {
					got := p.share(t)
					each = append(each, sum(got.In))
					in += sum(got.In)
					last = max(last, got.Last)
					held += got.Held
					calls = max(calls, got.Status.Calls)
					if got.Status.Failures > 0 {
						t.Fatalf("calls failed: %+v", got.Status)
					}
				}
				allowed := burst + rate*last.Seconds()
				t.Logf("%d of %.0f let in (%.3f): %v; at most %d calls by one proxy, in %v; "+
					"the machine held them up for %v",
					in, allowed, float64(in)/allowed, each, calls, length(), held)
				// Borrowed openings that are unused at the end are missing.
				least := 0.95
				if testing.Short() {
					least = 0.9
				}
				least *= burst + rate*(min(last, length())-min(held, length())).Seconds()
				if float64(in) > allowed*1.01 || float64(in) < least {
					t.Errorf("%d let in, of %.0f", in, allowed)
				}
				// A tick every 100 ms may give back, and after a refusal nobody asks for as long.
				if most := uint64(20 * (length().Seconds() + 1)); !exact && calls > most {
					t.Errorf("%d calls by one proxy, want at most %d", calls, most)
				}
			})
		}
	}
}

func TestFourProcessesShareBandwidth(t *testing.T) {
	t.Parallel()
	const rate = 20 << 20
	j := job{URL: storetest.Redis(t).URL(), Peers: 4, Timeout: storetest.Patience,
		For: length(), Limit: Limit{BytesPerSecond: rate}}
	var proxies []proxy
	for _, n := range []int{4, 1, 1, 1} {
		j.Streams = n
		proxies = append(proxies, start(t, j))
	}
	begin(t, proxies...)
	var each []float64
	total, lost := 0.0, 0.0
	for _, p := range proxies {
		got := p.share(t)
		each = append(each, float64(got.Bytes)/length().Seconds()/rate)
		total += each[len(each)-1]
		lost += got.Held.Seconds() / length().Seconds()
		if most := uint64(15*length().Seconds() + 15); got.Status.Calls > most {
			t.Errorf("%d calls, want at most %d", got.Status.Calls, most)
		}
	}
	t.Logf("%.3f of the rate: %.3f; the machine held them up for %.3f of the time",
		total, each, lost)
	// The last bytes are not yet charged at the end: about 0.1 s of the rate.
	if total < 0.93-lost || total > 1.01+0.1/length().Seconds() {
		t.Errorf("%.3f of the rate", total)
	}
	for _, part := range each {
		if part < 0.20-lost || part > 0.30+lost {
			t.Errorf("%.3f of the rate for one of four: %.3f", part, each)
		}
	}
}

// The places of a killed process are free within 7 s, and never are more than 10 taken.
func TestOpenLimitOutlivesAKilledProcess(t *testing.T) {
	t.Parallel()
	server := storetest.Redis(t)
	base := job{URL: server.URL(), Peers: 4, Timeout: storetest.Patience, Limit: Limit{Open: 10}}
	base.Hold = 4
	dying := start(t, base)
	begin(t, dying)
	for range 4 {
		dying.line(t)
	}
	base.Hold = 3
	others := []proxy{start(t, base), start(t, base)}
	begin(t, others...)
	for _, p := range others {
		for range 3 {
			p.line(t)
		}
	}
	s, _ := dial(t, server.URL(), calm)
	m := s.Limit("shared", base.Limit)
	report(t, m, 0)
	dying.cmd.Process.Kill()
	began := time.Now()
	in := 0
	storetest.Await(t, "the killed one's are free", func() error {
		in += count(t, 1, m)
		return storetest.Want(in >= 4, strconv.Itoa(in))
	})
	d := time.Since(began)
	if in += count(t, 10, m); in != 4 {
		t.Errorf("%d more let in, want 4", in)
	}
	t.Log("free after", d)
	if d < 3*time.Second { // 6 less the 2 s in which it told its number last, and a second
		t.Errorf("free after %v: it may have been alive", d)
	} else if d > 7*time.Second && !testing.Short() {
		t.Errorf("free after %v, want 7 s at most", d)
	}
}

// The store is killed and frozen under load, and comes back. docs/cluster.md has the promises.
func TestStoreGoesAndComesBack(t *testing.T) {
	const before, gone, after = time.Second, time.Second, 2 * time.Second
	for _, how := range []string{"killed", "frozen"} {
		for _, outage := range []Outage{Share, Open, Closed} {
			t.Run(fmt.Sprint(how, " ", outage), func(t *testing.T) {
				t.Parallel()
				server := storetest.Redis(t)
				p := start(t, job{URL: server.URL(), Peers: 4, For: before + gone + after, Rate: 400,
					Limit: Limit{Burst: 100, Every: time.Second / 200, Outage: outage}})
				began := begin(t, p)
				time.Sleep(time.Until(began.Add(before)))
				goes, comes := server.Kill, server.Start
				if how == "frozen" {
					goes, comes = server.Freeze, server.Thaw
				}
				goes()
				away := time.Since(began)
				time.Sleep(gone)
				back := time.Since(began)
				comes()
				judge(t, outage, p.share(t), away, back)
			})
		}
	}
}

// judge checks a proxy's openings during an outage: in the quarters of a second that lie wholly in
// it, and in those that begin half a second after its end. A busy machine delays some openings.
func judge(t *testing.T, o Outage, got share, away, back time.Duration) {
	t.Helper()
	const quarter, end = 250 * time.Millisecond, 4 * time.Second
	t.Logf("%v; longest open %v, %d timeouts; the machine held it up for %v",
		got.In[:end/quarter], got.Longest, got.Status.Timeouts, got.Late)
	// A wait longer than the timeout would last for the whole outage, or until a connection fails.
	if most := 500*time.Millisecond + 2*got.Late; got.Longest > most {
		t.Errorf("an open took %v, want %v at most", got.Longest, most)
	}
	within := func(from, to time.Duration) (in int) {
		for q := from / quarter; q < to/quarter; q++ {
			in += got.In[q]
		}
		return in
	}
	check := func(what string, from, to time.Duration, rate, exact float64) {
		t.Helper()
		from = (from + quarter - 1).Truncate(quarter)
		in, want := float64(within(from, to)), rate*(to.Truncate(quarter)-from).Seconds()
		if off := want*exact + rate*got.Held.Seconds(); from >= to || math.Abs(in-want) > off {
			t.Errorf("%s: %v let in, want %v, give or take %v", what, in, want, off)
		}
	}
	rate := map[Outage]float64{Share: 50, Open: 400, Closed: 0}[o]
	check("without the store", away+60*time.Millisecond, back, rate, 0.3)
	if alone := int(got.Status.Alone); alone > within(away, back+quarter) {
		return // the store was so slow after its return that it counted as away again
	}
	check("after its return", back+500*time.Millisecond, end, 200, 0.2)
}

// Some proxies reach the store and some do not: together they admit no more than the limit and one
// burst.
func TestPartition(t *testing.T) {
	t.Parallel()
	server := storetest.Redis(t)
	l := Limit{Burst: 40, Every: never}
	var seeing, blind []lbproxy.RateLimitManager
	for range 2 {
		s, _ := dial(t, server.URL(), &Options{Timeout: storetest.Patience, Peers: 4})
		seeing = append(seeing, s.Limit("k", l))
		wire := storetest.NewWire(t, server.Addr)
		b, _ := dial(t, wire.URL(), &Options{Peers: 4})
		m := b.Limit("k", l)
		blind = append(blind, m)
		wire.Cut()
		storetest.Await(t, "the partition is seen", func() error {
			b.Ping(t.Context())
			return storetest.Want(!b.Status().Connected, "connected")
		})
	}
	in := 0
	for _, m := range blind {
		if n := count(t, 100, m); n != 10 {
			t.Errorf("%d let in by a blind one, want its part of 10", n)
		} else {
			in += n
		}
	}
	storetest.Await(t, "the others have it all", func() error {
		for _, m := range seeing {
			in += count(t, 1, m)
		}
		return storetest.Want(in >= 60, strconv.Itoa(in))
	})
	for _, m := range append(seeing, blind...) {
		in += count(t, 10, m)
	}
	if in > 2*l.Burst {
		t.Errorf("%d let in", in)
	}
}
