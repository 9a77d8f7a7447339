package mtlsserver

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
)

func TestChangeString(t *testing.T) {
	names := func(n int) (all []string) {
		for i := range n {
			all = append(all, fmt.Sprint(i))
		}
		return all
	}
	twenty := "+" + strings.Join(names(20), " +")
	for _, test := range []struct {
		change Change
		want   string
	}{
		{Change{}, ""},
		{Change{Added: []string{"alice"}, Removed: []string{"bob"}, Changed: []string{"carol"}},
			"+alice -bob ~carol"},
		{Change{Added: names(20)}, twenty},
		{Change{Added: names(20), Removed: names(1)}, twenty + " and 1 more"},
		{Change{Added: names(20), Removed: names(5), Changed: names(7)}, twenty + " and 12 more"},
	} {
		if got := test.change.String(); got != test.want {
			t.Errorf("%+v: %q, want %q", test.change, got, test.want)
		}
	}
}

func TestChangesOmitsWhatIsTheSame(t *testing.T) {
	got := Changes{Users: Change{Removed: []string{"bob"}}, Ended: 3}.attrs()
	if want := []slog.Attr{slog.String("users", "-bob"), slog.Int("ended", 3)}; !slices.EqualFunc(
		got, want, slog.Attr.Equal) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestReloadIsLoggedIfItSucceeds(t *testing.T) {
	l := newLab(t, nil)
	if _, err := l.server.Reload(&Config{}); err == nil {
		t.Fatal("an empty configuration is accepted")
	}
	l.reload(t, l.with(func(c *Config) { c.Users = nil }))
	e := l.log.await(t, "of the reload", func(e entry) bool { return e["msg"] == "reloaded" })
	if e["users"] != "-alice" {
		t.Errorf("line %v, want that alice was removed", e)
	}
}
