//go:build linux

package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// Chromium sends no close_notify when it closes a connection. An upload that it gives up while it
// waits to send ends in the middle of a record, which always counts as cut off.
var chromiumTable = []struct {
	does                     string
	required, idle, optional outcome
}{
	{idle, cut, ended, ended},
	{upload, cutShort, cutShort, cutShort},
}

func TestCloseNotifyOfChromium(t *testing.T) {
	for mode, closeNotify := range []lbproxy.CloseNotify{
		lbproxy.CloseNotifyRequired, lbproxy.CloseNotifyIdle, lbproxy.CloseNotifyOptional,
	} {
		for _, row := range chromiumTable {
			t.Run(fmt.Sprint(closeNotify, " ", row.does), func(t *testing.T) {
				want := func(row int) outcome {
					r := chromiumTable[row]
					return []outcome{r.required, r.idle, r.optional}[mode]
				}
				s := newSite(t)
				results := s.browse(t, closeNotify, row.does)
				uploads := 0
				check := func(what, got, want string) {
					if !slices.Contains(strings.Fields(want), got) {
						t.Errorf("%s: %q, want %s", what, got, want)
					}
				}
				for _, r := range results {
					kind := 0
					if r.Sent >= sentOfUpload {
						kind, uploads = 1, uploads+1
					}
					check(fmt.Sprintf("the proxy's end (%v)", r.Err), r.End.String(), want(kind).reasons)
				}
				for _, v := range s.visits {
					kind := 0
					if v.upload {
						kind = 1
					}
					check("the upstream's end", v.end, want(kind).upstream)
				}
				if (uploads == 1) != (row.does == upload) || len(results) != len(s.visits) {
					t.Errorf("%d uploads, %d results, %d visits", uploads, len(results), len(s.visits))
				}
			})
		}
	}
}

// A site is an upstream for a browser. It stops reading an upload until the browser has given up.
type site struct {
	addr            string
	app             *lbproxy.LBProxyApp // that the browser connects to
	stalled, resume chan struct{}
	mu              sync.Mutex
	visits          []*visit
}

// A visit is a connection to a site.
type visit struct {
	net.Conn
	site   *site
	upload bool
	end    string // "end" or "reset"; "" while it is open
}

func (v *visit) Read(b []byte) (int, error) {
	n, err := v.Conn.Read(b)
	v.site.mu.Lock()
	defer v.site.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, os.ErrDeadlineExceeded), v.end != "":
	case err == io.EOF:
		v.end = "end"
	default:
		v.end = "reset"
	}
	return n, err
}

type siteListener struct {
	net.Listener
	site *site
}

func (l siteListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	v := &visit{Conn: c, site: l.site}
	l.site.mu.Lock()
	defer l.site.mu.Unlock()
	l.site.visits = append(l.site.visits, v)
	return v, nil
}

// listenSmall returns a listener whose connections have small receive queues. By itself the system
// may let a queue grow to 32 MB, which holds a whole upload.
func listenSmall(t *testing.T) net.Listener {
	t.Helper()
	l := proxytest.Listen(t)
	raw, err := l.SyscallConn()
	proxytest.Must(t, err)
	proxytest.Must(t, raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 64<<10)
	}))
	proxytest.Must(t, err)
	return l
}

type visitKey struct{}

