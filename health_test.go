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

// TestMain lets the test binary be the program: see start. In tests, SIGHUP and SIGINT are caught, or
// children would ignore them where this process does, as under nohup.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_BE_THE_PROGRAM") != "" {
		main()
	}
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	if signal.Ignored(syscall.SIGINT) {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT)
	}
	os.Exit(m.Run())
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
		{name: "body", method: "GET", target: "/health", body: `{"a":1}`, wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "Accept XML", method: "GET", target: "/health", accept: "application/xml", wantCode: 200, wantType: json, wantBody: wantHealthy},
		{name: "POST", method: "POST", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "TRACE", method: "TRACE", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "OPTIONS, no preflight", method: "OPTIONS", target: "/health", wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
		{name: "root", method: "GET", target: "/", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "trailing slash", method: "GET", target: "/health/", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "healthz", method: "GET", target: "/healthz", wantCode: 404, wantType: plain, wantBody: "404 page not found\n"},
		{name: "GET draining", method: "GET", target: "/health", draining: true, wantCode: 503, wantType: json, wantBody: wantDraining},
		{name: "HEAD draining", method: "HEAD", target: "/health", draining: true, wantCode: 503, wantType: json, wantBody: wantDraining},
		{name: "POST draining", method: "POST", target: "/health", draining: true, wantCode: 405, wantType: plain, wantBody: "Method Not Allowed\n", wantAllow: "GET, HEAD"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(handler(t, "*", tt.draining))
			t.Cleanup(server.Close)
			req, err := http.NewRequest(tt.method, server.URL+tt.target, strings.NewReader(tt.body))
			noError(t, err)
			req.Header.Set("Accept", tt.accept)
			resp, err := server.Client().Do(req)
			noError(t, err)
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			noError(t, err)
			body := string(got)
			if resp.StatusCode != tt.wantCode {
				t.Errorf("code: got %d, want %d", resp.StatusCode, tt.wantCode)
			}
			if resp.Close != tt.draining {
				t.Errorf("Connection: close: got %t, want %t", resp.Close, tt.draining)
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
		{"app://.", "app://.", "app://a"},
		{"file://", "file://", "file://a"},
		{"qrc://", "qrc://", "qrc://a"},
		{"capacitor://localhost", "capacitor://localhost", "http://localhost"},
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

// TestNextRoute adds a route that reads its body, as the next one will. Each body comes later than
// one that nobody reads may, and has more lines than headers may have. The last one comes in a drain.
func TestNextRoute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mux := routes(func() bool { return false })
		mux.HandleFunc("POST /no-such-path", func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%d bytes, error %v", len(body), err)
		})
		inner := newPipes()
		h := newHandler(mux, []string{"*"}, func() bool { return false })
		ln, _ := serveLimited(inner, 1, h, slog.New(slog.DiscardHandler))
		body := strings.Repeat("a\n", 10_000)
		head := fmt.Sprintf("POST /no-such-path HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n", len(body))
		c, _ := inner.dial("")
		var drained sync.WaitGroup
		for _, draining := range []bool{false, false, true} {
			c.send(t, head)
			if draining {
				drained.Go(func() { noError(t, drain(ln, config{shutdownTimeout: time.Hour})) })
			}
			time.Sleep(time.Second)
			c.send(t, body)
			resp, got := c.wantAnswer(t, 200)
			if want := fmt.Sprintf("%d bytes, error <nil>", len(body)); got != want || resp.Close {
				t.Errorf("got %q, Connection: close %t; want %q, false", got, resp.Close, want)
			}
		}
		c.wantClosed(t)
		drained.Wait()
	})
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
		{name: "name with a dot at the end", args: []string{"-host", "A.Example."}, want: host("A.Example.")},
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
	const wantFlag = "; -h lists the flags"
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
			"https://a.example:*", "example.com", "localhost:3000", "null", "//a.example", "file:", "file:/x", "://a", `"file://"`,
			"https://a.example,", ",https://a.example", "https://a.example,,https://b.example", " ", "*,https://a.example", "*,*", `"https://a.example"`,
			"ws://a.example", "wss://a.example", "ftp://a.example", "app://a:x", "https://a.example:x", "https://%41.example", "https://[a.example]", "http://[192.0.2.1]"}},
		{flag: "allowed-origins", want: "want https://a.example, as browsers send it", values: []string{
			"https://a.example/", "https://a.example/x", "https://a.example?q", "https://a.example?", "https://a.example#f", "https://a.example#",
			"https://u@a.example", "https://u:p@a.example", "https://a.example:443", "https://a.example:", "https://a.example:0443"}},
		{flag: "allowed-origins", want: "want file://, as browsers send it", values: []string{"file:///", "file:///x", "file://?q", "file://#"}},
		{flag: "allowed-origins", want: "want app://., as browsers send it", values: []string{"app://./", "app://u@.", "app://.#f"}},
		{flag: "allowed-origins", want: "want * only with http and https", values: []string{"app://*", "file://*", "chrome-extension://*"}},
		{flag: "allowed-origins", want: "want http://a.example, as browsers send it", values: []string{"http://a.example:80"}},
		{flag: "allowed-origins", want: "want http://a.example:8080, as browsers send it", values: []string{"http://a.example:08080"}},
		{flag: "allowed-origins", want: "want http://[2001:db8::1], as browsers send it", values: []string{"http://[2001:db8:0::1]"}},
		{flag: "allowed-origins", want: "want a port number from 1 to 65535", values: []string{"https://a.example:65536", "https://a.example:0", "https://a.example:99999999999999999999"}},
		{flag: "allowed-origins", want: "want a host of ASCII letters", values: []string{
			"https://", "https://:8080", "https://bücher.example", "https://*corp.example", "https://a*.corp.example", "https://*.*.corp.example", "https://a.*.example", "https://*", "https://*.",
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
		{"probe of any port", []string{"-probe", "-port", "00"}, []string{"-probe needs the -port (PORT) that the service listens on"}},
		{"stray argument", []string{"serve"}, []string{`"serve"`, "want only flags"}},
		{"stray argument after flags", []string{"-port", "80", "serve"}, []string{`"serve"`, "want only flags"}},
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
	var stdout, stderr bytes.Buffer
	if code := run([]string{"-h"}, func(string) string { return "" }, &stdout, &stderr); code != 0 || stderr.Len() > 0 {
		t.Errorf("got exit code %d and errors %q, want 0 and none", code, stderr.String())
	}
	wants := []string{"  -probe\n"}
	for _, s := range settings(&config{}) {
		shown := strings.TrimSuffix(" ["+s.variable()+"] (default "+s.value+")", " (default )")
		wants = append(wants, "  -"+s.name+" ", shown+"\n")
	}
	for _, want := range wants {
		if help := stdout.String(); !strings.Contains(help, want) {
			t.Errorf("got %q, want it to have %q", help, want)
		}
	}
}

func TestCannotListen(t *testing.T) {
	t.Parallel()
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Listener.Addr().String())
	fails(t, exitFailure, []string{"-host", "127.0.0.1", "-port", port}, nil, "-port (PORT) "+port, "in use")
	fails(t, exitFailure, []string{"-host", "192.0.2.1", "-port", "0"}, nil, `-host (HOST) "192.0.2.1"`) // another machine's
	fails(t, exitFailure, []string{"-host", "nobody.invalid", "-port", "0"}, nil, `-host (HOST) "nobody.invalid"`)
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
	endless := func(w http.ResponseWriter, r *http.Request) {
		for err := error(nil); err == nil; _, err = w.Write(make([]byte, 512)) {
		}
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		host    string // 127.0.0.1 if empty
		env     string // of HOST, if not host
		want    int
		says    string
	}{
		{name: "healthy", handler: healthy.ServeHTTP, want: 0, says: "200 OK " + strings.TrimSpace(wantHealthy)},
		{name: "empty host", handler: healthy.ServeHTTP, env: "-", want: 0, says: "http://127.0.0.1:"},
		{name: "unspecified IPv4 host", handler: healthy.ServeHTTP, env: "0.0.0.0", want: 0, says: "http://127.0.0.1:"},
		{name: "unspecified IPv6 host", handler: healthy.ServeHTTP, env: "::", want: 0, says: "http://127.0.0.1:"},
		{name: "IPv6", handler: healthy.ServeHTTP, host: "::1", want: 0, says: "http://[::1]:"},
		{name: "IPv6 with a zone", handler: healthy.ServeHTTP, host: "::1", env: "::1%lo", want: 0, says: "http://[::1%25lo]:"},
		{name: "draining", handler: draining.ServeHTTP, want: 1, says: "503 Service Unavailable " + strings.TrimSpace(wantDraining)},
		{name: "another program", handler: http.NotFound, want: 1, says: "404 Not Found 404 page not found: want 200"},
		{name: "204", handler: answer(204, ""), want: 1, says: "204 No Content: want 200"},
		{name: "redirect", handler: http.RedirectHandler("/", http.StatusFound).ServeHTTP, want: 1, says: "302 Found"},
		{name: "many lines", handler: answer(500, strings.Repeat("a\r\n\x1b\n", 1000)), want: 1, says: "500 Internal Server Error a a a"},
		{name: "a body without an end", handler: endless, want: 0, says: "200 OK"},
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
				asked <- fmt.Sprintf("%s %s, close %t", r.Method, r.URL.Path, r.Close)
				tt.handler(w, r)
			}))
			t.Cleanup(func() { ln.Close() })
			_, port, _ := net.SplitHostPort(ln.Addr().String())
			env := map[string]string{"HOST": strings.Trim(cmp.Or(tt.env, tt.host, "127.0.0.1"), "-"), "PORT": port}
			var stdout, stderr bytes.Buffer
			began := time.Now()
			if code := run([]string{"-probe"}, func(key string) string { return env[key] }, &stdout, &stderr); code != tt.want {
				t.Errorf("got exit code %d, want %d", code, tt.want)
			}
			if took, limit := time.Since(began), 3*time.Second; took > limit {
				t.Errorf("took %v, want less than the %v of the image's HEALTHCHECK", took, limit)
			}
			said, silent := &stdout, &stderr
			if tt.want != 0 {
				said, silent = &stderr, &stdout
			}
			line := said.String()
			if strings.Count(line, "\n") != 1 || !strings.Contains(line, tt.says) || strings.ContainsAny(line, "\r\x1b") || silent.Len() > 0 {
				t.Errorf("got %q and %q, want one line with %q", line, silent.String(), tt.says)
			}
			if tt.handler != nil && (<-asked != "GET /health, close true" || len(asked) > 0) {
				t.Error("got other requests than one GET /health on a connection of its own")
			}
		})
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
			if want := "version=devel max-connections=20 allowed-origins=https://b.example," + own + " drain-delay=1ms shutdown-timeout=5s"; p.settings != want {
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
			}
		})
	}
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
			last := dial(t, p.addr, get+"\r\n")
			last.wantAnswer(t, 200) // they are accepted in order
			last.Close()
			began := time.Now()
			for _, s := range tt.signals {
				noError(t, p.Process.Signal(s))
			}
			log := []string{p.waitFor(t, draining)}
			p.repeat(t, tt.late...)
			code, rest := p.exit()
			log = append(log, rest...)
			if code != tt.wantCode || len(log) != len(tt.wantLog) {
				t.Fatalf("got exit code %d and log %q, want %d and a line for each of %q", code, log, tt.wantCode, tt.wantLog)
			}
			for i, want := range tt.wantLog {
				if !strings.Contains(log[i], want) {
					t.Errorf("log: got %q, want %q in it", log[i], want)
				}
			}
			if took := time.Since(began); code == 130 && (took < 500*time.Millisecond || took > 3*time.Second) {
				t.Errorf("got the end %v after the first signal, want it after half a second", took)
			}
		})
	}
}

