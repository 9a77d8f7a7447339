package admin_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/internal/proxytest"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

func TestPageSaysFirstWhatNeedsALook(t *testing.T) {
	app := newApp(t, "web", nil, proxytest.RefusingAddr(t), proxytest.Upstream(t, proxytest.Echo))
	h := admin.Handler(listOf(app), &admin.Options{Info: func() admin.Info {
		in := func(d time.Duration) time.Time { return time.Now().Add(d + time.Minute) }
		return admin.Info{Certificates: []admin.Certificate{
			{Key: "old", NotAfter: in(-48 * time.Hour)},
			{Key: "near", NotAfter: in(29 * 24 * time.Hour)},
			{Key: "far", NotAfter: in(30 * 24 * time.Hour)},
		}}
	}})
	const certificates = "Certificate old has expired. Certificate near expires in 29 days. </p>"
	wantPart(t, get(t, h, "/"), `class="warn">Ready. `+certificates)
	proxytest.Must(t, proxytest.Ping(proxytest.Dial(t, serve(t, app)))) // the first upstream refuses
	wantPart(t, get(t, h, "/"), `class="warn">Ready. App web: 1 of 2 upstreams up. `+certificates)
	proxytest.Must(t, app.SetUpstreams([]lbproxy.Upstream{{Addr: "10.0.0.1:80", Drain: true}}))
	wantPart(t, get(t, h, "/"),
		`class="bad">app web: no upstream takes connections: 1 draining. `+certificates)
}

func TestUserOfTwoAppsIsOneUser(t *testing.T) {
	h := admin.Handler(listOf(), &admin.Options{Info: func() admin.Info {
		return admin.Info{Users: []admin.User{
			{Name: "alice", App: "web", Open: 2}, {Name: "alice", App: "db", Open: 1},
			{Name: "bob", App: "web", Open: 1},
		}}
	}})
	wantPart(t, get(t, h, "/"), "(2 with connections)")
}

func TestPageWritesNumbersForPeopleAndPrograms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		info := admin.Info{Refused: map[string]uint64{"expired": 1234567}}
		h := admin.Handler(listOf(newApp(t, "web", nil, "10.0.0.1:80")), &admin.Options{
			Info: func() admin.Info { return info },
		})
		wantPart(t, get(t, h, "/"), `<data value="1234567">1,234,567</data>`)
		passed := time.Duration(0)
		for _, row := range []struct {
			after time.Duration
			want  string
		}{
			{59 * time.Second, "59 s"},
			{61 * time.Second, "1 min 1 s"},
			{119 * time.Minute, "1 h 59 min"},
			{26 * time.Hour, "1 d 2 h"},
		} {
			time.Sleep(row.after - passed)
			passed = row.after
			wantPart(t, get(t, h, "/"), ">"+row.want+"</time>")
		}
	})
}

// mtlsserver status writes the same; see TestSizes there.
func TestPageCountsBytesBy1024(t *testing.T) {
	for n, want := range map[int]string{
		0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1536: "1.5 KiB", 1 << 20: "1 MiB",
	} {
		app := newApp(t, "web", nil, proxytest.Upstream(t, proxytest.Echo))
		c := proxytest.Dial(t, serve(t, app))
		_, err := c.Write(make([]byte, n))
		proxytest.Must(t, err)
		proxytest.Must(t, c.CloseWrite())
		_, err = io.Copy(io.Discard, c)
		proxytest.Must(t, err)
		proxytest.Eventually(t, "it is over", func() bool { return app.Stats().Open == 0 })
		wantPart(t, get(t, admin.Handler(listOf(app), nil), "/"),
			fmt.Sprintf(`<data value="%d">%s</data>`, n, want))
	}
}

func wantPart(t *testing.T, page, part string) {
	t.Helper()
	if !strings.Contains(page, part) {
		t.Errorf("the page lacks %s:\n%s", part, page)
	}
}
