// Package strictjson reads JSON that people write, such as configurations: unknown keys, keys
// written twice and values of the wrong type are problems, and each problem has a line number.
//
// It decodes into structs whose fields have json tags, lists, maps with text keys, pointers to
// structs, texts, whole numbers, booleans and durations, which are written as in Go ("10s"). The
// tag strictjson allows a short form:
//
//	Files  []string `json:"files" strictjson:"single"` // "a" is ["a"]
//	Serial string   `json:"serial" strictjson:"short"` // "1" is {"serial": "1"}, for its struct
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Doc records the position of each value in a text. Values have paths, such as apps[0].listen and
// users[1].limits["web"]; the path of the whole text is "". A nil Doc has no values.
type Doc struct {
	newlines []int // offsets
	spans    map[string]span
}

type span struct{ from, to int }

// Has reports whether the value at path is written in the text.
func (d *Doc) Has(path string) bool {
	_, _, ok := d.Span(path)
	return ok
}

// Span returns the offsets in the text at which the value at path begins and ends.
func (d *Doc) Span(path string) (from, to int, ok bool) {
	if d == nil {
		return 0, 0, false
	}
	s, ok := d.spans[path]
	return s.from, s.to, ok
}

// Line returns the line, counted from 1, on which the value at path begins. For a value that the
// text does not have it returns the line of the innermost value around it. It is 0 if d is nil.
func (d *Doc) Line(path string) int {
	if d == nil {
		return 0
	}
	for !d.Has(path) && path != "" {
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return d.line(d.spans[path].from)
}

func (d *Doc) line(offset int) int {
	before, _ := slices.BinarySearch(d.newlines, offset)
	return before + 1
}

// A Problem is something wrong with the value at a path.
type Problem struct {
	Path string
	Line int // 0 if there is no text
	Text string
}

// String returns the path and the text.
func (p Problem) String() string {
	if p.Path == "" {
		return p.Text
	}
	return p.Path + ": " + p.Text
}

// Problems are the problems of a text, in the order in which they were found.
type Problems []Problem

// MaxProblems is the most problems that are kept. Nobody reads more, and Add compares each new one
// with all others.
const MaxProblems = 100

// Add adds a problem with the value at path. It adds nothing if that value, one around it or one
// inside it has a problem already, because the new problem may be a consequence.
func (ps *Problems) Add(d *Doc, path, format string, args ...any) {
	if len(*ps) >= MaxProblems || slices.ContainsFunc(*ps, func(known Problem) bool {
		return within(path, known.Path) || within(known.Path, path)
	}) {
		return
	}
	*ps = append(*ps, Problem{path, d.Line(path), fmt.Sprintf(format, args...)})
}

func within(path, outer string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (outer == "" || rest == "" || strings.ContainsAny(rest[:1], ".["))
}

// Decode reads text into the struct that v points to. If text is not JSON, that is the only
// problem, and the Doc has no values. Otherwise Decode sets all fields that have no problem.
func Decode(text []byte, v any) (*Doc, Problems) {
	d := &decoder{doc: &Doc{spans: map[string]span{}}}
	for i, b := range text {
		if b == '\n' {
			d.doc.newlines = append(d.doc.newlines, i)
		}
	}
	if bytes.HasPrefix(text, []byte("\xef\xbb\xbf")) {
		d.add("", "it begins with a byte order mark: save it without")
		return d.doc, d.problems
	}
	var all json.RawMessage
	err := json.Unmarshal(text, &all) // checks the syntax to the end, and bounds the depth
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		line := d.doc.line(min(int(syntax.Offset), len(text)))
		d.problems = Problems{{"", line,
			fmt.Sprintf("not JSON: %v: correct it there or shortly before", err)}}
		return d.doc, d.problems
	}
	if !utf8.Valid(text) {
		d.add("", "not UTF-8: save it as that")
		return d.doc, d.problems
	}
	d.value("", all, bytes.IndexByte(text, all[0]), reflect.ValueOf(v).Elem(), "")
	return d.doc, d.problems
}

type decoder struct {
	doc      *Doc
	problems Problems
}

func (d *decoder) add(path, format string, args ...any) {
	d.problems.Add(d.doc, path, format, args...)
}

