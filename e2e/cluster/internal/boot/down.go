package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
)

const (
	killDeadline   = 20 * time.Second
	cgroupDeadline = 20 * time.Second
)

// Down removes a cluster and all it owns, whatever state it is in. It is no
// error that there is nothing to remove. warn is told of what is not as it
// should be.
func Down(of instance.Instance, warn func(what string)) error {
	if err := checkRoot(); err != nil {
		return err
	}
	lock, err := of.Acquire()
	if err != nil {
		return err
	}
	defer lock.Release()
	if _, _, err := of.LoadState(); err != nil {
		warn(fmt.Sprintf("%v; what has the cluster's name is removed without it", err))
	}
	if err := tearDown(of); err != nil {
		return err
	}
	if err := os.RemoveAll(of.Dir); err != nil {
		return fmt.Errorf("folder of %s: %w", of.Name, err)
	}
	return nil
}

// tearDown removes everything but the instance's empty folder. Each part is
// found by the instance's name, and removed though another part fails; the
// folder stays until the rest is gone, so that it can be tried again.
func tearDown(of instance.Instance) error {
	err := errors.Join(
		host.ThawCgroups(of.Cgroup()),
		// The kernel ends every other process with the first, and their
		// mounts and inner links with their namespaces.
		killFirst(of),
		host.RemoveLink(of.Link()),
		host.RemoveCgroups(of.Cgroup(), cgroupDeadline),
	)
	if err != nil {
		return err
	}
	return emptyFolder(of.Dir)
}

// killFirst ends the first process that is recorded, and what runs as one
// though no record says so: that may be damaged, or gone.
func killFirst(of instance.Instance) error {
	state, recorded, err := of.LoadState()
	if err != nil {
		recorded = false
	}
	first, err := host.FindWriters(of.Log("first"), "first", of.Name)
	if recorded && !slices.Contains(first, state.First) {
		first = append(first, state.First)
	}
	for _, process := range first {
		err = errors.Join(err, process.Kill(killDeadline))
	}
	return err
}

func emptyFolder(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			return fmt.Errorf("folder: %w", err)
		}
	}
	return nil
}
