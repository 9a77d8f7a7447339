package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/cluster/internal/storetest"
	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestPut(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, url string) {
		s, _ := dial(t, url, calm)
		if c, err := s.Config(t.Context()); err != nil || c.Version != 0 {
			t.Fatal("an empty store:", c, err)
		}
		text := []byte("{\"é\": \"\x00\xff\"}\n")
		before := time.Now().Add(-time.Minute)
		if v, err := s.Put(t.Context(), 0, text, "ann"); v != 1 || err != nil {
			t.Fatal(v, err)
		}
		c, err := s.Config(t.Context())
		if err != nil || c.Version != 1 || string(c.Text) != string(text) || c.By != "ann" ||
			c.At.Before(before) {
			t.Fatal(c, err)
		}
		if _, err := s.Put(t.Context(), 0, text, "bob"); !errors.Is(err, ErrConflict) {
			t.Fatal(err)
		}

		// Of many concurrent puts one succeeds, in each round.
		for from := range int64(20) {
			var won atomic.Int32
			var all sync.WaitGroup
			for i := range 4 {
				all.Go(func() {
					v, err := s.Put(t.Context(), from+1, fmt.Append(nil, i), "")
					if err == nil && v == from+2 {
						won.Add(1)
					} else if !errors.Is(err, ErrConflict) {
						t.Error(v, err)
					}
				})
			}
			all.Wait()
			if won.Load() != 1 {
				t.Fatalf("%d of 4 have put version %d", won.Load(), from+2)
			}
		}
	})
}

func TestPutWaitsForAReplica(t *testing.T) {
	t.Parallel()
	primary := storetest.Redis(t, "--repl-diskless-sync-delay", "0")
	host, port, _ := strings.Cut(primary.Addr, ":")
	replica := storetest.Redis(t, "--replicaof", host, port)
	s, _ := dial(t, primary.URL(), nil)
	copied := func() (Config, error) {
		r, _ := dial(t, replica.URL(), nil)
		defer r.Close()
		// A replica is of no use as a store, because connect writes.
		if err := r.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "READONLY") {
			return Config{}, fmt.Errorf("Ping of a replica: %v", err)
		}
		return Config{}, nil
	}
	storetest.Await(t, "the replica is one", func() error { _, err := copied(); return err })
	storetest.Await(t, "the primary knows of it", func() error {
		c, err := s.Config(t.Context())
		if err == nil {
			_, err = s.Put(t.Context(), c.Version, []byte("x"), "")
		}
		return err
	})
	replica.Freeze()
	c, err := s.Config(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.Put(t.Context(), c.Version, []byte("y"), "")
	if err == nil || v != c.Version+1 || !strings.Contains(err.Error(), "no replica has it") {
		t.Error(v, err)
	}
}

// A follower applies texts that do not begin with "bad".
type follower struct {
	mu      sync.Mutex
	applied []string
}

