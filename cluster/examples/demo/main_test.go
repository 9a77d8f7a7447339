package main

import (
	"flag"
	"strings"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "4") // the tests mostly wait
	proxytest.Main(m)
}

func TestDemo(t *testing.T) {
	for part, claim := range map[string]string{
		"": "", "limit": "one limit holds across both proxies",
		"kill":   "the gateway names the dead proxy no more",
		"config": "both proxies follow the configuration in the store",
	} {
		t.Run("break="+part, func(t *testing.T) {
			t.Parallel()
			if testing.Short() && part == "config" {
				t.Skip("it waits for the longest")
			}
			var stdout, stderr strings.Builder
			code := run(t.Context(), []string{"-break", part}, &stdout, &stderr)
			switch {
			case part == "" && (code != 0 || !strings.Contains(stdout.String(), "That was all")):
				t.Errorf("exit %d\n%s%s", code, &stdout, &stderr)
			case part != "" && (code != 1 || !strings.Contains(stderr.String(), "claim: "+claim)):
				t.Errorf("exit %d, want the claim that %s\n%s%s", code, claim, &stdout, &stderr)
			}
		})
	}
	if code := run(t.Context(), []string{"-break", "x"}, new(strings.Builder),
		new(strings.Builder)); code != 2 {
		t.Error("a part that is none: exit", code)
	}
}
