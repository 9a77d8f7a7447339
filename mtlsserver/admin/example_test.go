package admin_test

import (
	"bufio"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

// The handler can be mounted in any mux. Everybody who can reach it there can read it.
func ExampleHandler() {
	app, err := lbproxy.New("web", []lbproxy.Upstream{
		{Addr: "10.0.0.1:80"}, {Addr: "10.0.0.2:80", Drain: true},
	}, nil)
	if err != nil {
		log.Fatal(err)
	}
	apps := func() []*lbproxy.LBProxyApp { return []*lbproxy.LBProxyApp{app} }
	mux := http.NewServeMux()
	mux.Handle("/lb/", http.StripPrefix("/lb", admin.Handler(apps, nil)))

	server := httptest.NewServer(mux)
	defer server.Close()
	answer, err := http.Get(server.URL + "/lb/metrics")
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "lbproxy_upstream_draining") {
			fmt.Println(lines.Text())
		}
	}
	// Output:
	// lbproxy_upstream_draining{app="web",upstream="10.0.0.1:80"} 0
	// lbproxy_upstream_draining{app="web",upstream="10.0.0.2:80"} 1
}
