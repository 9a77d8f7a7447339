package main

import (
	"runtime"
	"runtime/debug"
)

// A build describes how the program was built. The revision is empty if it was not built in a
// checkout.
type build struct {
	version, revision, goVersion string
	modified                     bool
}

func buildInfo() (b build) {
	b.version, b.goVersion = "(unknown)", runtime.Version()
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if info.Main.Version != "" {
		b.version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.revision = s.Value
		case "vcs.modified":
			b.modified = s.Value == "true"
		}
	}
	return b
}

// String returns the line that the command version prints.
func (b build) String() string {
	text := "mtlsserver " + b.version + " " + b.goVersion +
		" " + runtime.GOOS + "/" + runtime.GOARCH
	if b.revision != "" {
		text += " " + b.revision
	}
	if b.modified {
		text += " (modified)"
	}
	return text
}
