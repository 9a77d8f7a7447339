package lbproxy

import (
	"container/heap"
	"container/list"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var balancerSeed = flag.Uint64("balancer.seed", 0,
	"seed of the balancer's random test; 0 means a new one each time")

// A balFarm is a balancer with a clock and the verdict of a dial to each upstream, works by
// default.
type balFarm struct {
	balancer
	now  time.Time
	says map[string]verdict
}

const balFail = 10 * time.Second

func newBalFarm(upstreams ...Upstream) *balFarm {
	f := &balFarm{now: time.Unix(1_000_000_000, 0), says: map[string]verdict{}}
	f.failTimeout = balFail
	f.setUpstreams(upstreams...)
	return f
}

// balNamed returns upstreams "a:1", "b:1" and so on.
func balNamed(n int) []Upstream {
	us := make([]Upstream, n)
	for i := range us {
		us[i].Addr = string(rune('a'+i)) + ":1"
	}
	return us
}

func (f *balFarm) setUpstreams(upstreams ...Upstream) {
	confs := slices.Clone(upstreams)
	for i := range confs {
		confs[i].Weight = max(confs[i].Weight, 1)
	}
	f.set(confs, f.now)
}

// mark records that health checks found an upstream down, or up again.
func (f *balFarm) mark(addr string, down bool) {
	if down {
		f.markDown(f.find(addr), errSick, f.now)
	} else {
		f.markUp(f.find(addr), f.now)
	}
}

// acquire is the balancer's acquire for tests that need no error.
func (f *balFarm) acquire(tried map[*upstream]bool, now time.Time) (*upstream, *Upstream) {
	p, _ := f.balancer.acquire(&search{tried: tried}, now)
	return p.u, p.conf
}

// settle is the balancer's settle, with errSick for a failure.
func (f *balFarm) settle(u *upstream, v verdict, now time.Time) (changed bool) {
	return f.balancer.settle(u, v, balErr(v), now)
}

func balErr(v verdict) error {
	if v == works {
		return nil
	}
	return errSick
}

// find returns the upstream of the current set with that Addr.
func (f *balFarm) find(addr string) *upstream {
	i := slices.IndexFunc(f.heap, func(u *upstream) bool { return u.conf.Addr == addr })
	return f.heap[i]
}

// take picks an upstream that works, for a connection that stays open.
func (f *balFarm) take() string {
	u, conf := f.acquire(nil, f.now)
	if u == nil {
		return "none"
	}
	f.settle(u, works, f.now)
	return conf.Addr
}

func (f *balFarm) takes(n int) (addrs []string) {
	for range n {
		addrs = append(addrs, f.take())
	}
	return addrs
}

// begin counts a connection on that upstream, whatever the load of the others.
func (f *balFarm) begin(addr string) *upstream {
	others := map[*upstream]bool{}
	for _, u := range f.heap {
		others[u] = u.conf.Addr != addr
	}
	u, _ := f.acquire(others, f.now)
	if u == nil {
		panic(addr + " is full")
	}
	return u
}

// fill opens n connections on an upstream without a verdict.
func (f *balFarm) fill(addr string, n int) {
	for range n {
		f.settle(f.begin(addr), unknown, f.now)
	}
}

// fail makes a dial to an upstream fail.
func (f *balFarm) fail(addr string) {
	u := f.begin(addr)
	f.settle(u, fails, f.now)
	f.release(u)
}

// dial does what a session does until it is connected or nothing is left to try. It returns the
// upstream it is connected to (or nil) and those that it tried.
func (f *balFarm) dial() (u *upstream, tried []string) {
	seen := map[*upstream]bool{}
	for {
		u, conf := f.acquire(seen, f.now)
		if u == nil {
			return nil, tried
		}
		tried = append(tried, conf.Addr)
		v, told := f.says[conf.Addr]
		if !told {
			v = works
		}
		f.settle(u, v, f.now)
		if v == works {
			return u, tried
		}
		f.release(u)
		seen[u] = true
	}
}

// connect is dial for a connection that ends at once.
func (f *balFarm) connect() string {
	u, tried := f.dial()
	if u != nil {
		f.release(u)
	}
	return strings.Join(tried, " ")
}

func (f *balFarm) state(addr string) string {
	for _, s := range f.stats() {
		switch {
		case s.Addr != addr:
		case s.Removed:
			return "removed"
		default:
			return string(s.State)
		}
	}
	return "gone"
}

func wantBal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func TestLeastLoadedIsChosenAndTiesGoInSliceOrder(t *testing.T) {
	for _, tt := range []struct {
		name      string
		upstreams []Upstream
		open      []int
		want      string
	}{
		{"equal ones take turns in slice order",
			[]Upstream{{Addr: "a"}, {Addr: "b"}, {Addr: "c"}}, []int{0, 0, 0}, "a b c a b c"},
		{"the slice decides, not the name",
			[]Upstream{{Addr: "c"}, {Addr: "a"}, {Addr: "b"}}, []int{0, 0, 0}, "c a b c a b"},
		{"the emptiest until it is level",
			[]Upstream{{Addr: "a"}, {Addr: "b"}, {Addr: "c"}}, []int{3, 1, 2}, "b b c a b c"},
		{"weight 2 gets twice as many, and at a tie the earlier is first", // 1/1 1/2; 2/2 is 1/1
			[]Upstream{{Addr: "a"}, {Addr: "b", Weight: 2}}, []int{0, 0}, "b a b b a b"},
		{"the load is what it would be, not what it is", // 2/10 before 1/1, though 0 < 1/10
			[]Upstream{{Addr: "a"}, {Addr: "b", Weight: 10}}, []int{0, 1}, "b b b b b b b b a b"},
		{"weights are compared exactly", // 3/3 is 1/1, 1000/999 is more
			[]Upstream{{Addr: "a", Weight: 999}, {Addr: "b", Weight: 3}, {Addr: "c"}},
			[]int{999, 2, 0},
			"b c a a a a"},
		{"a full one is passed over",
			[]Upstream{{Addr: "a", MaxConns: 2}, {Addr: "b", MaxConns: 3}, {Addr: "c"}},
			[]int{0, 0, 5},
			"a b a b b c c"},
		{"when all are full there is none",
			[]Upstream{{Addr: "a", MaxConns: 1}, {Addr: "b", Weight: 9, MaxConns: 2}}, []int{0, 0},
			"b b a none none"},
		{"a single one gets everything",
			[]Upstream{{Addr: "a", MaxConns: 2}}, []int{0}, "a a none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newBalFarm(tt.upstreams...)
			for i, n := range tt.open {
				f.fill(tt.upstreams[i].Addr, n)
			}
			want := strings.Fields(tt.want)
			wantBal(t, "chosen", f.takes(len(want)), want)
		})
	}
}

func TestFullUpstreamIsChosenAgainAfterARelease(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a", MaxConns: 1}, Upstream{Addr: "b", MaxConns: 1})
	wantBal(t, "chosen", f.takes(3), []string{"a", "b", "none"})
	f.release(f.find("b"))
	wantBal(t, "chosen", f.takes(2), []string{"b", "none"})
}

func TestConcurrentPicksDifferByAtMostOne(t *testing.T) {
	// 102,400 picks in many rounds, because later picks even out earlier ones
	const pickers, each, rounds = 64, 4, 400
	for n := range rounds {
		f := newBalFarm(balNamed(2 + n%9)...)
		held := make([][]*upstream, pickers)
		var wg sync.WaitGroup
		for i := range held {
			wg.Go(func() {
				for range each {
					u, _ := f.acquire(nil, f.now)
					held[i] = append(held[i], u)
					f.settle(u, works, f.now)
				}
			})
		}
		wg.Wait()
		least, most, sum := 1<<30, 0, 0
		for _, s := range f.stats() {
			least, most, sum = min(least, s.Open), max(most, s.Open), sum+s.Open
		}
		if most-least > 1 || sum != pickers*each {
			t.Fatalf("after %d equal connections to %d upstreams: %d to %d on each, %d in all",
				pickers*each, len(f.heap), least, most, sum)
		}
		for _, us := range held {
			wg.Go(func() {
				for _, u := range us {
					f.release(u)
				}
			})
		}
		wg.Wait()
		for _, s := range f.stats() {
			wantBal(t, "open when all are over", s.Open, 0)
		}
	}
}

