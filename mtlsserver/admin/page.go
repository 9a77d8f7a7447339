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
)

//go:embed page.html
var pageHTML string

var pages = template.Must(template.New("").Funcs(template.FuncMap{
	"clean": clean, "bytes": formatBytes,
	"time": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") },
	"add":  func(a, b int) int { return a + b },
}).Parse(pageHTML))

const rowsPerPage = 100 // of each table

// A view is what the status page shows.
type view struct {
	Stats
	Problems  []string
	From      int // the index of the first row of each table
	More      bool
	Query     url.Values
	Conns     Conns
	UserCount int
}

// page shows what all apps do. Tables are cut to one page of rows each.
func (h *handler) page(w http.ResponseWriter, r *http.Request) {
	v := view{Stats: h.stats()}
	v.Problems = v.Stats.Problems()
	v.Refused = maps.Clone(v.Refused)
	maps.DeleteFunc(v.Refused, func(_ string, n uint64) bool { return n == 0 })
	v.UserCount = len(v.Users)
	v.From, _ = strconv.Atoi(r.FormValue("from"))
	v.From = max(v.From, 0)
	v.Users = cut(&v, v.Users)
	v.Certificates = cut(&v, v.Certificates)
	for i := range v.Apps {
		v.Apps[i].Upstreams = cut(&v, v.Apps[i].Upstreams)
	}
	render(w, "status", v)
}

// cut returns the rows of a page, and notes whether there are more.
func cut[T any](v *view, rows []T) []T {
	rows = rows[min(v.From, len(rows)):]
	v.More = v.More || len(rows) > rowsPerPage
	return rows[:min(len(rows), rowsPerPage)]
}

func (h *handler) connsPage(w http.ResponseWriter, r *http.Request) {
	v := view{Conns: h.conns(r, rowsPerPage), Query: url.Values{}}
	for _, key := range []string{"app", "user", "upstream", "client"} {
		if value := r.Form.Get(key); value != "" {
			v.Query.Set(key, value)
		}
	}
	render(w, "conns", v)
}

// render answers only when all is written, so that nobody takes a part for the page.
func render(w http.ResponseWriter, name string, v view) {
	var b bytes.Buffer
	if err := pages.ExecuteTemplate(&b, name, v); err != nil {
		text(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes())
}

func formatBytes(n uint64) string {
	value, unit := float64(n), 0
	for value >= 1000 && unit < 5 {
		value /= 1000
		unit++
	}
	if unit == 0 {
		return fmt.Sprint(n, " B")
	}
	return fmt.Sprintf("%.1f %cB", value, " kMGTP"[unit])
}
