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
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	healthyBody  = `{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n"
	drainingBody = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
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

func TestAnswers(t *testing.T) {
	t.Parallel()
	var healthy, draining atomic.Bool
	draining.Store(true)
	servers := map[bool]*httptest.Server{
		false: httptest.NewServer(newHandler(&healthy, []string{"*"})),
		true:  httptest.NewServer(newHandler(&draining, []string{"*"})),
	}
	for _, s := range servers {
		t.Cleanup(s.Close)
	}
	for _, tt := range []struct {
		name           string
		draining       bool
		method, target string
		accept, body   string // of the request
		wantCode       int
		wantBody       string // only compared for answers of our own
		wantLength     string
		wantAllow      string
	}{
		{name: "GET", method: "GET", target: "/health", wantCode: 200, wantBody: healthyBody, wantLength: "75"},
		{name: "HEAD", method: "HEAD", target: "/health", wantCode: 200, wantLength: "75"},
		{name: "query", method: "GET", target: "/health?verbose=1;x&%zz", wantCode: 200, wantBody: healthyBody, wantLength: "75"},
		{name: "body", method: "GET", target: "/health", body: `{"a":1}`, wantCode: 200, wantBody: healthyBody, wantLength: "75"},
		{name: "Accept XML", method: "GET", target: "/health", accept: "application/xml", wantCode: 200, wantBody: healthyBody, wantLength: "75"},
		{name: "Accept nothing", method: "GET", target: "/health", accept: "*/*;q=0", wantCode: 200, wantBody: healthyBody, wantLength: "75"},
		{name: "GET draining", draining: true, method: "GET", target: "/health", wantCode: 503, wantBody: drainingBody, wantLength: "82"},
		{name: "HEAD draining", draining: true, method: "HEAD", target: "/health", wantCode: 503, wantLength: "82"},
		{name: "POST", method: "POST", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "PUT", method: "PUT", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "PATCH", method: "PATCH", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "DELETE", method: "DELETE", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "TRACE", method: "TRACE", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "OPTIONS, no preflight", method: "OPTIONS", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "unknown method", method: "BREW", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "POST draining", draining: true, method: "POST", target: "/health", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "POST with a body", method: "POST", target: "/health", body: "x", wantCode: 405, wantAllow: "GET, HEAD"},
		{name: "root", method: "GET", target: "/", wantCode: 404},
		{name: "trailing slash", method: "GET", target: "/health/", wantCode: 404},
		{name: "healthz", method: "GET", target: "/healthz", wantCode: 404},
		{name: "upper case", method: "GET", target: "/HEALTH", wantCode: 404},
		{name: "POST elsewhere", method: "POST", target: "/", wantCode: 404},
		{name: "root draining", draining: true, method: "GET", target: "/", wantCode: 404},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			req, err := http.NewRequest(tt.method, servers[tt.draining].URL+tt.target, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Accept", tt.accept)
			resp, body := do(t, req)
			if resp.StatusCode != tt.wantCode {
				t.Errorf("code: got %d, want %d", resp.StatusCode, tt.wantCode)
			}
			if got := resp.Header.Get("Allow"); got != tt.wantAllow {
				t.Errorf("Allow: got %q, want %q", got, tt.wantAllow)
			}
			if want := tt.draining && tt.wantLength != "" || tt.body != ""; resp.Close != want {
				t.Errorf("Connection: close: got %t, want %t", resp.Close, want)
			}
			if tt.wantLength == "" {
				return
			}
			if body != tt.wantBody {
				t.Errorf("body: got %q, want %q", body, tt.wantBody)
			}
			if tt.draining && strings.Contains(strings.ToLower(body), "healthy") {
				t.Errorf("body: got %q, which a balancer that looks for \"healthy\" takes for good", body)
			}
			for key, want := range map[string]string{
				"Content-Type":   "application/json",
				"Cache-Control":  "no-store",
				"Content-Length": tt.wantLength,
				"Vary":           "Origin",
			} {
				if got := resp.Header.Get(key); got != want {
					t.Errorf("%s: got %q, want %q", key, got, want)
				}
			}
		})
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	const list = "https://a.example, http://localhost:3000 ,https://*.corp.example"
	preflightVary := "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
	for _, tt := range []struct {
		name, origins, method, origin string
		asks, headers                 string // of a preflight: method and headers
		draining                      bool
		wantCode                      int
		want                          map[string]string // every CORS header and Vary
	}{
		{name: "all", origins: "*", method: "GET", origin: "https://any.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "*"}},
		{name: "all, HEAD", origins: "*", method: "HEAD", origin: "https://any.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "*"}},
		{name: "all, draining", origins: "*", method: "GET", origin: "https://any.example", draining: true, wantCode: 503,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "*"}},
		{name: "no origin", origins: list, method: "GET", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "listed", origins: list, method: "GET", origin: "http://localhost:3000", wantCode: 200,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "http://localhost:3000"}},
		{name: "listed, draining", origins: list, method: "GET", origin: "https://a.example", draining: true, wantCode: 503,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "https://a.example"}},
		{name: "under the wildcard", origins: list, method: "GET", origin: "https://x.y.corp.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin", "Access-Control-Allow-Origin": "https://x.y.corp.example"}},
		{name: "the wildcard's own name", origins: list, method: "GET", origin: "https://corp.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "beside the wildcard", origins: list, method: "GET", origin: "https://evilcorp.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "not listed", origins: list, method: "GET", origin: "https://b.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "not listed, draining", origins: list, method: "GET", origin: "https://b.example", draining: true, wantCode: 503,
			want: map[string]string{"Vary": "Origin"}},
		{name: "other scheme", origins: list, method: "GET", origin: "http://a.example", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "null", origins: list, method: "GET", origin: "null", wantCode: 200,
			want: map[string]string{"Vary": "Origin"}},
		{name: "preflight", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "GET", headers: "authorization,x-request-id", wantCode: 204,
			want: map[string]string{"Vary": preflightVary, "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "GET",
				"Access-Control-Allow-Headers": "authorization,x-request-id", "Access-Control-Max-Age": "600"}},
		{name: "preflight, listed, draining", origins: list, method: "OPTIONS", origin: "https://a.example", asks: "HEAD", draining: true, wantCode: 204,
			want: map[string]string{"Vary": preflightVary, "Access-Control-Allow-Origin": "https://a.example", "Access-Control-Allow-Methods": "HEAD",
				"Access-Control-Max-Age": "600"}},
		{name: "preflight, not listed", origins: list, method: "OPTIONS", origin: "https://b.example", asks: "GET", wantCode: 204,
			want: map[string]string{"Vary": preflightVary}},
		{name: "preflight for DELETE", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "DELETE", wantCode: 204,
			want: map[string]string{"Vary": preflightVary}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			origins, err := parseOrigins(tt.origins)
			if err != nil {
				t.Fatal(err)
			}
			var draining atomic.Bool
			draining.Store(tt.draining)
			req := httptest.NewRequest(tt.method, "/health", nil)
			for key, value := range map[string]string{
				"Origin": tt.origin, "Access-Control-Request-Method": tt.asks, "Access-Control-Request-Headers": tt.headers,
			} {
				if value != "" {
					req.Header.Set(key, value)
				}
			}
			rec := httptest.NewRecorder()
			newHandler(&draining, origins).ServeHTTP(rec, req)
			if rec.Code != tt.wantCode {
				t.Errorf("code: got %d, want %d", rec.Code, tt.wantCode)
			}
			got := map[string]string{}
			for key := range rec.Header() {
				if key == "Vary" || strings.HasPrefix(key, "Access-Control-") {
					got[key] = strings.Join(rec.Header()[key], "; ")
				}
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("headers: got %v, want %v", got, tt.want)
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
			origins, err := parseOrigins(tt.entry)
			if err != nil {
				t.Fatalf("got error %q, want none", err)
			}
			for origin, want := range map[string]string{tt.sent: tt.sent, tt.other: ""} {
				req := httptest.NewRequest("GET", "/health", nil)
				req.Header.Set("Origin", origin)
				rec := httptest.NewRecorder()
				newHandler(new(atomic.Bool), origins).ServeHTTP(rec, req)
				if got := rec.Header().Get("Access-Control-Allow-Origin"); got != want {
					t.Errorf("for origin %s: got Access-Control-Allow-Origin %q, want %q", origin, got, want)
				}
			}
		})
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
		env  map[string]string
		want config
	}{
		{"defaults", nil, nil,
			config{port: "5034", origins: []string{"*"}, shutdownTimeout: 10 * time.Second}},
		{"empty variables", nil,
			map[string]string{"HOST": "", "PORT": "", "ALLOWED_ORIGINS": "", "DRAIN_DELAY": "", "SHUTDOWN_TIMEOUT": ""},
			config{port: "5034", origins: []string{"*"}, shutdownTimeout: 10 * time.Second}},
		{"variables", nil,
			map[string]string{"HOST": "[::1]", "PORT": "0", "ALLOWED_ORIGINS": " https://a.example , https://b.example ", "DRAIN_DELAY": "15s", "SHUTDOWN_TIMEOUT": "1m30s", "PROBE": "true"},
			config{host: "::1", port: "0", origins: []string{"https://a.example", "https://b.example"}, drainDelay: 15 * time.Second, shutdownTimeout: 90 * time.Second}},
		{"flags beat variables, wrong ones too",
			[]string{"-host", "", "-port=65535", "-allowed-origins", "*", "--drain-delay", "0s", "-shutdown-timeout", "500ms", "-probe"},
			map[string]string{"HOST": "192.0.2.1", "PORT": "x", "ALLOWED_ORIGINS": "null", "DRAIN_DELAY": "1", "SHUTDOWN_TIMEOUT": "-1s"},
			config{port: "65535", origins: []string{"*"}, shutdownTimeout: 500 * time.Millisecond, probe: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, _, err := parse(tt.args, func(key string) string { return tt.env[key] })
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
				refused(t, []string{"-host", "192.0.2.1", "-" + tt.flag, value}, nil, "flag -"+tt.flag, fmt.Sprintf("%q", value), tt.want)
				refused(t, []string{"-host", "192.0.2.1"}, map[string]string{variable: value}, "variable "+variable, fmt.Sprintf("%q", value), tt.want)
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
			refused(t, tt.args, map[string]string{"HOST": "192.0.2.1"}, tt.want...)
		})
	}
}

// refused checks that the program ends with code 2 and one line that has all of want.
func refused(t *testing.T, args []string, env map[string]string, want ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := run(args, func(key string) string { return env[key] }, &stdout, &stderr); code != 2 {
		t.Errorf("%q %v: got exit code %d, want 2", args, env, code)
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
		for _, want := range []string{"-host", "[HOST]", "-port", "[PORT] (default 5034)", "-allowed-origins", "[ALLOWED_ORIGINS] (default *)",
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
	for _, tt := range []struct{ name, host, port, want string }{
		{"port in use", "127.0.0.1", port, "in use"},
		{"address of another machine", "192.0.2.1", "0", "192.0.2.1"},
		{"no such host", "no host", "0", "no host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stderr bytes.Buffer
			code := run([]string{"-host", tt.host, "-port", tt.port}, func(string) string { return "" }, io.Discard, &stderr)
			line := stderr.String()
			if code != 1 || strings.Count(line, "\n") != 1 || !strings.Contains(line, tt.want) || !strings.Contains(line, "-port (PORT)") {
				t.Errorf("got exit code %d and %q, want 1 and one line with %q and the flags to change", code, line, tt.want)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	hung := make(chan struct{})
	t.Cleanup(func() { close(hung) })
	var healthy, draining atomic.Bool
	draining.Store(true)
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		host    string
		want    int
		says    string
	}{
		{"healthy", newHandler(&healthy, nil).ServeHTTP, "127.0.0.1", 0, "200 OK: " + strings.TrimSpace(healthyBody)},
		{"empty host", newHandler(&healthy, nil).ServeHTTP, "", 0, "http://127.0.0.1:"},
		{"unspecified IPv4 host", newHandler(&healthy, nil).ServeHTTP, "0.0.0.0", 0, "http://127.0.0.1:"},
		{"unspecified IPv6 host", newHandler(&healthy, nil).ServeHTTP, "::", 0, "http://127.0.0.1:"},
		{"draining", newHandler(&draining, nil).ServeHTTP, "127.0.0.1", 1, "503 Service Unavailable: " + strings.TrimSpace(drainingBody)},
		{"another program", http.NotFound, "127.0.0.1", 1, "404 Not Found: 404 page not found: want 200"},
		{"204", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }, "127.0.0.1", 1, "204 No Content"},
		{"redirect to 200", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				http.Redirect(w, r, "/", http.StatusFound)
			}
		}, "127.0.0.1", 1, "302 Found"},
		{"many lines", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(500)
			io.WriteString(w, strings.Repeat("a\r\n\n", 1000))
		}, "127.0.0.1", 1, "500 Internal Server Error: a a a"},
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

// TestServe runs the life of the process inside the test, where coverage sees it.
func TestServe(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
		want string // error; none if empty
	}{
		{"one signal", nil, ""},
		{"two signals", []string{"-drain-delay", "1h"}, "second signal: interrupt"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, _, err := parse(append(tt.args, "-host", "127.0.0.1", "-port", "0"), func(string) string { return "" })
			if err != nil {
				t.Fatal(err)
			}
			signals := make(chan os.Signal, 2)
			signals <- syscall.SIGTERM
			if tt.want != "" {
				signals <- os.Interrupt
			}
			if err := serve(c, signals, slog.New(slog.DiscardHandler)); fmt.Sprint(err) != cmp.Or(tt.want, "<nil>") {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
}

// process is the program in a process of its own: the test binary again, which
// TestMain turns into main.
type process struct {
	*exec.Cmd
	addr, url string      // as it logs them
	log       chan string // its standard error by lines, closed at the end
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
	return startCmd(t, command(t, append([]string{"HOST=127.0.0.1", "PORT=0"}, env...), args...))
}

func startCmd(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, log: make(chan string, 100)}
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
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
func (p *process) waitFor(t testing.TB, text string) string {
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

// half sends half a request and returns once the program has accepted it, with
// what sends the other half and returns the answer.
func (p *process) half(t *testing.T) (rest func() *http.Response) {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: a.exa")
	p.get(t, "/health") // accepted in order, so conn has been too
	return func() *http.Response {
		t.Helper()
		io.WriteString(conn, "mple\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("other half: got error %v, want an answer", err)
		}
		return resp
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

func TestSignalEndsProcess(t *testing.T) {
	t.Parallel()
	for _, s := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			p := start(t, nil)
			for range 3 {
				p.get(t, "/health")
			}
			p.signal(t, s)
			code, log := p.exit(t)
			if code != 0 {
				t.Errorf("got exit code %d, want 0", code)
			}
			if len(log) != 2 || !strings.Contains(log[0], "msg=draining") || !strings.Contains(log[0], "delay=0s") || !strings.Contains(log[1], "msg=stopped") {
				t.Errorf("got log %q, want only a line for draining, with the delay, and one for stopped", log)
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

func TestDrain(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"DRAIN_DELAY=1s", "ALLOWED_ORIGINS=https://a.example"})
	if resp, body := p.get(t, "/health"); resp.StatusCode != 200 || body != healthyBody {
		t.Errorf("before: got %d %q, want 200 %q", resp.StatusCode, body, healthyBody)
	}
	rest := p.half(t)
	p.signal(t, syscall.SIGTERM)
	if line := p.waitFor(t, "msg=draining"); !strings.Contains(line, "delay=1s") {
		t.Errorf("got log line %q, want the delay of 1s", line)
	}
	began := time.Now()
	resp, body := p.get(t, "/health")
	if resp.StatusCode != 503 || body != drainingBody || !resp.Close {
		t.Errorf("draining: got %d %q, Connection: close %t; want 503 %q, true", resp.StatusCode, body, resp.Close, drainingBody)
	}
	if got := resp.Header.Get("Access-Control-Allow-Origin"); got != "https://a.example" {
		t.Errorf("draining: got Access-Control-Allow-Origin %q, want the page's origin", got)
	}
	if resp, _ := p.get(t, "/"); resp.StatusCode != 404 || resp.Close {
		t.Errorf("draining, other path: got %d, Connection: close %t; want 404, false", resp.StatusCode, resp.Close)
	}
	if resp := rest(); resp.StatusCode != 503 {
		t.Errorf("half-sent request: got %d, want 503", resp.StatusCode)
	}
	p.closed(t)
	if got := time.Since(began); got < 900*time.Millisecond {
		t.Errorf("the listener closed after %v, want the drain delay of 1s", got)
	}
	if code, log := p.exit(t); code != 0 {
		t.Errorf("got exit code %d and log %q, want 0", code, log)
	}
}

func TestHalfSentRequestOutlivesListener(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	rest := p.half(t)
	p.signal(t, syscall.SIGTERM)
	p.closed(t)
	if resp := rest(); resp.StatusCode != 503 {
		t.Errorf("got %d, want 503", resp.StatusCode)
	}
	if code, log := p.exit(t); code != 0 {
		t.Errorf("got exit code %d and log %q, want 0", code, log)
	}
}

// TestIdleConnectionIsClosed leaves a connection open that would outlive the
// shutdown timeout.
func TestIdleConnectionIsClosed(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"SHUTDOWN_TIMEOUT=2s"})
	client := http.Client{Timeout: patience}
	resp, err := client.Get("http://" + p.addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	p.signal(t, syscall.SIGTERM)
	if code, log := p.exit(t); code != 0 {
		t.Errorf("got exit code %d and log %q, want 0", code, log)
	}
}

func TestShutdownTimeout(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"SHUTDOWN_TIMEOUT=50ms"})
	p.half(t)
	p.signal(t, syscall.SIGTERM)
	code, log := p.exit(t)
	if code != 1 || len(log) != 2 || !strings.Contains(log[1], "SHUTDOWN_TIMEOUT") {
		t.Errorf("got exit code %d and log %q, want 1 and a last line that names SHUTDOWN_TIMEOUT", code, log)
	}
}

func TestSecondSignal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		env    []string
		second os.Signal
	}{
		{"in the drain delay", []string{"DRAIN_DELAY=1h"}, syscall.SIGTERM},
		{"Ctrl-C after SIGTERM", []string{"DRAIN_DELAY=1h"}, os.Interrupt},
		{"in the shutdown", []string{"SHUTDOWN_TIMEOUT=1h"}, syscall.SIGTERM},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, tt.env)
			p.half(t)
			p.signal(t, syscall.SIGTERM)
			p.waitFor(t, "msg=draining")
			p.signal(t, tt.second)
			code, log := p.exit(t)
			if code != 1 || len(log) != 1 || !strings.Contains(log[0], "second signal: "+tt.second.String()) {
				t.Errorf("got exit code %d and log %q, want 1 and the second signal", code, log)
			}
		})
	}
}

func TestHeaderLimit(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	for size, want := range map[int]int{15 << 10: 200, 21 << 10: 431} { // net/http adds 4 KiB to the limit
		req, err := http.NewRequest("GET", "http://"+p.addr+"/health", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Cookie", strings.Repeat("x", size))
		if resp, _ := do(t, req); resp.StatusCode != want {
			t.Errorf("%d bytes of headers: got %d, want %d", size, resp.StatusCode, want)
		}
	}
}

// TestHostileClients sends what no HTTP library would: each gets a 4xx or a closed
// connection, at once, and the next client its answer.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	const get = "GET /health HTTP/1.1\r\nHost: a.example\r\n"
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
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			go io.WriteString(conn, tt.raw) // the program may answer and close before it has read all
			answers := bufio.NewReader(conn)
			for i, want := range tt.want {
				resp, err := http.ReadResponse(answers, nil)
				if err != nil {
					t.Fatalf("answer %d: got error %v, want %d", i, err, want)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != want {
					t.Errorf("answer %d: got %d and error %v, want %d", i, resp.StatusCode, err, want)
				}
			}
			switch tt.then {
			case "closed":
				if n, err := answers.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("got %d bytes more and error %v, want a closed connection", n, err)
				}
			case "kept":
				io.WriteString(conn, get+"\r\n")
				if resp, err := http.ReadResponse(answers, nil); err != nil || resp.StatusCode != 200 {
					t.Errorf("got %v and error %v, want one more answer", resp, err)
				}
			}
			if resp, _ := p.get(t, "/health"); resp.StatusCode != 200 {
				t.Errorf("next client: got %d, want 200", resp.StatusCode)
			}
		})
	}
}

// discard is a ResponseWriter that costs nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

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
	origins, err := parseOrigins(tt.origins)
	if err != nil {
		tb.Fatal(err)
	}
	var draining atomic.Bool
	draining.Store(tt.draining)
	handler := newHandler(&draining, origins)
	req := httptest.NewRequest(tt.method, "/health", nil)
	req.Header = tt.header
	w := discard{http.Header{}}
	return func() {
		clear(w.header)
		handler.ServeHTTP(w, req)
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

// floorSource is the least that net/http needs to send the same bytes: no mux, no
// CORS, no timeouts. With LIMITS set it has the service's timeouts.
const floorSource = `package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
)