func TestFailedUpstreamCoolsUntilOneTrialDecides(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.says["a:1"] = fails
	wantBal(t, "first connection", f.connect(), "a:1 b:1")
	wantBal(t, "state", f.state("a:1"), "cooling")

	f.now = f.now.Add(balFail - 1)
	wantBal(t, "just before its time", f.takes(5), []string{"b:1", "b:1", "b:1", "b:1", "b:1"})

	f.now = f.now.Add(1)
	trial, _ := f.acquire(nil, f.now)
	wantBal(t, "trial", trial.conf.Addr, "a:1")
	wantBal(t, "while that is dialling", f.takes(3), []string{"b:1", "b:1", "b:1"})
	f.now = f.now.Add(time.Minute)
	wantBal(t, "however long it takes", f.takes(3), []string{"b:1", "b:1", "b:1"})
	wantBal(t, "state on trial", f.state("a:1"), "cooling")

	wantBal(t, "a failed trial changes its standing", f.settle(trial, fails, f.now), false)
	f.release(trial)
	f.now = f.now.Add(balFail - 1)
	wantBal(t, "cooling again", f.take(), "b:1")

	f.now = f.now.Add(1)
	f.says["a:1"] = works
	wantBal(t, "second trial", f.connect(), "a:1")
	wantBal(t, "state when it succeeded", f.state("a:1"), "up")
	wantBal(t, "at once", f.connect(), "a:1")
	wantBal(t, "dials failed", f.find("a:1").failed, 2)
}

func TestSettleReportsFailureAndRecoveryOnce(t *testing.T) {
	f := newBalFarm(balNamed(1)...)
	u := f.find("a:1")
	for i, step := range []struct {
		v    verdict
		want bool
	}{
		{works, false}, {fails, true}, {fails, false}, {unknown, false}, {works, true},
		{works, false},
		{unknown, false}, {fails, true},
	} {
		f.acquire(nil, f.now)
		wantBal(t, fmt.Sprintf("step %d changed", i), f.settle(u, step.v, f.now), step.want)
	}
}

func TestInconclusiveTrialIsRepeated(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.says["a:1"] = fails
	f.connect()
	f.now = f.now.Add(balFail)
	for range 3 {
		trial, _ := f.acquire(nil, f.now)
		wantBal(t, "trial", trial.conf.Addr, "a:1")
		wantBal(t, "meanwhile", f.take(), "b:1")
		f.settle(trial, unknown, f.now)
		f.release(trial)
	}
	f.says["a:1"] = works
	wantBal(t, "the one that tells", f.connect(), "a:1")
	wantBal(t, "state", f.state("a:1"), "up")
}

func TestOneTrialAtATime(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.fill("b:1", 5)
	slow := f.begin("a:1") // dials for longer than the cooling takes
	f.fail("a:1")
	f.now = f.now.Add(balFail)
	trial, _ := f.acquire(nil, f.now)
	wantBal(t, "trial", trial.conf.Addr, "a:1")
	f.settle(slow, unknown, f.now) // its client is gone
	f.release(slow)
	wantBal(t, "while the trial is dialling", f.takes(3), []string{"b:1", "b:1", "b:1"})
	f.settle(trial, unknown, f.now)
	f.release(trial)
	wantBal(t, "the next trial", f.take(), "a:1")
}

func TestAllCoolingTriesLongestFailedFirst(t *testing.T) {
	f := newBalFarm(balNamed(4)...)
	for _, u := range f.heap {
		f.says[u.conf.Addr] = fails
	}
	f.fill("c:1", 2) // the load does not matter among failed upstreams
	wantBal(t, "the first", f.connect(), "a:1 b:1 d:1 c:1")
	f.now = f.now.Add(time.Second)
	f.fail("b:1")
	f.now = f.now.Add(time.Second)
	f.fail("d:1")
	f.now = f.now.Add(time.Second)
	// a before c: failed at once, but less loaded
	wantBal(t, "the next", f.connect(), "a:1 c:1 b:1 d:1")
	f.now = f.now.Add(time.Second)
	f.says["b:1"] = works
	wantBal(t, "one is back", f.connect(), "a:1 b:1") // all had failed at once again
	wantBal(t, "and is used", f.connect(), "b:1")
}

func TestFullCoolingUpstreamIsNotTried(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a:1", MaxConns: 1}, Upstream{Addr: "b:1"})
	f.settle(f.begin("a:1"), fails, f.now) // and has not been released yet
	f.says["b:1"] = fails
	wantBal(t, "tried", f.connect(), "b:1")
}

func TestNegativeFailTimeoutSkipsNoUpstream(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.failTimeout = -1
	f.says["a:1"] = fails
	for range 10 {
		wantBal(t, "tried", f.connect(), "a:1 b:1")
	}
	wantBal(t, "state", f.state("a:1"), "up")
	wantBal(t, "dials failed", f.find("a:1").failed, 10)
}

func TestRefusingUpstreamIsTriedOncePerFailTimeout(t *testing.T) {
	const picks, step = 100_000, time.Millisecond
	f := newBalFarm(balNamed(3)...)
	f.says["b:1"] = fails
	var live []*upstream
	start, attempts := f.now, 0
	for i := range picks {
		u, tried := f.dial()
		if u == nil {
			t.Fatalf("connection %d was not served: %v", i, tried)
		}
		slices.Sort(tried)
		if len(slices.Compact(slices.Clone(tried))) != len(tried) {
			t.Fatalf("connection %d tried one upstream twice: %v", i, tried)
		}
		if slices.Contains(tried, "b:1") {
			attempts++
		}
		if live = append(live, u); len(live) > 50 {
			f.release(live[0])
			live = live[1:]
		}
		f.now = f.now.Add(step)
	}
	most := int(f.now.Sub(start)/balFail) + 1
	if attempts > most || attempts < most-2 {
		t.Errorf("%d attempts at it in %v, want about %d and no more", attempts,
			f.now.Sub(start), most)
	}
	wantBal(t, "dials failed", f.find("b:1").failed, uint64(attempts))
}

// A recovered upstream gets at most 50 of the first 100 connections after its trial, and every
// second one from then on, until another upstream is as little loaded. It is not starved, either.
func TestSlowStartGivesAtMostEverySecondConnection(t *testing.T) {
	const most, first = 50, 100
	for _, weight := range []int{1, 1000} {
		f := newBalFarm(Upstream{Addr: "a:1", Weight: weight}, Upstream{Addr: "b:1"},
			Upstream{Addr: "c:1"})
		f.fill("b:1", 200)
		f.fill("c:1", 200)
		f.says["a:1"] = fails
		f.connect()
		f.now = f.now.Add(balFail)
		f.says["a:1"] = works
		wantBal(t, "trial", f.connect(), "a:1")

		got := f.takes(first)
		share := 0
		for i, addr := range got {
			if addr == "a:1" {
				share++
				if i > 0 && got[i-1] == addr {
					t.Fatalf("it got connections %d and %d", i-1, i)
				}
			}
		}
		wantBal(t, fmt.Sprintf("its share of the first %d", first), share, most)
	}
}

func TestSlowStartEndsWhenTheUpstreamIsLevel(t *testing.T) {
	f := newBalFarm(balNamed(3)...)
	f.fill("b:1", 4)
	f.fill("c:1", 4)
	f.says["a:1"] = fails
	f.connect()
	f.now = f.now.Add(balFail)
	f.says["a:1"] = works
	wantBal(t, "trial and picks", f.takes(1+8),
		[]string{"a:1", "a:1", "b:1", "a:1", "c:1", "a:1", "b:1", "a:1", "c:1"}) // now 5 6 6
	// 6 6 6, where a is still first; then 7 7 7
	wantBal(t, "picks", f.takes(4), []string{"a:1", "b:1", "a:1", "c:1"})
	for range 5 {
		f.release(f.find("a:1"))
	}
	wantBal(t, "plain least connections", f.takes(5), []string{"a:1", "a:1", "a:1", "a:1", "a:1"})
}

