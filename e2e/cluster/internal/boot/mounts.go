package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"herd.dev/cluster/internal/instance"
)

// namespaces are those that the cluster's first process and each node's have
// for themselves.
const namespaces = syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
	syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS

// privateMounts ends the sharing of mounts with the parent and gives the
// namespace the /proc of its own processes and an empty /run.
func privateMounts() error {
	if err := mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC); err != nil {
		return err
	}
	return mount("tmpfs", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV)
}

// nodeBinds are the folders of a node that it keeps in the instance's folder,
// by where the node sees them.
func nodeBinds(of instance.Instance, node string) map[string]string {
	dir := of.NodeDir(node)
	return map[string]string{
		"/var/lib/kubelet":    filepath.Join(dir, "kubelet"),
		"/var/lib/containerd": filepath.Join(dir, "containerd"),
		"/var/log":            filepath.Join(dir, "log"),
	}
}

func nodeFolders(of instance.Instance, node string) []string {
	var folders []string
	for _, source := range nodeBinds(of, node) {
		folders = append(folders, source)
	}
	return folders
}

// nodeMounts hides the machine's /var/lib and /var/log behind the node's own
// folders. Its mounts are shared among its pods, as mount propagation wants.
func nodeMounts(of instance.Instance, node string) error {
	if err := privateMounts(); err != nil {
		return err
	}
	if err := mount("tmpfs", "/var/lib", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV); err != nil {
		return err
	}
	for target, source := range nodeBinds(of, node) {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := mount(source, target, "", syscall.MS_BIND); err != nil {
			return err
		}
	}
	return mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED)
}

func mount(source, target, kind string, flags uintptr) error {
	if err := syscall.Mount(source, target, kind, flags, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}
