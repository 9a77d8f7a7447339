package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// A row has the results of the rounds of one work and one proxy.
type row struct {
	work, proxy string
	samples     []sample
}

// median returns the median of values, the lower one for an even number. There must be a value.
func median[T cmp.Ordered](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)/2]
}

// median returns the median of the rounds in which an operation was done; 0 if there are none.
// Other rounds count as errors.
func (r row) median(of func(sample) float64) float64 {
	var values []float64
	for _, s := range r.samples {
		if v := of(s); v != 0 {
			values = append(values, v)
		}
	}
	if values == nil {
		return 0
	}
	return median(values)
}

func cpu(s sample) float64         { return float64(s.cpu) / float64(time.Microsecond) }
func p50(s sample) float64         { return float64(s.p50) / float64(time.Millisecond) }
func p99(s sample) float64         { return float64(s.p99) / float64(time.Millisecond) }
func p999(s sample) float64        { return float64(s.p999) / float64(time.Millisecond) }
func rate(s sample) float64        { return s.rate }
func resident(s sample) float64    { return s.resident / 1024 }
func descriptors(s sample) float64 { return s.descriptors }

// errs returns the number of errors, and the first one.
func (r row) errs() (n int, first error) {
	for _, s := range r.samples {
		n += s.errs
		first = cmp.Or(first, s.err)
	}
	return n, first
}

// A column is one figure of rows.
type column struct {
	title  string
	of     func(sample) float64
	digits int
	ratio  bool // followed by the ratio to the base's figure
}

// table formats rows as Markdown with aligned columns. Ratios are to the row of base for the same
// work.
func table(rows []row, columns []column, base string) string {
	cells := [][]string{{"operation", "proxy"}}
	for _, c := range columns {
		cells[0] = append(cells[0], c.title)
		if c.ratio {
			cells[0] = append(cells[0], "× "+base)
		}
	}
	cells[0] = append(cells[0], "errors")
	for _, r := range rows {
		line := []string{r.work, r.proxy}
		to := slices.IndexFunc(rows, func(b row) bool { return b.work == r.work && b.proxy == base })
		for _, c := range columns {
			value := r.median(c.of)
			line = append(line, figure(value, c.digits))
			if c.ratio && to >= 0 && rows[to].median(c.of) > 0 && value > 0 {
				line = append(line, figure(value/rows[to].median(c.of), 2))
			} else if c.ratio {
				line = append(line, "-")
			}
		}
		n, _ := r.errs()
		cells = append(cells, append(line, fmt.Sprint(n)))
	}
	return markdown(cells)
}

func figure(value float64, digits int) string {
	if value == 0 {
		return "-" // not measured, or not measurable
	}
	return fmt.Sprintf("%.*f", digits, value)
}

// markdown aligns cells: the first two columns are text, the others numbers.
func markdown(cells [][]string) string {
	widths := make([]int, len(cells[0]))
	for _, line := range cells {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell), 3)
		}
	}
	var b strings.Builder
	for n, line := range cells {
		for i, cell := range line {
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i < 2 {
				b.WriteString("| " + cell + space + " ")
			} else {
				b.WriteString("| " + space + cell + " ")
			}
		}
		b.WriteString("|\n")
		for i, width := range widths {
			switch {
			case n > 0:
			case i < 2:
				b.WriteString("| " + strings.Repeat("-", width) + " ")
			default:
				b.WriteString("| " + strings.Repeat("-", width-1) + ": ")
			}
		}
		if n == 0 {
			b.WriteString("|\n")
		}
	}
	return b.String()
}

// problems lists the errors in rows, one a line, and the figures that are not reliable: on a busy
// machine, or if the kernel drops packets of loopback for lack of memory, a stream stalls at times.
func problems(rows []row) string {
	var b strings.Builder
	for _, r := range rows {
		if n, first := r.errs(); n > 0 {
			fmt.Fprintf(&b, "- %s, %s: %d errors, the first: %v\n", r.proxy, r.work, n, first)
		}
		byRate := func(a, b sample) int { return cmp.Compare(a.rate, b.rate) }
		least, most := slices.MinFunc(r.samples, byRate).rate, slices.MaxFunc(r.samples, byRate).rate
		if most > 3*least {
			fmt.Fprintf(&b, "- %s, %s: %.0f to %.0f a second, the machine was busy: measure again\n",
				r.proxy, r.work, least, most)
		}
	}
	return b.String()
}
