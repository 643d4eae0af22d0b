// Package boot starts a cluster, is its first processes, and removes it.
package boot

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"herd.dev/cluster/internal/api"
	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
	"herd.dev/cluster/internal/supervise"
)

// MaxNodes keeps a node's name at two letters, with which sockets' paths are
// reckoned.
const MaxNodes = 9

const (
	nodesDeadline = 90 * time.Second
	dnsDeadline   = 90 * time.Second
)

// Options are what a new cluster is made of.
type Options struct {
	Nodes int
	// Tools returns the folder of a tool's programs.
	Tools func(name string) (string, error)
	// Report is told each step and how long it took.
	Report func(step string, took time.Duration)
}

// Up starts a cluster, or finds it started, and returns once it can be used.
func Up(of instance.Instance, options Options) error {
	if err := checkMachine(); err != nil {
		return err
	}
	programs, err := ensureTools(options)
	if err != nil {
		return err
	}
	lock, err := of.Acquire()
	if err != nil {
		return err
	}
	defer lock.Release()
	state, ok, err := of.LoadState()
	if err != nil {
		return fmt.Errorf("%w: take the cluster down first", err)
	}
	s := stopwatch{options.Report, time.Now()}
	if ok && state.First.Alive() {
		if err := checkSame(of, state, options, programs); err != nil {
			return err
		}
	} else if state, err = start(of, options, programs, &s); err != nil {
		return err
	}
	return awaitUsable(of, state, &s)
}

// checkSame says whether a running cluster is what is asked for.
func checkSame(of instance.Instance, state instance.State, options Options, from programs) error {
	if state.Nodes != options.Nodes {
		return fmt.Errorf("cluster %s runs with %d nodes, not %d: take it down first", of.Name, state.Nodes, options.Nodes)
	}
	if state.Kubernetes != from.kubernetes || state.Containerd != from.containerd {
		return fmt.Errorf("cluster %s runs another build of Kubernetes or containerd: take it down first", of.Name)
	}
	return nil
}

func start(of instance.Instance, options Options, from programs, s *stopwatch) (instance.State, error) {
	// What is left of one that was killed.
	if err := tearDown(of); err != nil {
		return instance.State{}, err
	}
	state, err := prepare(of, options, from)
	if err != nil {
		return state, err
	}
	s.lap("addresses, certificates, images")
	return state, startFirst(of, &state)
}

func awaitUsable(of instance.Instance, state instance.State, s *stopwatch) error {
	client, err := api.New(of, state)
	if err != nil {
		return err
	}
	if err := waitWhileAlive(of, state, apiDeadline, "the API server", client.Ready); err != nil {
		return err
	}
	s.lap("etcd and API server ready")
	if err := applyDNS(of); err != nil {
		return err
	}
	err = waitWhileAlive(of, state, nodesDeadline, "the nodes", func() (bool, error) {
		ready, err := client.ReadyNodes()
		return len(ready) == state.Nodes, err
	})
	if err != nil {
		return err
	}
	s.lap(fmt.Sprintf("%d nodes ready", state.Nodes))
	if err := waitWhileAlive(of, state, dnsDeadline, "the DNS", client.DNSReady); err != nil {
		return err
	}
	s.lap("CoreDNS ready")
	return nil
}

// programs are the folders of the tools that a cluster runs.
type programs struct{ kubernetes, containerd, coreDNS, pause string }

func ensureTools(options Options) (programs, error) {
	var p programs
	for _, tool := range []struct {
		name string
		dir  *string
	}{
		{"pause", &p.pause}, {"containerd", &p.containerd}, {"coredns", &p.coreDNS}, {"kubernetes", &p.kubernetes},
	} {
		var err error
		if *tool.dir, err = options.Tools(tool.name); err != nil {
			return p, err
		}
	}
	return p, nil
}

// prepare takes the cluster's addresses and makes its files.
func prepare(of instance.Instance, options Options, from programs) (instance.State, error) {
	state := instance.State{Nodes: options.Nodes, Kubernetes: from.kubernetes, Containerd: from.containerd}
	var err error
	if state.Network, err = claimNetwork(of); err != nil {
		return state, err
	}
	if err := writeFiles(of, state); err != nil {
		return state, err
	}
	images, err := oci.OpenLayout(of.Images())
	if err != nil {
		return state, err
	}
	for name, dir := range map[string]string{"coredns": from.coreDNS, "pause": from.pause} {
		_, err := images.Add(oci.Image{
			Name:       name + ":1",
			Layers:     []oci.Source{{Path: filepath.Join(dir, name), At: "/" + name}},
			Entrypoint: []string{"/" + name},
		})
		if err != nil {
			return state, err
		}
	}
	return state, nil
}

