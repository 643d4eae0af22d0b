// Package supervise is what the first process of a process namespace does:
// it starts the others, reaps every orphan and answers commands about them.
package supervise

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// killDeadline is how long a killed process may take to end.
const killDeadline = 20 * time.Second

// Start makes a process with Table.Fork.
type Start func() (*Child, error)

// Child is a process that the table started.
type Child struct {
	Pid int

	done   chan struct{}
	status syscall.WaitStatus // once done
}

func (c *Child) running() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// Report is what is known of one named process.
type Report struct {
	Name string
	// Pid is of the namespace of the answering process.
	Pid     int
	Running bool
	// Ended says how the last run ended.
	Ended string `json:",omitempty"`
}

type entry struct {
	start Start
	last  *Child // nil before the first start
}

// Table is the processes of a namespace by name. One loop reaps them all, so
// nothing else may wait for a child.
type Table struct {
	starting sync.Mutex // held through a named start

	mu       sync.Mutex
	names    []string
	entries  map[string]*entry
	children map[int]*Child // those not reaped
}

// NewTable begins to reap.
func NewTable() *Table {
	t := &Table{entries: map[string]*entry{}, children: map[int]*Child{}}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	go func() {
		for range ended {
			t.reap()
		}
	}()
	return t
}

func (t *Table) reap() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if child, ok := t.children[pid]; ok {
			delete(t.children, pid)
			child.status = status
			close(child.done)
		}
	}
}

func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return "signal " + status.Signal().String()
	}
	return fmt.Sprintf("exit code %d", status.ExitStatus())
}

// Define names a process without starting it.
func (t *Table) Define(name string, start Start) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.names = append(t.names, name)
	t.entries[name] = &entry{start: start}
}

// Start starts a named process that is not running.
func (t *Table) Start(name string) error {
	t.starting.Lock()
	defer t.starting.Unlock()
	e, err := t.find(name)
	if err != nil {
		return err
	}
	if e.last != nil && e.last.running() {
		return fmt.Errorf("%s is running as process %d", name, e.last.Pid)
	}
	child, err := e.start()
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	e.last = child
	return nil
}

// Signal sends a signal to a named process. One that kills is waited for, so
// that the process can be started again at once.
func (t *Table) Signal(name string, sig syscall.Signal) error {
	e, err := t.find(name)
	if err != nil {
		return err
	}
	child, err := t.signal(e, sig)
	if err != nil {
		return fmt.Errorf("signal %s: %w", name, err)
	}
	if sig != syscall.SIGKILL {
		return nil
	}
	select {
	case <-child.done:
		return nil
	case <-time.After(killDeadline):
		return fmt.Errorf("%s did not end in %s", name, killDeadline)
	}
}

func (t *Table) signal(e *entry, sig syscall.Signal) (*Child, error) {
	// Locked, so that it is not reaped and its number reused meanwhile.
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.last == nil || !e.last.running() {
		return nil, errors.New("it is not running")
	}
	return e.last, syscall.Kill(e.last.Pid, sig)
}

func (t *Table) find(name string) (*entry, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[name]
	if !ok {
		return nil, fmt.Errorf("no process %q; there are %s", name, strings.Join(t.names, ", "))
	}
	return e, nil
}

// List reports every named process.
func (t *Table) List() []Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	reports := make([]Report, 0, len(t.names))
	for _, name := range t.names {
		report := Report{Name: name}
		if child := t.entries[name].last; child != nil {
			report.Pid, report.Running = child.Pid, child.running()
			if !report.Running {
				report.Ended = describe(child.status)
			}
		}
		reports = append(reports, report)
	}
	return reports
}

// Run runs a short command to its end.
func (t *Table) Run(argv ...string) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	child, err := t.Fork(argv, write, nil)
	write.Close()
	if err != nil {
		return err
	}
	output, _ := io.ReadAll(read)
	<-child.done
	if child.status.ExitStatus() != 0 {
		return fmt.Errorf("%s: %s: %s", strings.Join(argv, " "), describe(child.status), strings.TrimSpace(string(output)))
	}
	return nil
}

// Fork starts a process whose output goes to a file and to which further
// files are descriptors 3 and on. os/exec is no choice beside a loop that
// reaps all children: it waits for them itself.
func (t *Table) Fork(argv []string, output *os.File, attr *syscall.SysProcAttr, inherit ...*os.File) (*Child, error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), output.Fd(), output.Fd()}
	for _, file := range inherit {
		files = append(files, file.Fd())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{Env: os.Environ(), Files: files, Sys: attr})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	child := &Child{Pid: pid, done: make(chan struct{})}
	t.children[pid] = child
	return child, nil
}

// DefineProgram names a command whose output is appended to a log.
func (t *Table) DefineProgram(name, log string, argv ...string) {
	t.Define(name, func() (*Child, error) {
		output, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		defer output.Close()
		return t.Fork(argv, output, &syscall.SysProcAttr{Setsid: true})
	})
}
