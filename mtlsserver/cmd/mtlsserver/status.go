package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

const (
	columns   = 100 // of a line
	mostUsers = 20  // printed: the users with most connections
)

// status prints the state of the running server. It fails with errReported if the server is not
// ready.
func status(config string, stdout io.Writer) error {
	a, err := askerOf(config)
	if err != nil {
		return err
	}
	var s admin.Stats
	if err := a.ask(http.MethodGet, "/api/stats", &s); err != nil {
		return errors.New(printable(err.Error()))
	}
	problems := s.Problems()
	if len(problems) == 0 {
		fmt.Fprintln(stdout, "ready")
	}
	for _, problem := range problems {
		fmt.Fprintln(stdout, short("not ready: "+printable(problem), columns))
	}
	for _, rows := range [][][]string{
		appRows(s.Apps), upstreamRows(s.Apps, s.Time), userRows(s.Users), refusedRows(s.Refused),
		certificateRows(s.Certificates),
	} {
		if len(rows) > 1 {
			fmt.Fprintln(stdout)
			printTable(stdout, rows)
		}
	}
	if more := len(s.Users) - mostUsers; more > 0 {
		fmt.Fprintf(stdout, "\nand %s: see the status page.\n", count(more, "more user"))
	}
	if len(problems) > 0 {
		return errReported
	}
	return nil
}

func appRows(apps []admin.App) [][]string {
	rows := [][]string{{"APP", "OPEN", "TOTAL", "REFUSED", "FAILED", "SENT", "RECEIVED"}}
	for _, a := range apps {
		if a.Current || a.Open > 0 {
			rows = append(rows, []string{
				short(plain(a.ID), 20), fmt.Sprint(a.Open), fmt.Sprint(a.Accepted),
				fmt.Sprint(a.NotAdmitted + a.Refused), fmt.Sprint(a.Failed),
				size(a.Sent), size(a.Received),
			})
		}
	}
	return rows
}

func upstreamRows(apps []admin.App, now time.Time) [][]string {
	rows := [][]string{{"APP", "UPSTREAM", "STATE", "FOR", "OPEN", "TOTAL", "FAILED", "WHY"}}
	for _, a := range apps {
		for _, u := range a.Upstreams {
			state := printable(string(u.State))
			switch {
			case u.Removed:
				state += ",removed"
			case u.Drain:
				state += ",drain"
			}
			// The address is in the row already.
			why := strings.TrimPrefix(u.Error, "dial tcp "+u.Addr+": ")
			why = strings.TrimPrefix(why, "connect: ")
			rows = append(rows, []string{
				short(plain(a.ID), 12), short(plain(u.Addr), 24), state, age(now.Sub(u.Since)),
				fmt.Sprint(u.Open), fmt.Sprint(u.Total), fmt.Sprint(u.Failed), printable(why),
			})
		}
	}
	return rows
}

func userRows(users []admin.User) [][]string {
	rows := [][]string{{"USER", "APP", "OPEN"}}
	for _, u := range users[:min(len(users), mostUsers)] {
		rows = append(rows, []string{
			short(plain(u.Name), 40), short(plain(u.App), 20), fmt.Sprint(u.Open),
		})
	}
	return rows
}

func refusedRows(refused map[string]uint64) [][]string {
	rows := [][]string{{"REFUSED", "CLIENTS"}}
	for _, reason := range slices.Sorted(maps.Keys(refused)) {
		if n := refused[reason]; n > 0 {
			rows = append(rows, []string{short(plain(reason), 40), fmt.Sprint(n)})
		}
	}
	return rows
}

func certificateRows(certificates []admin.Certificate) [][]string {
	rows := [][]string{{"CERTIFICATE", "FILE", "EXPIRES", "DAYS", ""}}
	for _, c := range certificates {
		note := ""
		if days := c.Days(); days < 0 {
			note = "expired"
		} else if days < 30 {
			note = "renew it"
		}
		rows = append(rows, []string{
			short(plain(c.Key), 34), short(plain(c.File), 34),
			c.NotAfter.UTC().Format(time.DateOnly), fmt.Sprint(c.Days()), note,
		})
	}
	return rows
}

// printTable prints rows in columns and cuts long lines.
func printTable(w io.Writer, rows [][]string) {
	var text bytes.Buffer
	tabs := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(tabs, strings.Join(row, "\t"))
	}
	tabs.Flush()
	for line := range strings.Lines(text.String()) {
		fmt.Fprintln(w, short(strings.TrimRight(line, " \n"), columns))
	}
}

// short cuts a text to a number of characters.
func short(text string, most int) string {
	if utf8.RuneCountInString(text) <= most {
		return text
	}
	return string([]rune(text)[:most-1]) + "…"
}

// age returns a duration in its largest unit.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(max(d, 0).Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 2*day:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// size returns a number of bytes in three digits and a unit.
func size(n uint64) string {
	value, unit := float64(n), 0
	for ; value >= 999.5 && unit < 6; unit++ {
		value /= 1024
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.3g %ciB", value, "KMGTPE"[unit-1])
}