func main() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(os.Stderr, "msg=listening addr="+ln.Addr().String())
	body := []byte("{\"status\":\"healthy\",\"message\":\"WhatsApp Contact Processor API is running\"}\n")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h["Cache-Control"], h["Content-Length"], h["Content-Type"], h["Vary"] = []string{"no-store"}, []string{"75"}, []string{"application/json"}, []string{"Origin"}
		w.Write(body)
	})}
	if os.Getenv("LIMITS") != "" {
		server.ReadHeaderTimeout, server.ReadTimeout, server.WriteTimeout, server.IdleTimeout = 5e9, 10e9, 10e9, 120e9
	}
	panic(server.Serve(ln))
}
`

// BenchmarkProgram measures the built program beside the floor.
func BenchmarkProgram(b *testing.B) {
	dir := b.TempDir()
	source := filepath.Join(dir, "floor.go")
	if err := os.WriteFile(source, []byte(floorSource), 0o600); err != nil {
		b.Fatal(err)
	}
	for impl, what := range map[string]string{"floor": source, "service": "."} {
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, impl), what)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
	run := func(b *testing.B, impl string) *process {
		cmd := exec.Command(filepath.Join(dir, impl))
		cmd.Env = []string{"HOST=127.0.0.1", "PORT=0"}
		if impl == "limits" {
			cmd.Path, cmd.Env = filepath.Join(dir, "floor"), []string{"LIMITS=1"}
		}
		return startCmd(b, cmd)
	}
	for _, measure := range []struct {
		name string
		of   func(b *testing.B, impl string)
	}{
		{"start", func(b *testing.B, impl string) { // from exec to the first answer
			for b.Loop() {
				p := run(b, impl)
				connect(b, p.addr)
				b.StopTimer()
				p.Process.Kill()
				p.Wait()
				b.StartTimer()
			}
		}},
		{"request", func(b *testing.B, impl string) { // on 16 kept connections for each core
			p := run(b, impl)
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for request := connect(b, p.addr); pb.Next(); {
					request()
				}
			})
		}},
		{"memory", func(b *testing.B, impl string) { // resident, at rest and with 1,000 idle connections
			p := run(b, impl)
			connect(b, p.addr)
			b.ReportMetric(resident(b, p), "rest-B")
			for range 1000 {
				connect(b, p.addr)
			}
			b.ReportMetric(resident(b, p), "idle1000-B")
			b.ReportMetric(0, "ns/op")
		}},
	} {
		for _, impl := range []string{"floor", "limits", "service"} {
			b.Run(measure.name+"/impl="+impl, func(b *testing.B) { measure.of(b, impl) })
		}
	}
}

// connect opens a connection for the length of the benchmark, sends a first request
// on it and returns what sends the next, with next to no work of its own.
func connect(b *testing.B, addr string) (request func()) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Error(err)
		return func() {}
	}
	b.Cleanup(func() { conn.Close() })
	raw := []byte("GET /health HTTP/1.1\r\nHost: a.example\r\n\r\n")
	answer := make([]byte, 1024)
	request = func() {
		conn.Write(raw)
		n, err := conn.Read(answer) // one write of net/http, so one read
		if err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 200 OK\r\n")) || !bytes.HasSuffix(answer[:n], []byte("running\"}\n")) {
			b.Errorf("got %q and error %v, want a whole answer", answer[:n], err)
		}
	}
	request()
	return request
}

// resident returns the bytes of memory that a process really occupies.
func resident(b *testing.B, p *process) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		b.Skip("resident memory is read from Linux's /proc")
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		b.Fatal(err)
	}
	return float64(kib) * 1024
}

// FuzzHandler sends any request that net/http can hand to the handler.
func FuzzHandler(f *testing.F) {
	const list = "https://a.example,http://localhost:3000,https://*.corp.example"
	f.Add("GET", "/health", "https://a.example", "", "", false, false)
	f.Add("HEAD", "/health", "https://x.corp.example", "", "", true, false)
	f.Add("OPTIONS", "/health", "http://localhost:3000", "GET", "authorization,x-request-id", false, false)
	f.Add("OPTIONS", "/health", "https://any.example", "GET", "x", true, true)
	f.Add("OPTIONS", "*", "null", "DELETE", "", false, true)
	f.Add("POST", "/health", "https://b.example", "", "", true, true)
	f.Add("CONNECT", "/health", "https://corp.example", "", "", false, false)
	f.Add("GET", "//health/../%2e/?a;b", "https://a.example/", "", "", false, false)
	f.Add("GET", "http://b.example/health", "HTTPS://A.EXAMPLE", "PUT", ",,", true, false)
	origins, err := parseOrigins(list)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, target, origin, asks, headers string, drain, all bool) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			t.Skip("net/http answers 400")
		}
		var draining atomic.Bool
		draining.Store(drain)
		allowed := origins
		if all {
			allowed = []string{"*"}
		}
		req := &http.Request{Method: method, URL: u, Host: "a.example", RequestURI: target, Header: http.Header{}, Body: http.NoBody}
		for key, value := range map[string]string{"Origin": origin, "Access-Control-Request-Method": asks, "Access-Control-Request-Headers": headers} {
			if value != "" {
				req.Header.Set(key, value)
			}
		}
		rec := httptest.NewRecorder()
		newHandler(&draining, allowed).ServeHTTP(rec, req)

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
		switch got := rec.Header().Get("Access-Control-Allow-Origin"); {
		case got == "", got == "*" && all && origin != "", got == origin && !all && listed:
		default:
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
		handler := newHandler(new(atomic.Bool), origins)
		allows := func(origin string) bool {
			rec := httptest.NewRecorder()
			handler.ServeHTTP(rec, &http.Request{Method: "GET", URL: &url.URL{Path: "/health"}, Header: http.Header{"Origin": {origin}}, Body: http.NoBody})
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
			if port != "" {
				port = ":" + port
			}
			want, not := []string{scheme + "://" + host + port}, []string{scheme + "s://" + host + port, "x" + scheme + "://" + host + port, scheme + "://" + host + port + "0", scheme + "://" + host + port + "/", scheme + "://x" + host + port}
			if wildcard != "" {
				want, not = []string{scheme + "://a." + host + port, scheme + "://a.b." + host + port}, append(not, want[0])
			}
			if len(origins) > 1 {
				not = nil // another entry may allow it
			}
			for _, origin := range want {
				if !allows(origin) {
					t.Errorf("%q: got origin %q blocked, want it allowed", list, origin)
				}
			}
			for _, origin := range not {
				if allows(origin) {
					t.Errorf("%q: got origin %q allowed, want it blocked", list, origin)
				}
			}
		}
	})
}
