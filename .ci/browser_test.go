package ci

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestBrowser runs the dashboard's lines in a page of another origin, and in one from a file that
// Chromium sends with the origin file://, as Electron does.
func TestBrowser(t *testing.T) {
	t.Parallel()
	var script string
	const html = "<!doctype html><title>waiting</title><script type=module>try { %s } catch (e) { document.title = 'blocked: ' + e }</script>"
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, html, script)
	}))
	defer page.Close()
	readme := output(t, "cat", "../README.md")
	list := regexp.MustCompile("Start the service with `(ALLOWED_ORIGINS=https://dashboard\\.example)`").FindStringSubmatch(readme)[1]
	allowed := start(t, service, "0", replace(t, list, "https://dashboard.example", page.URL))
	draining := start(t, service, "0", replace(t, list, "https://dashboard.example", page.URL), "DRAIN_DELAY=1h")
	other := start(t, service, "0", list)
	app := start(t, service, "0", "ALLOWED_ORIGINS=app://.,file://,qrc://")
	draining.Process.Signal(syscall.SIGTERM)
	until(t, "draining", func() bool { code, _ := get("http://" + draining.addr + "/health"); return code == 503 })
	t.Log(output(t, "chromium", "--version"))
	for _, tt := range []struct {
		name string
		in   *instance
		want string
		file bool
	}{
		{"on the list", allowed, "<title>200 healthy: WhatsApp Contact Processor API is running</title>", false},
		{"draining", draining, "<title>503 draining: WhatsApp Contact Processor API is shutting down</title>", false},
		{"not on the list", other, "<title>blocked: TypeError: Failed to fetch</title>", false},
		{"a file, on the list", app, "<title>200 healthy: WhatsApp Contact Processor API is running</title>", true},
		{"a file, not on the list", other, "<title>blocked: TypeError: Failed to fetch</title>", true},
	} {
		script = replace(t, block(t, "js dashboard.js"), "localhost:5034", tt.in.addr)
		url := page.URL
		if tt.file {
			url = "file://" + write(t, "page.html", fmt.Sprintf(html, script))
		}
		dom := output(t, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
			"--user-data-dir="+t.TempDir(), "--virtual-time-budget=10000", "--dump-dom", url)
		if !strings.Contains(dom, tt.want) {
			t.Errorf("%s: got %s, want %s", tt.name, dom, tt.want)
		}
	}
}
