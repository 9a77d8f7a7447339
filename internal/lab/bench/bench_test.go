package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain lets the baseline be started as the command starts it: by this program's own name.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == baselineArg {
		fmt.Fprintln(os.Stderr, baseline(os.Args[2:]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		of   []int
		want int
	}{{[]int{7}, 7}, {[]int{9, 1, 5}, 5}, {[]int{4, 3, 2, 1}, 2}, {[]int{100, 1, 1, 100, 1}, 1}} {
		before := fmt.Sprint(tt.of)
		if got := median(tt.of); got != tt.want {
			t.Errorf("median of %v: %d, want %d", tt.of, got, tt.want)
		}
		if fmt.Sprint(tt.of) != before {
			t.Errorf("median has changed its argument to %v", tt.of)
		}
	}
}

func TestQuantiles(t *testing.T) {
	var l latencies
	if got := l.quantile(0.5); got != 0 {
		t.Errorf("of none: %v", got)
	}
	for i := range 1000 {
		l.add(time.Duration(i+1) * time.Microsecond)
	}
	l.add(-1)
	for q, want := range map[float64]time.Duration{
		0: 0, 0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond, 0.999: time.Millisecond,
	} {
		if got := l.quantile(q); got < want || got > want+want/14+time.Microsecond {
			t.Errorf("quantile %v of 1 to 1000 µs: %v, want %v", q, got, want)
		}
	}
	l.reset()
	if got := l.quantile(1); got != 0 {
		t.Errorf("after reset: %v", got)
	}
}

func TestTable(t *testing.T) {
	micros := func(n ...int) (samples []sample) {
		for _, n := range n {
			took := time.Duration(n) * time.Microsecond
			samples = append(samples, sample{cpu: took, rate: 1e6 / float64(n)})
		}
		return samples
	}
	failed := micros(30, 30, 30)
	failed[1].errs, failed[1].err = 2, errors.New("no answer")
	failed[2].errs, failed[2].err = 1, errors.New("another")
	rows := []row{
		{"ping", "ours", micros(30, 10, 20)},
		{"ping", "base", micros(40, 1, 90)},
		{"ping", "broken", failed},
		{"ping", "nothing", []sample{{}}},
		{"conn", "ours", append(micros(100), sample{}, sample{})},
		{"conn", "base", micros(100, 200, 299)},
	}
	want := strings.TrimPrefix(`
| operation | proxy   | CPU µs | × base | a second | errors |
| --------- | ------- | -----: | -----: | -------: | -----: |
| ping      | ours    |   20.0 |   0.50 |    50000 |      0 |
| ping      | base    |   40.0 |   1.00 |    25000 |      0 |
| ping      | broken  |   30.0 |   0.75 |    33333 |      3 |
| ping      | nothing |      - |      - |        - |      0 |
| conn      | ours    |  100.0 |   0.50 |    10000 |      0 |
| conn      | base    |  200.0 |   1.00 |     5000 |      0 |
`, "\n")
	columns := []column{{"CPU µs", cpu, 1, true}, {"a second", rate, 0, false}}
	if got := table(rows, columns, "base"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	want = strings.TrimPrefix(`
- base, ping: 11111 to 1000000 a second, the machine was busy: measure again
- broken, ping: 3 errors, the first: no answer
- ours, conn: 0 to 10000 a second, the machine was busy: measure again
`, "\n")
	if got := problems(rows[1:]); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// All of the harness, with the one proxy that is always there. On a busy machine a moment may be
// too short for anything to be done; then a longer one is measured.
func TestBaselineIsMeasured(t *testing.T) {
	b := &bench{dir: t.TempDir(), log: io.Discard, idle: 50}
	if err := b.listen(); err != nil {
		t.Fatal(err)
	}
	defer b.stopListening()
	p, err := b.start(baselinePeer(), b.upstreams)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	for _, w := range slices.Concat(slices.Collect(maps.Values(works))...) {
		var s sample
		for window := 20 * time.Millisecond; window < patience; window *= 2 {
			if s = p.measure(w, window); s.err != errNothingDone && (s.cpu > 0 || cannotMeasure != "") {
				break
			}
		}
		if w.ops == 1 && (s.p50 <= 0 || s.p999 < s.p50) {
			t.Errorf("%s: p50 %v, p99.9 %v", w.name, s.p50, s.p999)
		}
		if s.errs > 0 || s.rate <= 0 || s.cpu <= 0 && cannotMeasure == "" {
			t.Errorf("%s: %+v", w.name, s)
		}
	}
	s := p.idle(t.Context(), b.idle, 50*time.Millisecond)
	if s.errs > 0 || s.descriptors < 1 && cannotMeasure == "" {
		t.Errorf("idle: %+v", s)
	}
}

func TestEachProxyHasItsRounds(t *testing.T) {
	b := &bench{log: io.Discard, rounds: 3, window: time.Millisecond, works: []string{"ping"}}
	nobody := func(name string) *process {
		return &process{name: name, dial: b.dialer("127.0.0.1:1", true),
			cmd: &exec.Cmd{Process: &os.Process{Pid: os.Getpid()}}}
	}
	rows, err := b.takeRounds(t.Context(), []*process{nobody("a"), nobody("b")})
	if err != nil || len(rows) != 4 || rows[0].proxy != "a" || rows[1].proxy != "b" ||
		rows[0].work != rows[1].work || len(rows[3].samples) != 3 {
		t.Errorf("%+v, %v", rows, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.takeRounds(ctx, []*process{nobody("a")}); err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
}

func TestErrorsCount(t *testing.T) {
	p := &process{dial: (&bench{}).dialer("127.0.0.1:1", true),
		cmd: &exec.Cmd{Process: &os.Process{Pid: os.Getpid()}}}
	s := p.measure(works["conn"][0], 10*time.Millisecond) // nobody is there
	if s.errs < 2 || s.err == nil || s.rate != 0 {
		t.Errorf("%+v, want errors and no rate", s)
	}
}

func TestMissingProgramIsNamedWithTheRemedy(t *testing.T) {
	_, err := find("no-such-proxy", "Make one.")
	if err == nil || !strings.Contains(err.Error(), "no-such-proxy is not installed") ||
		!strings.HasSuffix(err.Error(), "Make one.") {
		t.Error(err)
	}
}

func TestWrongFlagsAreNamed(t *testing.T) {
	for args, want := range map[string]string{
		"-work conn,pong": `no "pong"`,
		"-rounds -1":      "-rounds",
		"-idle 9001":      "9000",
		"more":            "only flags",
		"-scale -work x":  `no "x"`,
	} {
		_, err := parse(strings.Fields(args), io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want something about %s", args, err, want)
		}
	}
}
