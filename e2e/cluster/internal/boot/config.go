package boot

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"text/template"

	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
	"herd.dev/cluster/internal/pki"
)

//go:embed files
var files embed.FS

var templates = template.Must(template.ParseFS(files, "files/*"))

// settings is what the templates read.
type settings struct {
	Instance instance.Instance
	Network  instance.Network
	Node     string
	K        int
	// Registry is an address that images are pulled from.
	Registry     string
	PauseImage   string
	CoreDNSImage string
}

func newSettings(of instance.Instance, state instance.State) settings {
	return settings{
		Instance:     of,
		Network:      state.Network,
		PauseImage:   oci.Reference("pause:1"),
		CoreDNSImage: oci.Reference("coredns:1"),
	}
}

// writeFiles makes every file that the cluster's processes read.
func writeFiles(of instance.Instance, state instance.State) error {
	for _, dir := range []string{of.PKI(""), of.Config(""), filepath.Dir(of.Log(""))} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := writeCertificates(of, state); err != nil {
		return fmt.Errorf("certificates of %s: %w", of.Name, err)
	}
	// Nothing beyond the cluster's own names can be resolved.
	if err := os.WriteFile(of.Config("resolv.conf"), []byte("nameserver "+state.Network.DNS()+"\n"), 0o644); err != nil {
		return err
	}
	if err := writeKubectl(of, state); err != nil {
		return err
	}
	values := newSettings(of, state)
	// Neither has TLS. The second is no part of the cluster: it is for images
	// that are pushed, as to a cluster of one's own.
	for host, registry := range map[string]string{
		oci.RegistryName:                state.Network.Registry(),
		state.Network.MachineRegistry(): state.Network.MachineRegistry(),
	} {
		values.Registry = registry
		if err := render("hosts.toml", filepath.Join(of.Config("certs.d"), host, "hosts.toml"), values); err != nil {
			return err
		}
	}
	if err := render("coredns.yaml", of.Config("coredns.yaml"), values); err != nil {
		return err
	}
	for k, node := range state.NodeNames() {
		values.Node, values.K = node, k+1
		if err := writeNodeFiles(values); err != nil {
			return fmt.Errorf("files of node %s: %w", node, err)
		}
	}
	// The cluster's own proxy, for ClusterIPs from the machine, names a node
	// that exists: it would wait for any other.
	values.Node = instance.NodeName(1)
	return render("kube-proxy.yaml", of.Config("kube-proxy.yaml"), values)
}

func writeKubectl(of instance.Instance, state instance.State) error {
	script := fmt.Sprintf("#!/bin/sh\nexport KUBECONFIG='%s' KUBECACHEDIR='%s'\nexec '%s' \"$@\"\n",
		of.Kubeconfig(), filepath.Join(of.Dir, "kubectl-cache"), filepath.Join(state.Kubernetes, "kubectl"))
	return os.WriteFile(of.Kubectl(), []byte(script), 0o755)
}

func writeNodeFiles(values settings) error {
	of, node := values.Instance, values.Node
	for _, dir := range append(nodeFolders(of, node), filepath.Dir(of.NodeLog(node, ""))) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for name, path := range map[string]string{
		"containerd.toml": of.NodeConfig(node, "containerd.toml"),
		"kubelet.yaml":    of.NodeConfig(node, "kubelet.yaml"),
		"kube-proxy.yaml": of.NodeConfig(node, "kube-proxy.yaml"),
		"cni.conflist":    of.NodeConfig(node, "cni/lk.conflist"),
	} {
		if err := render(name, path, values); err != nil {
			return err
		}
	}
	return nil
}

func render(name, path string, values settings) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return templates.ExecuteTemplate(file, name, values)
}

// writeCertificates makes the authorities, every component's certificate and
// the kubeconfigs around them.
func writeCertificates(of instance.Instance, state instance.State) error {
	authority, err := pki.NewAuthority("lk-" + of.Name)
	if err != nil {
		return err
	}
	frontProxy, err := pki.NewAuthority("lk-" + of.Name + "-front-proxy")
	if err != nil {
		return err
	}
	private, public, err := pki.NewKeyPair()
	if err != nil {
		return err
	}
	for path, content := range map[string][]byte{
		"ca.crt":              authority.Cert,
		"front-proxy-ca.crt":  frontProxy.Cert,
		"service-account.key": private,
		"service-account.pub": public,
	} {
		if err := os.WriteFile(of.PKI(path), content, 0o600); err != nil {
			return err
		}
	}
	network := state.Network
	for file, issue := range map[string]struct {
		by      *pki.Authority
		subject pki.Subject
	}{
		"apiserver": {authority, pki.Subject{Name: "kube-apiserver", Hosts: []string{
			network.Gateway(), network.KubernetesService(), "127.0.0.1",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		}}},
		"apiserver-kubelet-client": {authority, pki.Subject{Name: "kube-apiserver-kubelet-client", Group: "system:masters"}},
		"admin":                    {authority, pki.Subject{Name: "admin", Group: "system:masters"}},
		"front-proxy-client":       {frontProxy, pki.Subject{Name: "front-proxy-client"}},
	} {
		pair, err := issue.by.Issue(issue.subject)
		if err != nil {
			return err
		}
		if err := pair.Write(of.PKI(file)); err != nil {
			return err
		}
	}
	users := map[string]pki.Subject{
		of.Kubeconfig(): {Name: "admin", Group: "system:masters"},
		of.Config("kube-controller-manager.conf"): {Name: "system:kube-controller-manager"},
		of.Config("kube-scheduler.conf"):          {Name: "system:kube-scheduler"},
		of.Config("kube-proxy.conf"):              {Name: "system:kube-proxy"},
	}
	for _, node := range state.NodeNames() {
		users[of.NodeConfig(node, "kubelet.conf")] = pki.Subject{Name: "system:node:" + node, Group: "system:nodes"}
	}
	for path, subject := range users {
		pair, err := authority.Issue(subject)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		text := pki.Kubeconfig("lk-"+of.Name, network.APIServer(), authority.Cert, pair)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
