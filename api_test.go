package lbproxy

import (
	"go/version"
	"os"
	"os/exec"
	"regexp"
	"testing"
)

// TestAPI compares the documentation with testdata/api.txt, so that no change of the API goes
// unnoticed. After an intended change: go doc -all . > testdata/api.txt
func TestAPI(t *testing.T) {
	want, err := os.ReadFile("testdata/api.txt")
	if err != nil {
		t.Fatal(err)
	}
	got, err := exec.Command("go", "doc", "-all", ".").Output()
	if err != nil {
		t.Skip("there is no go command: ", err)
	}
	if string(got) != string(want) {
		t.Error("the API or its documentation has changed: if that is intended, " +
			"run go doc -all . > testdata/api.txt")
	}
}

// Below Go 1.26.6 a client of crypto/tls can pin a server by KeyUpdates (CVE-2026-32283,
// CVE-2026-56862). Only the go line keeps importers from building with such a version: they ignore
// a toolchain line.
func TestGoVersionHasNoKeyUpdateFaults(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^go (\S+)$`).FindSubmatch(text)
	if line == nil || version.Compare("go"+string(line[1]), "go1.26.6") < 0 {
		t.Errorf("go.mod has the line %q, want go 1.26.6 or later", line)
	}
}
