// Package host is what the cluster touches of the machine: processes, links,
// routes and cgroups.
package host

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is one process and no later one of the same number.
type Process struct {
	Pid       int
	StartTime uint64
}

// FindProcess identifies the process that has a number now.
func FindProcess(pid int) (Process, error) {
	_, startTime, err := stat(pid)
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return Process{Pid: pid, StartTime: startTime}, nil
}

// FindWriters lists the processes that were started with exactly these words
// after the program's name and whose standard output is the file, which may
// have been removed since.
func FindWriters(file string, words ...string) ([]Process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, dir := range dirs {
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue // it has ended
		}
		argv := strings.Split(strings.TrimRight(string(args), "\x00"), "\x00")
		if len(argv) == 0 || !slices.Equal(argv[1:], words) || !writes(dir, file) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return nil, err
		}
		if process, err := FindProcess(pid); err == nil {
			found = append(found, process)
		}
	}
	return found, nil
}

func writes(proc, file string) bool {
	output := filepath.Join(proc, "fd", "1")
	if link, err := os.Readlink(output); err == nil && strings.TrimSuffix(link, " (deleted)") == file {
		return true
	}
	opened, err := os.Stat(output)
	if err != nil {
		return false
	}
	now, err := os.Stat(file)
	return err == nil && os.SameFile(opened, now)
}

// Alive says whether the process exists and is no zombie.
func (p Process) Alive() bool {
	state, startTime, err := stat(p.Pid)
	return err == nil && startTime == p.StartTime && state != 'Z' && state != 'X'
}

// Kill ends the process and waits until it is gone. If it is the first of its
// process namespace, the kernel ends the others before it.
func (p Process) Kill(deadline time.Duration) error {
	if !p.Alive() {
		return nil
	}
	if err := syscall.Kill(p.Pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return fmt.Errorf("kill process %d: %w", p.Pid, err)
	}
	return WaitFor(deadline, fmt.Sprintf("process %d to end", p.Pid), func() (bool, error) {
		return !p.Alive(), nil
	})
}

// stat returns the state and the start time (fields 3 and 22) of a process.
func stat(pid int) (state byte, startTime uint64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may hold spaces and parentheses.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("stat of process %d has %d fields", pid, len(fields))
	}
	startTime, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], startTime, err
}

// Nested is a process that is the first of a process namespace inside its
// parent's.
type Nested struct {
	Pid  int
	Args []string
}

// NestedIn lists the namespace-founding children of a process.
func NestedIn(parent int) ([]Nested, error) {
	statuses, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	var nested []Nested
	for _, path := range statuses {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		if !isNestedChild(string(text), parent) {
			continue
		}
		dir := filepath.Dir(path)
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return nil, err
		}
		nested = append(nested, Nested{Pid: pid, Args: strings.Split(strings.TrimRight(string(args), "\x00"), "\x00")})
	}
	return nested, nil
}

func isNestedChild(status string, parent int) bool {
	child, first := false, false
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		switch key {
		case "PPid":
			child = len(fields) == 1 && fields[0] == strconv.Itoa(parent)
		case "NSpid":
			first = len(fields) > 1 && fields[len(fields)-1] == "1"
		}
	}
	return child && first
}
