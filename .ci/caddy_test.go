package ci

import "testing"

func TestCaddy(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	p := newPair(t, "http://127.0.0.1:"+port, "DRAIN_DELAY=5s")
	site := replace(t, block(t, "caddy Caddyfile"), ":8080", "http://127.0.0.1:"+port, "127.0.0.1:5034", "127.0.0.1:"+p.ports[0], "127.0.0.1:5035", "127.0.0.1:"+p.ports[1])
	p.start(t, 0)
	p.start(t, 1)
	t.Log(output(t, "caddy", "version"))
	background(t, "env", "HOME="+t.TempDir(), "caddy", "run", "--adapter", "caddyfile", "--config", write(t, "Caddyfile", "{\n\tadmin off\n}\n"+site))
	p.roll(t, 3)
	p.wantNoneLost(t)
	p.kill(t)
}
