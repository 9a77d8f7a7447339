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
	bob := User{Name: "bob", Apps: []string{"web"}, Limit: &Limit{Open: 1}}

	l.configure([]User{alice}, nil)(true)
	want("configured", 2, 2)
	l.configure([]User{alice}, nil)(true)
	l.forgetIdle()
	want("configured again", 2, 2)
	l.configure([]User{alice, bob}, nil)(false)
	want("a reload failed", 3, 3)
	l.forgetIdle()
	want("and its limit is idle", 2, 3)
	l.configure(nil, nil)(true)
	want("alice was removed", 0, 3)

	l.configure([]User{alice}, nil)(true)
	_, first := l.of(&alice, "web", nil)
	_, second := l.of(&alice, "web", nil)
	l.configure(nil, nil)(true)
	l.forgetIdle()
	first()
	l.forgetIdle()
	want("alice was removed and has a session", 2, 5)
	made[3].idle = false
	second()
	l.forgetIdle()
	want("one of the limits is not idle", 1, 5)
	l.forgetIdle()
	l.configure(nil, nil)(true)
	want("still not", 1, 5)
	made[3].idle = true
	l.forgetIdle()
	want("nothing needs it", 0, 5)
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

func TestReloadConfiguresLimitsIfItSucceeds(t *testing.T) {
	l := newLab(t, func(l *lab) { l.config.Users[0].Limit = &Limit{Open: 1} })
	configured := func(open int) bool {
		l.server.limits.mu.Lock()
		defer l.server.limits.mu.Unlock()
		k := l.server.limits.kept[limitKey{"alice", "", Limit{Open: open}}]
		return k != nil && k.configured
	}
	if !configured(1) {
		t.Error("the first limit is not configured")
	}
	_, err := l.server.Reload(l.with(func(c *Config) {
		c.Users[0].Limit = &Limit{Open: 2}
		c.Apps[0].Listen = l.addr("db") // taken
	}))
	if err == nil || !configured(1) || configured(2) {
		t.Errorf("reload: %v; the limits are configured: %t, %t", err, configured(1), configured(2))
	}
	l.reload(t, l.with(func(c *Config) { c.Users[0].Limit = &Limit{Open: 2} }))
	if configured(1) || !configured(2) {
		t.Errorf("the limits are configured: %t, %t", configured(1), configured(2))
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

// Nobody can tell whether a manager without Idle is idle. It goes with its configuration.
func TestLimitsWithoutIdleGoWithTheirConfiguration(t *testing.T) {
	l := &limits{kept: map[limitKey]*keptLimit{},
		make: func(_, _ string, _ Limit) lbproxy.RateLimitManager {
			return struct{ lbproxy.RateLimitManager }{}
		}}
	want := func(when string, kept int) {
		t.Helper()
		if l.forgetIdle(); len(l.kept) != kept {
			t.Errorf("%s: %d limits are kept, want %d", when, len(l.kept), kept)
		}
	}
	alice := User{Name: "alice", Apps: []string{"web"}, Limit: &Limit{Open: 1}}
	l.configure([]User{alice}, nil)(false)
	want("the reload failed", 0)
	l.configure([]User{alice}, nil)(true)
	_, release := l.of(&alice, "web", nil)
	release()
	want("configured", 1)
	_, release = l.of(&alice, "web", nil)
	l.configure(nil, nil)(true)
	want("alice was removed and has a session", 1)
	release()
	want("nothing needs it", 0)
	_, release = l.of(&alice, "web", nil) // alice is a user of Options.Users
	release()
	want("not of a configuration", 1)
}

// A panic of NewLimit leaves no reference to the limits that were made before it: they would be
// kept for ever.
func TestPanicOfNewLimitLeavesNoReferences(t *testing.T) {
	l := &limits{kept: map[limitKey]*keptLimit{},
		make: func(_, app string, _ Limit) lbproxy.RateLimitManager {
			if app == "" {
				panic("NewLimit")
			}
			return &meter{idle: true}
		}}
	alice := User{Name: "alice", Apps: []string{"web"}, Limit: &Limit{Open: 1},
		AppLimits: map[string]Limit{"web": {Open: 2}}}
	for name, call := range map[string]func(){
		"of":        func() { l.of(&alice, "web", nil) },
		"configure": func() { l.configure([]User{alice}, nil) },
	} {
		if panicOf(call) != "NewLimit" {
			t.Errorf("%s: no panic", name)
		}
		if len(l.kept) != 1 {
			t.Errorf("%s: limits %v, want the first", name, l.kept)
		}
		if l.forgetIdle(); len(l.kept) != 0 {
			t.Errorf("%s: limits %v are still in use", name, l.kept)
		}
	}
}

// panicOf returns what f panics with.
func panicOf(f func()) (v any) {
	defer func() { v = recover() }()
	f()
	return nil
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