// value reads text, which begins at offset, into v. Decode has checked the syntax of text.
func (d *decoder) value(path string, text []byte, offset int, v reflect.Value, option string) {
	d.doc.spans[path] = span{offset, offset + len(text)}
	object, list := text[0] == '{', text[0] == '['
	if v.Kind() == reflect.Pointer && object {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if option == "single" && text[0] == '"' {
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		v = v.Index(0)
	} else if short := shortField(v); short.IsValid() && !object {
		v = short
	}
	want, ok := "an object in { }", object
	switch {
	case isDuration(v):
		var s string
		json.Unmarshal(text, &s)
		t, err := time.ParseDuration(s)
		v.SetInt(int64(t))
		want, ok = `a duration such as "10s"`, err == nil
	case v.CanInt():
		want, ok = "a whole number", text[0] != 'n' && unmarshals(text, v)
	case v.Kind() == reflect.Bool:
		want, ok = "true or false", text[0] != 'n' && unmarshals(text, v)
	case v.Kind() == reflect.String:
		want, ok = "a text in quotes", text[0] == '"' && unmarshals(text, v)
	case v.Kind() == reflect.Slice:
		want, ok = "a list in [ ]", list
	}
	if !ok {
		d.add(path, "want %s, got %s", want, printable(text, 40))
	} else if object || list {
		d.members(path, text, offset, v)
	}
}

func unmarshals(text []byte, v reflect.Value) bool {
	return json.Unmarshal(text, v.Addr().Interface()) == nil
}

// members reads the values in a list or an object. The arguments are those of value.
func (d *decoder) members(path string, text []byte, offset int, v reflect.Value) {
	if v.Kind() == reflect.Map {
		v.Set(reflect.MakeMap(v.Type()))
	} else if v.Kind() == reflect.Slice {
		v.Set(reflect.MakeSlice(v.Type(), 0, 0)) // [] is not nil
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.Token() // the [ or {
	for i := 0; dec.More() && len(d.problems) < MaxProblems; i++ {
		name, at := "", fmt.Sprintf("%s[%d]", path, i)
		if text[0] == '{' {
			token, _ := dec.Token()
			name = token.(string)
			at = fmt.Sprintf("%s[%q]", path, name)
		}
		var into reflect.Value
		var option string
		var known []string
		switch v.Kind() {
		case reflect.Slice:
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			into = v.Index(i)
		case reflect.Map:
			into = reflect.New(v.Type().Elem()).Elem()
		default:
			if name != "" && strconv.Quote(name) == `"`+name+`"` {
				at = strings.TrimPrefix(path+"."+name, ".")
			}
			into, option, known = field(v, name)
		}
		var member json.RawMessage
		dec.Decode(&member)
		from := offset + int(dec.InputOffset()) - len(member)
		switch {
		case d.doc.Has(at):
			where := "in this line"
			if line := d.doc.line(from); line != d.doc.Line(at) {
				where = fmt.Sprintf("here and in line %d", line)
			}
			d.add(at, "given twice, %s: keep one of the two", where)
		case !into.IsValid():
			d.doc.spans[at] = span{from: from}
			d.add(at, "unknown key: want one of %s", strings.Join(known, ", "))
		default:
			d.value(at, member, from, into, option)
			if v.Kind() == reflect.Map {
				v.SetMapIndex(reflect.ValueOf(name), into)
			}
		}
	}
}

// field returns the field of a struct that has the given name in JSON, if any, the option in its
// tag, and the names of all fields.
func field(v reflect.Value, name string) (into reflect.Value, option string, names []string) {
	for f, value := range v.Fields() {
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if tag == "" {
			continue
		}
		if tag == name {
			into, option = value, f.Tag.Get("strictjson")
		}
		names = append(names, tag)
	}
	return into, option, names
}

// shortField returns the field whose value alone may stand for the struct.
func shortField(v reflect.Value) reflect.Value {
	if v.Kind() == reflect.Struct {
		for f, value := range v.Fields() {
			if f.Tag.Get("strictjson") == "short" {
				return value
			}
		}
	}
	return reflect.Value{}
}

func isDuration(v reflect.Value) bool {
	return v.IsValid() && v.Type() == reflect.TypeFor[time.Duration]()
}

// printable returns the beginning of a text without characters that control a terminal or a log.
func printable(text []byte, most int) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, fmt.Sprintf("%.*s", most, text))
}

// Encode returns the JSON of a struct, which Decode reads back. It leaves out zero values whose tag
// has omitzero, and uses short forms.
func Encode(v any) ([]byte, error) {
	return encode(nil, reflect.ValueOf(v), "")
}

func encode(text []byte, v reflect.Value, option string) ([]byte, error) {
	short := shortField(v)
	switch {
	case v.Kind() == reflect.Pointer && !v.IsNil():
		return encode(text, v.Elem(), "")
	case isDuration(v):
		return strconv.AppendQuote(text, time.Duration(v.Int()).String()), nil
	case short.IsValid() && onlyNonZero(v, short):
		return encode(text, short, "")
	case v.Kind() == reflect.Slice && option == "single" && v.Len() == 1:
		return encode(text, v.Index(0), "")
	case v.Kind() == reflect.Slice:
		return join(text, "[]", func(next func(string, reflect.Value, string) error) error {
			for i := range v.Len() {
				if err := next("", v.Index(i), ""); err != nil {
					return err
				}
			}
			return nil
		})
	case v.Kind() == reflect.Map:
		return join(text, "{}", func(next func(string, reflect.Value, string) error) error {
			keys := v.MapKeys()
			slices.SortFunc(keys, func(a, b reflect.Value) int {
				return strings.Compare(a.String(), b.String())
			})
			for _, key := range keys {
				if err := next(key.String(), v.MapIndex(key), ""); err != nil {
					return err
				}
			}
			return nil
		})
	case v.Kind() == reflect.Struct:
		return join(text, "{}", func(next func(string, reflect.Value, string) error) error {
			for f, value := range v.Fields() {
				name, option, _ := strings.Cut(f.Tag.Get("json"), ",")
				if name == "" || option == "omitzero" && value.IsZero() {
					continue
				}
				if err := next(name, value, f.Tag.Get("strictjson")); err != nil {
					return err
				}
			}
			return nil
		})
	}
	plain, err := json.Marshal(v.Interface())
	return append(text, plain...), err
}

// join appends the members that each passes to next, in brackets. The members of objects have
// names.
func join(
	text []byte, brackets string, each func(next func(string, reflect.Value, string) error) error,
) ([]byte, error) {
	text = append(text, brackets[0])
	first := true
	err := each(func(name string, v reflect.Value, option string) (err error) {
		if !first {
			text = append(text, ',')
		}
		first = false
		if brackets == "{}" {
			key, _ := json.Marshal(name)
			text = append(append(text, key...), ':')
		}
		text, err = encode(text, v, option)
		return err
	})
	return append(text, brackets[1]), err
}

func onlyNonZero(v, short reflect.Value) bool {
	n := 0
	for _, value := range v.Fields() {
		if !value.IsZero() {
			n++
		}
	}
	return n == 0 || n == 1 && !short.IsZero()
}
