package ci

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// dockerRun returns the README's command that starts a container, with options instead of its
// name and port.
func dockerRun(t *testing.T, options string) string {
	t.Helper()
	command := regexp.MustCompile(`(?m)^docker run (.*\\\n)*.*`).FindString(block(t, "sh docker"))
	return replace(t, command, "--name contact-processor -p 5034:5034", options)
}

// image is the one that TestDocker builds.
const image = "whatsapp-contact-processor:1.0.0"

// TestDocker runs the README's block as it stands, and compares the image and a draining container
// with what the README says.
func TestDocker(t *testing.T) {
	run := func(commands string) string {
		t.Helper()
		return output(t, "bash", "-euc", "cd ..; "+commands)
	}
	t.Cleanup(func() { exec.Command("docker", "rm", "-f", "contact-processor", "contact-processor-drain").Run() })
	t.Log(run("docker version --format 'engine {{.Server.Version}}'"))
	run(block(t, "sh docker"))
	health := func(name, want string) {
		t.Helper()
		until(t, name+" to be "+want, func() bool {
			return run("docker inspect --format '{{.State.Health.Status}}' "+name) == want
		})
	}
	until(t, "the published port", func() bool { code, _ := get("http://localhost:5034/health"); return code == 200 })
	health("contact-processor", "healthy")
	if log := run("docker logs contact-processor 2>&1"); !strings.Contains(log, " version=1.0.0 ") {
		t.Errorf("got log %s, want it to say the version that the block built", log)
	}
	if out := run("docker stop contact-processor; docker inspect --format 'exit code {{.State.ExitCode}}, killed for memory {{.State.OOMKilled}}' contact-processor"); !strings.HasSuffix(out, "exit code 0, killed for memory false") {
		t.Errorf("got %q, want exit code 0", out)
	}

	upgrade := regexp.MustCompile("To upgrade, run `(make image VERSION=(\\S+))`, then `(.*?)`, then `docker run`").FindStringSubmatch(output(t, "cat", "../README.md"))
	if upgrade == nil {
		t.Fatal("the README does not say how to upgrade")
	}
	next := "whatsapp-contact-processor:" + upgrade[2]
	again := replace(t, dockerRun(t, "--name contact-processor -p 5034:5034"), image, next)
	run(upgrade[1] + "; " + upgrade[3] + "; " + again)
	if got := run("docker inspect --format '{{.Config.Image}}' contact-processor"); got != next {
		t.Errorf("upgraded: got image %s, want %s", got, next)
	}
	until(t, "the upgraded service", func() bool { code, _ := get("http://localhost:5034/health"); return code == 200 })
	run("docker rm -f contact-processor; docker rmi " + next)

	// A container that drains, with another port and a health check every second.
	run(dockerRun(t, "--name contact-processor-drain -e PORT=8080 -e DRAIN_DELAY=8s --health-interval 1s"))
	health("contact-processor-drain", "healthy")
	run("docker kill --signal TERM contact-processor-drain")
	health("contact-processor-drain", "unhealthy")
	run("docker kill --signal TERM contact-processor-drain") // as a second docker stop does; it changes nothing
	if code := run("docker wait contact-processor-drain"); code != "0" {
		t.Errorf("drained: got exit code %s, want 0", code)
	}
	if log := run("docker logs contact-processor-drain 2>&1"); strings.Count(log, "msg=draining") != 1 || !strings.Contains(log, "msg=stopped") {
		t.Errorf("drained: got log %s, want one drain, to its end", log)
	}
	if out := run(replace(t, dockerRun(t, "--rm -e PORT=0"), "docker run -d", "docker run") + " -probe || echo exit code $?"); !strings.Contains(out, "-probe needs the -port (PORT) that the service listens on") || !strings.Contains(out, "exit code 64") {
		t.Errorf("probe of port 0: got %q, want exit code 64 and what is right", out)
	}

	fields := strings.Fields(run("docker image inspect --format '{{.Config.User}} {{.Size}}' " + image))
	if user, _, _ := strings.Cut(fields[0], ":"); user == "0" || strings.Trim(user, "0123456789") != "" {
		t.Errorf("got user %s, want a number that is not root's", fields[0])
	}
	size, err := strconv.Atoi(fields[1])
	if err != nil || size > 7_000_000 {
		t.Errorf("got an image of %s bytes, want 7,000,000 at most", fields[1])
	}
	if said := fmt.Sprintf("one static binary of %.1f MB", float64(size)/1e6); !strings.Contains(output(t, "cat", "../README.md"), said) {
		t.Errorf("the README does not say %q", said)
	}
	if files := run("id=$(docker create " + image + "); docker export $id | tar -t --exclude='dev*' --exclude='etc*' --exclude='proc*' --exclude='sys*' --exclude=.dockerenv; docker rm $id >/dev/null"); files != "whatsapp-contact-processor" {
		t.Errorf("got files %q in the image, want the binary alone", files)
	}
	arch := run("docker build -q --platform linux/arm64 -t whatsapp-contact-processor:arm64 . >/dev/null; docker image inspect --format '{{.Architecture}}' whatsapp-contact-processor:arm64; docker rmi whatsapp-contact-processor:arm64 >/dev/null")
	if arch != "arm64" {
		t.Errorf("got an image for %s, want arm64", arch)
	}
	t.Logf("image: %s bytes, user %s", fields[1], fields[0])
}
