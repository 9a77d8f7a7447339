package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/danielepagano/lbproxy/cluster"
	"github.com/miekg/dns"
)

// A File keeps a zone in a file that a DNS server reads. It must not change once it is in use.
type File struct {
	Zone   *Zone        // required
	Path   string       // the file; its folder must exist and be writable
	Logger *slog.Logger // nil means slog.Default()

	// Then is called after each change of the file, to make the server read it. If it fails, the
	// error is logged, and Then is called again half a second later. nil means that the server
	// notices changes itself.
	Then func(context.Context) error
}

// refresh is the time between writes while the same proxies are named: their weights change, and
// of many proxies others get their turn.
const refresh = 5 * time.Second

// Keep writes the file until ctx ends: at once when the named proxies change, and otherwise every
// 5 s if weights have changed. It replaces the file atomically. Without any live proxy, or while
// the store is away, the file stays as it is. Keep returns nil when ctx ends, and an error if the
// zone is invalid or the first write of the file fails.
func (f *File) Keep(ctx context.Context, source Source) error {
	if err := f.Zone.Check(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	log := orDefault(f.Logger)
	var (
		serial  uint32
		before  *set
		written time.Time
		owing   bool // Then has failed
	)
	follow(ctx, source, log, func(t cluster.Tally) {
		s := f.Zone.set(t, 0)
		change := before == nil || !sameNames(before, s)
		if !s.alive && before != nil {
			change = false // resolvers would cache an empty zone
		}
		if change || time.Since(written) >= refresh && s.alive && !same(before, s) {
			serial = max(uint32(time.Now().Unix()), serial+1)
			if err := replace(f.Path, f.Zone.Text(t, serial)); err != nil {
				if before == nil {
					cancel(fmt.Errorf("gateway: cannot write the zone to %s: %w", f.Path, err))
				} else {
					log.Error("gateway: cannot write the zone", "file", f.Path, "err", err)
				}
				return
			}
			before, written, owing = s, time.Now(), f.Then != nil
		}
		if owing {
			err := f.Then(ctx)
			if owing = err != nil; owing {
				log.Error("gateway: the zone is written, but File.Then fails", "err", err)
			}
		}
	})
	if err := context.Cause(ctx); err != context.Canceled && err != context.DeadlineExceeded {
		return err
	}
	return nil
}

// same reports whether two sets have the same records, apart from the serial.
func same(a, b *set) bool {
	return a != nil && slices.Equal(a.lines(false), b.lines(false))
}

// sameNames is same without comparing weights.
func sameNames(a, b *set) bool { return slices.Equal(a.lines(true), b.lines(true)) }

func (s *set) lines(weightless bool) (lines []string) {
	for _, kinds := range s.records {
		for kind, rrs := range kinds {
			for _, rr := range rrs {
				if srv, ok := rr.(*dns.SRV); ok && weightless {
					c := *srv
					c.Weight = 0
					rr = &c
				}
				if kind != dns.TypeSOA {
					lines = append(lines, rr.String())
				}
			}
		}
	}
	return slices.Sorted(slices.Values(lines))
}

// replace replaces a file atomically. Other users may read it, such as a DNS server's.
func replace(path, text string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".zone-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(text)
	if err == nil {
		err = tmp.Chmod(0o644)
	}
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	return err
}
