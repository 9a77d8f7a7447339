package admin

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/danielepagano/lbproxy"
)

//go:embed page.html
var pageHTML string

var pages = template.Must(template.New("").Funcs(template.FuncMap{
	"clean": clean, "bytes": formatBytes, "count": formatCount, "age": age,
	"time": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") },
	"add":  func(a, b int) int { return a + b },
}).Parse(pageHTML))

const rowsPerPage = 100 // of each table

// A view is the data of the status page.
type view struct {
	Stats
	Problems  []string
	Warnings  []string
	From      int // the index of the first row of each table
	More      bool
	Query     url.Values
	Conns     Conns
	UserCount int
}

// page shows the state of all apps. It cuts each table to one page of rows.
func (h *handler) page(w http.ResponseWriter, r *http.Request) {
	v := view{Stats: h.stats()}
	v.Problems = v.Stats.Problems()
	v.Warnings = v.warnings()
	v.Refused = maps.Clone(v.Refused)
	maps.DeleteFunc(v.Refused, func(_ string, n uint64) bool { return n == 0 })
	users := map[string]bool{}
	for _, u := range v.Users {
		users[u.Name] = true
	}
	v.UserCount = len(users)
	v.From, _ = strconv.Atoi(r.FormValue("from"))
	v.From = max(v.From, 0)
	v.Users = cut(&v, v.Users)
	v.Certificates = cut(&v, v.Certificates)
	for i := range v.Apps {
		v.Apps[i].Upstreams = cut(&v, v.Apps[i].Upstreams)
	}
	render(w, "status", v)
}

// cut returns the rows of v's page, and sets v.More if more follow.
func cut[T any](v *view, rows []T) []T {
	rows = rows[min(v.From, len(rows)):]
	v.More = v.More || len(rows) > rowsPerPage
	return rows[:min(len(rows), rowsPerPage)]
}

func (h *handler) connsPage(w http.ResponseWriter, r *http.Request) {
	offset, _ := strconv.Atoi(r.FormValue("offset"))
	v := view{Conns: h.conns(r.Form, max(offset, 0), rowsPerPage), Query: url.Values{}}
	for _, key := range filters {
		if value := r.Form.Get(key); value != "" {
			v.Query.Set(key, value)
		}
	}
	render(w, "conns", v)
}

// render renders the whole page before it answers, so that no client gets half a page as a success.
func render(w http.ResponseWriter, name string, v view) {
	var b bytes.Buffer
	if err := pages.ExecuteTemplate(&b, name, v); err != nil {
		text(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes())
}

// warnings returns the conditions that need attention although the apps are ready.
func (s Stats) warnings() (all []string) {
	for _, a := range s.Apps {
		used, up := 0, 0
		for _, u := range a.Upstreams {
			if !u.Drain && !u.Removed {
				used++
				up += int(one(u.State == lbproxy.StateUp))
			}
		}
		if a.Current && 0 < up && up < used {
			all = append(all, fmt.Sprintf("App %s: %d of %d upstreams up", clean(a.ID), up, used))
		}
	}
	for _, c := range s.Certificates {
		if days := c.Days(); days < 0 {
			all = append(all, fmt.Sprintf("Certificate %s has expired", clean(c.Key)))
		} else if days < 30 {
			all = append(all, fmt.Sprintf("Certificate %s expires in %d days", clean(c.Key), days))
		}
	}
	return all
}

// formatBytes returns three digits and a unit, as mtlsserver status prints them, with the exact
// number for programs.
func formatBytes(n uint64) template.HTML {
	value, unit := float64(n), 0
	for ; value >= 999.5 && unit < 6; unit++ {
		value /= 1024
	}
	text := fmt.Sprint(n, " B")
	if unit > 0 {
		text = fmt.Sprintf("%.3g %ciB", value, "KMGTPE"[unit-1])
	}
	return template.HTML(fmt.Sprintf(`<data value="%d">%s</data>`, n, text))
}

// formatCount puts a comma between thousands.
func formatCount(n any) template.HTML {
	digits := fmt.Sprint(n)
	text := digits
	for i := len(digits) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return template.HTML(`<data value="` + digits + `">` + text + "</data>")
}

// age returns the time from then to now in its two largest units.
func age(now, then time.Time) string {
	s := int(max(now.Sub(then), 0) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
	}
	return fmt.Sprintf("%d d %d h", s/86400, s/3600%24)
}
