// Package test runs clusters and looks at them from outside.
package test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"herd.dev/cluster/internal/host"
	"herd.dev/cluster/internal/instance"
	"herd.dev/cluster/internal/oci"
)

const (
	upTimeout      = 3 * time.Minute
	commandTimeout = time.Minute
	answerTimeout  = 30 * time.Second
)

// TestPodsAndServices goes through what a user of a cluster relies on.
func TestPodsAndServices(t *testing.T) {
	name := ofClone(t, "pods")
	before := takeSnapshot(t, name)
	c := up(t, name)
	c.kubectl("wait", "--for=condition=Ready", "node/n1", "node/n2", "--timeout=30s")
	c.kubectl("-n", "kube-system", "wait", "--for=condition=Available", "deployment/coredns", "--timeout=30s")
	c.startEcho()

	clusterIP := c.kubectl("get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}")
	pods := strings.Fields(c.kubectl("get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].metadata.name}"))
	podIPs := strings.Fields(c.kubectl("get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].status.podIP}"))
	nodes := strings.Fields(c.kubectl("get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].spec.nodeName}"))
	slices.Sort(nodes)
	if got := slices.Compact(nodes); !slices.Equal(got, []string{"n1", "n2"}) {
		t.Fatalf("pods are on %v, want one or more on each of n1 and n2", got)
	}

	t.Run("a pod resolves a Service's name", func(t *testing.T) {
		for _, ip := range podIPs {
			got := fetch(t, "http://"+ip+":8080/resolve?name=echo")
			if got != clusterIP {
				t.Errorf("pod %s resolves echo to %q, want %s", ip, got, clusterIP)
			}
		}
	})
	t.Run("the ClusterIP reaches every pod from the machine", func(t *testing.T) {
		reachesAll(t, "http://"+clusterIP, pods)
	})
	t.Run("the Service's name reaches every pod from every pod", func(t *testing.T) {
		for _, ip := range podIPs {
			reachesAll(t, "http://"+ip+":8080/fetch?url="+url.QueryEscape("http://echo"), pods)
		}
	})
	t.Run("a pod reads the volume that is an image", func(t *testing.T) {
		if got := fetch(t, "http://"+podIPs[0]+":8080/read?file=/data/hello"); got != "hello\n" {
			t.Errorf("read %q, want hello", got)
		}
	})
	t.Run("logs and exec reach the pod", func(t *testing.T) {
		if got := c.kubectl("logs", pods[0]); !strings.Contains(got, "listening") {
			t.Errorf("logs of %s: %q", pods[0], got)
		}
		// The image has no other program: that this one cannot listen a
		// second time is its answer.
		if _, err := c.tryKubectl("exec", pods[0], "--", "/echo"); err == nil || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("exec in %s: %v", pods[0], err)
		}
	})
	t.Run("a killed node that is started again runs its pods again", func(t *testing.T) {
		herd(t, "signal", "--name", name, "cluster", "n2", "9")
		herd(t, "start", "--name", name, "cluster", "n2")
		reachesAll(t, "http://"+clusterIP, pods)
	})
	t.Run("up again changes nothing", func(t *testing.T) {
		first := c.state().First
		herd(t, "up", "--name", name, "--sources", sourcesDir)
		if again := c.state().First; again != first {
			t.Errorf("first process was %v and is %v", first, again)
		}
	})

	down(t, name)
	requireSame(t, before, name)
}

// TestTwoClustersSideBySide removes one of two, of which no record says what
// it is, and goes on using the other.
func TestTwoClustersSideBySide(t *testing.T) {
	names := []string{ofClone(t, "left"), ofClone(t, "right")}
	before := takeSnapshot(t, names...)
	left, right := up(t, names[0]), up(t, names[1])
	if left.state().Network == right.state().Network {
		t.Errorf("both have the addresses %s", left.state().Network.Block())
	}
	left.kubectl("create", "namespace", "only-left")
	if names := right.kubectl("get", "namespaces", "-o", "name"); strings.Contains(names, "only-left") {
		t.Error("right has a namespace that was made in left")
	}
	left.startEcho()
	right.startEcho()

	damage(t, left)
	if said := down(t, left.Name); !strings.Contains(said, "state of "+left.Name) {
		t.Errorf("down does not say that the state is damaged: %q", said)
	}
	clusterIP := right.kubectl("get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}")
	if pod := fetch(t, "http://"+clusterIP); !strings.HasPrefix(pod, "echo-") {
		t.Errorf("the pod behind the ClusterIP of right says it is %q", pod)
	}
	down(t, right.Name)
	requireSame(t, before, names...)
}

