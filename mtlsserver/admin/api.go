package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
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
var ErrNotFound = errors.New("there is no such app or upstream")

// ErrEnded is the cause with which a connection is aborted when an administrator ends it.
var ErrEnded = errors.New("ended by an administrator")

func (h *handler) apiStats(w http.ResponseWriter, r *http.Request) {
	s := h.stats()
	if r.FormValue("brief") != "" {
		s.Users, s.Certificates = nil, nil
		for i := range s.Apps {
			s.Apps[i].Upstreams = nil
		}
	}
	answer(w, http.StatusOK, s)
}

func (h *handler) apiConns(w http.ResponseWriter, r *http.Request) {
	answer(w, http.StatusOK, h.conns(r, 100))
}

// conns returns the connections that a request selects; most is the default limit.
func (h *handler) conns(r *http.Request, most int) (page Conns) {
	offset, _ := strconv.Atoi(r.FormValue("offset"))
	if n, err := strconv.Atoi(r.FormValue("limit")); err == nil && n > 0 {
		most = min(n, 1000)
	}
	page.Conns = []Conn{}
	skip := max(offset, 0)
	h.each(r.Form, func(c Conn, _ *lbproxy.Conn) bool {
		switch {
		case skip > 0:
			skip--
		case len(page.Conns) == most:
			page.Next = max(offset, 0) + most
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
type change func(h *handler, args url.Values) (any, error)

func drain(on bool) change {
	return func(h *handler, args url.Values) (any, error) {
		if h.Drain == nil {
			return nil, errNotOffered
		}
		for _, key := range []string{"app", "upstream"} {
			if args.Get(key) == "" {
				return nil, fmt.Errorf("%w: %s is missing", errArgument, key)
			}
		}
		return struct{}{}, h.Drain(args.Get("app"), args.Get("upstream"), on)
	}
}

func end(h *handler, args url.Values) (any, error) {
	if args.Get("user")+args.Get("upstream")+args.Get("client") == "" {
		return nil, fmt.Errorf("%w: give a user, upstream or client", errArgument)
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
		return nil, fmt.Errorf("%w%w", errRefused, err)
	}
	return changes, nil
}

var (
	errArgument   = errors.New("bad request")
	errForbidden  = errors.New("not allowed: use the Unix socket, or a bearer token")
	errNotOffered = errors.New("this server does not offer it")
	errRefused    = errors.New("")
)

var codes = map[error]int{
	errArgument:   http.StatusBadRequest,
	errForbidden:  http.StatusForbidden,
	ErrNotFound:   http.StatusNotFound,
	errRefused:    http.StatusUnprocessableEntity,
	errNotOffered: http.StatusNotImplemented,
}

// changing returns a handler that checks permission, makes a change, and logs it.
func (h *handler) changing(name string, do change) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		by, allowed := h.permit(r)
		var result any
		err := r.ParseForm()
		switch {
		case !allowed:
			err = errForbidden
		case err != nil:
			err = fmt.Errorf("%w: %w", errArgument, err)
		default:
			result, err = do(h, r.Form)
		}
		attrs := []slog.Attr{slog.String("change", name), slog.String("by", by)}
		level, code := slog.LevelInfo, http.StatusOK
		if allowed { // else anybody could fill the log
			for _, key := range []string{"app", "user", "upstream", "client"} {
				if v := r.Form.Get(key); v != "" {
					attrs = append(attrs, slog.String(key, clean(fmt.Sprintf("%.300s", v))))
				}
			}
		}
		if err != nil {
			level, code = slog.LevelWarn, http.StatusInternalServerError
			for known, c := range codes {
				if errors.Is(err, known) {
					code = c
				}
			}
			result = map[string]string{"error": err.Error()}
			attrs = append(attrs, slog.String("err", clean(err.Error())))
		}
		h.log(r, level, "admin: change", attrs...)
		answer(w, code, result)
	}
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
