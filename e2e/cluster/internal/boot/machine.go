package boot

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// needs are what a cluster uses of the machine, with the Debian package each
// is in.
var needs = []struct{ program, debian string }{
	{"runc", "runc"},
	{"/usr/lib/cni/ptp", "containernetworking-plugins"},
	{"/usr/lib/cni/portmap", "containernetworking-plugins"},
	{"/usr/lib/cni/host-local", "containernetworking-plugins"},
	{"iptables", "iptables"},
	{"conntrack", "conntrack"},
	{"ip", "iproute2"},
	{"nsenter", "util-linux"},
}

func checkRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster is made of namespaces, links and cgroups: run this as root")
	}
	return nil
}

// checkMachine names all that is missing at once.
func checkMachine() error {
	if err := checkRoot(); err != nil {
		return err
	}
	var missing, packages []string
	for _, need := range needs {
		if _, err := exec.LookPath(need.program); err == nil {
			continue
		}
		missing = append(missing, need.program)
		if !slices.Contains(packages, need.debian) {
			packages = append(packages, need.debian)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("missing %s: apt-get install --no-install-recommends %s",
		strings.Join(missing, ", "), strings.Join(packages, " "))
}
