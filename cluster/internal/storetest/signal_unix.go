//go:build unix

package storetest

import (
	"os"
	"syscall"
)

func stop(p *os.Process)   { p.Signal(syscall.SIGSTOP) }
func resume(p *os.Process) { p.Signal(syscall.SIGCONT) }
