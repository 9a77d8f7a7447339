package mtlsserver

import (
	"context"
	"testing"

	"github.com/danielepagano/lbproxy"
)

// A meter is a RateLimitManager that reports whether it is back in its initial state.
type meter struct{ idle bool }

func (*meter) Report(context.Context, lbproxy.Event) (d lbproxy.Decision) { return d }
func (m *meter) Idle() bool                                               { return m.idle }

func TestLimitsAreForgottenWhenNothingNeedsThem(t *testing.T) {
	var made []*meter
	l := &limits{kept: map[limitKey]*keptLimit{},
		make: func(_, _ string, _ Limit) lbproxy.RateLimitManager {
			made = append(made, &meter{idle: true})
			return made[len(made)-1]
		}}
	want := func(when string, kept, makes int) {
		t.Helper()
		if len(l.kept) != kept || len(made) != makes {
			t.Errorf("%s: %d limits are kept, %d were made; want %d and %d", when, len(l.kept),
				len(made), kept, makes)
		}
	}
	alice := User{Name: "alice", Apps: []string{"web", "db"}, Limit: &Limit{Open: 1},
		AppLimits: map[string]Limit{"web": {Open: 2}}} // two limits
	_, first := l.of(&alice, "web", nil)
	_, second := l.of(&alice, "web", nil)
	want("alice has two sessions", 2, 2)
	l.forgetIdle()
	first()
	l.forgetIdle()
	want("alice has a session", 2, 2)
	second()
	made[0].idle = false
	l.forgetIdle()
	want("one of the limits is not idle", 1, 2)
	_, third := l.of(&alice, "db", nil) // the other one
	third()
	want("alice has had another session", 2, 3)
	made[0].idle = true
	l.forgetIdle()
	want("nothing needs them", 0, 3)
}

func TestLimitWithoutAManager(t *testing.T) {
	l := &limits{kept: map[limitKey]*keptLimit{},
		make: func(_, _ string, _ Limit) lbproxy.RateLimitManager { return nil }}
	m, release := l.of(&User{Name: "alice", Limit: &Limit{Open: 1}}, "web", nil)
	if m != nil {
		t.Errorf("manager %v, want none", m)
	}
	release()
	l.forgetIdle()
	if len(l.kept) != 0 {
		t.Errorf("%d limits are kept, want none", len(l.kept))
	}
}

func TestNewLimitMayPanic(t *testing.T) {
	panics := true
	l := &limits{kept: map[limitKey]*keptLimit{},
		make: func(_, _ string, _ Limit) lbproxy.RateLimitManager {
			if panics {
				panic("NewLimit")
			}
			return &meter{}
		}}
	alice := &User{Name: "alice", Limit: &Limit{Open: 1}}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		l.of(alice, "web", nil)
	}()
	panics = false
	if m, _ := l.of(alice, "web", nil); m == nil {
		t.Error("no limit after the panic")
	}
}

func TestLimitThatIsUsedWhileItIsAskedIsKept(t *testing.T) {
	l := &limits{kept: map[limitKey]*keptLimit{}}
	alice := &User{Name: "alice", Limit: &Limit{Open: 1}}
	use := func() {
		_, release := l.of(alice, "web", nil)
		release()
	}
	l.make = func(_, _ string, _ Limit) lbproxy.RateLimitManager { return &askedMeter{asked: use} }
	use()
	l.forgetIdle()
	if len(l.kept) != 1 {
		t.Error("the limit is forgotten, with what its last connection has spent")
	}
}

// An askedMeter calls asked in Idle, after it has found that it is idle.
type askedMeter struct {
	meter
	asked func()
}

func (m *askedMeter) Idle() bool {
	m.asked()
	return true
}
