//go:build linux

package interop

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// An operated proxy has a status page.
type operated struct {
	*proxy
	app  string
	url  string // of the status page; paths follow it
	dial func() (net.Conn, error)
	mtls *mtls // nil if it is examples/basic
}

// startOperated starts examples/basic or mtlsserver with upstreams, which are checked.
func startOperated(t *testing.T, program string, upstreams ...string) *operated {
	t.Helper()
	if program == "basic" {
		flags := []string{"-admin", "127.0.0.1:0", "-check", "2s"}
		o := &operated{proxy: startBasicWith(t, flags, upstreams...), app: "basic"}
		o.url = o.await(t, `status page at (\S+)`)
		o.dial = func() (net.Conn, error) { return net.Dial("tcp", o.addr) }
		return o
	}
	var list []object
	for _, addr := range upstreams {
		list = append(list, object{"addr": addr})
	}
	m := startApps(t, object{"admin": object{"listen": "127.0.0.1:0", "socket": "admin.sock"}}, object{
		"id": "web", "listen": "127.0.0.1:0", "upstreams": list,
		"healthCheck": object{"interval": "1s", "timeout": "10s", "fall": 1},
	})
	o := &operated{proxy: m.proxy, app: "web", mtls: m}
	o.url = "http://" + o.await(t, `admin listens on (\S+)`) + "/"
	config := m.clientConfig(t)
	o.dial = func() (net.Conn, error) { return tls.Dial("tcp", o.addr, config) }
	return o
}

// clientConfig returns the TLS configuration of alice's connections.
func (m *mtls) clientConfig(t *testing.T) *tls.Config {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(m.file("alice.pem"), m.file("alice.key"))
	proxytest.Must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(readFile(t, m.file("ca.pem")))
	return &tls.Config{
		RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{cert},
	}
}

// change asks for a change by the socket.
func (m *mtls) change(t *testing.T, path string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", m.file("admin.sock"))
		},
	}}
	r, err := client.Post("http://lb/api/"+path, "", nil)
	proxytest.Must(t, err)
	defer r.Body.Close()
	if body, _ := io.ReadAll(r.Body); r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %s", path, r.Status, body)
	}
}

// get returns the answer of the status page's server for a path.
func (o *operated) get(path string) (string, error) {
	r, err := http.Get(o.url + path)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s %s", path, r.Status, body)
	}
	return string(body), err
}

func (o *operated) fetch(t *testing.T, path string) string {
	t.Helper()
	body, err := o.get(path)
	proxytest.Must(t, err)
	return body
}

// load runs five clients that stay and three that come and go until the test ends.
func (o *operated) load(t *testing.T) {
	t.Helper()
	for range 5 {
		c, err := o.dial()
		proxytest.Must(t, err)
		t.Cleanup(func() { c.Close() })
		proxytest.Must(t, proxytest.Ping(c))
	}
	var over atomic.Bool
	var clients sync.WaitGroup
	for range 3 {
		clients.Go(func() {
			for !over.Load() {
				c, err := o.dial()
				if err == nil {
					err = proxytest.Ping(c)
					c.Close()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		over.Store(true)
		clients.Wait()
	})
}

// A row is the page's row of an upstream.
type row struct {
	App, Upstream, State, Says string
	Total                      int
}

const rowsScript = `[...document.querySelectorAll("tr[data-upstream]")].map((row) => ({
	app: row.closest("[data-app]").dataset.app,
	upstream: row.dataset.upstream,
	state: row.querySelector(".state").className,
	says: row.querySelector(".state").textContent,
	total: Number(row.querySelector(".total data").value),
}))`

func (b *tab) rows() (rows []row) {
	b.t.Helper()
	b.eval(rowsScript, &rows)
	return rows
}

// wantQuiet fails the test if the page complained: of a fault in its script, a request that failed
// or something that its policy forbids.
func (b *tab) wantQuiet() {
	b.t.Helper()
	for _, complaint := range b.takeComplaints() {
		b.t.Errorf("Chromium complains: %s", complaint)
	}
}

func TestStatusPageInABrowser(t *testing.T) {
	for _, program := range []string{"basic", "mtlsserver"} {
		for _, script := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, JavaScript %v", program, script), func(t *testing.T) {
				b := newTab(t)
				good := []string{
					proxytest.Upstream(t, proxytest.Echo), proxytest.Upstream(t, proxytest.Echo),
				}
				dead := proxytest.RefusingAddr(t)
				o := startOperated(t, program, good[0], good[1], dead)
				o.load(t)
				b.call("Emulation.setScriptExecutionDisabled", object{"value": !script}, nil)
				b.size(1200, 800)
				b.open(o.url)

				// With a script the page updates itself; without one it is opened again.
				awaitRows := func(what string, ok func([]row) bool) (rows []row) {
					t.Helper()
					proxytest.Eventually(t, what, func() bool {
						if !script {
							b.open(o.url)
						}
						rows = b.rows()
						return ok(rows)
					})
					return rows
				}
				rows := awaitRows("two upstreams are up, one is down", func(rows []row) bool {
					return len(rows) == 3 && rows[0].State == "state up" &&
						rows[1].State == "state up" && rows[2].State == "state down"
				})
				for i, want := range append(good, dead) {
					if rows[i].App != o.app || rows[i].Upstream != want {
						t.Errorf("row %d is of %s %s", i, rows[i].App, rows[i].Upstream)
					}
				}
				awaitRows("totals grow", func(now []row) bool {
					return now[0].Total > rows[0].Total && now[1].Total > rows[1].Total
				})
				if script {
					for _, curve := range []string{"open", "opened", "bytes"} {
						b.await(fmt.Sprintf(
							"document.querySelector('#curve-%s polyline')?.points.length > 1", curve))
					}
				} else {
					b.await("document.querySelector('meta[http-equiv=refresh]')?.content === '10'")
					b.await("document.body.innerText.includes('need JavaScript')")
				}
				if o.mtls != nil {
					at := "?app=web&upstream=" + good[1]
					o.mtls.change(t, "drain"+at)
					awaitRows("it drains", func(rows []row) bool {
						return rows[1].Says == "up, draining"
					})
					o.mtls.change(t, "undrain"+at)
					awaitRows("it drains no more", func(rows []row) bool { return rows[1].Says == "up" })
				}
				b.wantReadable("status")
				b.wantLinksByKeyboard()
				b.open(o.url + "conns?upstream=" + good[0])
				b.wantReadable("conns")
				var conns int
				b.eval(`document.querySelectorAll("tbody tr").length`, &conns)
				if conns < 2 {
					t.Errorf("the page of connections has %d rows, want two or more", conns)
				}
				b.wantQuiet()
			})
		}
	}
}

