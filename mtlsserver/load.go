package mtlsserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A source is the text that a Config was read from.
type source struct {
	file, dir string // as given to Load, and the absolute path of the folder it is in
	text      []byte
	newlines  []int           // where they are in text
	spans     map[string]span // where each value is in text, by its path: "apps[0].listen"
}

type span struct{ from, to int }

// written reports whether the value at key is in the file, as opposed to being zero for want of it.
func (s *source) written(key string) bool {
	_, ok := s.spans[key]
	return ok
}

func (s *source) line(offset int) int {
	before, _ := slices.BinarySearch(s.newlines, offset)
	return before + 1
}

// Load reads the Config in a file of JSON, and everything that it names. It fails with all problems there are, a line
// each: syntax, keys that are unknown or written twice, values of the wrong type, and what Validate finds.
// Durations are written as Go's ("10s"), paths are relative to the file.
func Load(path string) (*Config, error) {
	text, err := readFile(path, false)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	return load(source{file: path, dir: dir, text: text})
}

// load is Load of what has been read.
func load(s source) (*Config, error) {
	r := &report{config: &Config{source: s}}
	if r.parse() {
		r.check()
	}
	if len(r.problems) > 0 {
		return nil, errors.Join(r.problems...)
	}
	return r.config, nil
}

// AddUser returns the text that c was loaded from with a user in it who has u's name, serials and apps. If there is
// one of that name, who must have the same apps, only the serials are added. Every other byte stays as it is. It fails
// as Load would if it were given that text in place of the file's.
func (c *Config) AddUser(u User) ([]byte, error) {
	if c.file == "" {
		return nil, errors.New("mtlsserver: AddUser: the Config is not from a file: add to its Users")
	}
	text, err := c.withUser(u)
	if err == nil {
		_, err = load(source{file: c.file, dir: c.dir, text: text})
	}
	if err != nil {
		return nil, err
	}
	return text, nil
}

// withUser is AddUser, whatever comes of it.
func (c *Config) withUser(u User) ([]byte, error) {
	i := slices.IndexFunc(c.Users, func(known User) bool { return known.Name == u.Name })
	if i < 0 {
		entry, err := json.Marshal(User{Name: u.Name, Serials: u.Serials, Apps: u.Apps})
		return c.insert("users", "\n    "+string(entry), "\n  "), err
	}
	want, got := slices.Sorted(slices.Values(u.Apps)), slices.Sorted(slices.Values(c.Users[i].Apps))
	if !slices.Equal(want, got) {
		return nil, fmt.Errorf("user %q has apps %q, not %q: change that in the configuration first", u.Name, got, want)
	}
	serials, err := json.Marshal(u.Serials)
	return c.insert(fmt.Sprintf("users[%d].serials", i), " "+strings.Trim(string(serials), "[]"), ""), err
}

// insert adds an item to a list, and what goes before the ] if the list was empty.
func (s *source) insert(list, item, end string) []byte {
	head := bytes.TrimRight(s.text[:s.spans[list].to-1], " \t\r\n")
	tail := s.text[len(head):]
	if head[len(head)-1] != '[' {
		item, end = ","+item, ""
	}
	return slices.Concat(head, []byte(item+end), tail)
}

// A report collects what is wrong with a Config.
type report struct {
	config   *Config
	keys     []string // of the problems
	problems []error
}

const maxProblems = 100 // more than that nobody reads

// add says what is wrong with the value at key, unless something is known to be wrong there, around it, or in it: then
// this may be but what follows from that.
func (r *report) add(key, format string, args ...any) {
	if len(r.keys) == maxProblems || slices.ContainsFunc(r.keys, func(known string) bool { return within(key, known) || within(known, key) }) {
		return
	}
	r.keys = append(r.keys, key)
	text := fmt.Sprintf(format, args...)
	if key != "" {
		text = key + ": " + text
	}
	if c := r.config; c.file != "" {
		for !c.written(key) && key != "" { // what is missing is missing in what is around it
			key = key[:max(strings.LastIndexAny(key, ".["), 0)]
		}
		text = fmt.Sprintf("%s:%d: %s", c.file, c.line(c.spans[key].from), text)
	}
	r.problems = append(r.problems, errors.New(text))
}

func within(key, outer string) bool {
	rest, ok := strings.CutPrefix(key, outer)
	return ok && (outer == "" || rest == "" || strings.ContainsAny(rest[:1], ".["))
}

