package ci

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// These are the paths and the command that the README names, outside its blocks.
const (
	unitFile     = "/etc/systemd/system/contact-processor.service"
	settingsFile = "/etc/contact-processor.env"
	port80File   = unitFile + ".d/port-80.conf"
	reload       = "sudo systemctl daemon-reload"
)

// A machine is a container in which a real systemd runs. It shares the programs and the
// network of this machine. Its files are lost when it stops.
type machine struct {
	*testing.T
	leader string // the process ID of its systemd
}

// boot starts a machine and returns once it is up. Its directory /srv/bin holds what
// make build puts into bin.
func boot(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	output(t, "make", "-C", "..", "build", "BINARY="+dir+"/bin/whatsapp-contact-processor")
	cmd := exec.Command("systemd-nspawn", "--register=no", "--keep-unit", "--quiet",
		"--volatile=yes", "--directory=/", "--bind-ro="+dir+":/srv",
		"--bind="+t.TempDir()+":/usr/local/bin", "--boot", "systemd.firstboot=off")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		cmd.Wait()
		kill.Stop()
	})
	m := &machine{T: t}
	until(t, "systemd", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		m.leader = strings.TrimSpace(string(children))
		return m.leader != "" && exec.Command("nsenter", "-t", m.leader, "-a",
			"systemctl", "is-active", "multi-user.target").Run() == nil
	})
	return m
}

// run runs commands in a shell of the machine. The shell belongs to root, so sudo does
// nothing there.
func (m *machine) run(commands string) string {
	m.Helper()
	return output(m, "nsenter", "-t", m.leader, "-a",
		"bash", "-euc", "sudo() { \"$@\"; }; cd /srv; "+commands)
}

func (m *machine) write(path, text string) {
	m.Helper()
	m.run("mkdir -p " + filepath.Dir(path) + "; cat >" + path + " <<'END'\n" + text + "END")
}

func (m *machine) show(property string) string {
	m.Helper()
	return m.run("systemctl show --value -p " + property + " contact-processor")
}

// waitForAnswer returns once the service answers 200 on addr.
func (m *machine) waitForAnswer(addr string) {
	m.Helper()
	url := healthURL(addr)
	until(m.T, "200 from "+url, func() bool { code, _ := get(url); return code == 200 })
}

// healthURL returns the URL of /health on addr, a host and a port.
func healthURL(addr string) string {
	return "http://" + strings.ReplaceAll(addr, "%", "%25") + "/health"
}

// exposure returns what systemd-analyze says of the unit: 0 is best, 10 is worst.
func (m *machine) exposure() float64 {
	m.Helper()
	report := m.run("systemd-analyze security --no-pager contact-processor")
	_, level, _ := strings.Cut(report, "Overall exposure level for contact-processor.service: ")
	level, _, _ = strings.Cut(level, " ")
	exposure, err := strconv.ParseFloat(level, 64)
	if err != nil {
		m.Fatalf("systemd-analyze security: %v in %s", err, report)
	}
	return exposure
}

// checkProcess reports each pattern that the status of the service's process does not match.
func (m *machine) checkProcess(patterns ...string) {
	m.Helper()
	status := m.run("cat /proc/" + m.show("MainPID") + "/status")
	for _, want := range patterns {
		if !regexp.MustCompile("(?m)^" + want + "$").MatchString(status) {
			m.Errorf("process: got %s, want a line %q", status, want)
		}
	}
}

// installBlock returns the README's commands that install the service, without the first:
// boot has built the program, because the machine has no Go.
func installBlock(t *testing.T) string {
	t.Helper()
	commands, ok := strings.CutPrefix(block(t, "sh systemd"), "make build\n")
	if !ok {
		t.Fatal("the block does not begin with make build")
	}
	return commands
}

// restartCommand returns the last command of installBlock.
func restartCommand(t *testing.T) string {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(installBlock(t)), "\n")
	return lines[len(lines)-1]
}

