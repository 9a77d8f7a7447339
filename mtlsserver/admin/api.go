package admin

import (
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/danielepagano/lbproxy"
)

// ErrNotFound is the error of Options.Drain for an app or upstream that does not exist.
var ErrNotFound = errors.New("there is no such app or upstream: /api/stats lists them")

// ErrEnded is the cause with which a connection is aborted when an administrator ends it.
var ErrEnded = errors.New("ended by an administrator")

// filters are the arguments that select connections.
var filters = []string{"app", "user", "upstream", "client"}

func (h *handler) apiStats(w http.ResponseWriter, r *http.Request) {
	if err := parse(r, "brief"); err != nil {
		refuse(w, err)
		return
	}
	s := h.stats()
	if r.Form.Has("brief") {
		s.Users, s.Certificates = nil, nil
		for i := range s.Apps {
			s.Apps[i].Upstreams = nil
		}
	}
	answer(w, http.StatusOK, s)
}

func (h *handler) apiConns(w http.ResponseWriter, r *http.Request) {
	err := parse(r, append(slices.Clone(filters), "offset", "limit")...)
	offset, offsetErr := number(r.Form, "offset", 0, 0, math.MaxInt32)
	limit, limitErr := number(r.Form, "limit", 1, 100, 1000)
	if err = cmp.Or(err, offsetErr, limitErr); err != nil {
		refuse(w, err)
		return
	}
	answer(w, http.StatusOK, h.conns(r.Form, offset, limit))
}

// parse parses the form of r. It refuses an argument that is not in want, is empty or is repeated:
// to ignore a filter would show, or end, more connections than were meant.
func parse(r *http.Request, want ...string) error {
	if err := r.ParseForm(); err != nil {
		return badRequest("%w", err)
	}
	const form = "application/x-www-form-urlencoded"
	if kind := r.Header.Get("Content-Type"); r.ContentLength != 0 && !strings.HasPrefix(kind, form) {
		return badRequest("a body of Content-Type %.80q: want %s", kind, form)
	}
	for _, key := range sorted(r.Form) {
		switch values := r.Form[key]; {
		case !slices.Contains(want, key):
			return badRequest("unknown argument %.80q: want %s", key, anyOf(want))
		case len(values) > 1:
			return badRequest("%s is given %d times: give it once", key, len(values))
		case values[0] == "":
			return badRequest("%s is empty: give a value, or leave it out", key)
		}
	}
	return nil
}

// anyOf returns "a, b or c".
func anyOf(words []string) string {
	switch n := len(words); n {
	case 0:
		return "none"
	case 1:
		return words[0]
	default:
		return strings.Join(words[:n-1], ", ") + " or " + words[n-1]
	}
}

// number returns the argument key, which must be a number from least to most, or otherwise if there
// is none.
func number(args url.Values, key string, least, otherwise, most int) (int, error) {
	if !args.Has(key) {
		return otherwise, nil
	}
	n, err := strconv.Atoi(args.Get(key))
	if err != nil || n < least || n > most {
		return otherwise, badRequest("%s %.80q: want %d to %d", key, args.Get(key), least, most)
	}
	return n, nil
}

// conns returns up to limit of the connections that args select, after the first offset ones.
func (h *handler) conns(args url.Values, offset, limit int) (page Conns) {
	page.Conns = []Conn{}
	skip := offset
	h.each(args, func(c Conn, _ *lbproxy.Conn) bool {
		switch {
		case skip > 0:
			skip--
		case len(page.Conns) == limit:
			page.Next = offset + limit
			return false
		default:
			page.Conns = append(page.Conns, c)
		}
		return true
	})
	return page
}

// each calls f for the open connections that match all of app, user, upstream and client, until it
// returns false.
func (h *handler) each(want url.Values, f func(Conn, *lbproxy.Conn) bool) {
	is := func(key, value string) bool { return want.Get(key) == "" || want.Get(key) == value }
	for _, app := range h.Recorder.all(h.apps()) {
		id := app.Stats().App
		if !is("app", id) {
			continue
		}
		for c := range app.Conns() {
			info := c.Info()
			client := c.ClientAddr
			if client == nil {
				client = c.Client.RemoteAddr()
			}
			conn := Conn{
				App: id, Client: fmt.Sprint(client), User: c.ClientID, Upstream: info.Upstream,
				State: info.State, Since: info.Start,
				Sent: uint64(info.Sent), Received: uint64(info.Received),
			}
			if is("user", conn.User) && is("upstream", conn.Upstream) && is("client", conn.Client) &&
				!f(conn, c) {
				return
			}
		}
	}
}

