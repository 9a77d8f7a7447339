package cluster

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"
)

//go:embed put.lua
var putText string

// A Config is a configuration in the store. The store does not interpret its text.
type Config struct {
	Version int64 // counts up from 1; 0 means that there is none
	Text    []byte
	By      string    // who put it
	At      time.Time // when, by the store's clock
}

// ErrConflict is returned by [Store.Put] if another version is in the store than the one to
// replace.
var ErrConflict = errors.New("cluster: somebody else has put a configuration meanwhile: " +
	"read that, and make yours from it")

// patience returns the timeout of calls that no connection waits for.
func (s *Store) patience() time.Duration { return max(2*time.Second, s.opts.Timeout) }

// Config reads the configuration. If there is none, its Version is 0.
func (s *Store) Config(ctx context.Context) (Config, error) {
	var c Config
	read := func(ctx context.Context, r rueidis.Client) rueidis.RedisResult {
		fields := r.B().Hmget().Key(s.key("config")).Field("version", "text", "by", "at")
		return r.Do(ctx, fields.Build())
	}
	values, err := s.do(ctx, s.patience(), read)
	if err != nil {
		return c, err
	}
	if len(values) == 4 && !values[0].IsNil() {
		text, _ := values[1].ToString()
		at, _ := values[3].AsInt64()
		c.Version, _ = values[0].AsInt64()
		c.By, _ = values[2].ToString()
		c.Text, c.At = []byte(text), time.UnixMilli(at)
	}
	return c, nil
}

// Put replaces the configuration whose version is base, or 0 if there is none yet, and returns the
// new version. If another version is in the store, Put returns [ErrConflict], so only one of
// several concurrent calls succeeds. If the store has replicas, Put waits up to a second until one
// of them has the configuration. An error with a version above 0 means that the configuration is in
// force, but no replica has it.
func (s *Store) Put(ctx context.Context, base int64, text []byte, by string,
) (version int64, err error) {
	c := s.client.Load()
	if c == nil {
		return 0, s.away()
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience())
	defer cancel()
	var lonely bool
	// WAIT covers only the writes of its own connection.
	err = c.Dedicated(func(d rueidis.DedicatedClient) error {
		put := d.B().Eval().Script(putText).Numkeys(1).Key(s.key("config")).
			Arg(strconv.FormatInt(base, 10), string(text), by).Build()
		answer, err := d.Do(ctx, put).AsIntSlice()
		switch {
		case err != nil:
			return err
		case len(answer) != 2:
			return fmt.Errorf("the store answers with %d values instead of 2", len(answer))
		case answer[0] == 0:
			return fmt.Errorf("%w (version %d is not %d)", ErrConflict, answer[1], base)
		}
		version = answer[1]
		info, err := d.Do(ctx, d.B().Info().Section("replication").Build()).ToString()
		if err != nil || !strings.Contains(info, "connected_slaves:") ||
			strings.Contains(info, "connected_slaves:0") {
			return nil // no replica to wait for
		}
		n, err := d.Do(ctx, d.B().Wait().Numreplicas(1).Timeout(1000).Build()).AsInt64()
		lonely = err == nil && n == 0
		return err
	})
	switch {
	case errors.Is(err, ErrConflict):
		return 0, err
	case err != nil:
		return version, s.wrap(err)
	case lonely:
		return version, fmt.Errorf("cluster: store %s: version %d is in force, "+
			"but no replica has it: if the store fails now it is lost", s.addr, version)
	}
	return version, nil
}

// watched holds the configuration's version that beats have reported.
type watched struct {
	mu      sync.Mutex
	version int64
	heard   time.Time
	changed chan struct{} // has an element when version has changed
}

