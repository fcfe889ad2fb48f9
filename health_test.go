package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
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
	"os/signal"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// What a client reads, byte for byte.
const (
	wantHealthy  = `{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n"
	wantDraining = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
)

// get is a request without its last line end.
const get = "GET /health HTTP/1.1\r\nHost: a.example\r\n"

// patience bounds every wait for something that takes milliseconds.
const patience = 10 * time.Second

// TestMain lets the test binary be the program: see start. Where TEST_DNS is set, no DNS server
// answers it.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_DNS") != "" {
		silent := func(ctx context.Context, _, _ string) (net.Conn, error) {
			fmt.Fprintln(os.Stderr, "asking DNS")
			<-ctx.Done()
			return nil, ctx.Err()
		}
		net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: silent}
	}
	if os.Getenv("TEST_BE_THE_PROGRAM") != "" {
		main()
	}
	catchIgnored()
	os.Exit(m.Run())
}

// catchIgnored keeps children from ignoring the signals that this process ignores, as under nohup.
func catchIgnored() {
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
}

// Requests in, answers out.

func TestAnswers(t *testing.T) {
	t.Parallel()
	const gone, plain, json = "/no-such-path", "text/plain; charset=utf-8", "application/json"
	for _, tt := range []struct {
		name, method, target string
		accept, body         string // of the request
		draining             bool
		wantCode             int
		wantType, wantBody   string
		wantAllow            string
	}{
		{name: "GET", method: "GET", target: "/health", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "HEAD", method: "HEAD", target: "/health", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "query", method: "GET", target: "/health?verbose=1;x&%zz", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "escaped", method: "GET", target: "/%68ealth", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "body", method: "GET", target: "/health", body: `{"a":1}`, wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "Accept XML", method: "GET", target: "/health", accept: "application/xml", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "Accept nothing", method: "GET", target: "/health", accept: "*/*;q=0", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "POST", method: "POST", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "POST with a body", method: "POST", target: "/health", body: "x", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "TRACE", method: "TRACE", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "OPTIONS, no preflight", method: "OPTIONS", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "unknown method", method: "BREW", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "root", method: "GET", target: "/", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "trailing slash", method: "GET", target: "/health/", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "healthz", method: "GET", target: "/healthz", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "upper case", method: "GET", target: "/HEALTH", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "POST elsewhere", method: "POST", target: gone, wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "GET draining", method: "GET", target: "/health", draining: true, wantCode: 503, wantType: json, wantBody: wantDraining},
		{name: "HEAD draining", method: "HEAD", target: "/health", draining: true, wantCode: 503, wantType: json, wantBody: wantDraining},
		{name: "POST draining", method: "POST", target: "/health", draining: true, wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "elsewhere draining", method: "GET", target: gone, draining: true, wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(handler(t, "*", tt.draining))
			t.Cleanup(server.Close)
			req, err := http.NewRequest(tt.method, server.URL+tt.target, strings.NewReader(tt.body))
			noError(t, err)
			req.Header.Set("Accept", tt.accept)
			resp, body := do(t, req)
			if resp.StatusCode != tt.wantCode {
				t.Errorf("code: got %d, want %d", resp.StatusCode, tt.wantCode)
			}
			if want := tt.draining || tt.body != ""; resp.Close != want {
				t.Errorf("Connection: close: got %t, want %t", resp.Close, want)
			}
			for key, want := range map[string]string{
				"Allow": tt.wantAllow, "Cache-Control": "no-store", "Content-Length": strconv.Itoa(len(tt.wantBody)), "Content-Type": tt.wantType, "Vary": "Origin",
			} {
				if got := resp.Header.Get(key); got != want {
					t.Errorf("%s: got %q, want %q", key, got, want)
				}
			}
			if want := tt.wantBody; tt.method != "HEAD" && body != want || tt.method == "HEAD" && body != "" {
				t.Errorf("body: got %q, want %q, and none for HEAD", body, want)
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
		{name: "all", origins: "*", method: "GET", origin: "https://any.example", wantCode: 200, wantOrigin: "*"},
		{name: "all, draining", origins: "*", method: "GET", origin: "https://any.example", draining: true, wantCode: 503, wantOrigin: "*"},
		{name: "no origin", origins: list, method: "GET", wantCode: 200},
		{name: "listed", origins: list, method: "GET", origin: "http://localhost:3000", wantCode: 200, wantOrigin: "http://localhost:3000"},
		{name: "listed, draining", origins: list, method: "GET", origin: "https://a.example", draining: true, wantCode: 503, wantOrigin: "https://a.example"},
		{name: "the wildcard's own name", origins: list, method: "GET", origin: "https://corp.example", wantCode: 200},
		{name: "beside the wildcard", origins: list, method: "GET", origin: "https://evilcorp.example", wantCode: 200},
		{name: "not listed", origins: list, method: "GET", origin: "https://b.example", wantCode: 200},
		{name: "null", origins: list, method: "GET", origin: "null", wantCode: 200},
		{name: "a method of no route, which rs/cors leaves alone", origins: "*", method: "BREW", origin: "https://any.example", wantCode: 405},
		{name: "preflight", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "GET", headers: "authorization,x-request-id", wantCode: 204, wantOrigin: "*"},
		{name: "preflight, listed, draining", origins: list, method: "OPTIONS", origin: "https://a.example", draining: true, asks: "HEAD", wantCode: 204, wantOrigin: "https://a.example"},
		{name: "preflight, not listed", origins: list, method: "OPTIONS", origin: "https://b.example", asks: "GET", wantCode: 204},
		{name: "preflight for a method of no route", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "BREW", wantCode: 204},
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
		{"http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080", "http://[2001:db8::1]"},
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

// TestNextRoute adds a route that reads its body, as whoever carries on will. Its body comes
// later than one that nobody reads may, and has more lines than headers may have.
func TestNextRoute(t *testing.T) {
	t.Parallel()
	mux := routes(func() bool { return false })
	mux.HandleFunc("POST /no-such-path", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%d bytes, error %v", len(body), err)
	})
	addr, ln := serveOn(t, 1, newHandler(mux, []string{"*"}, func() bool { return false }))
	body := strings.Repeat("a\n", 10_000)
	c := dial(t, addr, "POST /no-such-path HTTP/1.1\r\nHost: a.example\r\n")
	c.send(t, fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)))
	time.Sleep(300 * time.Millisecond) // longer than a body has that nobody reads
	ln.closeIdle()                     // as a drain does
	c.send(t, body)
	if _, got := c.wantAnswer(t, 200); got != fmt.Sprintf("%d bytes, error <nil>", len(body)) {
		t.Errorf("got %q, want the whole body read", got)
	}
	c.wantClosed(t)
}

// Settings.

func TestConfig(t *testing.T) {
	t.Parallel()
	defaults := config{port: "5034", maxConnections: 1000, origins: []string{"*"}, shutdownTimeout: 10 * time.Second}
	host := func(host string) config {
		c := defaults
		c.host = host
		return c
	}
	for _, tt := range []struct {
		name string
		args []string
		env  map[string]string
		want config
	}{
		{name: "defaults", want: defaults},
		{name: "empty variables",
			env:  map[string]string{"HOST": "", "PORT": "", "MAX_CONNECTIONS": "", "ALLOWED_ORIGINS": "", "DRAIN_DELAY": "", "SHUTDOWN_TIMEOUT": ""},
			want: defaults},
		{name: "variables",
			env:  map[string]string{"HOST": "[::1]", "PORT": "0", "MAX_CONNECTIONS": "1", "ALLOWED_ORIGINS": " https://a.example , https://b.example ", "DRAIN_DELAY": "15s", "SHUTDOWN_TIMEOUT": "1m30s", "PROBE": "true"},
			want: config{host: "::1", port: "0", maxConnections: 1, origins: []string{"https://a.example", "https://b.example"}, drainDelay: 15 * time.Second, shutdownTimeout: 90 * time.Second}},
		{name: "flags beat variables, wrong ones too",
			args: []string{"-host", "", "-port=65535", "-max-connections", "20000", "-allowed-origins", "*", "--drain-delay", "0s", "-shutdown-timeout", "24h", "-probe"},
			env:  map[string]string{"HOST": "http://x", "PORT": "x", "MAX_CONNECTIONS": "0", "ALLOWED_ORIGINS": "null", "DRAIN_DELAY": "1", "SHUTDOWN_TIMEOUT": "-1s"},
			want: config{port: "65535", maxConnections: 20000, origins: []string{"*"}, shutdownTimeout: 24 * time.Hour, probe: true}},
		{name: "unspecified IPv4", args: []string{"-host", "0.0.0.0"}, want: host("0.0.0.0")},
		{name: "unspecified IPv6 in brackets", args: []string{"-host", "[::]"}, want: host("::")},
		{name: "zone", args: []string{"-host", "fe80::1%eth0"}, want: host("fe80::1%eth0")},
		{name: "zone in brackets", args: []string{"-host", "[fe80::1%eth0]"}, want: host("fe80::1%eth0")},
		{name: "name", args: []string{"-host", "my_host-1"}, want: host("my_host-1")},
		{name: "name with a dot behind", args: []string{"-host", "A.Example."}, want: host("A.Example.")},
		{name: "name that begins with a number", args: []string{"-host", "1.a"}, want: host("1.a")},
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

// TestBadInput gives each of settings wrong values of every kind, as flag and as variable. The host
// is not of this machine, so that a value which passes by mistake ends in exit code 1 and not in
// a server.
func TestBadInput(t *testing.T) {
	t.Parallel()
	const elsewhere = "192.0.2.1"
	const wantFlag = "want -probe alone, or another flag with its value, as -port 5034; -h lists the flags"
	table := []struct {
		flag   string
		want   string // the beginning of what would be right
		values []string
	}{
		{flag: "host", want: "want an IP address or a host name", values: []string{
			"127.0.0.1\r", "0.0.0.0 ", " ", `"0.0.0.0"`, "'::'", "127.1", "1.2.3.4.5", "01.2.3.4", "0x7f.1", "256.0.0.1", "[::1", "::1]", "[]", "[a.example]", "[::1]:80",
			"http://localhost", "localhost:5034", "localhost/", "a b", "a..b", ".a", "bücher.example", "*", "no host", "a\x1b[2Kb"}},
		{flag: "port", want: "want a port number from 0 to 65535", values: []string{"x", "-1", "65536", "+80", "0x50", "80 ", "80\r", "http", "1.5"}},
		{flag: "max-connections", want: "want an integer of 1 or more", values: []string{"0", "-1", "1.5", "1k", "ten", " 1", "1\r", "9223372036854775808"}},
		{flag: "drain-delay", want: "want a duration from 0s to 24h", values: []string{"5", "0", "-0", "-1s", "x", "1", "s", "1d", "5 s", "5s\r"}},
		{flag: "shutdown-timeout", want: "want a duration from 0s to 24h", values: []string{"10", "0", "-1ns", "soon", `"10s"`, "24h0m0.000000001s", "2562047h47m16.854775807s", "99999999999h"}},
		{flag: "allowed-origins", want: "want commas between origins", values: []string{"https://a.example https://b.example", "https://a.example;https://b.example", "https://a b.example"}},
		{flag: "allowed-origins", want: "want the scheme://host[:port] of a page, with a number for the port", values: []string{
			"https://a.example:*", "example.com", "localhost:3000", "null", "https://", "https://:8080", "//a.example",
			"https://a.example,", ",https://a.example", "https://a.example,,https://b.example", " ", "*,https://a.example", "*,*", `"https://a.example"`,
			"ws://a.example", "wss://a.example", "ftp://a.example", "file:///x", "file://a.example", "https://a.example:x", "https://%41.example", "https://[a.example]", "http://[192.0.2.1]"}},
		{flag: "allowed-origins", want: "want https://a.example, as browsers send it", values: []string{
			"https://a.example/", "https://a.example/x", "https://a.example?q", "https://a.example?", "https://a.example#f", "https://a.example#",
			"https://u@a.example", "https://u:p@a.example", "https://a.example:443", "https://a.example:", "https://a.example:0443"}},
		{flag: "allowed-origins", want: "want http://a.example, as browsers send it", values: []string{"http://a.example:80"}},
		{flag: "allowed-origins", want: "want http://a.example:8080, as browsers send it", values: []string{"http://a.example:08080"}},
		{flag: "allowed-origins", want: "want http://[2001:db8::1], as browsers send it", values: []string{"http://[2001:db8:0::1]"}},
		{flag: "allowed-origins", want: "want a port number from 1 to 65535", values: []string{"https://a.example:65536", "https://a.example:0", "https://a.example:99999999999999999999"}},
		{flag: "allowed-origins", want: "want a host of ASCII letters", values: []string{
			"https://bücher.example", "https://*corp.example", "https://a*.corp.example", "https://*.*.corp.example", "https://a.*.example", "https://*", "https://*.",
			"https://a..example", "https://.a.example", "https://*.192.0.2.1", "http://127.1", "http://0x7f.1", "http://1.2.3.4.", "http://0x7f000001", "http://[fe80::1%25lo]", "http://[::ffff:102:304]", "https://a!.example"}},
	}
	untested := map[string]bool{}
	for _, s := range settings(&config{}) {
		untested[s.name] = true
	}
	for _, tt := range table {
		delete(untested, tt.flag)
		variable := strings.ToUpper(strings.ReplaceAll(tt.flag, "-", "_"))
		for _, value := range tt.values {
			t.Run(tt.flag+"="+value, func(t *testing.T) {
				t.Parallel()
				quoted := fmt.Sprintf("%q", value)
				fails(t, exitUsage, []string{"-host", elsewhere, "-" + tt.flag, value}, nil, "flag -"+tt.flag, quoted, tt.want)
				env := map[string]string{"HOST": elsewhere}
				env[variable] = value
				fails(t, exitUsage, nil, env, "variable "+variable, quoted, tt.want)
				fails(t, exitUsage, []string{"-probe"}, env, "variable "+variable, quoted, tt.want)
			})
		}
	}
	if len(untested) > 0 {
		t.Errorf("got no wrong values for %v, want some for each setting", untested)
	}
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"unknown flag", []string{"-prot", "80"}, []string{"-prot", wantFlag}},
		{"unknown flag that moves the cursor", []string{"-pr\r\n\x1b[2Kot"}, []string{"-pr [2Kot", wantFlag}},
		{"no value", []string{"-port"}, []string{"-port", wantFlag}},
		{"empty list", []string{"-allowed-origins", ""}, []string{"flag -allowed-origins", `""`, "want"}},
		{"bad probe", []string{"-probe=maybe"}, []string{"-probe", `"maybe"`, wantFlag}},
		{"probe of any port", []string{"-probe", "-port", "00"}, []string{"-probe wants the -port (PORT) that the service listens on"}},
		{"stray argument", []string{"serve"}, []string{`"serve"`, "want only flags"}},
		{"stray argument behind flags", []string{"-port", "80", "serve"}, []string{`"serve"`, "want only flags"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			fails(t, exitUsage, tt.args, map[string]string{"HOST": elsewhere}, tt.want...)
		})
	}
}

// fails checks that the program ends with code and one line that has all of want.
func fails(t *testing.T, code int, args []string, env map[string]string, want ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	getenv := func(key string) string { return env[key] }
	if got := run(args, getenv, &stdout, &stderr); got != code {
		t.Errorf("%q %v: got exit code %d, want %d", args, env, got, code)
	}
	line := stderr.String()
	if strings.Count(line, "\n") != 1 || strings.ContainsAny(line, "\r\x1b") || stdout.Len() > 0 {
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
		code := run([]string{arg}, func(string) string { return "" }, &stdout, &stderr)
		if code != 0 || stderr.Len() > 0 {
			t.Errorf("%s: got exit code %d and errors %q, want 0 and none", arg, code, stderr.String())
		}
		help := stdout.String()
		wants := []string{"  -probe\n"}
		for _, s := range settings(&config{}) {
			shown := strings.TrimSuffix(" ["+s.variable()+"] (default "+s.value+")", " (default )")
			wants = append(wants, "  -"+s.name+" ", shown+"\n")
		}
		for _, want := range wants {
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
	fails(t, exitFailure, []string{"-host", "127.0.0.1", "-port", port}, nil, "in use", change)
	fails(t, exitFailure, []string{"-host", "192.0.2.1", "-port", "0"}, nil, `"192.0.2.1"`, change) // another machine's
	fails(t, exitFailure, []string{"-host", "nobody.invalid", "-port", "0"}, nil, `"nobody.invalid"`, change)
}

// The probe.

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
	half := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-hung
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		host    string // 127.0.0.1 if empty
		env     string // of HOST, if not host
		want    int
		says    string
	}{
		{name: "healthy", handler: healthy.ServeHTTP, want: 0, says: "200 OK: " + strings.TrimSpace(wantHealthy)},
		{name: "empty host", handler: healthy.ServeHTTP, env: "-", want: 0, says: "http://127.0.0.1:"},
		{name: "unspecified IPv4 host", handler: healthy.ServeHTTP, env: "0.0.0.0", want: 0, says: "http://127.0.0.1:"},
		{name: "unspecified IPv6 host", handler: healthy.ServeHTTP, env: "::", want: 0, says: "http://127.0.0.1:"},
		{name: "IPv6", handler: healthy.ServeHTTP, host: "::1", want: 0, says: "http://[::1]:"},
		{name: "IPv6 in brackets", handler: healthy.ServeHTTP, host: "::1", env: "[::1]", want: 0, says: "http://[::1]:"},
		{name: "IPv6 with a zone", handler: healthy.ServeHTTP, host: "::1", env: "::1%lo", want: 0, says: "http://[::1%25lo]:"},
		{name: "draining", handler: draining.ServeHTTP, want: 1, says: "503 Service Unavailable: " + strings.TrimSpace(wantDraining)},
		{name: "another program", handler: http.NotFound, want: 1, says: "404 Not Found: 404 page not found: want 200"},
		{name: "204", handler: answer(204, ""), want: 1, says: "204 No Content"},
		{name: "redirect", handler: http.RedirectHandler("/", http.StatusFound).ServeHTTP, want: 1, says: "302 Found"},
		{name: "many lines", handler: answer(500, strings.Repeat("a\r\n\x1b\n", 1000)), want: 1, says: "500 Internal Server Error: a a a"},
		{name: "no answer", handler: func(http.ResponseWriter, *http.Request) { <-hung }, want: 1, says: "Client.Timeout"},
		{name: "half an answer", handler: half, want: 1, says: "200 OK: context deadline exceeded"},
		{name: "nobody there", want: 1, says: "refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan string, 2)
			ln, err := net.Listen("tcp", net.JoinHostPort(cmp.Or(tt.host, "127.0.0.1"), "0"))
			if err != nil {
				t.Skip("this machine has no such address: ", err)
			}
			if tt.handler == nil {
				ln.Close()
			}
			go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked <- r.Method + " " + r.URL.Path
				tt.handler(w, r)
			}))
			t.Cleanup(func() { ln.Close() })
			_, port, _ := net.SplitHostPort(ln.Addr().String())
			env := map[string]string{"HOST": strings.Trim(cmp.Or(tt.env, tt.host, "127.0.0.1"), "-"), "PORT": port}
			var stdout, stderr bytes.Buffer
			if code := run([]string{"-probe"}, func(key string) string { return env[key] }, &stdout, &stderr); code != tt.want {
				t.Errorf("got exit code %d, want %d", code, tt.want)
			}
			said, silent := &stdout, &stderr
			if tt.want != 0 {
				said, silent = &stderr, &stdout
			}
			line := said.String()
			if strings.Count(line, "\n") != 1 || !strings.Contains(line, tt.says) || strings.ContainsAny(line, "\r\x1b") || silent.Len() > 0 {
				t.Errorf("got %q and %q, want one line with %q", line, silent.String(), tt.says)
			}
			if tt.handler != nil && (<-asked != "GET /health" || len(asked) > 0) {
				t.Error("got other requests than one GET /health")
			}
		})
	}
}

// TestProbeUsesNoProxy asks for LOCALHOST, which net/http does not exempt from proxies as it
// does localhost.
func TestProbeUsesNoProxy(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	_, port, _ := net.SplitHostPort(p.addr)
	env := []string{"HOST=LOCALHOST", "PORT=" + port, "HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1"}
	out, err := command(t, env, "-probe").CombinedOutput()
	if err != nil {
		t.Errorf("got %v and %q, want exit code 0", err, out)
	}
}

// The process: flags, signals, exit codes and the log.

func TestListeningLine(t *testing.T) {
	t.Parallel()
	for i, tt := range []struct {
		host         string
		open, closed []string // addresses
	}{
		{host: "127.0.0.1", open: []string{"127.0.0.1"}, closed: []string{"127.0.0.2", "::1"}},
		{host: "0.0.0.0", open: []string{"127.0.0.1", "127.0.0.2"}, closed: []string{"::1"}},
		{host: "::ffff:0.0.0.0", open: []string{"127.0.0.1"}, closed: []string{"::1"}},
		{host: "", open: []string{"127.0.0.1", "::1"}},
		{host: "::", open: []string{"127.0.0.1", "::1"}},
		{host: "[::1]", open: []string{"::1"}, closed: []string{"127.0.0.1"}},
		{host: "::1%lo", open: []string{"::1%lo"}},
		{host: "localhost", open: []string{"127.0.0.1"}},
	} {
		t.Run("host "+tt.host, func(t *testing.T) {
			t.Parallel()
			if ln, err := net.Listen("tcp", "[::1]:0"); err != nil {
				t.Skip("this machine has no IPv6: ", err)
			} else {
				ln.Close()
			}
			own := fmt.Sprintf("https://%d.a", i) // allowed by this program alone
			p := start(t, []string{"PORT=1", "MAX_CONNECTIONS=20", "ALLOWED_ORIGINS=https://b.example, " + own, "DRAIN_DELAY=1ms", "SHUTDOWN_TIMEOUT=5s"}, "-host", tt.host, "-port", "0")
			_, port, err := net.SplitHostPort(p.addr)
			if err != nil || port == "0" || port == "1" {
				t.Errorf("got address %q, want the real one", p.addr)
			}
			address := func(host string) string {
				return "http://" + net.JoinHostPort(strings.Replace(host, "%", "%25", 1), port) + "/health"
			}
			if want := address(tt.open[0]); p.url != want {
				t.Errorf("got URL %q to try, want %q", p.url, want)
			}
			if want := "max-connections=20 allowed-origins=https://b.example," + own + " drain-delay=1ms shutdown-timeout=5s"; p.settings != want {
				t.Errorf("got settings %q, want %q", p.settings, want)
			}
			for _, host := range append(tt.open, tt.closed...) {
				req, err := http.NewRequest("GET", address(host), nil)
				noError(t, err)
				req.Header.Set("Origin", own)
				client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
				resp, err := client.Do(req)
				got := err == nil && resp.Header.Get("Access-Control-Allow-Origin") == own
				if want := slices.Contains(tt.open, host); got != want {
					t.Errorf("%s: got an answer %t (%v), want %t", host, got, err, want)
				}
				if err == nil {
					resp.Body.Close()
				}
			}
		})
	}
}

// TestRun runs the whole program inside the test, where coverage and mutation testing see it. It is
// not parallel, for the signal comes to the test itself.
func TestRun(t *testing.T) {
	stderr, log := io.Pipe()
	var code int
	var program sync.WaitGroup
	program.Go(func() {
		code = run([]string{"-host", "127.0.0.1", "-port", "0"}, func(string) string { return "" }, io.Discard, log)
		log.Close()
	})
	p := &process{log: readLines(stderr)}
	p.listening(t)
	noError(t, syscall.Kill(os.Getpid(), syscall.SIGHUP))
	p.waitFor(t, "msg=draining signal=hangup")
	p.waitFor(t, "msg=stopped")
	program.Wait()
	if code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
	time.Sleep(600 * time.Millisecond) // until SIGINT is no longer taken over, so that it can be again
	catchIgnored()
}

// TestSignals ends the process. Signals that come at once are sent one after the other; late ones
// until the end, for only a SIGINT that comes half a second after the first ends it at once.
func TestSignals(t *testing.T) {
	t.Parallel()
	const draining, stopped = "msg=draining", "msg=stopped"
	term, interrupt, hup := syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP
	for _, tt := range []struct {
		name          string
		env           string
		sent          string // on a connection that is open at the signal
		ignored       string // when the program starts, as by nohup or a shell's &
		signals, late []syscall.Signal
		wantCode      int      // as a shell shows it
		wantLog       []string // after the line for listening
	}{
		{name: "SIGTERM", env: "MAX_CONNECTIONS=1", signals: []syscall.Signal{term}, wantLog: []string{"msg=draining signal=terminated delay=0s", stopped}},
		{name: "Ctrl-C", signals: []syscall.Signal{interrupt}, wantLog: []string{"msg=draining signal=interrupt delay=0s", stopped}},
		{name: "closed terminal", signals: []syscall.Signal{hup}, wantLog: []string{"msg=draining signal=hangup delay=0s", stopped}},
		{name: "SIGHUP ignored", ignored: "HUP", signals: []syscall.Signal{hup, term}, wantLog: []string{"msg=draining signal=terminated", stopped}},
		{name: "SIGINT ignored", ignored: "INT", env: "DRAIN_DELAY=1s", signals: []syscall.Signal{interrupt, term}, late: []syscall.Signal{interrupt}, wantLog: []string{"msg=draining signal=terminated", stopped}},
		{name: "idle, no time", env: "SHUTDOWN_TIMEOUT=0s", sent: get + "\r\n", signals: []syscall.Signal{term}, wantLog: []string{draining, stopped}},
		{name: "too late", env: "SHUTDOWN_TIMEOUT=0s", sent: get, signals: []syscall.Signal{term}, wantCode: 1, wantLog: []string{draining, "-shutdown-timeout (SHUTDOWN_TIMEOUT)"}},
		{name: "all at once in the drain delay", env: "DRAIN_DELAY=200ms", signals: []syscall.Signal{term, hup, interrupt, interrupt, term}, wantLog: []string{"msg=draining signal=", stopped}},
		{name: "SIGTERM and SIGHUP later", env: "DRAIN_DELAY=2s", signals: []syscall.Signal{term}, late: []syscall.Signal{term, hup}, wantLog: []string{draining, stopped}},
		{name: "Ctrl-C in the drain delay", env: "DRAIN_DELAY=1h", signals: []syscall.Signal{term}, late: []syscall.Signal{interrupt}, wantCode: 130, wantLog: []string{"msg=draining signal=terminated delay=1h"}},
		{name: "Ctrl-C twice", env: "DRAIN_DELAY=1h", signals: []syscall.Signal{interrupt}, late: []syscall.Signal{interrupt}, wantCode: 130, wantLog: []string{draining}},
		{name: "Ctrl-C in the shutdown", env: "SHUTDOWN_TIMEOUT=1h", sent: "POST /health HTTP/1.1\r\nHost: a.example\r\n", signals: []syscall.Signal{term}, late: []syscall.Signal{interrupt}, wantCode: 130, wantLog: []string{draining}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			program := command(t, []string{"HOST=127.0.0.1", "PORT=0", tt.env})
			if tt.ignored != "" {
				program.Args = []string{"sh", "-c", "trap '' " + tt.ignored + "; exec " + program.Path}
				program.Path = "/bin/sh"
			}
			p := follow(t, program)
			p.listening(t)
			dial(t, p.addr, tt.sent)
			p.get(t, "/health") // accepted in order, so the connection has been too
			began := time.Now()
			for _, s := range tt.signals {
				p.signal(t, s)
			}
			log := []string{p.waitFor(t, draining)}
			p.repeat(t, tt.late...)
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
			if got, want := time.Since(began), 500*time.Millisecond; code == 130 && got < want {
				t.Errorf("got the end %v after the first signal, want it after %v", got, want)
			}
		})
	}
}

// TestStopInLookup stops the program while a DNS server does not answer: nothing is to drain yet.
func TestStopInLookup(t *testing.T) {
	t.Parallel()
	p := follow(t, command(t, []string{"TEST_DNS=silent", "HOST=a.example", "PORT=0"}))
	p.waitFor(t, "asking DNS")
	p.signal(t, syscall.SIGTERM)
	if code, log := p.exit(t); code != 128+int(syscall.SIGTERM) {
		t.Errorf("got exit code %d and log %q, want the end by the signal", code, log)
	}
}

// TestLife runs the life of the process without a network and in no time: a rolling restart as its
// clients see it. Nobody may hold up the end for longer than a request may take.
func TestLife(t *testing.T) {
	t.Parallel()
	const delay, door = time.Second, 50 * time.Millisecond // before and behind its closing
	for _, tt := range []struct {
		name      string
		sent      string // before the signal; an answer is awaited where a request is whole
		later     string // behind the closing of the listener
		timeout   time.Duration
		want      time.Duration // from the signal to the end
		wantError string
		wantCode  int // of a second answer
	}{
		{name: "idle", sent: get + "\r\n", want: delay + 2*door},
		{name: "a line end too many", sent: get + "\r\n\r\n", want: delay + 2*door},
		{name: "request behind the closing", sent: get + "\r\n", later: get + "\r\n", want: delay + 2*door, wantCode: 503},
		{name: "half of the second request", sent: get + "\r\n" + get, later: "\r\n", want: delay + 2*door, wantCode: 503},
		{name: "a byte behind the closing", sent: get + "\r\n", later: "G", want: delay + door + readTimeout},
		{name: "a byte behind the closing, too late", sent: get + "\r\n", later: "G", timeout: time.Second, want: delay + 2*door + time.Second,
			wantError: "requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ln, stop := newPipes(), make(chan os.Signal, 1)
				conf := config{maxConnections: 3, origins: []string{"*"}, drainDelay: delay, shutdownTimeout: cmp.Or(tt.timeout, time.Hour)}
				var ended time.Time
				var err error
				var life sync.WaitGroup
				life.Go(func() {
					err = serve(ln, conf, stop, slog.New(slog.DiscardHandler))
					ended = time.Now()
				})
				c, _ := ln.dial(tt.sent)
				if resp, _ := c.wantAnswer(t, 200); resp.Close {
					t.Error("before: got Connection: close, want it kept")
				}
				ln.dial("") // which asks nothing
				half, _ := ln.dial(get)
				time.Sleep(time.Second) // then it has still time enough
				began := time.Now()
				stop <- syscall.SIGTERM
				time.Sleep(delay) // the listener is about to close
				half.send(t, "\r\n")
				if resp, body := half.wantAnswer(t, 503); body != wantDraining || !resp.Close {
					t.Errorf("draining: got %q, Connection: close %t; want %q, true", body, resp.Close, wantDraining)
				}
				<-ln.closed
				go io.WriteString(c, tt.later)
				if tt.wantCode > 0 {
					if resp, _ := c.wantAnswer(t, tt.wantCode); !resp.Close {
						t.Error("got no Connection: close, want the client told to leave")
					}
				}
				c.wantClosed(t)
				life.Wait()
				if got := ended.Sub(began); got < tt.want || got > tt.want+2*lookAgain {
					t.Errorf("got the end after %v, want it after %v", got, tt.want)
				}
				if got := fmt.Sprint(err); got != cmp.Or(tt.wantError, "<nil>") {
					t.Errorf("got error %s, want %q", got, tt.wantError)
				}
				c.Close()
				time.Sleep(time.Minute) // for net/http to end
			})
		})
	}
}

// TestLogUnread lets nobody read standard error: the lines are lost, and nothing else.
func TestLogUnread(t *testing.T) {
	t.Parallel()
	for name, stderr := range map[string]func(*testing.T) *os.File{"full": fullPipe, "reader gone": brokenPipe} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			unused := httptest.NewServer(nil)
			unused.Close()
			_, port, _ := net.SplitHostPort(unused.Listener.Addr().String())
			cmd := command(t, []string{"HOST=127.0.0.1", "PORT=" + port, "MAX_CONNECTIONS=1", "DRAIN_DELAY=100ms"})
			cmd.Stderr = stderr(t)
			noError(t, cmd.Start())
			defer cmd.Wait()
			defer time.AfterFunc(patience, func() { cmd.Process.Kill() }).Stop()
			p := &process{Cmd: cmd, addr: "127.0.0.1:" + port}
			waitFor(t, "the listener", func() bool {
				conn, err := net.Dial("tcp", p.addr)
				return err == nil && conn.Close() == nil
			})
			dial(t, p.addr, get)
			p.get(t, "/health") // at the limit, which is worth a line
			p.signal(t, syscall.SIGTERM)
			if err := cmd.Wait(); err != nil {
				t.Errorf("got %v, want exit code 0", err)
			}
		})
	}
}

// TestLogWriter writes more lines than there is room for, to a reader that begins late.
func TestLogWriter(t *testing.T) {
	t.Parallel()
	_, unread := io.Pipe()
	if code := run([]string{"-x"}, os.Getenv, io.Discard, unread); code != exitUsage {
		t.Errorf("got exit code %d where nobody reads, want %d", code, exitUsage)
	}
	r, w := io.Pipe()
	l := newLogWriter(w)
	fmt.Fprintln(l, "line 0")
	waitFor(t, "the line to be on its way", func() bool { return len(l.queue) == 0 })
	for i := 1; i < 1000; i++ {
		fmt.Fprintf(l, "line %d\n", i)
	}
	kept, got := 1+cap(l.queue), readLines(r) // the rest is lost
	for i := range kept {
		if line, want := <-got, fmt.Sprintf("line %d", i); line != want {
			t.Fatalf("got %q, want %q", line, want)
		}
	}
	fmt.Fprintln(l, "one more")
	l.flush()
	if line := <-got; line != "one more" || l.unread.Load() > 0 {
		t.Errorf("got %q and %d lines left, want the log to go on to its end", line, l.unread.Load())
	}
}

// The connections, in a listener with a limit of the test's own.

// TestGivesWay fills all places, without a network and in no time, and asks for one more.
func TestGivesWay(t *testing.T) {
	t.Parallel()
	const post = "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100\r\n\r\n"
	send := func(raw string) func(net.Conn) {
		return func(c net.Conn) { io.WriteString(c, raw) }
	}
	drip := func(raw string) func(net.Conn) {
		return func(c net.Conn) {
			for _, err := io.WriteString(c, raw); err == nil; _, err = io.WriteString(c, "x") {
				time.Sleep(100 * time.Millisecond)
			}
		}
	}
	ask := func(raw string) func(net.Conn) {
		return func(c net.Conn) {
			io.WriteString(c, raw)
			io.Copy(io.Discard, c)
		}
	}
	silent := func(net.Conn) {}
	late := func(c net.Conn) { time.Sleep(2 * time.Second); io.WriteString(c, post) }
	half, body, deaf := send(get), send(post), send(get+"\r\n")
	idle, busy := ask(get+"\r\n"), ask("GET /busy HTTP/1.1\r\nHost: a.example\r\n\r\n")
	type client struct {
		begins time.Duration // after the one before
		does   func(net.Conn)
	}
	for _, tt := range []struct {
		name     string
		clients  []client
		pause    time.Duration // until one more comes
		want     int           // which is closed
		wantWait time.Duration // for the place
	}{
		{name: "silent", clients: []client{{0, silent}, {time.Second, silent}}, pause: time.Second, want: 0},
		{name: "idle before silent", clients: []client{{0, idle}, {time.Second, silent}}, pause: time.Second, want: 0},
		{name: "half sent before idle", clients: []client{{0, half}, {time.Second, idle}}, pause: time.Second, want: 0},
		{name: "dripping headers", clients: []client{{0, drip(get)}, {time.Second, idle}}, pause: time.Second, want: 0},
		{name: "an answer that is not taken", clients: []client{{0, deaf}, {time.Second, silent}}, pause: time.Second, want: 0},
		{name: "an answer that is not taken, and a young one", clients: []client{{0, deaf}, {time.Second, silent}}, pause: time.Millisecond, want: 0},
		{name: "a body that never comes", clients: []client{{0, body}, {time.Second, silent}}, pause: time.Millisecond, want: 0},
		{name: "a body that drips", clients: []client{{0, drip(post)}, {time.Second, silent}}, pause: time.Second, want: 0},
		{name: "a body that was begun late", clients: []client{{0, late}, {time.Second, silent}}, pause: 1100 * time.Millisecond, want: 1},
		{name: "a handler at work is nobody's delay", clients: []client{{0, busy}, {time.Second, silent}}, pause: time.Second, want: 1},
		{name: "a request on its way has time", clients: []client{{0, busy}, {time.Second, silent}}, want: 1, wantWait: 200 * time.Millisecond},
		{name: "all are answered", clients: []client{{0, busy}, {time.Second, busy}}, want: 0, wantWait: 4200 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				mux := http.NewServeMux()
				mux.HandleFunc("GET /busy", func(http.ResponseWriter, *http.Request) { time.Sleep(5 * time.Second) })
				mux.HandleFunc("POST /", func(_ http.ResponseWriter, r *http.Request) { io.ReadAll(r.Body) })
				mux.Handle("GET /health", handler(t, "*", false))
				inner := newPipes()
				_, srv := serveLimited(inner, len(tt.clients), mux, slog.New(slog.DiscardHandler))
				var theirs []net.Conn
				for _, c := range tt.clients {
					time.Sleep(c.begins)
					conn, server := inner.dial("")
					theirs = append(theirs, server)
					go c.does(conn)
				}
				time.Sleep(tt.pause)
				synctest.Wait()
				began := time.Now()
				last, _ := inner.dial(get + "\r\n")
				last.wantAnswer(t, 200)
				if late := time.Since(began) - tt.wantWait; late < 0 || late > lookAgain {
					t.Errorf("got an answer after %v, want it after %v", time.Since(began), tt.wantWait)
				}
				isClosed := func(c net.Conn) bool { return c.SetDeadline(time.Time{}) != nil }
				if got := slices.IndexFunc(theirs, isClosed); got != tt.want {
					t.Errorf("got connection %d closed, want %d", got, tt.want)
				}
				srv.Close()
				for _, c := range theirs {
					c.Close()
				}
				time.Sleep(time.Minute) // for net/http and the handlers to end
			})
		})
	}
}

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	t.Run("a client that is told to leave", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			var log strings.Builder
			inner, stop := newPipes(), make(chan os.Signal, 1)
			var life sync.WaitGroup
			life.Go(func() {
				serve(inner, config{maxConnections: 1, origins: []string{"*"}}, stop, slog.New(slog.NewTextHandler(&log, nil)))
			})
			first, _ := inner.dial(get)
			newest, _ := inner.dial(get + "\r\n")
			time.Sleep(time.Millisecond)
			first.send(t, "\r\n")
			if resp, _ := first.wantAnswer(t, 200); !resp.Close {
				t.Error("got no Connection: close, want the client told to leave while another waits")
			}
			first.wantClosed(t)
			if resp, _ := newest.wantAnswer(t, 200); resp.Close {
				t.Error("got Connection: close, want the newest kept, for nobody waits any more")
			}
			stop <- syscall.SIGTERM
			life.Wait()
			if log := log.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, `msg="connection limit reached, the longest waiting give way" max-connections=1`) {
				t.Errorf("got log %q, want one line for the limit", log)
			}
		})
	})
	t.Run("a server that is late is not the client's fault", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			inner := newPipes()
			ln := newListener(inner, 1, slog.New(slog.DiscardHandler))
			client, _ := inner.dial("")
			c, _ := ln.Accept()
			time.Sleep(time.Hour)
			if ln.longestWaiting() != nil {
				t.Error("its turn to give way has come before the server has tried to read")
			}
			go c.Read(make([]byte, 100))
			time.Sleep(time.Second)
			if ln.longestWaiting() != c {
				t.Error("its turn to give way does not come while the server waits")
			}
			client.Close()
		})
	})
	const large = 1 << 20 // bytes, more than any buffer on the way holds
	for name, write := range map[string]func(http.ResponseWriter){
		"answers that are not taken": func(w http.ResponseWriter) { io.WriteString(w, strings.Repeat("x", 4000)) },
		"a file that is not taken": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", strconv.Itoa(large)) // so that net/http looks for ReadFrom
			io.CopyN(w, strings.NewReader(strings.Repeat("x", large)), large)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var answers atomic.Int64
			addr, _ := serveOn(t, 3, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				answers.Add(1)
				if r.URL.Path != "/health" {
					write(w)
				}
			}))
			for range 3 {
				c := dial(t, addr, "")
				c.Conn.(*net.TCPConn).SetReadBuffer(16 << 10)
				go io.WriteString(c, strings.Repeat("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", 10_000))
			}
			waitFor(t, "the clients not to read", func() bool {
				before := answers.Load()
				time.Sleep(50 * time.Millisecond)
				return before >= 3 && answers.Load() == before
			})
			if got := answers.Load(); got > 3*100 {
				t.Errorf("got %d answers to clients that never read, want the few that small buffers hold", got)
			}
			last := dial(t, addr, get+"\r\n")
			last.SetDeadline(time.Now().Add(5 * time.Second)) // half of what the server gives to take an answer
			last.wantAnswer(t, 200)
		})
	}
	t.Run("one that is taken over is no concern", func(t *testing.T) {
		t.Parallel()
		addr, ln := serveOn(t, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				conn, _, _ := http.NewResponseController(w).Hijack()
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		}))
		dial(t, addr, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").wantAnswer(t, 200)
		last := dial(t, addr, get+"\r\n")
		last.wantAnswer(t, 200)
		last.Close()
		waitFor(t, "the others to be gone", func() bool { return ln.open() == 0 })
	})
	for limit, wantFree := range map[int]bool{1: true, 2: false} {
		t.Run(fmt.Sprintf("a refusal with %d places", limit), func(t *testing.T) {
			t.Parallel()
			addr, ln := serveOn(t, limit, handler(t, "*", false))
			large := strings.Repeat("x", 300<<10) // behind an answer net/http reads 256 KiB at most
			for _, raw := range []string{
				get + "Cookie: " + large + "\r\n\r\n",
				get + "Content-Length: " + strconv.Itoa(len(large)) + "\r\n\r\n" + large,
			} {
				began := time.Now()
				refused := dial(t, addr, "")
				go io.WriteString(refused, raw) // fails where the server has closed before the end
				refused.answers.Read(make([]byte, 1))
				waitFor(t, "the place to be free", func() bool { return ln.open() == 0 })
				if free := time.Since(began) < 400*time.Millisecond; free != wantFree {
					t.Errorf("got the place free %v after the request, want it at once %t", time.Since(began), wantFree)
				}
			}
			dial(t, addr, get+"\r\n").wantAnswer(t, 200)
		})
	}
}

// TestAcceptErrors lets accept(2) fail, once for each error and then as often as it likes.
func TestAcceptErrors(t *testing.T) {
	t.Parallel()
	const message = `msg="cannot accept connections, the longest waiting give way; if files are short, raise ulimit -n (LimitNOFILE)" err="too many open files"`
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		inner := newPipes()
		ln, srv := serveLimited(inner, 10, handler(t, "*", false), slog.New(slog.NewTextHandler(&log, nil)))
		idle, _ := inner.dial("")
		time.Sleep(time.Second)
		young, _ := inner.dial("")
		began := time.Now()
		errs := []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EPROTO, syscall.ENETDOWN, syscall.EPERM, errors.New("anything")}
		for _, err := range errs {
			inner.errs <- err
		}
		idle.wantClosed(t)
		young.send(t, get+"\r\n")
		if resp, _ := young.wantAnswer(t, 200); !resp.Close {
			t.Error("got no Connection: close, want the client told to leave while nobody gets in")
		}
		last, _ := inner.dial(get + "\r\n")
		if resp, _ := last.wantAnswer(t, 200); resp.Close {
			t.Error("got Connection: close, want it kept once others get in again")
		}
		if got, want := time.Since(began), time.Duration(len(errs))*20*time.Millisecond; got != want {
			t.Errorf("got an answer after %v, want %v of trying again", got, want)
		}
		time.Sleep(time.Minute)
		inner.errs <- syscall.EMFILE
		ln.Close()
		synctest.Wait()
		if got := log.String(); strings.Count(got, "\n") != 2 || strings.Count(got, message) != 2 {
			t.Errorf("got log %q, want a line a minute with %q", got, message)
		}
		srv.Close()
	})
}

// TestRaw sends what few HTTP libraries would, without a network and in no time, and waits for the
// end of the connection.
func TestRaw(t *testing.T) {
	t.Parallel()
	const health, post = get + "\r\n", "POST /no-such-path HTTP/1.1\r\nHost: a.example\r\n"
	const unread = 100 * time.Millisecond                                              // for a body that nobody reads
	with := func(lines int) string { return get + strings.Repeat("a:b\r\n", lines-1) } // Host is one
	lines := func(raw string) []string { return strings.SplitAfter(raw, "\n") }
	cookie := func(size int) []string { return []string{get + "Cookie: " + strings.Repeat("x", size) + "\r\n\r\n"} }
	first := func(line string) []string { return []string{line + " HTTP/1.1\r\nHost: a.example\r\n\r\n"} }
	for _, tt := range []struct {
		name string
		sent []string // a write each; a single byte each second
		deaf bool     // reads nothing
		drip string   // sent again and again, each second
		want []int    // codes
		ends bool
		end  time.Duration // after the first write, if it ends
	}{
		// What ServeMux would redirect: a check takes a 3xx for good.
		{name: "two slashes", sent: first("GET //health"), want: []int{404}},
		{name: "three slashes and a query", sent: first("GET ///health?x=1"), want: []int{404}},
		{name: "slashes behind", sent: first("GET /health//"), want: []int{404}},
		{name: "slashes alone", sent: first("GET //"), want: []int{404}},
		{name: "a dot", sent: first("POST /./health"), want: []int{404}},
		{name: "dots", sent: first("GET /../health"), want: []int{404}},
		{name: "a dot behind", sent: first("OPTIONS /health/."), want: []int{404}},
		{name: "dots behind, CONNECT", sent: first("CONNECT /health/.."), want: []int{404}},
		{name: "dots between", sent: first("BREW /a/../health"), want: []int{404}},
		{name: "a whole URL without a path", sent: first("GET http://a.example"), want: []int{404}},
		{name: "a whole URL with two slashes", sent: first("GET http://a.example//health"), want: []int{404}},

		{name: "length with chunked", sent: []string{get + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + health}, want: []int{200}, ends: true},
		// The two 5xx that net/http itself sends: RFC 9112, section 6.1, and RFC 9110, section 15.6.6.
		{name: "chunked twice", sent: []string{get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"}, want: []int{501}, ends: true},
		{name: "HTTP/3.0", sent: []string{"GET /health HTTP/3.0\r\nHost: a.example\r\n\r\n"}, want: []int{505}, ends: true},
		{name: "an expectation", sent: []string{get + "Expect: x\r\n\r\n"}, want: []int{417}, ends: true},
		{name: "TLS", sent: []string{"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"}, want: []int{400}, ends: true},
		{name: "HTTP/2", sent: []string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}, want: []int{400}, ends: true},
		{name: "OPTIONS *", sent: first("OPTIONS *"), want: []int{400}, ends: true},
		{name: "empty line first", sent: []string{"\r\n" + health}, want: []int{400}, ends: true}, // RFC 9112, section 2.2, would have it left out; net/http does not
		{name: "pipelining", sent: []string{health + health + health}, want: []int{200, 200, 200}},
		{name: "HTTP/1.0", sent: []string{"GET /health HTTP/1.0\r\n\r\n"}, want: []int{200}, ends: true},
		{name: "HTTP/1.0 kept", sent: []string{"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"}, want: []int{200}},

		{name: "20 KB of headers", sent: cookie(20<<10 - len(get) - 12), want: []int{200}},
		{name: "21 KB of headers", sent: cookie(21 << 10), want: []int{431}, ends: true}, // net/http adds 4 KiB to the 16
		{name: "100 headers, line by line", sent: lines(with(100) + "\r\n"), want: []int{200}},
		{name: "101 headers, line by line", sent: lines(with(101) + "\r\n"), want: []int{400}, ends: true},
		{name: "101 bare line ends", sent: lines(strings.ReplaceAll(with(101)+"\r\n", "\r", "")), want: []int{400}, ends: true},
		{name: "headers without end", sent: []string{with(700), with(700)}, want: []int{400}, ends: true},
		{name: "pipeline of 124", sent: []string{strings.Repeat("GET /health HTTP/1.1\r\nHost:a\r\n\r\n", 124)}, want: slices.Repeat([]int{200}, 124)},
		{name: "pipeline of 100 headers each", sent: []string{strings.Repeat(with(100)+"\r\n", 20)}, want: slices.Repeat([]int{200}, 20)},
		{name: "body of 1,000 lines", sent: []string{post + "Content-Length: 2000\r\n\r\n", strings.Repeat("x\n", 1000)}, want: []int{404}, ends: true},
		{name: "1,000 chunks", sent: []string{post + "Transfer-Encoding: chunked\r\n\r\n", strings.Repeat("1\r\nx\r\n", 1000) + "0\r\n\r\n"}, want: []int{404}, ends: true},

		{name: "nothing", ends: true, end: 5 * time.Second},
		{name: "half a request", sent: []string{get}, ends: true, end: 5 * time.Second},
		{name: "one byte at a time", drip: "G", want: []int{400}, ends: true, end: 5 * time.Second}, // net/http tells a line that is cut off from none
		{name: "nothing more", sent: []string{health}, want: []int{200}, ends: true, end: 620 * time.Second},
		{name: "a line end too many", sent: []string{health, "\r\n"}, want: []int{200}, ends: true, end: 620 * time.Second},
		{name: "a byte of the next", sent: []string{health, "G"}, want: []int{200}, ends: true, end: 5 * time.Second},
		{name: "a byte of the next at once", sent: []string{health + "G"}, want: []int{200}, ends: true, end: 5 * time.Second},
		{name: "the next, one byte at a time", sent: []string{health}, drip: "G", want: []int{200, 400}, ends: true, end: 5 * time.Second},
		{name: "body that never comes", sent: []string{get + "Content-Length: 10\r\n\r\n"}, want: []int{200}, ends: true, end: unread},
		{name: "answers that are not taken", sent: []string{health, health}, deaf: true, ends: true, end: 10 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inner := newPipes()
				_, srv := serveLimited(inner, 10, handler(t, "*", false), slog.New(slog.DiscardHandler))
				client, _ := inner.dial("")
				began := time.Now()
				var writing sync.WaitGroup
				writing.Go(func() {
					for _, raw := range tt.sent {
						io.WriteString(client, raw)
					}
					for tt.drip != "" {
						if _, err := io.WriteString(client, tt.drip); err != nil {
							return
						}
						time.Sleep(time.Second)
					}
				})
				for _, code := range tt.want {
					client.wantAnswer(t, code)
				}
				if tt.deaf {
					writing.Wait() // until the connection is closed
				}
				client.SetReadDeadline(began.Add(time.Hour))
				if !tt.ends {
					client.SetReadDeadline(began.Add(time.Minute))
				}
				line, err := client.answers.ReadString('\n')
				if ended := err == io.EOF; ended != tt.ends || ended && time.Since(began) != tt.end {
					t.Errorf("got %q and error %v after %v, want the end %t after %v", line, err, time.Since(began), tt.ends, tt.end)
				}
				client.Close()
				srv.Close()
				time.Sleep(time.Second) // for net/http to end
			})
		})
	}
}

// What it costs.

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

		if _, pattern := routes(func() bool { return drain }).Handler(req); pattern != "" && pattern != "GET /health" {
			t.Skip("another route says what it answers")
		}
		health := u.Path == "/health" && (method == "GET" || method == "HEAD")
		switch code := rec.Code; {
		case code == 200 && health && !drain, code == 503 && health && drain:
		case code == 204 && method == "OPTIONS" && asks != "", code == 404 && !health, code == 405 && !health:
		case code == 400 && target == "*": // ServeMux's own, for what is no path
		default:
			t.Errorf("got code %d", code)
		}
		o := strings.ToLower(origin)
		listed := o == "https://a.example" || o == "http://localhost:3000" || strings.HasPrefix(o, "https://") && strings.HasSuffix(o, ".corp.example")
		if got := rec.Header().Get("Access-Control-Allow-Origin"); got != "" && (got != origin || !listed) {
			t.Errorf("got Access-Control-Allow-Origin %q for origin %q", got, origin)
		}
		if rec.Header()["Access-Control-Allow-Credentials"] != nil || rec.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("got headers %v, want no credentials allowed and nothing stored", rec.Header())
		}
	})
}

// FuzzOrigins holds each entry that is accepted against the matching and against net/url.
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
			sent := strings.Replace(strings.ToLower(entry), "*.", "a.b.", 1)
			u, err := url.Parse(sent)
			if err != nil || sent != u.Scheme+"://"+u.Host || strings.Contains(sent, "*") {
				t.Fatalf("got %q accepted, which no browser sends", entry)
			}
			for origin, want := range map[string]bool{sent: true, sent + "0": false, sent + "/": false, "x" + sent: false} {
				if got := allows(origin); got != want && len(origins) == 1 { // another entry may allow it
					t.Errorf("%q: got origin %q allowed %t, want %t", list, origin, got, want)
				}
			}
		}
	})
}

// Helpers: handlers and servers in the test, the program in a process of its own, clients.

// handler returns the handler for an allow list, in one of its two states.
func handler(tb testing.TB, list string, drain bool) http.Handler {
	tb.Helper()
	origins, err := parseOrigins(list)
	noError(tb, err)
	draining := func() bool { return drain }
	return newHandler(routes(draining), origins, draining)
}

// serveOn serves h on loopback, without a process and with a limit of the test's own.
func serveOn(t *testing.T, limit int, h http.Handler) (addr string, ln *listener) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	noError(t, err)
	ln, srv := serveLimited(inner, limit, h, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { srv.Close() })
	return inner.Addr().String(), ln
}

func serveLimited(inner net.Listener, limit int, h http.Handler, log *slog.Logger) (*listener, *http.Server) {
	ln := newListener(inner, limit, log)
	srv := newServer(closeWhile(ln.shedding.Load, h), log)
	srv.ConnState = ln.setState
	go srv.Serve(ln)
	return ln, srv
}

// pipes is a listener without a network, for tests in no time.
type pipes struct {
	conns  chan net.Conn
	errs   chan error // of Accept
	closed chan struct{}
	close  func()
}

func newPipes() *pipes {
	closed := make(chan struct{})
	return &pipes{make(chan net.Conn, 1), make(chan error), closed, sync.OnceFunc(func() { close(closed) })}
}

// dial returns both ends of a connection, the second of which will be accepted, and sends raw.
func (p *pipes) dial(raw string) (*client, net.Conn) {
	conn, server := net.Pipe()
	p.conns <- server
	if raw != "" { // a pipe would pass on that too
		go io.WriteString(conn, raw)
	}
	return &client{conn, bufio.NewReader(conn)}, server
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case err := <-p.errs:
		return nil, err
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.close()
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func noError(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// waitFor waits until ok and says what it waited for if that does not come.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// process is the program in a process of its own: the test binary again, which TestMain turns
// into main.
type process struct {
	*exec.Cmd
	addr, url, settings string        // as it logs them
	log                 <-chan string // its standard error by lines, closed at the end
	stderr              io.Closer     // the reading end
}

// command returns the program with no environment but env, and what keeps the coverage and the
// race detector of the test binary quiet.
func command(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append([]string{"TEST_BE_THE_PROGRAM=1", "GOCOVERDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=0"}, env...)
	return cmd
}

// start runs the program on a free loopback port and returns once it listens.
func start(t *testing.T, env []string, args ...string) *process {
	t.Helper()
	p := follow(t, command(t, append([]string{"HOST=127.0.0.1", "PORT=0"}, env...), args...))
	p.listening(t)
	return p
}

// follow starts a program and reads its log.
func follow(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	noError(t, err)
	noError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &process{Cmd: cmd, stderr: stderr, log: readLines(stderr)}
}

// readLines returns the lines of r, with room for those that nobody waits for.
func readLines(r io.Reader) <-chan string {
	lines := make(chan string, 200)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			lines <- s.Text()
		}
	}()
	return lines
}

// listening returns once the program says where it listens.
func (p *process) listening(t *testing.T) {
	t.Helper()
	_, rest, _ := strings.Cut(p.waitFor(t, "msg=listening"), " addr=")
	p.addr, rest, _ = strings.Cut(rest, " url=")
	p.url, p.settings, _ = strings.Cut(rest, " ")
}

// next returns the next line of the log, or false at its end.
func (p *process) next(t *testing.T, what string) (line string, ok bool) {
	t.Helper()
	select {
	case line, ok = <-p.log:
		return line, ok
	case <-time.After(patience):
		t.Fatalf("waited %v for %s", patience, what)
		return "", false
	}
}

// waitFor returns the next line of the log that has text.
func (p *process) waitFor(t *testing.T, text string) string {
	t.Helper()
	for {
		line, ok := p.next(t, text)
		if strings.Contains(line, text) {
			return line
		}
		if !ok {
			t.Fatalf("the program ended, want a line with %q", text)
		}
	}
}

// exit waits for the end and returns the exit code and the rest of the log.
func (p *process) exit(t *testing.T) (code int, log []string) {
	t.Helper()
	for line, ok := p.next(t, "the end"); ok; line, ok = p.next(t, "the end") {
		log = append(log, line)
	}
	p.Wait()
	return exitCode(p.Cmd), log
}

// exitCode returns the code as a shell shows it: 128 and the number of a signal that ended it.
func exitCode(cmd *exec.Cmd) int {
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		return 128 + int(status.Signal())
	}
	return cmd.ProcessState.ExitCode()
}

func (p *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	noError(t, p.Process.Signal(s))
}

// repeat sends signals again and again until the end of the test.
func (p *process) repeat(t *testing.T, signals ...syscall.Signal) {
	go func() {
		for ; t.Context().Err() == nil; time.Sleep(100 * time.Millisecond) {
			for _, s := range signals {
				p.Process.Signal(s)
			}
		}
	}()
}

func (p *process) get(t *testing.T, path string) (resp *http.Response, body string) {
	t.Helper()
	req, err := http.NewRequest("GET", "http://"+p.addr+path, nil)
	noError(t, err)
	req.Header.Set("Origin", "https://a.example")
	return do(t, req)
}

// do sends req on a connection of its own.
func do(t *testing.T, req *http.Request) (resp *http.Response, body string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	noError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	noError(t, err)
	return resp, string(b)
}

// client is a connection that sends what it likes, when it likes.
type client struct {
	net.Conn
	answers *bufio.Reader
}

// dial opens a connection and sends raw.
func dial(t *testing.T, addr, raw string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	noError(t, err)
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
func (c *client) wantAnswer(t *testing.T, code int) (resp *http.Response, body string) {
	t.Helper()
	resp, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		t.Fatalf("got error %v, want a %d", err, code)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != code {
		t.Errorf("got %d and error %v, want a %d", resp.StatusCode, err, code)
	}
	return resp, string(b)
}

// wantClosed waits for the end of the connection.
func (c *client) wantClosed(t *testing.T) {
	t.Helper()
	n, err := c.answers.Read(make([]byte, 1))
	if n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %d bytes more and error %v, want a closed connection", n, err)
	}
}

// brokenPipe returns the writing end of a pipe whose reader has gone.
func brokenPipe(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	noError(t, err)
	noError(t, r.Close())
	return w
}

// fullPipe returns the writing end of a pipe that is full and that nobody empties.
func fullPipe(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	noError(t, err)
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	for err == nil {
		w.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = w.Write(make([]byte, 4096)) // bytes that the kernel takes whole or not at all
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return w
}