// ofClone names a cluster of the tests: another one in each clone, so that
// several can be tested side by side.
func ofClone(t *testing.T, word string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(dir))
	return fmt.Sprintf("%s-%x", word, sum[:3])
}

// cluster is one that is up.
type cluster struct {
	t *testing.T
	instance.Instance
}

func up(t *testing.T, name string) cluster {
	t.Helper()
	of, err := instance.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { down(t, name) })
	down(t, name) // what an interrupted run may have left
	began := time.Now()
	herd(t, "up", "--name", name, "--sources", sourcesDir)
	t.Logf("%s is up after %.1fs", name, time.Since(began).Seconds())
	return cluster{t, of}
}

// down returns what it says.
func down(t *testing.T, name string) string {
	t.Helper()
	return herd(t, "down", "--name", name)
}

// damage leaves half of a record, as a full disk would.
func damage(t *testing.T, c cluster) {
	t.Helper()
	path := filepath.Join(c.Dir, "state.json")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, info.Size()/2); err != nil {
		t.Fatal(err)
	}
	if said, err := exec.Command(filepath.Join(programs, herdCluster), "up", "--name", c.Name, "--sources", sourcesDir).CombinedOutput(); err == nil || !strings.Contains(string(said), "take the cluster down first") {
		t.Errorf("up with a damaged state: %v: %s", err, said)
	}
}

// herd runs the program under test.
func herd(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(programs, herdCluster), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("herd-cluster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (c cluster) state() instance.State {
	c.t.Helper()
	state, err := c.Running()
	if err != nil {
		c.t.Fatal(err)
	}
	return state
}

func (c cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.tryKubectl(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c cluster) tryKubectl(args ...string) (string, error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	command := exec.CommandContext(ctx, c.Kubectl(), args...)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

// startEcho runs pods of two images on both nodes behind a Service.
func (c cluster) startEcho() {
	c.t.Helper()
	dir := c.t.TempDir()
	layout, err := oci.OpenLayout(dir)
	if err != nil {
		c.t.Fatal(err)
	}
	echo := oci.Source{Path: filepath.Join(programs, "echo"), At: "/echo"}
	for _, image := range []oci.Image{
		{Name: "echo:1", Layers: []oci.Source{echo}, Entrypoint: []string{"/echo"}},
		{Name: "data:1", Layers: []oci.Source{{Path: "testdata/data", At: "/"}}},
	} {
		if _, err := layout.Add(image); err != nil {
			c.t.Fatal(err)
		}
	}
	herd(c.t, "image", "load", "--name", c.Name, dir)
	c.kubectl("apply", "-f", "testdata/echo.yaml")
	c.kubectl("rollout", "status", "deployment/echo", "--timeout=50s")
}

func fetch(t *testing.T, url string) string {
	t.Helper()
	var got string
	var last error
	err := host.WaitFor(answerTimeout, "an answer of "+url, func() (bool, error) {
		got, last = get(url)
		return last == nil, nil
	})
	if err != nil {
		t.Fatalf("%v: %v", err, last)
	}
	return got
}

// reachesAll fetches until each pod has answered.
func reachesAll(t *testing.T, url string, pods []string) {
	t.Helper()
	reached := map[string]bool{}
	var last error
	err := host.WaitFor(answerTimeout, "answers of all pods", func() (bool, error) {
		var pod string
		if pod, last = get(url); last == nil {
			reached[pod] = true
		}
		return len(reached) == len(pods), nil
	})
	if err != nil {
		t.Errorf("%s reached %v of %v: %v: %v", url, reached, pods, err, last)
	}
}

// client makes a new connection each time: each may have another endpoint.
var client = &http.Client{
	Timeout:   10 * time.Second,
	Transport: &http.Transport{DisableKeepAlives: true},
}

func get(url string) (string, error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return string(body), err
}
