package main

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"testing"
)

// When the code changes, so that a fault in the list cannot be made any more, this tells.
func TestEachMutantStillApplies(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range mutants {
		text, err := os.ReadFile(filepath.Join("../..", filepath.FromSlash(m.file)))
		if err != nil {
			t.Fatal(err)
		}
		mutated, err := m.apply(text)
		if err != nil {
			t.Errorf("%s: %s: %v", m.file, m.what, err)
		} else if _, err := parser.ParseFile(token.NewFileSet(), m.file, mutated, 0); err != nil {
			t.Errorf("%s: %v", m.what, err)
		}
		if key := m.file + m.what; seen[key] || m.what == "" {
			t.Errorf("%s: %q is there twice", m.file, m.what)
		} else {
			seen[key] = true
		}
	}
}

func TestAMutantMustApplyExactlyOnce(t *testing.T) {
	m := mutant{old: "x", new: "y"}
	for text, want := range map[string]string{"a x b": "a y b", "a b": "", "x x": ""} {
		got, err := m.apply([]byte(text))
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestWhoFoundIt(t *testing.T) {
	for text, want := range map[string]string{
		"x\n--- FAIL: TestA (0.00s)\n    --- FAIL: TestA/b\n":             "TestA",
		"panic: test timed out after 1m0s\n\trunning tests:\n\t\tTestB\n": "panic: test timed out after 1m0s",
		"panic: boom\n\ngoroutine 1":                                      "panic: boom",
		"left behind: 1 descriptors":                                      "left behind",
		"":                                                                "?",
	} {
		if got := finder([]byte(text)); got != want {
			t.Errorf("%q: found by %q, want %q", text, got, want)
		}
	}
}