// A change carries out a request and returns the answer.
type change struct {
	args []string // that it takes
	do   func(h *handler, args url.Values) (any, error)
}

var changes = map[string]change{
	"drain":   {[]string{"app", "upstream"}, drain(true)},
	"undrain": {[]string{"app", "upstream"}, drain(false)},
	"end":     {filters, end},
	"reload":  {nil, reload},
}

func drain(on bool) func(*handler, url.Values) (any, error) {
	return func(h *handler, args url.Values) (any, error) {
		if h.Drain == nil {
			return nil, errNotOffered
		}
		for _, key := range []string{"app", "upstream"} {
			if !args.Has(key) {
				return nil, badRequest("%s is missing", key)
			}
		}
		err := h.Drain(args.Get("app"), args.Get("upstream"), on)
		if errors.Is(err, ErrNotFound) {
			err = failure{http.StatusNotFound, err}
		}
		return struct{}{}, err
	}
}

func end(h *handler, args url.Values) (any, error) {
	if !args.Has("user") && !args.Has("upstream") && !args.Has("client") {
		return nil, badRequest("give a user, upstream or client")
	}
	ended := 0
	h.each(args, func(_ Conn, c *lbproxy.Conn) bool {
		c.Abort(ErrEnded)
		ended++
		return true
	})
	return map[string]int{"ended": ended}, nil
}

func reload(h *handler, _ url.Values) (any, error) {
	if h.Reload == nil {
		return nil, errNotOffered
	}
	changes, err := h.Reload()
	if err != nil {
		return nil, failure{http.StatusUnprocessableEntity, err}
	}
	return changes, nil
}

// A failure is an error with the status of its answer.
type failure struct {
	code int
	error
}

var (
	errForbidden = failure{http.StatusForbidden,
		errors.New("not allowed: use the Unix socket, or a bearer token")}
	errNotOffered = failure{http.StatusNotImplemented, errors.New("this server does not offer it")}
)

func badRequest(format string, args ...any) error {
	return failure{http.StatusBadRequest, fmt.Errorf("bad request: "+format, args...)}
}

// changing returns a handler that checks permission, makes a change, and logs it.
func (h *handler) changing(name string, c change) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		by, allowed := h.permit(r)
		var result any
		err := parse(r, c.args...)
		switch {
		case !allowed:
			err = errForbidden
		case err == nil:
			result, err = c.do(h, r.Form)
		}
		attrs := []slog.Attr{slog.String("change", name), slog.String("by", by)}
		level := slog.LevelInfo
		if allowed { // else anybody could fill the log
			for _, key := range filters {
				if v := r.Form.Get(key); v != "" {
					attrs = append(attrs, slog.String(key, clean(fmt.Sprintf("%.300s", v))))
				}
			}
		}
		if err != nil {
			level = slog.LevelWarn
			attrs = append(attrs, slog.String("err", clean(err.Error())))
		}
		h.log(r, level, "admin: change", attrs...)
		if err != nil {
			refuse(w, err)
			return
		}
		answer(w, http.StatusOK, result)
	}
}

// refuse answers with an error: with status 500 if it is not a failure.
func refuse(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	if f, ok := errors.AsType[failure](err); ok {
		code = f.code
	}
	answer(w, code, map[string]string{"error": err.Error()})
}

// permit returns the sender of a request, and whether it may make changes.
func (h *handler) permit(r *http.Request) (by string, ok bool) {
	if who := bySocket(r); who != "" {
		return who, true
	}
	got, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(h.Token))
	return r.RemoteAddr, h.Token != "" && subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

// clean quotes a text that has unprintable characters: a peer may have chosen part of the text.
func clean(s string) string {
	odd := func(r rune) bool { return !unicode.IsPrint(r) }
	if !utf8.ValidString(s) || strings.ContainsFunc(s, odd) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

func sorted[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