// TestSystemd installs the README's unit as the README says. It then crashes, upgrades and
// stops the service, and gives it a wrong setting.
func TestSystemd(t *testing.T) {
	const setting = "DRAIN_DELAY=5s"
	readme := output(t, "cat", "../README.md")
	for _, want := range []string{
		"Save this as `" + unitFile + "`",
		"Put settings into `" + settingsFile + "`, one per line, such as `" + setting + "`",
		"To upgrade, run these commands again",
		"After you change a setting, run the last one again",
		"After you change the unit, run `" + reload + "` first",
		"such as `PORT=80`, add this to the unit as `" + port80File + "`",
	} {
		if !strings.Contains(readme, want) {
			t.Errorf("the README does not say %q", want)
		}
	}

	m := boot(t)
	t.Log(m.run("systemctl --version | head -n 1"))
	addr := "127.0.0.1:" + freePort(t)
	_, port, _ := net.SplitHostPort(addr)
	url := healthURL(addr)
	m.write(unitFile, block(t, "ini contact-processor.service"))
	m.write(settingsFile, setting+"\nPORT="+port+"\n")
	t.Log(m.run(installBlock(t)))
	m.waitForAnswer(addr)
	if state := m.show("UnitFileState"); state != "enabled" {
		t.Errorf("UnitFileState: got %s, want enabled", state)
	}

	// systemd-analyze reports on every unit that it loads.
	report := m.run("systemd-analyze verify contact-processor.service || true")
	for line := range strings.Lines(report) {
		if strings.Contains(line, "contact-processor") {
			t.Errorf("systemd-analyze verify: got %q, want nothing", line)
		}
	}
	exposure := m.exposure()
	t.Logf("exposure %.1f", exposure)
	if exposure >= 2 {
		t.Errorf("systemd-analyze security: got %.1f, want it below 2", exposure)
	}
	m.checkProcess(`Uid:\t[1-9].*`, `CapPrm:\t0+`, `CapBnd:\t0+`, `NoNewPrivs:\t1`, `Seccomp:\t2`)
	// Go reads the limit from /proc/sys, and takes 128 if the unit hides that.
	longest := output(t, "cat", "/proc/sys/net/core/somaxconn")
	queue := strings.Fields(output(t, "ss", "-Hltn", "sport = :"+port))
	if len(queue) < 3 || queue[2] != longest {
		t.Errorf("ss: got %q, want a queue of %s clients", queue, longest)
	}

	// A crash of Go itself ends like SIGABRT, with exit code 2.
	for i, signal := range []string{"KILL", "ABRT"} {
		began := time.Now()
		m.run("kill -" + signal + " " + m.show("MainPID"))
		restarts := strconv.Itoa(i + 1)
		until(t, "the service to be back after SIG"+signal, func() bool {
			code, _ := get(url)
			return code == 200 && m.show("NRestarts") == restarts
		})
		t.Logf("back %.1f s after SIG%s", time.Since(began).Seconds(), signal)
	}

	before := m.show("MainPID")
	m.run(installBlock(t))
	until(t, "the upgraded process", func() bool {
		code, _ := get(url)
		return code == 200 && m.show("MainPID") != before
	})

	second := freePort(t)
	m.run("cd /etc; sed s/contact-processor.env/contact-processor-b.env/ " + unitFile +
		" >systemd/system/contact-processor-b.service; echo PORT=" + second +
		" >contact-processor-b.env; " + reload + "; systemctl start contact-processor-b")
	m.waitForAnswer("127.0.0.1:" + second)

	m.run("systemctl stop --no-block contact-processor")
	until(t, "draining", func() bool { code, _ := get(url); return code == 503 })
	until(t, "the end", func() bool { return m.show("ActiveState") == "inactive" })
	if result := m.show("Result"); result != "success" {
		t.Errorf("stop: got result %s, want success", result)
	}
	if journal := m.run("journalctl -u contact-processor"); !strings.Contains(journal, "msg=stopped") {
		t.Errorf("stop: got journal %s, want msg=stopped", journal)
	}

	m.write(settingsFile, "PORT=http\n")
	m.run("systemctl start contact-processor")
	until(t, "the service to fail", func() bool { return m.show("ActiveState") == "failed" })
	const reason = `invalid value "http" for variable PORT: want a port number from 0 to 65535`
	status := m.run("systemctl status --no-pager contact-processor || true")
	if !strings.Contains(status, reason) {
		t.Errorf("wrong setting: got status %s, want %q", status, reason)
	}
	if restarts := m.show("NRestarts"); restarts != "0" {
		t.Errorf("wrong setting: got %s restarts, want 0", restarts)
	}
	if code := m.show("ExecMainStatus"); code != "64" {
		t.Errorf("wrong setting: got exit code %s, want 64", code)
	}
}

