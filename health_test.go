package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What a client reads, byte for byte.
const (
	wantHealthy  = `{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n"
	wantDraining = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
)

// patience bounds every wait for something that takes milliseconds.
const patience = 10 * time.Second

// TestMain lets the test binary be the program: see start.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_BE_THE_PROGRAM") != "" {
		main()
	}
	os.Exit(m.Run())
}

// handler returns the handler for an allow list, in one of its two states.
func handler(tb testing.TB, list string, drain bool) http.Handler {
	tb.Helper()
	origins, err := parseOrigins(list)
	if err != nil {
		tb.Fatal(err)
	}
	var draining atomic.Bool
	draining.Store(drain)
	return newHandler(routes(draining.Load), origins, draining.Load)
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	healthy, draining := httptest.NewServer(handler(t, "*", false)), httptest.NewServer(handler(t, "*", true))
	t.Cleanup(healthy.Close)
	t.Cleanup(draining.Close)
	for _, tt := range []struct {
		name         string
		server       *httptest.Server
		method       string
		target       string
		accept, body string // of the request
		wantCode     int
		wantBody     string // only compared for answers of our own
	}{
		{"GET", healthy, "GET", "/health", "", "", 200, wantHealthy},
		{"HEAD", healthy, "HEAD", "/health", "", "", 200, ""},
		{"query", healthy, "GET", "/health?verbose=1;x&%zz", "", "", 200, wantHealthy},
		{"body", healthy, "GET", "/health", "", `{"a":1}`, 200, wantHealthy},
		{"Accept XML", healthy, "GET", "/health", "application/xml", "", 200, wantHealthy},
		{"Accept nothing", healthy, "GET", "/health", "*/*;q=0", "", 200, wantHealthy},
		{"POST", healthy, "POST", "/health", "", "", 405, ""},
		{"POST with a body", healthy, "POST", "/health", "", "x", 405, ""},
		{"TRACE", healthy, "TRACE", "/health", "", "", 405, ""},
		{"OPTIONS, no preflight", healthy, "OPTIONS", "/health", "", "", 405, ""},
		{"unknown method", healthy, "BREW", "/health", "", "", 405, ""},
		{"root", healthy, "GET", "/", "", "", 404, ""},
		{"trailing slash", healthy, "GET", "/health/", "", "", 404, ""},
		{"healthz", healthy, "GET", "/healthz", "", "", 404, ""},
		{"upper case", healthy, "GET", "/HEALTH", "", "", 404, ""},
		{"POST elsewhere", healthy, "POST", "/", "", "", 404, ""},
		{"GET draining", draining, "GET", "/health", "", "", 503, wantDraining},
		{"HEAD draining", draining, "HEAD", "/health", "", "", 503, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			req, err := http.NewRequest(tt.method, tt.server.URL+tt.target, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Accept", tt.accept)
			resp, body := do(t, req)
			if resp.StatusCode != tt.wantCode {
				t.Errorf("code: got %d, want %d", resp.StatusCode, tt.wantCode)
			}
			if want := tt.server == draining || tt.body != ""; resp.Close != want {
				t.Errorf("Connection: close: got %t, want %t", resp.Close, want)
			}
			want := map[string]string{"Vary": "Origin"}
			switch tt.wantCode {
			case 405:
				want["Allow"] = "GET, HEAD"
			case 200, 503:
				want["Content-Type"], want["Cache-Control"] = "application/json", "no-store"
				want["Content-Length"] = map[int]string{200: "75", 503: "82"}[tt.wantCode]
				if body != tt.wantBody {
					t.Errorf("body: got %q, want %q", body, tt.wantBody)
				}
			}
			for key, want := range want {
				if got := resp.Header.Get(key); got != want {
					t.Errorf("%s: got %q, want %q", key, got, want)
				}
			}
			if tt.wantCode == 503 && strings.Contains(strings.ToLower(body), "healthy") {
				t.Errorf("body: got %q, which a balancer that looks for \"healthy\" takes for good", body)
			}
		})
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const list = "https://a.example, http://localhost:3000 ,https://*.corp.example"
	for _, tt := range []struct {
		name, origins, method, origin string
		draining                      bool
		asks, headers                 string // of a preflight: method and headers
		wantCode                      int
		wantOrigin                    string // the origin that may read the answer
	}{
		{"all", "*", "GET", "https://any.example", false, "", "", 200, "*"},
		{"all, draining", "*", "GET", "https://any.example", true, "", "", 503, "*"},
		{"no origin", list, "GET", "", false, "", "", 200, ""},
		{"listed", list, "GET", "http://localhost:3000", false, "", "", 200, "http://localhost:3000"},
		{"listed, draining", list, "GET", "https://a.example", true, "", "", 503, "https://a.example"},
		{"the wildcard's own name", list, "GET", "https://corp.example", false, "", "", 200, ""},
		{"beside the wildcard", list, "GET", "https://evilcorp.example", false, "", "", 200, ""},
		{"not listed", list, "GET", "https://b.example", false, "", "", 200, ""},
		{"null", list, "GET", "null", false, "", "", 200, ""},
		{"preflight", "*", "OPTIONS", "https://any.example", false, "GET", "authorization,x-request-id", 204, "*"},
		{"preflight, listed, draining", list, "OPTIONS", "https://a.example", true, "HEAD", "", 204, "https://a.example"},
		{"preflight, not listed", list, "OPTIONS", "https://b.example", false, "GET", "", 204, ""},
		{"preflight for DELETE", "*", "OPTIONS", "https://any.example", false, "DELETE", "", 204, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			req := httptest.NewRequest(tt.method, "/health", nil)
			want := map[string]string{"Vary": "Origin"}
			if tt.wantOrigin != "" {
				want["Access-Control-Allow-Origin"] = tt.wantOrigin
			}
			if tt.draining {
				want["Connection"] = "close"
			}
			if tt.asks != "" {
				want["Vary"] = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
				req.Header.Set("Access-Control-Request-Method", tt.asks)
			}
			if tt.asks != "" && tt.wantOrigin != "" {
				want["Access-Control-Allow-Methods"], want["Access-Control-Max-Age"] = tt.asks, "600"
			}
			if tt.headers != "" {
				req.Header.Set("Access-Control-Request-Headers", tt.headers)
				want["Access-Control-Allow-Headers"] = tt.headers
			}
			if tt.origin != "" {
				req.Header.Set("Origin", tt.origin)
			}
			rec := httptest.NewRecorder()
			handler(t, tt.origins, tt.draining).ServeHTTP(rec, req)
			if rec.Code != tt.wantCode {
				t.Errorf("code: got %d, want %d", rec.Code, tt.wantCode)
			}
			got := map[string]string{}
			for key, values := range rec.Header() {
				if key == "Vary" || key == "Connection" || strings.HasPrefix(key, "Access-Control-") {
					got[key] = strings.Join(values, "; ")
				}
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("headers: got %v, want %v", got, want)
			}
		})
	}
}

// TestOrigins holds what each accepted entry matches against what a browser sends.
func TestOrigins(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ entry, sent, other string }{
		{"https://a.example", "https://a.example", "https://a.example:8443"},
		{"HTTPS://A.Example", "https://a.example", "http://a.example"},
		{"https://a.example:8443", "https://a.example:8443", "https://a.example"},
		{"http://a.example:443", "http://a.example:443", "https://a.example"},
		{"http://localhost:3000", "http://localhost:3000", "http://localhost"},
		{"http://my_host", "http://my_host", "http://myhost"},
		{"https://a.example.", "https://a.example.", "https://a.example"},
		{"https://xn--bcher-kva.example", "https://xn--bcher-kva.example", "https://bcher.example"},
		{"http://192.0.2.1:8080", "http://192.0.2.1:8080", "http://192.0.2.10:8080"},
		{"http://[2001:DB8::1]", "http://[2001:db8::1]", "http://[2001:db8::10]"},
		{"https://*.corp.example", "https://a.b.corp.example", "https://corp.example"},
		{"https://*.corp.example:8443", "https://a.corp.example:8443", "https://a.corp.example"},
		{"https://3com.example", "https://3com.example", "https://com.example"},
		{"chrome-extension://abcdefgh", "chrome-extension://abcdefgh", "https://abcdefgh"},
	} {
		t.Run(tt.entry, func(t *testing.T) {
			t.Parallel()
			for origin, want := range map[string]string{tt.sent: tt.sent, tt.other: ""} {
				req := httptest.NewRequest("GET", "/health", nil)
				req.Header.Set("Origin", origin)
				rec := httptest.NewRecorder()
				handler(t, tt.entry, false).ServeHTTP(rec, req)
				if got := rec.Header().Get("Access-Control-Allow-Origin"); got != want {
					t.Errorf("for origin %s: got Access-Control-Allow-Origin %q, want %q", origin, got, want)
				}
			}
		})
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	defaults := config{port: "5034", maxConnections: 1000, origins: []string{"*"}, shutdownTimeout: 10 * time.Second}
	for _, tt := range []struct {
		name string
		args []string
		env  map[string]string
		want config
	}{
		{"defaults", nil, nil, defaults},
		{"empty variables", nil,
			map[string]string{"HOST": "", "PORT": "", "MAX_CONNECTIONS": "", "ALLOWED_ORIGINS": "", "DRAIN_DELAY": "", "SHUTDOWN_TIMEOUT": ""},
			defaults},
		{"variables", nil,
			map[string]string{"HOST": "[::1]", "PORT": "0", "MAX_CONNECTIONS": "1", "ALLOWED_ORIGINS": " https://a.example , https://b.example ", "DRAIN_DELAY": "15s", "SHUTDOWN_TIMEOUT": "1m30s", "PROBE": "true"},
			config{host: "::1", port: "0", maxConnections: 1, origins: []string{"https://a.example", "https://b.example"}, drainDelay: 15 * time.Second, shutdownTimeout: 90 * time.Second}},
		{"flags beat variables, wrong ones too",
			[]string{"-host", "", "-port=65535", "-max-connections", "20000", "-allowed-origins", "*", "--drain-delay", "0s", "-shutdown-timeout", "500ms", "-probe"},
			map[string]string{"HOST": "192.0.2.1", "PORT": "x", "MAX_CONNECTIONS": "0", "ALLOWED_ORIGINS": "null", "DRAIN_DELAY": "1", "SHUTDOWN_TIMEOUT": "-1s"},
			config{port: "65535", maxConnections: 20000, origins: []string{"*"}, shutdownTimeout: 500 * time.Millisecond, probe: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := parse(tt.args, func(key string) string { return tt.env[key] }, io.Discard)
			if err != nil {
				t.Fatalf("got error %q, want none", err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestBadInput gives every setting every kind of wrong value, as flag and as
// variable. The host is not of this machine, so that a value which passes by
// mistake ends in exit code 1 and not in a server.
func TestBadInput(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		flag   string
		values []string
		want   string // the beginning of what would be right
	}{
		{"port", []string{"x", "-1", "65536", "+80", "0x50", "80 ", "http", "1.5"}, "want a port number from 0 to 65535"},
		{"max-connections", []string{"0", "-1", "1.5", "1k", "ten", " 1", "9223372036854775808"}, "want an integer of 1 or more"},
		{"drain-delay", []string{"5", "0", "-0", "-1s", "x", "1", "s", "1d", "5 s"}, "want a duration of 0s or more"},
		{"shutdown-timeout", []string{"10", "0", "-1ns", "soon"}, "want a duration of 0s or more"},
		{"allowed-origins", []string{"example.com", "localhost:3000", "null", "https://", "https://:8080", "//a.example", "https://a b.example",
			"https://a.example,", ",https://a.example", "https://a.example,,https://b.example", " ", "*,https://a.example", "*,*",
			"ws://a.example", "wss://a.example", "ftp://a.example", "file:///x", "file://a.example", "https://a.example:x", "https://%41.example", "https://[a.example]"}, "want the scheme://host[:port] of a page"},
		{"allowed-origins", []string{"https://a.example/", "https://a.example/x", "https://a.example?q", "https://a.example?", "https://a.example#f", "https://a.example#",
			"https://u@a.example", "https://u:p@a.example", "https://a.example:443", "https://a.example:", "https://a.example:0443"}, "want https://a.example, as browsers send it"},
		{"allowed-origins", []string{"http://a.example:80"}, "want http://a.example, as browsers send it"},
		{"allowed-origins", []string{"http://a.example:08080"}, "want http://a.example:8080, as browsers send it"},
		{"allowed-origins", []string{"http://[2001:db8:0::1]"}, "want http://[2001:db8::1], as browsers send it"},
		{"allowed-origins", []string{"https://a.example:65536"}, "want a port number"},
		{"allowed-origins", []string{"https://bücher.example", "https://*corp.example", "https://a*.corp.example", "https://*.*.corp.example", "https://a.*.example", "https://*", "https://*.",
			"https://a..example", "https://.a.example", "https://*.192.0.2.1", "http://127.1", "http://0x7f.1", "http://1.2.3.4.", "http://0x7f000001", "http://[fe80::1%25lo]", "http://[::ffff:102:304]", "https://a!.example"}, "want a host of ASCII letters"},
	} {
		variable := strings.ToUpper(strings.ReplaceAll(tt.flag, "-", "_"))
		for _, value := range tt.values {
			t.Run(tt.flag+"="+value, func(t *testing.T) {
				t.Parallel()
				fails(t, 2, []string{"-host", "192.0.2.1", "-" + tt.flag, value}, nil, "flag -"+tt.flag, fmt.Sprintf("%q", value), tt.want)
				fails(t, 2, []string{"-host", "192.0.2.1"}, map[string]string{variable: value}, "variable "+variable, fmt.Sprintf("%q", value), tt.want)
			})
		}
	}
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"unknown flag", []string{"-prot", "80"}, []string{"-prot", "-h lists the flags"}},
		{"unknown flag of two lines", []string{"-pr\not"}, []string{"-pr ot", "-h lists the flags"}},
		{"no value", []string{"-port"}, []string{"-port", "-h lists the flags"}},
		{"empty list", []string{"-allowed-origins", ""}, []string{"flag -allowed-origins", `""`, "want"}},
		{"bad probe", []string{"-probe=maybe"}, []string{"-probe", `"maybe"`, "-h lists the flags"}},
		{"stray argument", []string{"serve"}, []string{`"serve"`, "want only flags"}},
		{"stray argument behind flags", []string{"-port", "80", "serve"}, []string{`"serve"`, "want only flags"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fails(t, 2, tt.args, map[string]string{"HOST": "192.0.2.1"}, tt.want...)
		})
	}
}

// fails checks that the program ends with code and one line that has all of want.
func fails(t *testing.T, code int, args []string, env map[string]string, want ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if got := run(args, func(key string) string { return env[key] }, &stdout, &stderr); got != code {
		t.Errorf("%q %v: got exit code %d, want %d", args, env, got, code)
	}
	line := stderr.String()
	if strings.Count(line, "\n") != 1 || stdout.Len() > 0 {
		t.Errorf("%q %v: got %q and %q, want one line on standard error", args, env, line, stdout.String())
	}
	for _, w := range want {
		if !strings.Contains(line, w) {
			t.Errorf("%q %v: got %q, want it to have %q", args, env, line, w)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"-h", "-help", "--help"} {
		var stdout, stderr bytes.Buffer
		if code := run([]string{arg}, func(string) string { return "" }, &stdout, &stderr); code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: got exit code %d and errors %q, want 0 and none", arg, code, stderr.String())
		}
		help := stdout.String()
		for _, want := range []string{"-host", "[HOST]", "-port", "[PORT] (default 5034)", "-max-connections", "[MAX_CONNECTIONS] (default 1000)", "-allowed-origins", "[ALLOWED_ORIGINS] (default *)",
			"-drain-delay", "[DRAIN_DELAY] (default 0s)", "-shutdown-timeout", "[SHUTDOWN_TIMEOUT] (default 10s)", "-probe"} {
			if !strings.Contains(help, want) {
				t.Errorf("%s: got %q, want it to have %q", arg, help, want)
			}
		}
	}
}

func TestCannotListen(t *testing.T) {
	t.Parallel()
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Listener.Addr().String())
	const change = "want another -port (PORT) or -host (HOST)"
	fails(t, 1, []string{"-host", "127.0.0.1", "-port", port}, nil, "in use", change)
	fails(t, 1, []string{"-host", "192.0.2.1", "-port", "0"}, nil, "192.0.2.1", change) // another machine's
	fails(t, 1, []string{"-host", "no host", "-port", "0"}, nil, "no host", change)
}

func TestProbe(t *testing.T) {
	t.Parallel()
	hung := make(chan struct{})
	t.Cleanup(func() { close(hung) })
	healthy, draining := handler(t, "*", false), handler(t, "*", true)
	answer := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		host    string
		want    int
		says    string
	}{
		{"healthy", healthy.ServeHTTP, "127.0.0.1", 0, "200 OK: " + strings.TrimSpace(wantHealthy)},
		{"empty host", healthy.ServeHTTP, "", 0, "http://127.0.0.1:"},
		{"unspecified IPv4 host", healthy.ServeHTTP, "0.0.0.0", 0, "http://127.0.0.1:"},
		{"unspecified IPv6 host", healthy.ServeHTTP, "::", 0, "http://127.0.0.1:"},
		{"draining", draining.ServeHTTP, "127.0.0.1", 1, "503 Service Unavailable: " + strings.TrimSpace(wantDraining)},
		{"another program", http.NotFound, "127.0.0.1", 1, "404 Not Found: 404 page not found: want 200"},
		{"204", answer(204, ""), "127.0.0.1", 1, "204 No Content"},
		{"redirect", http.RedirectHandler("/", http.StatusFound).ServeHTTP, "127.0.0.1", 1, "302 Found"},
		{"many lines", answer(500, strings.Repeat("a\r\n\n", 1000)), "127.0.0.1", 1, "500 Internal Server Error: a a a"},
		{"no answer", func(w http.ResponseWriter, r *http.Request) { <-hung }, "127.0.0.1", 1, "Client.Timeout"},
		{"half an answer", func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-hung
		}, "127.0.0.1", 1, "200 OK: : context deadline exceeded"},
		{"nobody there", nil, "127.0.0.1", 1, "refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan string, 2)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked <- r.Method + " " + r.URL.Path
				tt.handler(w, r)
			}))
			_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
			if tt.handler == nil {
				server.Close()
			}
			var stdout, stderr bytes.Buffer
			env := map[string]string{"HOST": tt.host, "PORT": port}
			if code := run([]string{"-probe"}, func(key string) string { return env[key] }, &stdout, &stderr); code != tt.want {
				t.Errorf("got exit code %d, want %d", code, tt.want)
			}
			said, silent := &stdout, &stderr
			if tt.want != 0 {
				said, silent = &stderr, &stdout
			}
			if line := said.String(); strings.Count(line, "\n") != 1 || !strings.Contains(line, tt.says) || silent.Len() > 0 {
				t.Errorf("got %q and %q, want one line with %q", line, silent.String(), tt.says)
			}
			if tt.handler != nil && (<-asked != "GET /health" || len(asked) > 0) {
				t.Error("got other requests than one GET /health")
			}
		})
	}
}

// TestProbeUsesNoProxy asks for LOCALHOST, which net/http does not exempt from
// proxies as it does localhost.
func TestProbeUsesNoProxy(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	_, port, _ := net.SplitHostPort(p.addr)
	out, err := command(t, []string{"HOST=LOCALHOST", "PORT=" + port, "HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1"}, "-probe").CombinedOutput()
	if err != nil {
		t.Errorf("got %v and %q, want exit code 0", err, out)
	}
}

// process is the program in a process of its own: the test binary again, which
// TestMain turns into main.
type process struct {
	*exec.Cmd
	addr, url string      // as it logs them
	log       chan string // its standard error by lines, closed at the end
	stderr    io.Closer   // the reading end
}

// command returns the program with no environment but env, and what keeps the
// coverage and the race detector of the test binary quiet.
func command(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append([]string{"TEST_BE_THE_PROGRAM=1", "GOCOVERDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=0"}, env...)
	return cmd
}

// start runs the program on a free loopback port and returns once it listens.
func start(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	cmd := command(t, append([]string{"HOST=127.0.0.1", "PORT=0"}, env...), args...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	p := follow(t, stderr)
	p.Cmd = cmd
	return p
}

// follow reads the log of a program and returns once it listens.
func follow(t *testing.T, stderr io.ReadCloser) *process {
	t.Helper()
	p := &process{log: make(chan string, 100), stderr: stderr}
	go func() {
		defer close(p.log)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			p.log <- lines.Text()
		}
	}()
	_, rest, _ := strings.Cut(p.waitFor(t, "msg=listening"), " addr=")
	p.addr, p.url, _ = strings.Cut(rest, " url=")
	return p
}

// waitFor returns the next line of the log that has text.
func (p *process) waitFor(t *testing.T, text string) string {
	t.Helper()
	var seen []string
	for timeout := time.After(patience); ; {
		select {
		case line, ok := <-p.log:
			if strings.Contains(line, text) {
				return line
			}
			if seen = append(seen, line); !ok {
				t.Fatalf("the program ended; got log %q, want a line with %q", seen, text)
			}
		case <-timeout:
			t.Fatalf("got log %q, want a line with %q", seen, text)
		}
	}
}

// exit waits for the end and returns the exit code and the rest of the log.
func (p *process) exit(t *testing.T) (code int, log []string) {
	t.Helper()
	for timeout := time.After(patience); ; {
		select {
		case line, ok := <-p.log:
			if !ok {
				p.Wait()
				return p.ProcessState.ExitCode(), log
			}
			log = append(log, line)
		case <-timeout:
			t.Fatalf("still running; got log %q", log)
		}
	}
}

func (p *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// do sends req on a connection of its own.
func do(t *testing.T, req *http.Request) (resp *http.Response, body string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func (p *process) get(t *testing.T, path string) (resp *http.Response, body string) {
	t.Helper()
	req, err := http.NewRequest("GET", "http://"+p.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Origin", "https://a.example")
	return do(t, req)
}

// client is a connection that sends what it likes, when it likes.
type client struct {
	net.Conn
	answers *bufio.Reader
}

const get = "GET /health HTTP/1.1\r\nHost: a.example\r\n" // wants another line end

// dial opens a connection and sends raw.
func (p *process) dial(t *testing.T, raw string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	c := &client{conn, bufio.NewReader(conn)}
	c.send(t, raw)
	return c
}

func (c *client) send(t *testing.T, raw string) {
	t.Helper()
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
}

// wantAnswer reads the next answer and its body.
func (c *client) wantAnswer(t *testing.T, code int) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		t.Fatalf("got error %v, want a %d", err, code)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != code {
		t.Errorf("got %d and error %v, want a %d", resp.StatusCode, err, code)
	}
	return resp
}

// wantClosed waits for the end of the connection.
func (c *client) wantClosed(t *testing.T) {
	t.Helper()
	if n, err := c.answers.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %d bytes more and error %v, want a closed connection", n, err)
	}
}

// closed waits until the listener no longer accepts connections.
func (p *process) closed(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			return
		}
		conn.Close()
	}
	t.Fatal("the listener is still open")
}

// TestEnd is what becomes of the process and of a connection that is open at the signal.
func TestEnd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, env, sent string
		signals         []os.Signal
		rest            string // sent when the listener has closed
		wantCode        int
		wantLog         []string // after the line for listening
	}{
		{"SIGTERM", "MAX_CONNECTIONS=1", "", []os.Signal{syscall.SIGTERM}, "", 0, []string{"msg=draining signal=terminated delay=0s", "msg=stopped"}},
		{"Ctrl-C", "", "", []os.Signal{os.Interrupt}, "", 0, []string{"msg=draining signal=interrupt delay=0s", "msg=stopped"}},
		{"half a request", "", get, []os.Signal{syscall.SIGTERM}, "\r\n", 0, []string{"msg=draining", "msg=stopped"}},
		{"half a request, too late", "SHUTDOWN_TIMEOUT=0s", get, []os.Signal{syscall.SIGTERM}, "", 1, []string{"msg=draining", "-shutdown-timeout (SHUTDOWN_TIMEOUT)"}},
		{"idle for longer than the timeout", "SHUTDOWN_TIMEOUT=2s", get + "\r\n", []os.Signal{syscall.SIGTERM}, "", 0, []string{"msg=draining", "msg=stopped"}},
		{"second signal in the drain delay", "DRAIN_DELAY=1h", get, []os.Signal{syscall.SIGTERM, syscall.SIGTERM}, "", 1, []string{"msg=draining signal=terminated delay=1h", "second signal: terminated"}},
		{"Ctrl-C after SIGTERM", "DRAIN_DELAY=1h", get, []os.Signal{syscall.SIGTERM, os.Interrupt}, "", 1, []string{"msg=draining", "second signal: interrupt"}},
		{"second signal in the shutdown", "SHUTDOWN_TIMEOUT=1h", get, []os.Signal{syscall.SIGTERM, syscall.SIGTERM}, "", 1, []string{"msg=draining", "second signal: terminated"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, []string{tt.env})
			var c *client
			if tt.sent != "" {
				c = p.dial(t, tt.sent)
			}
			p.get(t, "/health") // accepted in order, so c has been too
			log := []string{}
			for _, s := range tt.signals {
				p.signal(t, s)
				if len(tt.signals) > len(log)+1 {
					log = append(log, p.waitFor(t, "msg=draining"))
				}
			}
			if tt.rest != "" {
				p.closed(t)
				c.send(t, tt.rest)
				c.wantAnswer(t, 503)
			}
			code, rest := p.exit(t)
			log = append(log, rest...)
			if code != tt.wantCode || len(log) != len(tt.wantLog) {
				t.Fatalf("got exit code %d and log %q, want %d and a line for each of %q", code, log, tt.wantCode, tt.wantLog)
			}
			for i, want := range tt.wantLog {
				if !strings.Contains(log[i], want) {
					t.Errorf("log: got %q, want %q in it", log[i], want)
				}
			}
		})
	}
}

func TestListeningLine(t *testing.T) {
	t.Parallel()
	for _, host := range []string{"127.0.0.1", "", "0.0.0.0", "::"} {
		t.Run("host "+host, func(t *testing.T) {
			t.Parallel()
			p := start(t, []string{"PORT=1"}, "-host", host, "-port", "0")
			_, port, err := net.SplitHostPort(p.addr)
			if err != nil || port == "0" || port == "1" {
				t.Errorf("got address %q, want the real one", p.addr)
			}
			if want := "http://127.0.0.1:" + port + "/health"; p.url != want {
				t.Errorf("got URL %q to try, want %q", p.url, want)
			}
			addrs := []string{"127.0.0.1:" + port}
			if ln, err := net.Listen("tcp", "[::1]:0"); err == nil && host == "" { // the machine has IPv6
				ln.Close()
				addrs = append(addrs, "[::1]:"+port)
			}
			for _, p.addr = range addrs {
				if resp, _ := p.get(t, "/health"); resp.StatusCode != 200 {
					t.Errorf("got %d from %s, want 200", resp.StatusCode, p.addr)
				}
			}
		})
	}
}

// TestDrain is a rolling restart as each kind of client sees it, in the order in which
// things happen.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"DRAIN_DELAY=1s", "ALLOWED_ORIGINS=https://a.example"})
	kept := map[string]int{ // what is asked on a kept connection while draining, and the code of its answer
		get + "\r\n": 503,
		"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n":          404,
		"DELETE /health HTTP/1.1\r\nHost: a.example\r\n\r\n": 405,
		"OPTIONS /health HTTP/1.1\r\nHost: a.example\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: GET\r\n\r\n": 204,
		"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n":          400,
		"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n": 503,
	}
	clients := map[string]*client{}
	for raw := range kept {
		clients[raw] = p.dial(t, get+"\r\n")
		if resp := clients[raw].wantAnswer(t, 200); resp.Close {
			t.Error("before: got Connection: close, want it kept")
		}
	}
	idle := p.dial(t, get+"\r\n")
	idle.wantAnswer(t, 200)
	half := p.dial(t, get)
	p.get(t, "/health") // accepted in order, so half has been too
	began := time.Now()
	p.signal(t, syscall.SIGTERM)
	if line := p.waitFor(t, "msg=draining"); !strings.Contains(line, "delay=1s") {
		t.Errorf("got log line %q, want the delay of 1s", line)
	}
	resp, body := p.get(t, "/health")
	if resp.StatusCode != 503 || body != wantDraining || !resp.Close {
		t.Errorf("new connection: got %d %q, Connection: close %t; want 503 %q, true", resp.StatusCode, body, resp.Close, wantDraining)
	}
	if got := resp.Header.Get("Access-Control-Allow-Origin"); got != "https://a.example" {
		t.Errorf("new connection: got Access-Control-Allow-Origin %q, want the page's origin", got)
	}
	for raw, code := range kept {
		clients[raw].send(t, raw)
		if resp := clients[raw].wantAnswer(t, code); !resp.Close {
			t.Errorf("%q: got no Connection: close, want the client told to leave", raw)
		}
		clients[raw].wantClosed(t)
	}
	half.send(t, "\r\n")
	half.wantAnswer(t, 503)
	half.wantClosed(t)
	idle.wantClosed(t)
	if got := time.Since(began); got < time.Second {
		t.Errorf("the idle connection was closed after %v, want the drain delay of 1s first", got)
	}
	if conn, err := net.Dial("tcp", p.addr); err == nil {
		conn.Close()
		t.Error("the idle connection was closed before the listener")
	}
	if code, log := p.exit(t); code != 0 {
		t.Errorf("got exit code %d and log %q, want 0", code, log)
	}
}

// TestLogReaderGone closes the reading end of standard error: the lines are lost, and
// nothing else.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"DRAIN_DELAY=1s", "MAX_CONNECTIONS=1"})
	p.stderr.Close()
	p.dial(t, get)
	p.get(t, "/health") // at the limit, which is worth a line
	p.signal(t, syscall.SIGTERM)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if resp, _ := p.get(t, "/health"); resp.StatusCode == 503 {
			break
		}
	}
	p.closed(t)
	if code, _ := p.exit(t); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
}

// TestConnectionLimit fills the places for connections and then wants one more.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	const reached = "level=WARN msg=\"connection limit reached"
	t.Run("the longest idle gives way", func(t *testing.T) {
		t.Parallel()
		p := start(t, []string{"MAX_CONNECTIONS=3"})
		ask := func(c *client) {
			c.send(t, get+"\r\n")
			c.wantAnswer(t, 200)
			time.Sleep(100 * time.Millisecond) // it waits from a moment after its answer on, which nobody can see
		}
		first, second, third := p.dial(t, ""), p.dial(t, ""), p.dial(t, "")
		for _, c := range []*client{first, second, third, first} {
			ask(c)
		}
		newest := p.dial(t, get+"\r\n")
		newest.wantAnswer(t, 200)
		second.wantClosed(t)
		for _, c := range []*client{first, third, newest} {
			ask(c)
		}
		p.get(t, "/health")
		p.signal(t, syscall.SIGTERM)
		if code, log := p.exit(t); code != 0 || strings.Count(strings.Join(log, "\n"), reached) != 1 {
			t.Errorf("got exit code %d and log %q, want 0 and one line for two that gave way", code, log)
		}
	})
	t.Run("half-sent requests lock nobody out", func(t *testing.T) {
		t.Parallel()
		p := start(t, []string{"MAX_CONNECTIONS=3"})
		silent, headers, line := p.dial(t, ""), p.dial(t, get), p.dial(t, "GET /hea")
		p.dial(t, get+"\r\n").wantAnswer(t, 200)
		silent.wantClosed(t)
		headers.send(t, "\r\n")
		headers.wantAnswer(t, 200)
		if resp, _ := p.get(t, "/health"); resp.StatusCode != 200 {
			t.Errorf("newest: got %d, want 200", resp.StatusCode)
		}
		line.wantClosed(t)
	})
	t.Run("a first request has time to come", func(t *testing.T) {
		t.Parallel()
		p := start(t, []string{"MAX_CONNECTIONS=1000"})
		began := time.Now()
		first := p.dial(t, "")
		for range 999 {
			p.dial(t, "")
		}
		p.dial(t, get+"\r\n").wantAnswer(t, 200)
		if got, want := time.Since(began), 200*time.Millisecond; got < want {
			t.Errorf("the newest was answered after %v, want the first to have %v before it gives way", got, want)
		}
		first.wantClosed(t)
	})
	t.Run("a request that is answered keeps its place", func(t *testing.T) {
		t.Parallel()
		p := start(t, []string{"MAX_CONNECTIONS=1"})
		busy := p.dial(t, get+"Content-Length: 10\r\n\r\n") // is being answered until the body's time is over
		busy.wantAnswer(t, 200)
		newest := p.dial(t, get+"\r\n")
		p.waitFor(t, reached)
		busy.send(t, "0123456789")
		newest.wantAnswer(t, 200)
		busy.wantClosed(t)
	})
}

// TestServe runs the life of the process inside the test, where coverage and mutation
// testing see it.
func TestServe(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, sent string // on the connection that is open at the first signal
		args       []string
		signals    []os.Signal
		want       string // error; none if empty
	}{
		{"one signal", get + "\r\n", nil, []os.Signal{syscall.SIGTERM}, ""},
		{"two signals", get, []string{"-drain-delay", "1h"}, []os.Signal{syscall.SIGTERM, os.Interrupt}, "second signal: interrupt"},
		{"timeout", get, []string{"-shutdown-timeout", "0s"}, []os.Signal{syscall.SIGTERM}, "requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := parse(append(tt.args, "-host", "127.0.0.1", "-port", "0", "-max-connections", "1"), func(string) string { return "" }, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			signals, ended := make(chan os.Signal, 2), make(chan error)
			stderr, log := io.Pipe()
			go func() { ended <- serve(c, signals, slog.New(slog.NewTextHandler(log, nil))) }()
			p := follow(t, stderr)
			first := p.dial(t, get)
			last := p.dial(t, tt.sent)
			first.wantClosed(t)
			if strings.HasSuffix(tt.sent, "\r\n\r\n") {
				last.wantAnswer(t, 200)
			}
			for _, s := range tt.signals {
				signals <- s
			}
			if err := <-ended; fmt.Sprint(err) != cmp.Or(tt.want, "<nil>") {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestHostileClients sends what no HTTP library would: each gets a 4xx or a closed
// connection, at once, and the next client its answer.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	for _, tt := range []struct {
		name, raw string
		want      []int  // codes of the answers, in order
		then      string // the connection is closed, kept, or held until the body's time is over
	}{
		{"two lengths", get + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", []int{400}, "closed"},
		{"length with chunked", get + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get + "\r\n", []int{200}, "closed"},
		{"length with chunked elsewhere", "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get + "\r\n", []int{404}, "closed"},
		// The two 5xx that net/http itself sends: RFC 9112, section 6.1, and RFC 9110, section 15.6.6.
		{"chunked twice", get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{501}, "closed"},
		{"HTTP/3.0", "GET /health HTTP/3.0\r\nHost: a.example\r\n\r\n", []int{505}, "closed"},
		{"negative length", get + "Content-Length: -1\r\n\r\n", []int{400}, "closed"},
		{"space before the colon", get + "Content-Length : 1\r\n\r\na", []int{400}, "closed"},
		{"folded header", get + " folded: 1\r\n\r\n", []int{400}, "closed"},
		{"NUL in a header", get + "X: a\x00b\r\n\r\n", []int{400}, "closed"},
		{"NUL in the path", "GET /hea\x00lth HTTP/1.1\r\nHost: a.example\r\n\r\n", []int{400}, "closed"},
		{"two hosts", get + "Host: b.example\r\n\r\n", []int{400}, "closed"},
		{"no host", "GET /health HTTP/1.1\r\n\r\n", []int{400}, "closed"},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", []int{400}, "closed"},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{400}, "closed"},
		{"no version", "GET /health\r\n\r\n", []int{400}, "closed"},
		{"15 KB of headers", get + "Cookie: " + strings.Repeat("x", 15<<10) + "\r\n\r\n", []int{200}, "kept"},
		{"21 KB of headers", get + "Cookie: " + strings.Repeat("x", 21<<10) + "\r\n\r\n", []int{431}, "closed"}, // net/http adds 4 KiB to the 16
		{"200 KB of headers", get + "Cookie: " + strings.Repeat("x", 200<<10) + "\r\n\r\n", []int{431}, "closed"},
		{"endless path", "GET /" + strings.Repeat("x", 200<<10), []int{431}, "closed"},
		{"half and gone", get, nil, "held"},
		{"body that never comes", get + "Content-Length: 10\r\n\r\n", []int{200}, "held"},
		{"pipelining", get + "\r\n" + get + "\r\n" + get + "\r\n", []int{200, 200, 200}, "kept"},
		{"HTTP/1.0", "GET /health HTTP/1.0\r\n\r\n", []int{200}, "closed"},
		{"HTTP/1.0 kept", "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", []int{200}, "kept"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := p.dial(t, "")
			go io.WriteString(c, tt.raw) // the program may answer and close before it has read all
			for _, code := range tt.want {
				c.wantAnswer(t, code)
			}
			switch tt.then {
			case "closed":
				c.wantClosed(t)
			case "kept":
				c.send(t, get+"\r\n")
				c.wantAnswer(t, 200)
			}
			if resp, _ := p.get(t, "/health"); resp.StatusCode != 200 {
				t.Errorf("next client: got %d, want 200", resp.StatusCode)
			}
		})
	}
}

// discard is a ResponseWriter that costs nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header               { return d.header }
func (d discard) Write(b []byte) (int, error)       { return len(b), nil }
func (d discard) WriteString(s string) (int, error) { return len(s), nil }
func (d discard) WriteHeader(int)                   {}

// handlerCases are the requests whose cost is held and shown.
var handlerCases = []struct {
	name, origins string
	draining      bool
	header        http.Header
	method        string
	maxAllocs     float64
}{
	{"no origin", "*", false, nil, "GET", 0},
	{"draining", "*", true, nil, "GET", 0},
	{"origin", "*", false, http.Header{"Origin": {"https://a.example"}}, "GET", 1},
	{"listed origin", "https://b.example,https://a.example", false, http.Header{"Origin": {"https://a.example"}}, "GET", 1},
	{"wildcard origin", "https://*.corp.example", false, http.Header{"Origin": {"https://a.corp.example"}}, "GET", 1},
	{"preflight", "*", false, http.Header{"Origin": {"https://a.example"}, "Access-Control-Request-Method": {"GET"}, "Access-Control-Request-Headers": {"authorization"}}, "OPTIONS", 1},
}

// handle returns a function that handles the request of the i-th case once.
func handle(tb testing.TB, i int) func() {
	tt := handlerCases[i]
	h := handler(tb, tt.origins, tt.draining)
	req := httptest.NewRequest(tt.method, "/health", nil)
	req.Header = tt.header
	w := discard{http.Header{}}
	return func() {
		clear(w.header)
		h.ServeHTTP(w, req)
	}
}

func TestAllocations(t *testing.T) {
	for i, tt := range handlerCases {
		if got := testing.AllocsPerRun(100, handle(t, i)); got > tt.maxAllocs {
			t.Errorf("%s: got %v allocations, want %v at most", tt.name, got, tt.maxAllocs)
		}
	}
}

func BenchmarkHandler(b *testing.B) {
	for i, tt := range handlerCases {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for once := handle(b, i); b.Loop(); {
				once()
			}
		})
	}
}

// FuzzHandler sends any request that net/http can hand to the handler.
func FuzzHandler(f *testing.F) {
	const list = "https://a.example,http://localhost:3000,https://*.corp.example"
	f.Add("GET", "/health", "https://a.example", "", "", false)
	f.Add("HEAD", "/health", "https://x.corp.example", "", "", true)
	f.Add("OPTIONS", "/health", "http://localhost:3000", "GET", "authorization,x-request-id", false)
	f.Add("OPTIONS", "*", "null", "DELETE", "", false)
	f.Add("CONNECT", "/health", "https://corp.example", "", "", false)
	f.Add("GET", "//health/../%2e/?a;b", "https://a.example/", "", "", false)
	f.Add("GET", "http://b.example/health", "HTTPS://A.EXAMPLE", "PUT", ",,", true)
	f.Fuzz(func(t *testing.T, method, target, origin, asks, headers string, drain bool) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			t.Skip("net/http answers 400")
		}
		req := &http.Request{Method: method, URL: u, Host: "a.example", RequestURI: target, Header: http.Header{}, Body: http.NoBody}
		for key, value := range map[string]string{"Origin": origin, "Access-Control-Request-Method": asks, "Access-Control-Request-Headers": headers} {
			if value != "" {
				req.Header.Set(key, value)
			}
		}
		rec := httptest.NewRecorder()
		handler(t, list, drain).ServeHTTP(rec, req)

		health := u.Path == "/health" && (method == "GET" || method == "HEAD")
		switch code := rec.Code; {
		case code == 200 && health && !drain, code == 503 && health && drain:
		case code == 204 && method == "OPTIONS" && asks != "", code == 404 && !health, code == 405 && !health, code >= 300 && code < 400 && !health:
		case code == 400 && target == "*": // ServeMux's own, for what is no path
		default:
			t.Errorf("got code %d", code)
		}
		o := strings.ToLower(origin)
		listed := o == "https://a.example" || o == "http://localhost:3000" || strings.HasPrefix(o, "https://") && strings.HasSuffix(o, ".corp.example")
		if got := rec.Header().Get("Access-Control-Allow-Origin"); got != "" && (got != origin || !listed) {
			t.Errorf("got Access-Control-Allow-Origin %q for origin %q", got, origin)
		}
		if got := rec.Header()["Access-Control-Allow-Credentials"]; got != nil {
			t.Errorf("got Access-Control-Allow-Credentials %q, want none", got)
		}
	})
}

// browserOrigin is the form in which browsers send an origin, with a wildcard for
// the first label: host names and IPv6 addresses are told apart by their letters,
// names and IPv4 addresses by the last label. Groups: scheme, wildcard, host, port.
var browserOrigin = regexp.MustCompile(`^([a-z][a-z0-9+.-]*)://(\*\.)?((?:[a-z0-9_-]+\.)*[a-z0-9_-]+\.?|\[[0-9a-f:]+\])(?::([1-9][0-9]{0,4}))?$`)

// FuzzOrigins holds the allow list against browserOrigin and against the matching.
func FuzzOrigins(f *testing.F) {
	for _, entry := range []string{"*", "https://a.example", "HTTPS://A.example:8443", "https://*.corp.example", "http://[::1]:3000", "http://192.0.2.1",
		"https://a.example/", "https://a.example:443", "null", "https://*corp.example", "http://127.1", "https://a.example,https://b.example", " https://a.example ,", "https://\u212a.example"} {
		f.Add(entry)
	}
	f.Fuzz(func(t *testing.T, list string) {
		origins, err := parseOrigins(list)
		if err != nil {
			if reason := err.Error(); !strings.Contains(reason, "want ") || strings.ContainsAny(reason, "\r\n") {
				t.Errorf("%q: got reason %q, want one line that says what would be right", list, reason)
			}
			return
		}
		if strings.TrimSpace(list) == "*" {
			return
		}
		h := handler(t, list, false)
		allows := func(origin string) bool {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, &http.Request{Method: "GET", URL: &url.URL{Path: "/health"}, Header: http.Header{"Origin": {origin}}, Body: http.NoBody})
			return rec.Header().Get("Access-Control-Allow-Origin") == origin
		}
		for _, entry := range origins {
			m := browserOrigin.FindStringSubmatch(strings.ToLower(entry))
			if m == nil {
				t.Fatalf("got %q accepted, which no browser sends", entry)
			}
			scheme, wildcard, host, port := m[1], m[2], m[3], m[4]
			labels := strings.Split(strings.TrimSuffix(host, "."), ".")
			if last := labels[len(labels)-1]; host[0] != '[' && regexp.MustCompile(`^([0-9]+|0x.*)$`).MatchString(last) && (net.ParseIP(host) == nil || wildcard != "") {
				t.Errorf("got %q accepted, whose host browsers take for an IPv4 address", entry)
			}
			if n, _ := strconv.Atoi(port); n > 65535 || scheme == "http" && port == "80" || scheme == "https" && port == "443" {
				t.Errorf("got %q accepted, whose port browsers do not send", entry)
			}
			sent := strings.Replace(m[0], "*.", "a.b.", 1)
			for origin, want := range map[string]bool{sent: true, sent + "0": false, sent + "/": false, "x" + sent: false} {
				if got := allows(origin); got != want && len(origins) == 1 { // another entry may allow it
					t.Errorf("%q: got origin %q allowed %t, want %t", list, origin, got, want)
				}
			}
		}
	})
}
