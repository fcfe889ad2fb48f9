package ci

import (
	"strings"
	"testing"
	"time"
)

func TestHAProxy(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := newPair(t, "http://127.0.0.1:"+port, "DRAIN_DELAY=5s")
	config := replace(t, block(t, "haproxy haproxy.cfg"), ":8080", "127.0.0.1:"+port, "127.0.0.1:5034", "127.0.0.1:"+p.ports[0], "127.0.0.1:5035", "127.0.0.1:"+p.ports[1])
	p.start(t, 0)
	p.start(t, 1)
	t.Log(output(t, "haproxy", "-v"))
	background(t, "haproxy", "-db", "-f", write(t, "haproxy.cfg", config))
	p.roll(t, 3)
	p.wantNoneLost(t)
	p.kill(t)
}

// TestHAProxyWithTwoSlashes checks a path that the service does not have. HAProxy takes any 3xx for
// healthy, unless http-check expect says otherwise.
func TestHAProxyWithTwoSlashes(t *testing.T) {
	t.Parallel()
	port, in := freePort(t), start(t, service, "0")
	config := strings.Join([]string{
		"defaults", "mode http", "timeout connect 2s", "timeout client 10s", "timeout server 10s",
		"listen contact_processor", "bind 127.0.0.1:" + port, "option httpchk GET //health",
		"default-server check inter 100ms fall 1 rise 1", "server a " + in.addr, "",
	}, "\n")
	background(t, "haproxy", "-db", "-f", write(t, "haproxy.cfg", config))
	url := "http://127.0.0.1:" + port + "/health"
	until(t, "HAProxy to find the instance down", func() bool { code, _ := get(url); return code == 503 })
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if code, _ := get(url); code != 503 {
			t.Fatalf("got %d through HAProxy, want the instance down for good", code)
		}
	}
}
