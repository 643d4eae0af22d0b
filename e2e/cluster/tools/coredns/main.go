// Command coredns is CoreDNS with the plugins a cluster's DNS needs and no
// others: the whole list takes three times as long to build.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

func main() {
	// In the order a query passes them.
	dnsserver.Directives = []string{"health", "ready", "errors", "loadbalance", "kubernetes", "template"}
	coremain.Run()
}
