package boot

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"herd.dev/cluster/internal/api"
	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
	"herd.dev/cluster/internal/supervise"
)

// apiDeadline is how long the API server may take to answer.
const apiDeadline = 90 * time.Second

// First is the cluster's first process. It makes the cluster's network, then
// starts and reaps everything else.
func First(of instance.Instance) error {
	if err := awaitGate(); err != nil {
		return err
	}
	state, err := of.MustState()
	if err != nil {
		return err
	}
	if err := privateMounts(); err != nil {
		return err
	}
	os.Setenv("PATH", state.Path())
	table := supervise.NewTable()
	if err := clusterNetwork(table, state.Network); err != nil {
		return err
	}
	registry, err := net.Listen("tcp", state.Network.Registry())
	if err != nil {
		return fmt.Errorf("image registry: %w", err)
	}
	go http.Serve(registry, oci.NewRegistry(of.Images()))

	for _, p := range controlPlane(of, state) {
		table.DefineProgram(p.name, p.log, p.argv...)
	}
	for k, node := range state.NodeNames() {
		table.Define(node, func() (*supervise.Child, error) { return startNode(table, of, k+1) })
		if err := table.Run(ip("route add %s via %s", state.Network.NodePods(k+1), state.Network.Node(k+1))...); err != nil {
			return err
		}
	}
	if err := table.Serve(of.Socket()); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	early := []string{etcd, apiServer}
	late := []string{controllerManager, scheduler, proxy}
	for _, name := range append(early, state.NodeNames()...) {
		if err := table.Start(name); err != nil {
			return err
		}
	}
	client, err := api.New(of, state)
	if err != nil {
		return err
	}
	err = host.WaitFor(apiDeadline, "the API server to be ready", func() (bool, error) {
		ready, _ := client.Ready() // it refuses connections at first
		return ready, nil
	})
	if err != nil {
		return err
	}
	for _, name := range late {
		if err := table.Start(name); err != nil {
			return err
		}
	}
	select {}
}

// clusterNetwork sets up the bridge of the nodes and the uplink to the
// machine. The uplink is no port of the bridge: the proxy's rules would drop
// packets of connections they see half of.
func clusterNetwork(table *supervise.Table, network instance.Network) error {
	for _, argv := range [][]string{
		ip("link set lo up"),
		ip("link add br0 type bridge"),
		ip("addr add %s/24 dev br0", network.Gateway()),
		ip("link set br0 up"),
		ip("addr add %s/%d dev up0", network.Uplink(), instance.UplinkBits),
		ip("link set up0 up"),
	} {
		if err := table.Run(argv...); err != nil {
			return err
		}
	}
	return forwardPackets()
}

func forwardPackets() error {
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

func ip(format string, values ...any) []string {
	return append([]string{"ip"}, strings.Fields(fmt.Sprintf(format, values...))...)
}