const uploadSize = 30_000_000

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{stalled: make(chan struct{}), resume: make(chan struct{})}
	mux := http.NewServeMux()
	page := func(script string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "<!DOCTYPE html><body><script>(async () => {%s})()</script>", script)
		}
	}
	mux.HandleFunc("GET /idle", page(`
		const got = await (await fetch('/pattern')).arrayBuffer();
		document.body.textContent = 'got ' + got.byteLength;`))
	mux.HandleFunc("GET /mid-upload", page(`
		const body = await (await fetch('/pattern')).arrayBuffer();
		const abort = new AbortController();
		fetch('/upload', {method: 'POST', body, signal: abort.signal}).catch(() => {});
		await fetch('/stalled');
		abort.abort();
		await fetch('/resume');
		document.body.textContent = 'got ' + body.byteLength;`))
	mux.HandleFunc("GET /favicon.ico", http.NotFound)
	mux.HandleFunc("GET /pattern", func(w http.ResponseWriter, _ *http.Request) {
		proxytest.Pattern(uploadSize).Send(w, uploadSize)
	})
	mux.HandleFunc("POST /upload", func(_ http.ResponseWriter, r *http.Request) {
		v := r.Context().Value(visitKey{}).(*visit)
		s.mu.Lock()
		v.upload = true
		s.mu.Unlock()
		got := &stallingReader{Reader: r.Body, until: sentOfUpload, stall: func() {
			close(s.stalled)
			<-s.resume
		}}
		if n, err := proxytest.Pattern(uploadSize).Receive(got); n == uploadSize {
			t.Errorf("an upload that was given up arrived whole, %v", err)
		}
	})
	mux.HandleFunc("GET /stalled", func(http.ResponseWriter, *http.Request) { <-s.stalled })
	mux.HandleFunc("GET /resume", func(_ http.ResponseWriter, r *http.Request) {
		for s.uploads() && r.Context().Err() == nil { // Chromium may ask before it closes
			time.Sleep(10 * time.Millisecond)
		}
		close(s.resume)
	})
	server := &http.Server{Handler: mux,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, visitKey{}, c)
		}}
	l := listenSmall(t)
	s.addr = l.Addr().String()
	var served sync.WaitGroup
	served.Go(func() { server.Serve(siteListener{l, s}) })
	t.Cleanup(func() {
		server.Close()
		served.Wait()
	})
	return s
}

// uploads reports whether the browser has an upload that it has not given up. The proxy cannot see
// that, as what the browser has yet to send comes first.
func (s *site) uploads() bool {
	for c := range s.app.Conns() {
		if c.Info().Sent >= sentOfUpload && isEstablished(c.Client.RemoteAddr()) {
			return true
		}
	}
	return false
}

// isEstablished reports whether a socket of this machine with the address local is open.
func isEstablished(local net.Addr) bool {
	const established = "01"
	table, _ := os.ReadFile("/proc/net/tcp")
	port := fmt.Sprintf(":%04X", local.(*net.TCPAddr).Port)
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if strings.HasSuffix(f[1], port) && f[3] == established {
			return true
		}
	}
	return false
}

// A stallingReader calls stall once it has read until bytes.
type stallingReader struct {
	io.Reader
	until int
	stall func()
}

func (r *stallingReader) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if r.until > 0 && n >= r.until {
		r.stall()
	}
	r.until -= n
	return n, err
}

// browse makes Chromium open a page of s over TLS, run its script, and leave. It returns the
// results of all its connections.
func (s *site) browse(t *testing.T, closeNotify lbproxy.CloseNotify, does string) []lbproxy.Result {
	t.Helper()
	chromium := need(t, "chromium", "chromium")
	var mu sync.Mutex
	var results []lbproxy.Result
	app, err := lbproxy.New("site", []lbproxy.Upstream{{Addr: s.addr}}, &lbproxy.Options{
		OnDone: func(r lbproxy.Result) {
			mu.Lock()
			defer mu.Unlock()
			results = append(results, r)
		},
	})
	proxytest.Must(t, err)
	s.app = app
	serverTLS, _ := proxytest.TLSConfigs()
	l := listenSmall(t)
	var served sync.WaitGroup
	served.Go(func() {
		app.Serve(l, lbproxy.HandshakeTLS(serverTLS, func(_ context.Context, c *lbproxy.Conn) error {
			c.Client.(*lbproxy.TLSConn).CloseNotify = closeNotify
			return nil
		}))
	})
	defer served.Wait()
	defer app.Close()
	page := map[string]string{idle: "/idle", upload: "/mid-upload"}[does]
	dom, complaints := output(t, command(t, chromium, "--headless=new", "--no-sandbox",
		"--disable-gpu", "--disable-background-networking", "--ignore-certificate-errors",
		"--user-data-dir="+folder(t), "--virtual-time-budget=10000", "--dump-dom",
		"https://"+l.Addr().String()+page))
	if want := fmt.Sprint("<body>got ", uploadSize, "</body>"); !strings.Contains(dom, want) {
		t.Fatalf("the page is %q, want %s; %s", tail(dom), want, tail(complaints))
	}
	proxytest.Eventually(t, "all connections end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		open := func(v *visit) bool { return v.end == "" }
		return app.Stats().Open == 0 && !slices.ContainsFunc(s.visits, open)
	})
	app.Close()
	mu.Lock()
	defer mu.Unlock()
	return results
}
