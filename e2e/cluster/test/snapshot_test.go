package test

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
)

// snapshot is everything a cluster could leave behind, a sorted list by kind.
type snapshot map[string][]string

// placesOutside are folders that the cluster's programs would write to if
// they were not kept from it.
var placesOutside = []string{
	"/opt", "/etc/cni", "/etc/containerd", "/etc/cdi", "/etc/kubernetes", "/etc/nri",
	"/run/cni-ipam", "/run/containerd", "/run/netns", "/run/nri", "/run/runc",
	"/var/lib/cni", "/var/lib/containerd", "/var/lib/etcd", "/var/lib/kubelet",
	"/var/log/containers", "/var/log/pods", "/usr/libexec/kubernetes",
}

func takeSnapshot(t *testing.T, clusters ...string) snapshot {
	t.Helper()
	taken := snapshot{
		"links":     output(t, "ip", "-o", "link"),
		"addresses": output(t, "ip", "-o", "addr"),
		"routes":    output(t, "ip", "route", "show", "table", "all"),
		"iptables":  output(t, "iptables-save"),
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	taken["mounts"] = strings.Split(string(mounts), "\n")
	taken["processes"], taken["network namespaces"] = processes(t)
	taken["cgroups"] = cgroups(t, clusters)
	taken["folders"] = folders(t, clusters)
	for _, list := range taken {
		slices.Sort(list)
	}
	return taken
}

// requireSame fails unless the machine is as it was. Processes killed by the
// test itself may take a moment to end.
func requireSame(t *testing.T, before snapshot, clusters ...string) {
	t.Helper()
	var after snapshot
	err := host.WaitFor(2*time.Second, "nothing to be left", func() (bool, error) {
		after = takeSnapshot(t, clusters...)
		return maps.EqualFunc(before, after, slices.Equal), nil
	})
	if err == nil {
		return
	}
	for kind := range after {
		for _, line := range after[kind] {
			if !slices.Contains(before[kind], line) {
				t.Errorf("%s: left behind: %s", kind, line)
			}
		}
		for _, line := range before[kind] {
			if !slices.Contains(after[kind], line) {
				t.Errorf("%s: gone: %s", kind, line)
			}
		}
	}
	t.Fatal(err)
}

func output(t *testing.T, name string, args ...string) []string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return strings.Split(string(out), "\n")
}

// processes lists those that run, and the network namespaces they are in.
func processes(t *testing.T) (running, networks []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		network, err := os.Readlink(filepath.Join(dir, "ns", "net"))
		if err != nil {
			continue // it has ended, or is a zombie
		}
		command, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(command) == 0 {
			continue
		}
		running = append(running, filepath.Base(dir)+" "+strings.ReplaceAll(string(command), "\x00", " "))
		if !slices.Contains(networks, network) {
			networks = append(networks, network)
		}
	}
	return running, networks
}

// cgroups lists those below the clusters' names in every hierarchy.
func cgroups(t *testing.T, clusters []string) []string {
	t.Helper()
	var found []string
	for _, name := range clusters {
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			matches, err := filepath.Glob(pattern + "lk-" + name)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, matches...)
		}
	}
	return found
}

func folders(t *testing.T, clusters []string) []string {
	t.Helper()
	var found []string
	for _, name := range clusters {
		of, err := instance.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(of.Dir); err == nil {
			found = append(found, of.Dir)
		}
	}
	for _, place := range placesOutside {
		err := filepath.WalkDir(place, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("list %s: %v", place, err)
		}
	}
	return found
}
