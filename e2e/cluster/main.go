// Command herd-cluster builds and runs real Kubernetes clusters on one Linux
// machine, without a container engine.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
)

const usage = `usage: herd-cluster COMMAND [flags] [arguments]

  up                     start a cluster
  down                   remove a cluster and all it owns
  status                 list the clusters, their processes and nodes
  in NODE -- COMMAND     run a command in a node, or in "cluster": beside the nodes
  start NODE PROCESS     start a process of a node or of the cluster that ended
  signal NODE PROCESS N  send signal N to one
  build [TOOL...]        build tools where they are not cached, and print their folders
  image load LAYOUT      give a running cluster the images of an OCI layout folder
`

// errUsage is that the command line is wrong; what is wrong was printed.
var errUsage = errors.New("usage")

type command func(name string, args []string) error

var commands = map[string]command{
	"up":         runUp,
	"down":       runDown,
	"status":     runStatus,
	"in":         runIn,
	"start":      runStart,
	"signal":     runSignal,
	"build":      runBuild,
	"image load": runImageLoad,
	// What a cluster's own first processes run.
	"first": runFirst,
	"node":  runNode,
}

func main() {
	err := dispatch(os.Args[1:])
	switch {
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "herd-cluster:", err)
		os.Exit(1)
	}
}

func dispatch(args []string) error {
	for words := 1; words <= min(2, len(args)); words++ {
		name := strings.Join(args[:words], " ")
		if run, ok := commands[name]; ok {
			return run(name, args[words:])
		}
	}
	fmt.Fprint(os.Stderr, usage)
	return errUsage
}

// parse reads flags and then exactly the positional arguments that are named,
// or any number if the last one ends in "...".
func parse(flags *flag.FlagSet, args []string, positional ...string) error {
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: herd-cluster %s [flags] %s\n", flags.Name(), strings.Join(positional, " "))
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return errUsage
	}
	least, most := len(positional), len(positional)
	if least > 0 && strings.HasSuffix(positional[least-1], "...") {
		least, most = least-1, flags.NArg()
	}
	if flags.NArg() < least || flags.NArg() > most {
		flags.Usage()
		return errUsage
	}
	return nil
}

func newFlags(name string) *flag.FlagSet { return flag.NewFlagSet(name, flag.ContinueOnError) }

func nameFlag(flags *flag.FlagSet) *string {
	return flags.String("name", "herd", "name of the cluster")
}
