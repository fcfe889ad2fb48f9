package ci

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestPrometheus queries the exporter as Prometheus does, and Prometheus as a dashboard does. Then it
// waits until the alerts fire and are resolved.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	exporter, prometheus := freePort(t), freePort(t)
	ports := [2]string{freePort(t), freePort(t)}
	a := start(t, service, ports[0], "DRAIN_DELAY=1h")
	b := start(t, service, ports[1])
	module := write(t, "blackbox.yml", block(t, "yaml blackbox.yml"))
	jobs := write(t, "prometheus.yml", replace(t, block(t, "yaml prometheus.yml"), "127.0.0.1:5034", a.addr, "127.0.0.1:5035", b.addr, "127.0.0.1:9115", "127.0.0.1:"+exporter))
	for name, text := range map[string]string{"alerts.yml": block(t, "yaml alerts.yml"), "alerts_test.yml": output(t, "cat", "alerts_test.yml")} {
		if err := os.WriteFile(filepath.Join(filepath.Dir(jobs), name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(output(t, "prometheus-blackbox-exporter", "--version"))
	t.Log(output(t, "prometheus", "--version"))
	output(t, "promtool", "check", "config", jobs)
	output(t, "promtool", "check", "rules", filepath.Dir(jobs)+"/alerts.yml")
	output(t, "promtool", "test", "rules", filepath.Dir(jobs)+"/alerts_test.yml")
	background(t, "prometheus-blackbox-exporter", "--config.file="+module, "--web.listen-address=127.0.0.1:"+exporter)
	background(t, "prometheus", "--config.file="+jobs, "--web.listen-address=127.0.0.1:"+prometheus, "--storage.tsdb.path="+t.TempDir())
	probe := func(in *instance, want string) {
		t.Helper()
		until(t, "probe_success "+want, func() bool {
			_, body := get("http://127.0.0.1:" + exporter + "/probe?module=contact_processor&target=" + url.QueryEscape("http://"+in.addr+"/health"))
			return strings.Contains(body, "\nprobe_success "+want+"\n")
		})
	}
	// query waits until Prometheus has want values for what. An alert is a series while it fires.
	query := func(want int, what string) {
		t.Helper()
		within(t, 3*time.Minute, fmt.Sprintf("%s to have %d values", what, want), func() bool {
			_, body := get("http://127.0.0.1:" + prometheus + "/api/v1/query?query=" + url.QueryEscape(what))
			return strings.Contains(body, `"status":"success"`) && strings.Count(body, `"metric"`) == want
		})
	}
	firing := func(alert string, in *instance) string {
		return fmt.Sprintf(`ALERTS{alertname=%q, alertstate="firing", instance="http://%s/health"}`, alert, in.addr)
	}
	probe(a, "1")
	query(2, `probe_success{job="contact-processor"} == 1`)

	a.Process.Signal(syscall.SIGTERM)
	until(t, "draining", func() bool { code, _ := get("http://" + a.addr + "/health"); return code == 503 })
	b.stop(t, syscall.SIGTERM)
	probe(a, "0")
	probe(b, "0")
	began := time.Now()
	query(1, firing("ContactProcessorDraining", a))
	query(1, firing("ContactProcessorDown", a))
	query(1, firing("ContactProcessorDown", b))
	query(3, `ALERTS{alertstate="firing"}`)
	t.Logf("all alerts fire after %.0f s", time.Since(began).Seconds())

	a.stop(t, syscall.SIGINT) // the drain is cut short
	start(t, service, ports[0])
	start(t, service, ports[1])
	began = time.Now()
	query(0, `ALERTS{alertstate="firing"}`)
	t.Logf("all are resolved after %.0f s", time.Since(began).Seconds())
}
