package mtlsserver

import (
	"cmp"
	"sync"

	"github.com/danielepagano/lbproxy"
)

// limits are the RateLimitManagers of users. They last from one snapshot to the next.
type limits struct {
	make func(user, app string, l Limit) lbproxy.RateLimitManager

	mu   sync.Mutex // not held over make or a manager's methods
	kept map[limitKey]*keptLimit
}

// A limitKey is what a manager is for. It has the Limit itself, so that a changed one begins anew.
type limitKey struct {
	user, app string // app is empty where all apps share it
	limit     Limit
}

type keptLimit struct {
	lbproxy.RateLimitManager     // nil: no limit
	refs                     int // sessions that have it, and the configuration
	configured               bool
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

// of returns what bounds u's connections to app, nil if nothing does, and what says that the
// session is over.
func (l *limits) of(u *User, app string, defaultLimit *Limit) (m lbproxy.RateLimitManager, release func()) {
	var each []lbproxy.RateLimitManager
	var all []*keptLimit
	for _, key := range keysOf(u, app, defaultLimit) {
		k := l.take(key)
		all = append(all, k)
		if k.RateLimitManager != nil {
			each = append(each, k.RateLimitManager)
		}
	}
	if each != nil {
		m = lbproxy.All(each...)
	}
	return m, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range all {
			k.refs--
		}
	}
}

// take returns the limit of a key, a new one if there is none, and counts a reference.
func (l *limits) take(key limitKey) *keptLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kept[key]
	if k == nil {
		l.mu.Unlock()
		m := l.make(key.user, key.app, key.limit)
		l.mu.Lock()
		if k = l.kept[key]; k == nil { // else somebody was quicker
			k = &keptLimit{RateLimitManager: m}
			l.kept[key] = k
		}
	}
	k.refs++
	return k
}

// configure makes the limits of users, and returns what makes them those that are configured, if
// it is called with true; those that were are forgotten. It must be called once.
func (l *limits) configure(users []User, defaultLimit *Limit) (done func(commit bool)) {
	now := map[*keptLimit]bool{}
	for i := range users {
		for _, app := range users[i].Apps {
			for _, key := range keysOf(&users[i], app, defaultLimit) {
				if k := l.take(key); now[k] {
					l.mu.Lock()
					k.refs--
					l.mu.Unlock()
				} else {
					now[k] = true
				}
			}
		}
	}
	return func(commit bool) {
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
}

// forgetIdle forgets limits that no session has and nobody would miss. Users of a caller's store
// may come and go.
func (l *limits) forgetIdle() {
	l.mu.Lock()
	var unused []limitKey
	for key, k := range l.kept {
		if k.refs == 0 {
			unused = append(unused, key)
		}
	}
	l.mu.Unlock()
	for _, key := range unused {
		k := l.take(key)
		idler, ok := k.RateLimitManager.(interface{ Idle() bool })
		idle := k.RateLimitManager == nil || ok && idler.Idle()
		l.mu.Lock()
		if k.refs--; k.refs == 0 && idle {
			delete(l.kept, key)
		}
		l.mu.Unlock()
	}
}

// manager keeps a limit in memory.
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
