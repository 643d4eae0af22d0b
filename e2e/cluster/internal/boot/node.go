package boot

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/supervise"
)

const containerdDeadline = 60 * time.Second

// startNode runs in the cluster's first process: it starts node k in
// namespaces of its own and plugs it into the bridge.
func startNode(table *supervise.Table, of instance.Instance, k int) (*supervise.Child, error) {
	node := instance.NodeName(k)
	if err := freshCgroups(of, node); err != nil {
		return nil, err
	}
	output, err := os.OpenFile(of.Log(node), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	gate, err := newGate()
	if err != nil {
		return nil, err
	}
	defer gate.close()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	argv := []string{self, "node", of.Name, node}
	child, err := table.Fork(argv, output, &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true}, gate.read)
	if err != nil {
		return nil, err
	}
	// The link of an earlier run goes with its namespace, but not at once: it
	// may do so before it is removed here.
	if host.LinkExists(node) {
		if err := table.Run(ip("link del %s", node)...); err != nil && host.LinkExists(node) {
			return nil, err
		}
	}
	for _, argv := range [][]string{
		ip("link add %s type veth peer name eth0 netns %d", node, child.Pid),
		ip("link set %s master br0 up", node),
	} {
		if err := table.Run(argv...); err != nil {
			return nil, err
		}
	}
	return child, gate.open()
}

// freshCgroups clears what an earlier run of the node left, as a machine's
// restart would: a kubelet takes seconds over each container that is gone.
func freshCgroups(of instance.Instance, node string) error {
	left := of.Cgroup() + "/" + node
	if err := host.ThawCgroups(left); err != nil {
		return err
	}
	if err := host.RemoveCgroups(left, cgroupDeadline); err != nil {
		return err
	}
	return host.MakeCgroups(of.Cgroup(), []string{node})
}

// Node is the first process of a node.
func Node(of instance.Instance, node string) error {
	if err := awaitGate(); err != nil {
		return err
	}
	state, err := of.MustState()
	if err != nil {
		return err
	}
	k := state.NodeNumber(node)
	if err := syscall.Sethostname([]byte(node)); err != nil {
		return fmt.Errorf("host name of %s: %w", node, err)
	}
	if err := nodeMounts(of, node); err != nil {
		return err
	}
	os.Setenv("PATH", state.Path())
	table := supervise.NewTable()
	if err := nodeNetwork(table, state, k); err != nil {
		return err
	}
	for _, p := range nodePrograms(of, state, k) {
		table.DefineProgram(p.name, p.log, p.argv...)
	}
	if err := table.Serve(of.NodeSocket(node)); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if err := table.Start(containerd); err != nil {
		return err
	}
	if err := table.Start(proxy); err != nil {
		return err
	}
	// A kubelet that finds no containerd ends.
	err = host.WaitFor(containerdDeadline, "containerd to answer", func() (bool, error) {
		conn, err := net.Dial("unix", "/run/containerd/containerd.sock")
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
	if err != nil {
		return err
	}
	if err := table.Start(kubelet); err != nil {
		return err
	}
	select {}
}

func nodeNetwork(table *supervise.Table, state instance.State, k int) error {
	commands := [][]string{
		ip("link set lo up"),
		ip("addr add %s/24 dev eth0", state.Network.Node(k)),
		ip("link set eth0 up"),
		ip("route add default via %s", state.Network.Gateway()),
	}
	for other := 1; other <= state.Nodes; other++ {
		if other != k {
			commands = append(commands, ip("route add %s via %s", state.Network.NodePods(other), state.Network.Node(other)))
		}
	}
	for _, argv := range commands {
		if err := table.Run(argv...); err != nil {
			return err
		}
	}
	return forwardPackets()
}
