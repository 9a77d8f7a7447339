package cluster

// child is what this program does in a test's child process.
func child(what string) {}
