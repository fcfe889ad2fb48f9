package ci

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestCompose runs the README's services: the second one starts when the first is
// healthy, and the first drains when it is stopped.
func TestCompose(t *testing.T) {
	file := write(t, "compose.yaml", replace(t, block(t, "yaml compose.yaml"), `"5034:5034"`, `"127.0.0.1::5034"`))
	compose := func(args ...string) string {
		t.Helper()
		return output(t, "docker-compose", append([]string{"-f", file, "-p", "contact-processor-ci"}, args...)...)
	}
	t.Log(compose("version", "--short"))
	t.Cleanup(func() {
		exec.Command("docker-compose", "-f", file, "-p", "contact-processor-ci", "down", "--timeout", "1").Run()
	})
	compose("up", "-d")
	until(t, "the client to end", func() bool {
		return strings.Contains(output(t, "docker", "ps", "-a", "--filter", "name=contact-processor-ci.client", "--format", "{{.Status}}"), "Exited")
	})
	if out := compose("logs", "client"); !strings.Contains(out, "200 OK") {
		t.Errorf("client: got %q, want the answer of a healthy service", out)
	}
	url := "http://" + compose("port", "contact-processor", "5034") + "/health"
	if code, body := get(url); code != 200 {
		t.Errorf("got %d %s, want 200", code, body)
	}
	id := compose("ps", "-q", "contact-processor")
	began := time.Now()
	stop := exec.Command("docker-compose", "-f", file, "-p", "contact-processor-ci", "stop")
	if err := stop.Start(); err != nil {
		t.Fatal(err)
	}
	defer stop.Wait()
	until(t, "draining", func() bool { code, _ := get(url); return code == 503 })
	if code := output(t, "docker", "wait", id); code != "0" {
		t.Errorf("stopped: got exit code %s, want 0", code)
	}
	t.Logf("stopped after %.1f s", time.Since(began).Seconds())
}