func TestSlowStartHoldsWhileOthersRecoverToo(t *testing.T) {
	for _, second := range []verdict{fails, works} {
		f := newBalFarm(balNamed(3)...)
		f.fill("c:1", 200)
		f.says["a:1"], f.says["b:1"] = fails, fails
		wantBal(t, "a and b are gone", f.connect(), "a:1 b:1 c:1")
		f.now = f.now.Add(balFail)
		f.says["a:1"], f.says["b:1"] = works, second
		wantBal(t, "a's trial", f.connect(), "a:1")
		wantBal(t, "first", f.take(), "a:1") // b's trial is due, too, and b as little loaded
		f.connect()
		wantBal(t, "b works", f.state("b:1") == "up", second == works)
		f.takes(4)
		f.fail("b:1") // for good
		share := 0
		for _, addr := range f.takes(100) {
			if addr == "a:1" {
				share++
			}
		}
		wantBal(t, "a's share of 100", share, 50)
	}
}

func TestSetUpstreamsDoesNotShortenSlowStart(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.fill("b:1", 100)
	f.says["a:1"] = fails
	f.connect()
	f.now = f.now.Add(balFail)
	f.says["a:1"] = works
	wantBal(t, "trial", f.connect(), "a:1")
	for i := range 20 {
		wantBal(t, "chosen", f.take(), []string{"a:1", "b:1"}[i%2])
		f.setUpstreams(balNamed(2)...)
	}
}

func TestSlowStartIsPreferredToCooling(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a:1"}, Upstream{Addr: "b:1", MaxConns: 1},
		Upstream{Addr: "c:1"})
	f.says["a:1"] = fails
	f.says["c:1"] = fails
	wantBal(t, "first", f.connect(), "a:1 b:1") // a tie: b before c
	f.fill("b:1", 1)
	f.now = f.now.Add(balFail)
	f.fail("c:1")
	f.says["a:1"] = works
	f.fill("c:1", 3)
	wantBal(t, "trial and picks", f.takes(4), []string{"a:1", "a:1", "a:1", "a:1"})
}

func TestLocalErrorDoesNotCoolAnUpstream(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.says["a:1"] = unknown
	for range 100 {
		wantBal(t, "tried", f.connect(), "a:1 b:1")
	}
	wantBal(t, "state", f.state("a:1"), "up")
	wantBal(t, "dials failed", f.find("a:1").failed, 0)
	wantBal(t, "chosen", f.find("a:1").total, 100)
}

func TestInconclusiveDialDoesNotEndCooling(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	u, _ := f.acquire(nil, f.now) // dials a for long
	f.says["a:1"] = fails
	f.fill("b:1", 5)
	wantBal(t, "tried", f.connect(), "a:1 b:1")
	f.settle(u, unknown, f.now)
	wantBal(t, "state", f.state("a:1"), "cooling")
	wantBal(t, "chosen", f.take(), "b:1")
}

func TestDownUpstreamIsNeverChosen(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a:1"}, Upstream{Addr: "b:1", MaxConns: 3})
	f.mark("a:1", true)
	wantBal(t, "state", f.state("a:1"), "down")
	wantBal(t, "chosen", f.takes(2), []string{"b:1", "b:1"})
	f.fail("b:1")
	wantBal(t, "b cools", f.state("b:1"), "cooling")
	wantBal(t, "the last resort, then none", f.takes(2), []string{"b:1", "none"})
	f.release(f.find("b:1"))
	f.mark("b:1", true)
	f.now = f.now.Add(time.Hour)
	wantBal(t, "all are down", f.takes(2), []string{"none", "none"})
	f.mark("a:1", false)
	wantBal(t, "state", f.state("a:1"), "up")
	wantBal(t, "up again", f.takes(2), []string{"a:1", "a:1"})
}

func TestDialsDoNotChangeTheDownState(t *testing.T) {
	for _, before := range []string{"up", "cooling", "due", "on trial"} {
		for _, v := range []verdict{works, fails, unknown} {
			f := newBalFarm(balNamed(2)...)
			f.fill("b:1", 5)
			dials := []*upstream{f.begin("a:1")}
			if before != "up" {
				f.fail("a:1")
			}
			if before == "due" || before == "on trial" {
				f.now = f.now.Add(balFail)
				f.begin("b:1") // which notices
			}
			if before == "on trial" {
				dials = append(dials, f.begin("a:1"))
			}
			f.mark("a:1", true)
			wantBal(t, "waiting to recover", f.cooling.Len(), 0)
			for _, u := range dials {
				wantBal(t, "a dial that began before changes its standing",
					f.settle(u, v, f.now), false)
				f.release(u)
			}
			f.now = f.now.Add(balFail)
			wantBal(t, "chosen", f.take(), "b:1")
			wantBal(t, "state", f.state("a:1"), "down")
			f.mark("a:1", false)
			wantBal(t, "state", f.state("a:1"), "up")
			wantBal(t, "chosen", f.take(), "a:1")
		}
	}
}

func TestUpstreamFoundUpAgainIsInSlowStart(t *testing.T) {
	f := newBalFarm(balNamed(3)...)
	f.mark("a:1", true)
	f.takes(400)
	f.mark("a:1", false)
	for i, addr := range f.takes(100) {
		wantBal(t, fmt.Sprintf("connection %d is a's", i), addr == "a:1", i%2 == 0)
	}
}

func TestDownStateSurvivesSetUpstreamsButNotRemoval(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.fill("a:1", 2)
	f.mark("a:1", true)
	f.setUpstreams(Upstream{Addr: "c:1"}, Upstream{Addr: "a:1", Weight: 9})
	wantBal(t, "state", f.state("a:1"), "down")
	wantBal(t, "chosen", f.takes(2), []string{"c:1", "c:1"})
	f.setUpstreams(Upstream{Addr: "c:1"})
	wantBal(t, "state", f.state("a:1"), "removed")
	f.setUpstreams(balNamed(2)...)
	wantBal(t, "state", f.state("a:1"), "up")
	wantBal(t, "open", f.find("a:1").open, 2)
}

func TestSetUpstreamsKeepsStateAndCounters(t *testing.T) {
	f := newBalFarm(balNamed(3)...)
	f.fill("a:1", 3)
	f.fill("b:1", 2)
	f.says["c:1"] = fails
	f.connect()
	f.find("a:1").sent.Add(7)
	f.find("b:1").received.Add(9)
	before := f.stats()
	f.setUpstreams(balNamed(4)...)
	after := f.stats()
	wantBal(t, "the kept ones", after[:3], before)
	wantBal(t, "the new one", after[3],
		UpstreamStats{Addr: "d:1", Weight: 1, State: StateUp, Since: f.now})
	wantBal(t, "chosen: c still cools", f.takes(3), []string{"d:1", "d:1", "b:1"})

	f.now = f.now.Add(balFail)
	f.says["c:1"] = works
	wantBal(t, "its trial is due when it was", f.connect(), "c:1")
}

func TestRemovedUpstreamDrains(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	var old []*upstream
	for range 3 {
		old = append(old, f.begin("a:1"))
	}
	f.setUpstreams(Upstream{Addr: "b:1"}, Upstream{Addr: "c:1"})
	wantBal(t, "chosen", f.takes(2), []string{"b:1", "c:1"})
	for n := 3; n > 0; n-- {
		wantBal(t, "stats", f.stats()[2:], []UpstreamStats{
			{Addr: "a:1", Weight: 1, Open: n, Total: 3, State: StateUp, Since: f.now,
				Removed: true},
		})
		f.release(old[n-1])
	}
	wantBal(t, "drained", f.state("a:1"), "gone")
	wantBal(t, "what is left", len(f.removed), 0)
	wantBal(t, "open on the others", []int{f.stats()[0].Open, f.stats()[1].Open}, []int{1, 1})

	f.setUpstreams(Upstream{Addr: "a:1"})
	wantBal(t, "as new", f.stats()[0],
		UpstreamStats{Addr: "a:1", Weight: 1, State: StateUp, Since: f.now})
}

