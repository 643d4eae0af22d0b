package test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
)

// TestDownAfterUpWasKilled kills `up` at several points of the start.
func TestDownAfterUpWasKilled(t *testing.T) {
	name := ofClone(t, "up")
	of, err := instance.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range []struct {
		name    string
		reached func() bool
	}{
		{"its link is made", func() bool {
			_, err := net.InterfaceByName(of.Link())
			return err == nil
		}},
		{"its first process is recorded", func() bool {
			_, err := of.Running()
			return err == nil
		}},
		{"a node runs a pod", func() bool {
			pods, err := filepath.Glob("/sys/fs/cgroup/pids/" + of.Cgroup() + "/n*/kubepods/*/pod*")
			return err == nil && len(pods) > 0
		}},
	} {
		t.Run(point.name, func(t *testing.T) {
			t.Cleanup(func() { down(t, name) })
			down(t, name)
			before := takeSnapshot(t, name)
			killUpWhen(t, name, point.reached)
			down(t, name)
			requireSame(t, before, name)
		})
	}
}

func killUpWhen(t *testing.T, name string, reached func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	starting := exec.CommandContext(ctx, filepath.Join(programs, herdCluster), "up", "--name", name, "--sources", sourcesDir)
	if err := starting.Start(); err != nil {
		t.Fatal(err)
	}
	err := host.WaitFor(upTimeout, "the point of the start", func() (bool, error) { return reached(), nil })
	if err != nil {
		t.Error(err)
	}
	if err := starting.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	var exit *exec.ExitError
	if err := starting.Wait(); !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
		t.Errorf("up was to be killed and ended with: %v", err)
	}
}

// TestDownAfterFirstProcessWasKilled kills the process all others depend on.
func TestDownAfterFirstProcessWasKilled(t *testing.T) {
	name := ofClone(t, "first")
	before := takeSnapshot(t, name)
	c := up(t, name)
	c.startEcho()
	first := c.state().First
	if err := first.Kill(answerTimeout); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Running(); err == nil {
		t.Error("the cluster runs without its first process")
	}
	down(t, name)
	requireSame(t, before, name)
}

// TestDownAfterKubeletWasKilled kills the process that would end the pods, of
// which it freezes those of the same node: a kill alone does not end them.
func TestDownAfterKubeletWasKilled(t *testing.T) {
	name := ofClone(t, "node")
	before := takeSnapshot(t, name)
	c := up(t, name)
	c.startEcho()
	herd(t, "signal", "--name", name, "n1", "kubelet", "9")
	freeze(t, c.Cgroup()+"/n1")
	down(t, name)
	requireSame(t, before, name)
}

func freeze(t *testing.T, cgroup string) {
	t.Helper()
	for path, value := range map[string]string{
		"/sys/fs/cgroup/freezer/" + cgroup + "/freezer.state": "FROZEN", // version 1
		"/sys/fs/cgroup/" + cgroup + "/cgroup.freeze":         "1",
	} {
		if err := os.WriteFile(path, []byte(value), 0); err == nil {
			return
		}
	}
	t.Fatalf("no hierarchy to freeze %s in", cgroup)
}