// wantReadable looks at the page in a window and on a phone, by day and by night.
func (b *tab) wantReadable(page string) {
	b.t.Helper()
	for _, width := range []int{1200, 360} {
		for _, dark := range []bool{false, true} {
			b.size(width, 800)
			b.dark(dark)
			var wide int
			b.eval("document.documentElement.scrollWidth", &wide)
			if wide > width {
				b.t.Errorf("the page is %d px wide in a window of %d", wide, width)
			}
			var pale []string
			b.eval(paleScript, &pale)
			for _, text := range pale {
				b.t.Errorf("dark %v: not readable: %s", dark, text)
			}
			var light float64
			b.eval("luminance(getComputedStyle(document.body).backgroundColor)", &light)
			if (light < 0.2) != dark {
				b.t.Errorf("dark %v: the background's luminance is %v", dark, light)
			}
			b.screenshot(fmt.Sprint(b.t.Name(), " ", page, " ", width, " dark ", dark))
		}
	}
	b.size(1200, 800)
	b.dark(false)
}

// paleScript lists the texts whose contrast is below 4.5, which WCAG wants of them at least.
const paleScript = `(() => {
	globalThis.luminance = (color) => {
		const [r, g, b] = color.match(/[\d.]+/g).map((n) => n / 255)
			.map((n) => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4);
		return 0.2126 * r + 0.7152 * g + 0.0722 * b;
	};
	const behind = (e) => {
		for (; e; e = e.parentElement) {
			const color = getComputedStyle(e).backgroundColor;
			if (color !== "rgba(0, 0, 0, 0)") return color;
		}
	};
	return [...document.querySelectorAll("body, body *")]
		.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
		.filter((e) => e.checkVisibility() && !e.closest("noscript"))
		.filter((e) => {
			const [a, b] = [getComputedStyle(e).color, behind(e)].map(luminance).sort((a, b) => b - a);
			return (a + 0.05) / (b + 0.05) < 4.5;
		})
		.map((e) => e.textContent.trim().slice(0, 80));
})()`

// wantLinksByKeyboard reaches every link by the Tab key, and sees where it is.
func (b *tab) wantLinksByKeyboard() {
	b.t.Helper()
	var links []string
	b.eval("[...document.links].map((a) => a.href)", &links)
	reached := map[string]bool{}
	proxytest.Eventually(b.t, fmt.Sprint("Tab reaches ", links), func() bool {
		b.press("Tab", 9)
		var at struct{ Href, Outline string }
		b.eval(`(() => {
			const at = document.activeElement;
			return {href: at.href || "", outline: getComputedStyle(at).outlineStyle};
		})()`, &at)
		if at.Href != "" {
			reached[at.Href] = true
			if at.Outline == "none" {
				b.t.Errorf("nothing shows that %s has the focus", at.Href)
			}
		}
		for _, link := range links {
			if !reached[link] {
				return false
			}
		}
		return true
	})
}

// Without this, Chromium's complaints would go unnoticed.
func TestBrowserSeesViolationsOfThePolicy(t *testing.T) {
	b := newTab(t)
	o := startOperated(t, "basic", proxytest.Upstream(t, proxytest.Echo))
	b.open(o.url)
	b.wantQuiet()
	b.eval(`document.head.append(
		Object.assign(document.createElement("script"), {text: "1"})), 1`, new(int))
	var seen []string
	proxytest.Eventually(t, "the policy refuses a script", func() bool {
		seen = append(seen, b.takeComplaints()...)
		return strings.Contains(strings.Join(seen, ""), "Content Security Policy")
	})
}