func TestUpstreamRemovedWhileIdleIsGoneAtOnce(t *testing.T) {
	f := newBalFarm(balNamed(3)...)
	f.says["b:1"] = fails
	f.fill("a:1", 1)
	f.connect() // b cools
	f.setUpstreams(balNamed(1)...)
	wantBal(t, "b", f.state("b:1"), "gone")
	wantBal(t, "waiting to recover", f.cooling.Len(), 0)
	f.now = f.now.Add(balFail)
	wantBal(t, "chosen", f.takes(2), []string{"a:1", "a:1"})
	f.setUpstreams(balNamed(2)...)
	again := f.stats()[1]
	wantBal(t, "counters of a new upstream", []uint64{again.Total, again.Failed}, []uint64{0, 0})
}

func TestUpstreamAddedAgainKeepsItsConnections(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	u, _ := f.acquire(nil, f.now)
	f.acquire(nil, f.now)
	f.setUpstreams(Upstream{Addr: "b:1"})
	f.setUpstreams(Upstream{Addr: "b:1"}, Upstream{Addr: "c:1"}) // again, while a drains
	wantBal(t, "state", f.state("a:1"), "removed")
	f.setUpstreams(balNamed(2)...)
	if f.find("a:1") != u {
		t.Fatal("it is another one")
	}
	wantBal(t, "open", f.stats()[0].Open, 1)
	wantBal(t, "c", f.state("c:1"), "gone")
	wantBal(t, "chosen", f.takes(2), []string{"a:1", "b:1"})
	f.release(u)
	f.release(u)
	wantBal(t, "open", f.stats()[0].Open, 0)
}

func TestDialOfARemovedUpstreamChangesNothing(t *testing.T) {
	for _, v := range []verdict{works, fails, unknown} {
		f := newBalFarm(balNamed(2)...)
		f.says["a:1"] = fails
		f.connect()
		f.now = f.now.Add(balFail)
		trial, _ := f.acquire(nil, f.now)
		f.setUpstreams(Upstream{Addr: "b:1"})
		wantBal(t, "changed", f.settle(trial, v, f.now), false)
		wantBal(t, "state", f.state("a:1"), "removed")
		wantBal(t, "waiting to recover", f.cooling.Len(), 0)
		f.release(trial)
		wantBal(t, "chosen", f.takes(2), []string{"b:1", "b:1"})
	}
}

func TestChangedWeightMaxConnsAndOrderApply(t *testing.T) {
	a, b := Upstream{Addr: "a"}, Upstream{Addr: "b"}
	f := newBalFarm(a, b)
	wantBal(t, "equal", f.takes(2), []string{"a", "b"})

	b.Weight = 4
	f.setUpstreams(a, b)
	// 2/1 8/4: a tie at last
	wantBal(t, "b has four times the weight", f.takes(7),
		[]string{"b", "b", "b", "b", "b", "b", "a"})

	b.MaxConns = 3
	f.setUpstreams(a, b)
	wantBal(t, "b has more than it may", f.takes(2), []string{"a", "a"})
	for range 4 {
		f.release(f.find("b"))
	}
	wantBal(t, "it is still full", f.take(), "a")
	f.release(f.find("b"))
	wantBal(t, "now there is room for one", f.takes(2), []string{"b", "a"})

	for f.find("a").open > 3 {
		f.release(f.find("a"))
	}
	f.setUpstreams(Upstream{Addr: "b"}, a)
	wantBal(t, "a tie, and b is first now", f.takes(3), []string{"b", "a", "b"})
	wantBal(t, "stats in slice order", []string{f.stats()[0].Addr, f.stats()[1].Addr},
		[]string{"b", "a"})
}

func TestStatsListRemovedUpstreamsLastByAddr(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "z"}, Upstream{Addr: "m"}, Upstream{Addr: "k"},
		Upstream{Addr: "b"})
	f.takes(4)
	f.setUpstreams(Upstream{Addr: "x"}, Upstream{Addr: "b"})
	var addrs []string
	for _, s := range f.stats() {
		addrs = append(addrs, s.Addr)
	}
	wantBal(t, "order", addrs, []string{"x", "b", "k", "m", "z"})
}

func TestExtraReleasePanics(t *testing.T) {
	f := newBalFarm(balNamed(1)...)
	f.take()
	u := f.find("a:1")
	f.release(u)
	defer func() {
		if p := fmt.Sprint(recover()); !strings.Contains(p, "a:1") {
			t.Errorf("panic: %v, want one that names the upstream", p)
		}
		wantBal(t, "the lock is free and the count unharmed", f.take(), "a:1")
	}()
	f.release(u)
}

func TestHugeCountsAndWeightsDoNotOverflow(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a", Weight: 1_000_000}, Upstream{Addr: "b", Weight: 1_000_000})
	f.find("a").open = 1<<31 - 3
	f.find("b").open = 1<<31 - 4
	f.set([]Upstream{*f.find("a").conf, *f.find("b").conf}, f.now)
	wantBal(t, "chosen", f.takes(2), []string{"b", "a"})
}

func TestSetPeersRejectsBadValuesByName(t *testing.T) {
	a, _ := newApp(t, Options{}, "10.0.0.1:1", "10.0.0.2:1")
	if err := a.SetPeers(Peers{Index: 1, Count: 2,
		Bias: map[string]float64{"10.0.0.2:1": 3}}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		peers Peers
		want  string
	}{
		{Peers{Count: -1}, "Peers.Count -1 is negative"},
		{Peers{Index: 1}, "Peers.Index 1: want 0 to 0, as Count is 0"},
		{Peers{Index: 3, Count: 3}, "Peers.Index 3: want 0 to 2, as Count is 3"},
		{Peers{Index: -1, Count: 3}, "Peers.Index -1: want 0 to 2"},
		{Peers{Count: 2, Bias: map[string]float64{"a:1": -0.5}},
			`Peers.Bias["a:1"] -0.5: want 0 or more`},
		{Peers{Count: 2, Bias: map[string]float64{"a:1": 0, "b:1": math.NaN()}},
			`Peers.Bias["b:1"] NaN: want`},
	} {
		err := a.SetPeers(tc.peers)
		if err == nil || !strings.HasPrefix(err.Error(), `lbproxy: app "test": `+tc.want) {
			t.Errorf("%+v: %v, want %s", tc.peers, err, tc.want)
		}
		if b := &a.balancer; b.peers.Index != 1 || b.peers.Count != 2 ||
			b.peers.Bias["10.0.0.2:1"] != 3 {
			t.Fatalf("%+v was rejected, but the peers are now %+v", tc.peers, b.peers)
		}
	}
	unknown := Peers{Count: 1, Bias: map[string]float64{"x:1": math.Inf(1)}}
	if err := a.SetPeers(unknown); err != nil {
		t.Error(err)
	}
}

func TestTiesStartAtTheAppsPlaceAmongPeers(t *testing.T) {
	for _, tc := range []struct {
		index, count int
		want         string
	}{
		{0, 0, "a b c d e a"}, // alone
		{0, 1, "a b c d e a"},
		{0, 2, "a b c d e a"},
		{1, 2, "c d e a b c"},                       // 5*1/2 is 2
		{2, 3, "d e a b c d"},                       // 5*2/3 is 3
		{99, 100, "e a b c d e"},                    // 5*99/100 is 4
		{1, math.MaxInt, "a b c d e a"},             // nearly 0
		{math.MaxInt - 1, math.MaxInt, "e a b c d"}, // nearly 5; 5*Index overflows
	} {
		f := newBalFarm(balNamed(5)...)
		f.setPeers(Peers{Index: tc.index, Count: tc.count})
		want := strings.Fields(tc.want)
		for i := range want {
			want[i] += ":1"
		}
		wantBal(t, fmt.Sprintf("%d of %d", tc.index, tc.count), f.takes(len(want)), want)
	}
}

