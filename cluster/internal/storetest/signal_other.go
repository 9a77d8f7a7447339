//go:build !unix

package storetest

import "os"

// There is no redis-server to freeze where these are called for.
func stop(*os.Process)   { panic("there is no SIGSTOP") }
func resume(*os.Process) { panic("there is no SIGCONT") }
