package strictjson

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

type doc struct {
	Name    string           `json:"name"`
	Files   []string         `json:"files" strictjson:"single"`
	Count   int              `json:"count,omitzero"`
	Big     int64            `json:"big,omitzero"`
	On      bool             `json:"on,omitzero"`
	Wait    time.Duration    `json:"wait,omitzero"`
	Sub     *sub             `json:"sub,omitzero"`
	Items   []item           `json:"items"`
	Limits  map[string]limit `json:"limits,omitzero"`
	Private int              // no tag: Decode must not touch it
}

type sub struct {
	Wait time.Duration `json:"wait,omitzero"`
	More []sub         `json:"more,omitzero"`
}

type item struct {
	Serial string `json:"serial" strictjson:"short"`
	CA     string `json:"ca,omitzero"`
}

type limit struct {
	Open  int           `json:"open,omitzero"`
	Every time.Duration `json:"every,omitzero"`
}

func TestDecode(t *testing.T) {
	const text = `{
  "name": "a<\u00e9>", "files": "one", "count": -3, "big": 9007199254740993, "on": true,
  "wait": "1m30s", "sub": {"wait": "2s", "more": [{}]},
  "items": ["x", {"serial": "y", "ca": "z"}],
  "limits": {"web": {"open": 1}, "d.b[": {"every": "5ms"}}
}`
	want := doc{
		Name: "a<é>", Files: []string{"one"}, Count: -3, Big: 9007199254740993, On: true,
		Wait: 90 * time.Second, Sub: &sub{2 * time.Second, []sub{{}}},
		Items:  []item{{Serial: "x"}, {"y", "z"}},
		Limits: map[string]limit{"web": {Open: 1}, "d.b[": {Every: 5 * time.Millisecond}},
	}
	var got doc
	d, problems := Decode([]byte(text), &got)
	if len(problems) > 0 || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v, want %+v", got, problems, want)
	}
	for path, line := range map[string]int{
		"": 1, "name": 2, "count": 2, "sub.more[0]": 3, "items[1].ca": 4, `limits["d.b["].every`: 5,
		"items[1].missing": 4, "items[7]": 4, "missing": 1,
	} {
		if got := d.Line(path); got != line {
			t.Errorf("line of %s: %d, want %d", path, got, line)
		}
	}
	if from, to, ok := d.Span("items[1]"); !ok || text[from:to] != `{"serial": "y", "ca": "z"}` {
		t.Errorf("items[1] is at %d to %d, %v", from, to, ok)
	}
	if d.Has("sub.more[1]") || !d.Has("sub.more[0]") {
		t.Error("Has is not what is written")
	}
}

func TestProblems(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{``, "1 not JSON: unexpected end of JSON input: correct it there or shortly before"},
		{"{\n\"name\": }",
			"2 not JSON: invalid character '}' looking for beginning of value: " +
				"correct it there or shortly before"},
		{`{} {}`,
			"1 not JSON: invalid character '{' after top-level value: " +
				"correct it there or shortly before"},
		{"\xef\xbb\xbf{}", "1 it begins with a byte order mark: save it without"},
		{"{\"name\": \"\xff\"}", "1 not UTF-8: save it as that"},
		{`[]`, "1 want an object in { }, got []"},
		{`null`, "1 want an object in { }, got null"},
		{`{"Name": "x"}`,
			"1 Name: unknown key: want one of name, files, count, big, on, wait, sub, " +
				"items, limits"},
		{"{\"name\": \"x\",\n\"name\": \"y\"}",
			"1 name: given twice, here and in line 2: keep one of the two"},
		{`{"name": "x", "name": "y"}`, "1 name: given twice, in this line: keep one of the two"},
		{`{"a\n\u001b": 1}`,
			`1 ["a\n\x1b"]: unknown key: want one of name, files, count, big, on, wait, sub, ` +
				`items, limits`},
		{`{"name": 1}`, "1 name: want a text in quotes, got 1"},
		{`{"count": "1"}`, `1 count: want a whole number, got "1"`},
		{`{"count": 1.5}`, `1 count: want a whole number, got 1.5`},
		{`{"big": 9223372036854775808}`, `1 big: want a whole number, got 9223372036854775808`},
		{`{"on": 1}`, `1 on: want true or false, got 1`},
		{`{"on": null}`, `1 on: want true or false, got null`},
		{`{"wait": 10}`, `1 wait: want a duration such as "10s", got 10`},
		{`{"files": 1}`, `1 files: want a list in [ ], got 1`},
		{`{"files": ["a", 2]}`, `1 files[1]: want a text in quotes, got 2`},
		{`{"sub": null}`, `1 sub: want an object in { }, got null`},
		{`{"items": [1]}`, `1 items[0]: want a text in quotes, got 1`},
		{`{"items": {"serial": "x"}}`, `1 items: want a list in [ ], got {"serial": "x"}`},
		{`{"limits": {"web": 1, "web": {}}}`, `1 limits["web"]: want an object in { }, got 1`},
	} {
		var v doc
		_, problems := Decode([]byte(test.text), &v)
		if len(problems) != 1 || fmt.Sprint(problems[0].Line, " ", problems[0]) != test.want {
			t.Errorf("%q: %v, want %s", test.text, problems, test.want)
		}
	}
}

