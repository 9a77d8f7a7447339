// Package promises has no code, only a test: each promise of TESTING.md has tests, and the tests
// that it names exist.
package promises

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// name matches the name of a test, with its package's folder in front unless that is the module's
// root.
var name = regexp.MustCompile("^`(?:([a-z/]+):)?((?:Test|Fuzz|Example)\\w*)`$")

func TestEachPromiseHasTests(t *testing.T) {
	const root = "../.."
	text, err := os.ReadFile(filepath.Join(root, "TESTING.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = os.Stat(filepath.Join(root, "cluster"))
	deleted := os.IsNotExist(err) // the module is optional
	rows := 0
	packages := map[string]map[string]bool{} // the tests of each
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if !strings.HasPrefix(line, "|") || cells[1] == "---" ||
			strings.TrimSpace(cells[2]) == "tests" {
			continue
		}
		if rows++; len(cells) != 4 || strings.TrimSpace(cells[1]) == "" {
			t.Errorf("want a promise and its tests: %s", line)
			continue
		}
		for quoted := range strings.SplitSeq(cells[2], ",") {
			parts := name.FindStringSubmatch(strings.TrimSpace(quoted))
			if parts == nil {
				t.Errorf("%q is not the name of a test: %s", quoted, line)
				continue
			}
			dir, test := parts[1], parts[2]
			if deleted && (dir == "cluster" || strings.HasPrefix(dir, "cluster/")) {
				continue
			}
			if packages[dir] == nil {
				packages[dir] = testsIn(t, filepath.Join(root, dir))
			}
			if !packages[dir][test] {
				t.Errorf("there is no %s in %q", test, dir)
			}
		}
	}
	if rows == 0 {
		t.Error("TESTING.md has no rows")
	}
}

// testsIn returns the names of the test functions in a folder.
func testsIn(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Errorf("no tests in %s: %v", dir, err)
	}
	names := map[string]bool{}
	for _, path := range files {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				names[f.Name.Name] = true
			}
		}
	}
	return names
}