// hear records the version that a beat has reported.
func (w *watched) hear(version int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard = time.Now()
	if w.version != version {
		w.version = version
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// A Watcher says what [Store.Watch] does with a configuration.
type Watcher struct {
	// File is the path at which the last good configuration is kept. Its version is kept beside it,
	// with ".version" added to the name. Empty means that none is kept.
	File string

	// Apply puts a configuration in force. It is required. If Apply returns an error, the previous
	// configuration must stay in force; the error is logged, and Apply is called again only for
	// another version. Watch itself makes the first call, a goroutine the others.
	Apply func(Config) error
}

// A Watch follows the configuration in the store. All methods are safe for concurrent use.
type Watch struct {
	store *Store
	w     Watcher
	stop  context.CancelFunc
	over  chan struct{}

	mu       sync.Mutex
	running  int64  // version
	failed   int64  // version that Apply refused
	err      error  // of that version
	fromFile string // why the version in force is from File; empty if it is the store's
}

// Watch applies the configuration in the store, and then each newer one until Stop is called. If
// the store is away, or has no configuration or an older one, Watch begins with the last good one,
// from w.File. It fails if there is neither, or if neither can be applied. ctx bounds the start
// only. The beats of a [Member] report a new version; without a Member, Watch asks the store every
// second.
func (s *Store) Watch(ctx context.Context, w Watcher) (*Watch, error) {
	if w.Apply == nil {
		return nil, errors.New("cluster: Watcher.Apply is nil: it is required")
	}
	f := &Watch{store: s, w: w, over: make(chan struct{})}
	kept, fileErr := w.read()
	c, err := s.Config(ctx)
	switch {
	case err == nil && c.Version == 0:
		err = fmt.Errorf("cluster: store %s: no configuration: put one", s.addr)
	case err == nil && c.Version < kept.Version:
		err = fmt.Errorf("cluster: store %s: configuration %d is older than %d, which ran here",
			s.addr, c.Version, kept.Version)
	case err == nil:
		if err = f.apply(c); err != nil {
			f.failed, f.err = c.Version, err
			err = fmt.Errorf("configuration %d: %w", c.Version, err)
		}
	}
	if err != nil { // use the last good one
		if fileErr != nil {
			return nil, fmt.Errorf("%w; and no last good configuration: %w", err, fileErr)
		}
		if e := w.Apply(kept); e != nil {
			return nil, fmt.Errorf("%w; and %s: %w", err, w.File, e)
		}
		f.running, f.fromFile = kept.Version, err.Error()
		s.log().Warn("cluster: running by the last good configuration", "file", w.File, "version",
			kept.Version, "err", err)
	}
	ctx, f.stop = context.WithCancel(context.WithoutCancel(ctx))
	go f.run(ctx)
	return f, nil
}

// Stop ends the watch and waits for an Apply in progress. It may be called more than once.
func (f *Watch) Stop() {
	f.stop()
	<-f.over
}

// Running returns the version in force. problem is empty if that is the store's version; otherwise
// it says why Apply refused the store's version, or why the version in force is from the file. Use
// Running as [Self.Config].
func (f *Watch) Running() (version int64, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.running, fmt.Sprintf("version %d: %v", f.failed, f.err)
	}
	return f.running, f.fromFile
}

func (f *Watch) run(ctx context.Context) {
	defer close(f.over)
	every := time.NewTicker(time.Second)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.store.ctx.Done():
			return
		case <-f.store.config.changed:
		case <-every.C:
		}
		known := &f.store.config
		known.mu.Lock()
		version, beaten := known.version, time.Since(known.heard) < 2*time.Second
		known.mu.Unlock()
		f.mu.Lock()
		old := version <= f.running || version == f.failed
		f.mu.Unlock()
		if !beaten || !old { // without beats the store must be asked
			f.look(ctx)
		}
	}
}

// look applies the configuration in the store if it is new.
func (f *Watch) look(ctx context.Context) {
	c, err := f.store.Config(ctx)
	f.mu.Lock()
	news := err == nil && c.Version > f.running && c.Version != f.failed
	if err == nil && c.Version == f.running {
		f.fromFile = ""
	}
	f.mu.Unlock()
	if !news {
		return
	}
	if err := f.apply(c); err != nil {
		f.mu.Lock()
		f.failed, f.err = c.Version, err
		f.mu.Unlock()
		for problem := range strings.SplitSeq(err.Error(), "\n") {
			f.store.log().Error("cluster: configuration refused, the one in force stays",
				"version", c.Version, "by", c.By, "problem", problem)
		}
		return
	}
	f.store.log().Info("cluster: configuration applied", "version", c.Version, "by", c.By)
}

// apply puts c in force and keeps it.
func (f *Watch) apply(c Config) error {
	if err := f.w.Apply(c); err != nil {
		return err
	}
	f.mu.Lock()
	f.running, f.failed, f.err, f.fromFile = c.Version, 0, nil, ""
	f.mu.Unlock()
	if err := f.w.keep(c); err != nil {
		f.store.log().Error("cluster: the last good configuration is not kept", "file", f.w.File,
			"err", err)
	}
	return nil
}

// keep writes the text unchanged to File, so that it can be read and checked, and its version to
// another file, with the text's hash. It writes the version first and keeps the previous text's
// line, so that at any moment one line matches the text in File.
func (w *Watcher) keep(c Config) error {
	if w.File == "" {
		return nil
	}
	lines := fmt.Sprintf("%d %x\n", c.Version, sha256.Sum256(c.Text))
	if old, err := w.read(); err == nil {
		lines += fmt.Sprintf("%d %x\n", old.Version, sha256.Sum256(old.Text))
	}
	if err := replace(w.File+".version", []byte(lines)); err != nil {
		return err
	}
	return replace(w.File, c.Text)
}

func (w *Watcher) read() (c Config, err error) {
	if w.File == "" {
		return c, errors.New("none is kept")
	}
	if c.Text, err = os.ReadFile(w.File); err != nil {
		return c, err
	}
	lines, err := os.ReadFile(w.File + ".version")
	if err != nil {
		return c, err
	}
	for line := range strings.Lines(string(lines)) {
		number, hash, _ := strings.Cut(strings.TrimSpace(line), " ")
		c.Version, err = strconv.ParseInt(number, 10, 64)
		if err == nil && hash == fmt.Sprintf("%x", sha256.Sum256(c.Text)) {
			return c, nil
		}
	}
	return Config{}, fmt.Errorf("%s: it is not the file that %[1]s.version is about: "+
		"somebody has changed it", w.File)
}

// replace writes a file so that a crash leaves the old one or the new one.
func replace(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}
