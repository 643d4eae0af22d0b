package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"herd.dev/cluster/internal/boot"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/tools"
)

func runUp(name string, args []string) error {
	flags := newFlags(name)
	cluster, sources := nameFlag(flags), sourcesFlag(flags)
	nodes := flags.Int("nodes", 2, "number of nodes")
	if err := parse(flags, args); err != nil {
		return err
	}
	if *nodes < 1 || *nodes > boot.MaxNodes {
		return fmt.Errorf("%d nodes: want 1 to %d", *nodes, boot.MaxNodes)
	}
	of, err := instance.Find(*cluster)
	if err != nil {
		return err
	}
	builder, err := newBuilder(*sources)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := boot.Up(of, boot.Options{Nodes: *nodes, Tools: builder.Ensure, Report: printStep}); err != nil {
		return err
	}
	fmt.Printf("cluster %s is up after %.1fs\n", of.Name, time.Since(began).Seconds())
	fmt.Printf("  kubectl     %s\n", of.Kubectl())
	fmt.Printf("  kubeconfig  %s\n", of.Kubeconfig())
	return nil
}

func runDown(name string, args []string) error {
	flags := newFlags(name)
	cluster := nameFlag(flags)
	if err := parse(flags, args); err != nil {
		return err
	}
	of, err := instance.Find(*cluster)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := boot.Down(of, func(what string) { fmt.Println(what) }); err != nil {
		return err
	}
	fmt.Printf("cluster %s is gone after %.1fs\n", of.Name, time.Since(began).Seconds())
	return nil
}

func runBuild(name string, args []string) error {
	flags := newFlags(name)
	sources := sourcesFlag(flags)
	cached := flags.Bool("cached", false, "build nothing, and print the folders of those that are built")
	if err := parse(flags, args, "TOOL..."); err != nil {
		return err
	}
	builder, err := newBuilder(*sources)
	if err != nil {
		return err
	}
	for _, tool := range flags.Args() {
		if *cached {
			dir, built, err := builder.Built(tool)
			if err != nil {
				return err
			}
			if built {
				fmt.Println(dir)
			}
			continue
		}
		dir, err := builder.Ensure(tool)
		if err != nil {
			return err
		}
		fmt.Println(dir)
	}
	return nil
}

// runFirst and runNode are how the program starts itself inside a cluster.
func runFirst(name string, args []string) error {
	flags := newFlags(name)
	if err := parse(flags, args, "NAME"); err != nil {
		return err
	}
	of, err := instance.Find(flags.Arg(0))
	if err != nil {
		return err
	}
	return boot.First(of)
}

func runNode(name string, args []string) error {
	flags := newFlags(name)
	if err := parse(flags, args, "NAME", "NODE"); err != nil {
		return err
	}
	of, err := instance.Find(flags.Arg(0))
	if err != nil {
		return err
	}
	return boot.Node(of, flags.Arg(1))
}

func sourcesFlag(flags *flag.FlagSet) *string {
	return flags.String("sources", "tools", "folder of the tools' sources")
}

func newBuilder(sources string) (tools.Builder, error) {
	cache, err := instance.Cache()
	if err != nil {
		return tools.Builder{}, err
	}
	absolute, err := filepath.Abs(sources)
	if err != nil {
		return tools.Builder{}, err
	}
	return tools.Builder{
		Sources: absolute,
		Cache:   filepath.Join(cache, "tools"),
		Report: func(name, how string, took time.Duration) {
			printStep(name+": "+how, took)
		},
	}, nil
}

func printStep(step string, took time.Duration) {
	fmt.Fprintf(os.Stderr, "  %-40s %6.1fs\n", step, took.Seconds())
}
