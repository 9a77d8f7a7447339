package lbproxy

import (
	"os"
	"os/exec"
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
