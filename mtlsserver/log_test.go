package mtlsserver

import (
	"errors"
	"log/slog"
	"maps"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy"
)

func TestFinalLines(t *testing.T) {
	l := newLab(t, nil)
	log := &book{told: map[string]bool{}, more: make(chan struct{})}
	s, err := New(l.config, &Options{Logger: slog.New(log), RefusalLines: 1})
	must(t, err)
	defer s.Close()
	claim, alice := &Claim{Cert: l.alice.Leaf}, &Identity{User: &User{Name: "alice"}}
	refused := func(r Refusal) lbproxy.Result {
		return lbproxy.Result{End: lbproxy.EndNotAdmitted, Err: &r}
	}
	var want []entry
	for _, test := range []struct {
		id                   *Identity // nil: the handshake was not done
		result               lbproxy.Result
		level, reason, claim string // level is empty if there is no line
	}{
		{alice, lbproxy.Result{End: lbproxy.EndDone}, "INFO", "done", ""},
		{alice, lbproxy.Result{End: lbproxy.EndDone}, "INFO", "done", ""}, // only refusals have a bound
		{alice, lbproxy.Result{End: lbproxy.EndIdleTimeout}, "INFO", "idle-timeout", ""},
		{alice, lbproxy.Result{End: lbproxy.EndNoUpstream}, "WARN", "no-upstream", ""},
		{alice, lbproxy.Result{End: lbproxy.EndDialFailed}, "WARN", "dial-failed", ""},
		{alice, lbproxy.Result{End: lbproxy.EndUpstreamError, Err: errors.New("x")},
			"WARN", "upstream-error", ""},
		{nil, refused(Refusal{Reason: Expired, Claim: claim, User: "alice"}), "INFO", "expired", "alice"},
		{nil, refused(Refusal{Reason: UnknownSerial, Claim: claim}), "INFO", "unknown-serial", ""},
		{alice, refused(Refusal{Reason: AppRemoved}), "INFO", "app-removed", ""},
		{alice, lbproxy.Result{End: lbproxy.EndCanceled, Err: &Refusal{Reason: Revoked}},
			"INFO", "revoked", ""},
		{nil, lbproxy.Result{End: lbproxy.EndCanceled}, // admit has panicked
			"INFO", "handshake-failed", ""},
		{nil, lbproxy.Result{End: lbproxy.EndNotAdmitted, Err: errors.New("x")},
			"INFO", "handshake-failed", ""},
		{nil, refused(Refusal{Reason: NotTLS}), "INFO", "not-tls", ""},
		{nil, refused(Refusal{Reason: NotTLS}), "", "", ""},
		{nil, refused(Refusal{Reason: NotTLS}), "", "", ""},
	} {
		c := &session{conn: &lbproxy.Conn{Client: someConn(t)}, app: "web"}
		c.id.Store(test.id)
		s.done(c, test.result)
		if test.level != "" {
			want = append(want, entry{"level": test.level, "claimed_user": test.claim,
				"reason": test.reason})
		}
	}
	denied := maps.Clone(s.denied)
	maps.DeleteFunc(denied, func(_ Reason, n uint64) bool { return n == 0 })
	if refusals := (map[Reason]uint64{Expired: 1, UnknownSerial: 1, AppRemoved: 1, Revoked: 1,
		HandshakeFailed: 2, NotTLS: 3}); !maps.Equal(denied, refusals) {
		t.Errorf("refusals %v, want %v", denied, refusals)
	}
	s.Close() // writes the log
	for _, e := range log.all() {
		switch {
		case e["msg"] == "connections refused without a line each":
			if e["reason"] != string(NotTLS) || e["connections"] != "2" {
				t.Errorf("line %v, want 2 of not-tls", e)
			}
		case len(want) == 0:
			t.Errorf("line %v is one too many", e)
		default:
			_, forwarded := e["upstream"]
			if admitted := e["user"] != "" && e["reason"] != string(AppRemoved); forwarded != admitted {
				t.Errorf("line %v has an upstream: %t, want %t", e, forwarded, admitted)
			}
			for key, value := range want[0] {
				if e[key] != value {
					t.Errorf("line %v, want %v", e, want[0])
				}
			}
			want = want[1:]
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

// A connection that has ended is no longer among the open ones of its user.
func TestEndedConnectionsAreCountedOut(t *testing.T) {
	s := newLab(t, nil).server
	at := userApp{"alice", "web"}
	for open := 2; open > 0; open-- {
		l := &session{conn: &lbproxy.Conn{Client: someConn(t)}, app: "web"}
		l.id.Store(&Identity{User: &User{Name: "alice"}})
		s.liveMu.Lock()
		s.live[l], s.open[at] = struct{}{}, open
		s.liveMu.Unlock()
		s.done(l, lbproxy.Result{End: lbproxy.EndDone})
		s.liveMu.Lock()
		n, ok := s.open[at]
		if _, live := s.live[l]; live || n != open-1 || ok != (n > 0) {
			t.Errorf("%d open, in the map: %t, live: %t; want %d", n, ok, live, open-1)
		}
		s.liveMu.Unlock()
	}
}

// A second's count ends with it, and is told once.
func TestWithheldLinesAreCountedOnce(t *testing.T) {
	now := time.Now()
	r := refusals{most: 1, seconds: map[Reason]*second{}}
	for i, want := range []bool{true, false, false} {
		if got := r.allow(NotTLS, now); got != want {
			t.Errorf("refusal %d may have a line: %t, want %t", i, got, want)
		}
	}
	if n := r.take(); len(n) != 1 || n[NotTLS] != 2 {
		t.Errorf("withheld %v, want 2", n)
	}
	if n := r.take(); len(n) != 0 {
		t.Errorf("withheld %v, want none since", n)
	}
}
