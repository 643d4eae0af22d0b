package tools

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// Builder builds tools from one copy of the sources into one cache.
type Builder struct {
	// Sources is the tools folder of a clone.
	Sources string
	// Cache is where the programs go, one folder for each content.
	Cache string
	// Report is told how each tool was had, and how long that took.
	Report func(name, how string, took time.Duration)
}

// Ensure returns the folder of a tool's programs, which it builds where they
// are not in the cache.
func (b Builder) Ensure(name string) (string, error) {
	began := time.Now()
	tool, dir, err := b.place(name)
	if err != nil {
		return "", err
	}
	if exists(dir) {
		b.Report(name, "cached", time.Since(began))
		return dir, nil
	}
	unlock, err := b.lock(filepath.Base(dir))
	if err != nil {
		return "", fmt.Errorf("tool %s: %w", name, err)
	}
	defer unlock()
	if exists(dir) {
		b.Report(name, "built by another process", time.Since(began))
		return dir, nil
	}
	if err := b.build(tool, dir); err != nil {
		return "", fmt.Errorf("tool %s: %w", name, err)
	}
	b.Report(name, "built", time.Since(began))
	return dir, nil
}

// Built returns the folder of a tool's programs, and whether they are there.
func (b Builder) Built(name string) (dir string, built bool, err error) {
	_, dir, err = b.place(name)
	return dir, err == nil && exists(dir), err
}

// place is a tool, and the folder that its programs have in the cache.
func (b Builder) place(name string) (tool Tool, dir string, err error) {
	if tool, err = find(name); err != nil {
		return tool, "", err
	}
	key, err := b.key(tool)
	if err != nil {
		return tool, "", fmt.Errorf("tool %s: %w", name, err)
	}
	return tool, filepath.Join(b.Cache, key), nil
}

// Binary returns the path of a program of a tool of the same name.
func (b Builder) Binary(name string) (string, error) {
	dir, err := b.Ensure(name)
	return filepath.Join(dir, name), err
}

// build puts the programs in place all at once.
func (b Builder) build(tool Tool, dir string) error {
	fresh, err := os.MkdirTemp(b.Cache, ".build-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(fresh) // gone already once it is in place
	if err := os.Chmod(fresh, 0o755); err != nil {
		return err
	}
	for _, pkg := range tool.packages {
		command := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
			"-ldflags", "-s -w "+tool.ldflags, "-tags", tool.tags, "-o", fresh+"/", pkg)
		command.Dir = filepath.Join(b.Sources, tool.Name)
		command.Env = append(os.Environ(), "CGO_ENABLED=0")
		command.Stdout, command.Stderr = os.Stderr, os.Stderr
		if err := command.Run(); err != nil {
			return fmt.Errorf("go build %s: %w", pkg, err)
		}
	}
	for _, link := range tool.links {
		if err := os.Symlink(tool.Name, filepath.Join(fresh, link)); err != nil {
			return err
		}
	}
	return os.Rename(fresh, dir)
}

// key is the name of all that decides what is built: the Go version, the
// module's files and the flags.
func (b Builder) key(tool Tool) (string, error) {
	sum := sha256.New()
	dir := filepath.Join(b.Sources, tool.Name)
	version := exec.Command("go", "env", "GOVERSION", "GOARCH")
	version.Dir = dir
	text, err := version.Output()
	if err != nil {
		return "", fmt.Errorf("go version: %w", err)
	}
	fmt.Fprintf(sum, "%s\n%q\n%q\n", text, tool.packages, tool.ldflags)
	if tool.tags != "" {
		fmt.Fprintf(sum, "%q\n", tool.tags)
	}
	var files []string
	for _, pattern := range []string{"*.go", "go.mod", "go.sum"} {
		matches, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		files = append(files, matches...)
	}
	slices.Sort(files)
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %d\n", filepath.Base(path), len(content))
		sum.Write(content)
	}
	return hex.EncodeToString(sum.Sum(nil))[:20], nil
}

// lock keeps a second process from building the same for minutes.
func (b Builder) lock(key string) (unlock func(), err error) {
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(b.Cache, "."+key+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		file.Close()
		return nil, err
	}
	return func() { file.Close() }, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