func (f *follower) watcher(file string) Watcher {
	return Watcher{File: file, Apply: func(c Config) error {
		if strings.HasPrefix(string(c.Text), "bad") {
			return fmt.Errorf("config:1: %s\nconfig:2: and more", c.Text)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.applied = append(f.applied, fmt.Sprintf("%d %s", c.Version, c.Text))
		return nil
	}}
}

func (f *follower) has(want ...string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if got := strings.Join(f.applied, ", "); got != strings.Join(want, ", ") {
		return fmt.Errorf("applied %s, want %s", got, strings.Join(want, ", "))
	}
	return nil
}

func put(t *testing.T, s *Store, text string) {
	t.Helper()
	c, err := s.Config(t.Context())
	if err == nil {
		_, err = s.Put(t.Context(), c.Version, []byte(text), "test")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestWatchFollows(t *testing.T) {
	t.Parallel()
	for _, joined := range []bool{false, true} {
		t.Run(fmt.Sprintf("joined=%v", joined), func(t *testing.T) {
			t.Parallel()
			storetest.Each(t, func(t *testing.T, url string) {
				file := filepath.Join(t.TempDir(), "config.json")
				s, l := dial(t, url, calm)
				var f follower
				if _, err := s.Watch(t.Context(), f.watcher(file)); err == nil ||
					!strings.Contains(err.Error(), "no configuration") ||
					!strings.Contains(err.Error(), file) {
					t.Fatal("neither a configuration nor a file:", err)
				}
				put(t, s, "one")
				w, err := s.Watch(t.Context(), f.watcher(file))
				if err != nil {
					t.Fatal(err)
				}
				defer w.Stop()
				if joined {
					m, err := s.Join(Self{Interval: 20 * time.Millisecond, Config: w.Running})
					if err != nil {
						t.Fatal(err)
					}
					defer m.Leave()
				}
				if err := f.has("1 one"); err != nil {
					t.Fatal(err)
				}
				put(t, s, "two")
				storetest.Await(t, "the second is applied",
					func() error { return f.has("1 one", "2 two") })

				put(t, s, "bad three")
				storetest.Await(t, "the third is refused", func() error {
					v, problem := w.Running()
					said := strings.Contains(problem, "version 3: config:1: bad three")
					return storetest.Want(v == 2 && said, problem)
				})
				storetest.Await(t, "the log says so", func() error { // a moment later
					text := l.String()
					return storetest.Want(strings.Contains(text, "config:1: bad three") &&
						strings.Contains(text, "config:2: and more"), text)
				})
				if text, err := os.ReadFile(file); err != nil || string(text) != "two" {
					t.Errorf("the last good one is %q %v", text, err)
				}

				put(t, s, "four")
				storetest.Await(t, "the fourth is applied",
					func() error { return f.has("1 one", "2 two", "4 four") })
				storetest.Await(t, "it runs", func() error {
					v, problem := w.Running()
					return storetest.Want(v == 4 && problem == "", problem)
				})
			})
		})
	}
}

func TestEmptyStoreReplacesNothing(t *testing.T) {
	t.Parallel()
	server := storetest.Redis(t)
	file := filepath.Join(t.TempDir(), "config.json")
	s, l := dial(t, server.URL(), nil)
	put(t, s, "one")
	put(t, s, "two")
	var f follower
	w, err := s.Watch(t.Context(), f.watcher(file))
	if err != nil {
		t.Fatal(err)
	}
	away(t, s, server)

	// Another process starts meanwhile, by the file.
	var g follower
	w2, err := s.Watch(t.Context(), g.watcher(file))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.has("2 two"); err != nil {
		t.Fatal(err)
	}
	if v, problem := w2.Running(); v != 2 || !strings.Contains(problem, "cannot be reached") ||
		!strings.Contains(l.String(), "last good") {
		t.Error(v, problem, l)
	}

	server.Start()
	storetest.Await(t, "the store is back", func() error { return s.Ping(t.Context()) })
	w.look(t.Context())
	w2.look(t.Context())
	put(t, s, "old") // version 1: without a beat the store knows no higher one
	w.look(t.Context())
	w2.look(t.Context())

	// A proxy that starts now does not go back either.
	var h follower
	w3, err := s.Watch(t.Context(), h.watcher(file))
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{f.has("2 two"), g.has("2 two"), h.has("2 two")} {
		if err != nil {
			t.Error(err)
		}
	}
	if v, problem := w3.Running(); v != 2 ||
		!strings.Contains(problem, "configuration 1 is older than 2") {
		t.Error(v, problem)
	}
	for _, w := range []*Watch{w, w2, w3} {
		w.Stop()
	}
}

func TestWatchNeedsApply(t *testing.T) {
	s, _ := dial(t, "redis://"+proxytest.FreeAddr(t), nil)
	if _, err := s.Watch(t.Context(), Watcher{}); err == nil ||
		!strings.Contains(err.Error(), "required") {
		t.Error(err)
	}
}

func TestLastGoodFileThatSomebodyChanged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.json")
	s, _ := dial(t, "redis://"+proxytest.FreeAddr(t), nil)
	var f follower
	w := f.watcher(file)
	if err := w.keep(Config{Version: 3, Text: []byte("three")}); err != nil {
		t.Fatal(err)
	}
	if c, err := w.read(); err != nil || c.Version != 3 || string(c.Text) != "three" {
		t.Fatal(c, err)
	}
	// A crash between the two files leaves the text before.
	if err := w.keep(Config{Version: 4, Text: []byte("four")}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("three"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := w.read(); err != nil || c.Version != 3 {
		t.Fatal(c, err)
	}
	if err := os.WriteFile(file, []byte("thr"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Watch(t.Context(), w); err == nil ||
		!strings.Contains(err.Error(), "somebody has changed it") {
		t.Error(err)
	}
}
