package ci

import "testing"

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
