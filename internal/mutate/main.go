// Mutate asks whether the tests would notice. It puts one small fault after the other into a copy of the module, runs the
// tests of the package, and says which of the faults none of them has found:
//
//	go run ./internal/mutate               all faults; some minutes
//	go run ./internal/mutate -run balancer those whose file or description matches
//
// Run it in the root of the module, on Linux. It ends with status 1 if a fault survives that is not known to do no harm, or
// if one that is known to survive is found.
package main

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// A mutant is a fault.
type mutant struct {
	file string
	what string // goes wrong
	old  string // occurs once in the file,
	new  string // and becomes this

	also     string // another package whose tests are to notice; the file's own come first
	survives string // why no test can; empty: one must
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, args []string) error {
	flags := flag.NewFlagSet("mutate", flag.ExitOnError)
	pattern := flags.String("run", "", "only mutants of whose file and description a part matches this regular `expression`")
	jobs := flags.Int("j", 2, "mutants tested at once")
	flags.Parse(args)
	wanted, err := regexp.Compile(*pattern)
	if err != nil {
		return err
	}
	var chosen []mutant
	for _, m := range mutants {
		if wanted.MatchString(m.file + " " + m.what) {
			chosen = append(chosen, m)
		}
	}
	if _, err := os.Stat("go.mod"); err != nil {
		return fmt.Errorf("this is not the root of the module: %w", err)
	}
	start := time.Now()
	none := mutant{file: "doc.go", old: "package lbproxy\n", new: "package lbproxy\n", also: "mtlsserver"}
	if by, err := none.test(ctx); err != nil || by != "" {
		return fmt.Errorf("without any fault: %s, %v", by, err)
	}
	results := testAll(ctx, chosen, max(*jobs, 1), out)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return report(out, results, time.Since(start))
}

// A result is what became of a mutant.
type result struct {
	mutant
	by  string // the test that found it; empty: none has
	err error  // it does not apply, or does not compile
}

// testAll tests mutants, so many at once, and writes a line for each.
func testAll(ctx context.Context, chosen []mutant, jobs int, out io.Writer) []result {
	results := make([]result, len(chosen))
	places := make(chan bool, jobs)
	var done atomic.Int32
	var wg sync.WaitGroup
	for i, m := range chosen {
		places <- true
		wg.Go(func() {
			defer func() { <-places }()
			start := time.Now()
			by, err := m.test(ctx)
			r := result{m, by, err}
			results[i] = r
			fmt.Fprintf(out, "%4d/%d %-8s %s: %s (%.0f s)\n", done.Add(1), len(chosen), r.verdict(), m.file, m.what, time.Since(start).Seconds())
		})
	}
	wg.Wait()
	return results
}

func (r *result) verdict() string {
	switch {
	case r.err != nil:
		return "INVALID"
	case r.by == "":
		return "SURVIVED"
	}
	return "killed"
}

// test puts m into a copy of the module and returns what the test is called that has found it.
func (m mutant) test(ctx context.Context) (by string, err error) {
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	root, err := os.MkdirTemp("", "mutate")
	if err == nil {
		defer os.RemoveAll(root)
		err = os.CopyFS(root, os.DirFS("."))
	}
	if err != nil {
		return "", err
	}
	file := filepath.Join(root, filepath.FromSlash(m.file))
	text, err := os.ReadFile(file)
	if err == nil {
		text, err = m.apply(text)
	}
	if err == nil {
		err = os.WriteFile(file, text, 0o666)
	}
	if err != nil {
		return "", err
	}
	first := subject(file) // usually these find it, and sooner than all
	for _, pkg := range []string{path.Dir(m.file), m.also} {
		if pkg == "" {
			break
		}
		dir, binary := filepath.Join(root, pkg), filepath.Join(root, "mutated.test")
		if text, err := command(ctx, dir, "go", "test", "-c", "-vet=off", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", binary, "."); err != nil {
			return "", fmt.Errorf("it does not compile: %w\n%s", err, text)
		}
		for _, pattern := range []string{first, "."} {
			if pattern == "" {
				continue
			}
			text, err := command(ctx, dir, binary, "-test.short", "-test.failfast", "-test.timeout=60s", "-test.run", pattern)
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			if err != nil {
				return finder(text), nil
			}
		}
		first = ""
	}
	return "", nil
}

// apply returns text with the fault in it.
func (m mutant) apply(text []byte) ([]byte, error) {
	if n := bytes.Count(text, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("%d times in the file, want once: %q", n, m.old)
	}
	return bytes.Replace(text, []byte(m.old), []byte(m.new), 1), nil
}

var tests = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Example)\w*)\(`)

// subject returns a pattern of the tests in the file that is named after a file; empty if there are none.
func subject(file string) string {
	text, err := os.ReadFile(strings.TrimSuffix(file, ".go") + "_test.go")
	if err != nil {
		return ""
	}
	var names []string
	for _, m := range tests.FindAllSubmatch(text, -1) {
		names = append(names, string(m[1]))
	}
	return "^(" + strings.Join(names, "|") + ")$"
}

func command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = 10 * time.Second
	return cmd.CombinedOutput()
}

var failed = regexp.MustCompile(`(?m)^--- FAIL: (\w+)|^left behind|^panic: .*`)

// finder returns what the output of a failed test says first about which it is.
func finder(text []byte) string {
	m := failed.FindSubmatch(text)
	if m == nil {
		return "?"
	}
	return cmp.Or(string(m[1]), string(m[0]))
}

// report writes the table and returns an error if it is not as it should be.
func report(out io.Writer, results []result, took time.Duration) error {
	killed, wrong := 0, 0
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nfile\twhat is wrong\tfound by")
	for _, r := range results {
		found := r.by
		switch {
		case r.err != nil:
			found = r.err.Error()
		case found == "":
			found = "nothing: " + cmp.Or(r.survives, "a test is missing")
		default:
			killed++
		}
		if r.err != nil || (r.by == "") != (r.survives != "") {
			wrong++
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", r.file, r.what, found)
	}
	w.Flush()
	fmt.Fprintf(out, "\n%d of %d found (%.1f %%) in %v\n", killed, len(results), 100*float64(killed)/float64(max(len(results), 1)), took.Round(time.Second))
	if wrong > 0 {
		return fmt.Errorf("%d are not as the list says", wrong)
	}
	return nil
}
