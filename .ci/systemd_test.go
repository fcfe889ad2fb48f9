package ci

import (
	"fmt"
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

// machine is a real systemd in a throw-away container with the programs and the network of this
// machine.
type machine struct {
	*testing.T
	leader string // process id of its systemd
}

// boot starts a machine and returns once it is up. Its working directory has bin as make build fills
// it.
func boot(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	output(t, "make", "-C", "..", "build", "BINARY="+dir+"/bin/whatsapp-contact-processor")
	cmd := exec.Command("systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--volatile=yes", "--directory=/",
		"--bind-ro="+dir+":/srv", "--bind="+t.TempDir()+":/usr/local/bin", "--boot", "systemd.firstboot=off")
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
		return m.leader != "" && exec.Command("nsenter", "-t", m.leader, "-a", "systemctl", "is-active", "multi-user.target").Run() == nil
	})
	return m
}

// run runs commands in the machine's shell, as root without sudo.
func (m *machine) run(commands string) string {
	m.Helper()
	return output(m, "nsenter", "-t", m.leader, "-a", "bash", "-uc", "sudo() { \"$@\"; }; cd /srv; "+commands)
}

func (m *machine) write(path, text string) {
	m.Helper()
	m.run("mkdir -p " + filepath.Dir(path) + "; cat >" + path + " <<'END'\n" + text + "END")
}

func (m *machine) show(property string) string {
	m.Helper()
	return m.run("systemctl show --value -p " + property + " contact-processor")
}

// TestSystemd installs the README's unit as the README says. Then it crashes, upgrades, copies, stops
// and misconfigures the service, and gives it a late address, a zone and port 80.
func TestSystemd(t *testing.T) {
	m := boot(t)
	t.Log(m.run("systemctl --version | head -n 1"))
	port := freePort(t)
	url := "http://127.0.0.1:" + port + "/health"
	const unit, settings, setting = "/etc/systemd/system/contact-processor.service", "/etc/contact-processor.env", "DRAIN_DELAY=5s"
	const dropIn = "/etc/systemd/system/contact-processor.service.d/port-80.conf"
	for _, said := range []string{"Save this as `" + unit + "`", "Write settings into `" + settings + "`, one on each line, such as `" + setting + "`. Write nothing after the value",
		"After a change of the unit, run `systemctl daemon-reload`", "such as `PORT=80`, save this as `" + dropIn + "`"} {
		if !strings.Contains(output(t, "cat", "../README.md"), said) {
			t.Errorf("the README does not say %q", said)
		}
	}
	m.write(unit, block(t, "ini contact-processor.service"))
	m.write(settings, setting+"\nPORT="+port+"\n")
	install, made := strings.CutPrefix(block(t, "sh systemd"), "make build\n") // there is no Go there
	if !made {
		t.Fatal("the block does not begin with make build")
	}
	t.Log(m.run(install))
	until(t, "an answer", func() bool { code, _ := get(url); return code == 200 })

	for line := range strings.Lines(m.run("systemd-analyze verify contact-processor.service || true")) {
		if strings.Contains(line, "contact-processor") { // it speaks of all units that it loads
			t.Errorf("systemd-analyze verify: got %q, want nothing", line)
		}
	}
	exposure := cut(m.run("systemd-analyze security --no-pager contact-processor"), "Overall exposure level for contact-processor.service: ")
	if level, err := strconv.ParseFloat(strings.Fields(exposure)[0], 64); err != nil || level >= 2 {
		t.Errorf("systemd-analyze security: got %q, want it below 2", exposure)
	}
	process := m.run("cat /proc/" + m.show("MainPID") + "/status")
	for _, want := range []string{`Uid:\t[1-9]\d+\t`, `CapPrm:\t0+\n`, `CapBnd:\t0+\n`, `NoNewPrivs:\t1\n`, `Seccomp:\t2\n`} {
		if !regexp.MustCompile(want).MatchString(process) {
			t.Errorf("got a process with %s, want it to have %q", process, want)
		}
	}

	t.Logf("exposure %s", exposure)
	for i, signal := range []string{"KILL", "ABRT"} { // a crash of Go itself ends like SIGABRT, with exit code 2
		began := time.Now()
		m.run("kill -" + signal + " " + m.show("MainPID"))
		restarts := strconv.Itoa(i + 1)
		until(t, "the service to be back after SIG"+signal, func() bool { code, _ := get(url); return code == 200 && m.show("NRestarts") == restarts })
		t.Logf("back %.1f s after SIG%s", time.Since(began).Seconds(), signal)
	}

	upgrade, made := strings.CutPrefix(block(t, "sh upgrade"), "make build\n")
	if !made {
		t.Fatal("the upgrade does not begin with make build")
	}
	before := m.show("MainPID")
	m.run(upgrade)
	until(t, "the new process", func() bool { code, _ := get(url); return code == 200 && m.show("MainPID") != before })

	second := freePort(t)
	m.run("sed 's/contact-processor.env/contact-processor-b.env/' " + unit + " >/etc/systemd/system/contact-processor-b.service; echo PORT=" + second +
		" >/etc/contact-processor-b.env; systemctl daemon-reload; systemctl start contact-processor-b")
	until(t, "the second instance", func() bool { code, _ := get("http://127.0.0.1:" + second + "/health"); return code == 200 })

	m.run("systemctl stop --no-block contact-processor")
	until(t, "draining", func() bool { code, _ := get(url); return code == 503 })
	until(t, "the end", func() bool { return m.show("ActiveState") == "inactive" })
	if result, journal := m.show("Result"), m.run("journalctl -u contact-processor"); result != "success" || !strings.Contains(journal, "msg=stopped") {
		t.Errorf("stopped: got result %s and journal %s, want success", result, journal)
	}

	m.lateAddress(settings)
	m.write(settings, "HOST=127.0.0.1\nPORT=80\n")
	m.write(dropIn, block(t, "ini port-80.conf"))
	m.run("systemctl daemon-reload; systemctl start contact-processor")
	until(t, "an answer on port 80", func() bool { code, _ := get("http://127.0.0.1/health"); return code == 200 })
	if process := m.run("cat /proc/" + m.show("MainPID") + "/status"); !regexp.MustCompile(`Uid:\t[1-9]\d+\t`).MatchString(process) || !strings.Contains(process, "CapEff:\t0000000000000400\n") {
		t.Errorf("port 80: got a process with %s, want an ordinary user's with CAP_NET_BIND_SERVICE alone", process)
	}
	m.run("systemctl stop contact-processor")

	m.write(settings, "PORT=http\n")
	m.run("systemctl start contact-processor")
	until(t, "the service to fail", func() bool { return m.show("ActiveState") == "failed" })
	const reason = `invalid value "http" for variable PORT: want a port number from 0 to 65535`
	if status := m.run("systemctl status --no-pager contact-processor || true"); !strings.Contains(status, reason) || m.show("NRestarts") != "0" {
		t.Errorf("wrong setting: got %s restarts and status %s, want no restart and %q", m.show("NRestarts"), status, reason)
	}
	if code := m.show("ExecMainStatus"); code != "64" {
		t.Errorf("wrong setting: got exit code %s, want 64", code)
	}
}

