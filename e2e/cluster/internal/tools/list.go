// Package tools builds the programs a cluster runs and its users call, once
// for each content of their sources.
package tools

import (
	"fmt"
	"strings"
)

const kubernetesVersion = "1.37.2"

// Tool is a module below the tools folder and the commands built from it.
type Tool struct {
	Name     string
	packages []string
	ldflags  string
	tags     string
	// links are further names of the program of the tool's own name.
	links []string
}

var all = []Tool{
	{
		Name:     "kubernetes",
		packages: []string{"."},
		links:    []string{"kubectl"},
		ldflags: "-X k8s.io/component-base/version.gitVersion=v" + kubernetesVersion +
			" -X k8s.io/component-base/version.gitMajor=1" +
			" -X k8s.io/component-base/version.gitMinor=" + strings.Split(kubernetesVersion, ".")[1],
	},
	{
		Name: "containerd",
		packages: []string{
			"github.com/containerd/containerd/v2/cmd/containerd",
			"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
			"github.com/containerd/containerd/v2/cmd/ctr",
		},
	},
	{Name: "coredns", packages: []string{"."}},
	{Name: "pause", packages: []string{"."}},
	{Name: "helm", packages: []string{"helm.sh/helm/v3/cmd/helm"}},
	{
		Name:     "prometheus",
		packages: []string{"github.com/prometheus/prometheus/cmd/prometheus"},
		// Of all service discoveries Kubernetes' alone; without the web pages, which are no part of the module.
		tags: "remove_all_sd,enable_kubernetes_sd",
	},
	{Name: "registry", packages: []string{"."}},
	{Name: "grpcurl", packages: []string{"github.com/fullstorydev/grpcurl/cmd/grpcurl"}},
}

func find(name string) (Tool, error) {
	var names []string
	for _, tool := range all {
		if tool.Name == name {
			return tool, nil
		}
		names = append(names, tool.Name)
	}
	return Tool{}, fmt.Errorf("no tool %q; there are %s", name, strings.Join(names, ", "))
}