// Add compares each problem with all others, so their number must be bounded.
func TestProblemsAreBounded(t *testing.T) {
	for text, want := range map[string]int{
		`{"items": [` + strings.Repeat("1,", 1000) + `1]}`:                   MaxProblems,
		`{"sub": {` + strings.Repeat(`"a": 1, `, 1000) + `"b": 2}, "on": 1}`: 3,
	} {
		var v doc
		if _, problems := Decode([]byte(text), &v); len(problems) != want {
			t.Errorf("%.40s: %d problems, want %d", text, len(problems), want)
		}
	}
}

func TestProblemHidesProblemsInsideAndAroundIt(t *testing.T) {
	var ps Problems
	for _, path := range []string{"apps[1].id", "apps[1]", "apps", "", "apps[1].id.x",
		"apps[1].i", "apps[10].id"} {
		ps.Add(nil, path, "wrong")
	}
	if got := fmt.Sprint(ps); got != "[apps[1].id: wrong apps[1].i: wrong apps[10].id: wrong]" {
		t.Error(got)
	}
}

// For a text without problems Decode agrees with encoding/json, and reads back the output of
// Encode. A text with problems has a line for each.
func FuzzDecode(f *testing.F) {
	for _, text := range []string{
		`{"name": "a", "files": ["x"], "count": 1, "on": false, "wait": "1s", "sub": ` +
			`{"more": [{}]}, "items": ["x", {"serial": "y"}]}`,
		`{"limits": {"a.b[": {"open": 1}, "": {}}, "files": "x", "big": -0}`,
		`{"items": [], "items": null}`, `[`, `{}x`,
		"{\"\\u000a\":\n1}", `{"name": "\ud800"}`, "\xff", `{"": 0}`,
		`{"limits": {"a.b[": 1, "a.b[": {}}}`, `{"wait": "-1ns"}`,
		`{"sub": {"more": [{"more": [{"wait": "1h"}]}]}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var got doc
		d, problems := Decode(text, &got)
		for _, p := range problems {
			if p.Line < 1 || p.Line > 1+bytes.Count(text, []byte("\n")) ||
				strings.ContainsFunc(p.String(), func(r rune) bool { return r < ' ' }) {
				t.Fatalf("line %d: %q", p.Line, p)
			}
		}
		if len(problems) > 0 {
			return
		}
		var all any
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if err := dec.Decode(&all); err != nil {
			t.Fatal(err)
		}
		if !isWhatIsWritten(reflect.ValueOf(got), all) {
			t.Fatalf("%+v is not what is written", got)
		}
		if from, to, ok := d.Span(""); !ok || !json.Valid(text[from:to]) {
			t.Fatalf("the whole is at %d to %d", from, to)
		}
		encoded, err := Encode(got)
		if err != nil || !json.Valid(encoded) {
			t.Fatalf("%s, %v", encoded, err)
		}
		var again doc
		if _, problems := Decode(encoded, &again); len(problems) > 0 {
			t.Fatalf("%s: %v", encoded, problems)
		}
		twice, err := Encode(again)
		if err != nil || !bytes.Equal(encoded, twice) {
			t.Fatalf("%s becomes %s, %v", encoded, twice, err)
		}
	})
}

// isWhatIsWritten reports whether v is what encoding/json has read as x; nil is what is not
// written.
func isWhatIsWritten(v reflect.Value, x any) bool {
	if short := shortField(v); short.IsValid() {
		if _, object := x.(map[string]any); !object {
			return isWhatIsWritten(short, x)
		}
	}
	switch x := x.(type) {
	case nil:
		return v.IsZero()
	case bool:
		return v.Bool() == x
	case string:
		if isDuration(v) {
			d, err := time.ParseDuration(x)
			return err == nil && v.Int() == int64(d)
		}
		if v.Kind() == reflect.Slice {
			return v.Len() == 1 && v.Index(0).String() == x
		}
		return v.String() == x
	case json.Number:
		return fmt.Sprint(v.Int()) == x.String() || v.Int() == 0 && x == "-0"
	case []any:
		for i := range x {
			if v.Len() != len(x) || !isWhatIsWritten(v.Index(i), x[i]) {
				return false
			}
		}
		return v.Len() == len(x)
	}
	all, found := x.(map[string]any), 0
	if v.Kind() == reflect.Map {
		for key, x := range all {
			if in := v.MapIndex(reflect.ValueOf(key)); !in.IsValid() || !isWhatIsWritten(in, x) {
				return false
			}
		}
		return v.Len() == len(all)
	}
	for f, in := range reflect.Indirect(v).Fields() {
		if key, _, _ := strings.Cut(f.Tag.Get("json"), ","); key != "" {
			x, written := all[key]
			if written {
				found++
			}
			if !isWhatIsWritten(in, x) {
				return false
			}
		}
	}
	return found == len(all)
}
