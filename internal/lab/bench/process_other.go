//go:build !linux

package main

import (
	"errors"
	"os"
	"syscall"
	"time"
)

// cannotMeasure says which figures this system lacks, and how to get them.
const cannotMeasure = "CPU time, memory and descriptors of other processes can only be read on " +
	"Linux: here there are rates alone, " +
	"which say little. Run it on a Linux machine, or in a container: " +
	"docker run --rm -v \"$PWD\":/src -w /src golang:1.26 go run -C internal/lab ./bench"

func own() *syscall.SysProcAttr { return nil }

func terminate(pid int) { kill(pid) }

func kill(pid int) {
	if p, err := os.FindProcess(pid); err == nil {
		p.Kill()
	}
}

func family(pid int) []int { return []int{pid} }

func cpuTime([]int) time.Duration { return 0 }

func memory([]int) (resident, descriptors float64) { return 0, 0 }

func raiseDescriptors() int { return 1024 }

func onLoopback(_, _ string, _ syscall.RawConn) error {
	return errors.New("-scale needs Linux, where all of 127.0.0.0/8 is this machine")
}

func system() string { return "unknown processor" }
