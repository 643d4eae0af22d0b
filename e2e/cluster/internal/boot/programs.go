package boot

import (
	"fmt"

	"herd.dev/cluster/internal/instance"
)

const (
	etcd              = "etcd"
	apiServer         = "kube-apiserver"
	controllerManager = "kube-controller-manager"
	scheduler         = "kube-scheduler"
	proxy             = "kube-proxy"
	kubelet           = "kubelet"
	containerd        = "containerd"
)

// gpusPerNode are devices that are names only, of a real device plugin.
const gpusPerNode = 2

const etcdURL = "http://127.0.0.1:2379"

// controlPlane are the programs beside the nodes, in the order of their start.
func controlPlane(of instance.Instance, state instance.State) []program {
	network := state.Network
	named := func(name string, flags ...string) program {
		return program{name, of.Log(name), append([]string{"kubernetes", name}, flags...)}
	}
	return []program{
		named(etcd, "--data-dir="+of.Dir+"/etcd", "--listen-client-url="+etcdURL),
		named(apiServer,
			"--etcd-servers="+etcdURL,
			"--bind-address=0.0.0.0",
			"--advertise-address="+network.Gateway(),
			"--service-cluster-ip-range="+network.Services(),
			"--tls-cert-file="+of.PKI("apiserver.crt"),
			"--tls-private-key-file="+of.PKI("apiserver.key"),
			"--client-ca-file="+of.PKI("ca.crt"),
			"--service-account-key-file="+of.PKI("service-account.pub"),
			"--service-account-signing-key-file="+of.PKI("service-account.key"),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction",
			"--allow-privileged=true",
			"--kubelet-client-certificate="+of.PKI("apiserver-kubelet-client.crt"),
			"--kubelet-client-key="+of.PKI("apiserver-kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP",
			"--requestheader-client-ca-file="+of.PKI("front-proxy-ca.crt"),
			"--requestheader-allowed-names=front-proxy-client",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--requestheader-group-headers=X-Remote-Group",
			"--requestheader-username-headers=X-Remote-User",
			"--proxy-client-cert-file="+of.PKI("front-proxy-client.crt"),
			"--proxy-client-key-file="+of.PKI("front-proxy-client.key"),
			"--enable-aggregator-routing=true",
			"--runtime-config=api/beta=true",
			"--feature-gates=GenericWorkload=true",
		),
		named(controllerManager,
			"--kubeconfig="+of.Config("kube-controller-manager.conf"),
			"--authentication-kubeconfig="+of.Config("kube-controller-manager.conf"),
			"--authorization-kubeconfig="+of.Config("kube-controller-manager.conf"),
			"--use-service-account-credentials=true",
			"--root-ca-file="+of.PKI("ca.crt"),
			"--service-account-private-key-file="+of.PKI("service-account.key"),
			"--cluster-cidr="+network.Pods(),
			// It makes the folder, which is in /usr unless told otherwise.
			"--flex-volume-plugin-dir="+of.Dir+"/volume-plugins",
			"--allocate-node-cidrs=false",
			"--leader-elect=false",
			"--kube-api-qps=500",
			"--kube-api-burst=1000",
			"--horizontal-pod-autoscaler-sync-period=5s",
			"--feature-gates=GenericWorkload=true",
		),
		named(scheduler,
			"--kubeconfig="+of.Config("kube-scheduler.conf"),
			"--authentication-kubeconfig="+of.Config("kube-scheduler.conf"),
			"--authorization-kubeconfig="+of.Config("kube-scheduler.conf"),
			"--leader-elect=false",
			"--feature-gates=GenericWorkload=true",
		),
		named(proxy, "--config="+of.Config("kube-proxy.yaml")),
	}
}

// nodePrograms are the programs of node k, in the order of their start.
func nodePrograms(of instance.Instance, state instance.State, k int) []program {
	node := instance.NodeName(k)
	named := func(name string, argv ...string) program {
		return program{name, of.NodeLog(node, name), argv}
	}
	return []program{
		named(containerd, "containerd", "--config="+of.NodeConfig(node, "containerd.toml")),
		named(kubelet, "env", fmt.Sprintf("HERD_FAKE_GPUS=%d", gpusPerNode), "kubernetes", "kubelet",
			"--config="+of.NodeConfig(node, "kubelet.yaml"),
			"--kubeconfig="+of.NodeConfig(node, "kubelet.conf"),
			"--hostname-override="+node,
			"--node-ip="+state.Network.Node(k)),
		named(proxy, "kubernetes", "kube-proxy", "--config="+of.NodeConfig(node, "kube-proxy.yaml")),
	}
}

type program struct {
	name, log string
	argv      []string
}
