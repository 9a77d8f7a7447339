package mtlsserver

import (
	"cmp"
	"sync"

	"github.com/danielepagano/lbproxy"
)

// limits hold the RateLimitManagers of users. An unchanged limit keeps its manager, and so its
// state, over reloads.
type limits struct {
	make func(user, app string, l Limit) lbproxy.RateLimitManager

	mu   sync.Mutex // not held while calling make or a manager
	kept map[limitKey]*keptLimit
}

// A limitKey identifies a limit. It includes the Limit, so that a changed one gets a new manager.
type limitKey struct {
	user, app string // app is empty for a limit of all apps together
	limit     Limit
}

type keptLimit struct {
	lbproxy.RateLimitManager        // nil: no limit
	refs                     int    // sessions now, and one while it is configured
	uses                     uint64 // refs ever
	configured               bool   // in the current configuration
	listed                   bool   // in any configuration
}

// keysOf returns the keys of u's limits for an app.
func keysOf(u *User, app string, defaultLimit *Limit) (keys []limitKey) {
	if l, ok := u.AppLimits[app]; ok {
		keys = append(keys, limitKey{u.Name, app, l})
	}
	if l := cmp.Or(u.Limit, defaultLimit); l != nil {
		keys = append(keys, limitKey{u.Name, "", *l})
	}
	return keys
}

// of returns the manager for a session of u with app; nil if there is no limit. The caller must
// call release when the session has ended.
func (l *limits) of(
	u *User, app string, defaultLimit *Limit,
) (m lbproxy.RateLimitManager, release func()) {
	var each []lbproxy.RateLimitManager
	var all []*keptLimit
	release = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range all {
			k.refs--
		}
	}
	made := false // remains false if NewLimit panics
	defer func() {
		if !made {
			release()
		}
	}()
	for _, key := range keysOf(u, app, defaultLimit) {
		k := l.take(key)
		all = append(all, k)
		if k.RateLimitManager != nil {
			each = append(each, k.RateLimitManager)
		}
	}
	made = true
	if each != nil {
		m = lbproxy.All(each...)
	}
	return m, release
}

// take returns the limit of a key and counts a reference. It makes the limit if there is none.
func (l *limits) take(key limitKey) *keptLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept[key] == nil {
		if made := l.makeUnlocked(key); l.kept[key] == nil { // no other call has made it meanwhile
			l.kept[key] = made
		}
	}
	k := l.kept[key]
	k.refs++
	k.uses++
	return k
}

// makeUnlocked makes a limit. It releases mu meanwhile, and holds it again also after a panic.
func (l *limits) makeUnlocked(key limitKey) *keptLimit {
	l.mu.Unlock()
	defer l.mu.Lock()
	return &keptLimit{RateLimitManager: l.make(key.user, key.app, key.limit)}
}

// configure makes the limits of users. The caller must call done once: done(true) replaces the
// limits of the previous configuration, done(false) undoes configure.
func (l *limits) configure(users []User, defaultLimit *Limit) (done func(commit bool)) {
	now := map[*keptLimit]bool{}
	done = func(commit bool) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for key, k := range l.kept {
			if !commit {
				if now[k] {
					k.refs--
				}
				continue
			}
			was := k.configured
			if k.configured = now[k]; was {
				k.refs--
			}
			if was && !k.configured && k.refs == 0 {
				delete(l.kept, key)
			}
		}
	}
	made := false // remains false if NewLimit panics
	defer func() {
		if !made {
			done(false)
		}
	}()
	for i := range users {
		for _, app := range users[i].Apps {
			for _, key := range keysOf(&users[i], app, defaultLimit) {
				k := l.take(key)
				l.mu.Lock()
				k.listed = true
				if now[k] {
					k.refs--
				}
				l.mu.Unlock()
				now[k] = true
			}
		}
	}
	made = true
	return done
}

// forgetIdle forgets unused limits that are back in their initial state, and those of a past
// configuration whose managers have no Idle. Without it, the limits of users in Options.Users would
// stay for ever.
func (l *limits) forgetIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, k := range l.kept {
		before := k.uses
		if k.refs == 0 && l.isIdle(k) && k.uses == before { // else it was used meanwhile
			delete(l.kept, key)
		}
	}
}

// isIdle releases mu while it asks the manager.
func (l *limits) isIdle(k *keptLimit) bool {
	idler, ok := k.RateLimitManager.(interface{ Idle() bool })
	if !ok {
		return k.RateLimitManager == nil || k.listed // unused, so its configuration is gone
	}
	l.mu.Unlock()
	defer l.mu.Lock()
	return idler.Idle()
}

// manager returns a manager that keeps the limit in memory.
func (l Limit) manager() lbproxy.RateLimitManager {
	var each []lbproxy.RateLimitManager
	if l.Open > 0 {
		each = append(each, &lbproxy.OpenLimit{Max: l.Open})
	}
	if l.Burst > 0 {
		each = append(each, &lbproxy.TokenBucket{Burst: l.Burst, Every: l.Every})
	}
	if l.BytesPerSecond > 0 {
		each = append(each, &lbproxy.Bandwidth{BytesPerSecond: l.BytesPerSecond})
	}
	return lbproxy.All(each...)
}
