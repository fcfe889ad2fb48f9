package ci

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestReadme types what the README says into a shell, block by block, in a fresh
// clone. A block named "serve" goes on until the end.
func TestReadme(t *testing.T) {
	clone := t.TempDir()
	output(t, "git", "clone", "-q", "..", clone)
	readme, err := os.ReadFile(clone + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	var serve *exec.Cmd
	var said strings.Builder
	ran := map[string]string{}
	for _, m := range regexp.MustCompile("(?ms)^```sh (\\S+)\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1) {
		name, commands := m[1], m[2]
		if name == "docker" || name == "systemd" || name == "upgrade" {
			continue // TestDocker and TestSystemd run them
		}
		cmd := exec.Command("bash", "-euc", commands)
		cmd.Dir = clone
		if name == "serve" {
			cmd.Stdout, cmd.Stderr = &said, &said
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			serve = cmd
			defer syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			until(t, "make run to serve", func() bool { code, _ := get("http://localhost:5034/health"); return code == 200 })
			continue
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: got %v, want exit code 0\n%s", name, err, out)
		}
		ran[name] = string(out)
	}
	answer := block(t, "http answer")
	command, want, _ := strings.Cut(answer, "\n")
	date := regexp.MustCompile(`(?m)^Date: .* GMT$`)
	got := strings.ReplaceAll(output(t, "bash", "-c", strings.TrimPrefix(command, "$ ")+" 2>/dev/null"), "\r", "") + "\n"
	if date.ReplaceAllString(got, "Date") != date.ReplaceAllString(want, "Date") {
		t.Errorf("%s: got %q, want %q", command, got, want)
	}
	if !strings.Contains(ran["test"], "ok  ") {
		t.Errorf("test: got %q, want ok", ran["test"])
	}
	// Ctrl-C goes to the whole group.
	syscall.Kill(-serve.Process.Pid, syscall.SIGINT)
	serve.Wait()
	if !strings.Contains(said.String(), "msg=stopped") {
		t.Errorf("serve: got %q, want it stopped by Ctrl-C", said.String())
	}
}
