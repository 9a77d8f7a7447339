package admin

import (
	"cmp"
	"embed"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/logqueue"
)

// Options change what a handler shows and permits. A nil *Options and the zero Options mean the
// defaults.
type Options struct {
	// Hosts are the names, without port, that a request's Host header may have besides localhost
	// and IP addresses. Others are refused, so that a web site cannot read the page by resolving
	// its own name to this address.
	Hosts []string

	// Token is the bearer token of requests that may make changes. Empty means that only requests
	// through the Unix socket of a Server may.
	Token string

	// Recorder keeps counts and durations. nil means one of the handler's own, without durations.
	Recorder *Recorder

	// Info describes a server apart from its apps, on the page, in /api/stats, and in metrics whose
	// names begin with mtlsserver. nil means no such description.
	Info func() Info

	// Drain keeps new connections from an upstream if drain is true, and allows them again if not.
	// Its error is the answer to the request; ErrNotFound makes the status 404. nil means that
	// draining is not offered.
	Drain func(app, upstream string, drain bool) error

	// Reload reloads the configuration. Its result, in JSON, or its error is the answer to the
	// request. nil means that reloading is not offered.
	Reload func() (any, error)

	// Logger gets a line for each change, including refused ones, on a separate goroutine. nil
	// means slog.Default().
	Logger *slog.Logger
}

// Handler returns a handler that shows the state of apps; see the package documentation for its
// paths. Mount it at any path with http.StripPrefix. Everybody who can reach the handler may read,
// so its server must restrict access.
//
// The handler calls apps for each request; apps returns the current apps in the order to show.
// Requests run concurrently, so apps and the functions in opts must be safe for concurrent use. An
// app that is no longer returned is forgotten a minute later, once its connections have ended; its
// counts are kept. Returning a forgotten app again would count it twice.
func Handler(apps func() []*lbproxy.LBProxyApp, opts *Options) http.Handler {
	h := &handler{apps: apps, lines: logqueue.NewLines()}
	if opts != nil {
		h.Options = *opts
	}
	h.Hosts = append(slices.Clone(h.Hosts), "localhost")
	h.Logger = cmp.Or(h.Logger, slog.Default())
	if h.Recorder == nil {
		h.Recorder = &Recorder{}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.page)
	mux.HandleFunc("GET /conns", h.connsPage)
	mux.Handle("GET /static/", http.FileServerFS(static))
	mux.HandleFunc("GET /metrics", h.metrics)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		text(w, http.StatusOK, "ok\n")
	})
	mux.HandleFunc("GET /readyz", h.readyz)
	mux.HandleFunc("GET /api/stats", h.apiStats)
	mux.HandleFunc("GET /api/conns", h.apiConns)
	for name, c := range changes {
		mux.HandleFunc("POST /api/"+name, h.changing(name, c))
	}
	return h.guard(http.NewCrossOriginProtection().Handler(mux))
}

//go:embed static
var static embed.FS

type handler struct {
	Options
	apps  func() []*lbproxy.LBProxyApp
	lines *logqueue.Lines
}

const maxBody = 64 << 10

// guard refuses requests for another host name, as a browser sends them for a web site that
// resolves its own name to this address. It sets the headers that every answer has.
func (h *handler) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer h.logPanic(r)
		for key, value := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; " +
				"connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; " +
				"frame-ancestors 'none'",
			"X-Content-Type-Options":       "nosniff",
			"Referrer-Policy":              "no-referrer",
			"Cross-Origin-Resource-Policy": "same-origin",
			"Cache-Control":                "no-store",
		} {
			w.Header().Set(key, value)
		}
		if bySocket(r) == "" && !h.hostIsOurs(r.Host) {
			text(w, http.StatusMisdirectedRequest,
				"This host name is not answered: use an IP address or localhost, or add it to hosts.\n")
			return
		}
		if r.ContentLength > maxBody {
			w.Header().Set("Connection", "close") // instead of reading the body
			text(w, http.StatusRequestEntityTooLarge, "The body is too large.\n")
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

// logPanic logs a panic, such as one of a function in Options, and ends the request. It must be
// called by defer.
func (h *handler) logPanic(r *http.Request) {
	if p := recover(); p != nil {
		h.log(r, slog.LevelError, "admin: panic",
			slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		panic(http.ErrAbortHandler)
	}
}

func (h *handler) log(r *http.Request, level slog.Level, msg string, attrs ...slog.Attr) {
	h.lines.Add(r.Context(), h.Logger, level, msg, func() []slog.Attr { return attrs })
}

func (h *handler) hostIsOurs(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || slices.ContainsFunc(h.Hosts, func(ours string) bool {
		return strings.EqualFold(host, ours)
	})
}

func (h *handler) stats() Stats {
	s := h.Recorder.stats(h.apps(), time.Now())
	if h.Info != nil {
		s.Info = h.Info()
	}
	return s
}

// readyz answers 200 if every app can serve clients, else 503 with the problems.
func (h *handler) readyz(w http.ResponseWriter, _ *http.Request) {
	if problems := h.stats().Problems(); len(problems) > 0 {
		text(w, http.StatusServiceUnavailable, strings.Join(problems, "\n")+"\n")
		return
	}
	text(w, http.StatusOK, "ready\n")
}

func text(w http.ResponseWriter, code int, s string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(s))
}
