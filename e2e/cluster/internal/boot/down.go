package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
)

const (
	killDeadline   = 20 * time.Second
	cgroupDeadline = 20 * time.Second
)

// Down removes a cluster and all it owns, whatever state it is in. It is no
// error that there is nothing to remove.
func Down(of instance.Instance) error {
	if err := checkRoot(); err != nil {
		return err
	}
	lock, err := of.Acquire()
	if err != nil {
		return err
	}
	defer lock.Release()
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
	state, _, err := of.LoadState()
	if err != nil {
		return err
	}
	err = errors.Join(
		host.ThawCgroups(of.Cgroup()),
		// The kernel ends every other process with the first, and their
		// mounts and inner links with their namespaces.
		state.First.Kill(killDeadline),
		host.RemoveLink(of.Link()),
		host.RemoveCgroups(of.Cgroup(), cgroupDeadline),
	)
	if err != nil {
		return err
	}
	return emptyFolder(of.Dir)
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
