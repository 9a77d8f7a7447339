package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) { proxytest.Main(m) }

func Example() {
	if err := run(os.Stdout); err != nil {
		fmt.Println(err)
	}

	// Output:
	// fred   100 bytes: done
	// fred  2000 bytes: cut
	// fred     1 bytes: refused
	// fay      1 bytes: done
	// fay      1 bytes: done
	// fay      1 bytes: done
	// fay      1 bytes: refused
	// paula 2000 bytes: done
	// paula 2000 bytes: done
	// paula 2000 bytes: done
	// paula 2000 bytes: done
}

func TestOutputFitsATerminal(t *testing.T) {
	var out bytes.Buffer
	proxytest.Must(t, run(&out))
	for line := range strings.Lines(out.String()) {
		if line = strings.TrimSuffix(line, "\n"); len(line) > 79 {
			t.Errorf("%d columns, want at most 79: %s", len(line), line)
		}
	}
}
