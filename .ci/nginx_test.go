package ci

import (
	"path/filepath"
	"testing"
)

func TestNginx(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, next string
		rounds     int
	}{
		{"with proxy_next_upstream", "proxy_next_upstream error timeout http_503;", 3},
		{"passive checks alone", "proxy_next_upstream off;", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			p := newPair(t, "http://127.0.0.1:"+port, "DRAIN_DELAY=5s")
			server := write(t, "contact-processor.conf", replace(t, block(t, "nginx contact-processor.conf"),
				"8080", "127.0.0.1:"+port, "127.0.0.1:5034", "127.0.0.1:"+p.ports[0], "127.0.0.1:5035", "127.0.0.1:"+p.ports[1],
				"proxy_next_upstream error timeout http_503;", tt.next))
			dir := filepath.Dir(server)
			config := write(t, "nginx.conf", "daemon off; pid "+dir+"/pid; error_log stderr; worker_processes 1; events {}\n"+
				"http { access_log off; client_body_temp_path "+dir+"/1; proxy_temp_path "+dir+"/2; fastcgi_temp_path "+dir+"/3; uwsgi_temp_path "+dir+"/4; scgi_temp_path "+dir+"/5; include "+server+"; }\n")
			p.start(t, 0)
			p.start(t, 1)
			t.Log(output(t, "nginx", "-v"))
			background(t, "nginx", "-c", config, "-e", "stderr")
			p.roll(t, tt.rounds)
			if tt.rounds > 1 {
				p.wantNoneLost(t)
				p.kill(t)
			}
		})
	}
}
