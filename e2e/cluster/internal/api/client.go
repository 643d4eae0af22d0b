// Package api asks a cluster's API server the few things that decide whether
// it is up.
package api

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"herd.dev/cluster/internal/instance"
)

const requestTimeout = 5 * time.Second

// Client speaks to one API server as its administrator.
type Client struct {
	server string
	http   *http.Client
}

// New returns a client of a running instance.
func New(of instance.Instance, state instance.State) (*Client, error) {
	certificate, err := tls.LoadX509KeyPair(of.PKI("admin.crt"), of.PKI("admin.key"))
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", of.Name, err)
	}
	authority, err := os.ReadFile(of.PKI("ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("authority of %s: %w", of.Name, err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	return &Client{
		server: state.Network.APIServer(),
		http: &http.Client{
			Timeout: requestTimeout,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{
				Certificates: []tls.Certificate{certificate}, RootCAs: roots,
			}},
		},
	}, nil
}

// Ready says whether the API server says so itself.
func (c *Client) Ready() (bool, error) {
	response, err := c.http.Get(c.server + "/readyz")
	if err != nil {
		return false, err
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK, nil
}

// ReadyNodes are the names of the nodes that are Ready.
func (c *Client) ReadyNodes() ([]string, error) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	if err := c.get("/api/v1/nodes", &list); err != nil {
		return nil, err
	}
	var names []string
	for _, node := range list.Items {
		for _, condition := range node.Status.Conditions {
			if condition.Type == "Ready" && condition.Status == "True" {
				names = append(names, node.Metadata.Name)
			}
		}
	}
	return names, nil
}

// DNSReady says whether a pod of the cluster's DNS is ready.
func (c *Client) DNSReady() (bool, error) {
	var deployment struct {
		Status struct{ ReadyReplicas int }
	}
	err := c.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns", &deployment)
	return deployment.Status.ReadyReplicas > 0, err
}

func (c *Client) get(path string, into any) error {
	response, err := c.http.Get(c.server + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: %s", path, response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		return fmt.Errorf("get %s: %w", path, err)
	}
	return nil
}
