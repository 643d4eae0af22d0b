package instance

import (
	"fmt"
	"hash/fnv"
)

// Networks is how many instances have addresses of their own.
const Networks = 100

// Network is the address plan of an instance: 10.(100+n).0.0/16.
type Network int

// PreferredNetwork is where the search for a free network begins: the same
// name has the same addresses unless another instance took them first.
func PreferredNetwork(name string) Network {
	sum := fnv.New32a()
	sum.Write([]byte(name))
	return Network(sum.Sum32() % Networks)
}

func (n Network) addr(third, fourth int) string {
	return fmt.Sprintf("10.%d.%d.%d", 100+int(n), third, fourth)
}

// Block is everything the instance uses.
func (n Network) Block() string { return n.addr(0, 0) + "/16" }

// Gateway is the cluster's address on the bridge: API server and registry.
func (n Network) Gateway() string { return n.addr(0, 1) }

// Node is the address of node k, from 1.
func (n Network) Node(k int) string { return n.addr(0, 10+k) }

// Host is the machine's address on the uplink: what pods reach it by.
func (n Network) Host() string { return n.addr(1, 1) }

// Uplink is the cluster's address on the uplink.
func (n Network) Uplink() string { return n.addr(1, 2) }

// UplinkBits is the prefix length of the uplink's subnet.
const UplinkBits = 30

// Pods is where all pods are.
func (n Network) Pods() string { return n.addr(64, 0) + "/18" }

// NodePods is where the pods of node k are.
func (n Network) NodePods(k int) string { return n.addr(64+k, 0) + "/24" }

// Services is where ClusterIPs are.
func (n Network) Services() string { return n.addr(128, 0) + "/20" }

// KubernetesService is the ClusterIP of the API server.
func (n Network) KubernetesService() string { return n.addr(128, 1) }

// DNS is the ClusterIP of the cluster's DNS.
func (n Network) DNS() string { return n.addr(128, 10) }

// APIServer is the API server's URL for everyone.
func (n Network) APIServer() string { return fmt.Sprintf("https://%s:6443", n.Gateway()) }

// Registry is the image registry's address.
func (n Network) Registry() string { return n.Gateway() + ":5000" }

// MachineRegistry is where a registry that runs on the machine, beside the
// cluster, is looked for.
func (n Network) MachineRegistry() string { return n.Host() + ":5000" }
