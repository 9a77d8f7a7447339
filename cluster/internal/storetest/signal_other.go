//go:build !unix

package storetest

import "os"

// These are never called: redis-server does not run here.
func stop(*os.Process)   { panic("there is no SIGSTOP") }
func resume(*os.Process) { panic("there is no SIGCONT") }
