package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"herd.dev/cluster/internal/api"
	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/supervise"
)

// besideNodes is where the control plane runs, in the place of a node's name.
const besideNodes = "cluster"

func runStatus(name string, args []string) error {
	flags := newFlags(name)
	only := flags.String("name", "", "name of the cluster (default all)")
	if err := parse(flags, args); err != nil {
		return err
	}
	names := []string{*only}
	if *only == "" {
		root, err := instance.Root()
		if err != nil {
			return err
		}
		entries, err := os.ReadDir(root)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		names = nil
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
	}
	for _, cluster := range names {
		of, err := instance.Find(cluster)
		if err != nil {
			return err
		}
		if err := printStatus(of); err != nil {
			return err
		}
	}
	return nil
}

func printStatus(of instance.Instance) error {
	state, ok, err := of.LoadState()
	if err != nil {
		fmt.Printf("%s: %v\n", of.Name, err)
		return nil
	}
	if !ok || !state.First.Alive() {
		fmt.Printf("%s: not running\n", of.Name)
		return nil
	}
	fmt.Printf("%s: process %d, addresses %s, kubeconfig %s\n", of.Name, state.First.Pid, state.Network.Block(), of.Kubeconfig())
	client, err := api.New(of, state)
	if err != nil {
		return err
	}
	ready, err := client.ReadyNodes()
	if err != nil {
		fmt.Printf("  API server: %v\n", err)
	}
	printProcesses(besideNodes, "", of.Socket())
	for _, node := range state.NodeNames() {
		condition := " (not ready)"
		if slices.Contains(ready, node) {
			condition = " (ready)"
		}
		printProcesses(node, condition, of.NodeSocket(node))
	}
	return nil
}

func printProcesses(where, condition, socket string) {
	reports, err := supervise.Ask(socket, supervise.Command{Op: "list"})
	if err != nil {
		fmt.Printf("  %s%s: %v\n", where, condition, err)
		return
	}
	var words []string
	for _, report := range reports {
		word := report.Name
		if !report.Running {
			word += " (not running)"
		}
		if report.Ended != "" {
			word = report.Name + " (" + report.Ended + ")"
		}
		words = append(words, word)
	}
	fmt.Printf("  %s%s: %s\n", where, condition, strings.Join(words, ", "))
}

func runIn(name string, args []string) error {
	flags := newFlags(name)
	cluster := nameFlag(flags)
	if err := parse(flags, args, "NODE", "--", "COMMAND..."); err != nil {
		return err
	}
	of, err := instance.Find(*cluster)
	if err != nil {
		return err
	}
	state, err := of.Running()
	if err != nil {
		return err
	}
	pid, err := firstProcess(state, flags.Arg(0))
	if err != nil {
		return err
	}
	argv := []string{"nsenter", "-t", strconv.Itoa(pid), "-m", "-u", "-i", "-n", "-p"}
	argv = append(argv, flags.Args()[1:]...)
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	os.Setenv("PATH", state.Path())
	return syscall.Exec(path, argv, os.Environ())
}

// firstProcess is the number, on the machine, of the first process of a node.
func firstProcess(state instance.State, where string) (int, error) {
	if where == besideNodes {
		return state.First.Pid, nil
	}
	if state.NodeNumber(where) == 0 {
		return 0, fmt.Errorf("no node %q; there are %s, %s", where, besideNodes, strings.Join(state.NodeNames(), ", "))
	}
	nested, err := host.NestedIn(state.First.Pid)
	if err != nil {
		return 0, err
	}
	for _, process := range nested {
		if process.Args[len(process.Args)-1] == where {
			return process.Pid, nil
		}
	}
	return 0, fmt.Errorf("node %s is not running", where)
}

func runStart(name string, args []string) error {
	flags := newFlags(name)
	cluster := nameFlag(flags)
	if err := parse(flags, args, "NODE", "PROCESS"); err != nil {
		return err
	}
	return ask(*cluster, flags.Arg(0), supervise.Command{Op: "start", Name: flags.Arg(1)})
}

func runSignal(name string, args []string) error {
	flags := newFlags(name)
	cluster := nameFlag(flags)
	if err := parse(flags, args, "NODE", "PROCESS", "N"); err != nil {
		return err
	}
	number, err := strconv.Atoi(flags.Arg(2))
	if err != nil {
		return fmt.Errorf("signal %q: want a number", flags.Arg(2))
	}
	return ask(*cluster, flags.Arg(0), supervise.Command{Op: "signal", Name: flags.Arg(1), Signal: syscall.Signal(number)})
}

func ask(cluster, where string, command supervise.Command) error {
	of, err := instance.Find(cluster)
	if err != nil {
		return err
	}
	state, err := of.Running()
	if err != nil {
		return err
	}
	socket := of.Socket()
	if where != besideNodes {
		if state.NodeNumber(where) == 0 {
			return fmt.Errorf("no node %q; there are %s, %s", where, besideNodes, strings.Join(state.NodeNames(), ", "))
		}
		socket = of.NodeSocket(where)
	}
	if _, err := supervise.Ask(socket, command); err != nil {
		return fmt.Errorf("%s of %s: %w", where, cluster, err)
	}
	return nil
}
