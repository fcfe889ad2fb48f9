package ci

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestApache(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := newPair(t, "http://127.0.0.1:"+port, "DRAIN_DELAY=5s")
	site := write(t, "contact-processor.conf", replace(t, block(t, "apache contact-processor.conf"),
		"Listen 8080", "Listen 127.0.0.1:"+port, "*:8080", "*:"+port, "127.0.0.1:5034", "127.0.0.1:"+p.ports[0], "127.0.0.1:5035", "127.0.0.1:"+p.ports[1]))
	dir := filepath.Dir(site)
	var config strings.Builder
	config.WriteString("ServerName localhost\nPidFile " + dir + "/pid\nDefaultRuntimeDir " + dir + "\nErrorLog /dev/stderr\nLogLevel warn\nUser nobody\nGroup nogroup\n")
	for _, module := range []string{"mpm_event", "authz_core", "proxy", "proxy_http", "proxy_balancer", "proxy_hcheck", "lbmethod_byrequests", "slotmem_shm"} {
		config.WriteString("LoadModule " + module + "_module /usr/lib/apache2/modules/mod_" + module + ".so\n")
	}
	config.WriteString("Include " + site + "\n")
	p.start(t, 0)
	p.start(t, 1)
	t.Log(output(t, "apache2", "-v"))
	background(t, "apache2", "-X", "-f", write(t, "httpd.conf", config.String()))
	p.roll(t, 3)
	p.wantNoneLost(t)
	p.kill(t)
}