// claimNetwork makes the uplink and takes the first free addresses. The route
// is the claim: the kernel lets only one process add it.
func claimNetwork(of instance.Instance) (instance.Network, error) {
	if err := host.IP(fmt.Sprintf("link add %s type veth peer name %s", of.Link(), of.LinkPeer())); err != nil {
		return 0, err
	}
	if err := host.IP(fmt.Sprintf("link set %s up", of.Link())); err != nil {
		return 0, err
	}
	preferred := instance.PreferredNetwork(of.Name)
	for n := range instance.Network(instance.Networks) {
		network := (preferred + n) % instance.Networks
		routed, err := host.Routed(network.Block())
		if err != nil {
			return 0, err
		}
		if routed {
			continue
		}
		address := fmt.Sprintf("%s/%d dev %s", network.Host(), instance.UplinkBits, of.Link())
		if err := host.IP("addr add " + address); err != nil {
			return 0, err
		}
		if err := host.IP(fmt.Sprintf("route add %s via %s", network.Block(), network.Uplink())); err == nil {
			return network, nil
		}
		if err := host.IP("addr del " + address); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("cluster %s: each of its %d address ranges in 10.0.0.0/8 is routed elsewhere", of.Name, instance.Networks)
}

// startFirst starts the cluster's first process and records it before it does
// anything.
func startFirst(of instance.Instance, state *instance.State) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	output, err := os.Create(of.Log("first"))
	if err != nil {
		return err
	}
	defer output.Close()
	gate, err := newGate()
	if err != nil {
		return err
	}
	defer gate.close()
	command := exec.Command(self, "first", of.Name)
	command.Stdout, command.Stderr = output, output
	command.ExtraFiles = []*os.File{gate.read}
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true}
	if err := command.Start(); err != nil {
		return fmt.Errorf("first process of %s: %w", of.Name, err)
	}
	if state.First, err = host.FindProcess(command.Process.Pid); err != nil {
		return err
	}
	if err := of.SaveState(*state); err != nil {
		return err
	}
	if err := host.IP(fmt.Sprintf("link set %s netns %d name up0", of.LinkPeer(), state.First.Pid)); err != nil {
		return err
	}
	return gate.open()
}

// waitWhileAlive waits for a condition unless one of the cluster's processes
// ends, which no wait mends.
func waitWhileAlive(of instance.Instance, state instance.State, deadline time.Duration, what string, holds func() (bool, error)) error {
	var last error // the API server may yet refuse or drop a request
	err := host.WaitFor(deadline, what, func() (bool, error) {
		if !state.First.Alive() {
			return false, fmt.Errorf("the first process ended: %s", lastLine(of.Log("first")))
		}
		if ended, log := firstEnded(of, state); ended != "" {
			return false, fmt.Errorf("%s: %s", ended, lastLine(log))
		}
		var ok bool
		ok, last = holds()
		return ok && last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("cluster %s: %w (logs are in %s)", of.Name, errors.Join(err, last), of.Dir)
	}
	return nil
}

// firstEnded describes a process of the cluster that ended, if any did, and
// names its log.
func firstEnded(of instance.Instance, state instance.State) (ended, log string) {
	reports, _ := supervise.Ask(of.Socket(), supervise.Command{Op: "list"})
	for _, report := range reports {
		if report.Ended != "" {
			return report.Name + " ended with " + report.Ended, of.Log(report.Name)
		}
	}
	for _, node := range state.NodeNames() {
		reports, _ := supervise.Ask(of.NodeSocket(node), supervise.Command{Op: "list"})
		for _, report := range reports {
			if report.Ended != "" {
				return report.Name + " of " + node + " ended with " + report.Ended, of.NodeLog(node, report.Name)
			}
		}
	}
	return "", ""
}

func lastLine(log string) string {
	text, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

func applyDNS(of instance.Instance) error {
	kubectl := exec.Command(of.Kubectl(), "apply", "--server-side", "-f", of.Config("coredns.yaml"))
	if out, err := kubectl.CombinedOutput(); err != nil {
		return fmt.Errorf("apply %s: %w: %s", of.Config("coredns.yaml"), err, bytes.TrimSpace(out))
	}
	return nil
}

type stopwatch struct {
	report func(step string, took time.Duration)
	last   time.Time
}

func (s *stopwatch) lap(step string) {
	now := time.Now()
	s.report(step, now.Sub(s.last))
	s.last = now
}
