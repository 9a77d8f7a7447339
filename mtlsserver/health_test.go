package mtlsserver

import (
	"testing"
	"time"
)

// An upstream that its checks found down gets no connections. A reload changes the checks at once:
// without checks the upstream's dials decide, with new ones it is found down again. Open
// connections go on throughout.
func TestHealthChecksFollowTheConfiguration(t *testing.T) {
	l := newLab(t, func(l *lab) {
		l.config.Apps[0].HealthCheck = &HealthCheck{Interval: 10 * time.Millisecond,
			Timeout: time.Second, Rise: 1, Fall: 1}
	})
	down := func(e entry) bool {
		return e["msg"] == "lbproxy: upstream is down by its health checks"
	}
	c := l.in(t, "web", &l.alice)
	l.web.Listener.Close()
	if e := l.log.await(t, "of an upstream that is down", down); e["app"] != "web" ||
		e["upstream"] != l.web.Addr().String() {
		t.Errorf("line %v", e)
	}
	refused := func(reason string) {
		t.Helper()
		c := l.dial(t, "web", &l.alice)
		must(t, ended(c))
		if e := l.log.of(t, c.LocalAddr()); e["reason"] != reason {
			t.Errorf("line %v, want %s", e, reason)
		}
	}
	refused("no-upstream")
	l.reload(t, l.with(func(c *Config) { c.Apps[0].HealthCheck = nil }))
	refused("dial-failed")
	lines := len(l.log.all())
	l.reload(t, l.config)
	l.log.await(t, "of an upstream that is down again", func(e entry) bool {
		all := l.log.all()
		for _, e := range all[lines:] {
			if down(e) {
				return true
			}
		}
		return false
	})
	refused("no-upstream")
	same := *l.config.Apps[0].HealthCheck
	app := l.server.Apps()["web"]
	l.reload(t, l.with(func(c *Config) { c.Apps[0].HealthCheck = &same }))
	if l.server.Apps()["web"] != app {
		t.Error("the same checks in another Config make another app")
	}
	must(t, echoed(c))
}
