package instance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"herd.dev/cluster/internal/host"
)

// State is what a running instance needs to know beyond its name.
type State struct {
	Network Network
	Nodes   int
	// Kubernetes and Containerd are the folders of the programs it runs.
	Kubernetes, Containerd string
	// First is the cluster's first process; killing it ends all others.
	First host.Process
}

// Path has the cluster's own programs before the machine's.
func (s State) Path() string {
	return strings.Join([]string{
		s.Kubernetes, s.Containerd, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin",
	}, ":")
}

// NodeNames are the names of the instance's nodes.
func (s State) NodeNames() []string {
	names := make([]string, s.Nodes)
	for k := range names {
		names[k] = NodeName(k + 1)
	}
	return names
}

// NodeName is the name of node k, from 1.
func NodeName(k int) string { return fmt.Sprintf("n%d", k) }

// NodeNumber is the number of a node, from 1, or 0 if there is none of that
// name.
func (s State) NodeNumber(name string) int {
	return slices.Index(s.NodeNames(), name) + 1
}

func (i Instance) statePath() string { return filepath.Join(i.Dir, "state.json") }

// SaveState replaces the recorded state at once.
func (i Instance) SaveState(state State) error {
	text, err := json.MarshalIndent(state, "", "  ")
	if err != nil {
		return fmt.Errorf("state of %s: %w", i.Name, err)
	}
	next := i.statePath() + ".next"
	if err := os.WriteFile(next, text, 0o600); err != nil {
		return fmt.Errorf("state of %s: %w", i.Name, err)
	}
	if err := os.Rename(next, i.statePath()); err != nil {
		return fmt.Errorf("state of %s: %w", i.Name, err)
	}
	return nil
}

// LoadState reads the recorded state; ok is false where there is none.
func (i Instance) LoadState() (state State, ok bool, err error) {
	text, err := os.ReadFile(i.statePath())
	if errors.Is(err, fs.ErrNotExist) {
		return State{}, false, nil
	}
	if err != nil {
		return State{}, false, fmt.Errorf("state of %s: %w", i.Name, err)
	}
	if err := json.Unmarshal(text, &state); err != nil {
		return State{}, false, fmt.Errorf("state of %s: %w", i.Name, err)
	}
	return state, true, nil
}

// MustState reads the state of an instance that has one.
func (i Instance) MustState() (State, error) {
	state, ok, err := i.LoadState()
	if err == nil && !ok {
		err = fmt.Errorf("no state of %s in %s", i.Name, i.Dir)
	}
	return state, err
}

// Running returns the state of an instance whose first process lives.
func (i Instance) Running() (State, error) {
	state, ok, err := i.LoadState()
	if err != nil {
		return State{}, err
	}
	if !ok || !state.First.Alive() {
		return State{}, fmt.Errorf("cluster %s is not running", i.Name)
	}
	return state, nil
}

// Lock holds an instance for one `up` or `down`. The lock is on the folder
// itself and ends with the process, so that it leaves nothing behind.
type Lock struct{ dir *os.File }

// Acquire makes the instance's folder where needed and locks it.
func (i Instance) Acquire() (Lock, error) {
	for {
		if err := os.MkdirAll(i.Dir, 0o755); err != nil {
			return Lock{}, fmt.Errorf("folder of %s: %w", i.Name, err)
		}
		dir, err := os.Open(i.Dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Lock{}, fmt.Errorf("folder of %s: %w", i.Name, err)
		}
		if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			dir.Close()
			return Lock{}, fmt.Errorf("cluster %s: another up or down is at work on it", i.Name)
		}
		if i.isAt(dir) {
			return Lock{dir}, nil
		}
		// A `down` removed the folder between the open and the lock.
		dir.Close()
	}
}

func (i Instance) isAt(dir *os.File) bool {
	locked, err := dir.Stat()
	if err != nil {
		return false
	}
	current, err := os.Stat(i.Dir)
	return err == nil && os.SameFile(locked, current)
}

// Release ends the lock.
func (l Lock) Release() { l.dir.Close() }