func TestSetUpstreamsKeepsPeers(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	f.setPeers(Peers{Index: 1, Count: 2, Bias: map[string]float64{"d:1": 2}})
	f.setUpstreams(balNamed(4)...)
	wantBal(t, "c first, d has 2 more", f.takes(7),
		strings.Fields("c:1 a:1 b:1 c:1 a:1 b:1 c:1"))
	wantBal(t, "at 3 2 2, d has as many", f.takes(4), strings.Fields("d:1 a:1 b:1 c:1"))
	wantBal(t, "stats are in slice order", f.stats()[0].Addr, "a:1")
	f.setPeers(Peers{})
	f.setUpstreams(balNamed(4)...)
	wantBal(t, "no peers: d is emptiest", f.takes(3), strings.Fields("d:1 d:1 a:1"))
}

func TestBiasAffectsOnlyTheChoice(t *testing.T) {
	f := newBalFarm(Upstream{Addr: "a", Weight: 2}, Upstream{Addr: "b"},
		Upstream{Addr: "c", MaxConns: 1})
	bias := map[string]float64{"a": 2.5, "c": 0.25, "nobody": 9}
	f.setPeers(Peers{Bias: bias})
	bias["b"] = 100 // the map was copied
	f.arrange()
	// 3.5/2 1 1.25; 1.75 2 1.25; 1.75 2 -; 2.25 2; 2.25 3
	wantBal(t, "loads", f.takes(5), strings.Fields("b c a b a"))
	wantBal(t, "open", []int{f.stats()[0].Open, f.stats()[1].Open, f.stats()[2].Open},
		[]int{2, 2, 1})
	f.setPeers(Peers{Bias: map[string]float64{"a": math.Inf(1), "b": math.Inf(1)}})
	wantBal(t, "endless ones tie", f.takes(2), strings.Fields("a a"))
}

func TestPeersChangeWhileAnAppServes(t *testing.T) {
	a, _ := newApp(t, Options{DialContext: dialFake(echoFake)}, "a:1", "b:1", "c:1")
	stop := make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := a.SetPeers(Peers{Index: i % 3, Count: 3,
				Bias: map[string]float64{"b:1": float64(i % 7)}}); err != nil {
				t.Error(err)
			}
			runtime.Gosched()
		}
	})
	for range 200 {
		c := serveFake(t.Context(), a, &Conn{})
		ping(t, c)
		c.Close()
		<-c.result
	}
	close(stop)
	wg.Wait()
	wantCounts(t, a, 200, 0, 0)
}

// spread simulates apps that share upstreams and know nothing of each other's connections, and
// returns the open connections of the fullest upstream over the mean, averaged over samples in
// half a minute, after a minute in which it settles. Arrivals are a Poisson process, each at a
// random app. Durations have a bounded Pareto distribution (alpha 1.5) with a mean of 5 s.
func spread(apps, upstreams int, load float64, rotated bool) float64 {
	const mean, lowest, alpha, warm, end = 5.0, 1.739, 1.5, 60.0, 90.0 // 1.739 to 1,000 s
	random := rand.New(rand.NewPCG(1, 2))
	confs := make([]Upstream, upstreams)
	for i := range confs {
		confs[i] = Upstream{Addr: fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), Weight: 1}
	}
	balancers := make([]balancer, apps)
	for i := range balancers {
		balancers[i].set(slices.Clone(confs), time.Time{})
		if rotated {
			balancers[i].setPeers(Peers{Index: i, Count: apps})
		}
	}
	type conn struct {
		app int
		u   *upstream
	}
	open := make([]int, upstreams)
	var ends balTimes[conn]
	sum, samples, total := 0.0, 0, 0
	rate := load * float64(upstreams) / mean
	for now, sample := 0.0, warm; now < end; now += random.ExpFloat64() / rate {
		for len(ends) > 0 && ends[0].at <= now {
			c := heap.Pop(&ends).(balTime[conn]).what
			balancers[c.app].release(c.u)
			open[c.u.index]--
			total--
		}
		if now > sample {
			sum += float64(slices.Max(open)) * float64(upstreams) / float64(total)
			samples++
			sample += 0.5
		}
		app := random.IntN(apps)
		u := balAcquire(&balancers[app], time.Time{})
		open[u.index]++
		total++
		lasts := lowest * math.Pow(1-random.Float64()*(1-math.Pow(lowest/(200*mean), alpha)),
			-1/alpha)
		heap.Push(&ends, balTime[conn]{now + lasts, conn{app, u}})
	}
	return sum / float64(samples)
}

type balTime[T any] struct {
	at   float64
	what T
}

// balTimes is a heap: the earliest first.
type balTimes[T any] []balTime[T]

func (h balTimes[T]) Len() int           { return len(h) }
func (h balTimes[T]) Less(i, j int) bool { return h[i].at < h[j].at }
func (h balTimes[T]) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *balTimes[T]) Push(x any)        { *h = append(*h, x.(balTime[T])) }
func (h *balTimes[T]) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	*h = (*h)[:last]
	return x
}

func TestPeersSpreadConnectionsEvenly(t *testing.T) {
	if got := spread(20, 200, 10, false); got < 1.8 {
		t.Errorf("20 apps, 200 upstreams, no peers: fullest/mean %.2f; if it is not above 1.8 "+
			"there is nothing to show", got)
	}
	if got := spread(20, 200, 10, true); got > 1.4 {
		t.Errorf("20 apps, 200 upstreams: fullest/mean %.2f, want less than 1.4", got)
	}
	if got := spread(4, 8, 10, true); got > 1.25 {
		t.Errorf("4 apps, 8 upstreams: fullest/mean %.2f, want less than 1.25", got)
	}
}

func TestDrainingUpstreamGetsNoNewConnections(t *testing.T) {
	a, b := Upstream{Addr: "a:1"}, Upstream{Addr: "b:1"}
	f := newBalFarm(a, b)
	f.takes(4)
	a.Drain = true
	f.setUpstreams(a, b)
	wantBal(t, "chosen", f.takes(3), []string{"b:1", "b:1", "b:1"})
	wantBal(t, "a", f.stats()[0],
		UpstreamStats{Addr: "a:1", Weight: 1, Open: 2, Total: 2, State: StateUp, Since: f.now,
			Drain: true})
	f.fail("b:1")
	wantBal(t, "a cooling one is better than a draining one", f.take(), "b:1")
	f.mark("a:1", true)
	wantBal(t, "it is checked", f.state("a:1"), "down")
	f.mark("a:1", false)
	a.Drain = false
	f.setUpstreams(a, b)
	wantBal(t, "no longer draining, in slow start", f.takes(3), []string{"a:1", "b:1", "a:1"})
}

func TestErrNoUpstreamSaysWhy(t *testing.T) {
	ups := []Upstream{
		{Addr: "a:1", MaxConns: 1}, {Addr: "b:1", MaxConns: 1}, {Addr: "c:1"},
		{Addr: "d:1", Drain: true},
	}
	f := newBalFarm(ups...)
	f.mark("c:1", true)
	f.mark("d:1", true) // draining as well, and counted once
	f.takes(2)
	for _, step := range []struct {
		then func()
		want string
	}{
		{func() {}, "2 full, 1 down, 1 draining"},
		{func() { f.mark("d:1", false) }, "2 full, 1 down, 1 draining"},
		{func() { f.setUpstreams(ups[:3]...) }, "2 full, 1 down"},
		{func() { f.setUpstreams(ups[2]) }, "1 down"},
		{func() { f.setUpstreams(ups[3]) }, "1 draining"},
		{func() { f.setUpstreams(ups[0]) }, "1 full"},
		{func() { f.mark("a:1", true) }, "1 down"},
	} {
		step.then()
		_, err := f.balancer.acquire(new(search), f.now)
		wantBal(t, "error", fmt.Sprint(err), "lbproxy: no upstream available: "+step.want)
		wantBal(t, "is ErrNoUpstream", errors.Is(err, ErrNoUpstream), true)
	}
}