// TestSystemdListens lets the service fail to listen more often than systemd tolerates by
// default, removes the obstacle, and waits for an answer.
func TestSystemdListens(t *testing.T) {
	shared := boot(t)
	shared.write(unitFile, block(t, "ini contact-processor.service"))
	shared.write(unitFile+".d/test.conf", "[Service]\nRestartSec=100ms\n")
	shared.run(installBlock(t))

	// The kernel removes these addresses a minute later if the test cannot.
	const address = "ip address replace %s dev lo valid_lft 60 preferred_lft 60"
	for _, tt := range []struct {
		name, host, port string
		wantError        string
		remedy, undo     string
	}{
		{name: "IPv4 address that comes late", host: "10.9.9.9", port: freePort(t),
			wantError: "cannot assign requested address",
			remedy:    fmt.Sprintf(address, "10.9.9.9/32"), undo: "ip address del 10.9.9.9/32 dev lo"},
		{name: "link-local address that comes late", host: "fe80::9:9%lo", port: freePort(t),
			wantError: "cannot assign requested address",
			remedy:    fmt.Sprintf(address, "fe80::9:9/128"), undo: "ip address del fe80::9:9/128 dev lo"},
		{name: "port 80", host: "127.9.9.9", port: "80",
			wantError: "permission denied",
			remedy: "mkdir -p " + filepath.Dir(port80File) + "; cat >" + port80File + " <<'END'\n" +
				block(t, "ini port-80.conf") + "END\n" + reload + "\n" + restartCommand(t), undo: "true"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &machine{t, shared.leader}
			m.run("systemctl stop contact-processor; systemctl reset-failed contact-processor || true")
			m.write(settingsFile, "HOST="+tt.host+"\nPORT="+tt.port+"\n")
			m.run(restartCommand(t))
			const enough = 12 // more than the five starts in 10 s that systemd allows by default
			until(t, "restarts", func() bool {
				n, err := strconv.Atoi(m.show("NRestarts"))
				return err == nil && n >= enough || m.show("ActiveState") == "failed"
			})
			if m.show("ActiveState") == "failed" {
				t.Fatalf("systemd gave up after %s restarts, want it to go on", m.show("NRestarts"))
			}
			want := regexp.MustCompile(regexp.QuoteMeta(tt.host) + ".*" + tt.wantError)
			if journal := m.run("journalctl -u contact-processor"); !want.MatchString(journal) {
				t.Errorf("got journal %s, want %q", journal, want)
			}

			t.Cleanup(func() { exec.Command("sh", "-c", tt.undo).Run() })
			m.run(tt.remedy)
			m.waitForAnswer(net.JoinHostPort(tt.host, tt.port))
			m.checkProcess(`Uid:\t[1-9].*`)
		})
	}

	// Bit 10 is CAP_NET_BIND_SERVICE.
	shared.checkProcess(`CapPrm:\t0+400`, `CapBnd:\t0+400`, `NoNewPrivs:\t1`, `Seccomp:\t2`)
	exposure := shared.exposure()
	t.Logf("exposure with port-80.conf: %.1f", exposure)
	if exposure >= 2 {
		t.Errorf("systemd-analyze security: got %.1f with port-80.conf, want it below 2", exposure)
	}
}