// lateAddress starts the service on an address that the machine does not have yet, and on one with a
// zone, whose interface has to be looked up.
func (m *machine) lateAddress(settings string) {
	m.Helper()
	output(m, "ip", "link", "add", "contacts", "type", "veth", "peer", "name", "contacts-peer")
	m.Cleanup(func() { exec.Command("ip", "link", "del", "contacts").Run() })
	output(m, "ip", "link", "set", "contacts", "up")
	output(m, "ip", "link", "set", "contacts-peer", "up")
	m.write(settings, "HOST=10.9.9.9\nPORT=5039\n")
	faster := "/run/systemd/system/contact-processor.service.d/faster.conf"
	m.write(faster, "[Service]\nRestartSec=200ms\n")
	m.run("systemctl daemon-reload; systemctl start contact-processor")
	until(m.T, "more restarts than the ten that were the limit", func() bool {
		restarts, _ := strconv.Atoi(m.show("NRestarts"))
		return restarts > 12
	})
	output(m, "ip", "addr", "add", "10.9.9.9/32", "dev", "contacts")
	until(m.T, "an answer at the late address", func() bool { code, _ := get("http://10.9.9.9:5039/health"); return code == 200 })

	var zone string
	until(m.T, "a link-local address", func() bool {
		out := output(m, "ip", "-6", "-brief", "address", "show", "dev", "contacts")
		zone = regexp.MustCompile(`fe80::[0-9a-f:]+`).FindString(out)
		return zone != ""
	})
	m.write(settings, "HOST="+zone+"%contacts\nPORT=5039\n")
	m.run("systemctl restart contact-processor")
	until(m.T, "an answer at the address with a zone", func() bool { code, _ := get("http://[" + zone + "%25contacts]:5039/health"); return code == 200 })
	m.run("systemctl stop contact-processor; rm " + faster + "; systemctl daemon-reload")
}
