package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const cannotMeasure = "" // Linux has everything

// own puts a child into a process group of its own: an interrupt at the terminal then reaches only
// this process, which ends the whole group, including nginx's workers.
func own() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func terminate(pid int) { syscall.Kill(-pid, syscall.SIGTERM) }
func kill(pid int)      { syscall.Kill(-pid, syscall.SIGKILL) }

// family returns a process and its children.
func family(pid int) []int {
	pids := []int{pid}
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks { // each thread has its own children
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		for _, child := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(child); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// cpuTime returns the user and system time of processes, including threads that have ended.
func cpuTime(pids []int) (sum time.Duration) {
	// CPUCLOCK_SCHED counts nanoseconds; /proc/PID/stat only hundredths of a second.
	const schedClock = 2
	for _, pid := range pids {
		var t syscall.Timespec
		syscall.Syscall(syscall.SYS_CLOCK_GETTIME, uintptr(^pid<<3|schedClock),
			uintptr(unsafe.Pointer(&t)), 0)
		sum += time.Duration(t.Nano())
	}
	return sum
}

// memory returns the resident set of processes in bytes, and the number of their descriptors.
func memory(pids []int) (resident, descriptors float64) {
	for _, pid := range pids {
		statm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if fields := bytes.Fields(statm); len(fields) > 1 {
			pages, _ := strconv.ParseFloat(string(fields[1]), 64)
			resident += pages * float64(os.Getpagesize())
		}
		files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		descriptors += float64(len(files))
	}
	return resident, descriptors
}

// raiseDescriptors raises this process's limit of descriptors as far as allowed, and returns it. Go
// does so itself, but restores the old limit for children, unless the program sets the limit.
func raiseDescriptors() int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 1024
	}
	raised := syscall.Rlimit{Cur: limit.Max, Max: limit.Max}
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised) != nil {
		return int(min(limit.Cur, 1<<20))
	}
	return int(min(limit.Max, 1<<20))
}

// onLoopback binds a listener on any address to the loopback interface.
func onLoopback(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = syscall.BindToDevice(int(fd), "lo") }); e != nil {
		return e
	}
	return err
}

// system returns the names of the processor and the kernel.
func system() string {
	model := "unknown processor"
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return model + ", Linux " + strings.TrimSpace(string(release))
}