// TestLife runs the whole life of the process without a network and in fake time, and looks at it
// as the clients of a rolling restart do. Nobody can delay the end for longer than a request may take.
func TestLife(t *testing.T) {
	t.Parallel()
	const delay, call = time.Second, 50 * time.Millisecond // the last call, before and after the close
	for _, tt := range []struct {
		name      string
		sent      string // before the signal; the answer to a whole request is awaited
		later     string // after the listener has closed
		timeout   time.Duration
		want      time.Duration // from the signal to the end
		wantError string
		wantCode  int // of a second answer
	}{
		{name: "idle", sent: get + "\r\n", want: delay + 2*call},
		{name: "an extra line end", sent: get + "\r\n\r\n", want: delay + 2*call},
		{name: "a part of the next request that came with the last", sent: get + "\r\n" + get, want: delay + 2*call},
		{name: "a request after the close", sent: get + "\r\n", later: get + "\r\n", want: delay + 2*call, wantCode: 503},
		{name: "a byte after the close", sent: get + "\r\n", later: "G", want: delay + call + readTimeout},
		{name: "a byte after the close, and too little time", sent: get + "\r\n", later: "G", timeout: time.Second, want: delay + 3*call + time.Second,
			wantError: "requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inner, stop := newPipes(), make(chan os.Signal, 1)
				conf := config{maxConnections: 3, origins: []string{"*"}, drainDelay: delay, shutdownTimeout: cmp.Or(tt.timeout, time.Hour)}
				var ended time.Time
				var err error
				var life sync.WaitGroup
				life.Go(func() {
					err = serve(inner, conf, stop, slog.New(slog.DiscardHandler))
					ended = time.Now()
				})
				c, _ := inner.dial(tt.sent)
				if resp, _ := c.wantAnswer(t, 200); resp.Close {
					t.Error("before: got Connection: close, want it kept")
				}
				inner.dial("") // a client that asks nothing
				half, _ := inner.dial(get)
				time.Sleep(time.Second) // of the 5 s that it has
				began := time.Now()
				stop <- syscall.SIGTERM
				time.Sleep(delay) // the listener is about to close
				half.send(t, "\r\n")
				if resp, body := half.wantAnswer(t, 503); body != wantDraining || !resp.Close {
					t.Errorf("draining: got %q, Connection: close %t; want %q, true", body, resp.Close, wantDraining)
				}
				<-inner.closed
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

// TestReaderGone runs the program with pipes that nobody reads and a proxy that nobody can reach: the
// exit code is still its own. Unlike localhost, net/http would ask a proxy for LOCALHOST.
func TestReaderGone(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	_, port, _ := net.SplitHostPort(p.addr)
	for want, args := range map[int][]string{0: {"-probe", "-port", port}, 1: {"-probe", "-port", "1"}, exitUsage: {"-x"}} {
		cmd := command(t, []string{"HOST=LOCALHOST", "HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1"}, args...)
		r, w, err := os.Pipe()
		noError(t, err)
		noError(t, r.Close())
		cmd.Stdout, cmd.Stderr = w, w
		cmd.Run()
		if got := exitCode(cmd); got != want {
			t.Errorf("%q: got exit code %d, want %d", args, got, want)
		}
	}
}

// TestLogStalls lets the reader of the log stall while more lines come than find room, and go on.
func TestLogStalls(t *testing.T) {
	t.Parallel()
	_, unread := io.Pipe()
	began := time.Now()
	if code := run([]string{"-x"}, os.Getenv, io.Discard, unread); code != exitUsage || time.Since(began) > 3*time.Second {
		t.Errorf("nobody reads: got exit code %d after %v, want %d soon", code, time.Since(began), exitUsage)
	}
	r, w := io.Pipe()
	log := newLogWriter(w)
	for i := range 1000 {
		fmt.Fprintf(log, "line %d\n", i)
	}
	read := readLines(r)
	for i := range 100 { // lines, which find room
		if line := <-read; line != fmt.Sprint("line ", i) {
			t.Fatalf("got %q, want line %d", line, i)
		}
	}
	waitFor(t, "room", func() bool { return len(log.lines) == 0 })
	fmt.Fprintln(log, "the last line")
	log.flush()
	w.Close()
	last := ""
	for line := range read {
		last = line
	}
	if last != "the last line" {
		t.Errorf("got %q at the end, want the last line", last)
	}
}

// The connections, in a listener with a limit of the test's own.

// TestGivesWay fills all places, without a network and in fake time, and asks for one more.
func TestGivesWay(t *testing.T) {
	t.Parallel()
	const post = "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100\r\n\r\n"
	const chunked = "POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
	pad := func(text string, size int) string { return text + strings.Repeat("x", size-len(text)) }
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
	body, deaf := send(post), send(get+"\r\n")
	idle, busy := ask(get+"\r\n"), ask("GET /busy HTTP/1.1\r\nHost: a.example\r\n\r\n")
	duplex := func(c net.Conn) {
		io.WriteString(c, strings.Replace(post, "/", "/duplex", 1))
		time.Sleep(500 * time.Millisecond)
		io.WriteString(c, strings.Repeat("x", 100))
	}
	for _, tt := range []struct {
		name          string
		first, second func(net.Conn) // the second comes a second later
		pause         time.Duration  // until one more comes
		want          int            // which is closed
		wantWait      time.Duration  // for the place
	}{
		{name: "silent", first: silent, second: silent, pause: time.Second, want: 0},
		{name: "idle before silent", first: idle, second: silent, pause: time.Second, want: 0},
		{name: "dripping headers", first: drip(get), second: idle, pause: time.Second, want: 0},
		{name: "a request that leaves room for a byte in the buffer", first: send(pad("GET /", 4<<10-1)), second: silent, pause: time.Second, want: 0},
		{name: "a request that leaves room for a byte in 20 KiB", first: send(pad("GET /", 20<<10-1)), second: silent, pause: time.Second, want: 0},
		{name: "an answer that is not taken", first: deaf, second: silent, pause: time.Second, want: 0},
		{name: "a body that never comes", first: body, second: silent, pause: time.Millisecond, want: 0},
		{name: "a body that drips", first: drip(post), second: silent, pause: time.Second, want: 0},
		{name: "a chunk's size that leaves room for a byte in the buffer", first: send(chunked + pad("1;", 4<<10-1)), second: silent, pause: time.Second, want: 0},
		{name: "a body without a deadline", first: send(strings.Replace(post, "/", "/patient", 1)), second: silent, pause: time.Second, want: 0},
		{name: "an answer that is not taken after a body that was", first: duplex, second: silent, pause: time.Second, want: 0},
		{name: "a body that was begun late", first: late, second: silent, pause: 1100 * time.Millisecond, want: 1},
		{name: "a handler at work does not wait for its client", first: busy, second: silent, pause: time.Second, want: 1},
		{name: "a request on its way has time", first: busy, second: silent, want: 1, wantWait: 200 * time.Millisecond},
		{name: "all are answered", first: busy, second: busy, want: 0, wantWait: 4200 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				mux := http.NewServeMux()
				mux.HandleFunc("GET /busy", func(http.ResponseWriter, *http.Request) { time.Sleep(5 * time.Second) })
				mux.HandleFunc("POST /", func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/patient" {
						http.NewResponseController(w).SetReadDeadline(time.Time{})
					}
					io.ReadAll(r.Body)
				})
				mux.HandleFunc("POST /duplex", readAndWrite)
				mux.Handle("GET /health", handler(t, "*", false))
				inner := newPipes()
				_, srv := serveLimited(inner, 2, mux, slog.New(slog.DiscardHandler))
				var theirs []net.Conn
				for i, does := range []func(net.Conn){tt.first, tt.second} {
					time.Sleep(time.Duration(i) * time.Second)
					conn, server := inner.dial("")
					theirs = append(theirs, server)
					go does(conn)
				}
				time.Sleep(tt.pause)
				synctest.Wait()
				began := time.Now()
				last, _ := inner.dial(get + "\r\n")
				last.wantAnswer(t, 200)
				if late := time.Since(began) - tt.wantWait; late < 0 || late > lookAgain || late > 0 && tt.wantWait == 0 {
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

// readAndWrite reads its body and writes an answer at once, as httputil.ReverseProxy does.
func readAndWrite(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).EnableFullDuplex()
	var reading sync.WaitGroup
	defer reading.Wait()
	reading.Go(func() { io.ReadAll(r.Body) })
	io.WriteString(w, strings.Repeat("x", 8<<10)) // more than net/http keeps
}

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	t.Run("a client that is told to leave", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			inner, stop := newPipes(), make(chan os.Signal, 1)
			var newest *client
			log := &lines{hook: func(line string) {
				if strings.Contains(line, "msg=draining") {
					newest.send(t, get+"\r\n")
					newest.wantAnswer(t, 503) // as soon as the log says so
				}
			}}
			var life sync.WaitGroup
			life.Go(func() {
				serve(inner, config{maxConnections: 1, origins: []string{"*"}}, stop, slog.New(slog.NewTextHandler(log, nil)))
			})
			synctest.Wait() // until it listens
			first, _ := inner.dial(get)
			newest, _ = inner.dial(get + "\r\n")
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
			log.want(t, "msg=listening", `level=WARN msg="connection limit reached, closing those that wait longest" max-connections=1`, "msg=draining", "msg=stopped")
		})
	})
	t.Run("a client that asks as it is chosen", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			inner := newPipes()
			ln, _ := serveLimited(inner, 1, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				time.Sleep(time.Second)
			}), slog.New(slog.DiscardHandler))
			c, _ := inner.dial("")
			time.Sleep(time.Second)
			chosen := ln.longestWaiting()
			c.send(t, get+"\r\n")
			synctest.Wait()
			chosen.giveWay()
			c.wantAnswer(t, 200)
			c.Close()
			ln.Close()
		})
	})
	const large = 1 << 20 // bytes, more than any buffer on the way holds
	for requests, write := range map[int]func(http.ResponseWriter){
		10_000: func(w http.ResponseWriter) { io.WriteString(w, strings.Repeat("x", 4000)) },
		1: func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", strconv.Itoa(large)) // so that net/http looks for ReadFrom
			io.CopyN(w, strings.NewReader(strings.Repeat("x", large)), large)
		},
	} {
		t.Run(fmt.Sprintf("%d answers that are not taken", requests), func(t *testing.T) {
			t.Parallel()
			var answers atomic.Int64
			addr, _, _ := serveOn(t, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				answers.Add(1)
				if r.URL.Path != "/health" {
					write(w)
				}
			}))
			deaf := dial(t, addr, "")
			deaf.Conn.(*net.TCPConn).SetReadBuffer(16 << 10)
			go io.WriteString(deaf, strings.Repeat("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", requests))
			waitFor(t, "the client not to read", func() bool {
				before := answers.Load()
				time.Sleep(50 * time.Millisecond)
				return before >= 1 && answers.Load() == before
			})
			if got := answers.Load(); got > 100 {
				t.Errorf("got %d answers to a client that never reads, want the few that small buffers hold", got)
			}
			last := dial(t, addr, get+"\r\n")
			last.SetDeadline(time.Now().Add(5 * time.Second)) // half of what the server gives to take an answer
			last.wantAnswer(t, 200)
			if _, err := io.Copy(io.Discard, deaf); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v after the answers, want a reset, so that the kernel keeps none of them", err)
			}
		})
	}
	t.Run("a connection that a handler takes over", func(t *testing.T) {
		t.Parallel()
		heard := make(chan string, 1)
		addr, ln, _ := serveOn(t, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				return
			}
			conn, _, err := http.NewResponseController(w).Hijack()
			noError(t, err)
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
			noError(t, conn.(interface{ CloseWrite() error }).CloseWrite())
			rest, _ := io.ReadAll(conn)
			heard <- string(rest)
		}))
		c := dial(t, addr, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
		io.Copy(io.Discard, c)
		last := dial(t, addr, get+"\r\n") // has the only place
		last.wantAnswer(t, 200)
		c.send(t, "more")
		noError(t, c.Conn.(*net.TCPConn).CloseWrite())
		if got := <-heard; got != "more" {
			t.Errorf("after CloseWrite: got %q from the client, want more", got)
		}
		last.Close()
		waitFor(t, "the others to be gone", func() bool { return ln.open() == 0 })
	})
	t.Run("a refusal in the only place", func(t *testing.T) {
		t.Parallel()
		addr, _, _ := serveOn(t, 1, handler(t, "*", false))
		refused := dial(t, addr, "")
		go io.WriteString(refused, get+"Cookie: "+strings.Repeat("x", 300<<10)) // fails before its end
		answer, err := io.ReadAll(refused)
		if !strings.HasPrefix(string(answer), "HTTP/1.1 431 ") || err != nil {
			t.Errorf("got %q and error %v, want a whole 431", answer, err)
		}
		dial(t, addr, get+"\r\n").wantAnswer(t, 200)
	})
	t.Run("a handler that panics", func(t *testing.T) {
		t.Parallel()
		addr, _, log := serveOn(t, 2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/health" {
				panic("oh")
			}
		}))
		dial(t, addr, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").wantClosed(t)
		dial(t, addr, get+"\r\n").wantAnswer(t, 200)
		log.want(t, `level=WARN msg="http: panic serving`)
	})
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS, HTTP/2 %t", http2), func(t *testing.T) {
			t.Parallel()
			srv := httptest.NewUnstartedServer(handler(t, "*", false))
			ln := newListener(srv.Listener, 1, slog.New(slog.DiscardHandler))
			srv.Listener, srv.Config.ConnState, srv.EnableHTTP2 = ln, ln.setState, http2
			srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelWarn)
			srv.StartTLS()
			defer srv.Close()
			dial(t, srv.Listener.Addr().String(), "") // keeps the place for as long as it may
			resp, err := srv.Client().Get(srv.URL + "/health")
			noError(t, err)
			resp.Body.Close()
			if resp.StatusCode != 200 || (resp.ProtoMajor == 2) != http2 {
				t.Errorf("got %s and %s, want 200", resp.Status, resp.Proto)
			}
			srv.Client().CloseIdleConnections()
			waitFor(t, "the place to be free", func() bool { return ln.open() == 0 })
		})
	}
}