func TestStatsHaveSinceAndErrOfTheState(t *testing.T) {
	f := newBalFarm(balNamed(2)...)
	begin := f.now
	check := func(what string, since time.Duration, err error) {
		t.Helper()
		s := f.stats()[0]
		wantBal(t, what+": since", s.Since.Sub(begin), since)
		wantBal(t, what+": error", s.Err, err)
		f.now = f.now.Add(time.Second)
	}
	check("new", 0, nil)
	f.fail("a:1")
	check("cooling", time.Second, errSick)
	f.now = f.now.Add(balFail)
	f.settle(f.begin("a:1"), fails, f.now)
	check("a failed trial", time.Second, errSick)
	f.now = f.now.Add(balFail)
	f.settle(f.begin("a:1"), works, f.now)
	check("up again", 3*time.Second+2*balFail, nil)
	f.mark("a:1", true)
	check("down", 4*time.Second+2*balFail, errSick)
	f.setUpstreams(balNamed(2)...)
	check("in a new set", 4*time.Second+2*balFail, errSick)
	f.setUpstreams(balNamed(2)[1])
	f.setUpstreams(balNamed(2)...)
	check("added again", 6*time.Second+2*balFail, nil)
}

// A connection tries more upstreams than are searched in exact order, while they change.
func TestEachOfManyUpstreamsIsTriedOnce(t *testing.T) {
	const n = 1000
	confs := make([]Upstream, n)
	for i := range confs {
		confs[i] = Upstream{Addr: fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), MaxConns: i % 2 * 3}
	}
	// 1: they are ready again at the next choice
	for _, failTimeout := range []time.Duration{-1, 1} {
		f := newBalFarm(confs...)
		f.failTimeout = failTimeout
		var s search
		for i := range n {
			p, err := f.balancer.acquire(&s, f.now)
			switch {
			case err != nil:
				t.Fatalf("attempt %d: %v", i, err)
			case s.tried[p.u]:
				t.Fatalf("attempt %d: tried %s twice", i, p.conf.Addr)
			case failTimeout < 0 && i <= maxExact && p.u.index != i:
				t.Fatalf("attempt %d: tried number %d", i, p.u.index)
			}
			f.settle(p.u, fails, f.now)
			f.release(p.u)
			s.add(p.u)
			f.now = f.now.Add(time.Second)
		}
		_, err := f.balancer.acquire(&s, f.now)
		wantBal(t, "error when all were tried", err, ErrNoUpstream)

		s = search{}
		for range n / 2 {
			p, _ := f.balancer.acquire(&s, f.now)
			f.settle(p.u, unknown, f.now)
			f.release(p.u)
			s.add(p.u)
		}
		left := map[string]bool{}
		for i, u := range slices.Clone(f.heap) {
			switch {
			case s.tried[u]:
			case i%3 == 0:
				f.mark(u.conf.Addr, true)
			case i%3 == 1 && u.conf.MaxConns > 0:
				u.open = u.conf.MaxConns
				f.fix(u)
			default:
				left[u.conf.Addr] = true
			}
		}
		f.setUpstreams(slices.DeleteFunc(slices.Clone(confs), func(u Upstream) bool {
			if removed := left[u.Addr] && strings.HasSuffix(u.Addr, "7:1"); removed {
				delete(left, u.Addr)
				return true
			}
			return false
		})...)
		for len(left) > 0 {
			p, err := f.balancer.acquire(&s, f.now)
			if err != nil || !left[p.conf.Addr] {
				t.Fatalf("%d are left: %+v, %v", len(left), p.conf, err)
			}
			delete(left, p.conf.Addr)
			f.settle(p.u, unknown, f.now)
			f.release(p.u)
			s.add(p.u)
		}
		_, err = f.balancer.acquire(&s, f.now)
		wantBal(t, "error when none is left", err, ErrNoUpstream)
	}
}

// A balModel has the balancer's rules in their plainest form: every choice looks at every upstream.
type balModel struct {
	failTimeout time.Duration
	set         []*balModelUpstream // in slice order
	removed     []*balModelUpstream
	peers       Peers
	resting     *balModelUpstream // it is catching up and has just been chosen
}

type balModelUpstream struct {
	Upstream
	open       int
	state      string // "up", "cooling", "due", "on trial", "down"
	until      time.Time
	catchingUp bool
	dialling   int
	total      uint64
	failed     uint64
	bias       float64
	since      time.Time
	err        error
}

// load is exact enough for small numbers.
func (u *balModelUpstream) load() float64 {
	return (float64(u.open+1) + u.bias) / float64(u.Weight)
}
func (u *balModelUpstream) full() bool    { return u.MaxConns != 0 && u.open >= u.MaxConns }
func (u *balModelUpstream) usable() bool  { return !u.full() && u.state != "down" && !u.Drain }
func (u *balModelUpstream) skipped() bool { return u.state == "cooling" || u.state == "on trial" }

// enter puts u into a state because of err.
func (u *balModelUpstream) enter(state string, err error, now time.Time) {
	was := u.public()
	u.state, u.err = state, err
	if u.public() != was {
		u.since = now
	}
}

func (u *balModelUpstream) public() UpstreamState {
	switch u.state {
	case "up":
		return StateUp
	case "down":
		return StateDown
	}
	return StateCooling
}

// min returns the least upstream for which among is true; of equals, the first one from the app's
// place among its peers on.
func (m *balModel) min(
	among func(*balModelUpstream) bool, less func(u, v *balModelUpstream) bool,
) (least *balModelUpstream) {
	first := len(m.set) * m.peers.Index / max(m.peers.Count, 1)
	for _, u := range append(m.set[first:len(m.set):len(m.set)], m.set[:first]...) {
		if among(u) && (least == nil || less(u, least)) {
			least = u
		}
	}
	return least
}

func (m *balModel) choose(not map[*balModelUpstream]bool) *balModelUpstream {
	lessLoaded := func(u, v *balModelUpstream) bool { return u.load() < v.load() }
	if u := m.min(func(u *balModelUpstream) bool { return !not[u] && u.usable() && !u.skipped() },
		lessLoaded); u != nil {
		return u
	}
	return m.min(func(u *balModelUpstream) bool { return !not[u] && u.usable() },
		func(u, v *balModelUpstream) bool {
			return u.until.Before(v.until) || u.until.Equal(v.until) && lessLoaded(u, v)
		})
}

func (m *balModel) acquire(tried map[*balModelUpstream]bool, now time.Time) *balModelUpstream {
	for _, u := range m.set {
		if u.state == "cooling" && !now.Before(u.until) {
			u.state = "due"
		}
	}
	not := map[*balModelUpstream]bool{m.resting: true}
	for u := range tried {
		not[u] = true
	}
	u := m.choose(not)
	if u == nil || u.skipped() {
		u = m.choose(tried)
	}
	if u == nil {
		return nil
	}
	if u.state == "due" {
		u.state = "on trial"
	}
	u.open++
	u.dialling++
	u.total++
	m.resting = nil
	if u.catchingUp {
		if first := m.first(); first == u {
			m.resting = u
		} else if first.state == "up" && !first.catchingUp {
			u.catchingUp = false
		}
	}
	return u
}

// first returns the upstream that a new connection would get, or the least loaded if none is
// usable.
func (m *balModel) first() *balModelUpstream {
	if u := m.choose(nil); u != nil {
		return u
	}
	return m.min(func(*balModelUpstream) bool { return true },
		func(u, v *balModelUpstream) bool { return u.load() < v.load() })
}

func (m *balModel) settle(u *balModelUpstream, v verdict, now time.Time) (changed bool) {
	was := u.state
	u.dialling--
	if v == fails {
		u.failed++
	}
	if !slices.Contains(m.set, u) || u.state == "down" {
		return false
	}
	switch v {
	case works:
		u.enter("up", nil, now)
		u.catchingUp = u.catchingUp || was != "up"
	case fails:
		if m.failTimeout > 0 {
			u.enter("cooling", errSick, now)
			u.until, u.catchingUp = now.Add(m.failTimeout), false
		}
	case unknown:
		if was == "on trial" && u.dialling == 0 {
			u.state = "due"
		}
	}
	return (was == "up") != (u.state == "up")
}

