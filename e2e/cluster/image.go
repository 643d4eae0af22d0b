package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
)

// repeated is a flag given any number of times.
type repeated []string

func (r *repeated) String() string { return strings.Join(*r, " ") }

func (r *repeated) Set(value string) error {
	*r = append(*r, value)
	return nil
}

func runImageBuild(name string, args []string) error {
	var layers, entrypoint, env, annotations repeated
	flags := newFlags(name)
	layout := flags.String("layout", "", "OCI layout folder the image goes to")
	user := flags.String("user", "", "user and group numbers of the process")
	flags.Var(&layers, "layer", "DIR, FILE.tar or PATH=/WHERE (repeat)")
	flags.Var(&entrypoint, "entrypoint", "a word of the command (repeat)")
	flags.Var(&env, "env", "NAME=VALUE (repeat)")
	flags.Var(&annotations, "annotation", "NAME=VALUE of the manifest (repeat)")
	if err := parse(flags, args, "NAME:TAG"); err != nil {
		return err
	}
	image := oci.Image{
		Name: flags.Arg(0), Entrypoint: entrypoint, Env: env, User: *user,
		Annotations: map[string]string{},
	}
	for _, text := range layers {
		source, err := oci.ParseSource(text)
		if err != nil {
			return err
		}
		image.Layers = append(image.Layers, source)
	}
	for _, text := range annotations {
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			return fmt.Errorf("annotation %q: want NAME=VALUE", text)
		}
		image.Annotations[key] = value
	}
	if *layout == "" {
		return fmt.Errorf("image %s: no --layout", image.Name)
	}
	into, err := oci.OpenLayout(*layout)
	if err != nil {
		return err
	}
	reference, err := into.Add(image)
	if err != nil {
		return err
	}
	fmt.Println(reference)
	return nil
}

func runImageBase(name string, args []string) error {
	if err := parse(newFlags(name), args); err != nil {
		return err
	}
	cache, err := instance.Cache()
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, "tools")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	layer, err := oci.BaseLayer(dir)
	if err != nil {
		return err
	}
	fmt.Println(layer)
	return nil
}

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