// TestUpload sends a large body over loopback, whose packets are larger than the buffers, first to a
// handler that reads it.
func TestUpload(t *testing.T) {
	t.Parallel()
	const size = 1 << 20 // bytes
	addr, _, _ := serveOn(t, 1, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/idle" {
			<-r.Context().Done()
		}
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%d bytes, error %v", n, err)
	}))
	head := fmt.Sprintf(" HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n", size)
	c := dial(t, addr, "POST /"+head+strings.Repeat("x", size))
	if _, got := c.wantAnswer(t, 200); got != fmt.Sprintf("%d bytes, error <nil>", size) {
		t.Errorf("got %q, want all of %d bytes read in time", got, size)
	}
	c.send(t, "POST /idle"+head)
	noError(t, c.Conn.(*net.TCPConn).SetWriteBuffer(4<<10))
	c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	if n, _ := io.WriteString(c, strings.Repeat("x", size)); n > 200<<10 {
		t.Errorf("got %d bytes taken for a handler that does not read, want the few that small buffers hold", n)
	}
}

// TestAcceptErrors lets accept(2) fail, as it does when files or memory are short.
func TestAcceptErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log, inner := &lines{}, newPipes()
		_, srv := serveLimited(inner, 10, handler(t, "*", false), slog.New(slog.NewTextHandler(log, nil)))
		idle, _ := inner.dial("")
		time.Sleep(time.Second)
		young, _ := inner.dial("")
		for _, err := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EPROTO, syscall.ENETDOWN, syscall.EPERM, errors.New("anything")} {
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
		time.Sleep(59 * time.Second)
		inner.errs <- syscall.EMFILE
		time.Sleep(2 * time.Second)
		inner.errs <- syscall.EMFILE
		time.Sleep(time.Second)
		const want = `level=WARN msg="cannot accept connections, closing those that wait longest; if files are short, raise ulimit -n (LimitNOFILE)" err="too many open files"`
		log.want(t, want, want) // a line a minute
		inner.Close()
		srv.Close()
	})
}