func (m *balModel) mark(u *balModelUpstream, down bool, now time.Time) {
	if u.catchingUp = !down; down {
		u.enter("down", errSick, now)
	} else {
		u.enter("up", nil, now)
	}
}

func (m *balModel) release(u *balModelUpstream) {
	u.open--
	m.removed = slices.DeleteFunc(m.removed, func(u *balModelUpstream) bool { return u.open == 0 })
}

func (m *balModel) replace(confs []Upstream, now time.Time) {
	old := append(m.set, m.removed...)
	wasRemoved := m.removed
	m.set, m.removed = nil, nil
	for _, c := range confs {
		u := &balModelUpstream{state: "up", since: now}
		if i := slices.IndexFunc(old,
			func(u *balModelUpstream) bool { return u.Addr == c.Addr }); i >= 0 {
			u = old[i]
			if slices.Contains(wasRemoved, u) {
				u.since = now
			}
		}
		u.Upstream = c
		u.bias = m.peers.Bias[c.Addr]
		m.set = append(m.set, u)
	}
	for _, u := range old {
		if !slices.Contains(m.set, u) {
			u.enter("up", nil, now)
			u.catchingUp = false
			if u.open > 0 {
				m.removed = append(m.removed, u)
			}
		}
	}
	slices.SortFunc(m.removed, func(u, v *balModelUpstream) int {
		return strings.Compare(u.Addr, v.Addr)
	})
}

func (m *balModel) setPeers(p Peers) {
	m.peers = p
	for _, u := range m.set {
		u.bias = p.Bias[u.Addr]
	}
}

func (m *balModel) stats() (all []UpstreamStats) {
	for _, u := range append(m.set[:len(m.set):len(m.set)], m.removed...) {
		all = append(all, UpstreamStats{
			Addr: u.Addr, Weight: u.Weight, Open: u.open, Total: u.total, Failed: u.failed,
			State: u.public(), Since: u.since, Err: u.err, Drain: u.Drain,
			Removed: slices.Contains(m.removed, u),
		})
	}
	return all
}

// none returns the error text for a connection that has tried no upstream and gets none.
func (m *balModel) none() string {
	count := map[string]int{}
	for _, u := range m.set {
		switch {
		case u.Drain:
			count["draining"]++
		case u.state == "down":
			count["down"]++
		case u.full():
			count["full"]++
		}
	}
	var why []string
	for _, what := range []string{"full", "down", "draining"} {
		if n := count[what]; n > 0 {
			why = append(why, fmt.Sprint(n, " ", what))
		}
	}
	return "lbproxy: no upstream available: " + strings.Join(why, ", ")
}

// A balTwin does the same to a balancer and to a model of it, and compares the answers.
type balTwin struct {
	t     *testing.T
	b     balancer
	m     balModel
	now   time.Time
	conns [2][]*balTwinConn // the live ones: those that are connected, those that are dialling
}

type balTwinConn struct {
	u        *upstream
	m        *balModelUpstream
	search   search
	triedToo map[*balModelUpstream]bool
}

const (
	balConnected, balDialling = 0, 1

	balOperations = 35 // what choose is asked for when an operation begins
)

// run does operations until the choices end: choose(n) returns one of 0 to n-1, or -1 when there
// are no more.
func (w *balTwin) run(choose func(n int) int, checkEach int) {
	w.now = time.Unix(1_000_000_000, 0)
	w.b.failTimeout = []time.Duration{5, 5, 5, -1}[max(choose(4), 0)] * time.Second
	w.m.failTimeout = w.b.failTimeout
	w.set(choose)
	for n := 1; ; n++ {
		switch op := choose(balOperations); {
		case op < 0:
			w.check()
			return
		case op < 12:
			if w.live() < 60 {
				w.acquire(&balTwinConn{})
			}
		case op < 24:
			if c := w.remove(balDialling, choose); c != nil {
				w.settle(c, []verdict{works, works, fails, unknown}[max(choose(4), 0)], op < 22)
			}
		case op < 30:
			if c := w.remove(balConnected, choose); c != nil {
				w.release(c)
			}
		case op < 31:
			w.now = w.now.Add(time.Duration(max(choose(8), 0)) * time.Second)
		case op < 33:
			w.mark(max(choose(len(w.m.set)), 0), choose(3) == 0)
		case op < 34:
			if choose(4) == 0 {
				w.setPeers(choose)
			}
		default:
			if choose(8) == 0 { // sets change less often than connections come
				w.set(choose)
			}
		}
		if n%checkEach == 0 {
			w.check()
		}
	}
}

func (w *balTwin) live() int { return len(w.conns[balConnected]) + len(w.conns[balDialling]) }

// remove takes out a connection that is dialing, or one that is connected; nil if there is none.
func (w *balTwin) remove(which int, choose func(n int) int) *balTwinConn {
	conns := w.conns[which]
	if len(conns) == 0 {
		return nil
	}
	i, last := max(choose(len(conns)), 0), len(conns)-1
	c := conns[i]
	conns[i] = conns[last]
	w.conns[which] = conns[:last]
	return c
}

func (w *balTwin) acquire(c *balTwinConn) {
	p, err := w.b.acquire(&c.search, w.now)
	m := w.m.acquire(c.triedToo, w.now)
	u := p.u
	if (u == nil) != (err != nil) || err != nil && !errors.Is(err, ErrNoUpstream) {
		w.t.Fatalf("chose %+v, and says %v", u, err)
	}
	switch {
	case u == nil && m == nil:
		if want := w.m.none(); len(c.triedToo) == 0 && err.Error() != want {
			w.t.Fatalf("no upstream: says %q, want %q", err, want)
		}
		return
	case u == nil || m == nil || u.conf.Addr != m.Addr || p.conf != u.conf || c.search.tried[u]:
		w.t.Fatalf("chose %+v, want %+v", u, m)
	}
	c.u, c.m = u, m
	w.conns[balDialling] = append(w.conns[balDialling], c)
}

func (w *balTwin) settle(c *balTwinConn, v verdict, again bool) {
	if got, want := w.b.settle(c.u, v, balErr(v), w.now), w.m.settle(c.m, v, w.now); got != want {
		w.t.Fatalf("settle %d of %s: changed is %v, want %v", v, c.m.Addr, got, want)
	}
	if v == works {
		w.conns[balConnected] = append(w.conns[balConnected], c)
		return
	}
	w.release(c)
	if c.triedToo == nil {
		c.triedToo = map[*balModelUpstream]bool{}
	}
	c.search.add(c.u)
	c.triedToo[c.m] = true
	if again {
		w.acquire(c)
	}
}

func (w *balTwin) release(c *balTwinConn) {
	w.b.release(c.u)
	w.m.release(c.m)
}

// mark has health checks find an upstream down or up, if that is news.
func (w *balTwin) mark(index int, isDown bool) {
	m := w.m.set[index]
	i := slices.IndexFunc(w.b.heap, func(u *upstream) bool { return u.index == index })
	switch u := w.b.heap[i]; {
	case isDown == (m.state == "down"):
		return
	case isDown:
		w.b.markDown(u, errSick, w.now)
	default:
		w.b.markUp(u, w.now)
	}
	w.m.mark(m, isDown, w.now)
}

func (w *balTwin) setPeers(choose func(n int) int) {
	count := max(choose(10), 0)
	p := Peers{Count: count, Index: max(choose(max(count, 1)), 0), Bias: map[string]float64{}}
	for i := range max(choose(5), 0) {
		p.Bias[string(rune('a'+i))] = float64(max(choose(12), 0)) / 4
	}
	w.b.setPeers(p)
	w.m.setPeers(p)
}

