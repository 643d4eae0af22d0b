package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

// controllers are what a kubelet wants of a version 2 hierarchy.
const controllers = "+cpuset +cpu +io +memory +pids"

// versionTwo says whether there is one hierarchy for all controllers.
func versionTwo() bool {
	_, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers"))
	return err == nil
}

// hierarchies are the roots of all cgroup trees.
func hierarchies() ([]string, error) {
	if versionTwo() {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("cgroups: %w", err)
	}
	var roots []string
	for _, entry := range entries {
		// Links (cpu -> cpu,cpuacct) name a hierarchy a second time.
		if entry.IsDir() {
			roots = append(roots, filepath.Join(cgroupRoot, entry.Name()))
		}
	}
	return roots, nil
}

// MakeCgroups makes the cgroup and one below it for each child, with every
// controller usable in them.
func MakeCgroups(name string, children []string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		parent := filepath.Join(root, name)
		if err := makeCgroup(parent); err != nil {
			return err
		}
		for _, child := range children {
			if err := makeCgroup(filepath.Join(parent, child)); err != nil {
				return err
			}
		}
	}
	return nil
}

func makeCgroup(dir string) error {
	if versionTwo() {
		if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.subtree_control"), []byte(controllers), 0o644); err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cgroup: %w", err)
	}
	// A new version 1 cpuset is empty and can hold no process.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		above, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil || versionTwo() {
			continue // not the cpuset hierarchy
		}
		if err := os.WriteFile(filepath.Join(dir, file), bytes.TrimSpace(above), 0o644); err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	return nil
}

// ThawCgroups lets frozen processes run: a frozen one does not die of a kill.
func ThawCgroups(name string) error {
	thawed := map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"}
	return eachCgroup(name, func(dir string) error {
		for file, value := range thawed {
			path := filepath.Join(dir, file)
			if _, err := os.Stat(path); err != nil {
				continue
			}
			if err := os.WriteFile(path, []byte(value), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("thaw cgroup %s: %w", dir, err)
			}
		}
		return nil
	})
}

// RemoveCgroups removes the cgroup of that name and all below it, as soon as
// the kernel has let go of the processes that ended in them.
func RemoveCgroups(name string, deadline time.Duration) error {
	return WaitFor(deadline, "cgroups "+name+" to be empty", func() (bool, error) {
		busy := false
		err := eachCgroup(name, func(dir string) error {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				busy = true
			}
			return nil
		})
		return !busy, err
	})
}

// eachCgroup visits the cgroups of a name in every hierarchy, the deepest
// first.
func eachCgroup(name string, visit func(dir string) error) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		var dirs []string
		err := filepath.WalkDir(filepath.Join(root, name), func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && entry.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("cgroups %s: %w", name, err)
		}
		slices.SortFunc(dirs, func(a, b string) int { return strings.Compare(b, a) })
		for _, dir := range dirs {
			if err := visit(dir); err != nil {
				return err
			}
		}
	}
	return nil
}