// TestRaw sends what few HTTP libraries would, without a network and in fake time, and waits for the
// end of the connection.
func TestRaw(t *testing.T) {
	t.Parallel()
	const health, post = get + "\r\n", "POST /no-such-path HTTP/1.1\r\nHost: a.example\r\n"
	with := func(lines int) string { return get + strings.Repeat("a:b\r\n", lines-1) } // Host is one
	lines := func(raw string) []string { return strings.SplitAfter(raw, "\n") }
	cookie := func(size int) []string { return []string{get + "Cookie: " + strings.Repeat("x", size) + "\r\n\r\n"} }
	first := func(line string) []string { return []string{line + " HTTP/1.1\r\nHost: a.example\r\n\r\n"} }
	for _, tt := range []struct {
		name  string
		sent  []string      // a write each; a single byte each second
		pause time.Duration // before each write
		drip  string        // sent again and again, each second
		want  []int         // codes
		ends  bool
		end   time.Duration // after the connection was accepted, if it ends
	}{
		// ServeMux would redirect these, and many checks take a 3xx for healthy.
		{name: "two slashes", sent: first("GET //health"), want: []int{404}},
		{name: "slashes at the end", sent: first("GET /health//"), want: []int{404}},
		{name: "dots", sent: first("GET /../health"), want: []int{404}},
		{name: "a dot at the end", sent: first("OPTIONS /health/."), want: []int{404}},
		{name: "dots at the end, CONNECT", sent: first("CONNECT /health/.."), want: []int{404}},
		{name: "a whole URL without a path", sent: first("GET http://a.example"), want: []int{404}},
		{name: "length with chunked", sent: []string{get + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + health}, want: []int{200}, ends: true},
		{name: "HTTP/3.0", sent: []string{"GET /health HTTP/3.0\r\nHost: a.example\r\n\r\n"}, want: []int{505}, ends: true},
		{name: "an expectation", sent: []string{get + "Expect: x\r\n\r\n"}, want: []int{417}, ends: true},
		{name: "TLS", sent: []string{"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"}, want: []int{400}, ends: true},
		{name: "OPTIONS *", sent: first("OPTIONS *"), want: []int{400}, ends: true},
		{name: "20 KB of headers", sent: cookie(20<<10 - len(get) - 12), want: []int{200}},
		{name: "21 KB of headers", sent: cookie(21 << 10), want: []int{431}, ends: true, end: 500 * time.Millisecond}, // net/http adds 4 KiB to the 16
		{name: "100 headers, line by line", sent: lines(with(100) + "\r\n"), want: []int{200}},
		{name: "101 headers, line by line", sent: lines(with(101) + "\r\n"), want: []int{400}, ends: true},
		{name: "150 lines in 512 bytes", sent: []string{get + strings.Repeat("a:\n", 149) + "\n"}, want: []int{200}},
		{name: "200 lines in more", sent: []string{get + strings.Repeat("a:\n", 199) + "\n"}, want: []int{400}, ends: true},
		{name: "headers without end", sent: []string{with(700), with(700)}, want: []int{400}, ends: true},
		{name: "pipeline of 124", sent: []string{strings.Repeat("GET /health HTTP/1.1\r\nHost:a\r\n\r\n", 124)}, want: slices.Repeat([]int{200}, 124)},
		{name: "pipeline of 100 headers each", sent: []string{strings.Repeat(with(100)+"\r\n", 20)}, want: slices.Repeat([]int{200}, 20)},
		{name: "body of 1,000 lines", sent: []string{post + "Content-Length: 2000\r\n\r\n", strings.Repeat("x\n", 1000)}, want: []int{404}},
		{name: "body of 256 KiB", sent: []string{post + "Content-Length: 262144\r\n\r\n", strings.Repeat("x", 256<<10)}, want: []int{404}},
		{name: "a large body that never comes", sent: []string{post + "Content-Length: 300000\r\n\r\n"}, want: []int{404}, ends: true, end: 100 * time.Millisecond},
		{name: "a chunk that never comes", sent: []string{get + "Transfer-Encoding: chunked\r\n\r\n"}, want: []int{200}, ends: true, end: 100 * time.Millisecond},
		{name: "nothing", ends: true, end: 5 * time.Second},
		{name: "half a request", sent: []string{get}, ends: true, end: 5 * time.Second},
		{name: "half a request, late", pause: 4 * time.Second, sent: []string{get}, ends: true, end: 5 * time.Second},
		{name: "one byte at a time", drip: "G", want: []int{400}, ends: true, end: 5 * time.Second}, // net/http tells a line that is cut off from none
		{name: "nothing more", sent: []string{health}, want: []int{200}, ends: true, end: 620 * time.Second},
		{name: "an extra line end", pause: time.Second, sent: []string{health, "\r\n"}, want: []int{200}, ends: true, end: 621 * time.Second},
		{name: "a byte of the next", pause: time.Second, sent: []string{health, "G"}, want: []int{200}, ends: true, end: 7 * time.Second},
		{name: "the next, one byte at a time", sent: []string{health}, drip: "G", want: []int{200, 400}, ends: true, end: 8 * time.Second}, // 5 s from the fourth on
		{name: "body that never comes", sent: []string{get + "Content-Length: 10\r\n\r\n"}, want: []int{200}, ends: true, end: 100 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inner := newPipes()
				_, srv := serveLimited(inner, 10, handler(t, "*", false), slog.New(slog.DiscardHandler))
				client, _ := inner.dial("")
				began := time.Now()
				go func() {
					for _, raw := range tt.sent {
						time.Sleep(tt.pause)
						io.WriteString(client, raw)
					}
					for tt.drip != "" {
						if _, err := io.WriteString(client, tt.drip); err != nil {
							return
						}
						time.Sleep(time.Second)
					}
				}()
				for _, code := range tt.want {
					client.wantAnswer(t, code)
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

// TestNetHTTP holds what conn relies on: the calls that net/http makes, in their order.
func TestNetHTTP(t *testing.T) {
	t.Parallel()
	const begin = "new; deadline 5s; read; "
	const serve = "active; deadline none; look; handler; write; deadline past; deadline none; idle; deadline 10m20s; read; "
	const end = "close; closed; "
	for _, tt := range []struct {
		name string
		sent []string // a second apart; then the client closes the connection
		want string   // what the calls begin with
	}{
		{name: "requests, the second in parts", sent: []string{get + "\r\n", "GET", get[3:], "\r\n"},
			want: begin + "deadline 5s; " + serve + "read; deadline 5s; read; deadline 4s; " + serve + end},
		{name: "headers that are too large", sent: []string{get + "Cookie: " + strings.Repeat("x", 20<<10)},
			want: begin + "read; read; read; read; read; active; write; close write; " + end},
		{name: "a request that is cut off", sent: []string{get},
			want: begin + "read; read; active; write; " + end},
		{name: "a body that the handler leaves unread", sent: []string{get + "Content-Length: 1\r\n\r\n", "x"},
			want: begin + "deadline 5s; active; handler; read; deadline none; "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				inner, c := newPipes(), &lines{}
				srv := newServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
					time.Sleep(time.Millisecond) // until net/http looks beside the handler
					io.WriteString(c, "handler; ")
				}), slog.New(slog.DiscardHandler))
				srv.ConnState = func(_ net.Conn, s http.ConnState) { io.WriteString(c, s.String()+"; ") }
				go srv.Serve(inner)
				client, server := net.Pipe()
				inner.conns <- callsConn{server, c}
				go io.Copy(io.Discard, client)
				for _, raw := range tt.sent {
					go io.WriteString(client, raw)
					time.Sleep(time.Second)
				}
				client.Close()
				time.Sleep(time.Second)
				srv.Close()
				synctest.Wait()
				got := strings.Join(c.all, "")
				if !strings.HasPrefix(got, tt.want) || strings.Count(got, "closed") != 1 {
					t.Errorf("got the calls\n%s\nwant them to begin with\n%s\nand closed once", got, tt.want)
				}
			})
		})
	}
}

