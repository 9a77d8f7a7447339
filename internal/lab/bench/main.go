// Bench measures the cost of proxies on this machine: lbproxy, haproxy, nginx, and a proxy of two
// io.Copy goroutines for each connection.
//
//	go run ./bench          # some minutes
//	go run ./bench -quick   # under a minute, and less exact
//	go run ./bench -mtls    # mtlsserver, and the others with TLS 1.3 and client certificates
//	go run ./bench -versus 'before=/tmp/before'   # two builds of examples/basic
//	go run ./bench -scale   # lbproxy alone: with many idle connections, and with many upstreams
//
// Everything is on loopback. Bench measures the CPU time of the proxy's processes for each
// operation; clients and upstreams are in this process, whose cost does not count. Rounds are
// interleaved, so that a busy machine slows all proxies alike. Trust the ratios: the times depend
// on the machine.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == baselineArg {
		fmt.Fprintln(os.Stderr, baseline(os.Args[2:]))
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil &&
		!errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const (
	maxIdle       = 9_000
	manyUpstreams = 10_000
)

// A bench is one run of the command.
type bench struct {
	rounds      int
	window      time.Duration // of one measurement
	works       []string
	idle        int
	mtls, scale bool
	md          string
	versus      []string // name=program argument...

	log       io.Writer // progress
	began     time.Time
	dir       string
	certs     string      // the folder of certificates; "" without TLS
	client    *tls.Config // nil without TLS
	listeners []net.Listener
	upstreams []string // four, or manyUpstreams for -scale
	notes     []string // for the reader, such as a missing peer and the reason
}

func parse(args []string, log io.Writer) (*bench, error) {
	b := &bench{log: log, began: time.Now()}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(log)
	flags.IntVar(&b.rounds, "rounds", 0,
		"`rounds` of which the median is taken (default 5; 15 with -scale)")
	list := flags.String("work", "",
		"`what` to measure, some of conn,nagle,ping,beside,bulk,idle (default all; conn with -scale)")
	flags.IntVar(&b.idle, "idle", 0,
		"idle `connections` to hold, at most 9000 (default 3000; 9000 with -scale)")
	flags.BoolVar(&b.mtls, "mtls", false, "measure mtlsserver: TLS 1.3 with client certificates")
	flags.BoolVar(&b.scale, "scale", false,
		"measure lbproxy with many idle connections, and with 10000 upstreams")
	flags.StringVar(&b.md, "md", "", "`file` to write the result to, as Markdown")
	flags.Func("versus", "`name=program argument...` to measure, too: it takes -listen and -upstream "+
		"as\nexamples/basic does; the program basic is lbproxy's own", func(v string) error {
		if _, command, _ := strings.Cut(v, "="); strings.TrimSpace(command) == "" {
			return errors.New("want name=program and its arguments")
		}
		b.versus = append(b.versus, v)
		return nil
	})
	quick := flags.Bool("quick", false, "take less time, and be less exact")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	rounds, idle, all := 5, 3000, "conn,ping,beside,bulk,idle"
	if b.mtls {
		all = "conn,nagle,ping,beside,bulk,idle"
	}
	if b.window = time.Second; b.scale {
		rounds, idle, all = 15, maxIdle, "conn"
	}
	if *quick {
		b.window, rounds, idle = 250*time.Millisecond, (rounds+1)/2, idle/6
	}
	b.rounds, b.idle = cmp.Or(b.rounds, rounds), cmp.Or(b.idle, idle)
	b.works = strings.Split(cmp.Or(*list, all), ",")
	for _, name := range b.works {
		if works[name] == nil && name != "idle" {
			return nil, fmt.Errorf("-work %s: there is no %q, want some of "+
				"conn,nagle,ping,beside,bulk,idle", *list, name)
		}
	}
	if flags.NArg() > 0 || b.rounds < 1 || b.idle < 1 || b.idle > maxIdle {
		return nil, errors.New("want only flags, -rounds from 1 and -idle from 1 to 9000")
	}
	if most := (raiseDescriptors() - 600) / 2; b.idle > most {
		b.note("%d idle connections, not %d: two descriptors each are more than this user may have "+
			"(ulimit -Hn)", most, b.idle)
		b.idle = most
	}
	return b, nil
}

func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(b.log, "%4.0fs  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

// note reports progress that also belongs to the result.
func (b *bench) note(format string, args ...any) {
	b.notes = append(b.notes, fmt.Sprintf(format, args...))
	b.progress(format, args...)
}

func run(ctx context.Context, args []string, out, log io.Writer) error {
	b, err := parse(args, log)
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "lbproxy-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if err := b.listen(); err != nil {
		return err
	}
	defer b.stopListening()
	if cannotMeasure != "" {
		b.note("%s", cannotMeasure)
		b.works = slices.DeleteFunc(b.works, func(name string) bool { return name == "idle" })
	}
	own, err := b.build(ctx)
	if err != nil {
		return err
	}
	var result string
	if b.scale {
		result, err = b.measureScale(ctx, own)
	} else {
		result, err = b.compare(ctx, b.peers(own))
	}
	if err != nil {
		return err
	}
	fmt.Fprint(out, result)
	if b.md != "" {
		return os.WriteFile(b.md, []byte(result), 0o644)
	}
	return nil
}

// peers returns all peers, own first.
func (b *bench) peers(own peer) []peer {
	peers := []peer{own}
	if runtime.GOOS == "linux" && !b.mtls {
		peers = append(peers, onLoops(own))
	}
	for _, v := range b.versus {
		peers = append(peers, versus(own, v))
	}
	add := func(p peer, err error) {
		if err != nil {
			b.note("%v", err)
		} else {
			peers = append(peers, p)
		}
	}
	add(haproxy("haproxy", ""))
	if peers[len(peers)-1].name == "haproxy" && !b.mtls { // TLS cannot be spliced
		add(haproxy("haproxy, splice", "option splice-request\n\toption splice-response"))
	}
	add(nginx())
	return append(peers, baselinePeer())
}

