package ci

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestKubeScore lets kube-score read the README's block as it stands. Three of its checks do not fit:
// there is one route and no dependency, so the probes are alike; the cluster decides who can connect;
// and an image that was loaded onto the nodes cannot be pulled.
func TestKubeScore(t *testing.T) {
	t.Parallel()
	file := write(t, "kubernetes.yaml", block(t, "yaml contact-processor.yaml"))
	t.Log(output(t, "go", "run", "github.com/zegl/kube-score/cmd/kube-score@v1.20.0", "score",
		"--ignore-test", "pod-probes-identical", "--ignore-test", "pod-networkpolicy", "--ignore-test", "container-image-pull-policy", file))
}

// cluster is a namespace on a Kubernetes whose node is this machine: Service addresses
// can be reached, and the processes of the pods are in /proc.
type cluster struct {
	*testing.T
	file string // the README's block
}

// TestKubernetes applies the README's block, as it stands, to the cluster of KUBECONFIG, whose node
// has the image: see cluster/with.
func TestKubernetes(t *testing.T) {
	if os.Getenv("KUBECONFIG") == "" {
		t.Fatal("KUBECONFIG is not set: let .ci/cluster/with run this, or name a single-node cluster on this machine")
	}
	c := &cluster{t, write(t, "kubernetes.yaml", block(t, "yaml contact-processor.yaml"))}
	c.Log(output(t, "kubectl", "version"))
	output(t, "kubectl", "create", "namespace", namespace)
	t.Cleanup(func() { exec.Command("kubectl", "delete", "namespace", namespace).Run() })
	output(t, "kubectl", "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted", "pod-security.kubernetes.io/warn=restricted")
	for _, step := range []struct {
		name string
		run  func(c *cluster)
	}{
		{"apply", (*cluster).apply},
		{"probe by exec", (*cluster).probe},
		{"roll out under load", (*cluster).rollOut},
		{"evict two at once", (*cluster).evict},
		{"freeze and kill", (*cluster).freezeAndKill},
		{"scale to 0 and back", (*cluster).scale},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.run(&cluster{t, c.file}) }) {
			t.Log(c.kubectl("get", "pods,events", "-o", "wide"))
			return
		}
	}
}

const namespace = "contact-processor-ci"

func (c *cluster) kubectl(args ...string) string {
	c.Helper()
	return output(c, "kubectl", append([]string{"-n", namespace}, args...)...)
}

// ready waits until the Deployment has all its pods ready and no other.
func (c *cluster) ready(timeout time.Duration) {
	c.Helper()
	c.kubectl("rollout", "status", "deployment/contact-processor", "--timeout", timeout.String())
	until(c.T, "the pods to be 2", func() bool { return len(c.pods()) == 2 })
}

func (c *cluster) apply() {
	began := time.Now()
	if out := c.kubectl("apply", "--validate=strict", "-f", c.file); strings.Contains(out, "Warning") {
		c.Errorf("got %s, want no warning", out)
	}
	c.ready(30 * time.Second)
	c.Logf("ready after %.1f s", time.Since(began).Seconds())
	const generations = "jsonpath={.items[*].metadata.generation}"
	before := c.kubectl("get", "deployments,services,pdb", "-o", generations)
	c.kubectl("diff", "-f", c.file)
	c.kubectl("apply", "--validate=strict", "-f", c.file)
	if after := c.kubectl("get", "deployments,services,pdb", "-o", generations); after != before {
		c.Errorf("second apply: got generations %s, want %s as before", after, before)
	}
}

func (c *cluster) probe() {
	if out := c.kubectl("exec", "deployment/contact-processor", "--", "/whatsapp-contact-processor", "-probe"); !strings.Contains(out, "200 OK") {
		c.Errorf("got %q, want 200", out)
	}
}

