package ci

import (
	"net/url"
	"strings"
	"syscall"
	"testing"
)

// TestBlackbox asks the exporter what Prometheus would, and Prometheus what a
// dashboard would.
func TestBlackbox(t *testing.T) {
	t.Parallel()
	exporter, prometheus := freePort(t), freePort(t)
	a := start(t, service, "0", "DRAIN_DELAY=20s")
	b := start(t, service, "0")
	module := write(t, "blackbox.yml", block(t, "yaml blackbox.yml"))
	jobs := write(t, "prometheus.yml", replace(t, block(t, "yaml prometheus.yml"), "127.0.0.1:5034", a.addr, "127.0.0.1:5035", b.addr, "127.0.0.1:9115", "127.0.0.1:"+exporter))
	t.Log(output(t, "prometheus-blackbox-exporter", "--version"))
	t.Log(output(t, "prometheus", "--version"))
	output(t, "promtool", "check", "config", jobs)
	background(t, "prometheus-blackbox-exporter", "--config.file="+module, "--web.listen-address=127.0.0.1:"+exporter)
	background(t, "prometheus", "--config.file="+jobs, "--web.listen-address=127.0.0.1:"+prometheus, "--storage.tsdb.path="+t.TempDir())
	probe := func(in *instance, want string) {
		t.Helper()
		var body string
		until(t, "probe_success "+want, func() bool {
			_, body = get("http://127.0.0.1:" + exporter + "/probe?module=contact_processor&target=" + url.QueryEscape("http://"+in.addr+"/health"))
			return strings.Contains(body, "\nprobe_success "+want+"\n")
		})
	}
	query := func(in *instance, want string) {
		t.Helper()
		q := url.QueryEscape(`probe_success{job="contact-processor",instance="http://` + in.addr + `/health"}`)
		until(t, "Prometheus to have "+want, func() bool {
			_, body := get("http://127.0.0.1:" + prometheus + "/api/v1/query?query=" + q)
			return strings.Contains(body, `,"`+want+`"]`)
		})
	}
	probe(a, "1")
	query(a, "1")
	query(b, "1")
	a.Process.Signal(syscall.SIGTERM)
	until(t, "draining", func() bool { code, _ := get("http://" + a.addr + "/health"); return code == 503 })
	probe(a, "0")
	b.stop(t, syscall.SIGTERM)
	probe(b, "0")
	query(b, "0")
	probe(a, "0")
}
