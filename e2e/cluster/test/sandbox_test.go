package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// What the sandboxed run is told by the one that made the sandbox.
const (
	sandboxedVar = "HERD_CLUSTER_TEST_PROGRAMS"
	sourcesDir   = "../tools"
	herdCluster  = "herd-cluster"
)

// programs is the folder of the programs built for the tests.
var programs = os.Getenv(sandboxedVar)

// TestMain runs the tests in network, mount and process namespaces of their
// own. There they are alone, so that all there is before a cluster can be
// compared with all there is after it, and no cluster of the machine is near.
// Only cgroups and files are the machine's.
func TestMain(m *testing.M) {
	if programs != "" {
		if err := enterSandbox(); err != nil {
			fmt.Fprintln(os.Stderr, "sandbox:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	code, err := runSandboxed()
	if skip := new(skipError); errors.As(err, &skip) {
		fmt.Println("SKIP: the cluster tests did not run:", skip)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		code = 1
	}
	os.Exit(code)
}

type skipError struct{ reason string }

func (s *skipError) Error() string { return s.reason }

func runSandboxed() (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, &skipError{"they need root"}
	}
	dir, err := os.MkdirTemp("", "herd-cluster-test-*")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	for name, pkg := range map[string]string{herdCluster: "herd.dev/cluster", "echo": "herd.dev/cluster/test/echo"} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build %s: %w: %s", pkg, err, out)
		}
	}
	build := exec.Command(filepath.Join(dir, herdCluster), "build", "--sources", sourcesDir,
		"pause", "containerd", "coredns", "kubernetes")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return 0, &skipError{fmt.Sprintf("the tools cannot be had: %v", err)}
	}

	// The signal comes when the thread ends, so it must be this one's.
	runtime.LockOSThread()
	run := exec.Command(os.Args[0], os.Args[1:]...)
	run.Env = append(os.Environ(), sandboxedVar+"="+dir)
	run.Stdout, run.Stderr = os.Stdout, os.Stderr
	run.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	err = run.Run()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

func enterSandbox() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	return exec.Command("ip", "link", "set", "lo", "up").Run()
}
