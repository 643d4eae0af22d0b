package main

import (
	"fmt"

	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
)

func runImageLoad(name string, args []string) error {
	flags := newFlags(name)
	cluster := nameFlag(flags)
	if err := parse(flags, args, "LAYOUT"); err != nil {
		return err
	}
	of, err := instance.Find(*cluster)
	if err != nil {
		return err
	}
	if _, err := of.Running(); err != nil {
		return err
	}
	source, err := oci.ExistingLayout(flags.Arg(0))
	if err != nil {
		return err
	}
	target, err := oci.OpenLayout(of.Images())
	if err != nil {
		return err
	}
	references, err := target.CopyFrom(source)
	if err != nil {
		return err
	}
	for _, reference := range references {
		fmt.Println(reference)
	}
	return nil
}