// pod is what the test needs to know of one.
type pod struct {
	Metadata struct {
		Name, UID         string
		DeletionTimestamp *time.Time
	}
	Status struct {
		PodIP             string
		ContainerStatuses []struct {
			Ready        bool
			RestartCount int
		}
	}
}

func (c *cluster) pods() []pod {
	c.Helper()
	var list struct{ Items []pod }
	if err := json.Unmarshal([]byte(c.kubectl("get", "pods", "-l", "app=contact-processor", "-o", "json")), &list); err != nil {
		c.Fatal(err)
	}
	return list.Items
}

// evict requests the eviction of both pods, as a drain of two nodes would.
func (c *cluster) evict() {
	c.ready(30 * time.Second)
	var answers []string
	for _, p := range c.pods() {
		eviction := write(c.T, "eviction.json", fmt.Sprintf(`{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": %q, "namespace": %q}}`, p.Metadata.Name, namespace))
		out, _ := exec.Command("kubectl", "create", "--raw", "/api/v1/namespaces/"+namespace+"/pods/"+p.Metadata.Name+"/eviction", "-f", eviction).CombinedOutput()
		answers = append(answers, string(out))
	}
	if !strings.Contains(answers[0], "Success") || !strings.Contains(answers[1], "disruption budget") {
		c.Errorf("got %q, want the first granted and the second refused", answers)
	}
	c.ready(30 * time.Second)
}

// freezeAndKill stops one process, so that the liveness probe fails, and kills another.
func (c *cluster) freezeAndKill() {
	for _, tt := range []struct {
		signal syscall.Signal
		limit  time.Duration
	}{{syscall.SIGSTOP, 40 * time.Second}, {syscall.SIGKILL, 10 * time.Second}} {
		c.ready(30 * time.Second)
		victim := c.pods()[0]
		began := time.Now()
		if err := syscall.Kill(c.process(victim), tt.signal); err != nil {
			c.Fatal(err)
		}
		within(c.T, tt.limit, "the container to be replaced after "+tt.signal.String(), func() bool {
			for _, p := range c.pods() {
				if status := p.Status.ContainerStatuses; p.Metadata.Name == victim.Metadata.Name && len(status) == 1 {
					return status[0].Ready && status[0].RestartCount > victim.Status.ContainerStatuses[0].RestartCount
				}
			}
			return false
		})
		c.Logf("%v: ready again after %.1f s", tt.signal, time.Since(began).Seconds())
	}
}

// process returns the service's process in a pod.
func (c *cluster) process(p pod) int {
	c.Helper()
	uid := regexp.MustCompile(strings.ReplaceAll(p.Metadata.UID, "-", "[-_]")) // the systemd driver has no dashes
	groups, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, file := range groups {
		group, _ := os.ReadFile(file)
		command, _ := os.ReadFile(filepath.Dir(file) + "/cmdline")
		if uid.Match(group) && strings.HasPrefix(string(command), "/whatsapp-contact-processor") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			return pid
		}
	}
	c.Fatalf("pod %s has no process on this machine", p.Metadata.Name)
	return 0
}

func (c *cluster) scale() {
	c.kubectl("scale", "deployment/contact-processor", "--replicas", "0")
	began := time.Now()
	within(c.T, 15*time.Second, "the pods to be gone, without a kill after the grace period", func() bool { return len(c.pods()) == 0 })
	c.Logf("gone after %.1f s", time.Since(began).Seconds())
	c.kubectl("scale", "deployment/contact-processor", "--replicas", "2")
	began = time.Now()
	c.ready(30 * time.Second)
	c.Logf("back after %.1f s", time.Since(began).Seconds())
}