// compare measures peers in turn.
func (b *bench) compare(ctx context.Context, peers []peer) (string, error) {
	var running []*process
	defer stopAll(&running)
	var resting []row
	var versions []string
	for _, peer := range peers {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		p, err := b.start(peer, b.upstreams)
		if err != nil && len(running) == 0 { // without lbproxy there is nothing to compare
			return "", err
		}
		if err != nil {
			b.note("%v", err)
			continue
		}
		if slices.Contains(b.works, "idle") { // before any other work
			b.progress("%s: %d idle connections", p.name, b.idle)
			s := p.idle(ctx, b.idle, b.window)
			work := fmt.Sprintf("idle connection, one of %d", b.idle)
			resting = append(resting, row{work, p.name, []sample{s}})
			p.stop()
			if p, err = b.start(peer, b.upstreams); err != nil {
				return "", err
			}
		}
		running = append(running, p)
		if peer.version != "" && !slices.Contains(versions, peer.version) {
			versions = append(versions, peer.version)
		}
	}
	rows, err := b.takeRounds(ctx, running)
	if err != nil {
		return "", err
	}
	base := baselineArg
	if slices.ContainsFunc(running, func(p *process) bool { return p.name == "haproxy" }) {
		base = "haproxy"
	}
	var t strings.Builder
	t.WriteString(b.heading(versions))
	if len(rows) > 0 {
		t.WriteString(table(rows, []column{
			{"CPU µs", cpu, 1, true}, {"a second", rate, 0, false},
			{"p50 ms", p50, 2, false}, {"p99", p99, 2, false}, {"p99.9", p999, 2, false},
		}, base) + "\n")
	}
	if len(resting) > 0 {
		t.WriteString(table(resting,
			[]column{{"KiB", resident, 1, true}, {"descriptors", descriptors, 2, false}}, base) + "\n")
	}
	return t.String() + problems(slices.Concat(rows, resting)), nil
}

// measureScale measures own as it is, with many idle connections, and with many upstreams.
func (b *bench) measureScale(ctx context.Context, own peer) (string, error) {
	var running []*process
	defer stopAll(&running)
	for _, as := range []struct {
		suffix    string
		upstreams []string
	}{
		{"", b.upstreams[:4]},
		{fmt.Sprintf(", %d idle", b.idle), b.upstreams[:4]},
		{fmt.Sprintf(", %d upstreams", manyUpstreams), b.upstreams},
	} {
		p, err := b.start(own, as.upstreams)
		if err != nil {
			return "", err
		}
		p.name += as.suffix
		running = append(running, p)
	}
	b.progress("opening %d idle connections", b.idle)
	var f fails
	idle := running[1].hold(ctx, b.idle, &f)
	defer closeAll(idle)
	if f.n > 0 {
		b.note("%d of the idle connections could not be opened, the first: %v", f.n, f.first)
	}
	rows, err := b.takeRounds(ctx, running)
	if err != nil {
		return "", err
	}
	columns := []column{{"CPU µs", cpu, 1, true}, {"a second", rate, 0, true}}
	return b.heading(nil) + table(rows, columns, own.name) + "\n" + problems(rows), nil
}

// takeRounds does each work on all processes in turn.
func (b *bench) takeRounds(ctx context.Context, running []*process) (rows []row, err error) {
	for _, name := range b.works {
		for _, w := range works[name] {
			samples := make([][]sample, len(running))
			for round := range b.rounds {
				b.progress("%s: round %d of %d", w.name, round+1, b.rounds)
				for i, p := range running {
					if ctx.Err() != nil {
						return nil, ctx.Err()
					}
					samples[i] = append(samples[i], p.measure(w, b.window))
				}
			}
			for i, p := range running {
				rows = append(rows, row{w.name, p.name, samples[i]})
			}
		}
	}
	return rows, nil
}

// heading describes the machine, the versions and the figures.
func (b *bench) heading(versions []string) string {
	var t strings.Builder
	machine := append([]string{system(), fmt.Sprintf("%d cores", runtime.NumCPU()),
		fmt.Sprintf("%s %s/%s", runtime.Version(), runtime.GOOS, runtime.GOARCH)}, versions...)
	fmt.Fprintf(&t, "Measured on: %s.\n\n", strings.Join(machine, ", "))
	fmt.Fprintf(&t, "CPU is the user and system time that the proxy takes for one operation, × "+
		"its ratio to another's (less is better): medians of %d rounds of %v, interleaved. "+
		"Each proxy has threads for all cores, which it shares with clients and upstreams: "+
		"how many a second there are depends on those, too.", b.rounds, b.window)
	if !b.mtls && !b.scale {
		t.WriteString(" haproxy splices when it decides to (option splice-auto); haproxy, splice " +
			"always does.")
	}
	if b.mtls {
		t.WriteString(" Clients speak TLS 1.3 and have certificates (P-256, X25519, " +
			"AES-128-GCM), no session is resumed, upstreams are plain TCP. " +
			"mtlsserver writes a log line for each connection, the others write none.")
	}
	if slices.Contains(b.works, "idle") {
		t.WriteString(" KiB are the proxy's resident memory, without the kernel's memory for " +
			"sockets and pipes.")
	}
	t.WriteString("\n\n")
	for _, note := range b.notes {
		t.WriteString("- " + note + "\n")
	}
	if len(b.notes) > 0 {
		t.WriteString("\n")
	}
	return t.String()
}
