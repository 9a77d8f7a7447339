package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// dockerfile returns the arguments of the instructions of a kind, in the Dockerfile.
func dockerfile(t *testing.T, kind string) (all []string) {
	t.Helper()
	text, err := os.ReadFile("../../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if args, ok := strings.CutPrefix(line, kind+" "); ok {
			all = append(all, strings.TrimSpace(args))
		}
	}
	return all
}

// The test runs the image's command as a container does: as process 1, with no files except the
// image's and the configuration. It also runs the Dockerfile's build command.
func TestContainer(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it builds the program")
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can change the root of a process")
	}
	root := t.TempDir()
	builds := dockerfile(t, "RUN")
	if len(builds) != 1 || !strings.HasPrefix(builds[0], "CGO_ENABLED=0 go build ") {
		t.Fatalf("the Dockerfile runs %q, want the Go toolchain alone", builds)
	}
	build := exec.CommandContext(t.Context(), "sh", "-euc",
		strings.Replace(builds[0], " -o /", " -o "+root+"/", 1))
	build.Dir = "../../.."
	build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false")
	if said, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", builds[0], err, said)
	}
	var entry, args []string
	for into, kind := range map[*[]string]string{&entry: "ENTRYPOINT", &args: "CMD"} {
		if err := json.Unmarshal([]byte(dockerfile(t, kind)[0]), into); err != nil {
			t.Fatal(err)
		}
	}

	dir, _ := setUp(t)
	must(t, "issue", "-dir", dir, "-name", "alice", "-apps", "web")
	etc := filepath.Join(root, "etc", "mtlsserver")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	err := errors.Join(os.Chmod(root, 0o755), os.Chmod(etc, 0o700), os.Chown(etc, 65532, 65532))
	if err != nil {
		t.Fatal(err)
	}
	user := &syscall.Credential{Uid: 65532, Gid: 65532}
	if got := dockerfile(t, "USER")[0]; got != "65532:65532" {
		t.Fatalf("the image's user is %s", got)
	}
	for name, text := range contents(t, dir) {
		if name == "ca.key" {
			continue // has no business there
		}
		write(t, etc, name, []byte(text))
		if err := os.Chown(filepath.Join(etc, name), 65532, 65532); err != nil {
			t.Fatal(err)
		}
	}
	for _, second := range []bool{false, true} {
		cmd := exec.CommandContext(t.Context(), entry[0], append(entry[1:], args...)...)
		cmd.Path, cmd.Dir, cmd.Env = entry[0], "/", []string{}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Chroot: root,
			Credential: user}
		errs := make(lines, 10_000)
		cmd.Stderr = errs
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); errors.Is(err, os.ErrPermission) {
			t.Skipf("no PID namespace: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
		addr := ready(t, stdout)
		c, _, err := dial(dir, "alice", addr)
		if err != nil {
			t.Fatal(err)
		}
		config := filepath.Join(etc, "config.json")
		if said := must(t, "status", "-config", config); !has(said, "ready…web…up") {
			t.Errorf("status: %s", said)
		}
		must(t, "check", "-config", config) // root may, also beside the socket
		p := &process{errs: errs}
		cmd.Process.Signal(syscall.SIGHUP)
		p.await(t, `"msg":"reloaded"`)
		(&ended{c}).verify(t, false)
		cmd.Process.Signal(syscall.SIGTERM)
		p.await(t, `"msg":"draining"`)
		(&ended{c}).verify(t, false)
		if second {
			cmd.Process.Signal(syscall.SIGTERM)
		} else {
			c.Close()
		}
		over := make(chan error, 1)
		go func() { over <- cmd.Wait() }()
		select {
		case err := <-over:
			if exit, ok := errors.AsType[*exec.ExitError](err); second != (ok &&
				exit.ExitCode() == 1) {
				t.Errorf("second signal %v: it ended with %v", second, err)
			}
		case <-time.After(20 * time.Second):
			cmd.Process.Kill()
			t.Errorf("second signal %v: it goes on", second)
		}
		c.Close()
	}
}