// rollOut restarts the Deployment three times under load through the Service: requests
// on new connections and on kept ones, GET /health and an ordinary path.
func (c *cluster) rollOut() {
	c.ready(30 * time.Second)
	ctx, cancel := context.WithCancel(c.Context())
	var load sync.WaitGroup
	defer load.Wait()
	defer cancel()
	w := &rollOut{addr: net.JoinHostPort(c.kubectl("get", "service", "contact-processor", "-o", "jsonpath={.spec.clusterIP}"), "80"),
		connected: map[string]time.Time{}, deleted: map[string]time.Time{}, gone: map[string]time.Time{}}
	load.Go(func() { w.watchPods(ctx) })
	load.Go(func() { w.watchConnections(ctx) })
	kinds := []*requests{{path: "/health", want: 200}, {path: "/no-such-path", want: 404}, {path: "/health", want: 200, keep: true}, {path: "/no-such-path", want: 404, keep: true}}
	for _, r := range kinds {
		for range 4 {
			load.Go(func() { r.send(ctx, w.addr) })
		}
	}
	until(c.T, "the load", func() bool { return kinds[0].count() > 10 })
	for range 3 {
		c.kubectl("rollout", "restart", "deployment/contact-processor")
		c.ready(2 * time.Minute)
	}
	cancel()
	load.Wait()
	for _, r := range kinds {
		c.Logf("%s, connection kept %t: %d requests, %d answers of 503, %d lost %q", r.path, r.keep, r.sent, r.draining, r.lost, r.problems)
		if r.lost > 0 || !r.keep && r.draining > 0 {
			c.Errorf("%s, connection kept %t: got %d answers of 503 and %d lost, want none", r.path, r.keep, r.draining, r.lost)
		}
	}
	var latest, longest time.Duration
	for ip, deleted := range w.deleted {
		latest, longest = max(latest, w.connected[ip].Sub(deleted)), max(longest, w.gone[ip].Sub(deleted))
	}
	c.Logf("%d pods deleted: the last new connection %.1f s at most after that, the pod gone %.1f s at most", len(w.deleted), latest.Seconds(), longest.Seconds())
	if len(w.deleted) < 6 || len(w.connected) < 6 {
		c.Errorf("got %d deletions and connections to %d pods, want both of 6 or more", len(w.deleted), len(w.connected))
	}
}

// rollOut records what happened to pods, by address.
type rollOut struct {
	addr                     string // of the Service
	mu                       sync.Mutex
	connected, deleted, gone map[string]time.Time
}

// watchPods records when a pod was deleted and when it was gone.
func (w *rollOut) watchPods(ctx context.Context) {
	stream(ctx, func(out io.Reader) {
		var event struct {
			Type   string
			Object pod
		}
		for events := json.NewDecoder(out); ; {
			event.Object = pod{}
			if err := events.Decode(&event); err != nil {
				return
			}
			w.mu.Lock()
			switch ip := event.Object.Status.PodIP; {
			case event.Type == "DELETED":
				w.gone[ip] = time.Now()
			case event.Object.Metadata.DeletionTimestamp != nil && w.deleted[ip].IsZero():
				w.deleted[ip] = time.Now()
			}
			w.mu.Unlock()
		}
	}, "kubectl", "-n", namespace, "get", "pods", "-l", "app=contact-processor", "--watch", "--output-watch-events", "-o", "json")
}

// watchConnections records the last new connection through the Service to each pod, as conntrack
// reports it.
func (w *rollOut) watchConnections(ctx context.Context) {
	host, _, _ := net.SplitHostPort(w.addr)
	stream(ctx, func(out io.Reader) {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if sources := regexp.MustCompile(`src=(\S+)`).FindAllStringSubmatch(lines.Text(), 2); len(sources) == 2 {
				w.mu.Lock()
				w.connected[sources[1][1]] = time.Now()
				w.mu.Unlock()
			}
		}
	}, "conntrack", "-E", "-e", "NEW", "-p", "tcp", "--orig-dst", host)
}

// stream runs a command until ctx ends and passes its output to read.
func stream(ctx context.Context, read func(io.Reader), name string, args ...string) {
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		panic(err)
	}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	read(out)
	cmd.Wait()
}
