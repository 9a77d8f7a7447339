// Package promises has no code, only a test: that each promise RFD.md makes has a test, and that the tests it names exist.
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

// A name is that of a test, after its package's folder if that is not the root of the module.
var name = regexp.MustCompile(`^(?:([a-z/]+):)?((?:Test|Fuzz|Example)\w*)$`)

func TestEachPromiseHasTests(t *testing.T) {
	const root, heading = "../..", "## What is promised, and the test of it\n"
	text, err := os.ReadFile(filepath.Join(root, "RFD.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), heading)
	if !found {
		t.Fatalf("RFD.md has no %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	packages, rows := map[string]map[string]bool{}, 0
	for line := range strings.Lines(section) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if !strings.HasPrefix(line, "|") || cells[2] == " tests " || cells[1] == "---" {
			continue
		}
		if rows++; len(cells) != 4 || strings.TrimSpace(cells[1]) == "" {
			t.Errorf("want a promise and its tests: %s", line)
			continue
		}
		for quoted := range strings.SplitSeq(cells[2], ",") {
			quoted = strings.TrimSpace(quoted)
			test := strings.Trim(quoted, "`")
			parts := name.FindStringSubmatch(test)
			if parts == nil || quoted != "`"+test+"`" {
				t.Errorf("%q is not the name of a test: %s", quoted, line)
				continue
			}
			if packages[parts[1]] == nil {
				packages[parts[1]] = testsIn(t, filepath.Join(root, parts[1]))
			}
			if !packages[parts[1]][parts[2]] {
				t.Errorf("there is no %s", test)
			}
		}
	}
	if rows == 0 {
		t.Error("no rows")
	}
}

// testsIn are the names of the test functions in a folder.
func testsIn(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in %s: %v", dir, err)
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
