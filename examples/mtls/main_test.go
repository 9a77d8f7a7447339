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
	// client                    app  client sees           logged reason
	// alice                     web  web-1 answers         (nothing yet)
	// reporting                 web  web-2 answers         done
	// reporting                 db   bad certificate       app-not-allowed
	// alice's serial, other CA  web  bad certificate       unknown-ca
	// no certificate            web  certificate required  no-certificate
	// alice, now revoked        web  the connection ends   revoked
	// alice, once more          web  bad certificate       unknown-serial
	// reporting                 web  web-1 answers         done
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
