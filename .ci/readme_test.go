package ci

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestReadme runs the first commands of the README in a fresh clone, as a new user does. Other tests
// run the other blocks.
func TestReadme(t *testing.T) {
	clone := t.TempDir()
	output(t, "git", "clone", "-q", "..", clone)
	readme, err := os.ReadFile(clone + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	said := regexp.MustCompile("(?s)answers `(curl [^`]*)` with status (\\d+) and this body:\n\n`([^`]*)`\n.*`(make test)` runs the tests").FindStringSubmatch(string(readme))
	if said == nil {
		t.Fatal("the README does not say what curl gets and what runs the tests")
	}
	curl, status, body, test := said[1], said[2], said[3], said[4]

	serve := exec.Command("bash", "-euc", block(t, "sh serve"))
	serve.Dir = clone
	var log strings.Builder
	serve.Stdout, serve.Stderr = &log, &log
	serve.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(-serve.Process.Pid, syscall.SIGKILL)
	until(t, "make run to serve", func() bool { code, _ := get("http://localhost:5034/health"); return code == 200 })
	if got, want := output(t, "bash", "-c", curl+` -s -w '%{http_code}'`), body+"\n"+status; got != want {
		t.Errorf("%s: got %q, want %q", curl, got, want)
	}
	if got := output(t, "bash", "-c", "cd "+clone+"; "+test); !strings.Contains(got, "ok  ") {
		t.Errorf("%s: got %q, want ok", test, got)
	}
	// Ctrl-C goes to the whole group.
	syscall.Kill(-serve.Process.Pid, syscall.SIGINT)
	serve.Wait()
	for _, want := range []string{" version=" + output(t, "git", "-C", clone, "describe", "--tags", "--always") + " ", "msg=stopped"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("make run: got log %q, want %q in it", log.String(), want)
		}
	}
}