// callsConn writes down what net/http calls.
type callsConn struct {
	net.Conn
	calls *lines
}

func (c callsConn) note(call string) { io.WriteString(c.calls, call+"; ") }

func (c callsConn) Read(p []byte) (int, error) {
	switch {
	case len(p) == 1:
		c.note("look")
	case len(p) <= serverBuffer:
		c.note("read")
	default:
		c.note("large read")
	}
	return c.Conn.Read(p)
}

func (c callsConn) SetReadDeadline(d time.Time) error {
	switch left := time.Until(d); {
	case d.IsZero():
		c.note("deadline none")
	case left < 0:
		c.note("deadline past")
	default:
		c.note("deadline " + left.String())
	}
	return c.Conn.SetReadDeadline(d)
}

func (c callsConn) Write(p []byte) (int, error) { c.note("write"); return c.Conn.Write(p) }
func (c callsConn) CloseWrite() error           { c.note("close write"); return nil }
func (c callsConn) Close() error                { c.note("close"); return c.Conn.Close() }

// FuzzHandler sends any request that net/http can hand to the handler.
func FuzzHandler(f *testing.F) {
	const list = "https://a.example,http://localhost:3000,https://*.corp.example"
	f.Add("GET", "/health", "https://a.example", "", "", false)
	f.Add("HEAD", "/health", "https://x.corp.example", "", "", true)
	f.Add("OPTIONS", "/health", "http://localhost:3000", "GET", "authorization,x-request-id", false)
	f.Add("OPTIONS", "*", "null", "DELETE", "", false)
	f.Add("GET", "//health/../%2e/?a;b", "https://a.example/", "", "", false)
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

		if rec.Code/100 == 3 || rec.Code >= 500 && !drain {
			t.Errorf("got code %d", rec.Code)
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
		"app://.", "file://", "https://a.example/", "https://a.example:443", "null", "https://*corp.example", "http://127.1", "https://a.example,https://b.example", " https://a.example ,", "https://\u212a.example"} {
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
func serveOn(t *testing.T, limit int, h http.Handler) (addr string, ln *listener, log *lines) {
	t.Helper()
	config := net.ListenConfig{Control: smallBuffers}
	inner, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	noError(t, err)
	log = &lines{}
	ln, srv := serveLimited(inner, limit, h, slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(func() { srv.Close() })
	return inner.Addr().String(), ln, log
}

func serveLimited(inner net.Listener, limit int, h http.Handler, log *slog.Logger) (*listener, *http.Server) {
	ln := newListener(inner, limit, log)
	srv := newServer(closeWhile(ln.shedding.Load, h), log)
	srv.ConnState = ln.setState
	go srv.Serve(ln)
	return ln, srv
}

// lines is a log that keeps its lines and passes them on to hook.
type lines struct {
	mu   sync.Mutex
	all  []string
	hook func(line string)
}

func (l *lines) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(line))
	if l.hook != nil {
		l.hook(string(line))
	}
	return len(line), nil
}

// want checks that there is a line for each text.
func (l *lines) want(t *testing.T, texts ...string) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	contains := func(line, text string) bool { return strings.Contains(line, text) }
	if !slices.EqualFunc(l.all, texts, contains) {
		t.Errorf("got log %q, want a line for each of %q", l.all, texts)
	}
}

// pipes is a listener without a network, for tests in fake time.
type pipes struct {
	conns  chan net.Conn
	errs   chan error // of Accept
	closed chan struct{}
	close  func()

	accepting sync.Mutex
}

func newPipes() *pipes {
	closed := make(chan struct{})
	return &pipes{conns: make(chan net.Conn, 1), errs: make(chan error), closed: closed, close: sync.OnceFunc(func() { close(closed) })}
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
	if !p.accepting.TryLock() {
		panic("net/http calls Accept twice at once")
	}
	defer p.accepting.Unlock()
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

// follow starts a program and reads its log. It kills the program if that takes too long.
func follow(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	noError(t, err)
	noError(t, cmd.Start())
	kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &process{Cmd: cmd, log: readLines(stderr)}
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

// waitFor returns the next line of the log that has text.
func (p *process) waitFor(t *testing.T, text string) string {
	t.Helper()
	for line := range p.log {
		if strings.Contains(line, text) {
			return line
		}
	}
	t.Fatalf("the program ended, want a line with %q", text)
	return ""
}

// exit waits for the end and returns the exit code and the rest of the log.
func (p *process) exit() (code int, log []string) {
	for line := range p.log {
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
