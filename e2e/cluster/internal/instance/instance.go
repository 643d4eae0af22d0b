// Package instance names what one cluster owns on the machine. Everything is
// derived from the cluster's name, so that a later process finds and removes
// it whatever became of the process that made it.
package instance

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A network interface is named lk-NAME and has at most 15 characters.
var validName = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,10}[a-z0-9])?$`)

// maxSocketPath is the longest path a Unix socket can be bound to.
const maxSocketPath = 107

// hiddenByNodes are the folders over which a node mounts its own.
var hiddenByNodes = []string{"/run", "/var/run", "/var/lib", "/var/log", "/proc", "/sys"}

// Instance is one cluster, running or not.
type Instance struct {
	Name string
	// Dir holds all its files and is removed with it.
	Dir string
}

// Find returns the instance of a name, whether it exists or not.
func Find(name string) (Instance, error) {
	if !validName.MatchString(name) {
		return Instance{}, fmt.Errorf("cluster name %q: want 1 to 12 of a-z, 0-9 and -, a letter first, no - last", name)
	}
	root, err := Root()
	if err != nil {
		return Instance{}, err
	}
	found := Instance{Name: name, Dir: filepath.Join(root, name)}
	for _, hidden := range hiddenByNodes {
		if strings.HasPrefix(found.Dir, hidden+"/") {
			return Instance{}, fmt.Errorf("cluster folder %s: %s is another one inside a node; set XDG_CACHE_HOME", found.Dir, hidden)
		}
	}
	if longest := found.NodeSocket("n9"); len(longest) > maxSocketPath {
		return Instance{}, fmt.Errorf("cluster folder %s: too long for the sockets in it; set XDG_CACHE_HOME", found.Dir)
	}
	return found, nil
}

// Root is the folder of all instances.
func Root() (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "clusters"), nil
}

// Cache is the folder of everything Herd's developer tools keep outside a
// clone.
func Cache() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache folder: %w", err)
	}
	return filepath.Join(cache, "herd"), nil
}

// Link is the machine's end of the cluster's uplink.
func (i Instance) Link() string { return "lk-" + i.Name }

// LinkPeer is the uplink's other end until it is moved into the cluster.
func (i Instance) LinkPeer() string { return "lp-" + i.Name }

// Cgroup is the cgroup of all its pods, in every hierarchy.
func (i Instance) Cgroup() string { return "lk-" + i.Name }

// Kubeconfig is an administrator's.
func (i Instance) Kubeconfig() string { return filepath.Join(i.Dir, "kubeconfig") }

// Kubectl is kubectl for this cluster, its cache of what the cluster serves in
// the instance's folder.
func (i Instance) Kubectl() string { return filepath.Join(i.Dir, "kubectl") }

// Images is the OCI layout that the nodes pull from.
func (i Instance) Images() string { return filepath.Join(i.Dir, "images") }

// PKI holds keys and certificates.
func (i Instance) PKI(file string) string { return filepath.Join(i.Dir, "pki", file) }

// Config holds the components' configuration files.
func (i Instance) Config(file string) string { return filepath.Join(i.Dir, "config", file) }

// Log is the output of a component beside the nodes.
func (i Instance) Log(component string) string {
	return filepath.Join(i.Dir, "logs", component+".log")
}

// Socket is where the first process is commanded.
func (i Instance) Socket() string { return filepath.Join(i.Dir, "control.sock") }

// NodeDir holds the files of one node.
func (i Instance) NodeDir(node string) string { return filepath.Join(i.Dir, "nodes", node) }

// NodeConfig holds the configuration files of one node.
func (i Instance) NodeConfig(node, file string) string {
	return filepath.Join(i.NodeDir(node), "config", file)
}

// NodeLog is the output of a component on a node.
func (i Instance) NodeLog(node, component string) string {
	return filepath.Join(i.NodeDir(node), "logs", component+".log")
}

// NodeSocket is where a node's first process is commanded.
func (i Instance) NodeSocket(node string) string {
	return filepath.Join(i.NodeDir(node), "control.sock")
}