// parse reads r's Config from its text, and reports whether that is JSON.
func (r *report) parse() bool {
	c := r.config
	c.spans = map[string]span{}
	for i, b := range c.text {
		if b == '\n' {
			c.newlines = append(c.newlines, i)
		}
	}
	if bytes.HasPrefix(c.text, []byte("\xef\xbb\xbf")) {
		r.add("", "it begins with a byte order mark: save it without")
		return false
	}
	var all json.RawMessage
	err := json.Unmarshal(c.text, &all) // checks the syntax to the end, and bounds the depth
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		c.spans[""] = span{from: min(int(syntax.Offset), len(c.text))}
		r.add("", "not JSON: %v: mend it there or shortly before", err)
		return false
	}
	if !utf8.Valid(c.text) {
		r.add("", "not UTF-8: save it as that")
		return false
	}
	r.value("", all, bytes.IndexByte(c.text, all[0]), reflect.ValueOf(c).Elem())
	for _, key := range []string{"tls", "apps", "users"} {
		if !c.written(key) {
			r.add(key, "missing: it is required")
		}
	}
	return true
}

// value reads text, which begins at offset of the file, into v, which is at key. Its syntax is known to be right.
func (r *report) value(key string, text []byte, offset int, v reflect.Value) {
	r.config.spans[key] = span{offset, offset + len(text)}
	if v.Kind() == reflect.Pointer && text[0] == '{' {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	want, ok := "an object in { }", text[0] == '{'
	switch _, isDuration := v.Interface().(time.Duration); {
	case isDuration:
		var s string
		json.Unmarshal(text, &s)
		d, err := time.ParseDuration(s)
		v.SetInt(int64(d))
		want, ok = `a duration such as "10s"`, err == nil
	case v.CanInt():
		want, ok = "a whole number", text[0] != 'n' && json.Unmarshal(text, v.Addr().Interface()) == nil
	case v.Kind() == reflect.String:
		want, ok = "a text in quotes", text[0] == '"' && json.Unmarshal(text, v.Addr().Interface()) == nil
	case v.Kind() == reflect.Slice:
		want, ok = "a list in [ ]", text[0] == '['
	}
	if !ok {
		r.add(key, "want %s, got %s", want, clean(string(text), 40))
	} else if text[0] == '{' || text[0] == '[' {
		r.members(key, text, offset, v)
	}
}

// members reads the values in a list or an object, for which it is given what value is.
func (r *report) members(key string, text []byte, offset int, v reflect.Value) {
	if v.Kind() == reflect.Map {
		v.Set(reflect.MakeMap(v.Type()))
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.Token() // the [ or {
	for i := 0; dec.More() && len(r.keys) < maxProblems; i++ {
		name, path, known := "", fmt.Sprintf("%s[%d]", key, i), []string(nil)
		if text[0] == '{' {
			token, _ := dec.Token()
			name = token.(string)
			path = fmt.Sprintf("%s[%q]", key, name)
		}
		var into reflect.Value
		switch v.Kind() {
		case reflect.Slice:
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			into = v.Index(i)
		case reflect.Map:
			into = reflect.New(v.Type().Elem()).Elem()
		default:
			if name != "" && strconv.Quote(name) == `"`+name+`"` {
				path = strings.TrimPrefix(key+"."+name, ".")
			}
			into, known = field(v, name)
		}
		var member json.RawMessage
		dec.Decode(&member)
		from := offset + int(dec.InputOffset()) - len(member)
		switch {
		case r.config.written(path):
			r.add(path, "again in line %d: keep one of the two", r.config.line(from))
		case !into.IsValid():
			r.config.spans[path] = span{from: from}
			r.add(path, "unknown key: want one of %s", strings.Join(known, ", "))
		default:
			r.value(path, member, from, into)
			if v.Kind() == reflect.Map {
				v.SetMapIndex(reflect.ValueOf(name), into)
			}
		}
	}
}

// field returns the field of a struct that has a name in JSON, if there is one, and the names that there are.
func field(v reflect.Value, name string) (into reflect.Value, names []string) {
	for f, value := range v.Fields() {
		switch tag, _, _ := strings.Cut(f.Tag.Get("json"), ","); tag {
		case "": // not of the file
		case name:
			into = value
			fallthrough
		default:
			names = append(names, tag)
		}
	}
	return into, names
}
