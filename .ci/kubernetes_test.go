package ci

import (
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// TestKubernetes parses the manifests as strictly as the API server can and holds
// their numbers against each other and against the service's own.
func TestKubernetes(t *testing.T) {
	t.Parallel()
	first, second, _ := strings.Cut(block(t, "yaml kubernetes"), "\n---\n")
	var deployment appsv1.Deployment
	if err := yaml.UnmarshalStrict([]byte(first), &deployment); err != nil {
		t.Fatal(err)
	}
	var svc corev1.Service
	if err := yaml.UnmarshalStrict([]byte(second), &svc); err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict([]byte(strings.Replace(first, "failureThreshold", "failureTreshold", 1)), new(appsv1.Deployment)); err == nil {
		t.Error("got no error for a misspelt field")
	}
	spec, pod := deployment.Spec, deployment.Spec.Template.Spec
	c := pod.Containers[0]

	// The same environment, in the real program.
	env := map[string]string{}
	var list []string
	for _, e := range c.Env {
		env[e.Name] = e.Value
		list = append(list, e.Name+"="+e.Value)
	}
	start(t, service, "0", list...)
	help := output(t, service, "-h")
	drain, err := time.ParseDuration(env["DRAIN_DELAY"])
	if err != nil {
		t.Fatal(err)
	}
	const shutdownTimeout, probeTimeout = 10 * time.Second, time.Second // defaults of the service and of Kubernetes
	seconds := func(n int32) time.Duration { return time.Duration(n) * time.Second }

	check := func(ok bool, what string) {
		t.Helper()
		if !ok {
			t.Errorf("want %s", what)
		}
	}
	check(deployment.APIVersion == "apps/v1" && deployment.Kind == "Deployment" && svc.APIVersion == "v1" && svc.Kind == "Service", "a Deployment and a Service")
	check(strings.Contains(help, "[PORT] (default 5034)") && c.Ports[0].ContainerPort == 5034, "the service's default port as the container's")
	check(strings.Contains(help, "[SHUTDOWN_TIMEOUT] (default 10s)"), "a shutdown timeout of 10s")
	for name, p := range map[string]*corev1.Probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe} {
		check(p.HTTPGet.Path == "/health" && p.HTTPGet.Port.StrVal == c.Ports[0].Name, name+" to ask /health at the container's port")
		check(max(seconds(p.TimeoutSeconds), probeTimeout) <= seconds(p.PeriodSeconds), name+" to end before it is repeated")
	}
	r, l := c.ReadinessProbe, c.LivenessProbe
	check(drain > seconds(r.PeriodSeconds*r.FailureThreshold+r.TimeoutSeconds), "a drain delay above the time until a readiness failure")
	check(drain+shutdownTimeout < seconds(int32(*pod.TerminationGracePeriodSeconds)), "drain delay and shutdown timeout below the grace period")
	check(seconds(l.PeriodSeconds*l.FailureThreshold) > drain, "liveness to outlast the drain")
	check(*spec.Replicas >= 2, "two replicas at least")
	check(spec.Strategy.RollingUpdate.MaxUnavailable.IntVal == 0 && spec.Strategy.RollingUpdate.MaxSurge.IntVal > 0, "no unavailable pod in a rolling update")
	check(pod.TopologySpreadConstraints[0].TopologyKey == "kubernetes.io/hostname", "replicas spread over nodes")
	for name, labels := range map[string]map[string]string{"deployment": spec.Selector.MatchLabels, "service": svc.Spec.Selector, "spread": pod.TopologySpreadConstraints[0].LabelSelector.MatchLabels} {
		for key, value := range labels {
			check(spec.Template.Labels[key] == value, name+" to select the pods")
		}
		check(len(labels) > 0, name+" to select something")
	}
	check(svc.Spec.Ports[0].TargetPort.StrVal == c.Ports[0].Name, "the Service to reach the container's port")
	s := c.SecurityContext
	check(*pod.SecurityContext.RunAsNonRoot && *pod.SecurityContext.RunAsUser == 65532 && pod.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault &&
		!*s.AllowPrivilegeEscalation && *s.ReadOnlyRootFilesystem && s.Capabilities.Drop[0] == "ALL", "the restricted security context")
	check(!c.Resources.Requests.Memory().IsZero() && !c.Resources.Requests.Cpu().IsZero() && !c.Resources.Limits.Memory().IsZero() && !c.Resources.Limits.Cpu().IsZero(), "requests and limits")
}
