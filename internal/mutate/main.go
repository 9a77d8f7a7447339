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
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
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
	start := time.Now()
	results, err := testAll(ctx, chosen, max(*jobs, 1), out)
	if err != nil {
		return err
	}
	return report(out, results, time.Since(start))
}

// A result is what became of a mutant.
type result struct {
	mutant
	by   string // the test that found it; empty: none has
	err  error  // it does not compile
	took time.Duration
}

// testAll tests mutants, so many at once, each lot in a copy of the module of its own. It writes a line for each.
func testAll(ctx context.Context, chosen []mutant, jobs int, out io.Writer) (results []result, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan mutant)
	var mu sync.Mutex // of results and out
	var wg sync.WaitGroup
	for range jobs {
		wg.Go(func() {
			c, err := newCopy()
			if err != nil {
				cancel(err)
				return
			}
			defer os.RemoveAll(string(c))
			for m := range next {
				start := time.Now()
				by, err := c.test(ctx, m)
				if ctx.Err() != nil {
					continue
				}
				r := result{m, by, err, time.Since(start)}
				mu.Lock()
				results = append(results, r)
				fmt.Fprintf(out, "%4d/%d %-8s %s: %s (%.0f s)\n", len(results), len(chosen), r.verdict(), m.file, m.what, r.took.Seconds())
				mu.Unlock()
			}
		})
	}
	for _, m := range chosen {
		select {
		case next <- m:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return results, context.Cause(ctx)
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

// A copy is the path of a copy of the module.
type copy string

// newCopy copies the module in the current folder.
func newCopy() (_ copy, err error) {
	if _, err := os.Stat("go.mod"); err != nil {
		return "", fmt.Errorf("this is not the root of the module: %w", err)
	}
	dir, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	entries, err := os.ReadDir(".")
	for _, e := range entries {
		switch {
		case err != nil:
		case e.Name() == ".git":
		case e.IsDir():
			err = os.CopyFS(filepath.Join(dir, e.Name()), os.DirFS(e.Name()))
		default:
			var text []byte
			if text, err = os.ReadFile(e.Name()); err == nil {
				err = os.WriteFile(filepath.Join(dir, e.Name()), text, 0o666)
			}
		}
	}
	return copy(dir), err
}

// test puts m into the copy, tests it, and takes it out again. It returns what the test is called that has found it.
func (c copy) test(ctx context.Context, m mutant) (by string, err error) {
	file := filepath.Join(string(c), filepath.FromSlash(m.file))
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	mutated, err := m.apply(text)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(file, mutated, 0o666); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.WriteFile(file, text, 0o666)) }()
	own := "./" + path.Dir(m.file)
	if text, err := c.command(ctx, "build", own); err != nil {
		return "", fmt.Errorf("it does not compile: %w\n%s", err, text)
	}
	lots := [][]string{{own}, {m.also}}
	if first := subject(file); first != "" { // usually these find it, and sooner than all
		lots = slices.Insert(lots, 0, []string{"-run", first, own})
	}
	for _, lot := range lots {
		if lot[0] == "" {
			break
		}
		text, err := c.command(ctx, append([]string{"test", "-short", "-failfast", "-vet=off", "-timeout", "60s"}, lot...)...)
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		if err != nil {
			return finder(text), nil
		}
	}
	return "", nil
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

// apply returns text with the fault in it.
func (m mutant) apply(text []byte) ([]byte, error) {
	if n := bytes.Count(text, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("%d times in the file, want once: %q", n, m.old)
	}
	return bytes.Replace(text, []byte(m.old), []byte(m.new), 1), nil
}

func (c copy) command(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = string(c)
	cmd.WaitDelay = 10 * time.Second
	return cmd.CombinedOutput()
}

var failed = regexp.MustCompile(`(?m)^--- FAIL: (\w+)|^panic: test timed out|^\s+((?:Test|Fuzz|Example)\w+) \(\d+s\)$|^left behind|^panic: .*`)

// finder returns what the output of a failed test says first about which it is.
func finder(text []byte) string {
	m := failed.FindSubmatch(text)
	if m == nil {
		return "?"
	}
	return cmp.Or(string(m[1]), string(m[2]), strings.TrimSpace(string(m[0])))
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