func (w *balTwin) set(choose func(n int) int) {
	var confs []Upstream
	for n, i := 1+max(choose(8), 0), max(choose(8), 0); len(confs) < n; i++ {
		addr := string(rune('a' + i*5%8)) // any n neighbours differ
		confs = append(confs,
			Upstream{Addr: addr, Weight: 1 + max(choose(3), 0),
				MaxConns: []int{0, 0, 2, 5}[max(choose(4), 0)], Drain: choose(6) == 0})
	}
	w.m.replace(confs, w.now)
	for i, u := range w.b.set(confs, w.now) {
		if u.conf != &confs[i] || u.index != i {
			w.t.Fatalf("set returned %+v as number %d, want %+v", u, i, confs[i])
		}
	}
}

func (w *balTwin) check() {
	b := &w.b
	if got, want := b.stats(), w.m.stats(); !slices.Equal(got, want) {
		w.t.Fatalf("stats:\n got %+v\nwant %+v", got, want)
	}
	sum := 0
	waiting := map[*list.Element]bool{}
	for i, u := range b.heap {
		sum += u.open
		if u.heapIndex != i {
			w.t.Fatalf("heap[%d].heapIndex is %d", i, u.heapIndex)
		}
		if parent := b.heap[max(i-1, 0)/2]; u.before(parent) {
			w.t.Fatalf("heap[%d] %+v comes before its parent %+v", i, u, parent)
		}
		if (u.coolingElem != nil) != (u.phase == cooling) {
			w.t.Fatalf("%s: phase %d, coolingElem %v", u.conf.Addr, u.phase, u.coolingElem)
		}
		if u.coolingElem != nil {
			waiting[u.coolingElem] = true
		}
		if u.open < 0 {
			w.t.Fatalf("%s: %d connections", u.conf.Addr, u.open)
		}
	}
	for addr, u := range b.removed {
		sum += u.open
		if u.conf.Addr != addr || u.heapIndex != -1 || u.open <= 0 {
			w.t.Fatalf("removed %s: %+v", addr, u)
		}
	}
	if sum != w.live() {
		w.t.Fatalf("%d connections counted, %d live", sum, w.live())
	}
	for e := b.cooling.Front(); e != nil; e = e.Next() {
		if next := e.Next(); !waiting[e] ||
			next != nil && next.Value.(*upstream).until.Before(e.Value.(*upstream).until) {
			w.t.Fatalf("cooling is out of order or holds one that does not cool: %+v", e.Value)
		}
		delete(waiting, e)
	}
	if len(waiting) > 0 {
		w.t.Fatalf("%d upstreams cool that will not recover", len(waiting))
	}
}

func TestMillionRandomOperationsAgreeWithTheModel(t *testing.T) {
	const operations, lives = 1_000_000, 100
	seed := *balancerSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-balancer.seed=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range lives {
		w, n := &balTwin{t: t}, 0
		w.run(func(most int) int {
			if most == balOperations { // an operation begins
				if n++; n > operations/lives {
					return -1
				}
			}
			return random.IntN(most)
		}, 20)
	}
}

func FuzzBalancer(f *testing.F) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		seed := make([]byte, 400)
		for i := range seed {
			seed[i] = byte(random.Uint32())
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, choices []byte) {
		(&balTwin{t: t}).run(func(n int) int {
			if len(choices) == 0 {
				return -1
			}
			c := int(choices[0]) % n
			choices = choices[1:]
			return c
		}, 1)
	})
}

func balAcquire(b *balancer, now time.Time) *upstream {
	p, _ := b.acquire(new(search), now)
	return p.u
}

// balUnderLoad returns a balancer under load and its connections, spread as they are when each ends
// at a random time.
func balUnderLoad(upstreams int) (*balancer, []*upstream) {
	confs := make([]Upstream, upstreams)
	for i := range confs {
		confs[i] = Upstream{Addr: fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), Weight: 1 + i%3}
	}
	b := &balancer{failTimeout: balFail}
	b.set(confs, time.Time{})
	random := rand.New(rand.NewPCG(1, 2))
	live := make([]*upstream, max(1024, 8*upstreams))
	for i := range live {
		live[i] = balAcquire(b, time.Time{})
	}
	for range 4 * len(live) {
		i := random.IntN(len(live))
		b.release(live[i])
		live[i] = balAcquire(b, time.Time{})
	}
	random.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
	return b, live
}

// One operation: a connection is begun, and a random other one ends.
func BenchmarkAcquire(b *testing.B) {
	for _, n := range []int{4, 100, 10_000} {
		b.Run(fmt.Sprintf("upstreams=%d", n), func(b *testing.B) {
			bal, live := balUnderLoad(n)
			now := time.Now()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				end := &live[i%len(live)]
				bal.release(*end)
				*end = balAcquire(bal, now)
			}
		})
		b.Run(fmt.Sprintf("upstreams=%d/settle", n), func(b *testing.B) {
			bal, live := balUnderLoad(n)
			now := time.Now()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				end := &live[i%len(live)]
				bal.release(*end)
				*end = balAcquire(bal, now)
				bal.settle(*end, works, nil, now)
			}
		})
	}
}

func BenchmarkAcquireParallel(b *testing.B) {
	for _, n := range []int{4, 100, 10_000} {
		b.Run(fmt.Sprintf("upstreams=%d", n), func(b *testing.B) {
			bal, live := balUnderLoad(n)
			now := time.Now()
			var workers atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(8)
			b.ResetTimer() // the setup takes long
			b.RunParallel(func(pb *testing.PB) {
				w := int(workers.Add(1)-1) % 64
				own := live[len(live)/64*w : len(live)/64*(w+1)]
				for i := 0; pb.Next(); i++ {
					end := &own[i%len(own)]
					bal.release(*end)
					*end = balAcquire(bal, now)
				}
			})
		})
	}
}

// The cost of a choice when 99 of 100 upstreams cannot be chosen.
func BenchmarkAcquireSkipping(b *testing.B) {
	for _, n := range []int{4, 100, 10_000} {
		skipped := n - max(n/100, 1)
		for what, skip := range map[string]func(*balancer, *upstream){
			"full":     func(bal *balancer, u *upstream) { u.open = u.conf.MaxConns },
			"down":     func(bal *balancer, u *upstream) { u.phase = down },
			"draining": func(bal *balancer, u *upstream) { u.conf.Drain = true },
			"cooling": func(bal *balancer, u *upstream) {
				u.phase, u.until, u.coolingElem = cooling, time.Unix(1, 0), bal.cooling.PushBack(u)
			},
		} {
			b.Run(fmt.Sprintf("upstreams=%d/%s", n, what), func(b *testing.B) {
				bal, ups := balMany(n)
				for _, u := range ups[:skipped] {
					skip(bal, u)
				}
				bal.arrange()
				b.ReportAllocs()
				for b.Loop() {
					bal.release(balAcquire(bal, time.Unix(0, 0)))
				}
			})
		}
		// by one connection, all in turn
		b.Run(fmt.Sprintf("upstreams=%d/tried", n), func(b *testing.B) {
			bal, _ := balMany(n)
			bal.failTimeout = -1
			s := new(search)
			for b.Loop() {
				p, err := bal.acquire(s, time.Time{})
				if err != nil {
					b.Fatal(err)
				}
				bal.settle(p.u, fails, errSick, time.Time{})
				bal.release(p.u)
				if s.add(p.u); len(s.tried) == n {
					s = new(search)
				}
			}
		})
	}
}

func balMany(n int) (*balancer, []*upstream) {
	confs := make([]Upstream, n)
	for i := range confs {
		confs[i] = Upstream{Addr: fmt.Sprintf("10.0.%d.%d:1", i/256, i%256), Weight: 1, MaxConns: 9}
	}
	b := &balancer{failTimeout: balFail}
	return b, b.set(confs, time.Time{})
}

func BenchmarkSetPeers(b *testing.B) {
	for _, n := range []int{4, 100, 10_000} {
		b.Run(fmt.Sprintf("upstreams=%d", n), func(b *testing.B) {
			bal, ups := balMany(n)
			bias := map[string]float64{}
			for i, u := range ups {
				bias[u.conf.Addr] = float64(i%5) / 4
			}
			for i := 0; b.Loop(); i++ {
				bal.setPeers(Peers{Index: i % 7, Count: 7, Bias: bias})
			}
		})
	}
}
