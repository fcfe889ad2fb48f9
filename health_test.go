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
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(s) { // as under nohup; a signal that is caught is not ignored by children
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	os.Exit(m.Run())
}

// Requests in, answers out.

func TestAnswers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, method, target string
		accept, body         string // of the request
		draining             bool
		wantCode             int
		wantBody             string // only compared for answers of our own
	}{
		{name: "GET", method: "GET", target: "/health", wantCode: 200, wantBody: wantHealthy},
		{name: "HEAD", method: "HEAD", target: "/health", wantCode: 200},
		{name: "query", method: "GET", target: "/health?verbose=1;x&%zz", wantCode: 200, wantBody: wantHealthy},
		{name: "escaped", method: "GET", target: "/%68ealth", wantCode: 200, wantBody: wantHealthy},
		{name: "body", method: "GET", target: "/health", body: `{"a":1}`, wantCode: 200, wantBody: wantHealthy},
		{name: "Accept XML", method: "GET", target: "/health", accept: "application/xml", wantCode: 200, wantBody: wantHealthy},
		{name: "Accept nothing", method: "GET", target: "/health", accept: "*/*;q=0", wantCode: 200, wantBody: wantHealthy},
		{name: "POST", method: "POST", target: "/health", wantCode: 405},
		{name: "POST with a body", method: "POST", target: "/health", body: "x", wantCode: 405},
		{name: "TRACE", method: "TRACE", target: "/health", wantCode: 405},
		{name: "OPTIONS, no preflight", method: "OPTIONS", target: "/health", wantCode: 405},
		{name: "unknown method", method: "BREW", target: "/health", wantCode: 405},
		{name: "root", method: "GET", target: "/", wantCode: 404},
		{name: "trailing slash", method: "GET", target: "/health/", wantCode: 404},
		{name: "healthz", method: "GET", target: "/healthz", wantCode: 404},
		{name: "upper case", method: "GET", target: "/HEALTH", wantCode: 404},
		{name: "POST elsewhere", method: "POST", target: "/", wantCode: 404},
		{name: "GET draining", method: "GET", target: "/health", draining: true, wantCode: 503, wantBody: wantDraining},
		{name: "HEAD draining", method: "HEAD", target: "/health", draining: true, wantCode: 503},
		{name: "POST draining", method: "POST", target: "/health", draining: true, wantCode: 405},
		{name: "elsewhere draining", method: "GET", target: "/", draining: true, wantCode: 404},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(handler(t, "*", tt.draining))
			t.Cleanup(server.Close)
			req, err := http.NewRequest(tt.method, server.URL+tt.target, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Accept", tt.accept)
			resp, body := do(t, req)
			if resp.StatusCode != tt.wantCode {
				t.Errorf("code: got %d, want %d", resp.StatusCode, tt.wantCode)
			}
			if want := tt.draining || tt.body != ""; resp.Close != want {
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
		})
	}
}

// TestUncleanPaths asks for what ServeMux would redirect: a check takes a 3xx for good.
func TestUncleanPaths(t *testing.T) {
	t.Parallel()
	for _, draining := range []bool{false, true} {
		server := httptest.NewServer(handler(t, "*", draining))
		t.Cleanup(server.Close)
		addr := server.Listener.Addr().String()
		for _, target := range []string{
			"//health", "///health", "/health//", "//", "/./health", "/../health", "/health/.", "/health/..", "/a/../health", "//health?x=1", "http://a.example", "http://a.example//health",
		} {
			for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS", "TRACE", "CONNECT", "BREW"} {
				if method == "CONNECT" && strings.HasPrefix(target, "http:") {
					continue // it has a target of its own kind
				}
				t.Run(fmt.Sprintf("%s %s, draining %t", method, target, draining), func(t *testing.T) {
					t.Parallel()
					c := dial(t, addr, method+" "+target+" HTTP/1.1\r\nHost: a.example\r\n\r\n")
					req := &http.Request{Method: method}
					resp, err := http.ReadResponse(c.answers, req)
					if err != nil || resp.StatusCode != 404 {
						t.Errorf("got %v and error %v, want a 404", resp, err)
					}
				})
			}
		}
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
		{name: "POST, which rs/cors leaves alone", origins: "*", method: "POST", origin: "https://any.example", wantCode: 405},
		{name: "preflight", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "GET", headers: "authorization,x-request-id", wantCode: 204, wantOrigin: "*"},
		{name: "preflight, listed, draining", origins: list, method: "OPTIONS", origin: "https://a.example", draining: true, asks: "HEAD", wantCode: 204, wantOrigin: "https://a.example"},
		{name: "preflight, not listed", origins: list, method: "OPTIONS", origin: "https://b.example", asks: "GET", wantCode: 204},
		{name: "preflight for DELETE", origins: "*", method: "OPTIONS", origin: "https://any.example", asks: "DELETE", wantCode: 204},
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
	mux.HandleFunc("POST /contacts", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%d bytes, error %v", len(body), err)
	})
	s := serveOn(t, 1, time.Hour, newHandler(mux, []string{"*"}, func() bool { return false }))
	body := strings.Repeat("a\n", 1000)
	c := dial(t, s.addr, "POST /contacts HTTP/1.1\r\nHost: a.example\r\n")
	c.send(t, fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)))
	c.send(t, body[:len(body)/2]) // in one read with the headers, or in the next
	waitFor(t, "the handler", func() bool { return s.count(answering) == 1 })
	time.Sleep(300 * time.Millisecond)
	c.send(t, body[len(body)/2:])
	if _, got := c.wantAnswer(t, 200); got != fmt.Sprintf("%d bytes, error <nil>", len(body)) {
		t.Errorf("got %q, want the whole body read", got)
	}
	c.wantClosed(t)
}

// Settings.

func TestConfig(t *testing.T) {
	t.Parallel()
	defaults := config{port: "5034", maxConnections: 1000, origins: []string{"*"}, shutdownTimeout: 10 * time.Second}
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
			args: []string{"-host", "", "-port=65535", "-max-connections", "20000", "-allowed-origins", "*", "--drain-delay", "0s", "-shutdown-timeout", "500ms", "-probe"},
			env:  map[string]string{"HOST": "http://x", "PORT": "x", "MAX_CONNECTIONS": "0", "ALLOWED_ORIGINS": "null", "DRAIN_DELAY": "1", "SHUTDOWN_TIMEOUT": "-1s"},
			want: config{port: "65535", maxConnections: 20000, origins: []string{"*"}, shutdownTimeout: 500 * time.Millisecond, probe: true}},
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

func TestHosts(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]string{
		"": "", "0.0.0.0": "0.0.0.0", "::": "::", "[::]": "::", "[2001:db8::1]": "2001:db8::1", "fe80::1%eth0": "fe80::1%eth0", "[fe80::1%eth0]": "fe80::1%eth0",
		"localhost": "localhost", "my_host-1": "my_host-1", "A.Example": "A.Example", "a.example.": "a.example.", "1.a": "1.a",
	} {
		got, err := parse([]string{"-host", value}, func(string) string { return "" }, io.Discard)
		if err != nil || got.host != want {
			t.Errorf("%q: got %q and error %v, want %q", value, got.host, err, want)
		}
	}
}

// TestBadInput gives every setting every kind of wrong value, as flag and as variable. The host
// is not of this machine, so that a value which passes by mistake ends in exit code 1 and not in
// a server.
func TestBadInput(t *testing.T) {
	t.Parallel()
	const elsewhere = "192.0.2.1"
	for _, tt := range []struct {
		flag   string
		want   string // the beginning of what would be right
		values []string
	}{
		{flag: "host", want: "want an IP address or a host name", values: []string{
			"127.0.0.1\r", "0.0.0.0 ", " ", `"0.0.0.0"`, "'::'", "127.1", "1.2.3.4.5", "01.2.3.4", "0x7f.1", "256.0.0.1", "[::1", "::1]", "[]", "[a.example]", "[::1]:80",
			"http://localhost", "localhost:5034", "localhost/", "a b", "a..b", ".a", "bücher.example", "*", "no host", "a\x1b[2Kb"}},
		{flag: "port", want: "want a port number from 0 to 65535", values: []string{"x", "-1", "65536", "+80", "0x50", "80 ", "80\r", "http", "1.5"}},
		{flag: "max-connections", want: "want an integer of 1 or more", values: []string{"0", "-1", "1.5", "1k", "ten", " 1", "1\r", "9223372036854775808"}},
		{flag: "drain-delay", want: "want a duration of 0s or more", values: []string{"5", "0", "-0", "-1s", "x", "1", "s", "1d", "5 s", "5s\r"}},
		{flag: "shutdown-timeout", want: "want a duration of 0s or more", values: []string{"10", "0", "-1ns", "soon", `"10s"`}},
		{flag: "allowed-origins", want: "want the scheme://host[:port] of a page", values: []string{
			"example.com", "localhost:3000", "null", "https://", "https://:8080", "//a.example", "https://a b.example",
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
	} {
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
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"unknown flag", []string{"-prot", "80"}, []string{"-prot", "-h lists the flags"}},
		{"unknown flag that moves the cursor", []string{"-pr\r\n\x1b[2Kot"}, []string{"-pr [2Kot", "-h lists the flags"}},
		{"no value", []string{"-port"}, []string{"-port", "-h lists the flags"}},
		{"empty list", []string{"-allowed-origins", ""}, []string{"flag -allowed-origins", `""`, "want"}},
		{"bad probe", []string{"-probe=maybe"}, []string{"-probe", `"maybe"`, "-h lists the flags"}},
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
		for _, want := range []string{
			"-host", "[HOST]", "-port", "[PORT] (default 5034)", "-max-connections", "[MAX_CONNECTIONS] (default 1000)", "-allowed-origins", "[ALLOWED_ORIGINS] (default *)",
			"-drain-delay", "[DRAIN_DELAY] (default 0s)", "-shutdown-timeout", "[SHUTDOWN_TIMEOUT] (default 10s)", "-probe",
		} {
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
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked <- r.Method + " " + r.URL.Path
				tt.handler(w, r)
			}))
			server.Listener.Close()
			server.Listener = ln
			server.Start()
			if tt.handler == nil {
				server.Close()
			}
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
			if want := "http://" + net.JoinHostPort(tt.open[0], port) + "/health"; p.url != want {
				t.Errorf("got URL %q to try, want %q", p.url, want)
			}
			if want := "max-connections=20 allowed-origins=https://b.example," + own + " drain-delay=1ms shutdown-timeout=5s"; p.settings != want {
				t.Errorf("got settings %q, want %q", p.settings, want)
			}
			for _, host := range append(tt.open, tt.closed...) {
				req, err := http.NewRequest("GET", "http://"+net.JoinHostPort(host, port)+"/health", nil)
				if err != nil {
					t.Fatal(err)
				}
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

// TestEnd is what becomes of the process and of a connection that is open at the signal. Signals
// that come at once are sent one after the other; late ones until the end, for only a SIGINT that
// comes half a second after the first ends the drain.
func TestEnd(t *testing.T) {
	t.Parallel()
	const draining, stopped = "msg=draining", "msg=stopped"
	term, interrupt, hup := syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP
	for _, tt := range []struct {
		name     string
		env      string
		sent     string // on the connection
		signals  []syscall.Signal
		late     []syscall.Signal
		rest     string // sent when the listener has closed
		wantCode int
		wantLog  []string // after the line for listening
	}{
		{name: "SIGTERM", env: "MAX_CONNECTIONS=1", signals: []syscall.Signal{term}, wantLog: []string{"msg=draining signal=terminated delay=0s", stopped}},
		{name: "Ctrl-C", signals: []syscall.Signal{interrupt}, wantLog: []string{"msg=draining signal=interrupt delay=0s", stopped}},
		{name: "closed terminal", signals: []syscall.Signal{hup}, wantLog: []string{"msg=draining signal=hangup delay=0s", stopped}},
		{name: "half a request", sent: get, signals: []syscall.Signal{term}, rest: "\r\n", wantLog: []string{draining, stopped}},
		{name: "half a request, too late", env: "SHUTDOWN_TIMEOUT=0s", sent: get, signals: []syscall.Signal{term}, wantCode: 1, wantLog: []string{draining, "-shutdown-timeout (SHUTDOWN_TIMEOUT)"}},
		{name: "half of the second request", sent: get + "\r\n" + "G", signals: []syscall.Signal{term}, rest: get[1:] + "\r\n", wantLog: []string{draining, stopped}},
		{name: "one of two requests", env: "SHUTDOWN_TIMEOUT=2s", sent: get + "\r\n", signals: []syscall.Signal{term}, wantLog: []string{draining, stopped}},
		{name: "no request", env: "SHUTDOWN_TIMEOUT=2s", sent: "-", signals: []syscall.Signal{term}, wantLog: []string{draining, stopped}},
		{name: "all at once in the drain delay", env: "DRAIN_DELAY=200ms", signals: []syscall.Signal{term, hup, interrupt, interrupt, term}, wantLog: []string{"msg=draining signal=", stopped}},
		{name: "SIGTERM and SIGHUP later", env: "DRAIN_DELAY=2s", signals: []syscall.Signal{term}, late: []syscall.Signal{term, hup}, wantLog: []string{draining, stopped}},
		{name: "Ctrl-C in the drain delay", env: "DRAIN_DELAY=1h", signals: []syscall.Signal{term}, late: []syscall.Signal{interrupt}, wantCode: 1, wantLog: []string{"msg=draining signal=terminated delay=1h", "second signal: interrupt"}},
		{name: "Ctrl-C twice", env: "DRAIN_DELAY=1h", signals: []syscall.Signal{interrupt}, late: []syscall.Signal{interrupt}, wantCode: 1, wantLog: []string{draining, "second signal: interrupt"}},
		{name: "Ctrl-C in the shutdown", env: "SHUTDOWN_TIMEOUT=1h", sent: "POST /health HTTP/1.1\r\nHost: a.example\r\n", signals: []syscall.Signal{term}, late: []syscall.Signal{interrupt}, wantCode: 1, wantLog: []string{draining, "second signal: interrupt"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, []string{tt.env})
			var c *client
			if tt.sent != "" {
				c = p.dial(t, strings.Trim(tt.sent, "-"))
			}
			if strings.Contains(tt.sent, "\r\n\r\n") {
				c.wantAnswer(t, 200)
			}
			p.get(t, "/health") // accepted in order, so c has been too
			for _, s := range tt.signals {
				p.signal(t, s)
			}
			log := []string{p.waitFor(t, draining)}
			ended := make(chan struct{})
			var late sync.WaitGroup
			defer late.Wait()
			defer close(ended)
			late.Go(func() {
				for tick := time.NewTicker(100 * time.Millisecond); ; {
					select {
					case <-ended:
						return
					case <-tick.C:
					}
					for _, s := range tt.late {
						p.Process.Signal(s)
					}
				}
			})
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

// TestOrders sends signals as fast as they are taken, and then those of a person in a hurry.
func TestOrders(t *testing.T) {
	t.Parallel()
	signals := make(chan os.Signal)
	stop, hurry := orders(signals)
	began := time.Now()
	for _, s := range []os.Signal{os.Interrupt, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, os.Interrupt, syscall.SIGTERM} {
		signals <- s
	}
	if got := fmt.Sprint(context.Cause(stop), ", ", context.Cause(hurry)); got != "interrupt, <nil>" {
		t.Errorf("got causes %s, want the first signal for the stop and no hurry", got)
	}
	for hurry.Err() == nil && time.Since(began) < patience {
		time.Sleep(10 * time.Millisecond)
		signals <- syscall.SIGTERM
		signals <- os.Interrupt
	}
	signals <- syscall.SIGTERM // so that what went before has been done with
	if got, want := time.Since(began), 500*time.Millisecond; got < want || hurry.Err() == nil {
		t.Errorf("got the hurry of a second SIGINT after %v (%v), want it after %v", got, context.Cause(hurry), want)
	}
}

func TestGrace(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]time.Duration{
		1: 200 * time.Microsecond, 1000: 200 * time.Millisecond, 24_999: 4999800 * time.Microsecond,
		25_000: 5 * time.Second, 25_001: 5 * time.Second, 1 << 62: 5 * time.Second,
	} {
		if got := grace(n); got != want {
			t.Errorf("%d: got %v, want %v", n, got, want)
		}
	}
}

// TestIgnoredSignals starts the program as nohup does, and a shell's background.
func TestIgnoredSignals(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]syscall.Signal{"HUP": syscall.SIGHUP, "INT": syscall.SIGINT} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			program := command(t, []string{"HOST=127.0.0.1", "PORT=0"})
			shell := exec.Command("sh", "-c", "trap '' "+name+"; exec "+program.Path)
			shell.Env = program.Env
			p := follow(t, shell)
			p.listening(t)
			p.signal(t, s)
			p.signal(t, syscall.SIGTERM)
			if line := p.waitFor(t, "msg=draining"); !strings.Contains(line, "signal=terminated") {
				t.Errorf("got %q, want it to drain for SIGTERM alone", line)
			}
			if code, log := p.exit(t); code != 0 {
				t.Errorf("got exit code %d and log %q, want 0", code, log)
			}
		})
	}
}

// TestStopInLookup stops the program while it waits for a DNS server that does not answer.
func TestStopInLookup(t *testing.T) {
	t.Parallel()
	cmd := command(t, []string{"TEST_DNS=silent", "HOST=a.example", "PORT=0"})
	p := follow(t, cmd)
	p.waitFor(t, "asking DNS")
	p.signal(t, syscall.SIGTERM)
	code, log := p.exit(t)
	if all := strings.Join(log, "\n"); code != 0 || !strings.Contains(all, "msg=stopped signal=terminated") {
		t.Errorf("got exit code %d and log %q, want 0 and a line for the stop", code, log)
	}
}

// TestDrain is a rolling restart as each kind of client sees it, in the order in which things
// happen.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"DRAIN_DELAY=1s", "ALLOWED_ORIGINS=https://a.example"})
	kept := []struct {
		raw  string // asked on a kept connection while the program drains
		code int
		*client
	}{
		{raw: get + "\r\n", code: 503},
		{raw: "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", code: 404},
		{raw: "GET //health HTTP/1.1\r\nHost: a.example\r\n\r\n", code: 404},
		{raw: "DELETE /health HTTP/1.1\r\nHost: a.example\r\n\r\n", code: 405},
		{raw: "OPTIONS /health HTTP/1.1\r\nHost: a.example\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: GET\r\n\r\n", code: 204},
		{raw: "OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", code: 400},
		{raw: "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", code: 503},
	}
	for i := range kept {
		kept[i].client = p.dial(t, get+"\r\n")
		if resp, _ := kept[i].wantAnswer(t, 200); resp.Close {
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
	for _, c := range kept {
		c.send(t, c.raw)
		if resp, _ := c.wantAnswer(t, c.code); !resp.Close {
			t.Errorf("%q: got no Connection: close, want the client told to leave", c.raw)
		}
		c.wantClosed(t)
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

// TestLastCall asks on connections that have been idle so far as soon as the listener is seen to
// be closed. A machine that is busy may let one of them miss the last call of 50 ms, but not all.
func TestLastCall(t *testing.T) {
	t.Parallel()
	var answered atomic.Int64
	var attempts sync.WaitGroup
	for range 5 {
		p := start(t, nil)
		c := p.dial(t, get+"\r\n")
		c.wantAnswer(t, 200)
		attempts.Go(func() {
			p.signal(t, syscall.SIGTERM)
			p.closed(t)
			io.WriteString(c, get+"\r\n")
			if resp, err := http.ReadResponse(c.answers, nil); err == nil && resp.StatusCode == 503 {
				answered.Add(1)
			}
		})
	}
	attempts.Wait()
	if answered.Load() == 0 {
		t.Error("got no answer to a request that came with the end of the listener, want 503")
	}
}

// TestDrainWaitsForAccept has no connection, but one may still be on its way from Accept.
func TestDrainWaitsForAccept(t *testing.T) {
	t.Parallel()
	s := serveOn(t, 1, time.Hour, http.NotFoundHandler())
	never := make(chan struct{})
	if err := drain(t.Context(), config{}, s.ln, never); err == nil || !strings.Contains(err.Error(), "SHUTDOWN_TIMEOUT") {
		t.Errorf("got error %v, want the one of the timeout", err)
	}
}

// TestServe runs the life of the process inside the test, where coverage and mutation testing
// see it.
func TestServe(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, sent string // on the connection that is open at the first signal
		args       []string
		signal     os.Signal // the first
		then       os.Signal // sent until the end
		want       string    // error; none if empty
	}{
		{name: "one signal", sent: get + "\r\n", signal: syscall.SIGTERM},
		{name: "Ctrl-C twice", sent: get, args: []string{"-drain-delay", "1h"}, signal: os.Interrupt, then: os.Interrupt, want: "drain cut short by a second signal: interrupt"},
		{name: "timeout", sent: get, args: []string{"-shutdown-timeout", "0s"}, signal: syscall.SIGTERM, want: "requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := append(tt.args, "-host", "127.0.0.1", "-port", "0", "-max-connections", "1")
			c, err := parse(args, func(string) string { return "" }, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			signals, ended := make(chan os.Signal, 1), make(chan error, 1)
			stderr, log := io.Pipe()
			go func() { ended <- serve(c, signals, slog.New(slog.NewTextHandler(log, nil))) }()
			p := &process{log: readLines(stderr)}
			p.listening(t)
			first := p.dial(t, get)
			last := p.dial(t, tt.sent)
			first.wantClosed(t)
			if strings.HasSuffix(tt.sent, "\r\n\r\n") {
				last.wantAnswer(t, 200)
			}
			for next := tt.signal; ; next = tt.then {
				if next != nil {
					signals <- next
				}
				select {
				case err = <-ended:
				case <-time.After(100 * time.Millisecond):
					continue
				}
				break
			}
			if fmt.Sprint(err) != cmp.Or(tt.want, "<nil>") {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestLogReaderGone closes the reading end of standard error: the lines are lost, and nothing
// else.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	p := start(t, []string{"DRAIN_DELAY=1s", "MAX_CONNECTIONS=1"})
	p.stderr.Close()
	p.dial(t, get)
	p.get(t, "/health") // at the limit, which is worth a line
	p.signal(t, syscall.SIGTERM)
	waitFor(t, "a 503", func() bool {
		resp, _ := p.get(t, "/health")
		return resp.StatusCode == 503
	})
	p.closed(t)
	if code, _ := p.exit(t); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
}

// TestLogFull starts the program with a standard error that is full from the start, and whose
// reader is there but does not read.
func TestLogFull(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, env string
		args      []string
		then      os.Signal // sent again and again behind the first
		wantCode  int
	}{
		{name: "one signal", env: "DRAIN_DELAY=100ms"},
		{name: "one that ends it at once", env: "DRAIN_DELAY=1h", then: os.Interrupt, wantCode: exitFailure},
		{name: "wrong setting", args: []string{"-x"}, wantCode: exitUsage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			cmd := command(t, []string{"HOST=127.0.0.1", "PORT=" + port, "MAX_CONNECTIONS=1", tt.env}, tt.args...)
			cmd.Stderr = fullPipe(t)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				cmd.Wait()
				close(ended)
			}()
			t.Cleanup(func() {
				cmd.Process.Kill()
				<-ended
			})
			if tt.wantCode != exitUsage {
				p := &process{Cmd: cmd, addr: "127.0.0.1:" + port}
				p.opened(t)
				p.dial(t, get)
				p.get(t, "/health") // at the limit, which is worth a line
				p.signal(t, syscall.SIGTERM)
			}
			for timeout := time.After(patience); ; {
				select {
				case <-ended:
				case <-timeout:
					t.Fatal("still running")
				case <-time.After(100 * time.Millisecond):
					if tt.then != nil {
						cmd.Process.Signal(tt.then)
					}
					continue
				}
				break
			}
			if code := cmd.ProcessState.ExitCode(); code != tt.wantCode {
				t.Errorf("got exit code %d, want %d", code, tt.wantCode)
			}
		})
	}
}

// TestLogWriter writes more lines than there is room for, to a reader that begins late.
func TestLogWriter(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	l := newLogWriter(w)
	fmt.Fprintln(l, "line 0")
	waitFor(t, "the line to be on its way", func() bool { return len(l.queue) == 0 })
	const lines = 1000
	for i := 1; i < lines; i++ {
		fmt.Fprintf(l, "line %d\n", i)
	}
	got := readLines(r)
	kept := 1 + cap(l.queue)
	for i := range kept {
		if line, want := <-got, fmt.Sprintf("line %d", i); line != want {
			t.Fatalf("got %q, want %q", line, want)
		}
	}
	lost := fmt.Sprintf(`msg="log lines lost, nobody read them" lines=%d`, lines-kept)
	if line := <-got; !strings.Contains(line, lost) {
		t.Errorf("got %q, want %q", line, lost)
	}
	fmt.Fprintln(l, "one more")
	l.flush()
	if line := <-got; line != "one more" {
		t.Errorf("got %q, want the log to go on", line)
	}
}

// TestTimes reads the deadlines that the server gives its connections, which are too long to
// wait for.
func TestTimes(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const calls = 100 // more than there are for one request
	ln := &deadlines{inner, make(chan time.Duration, calls), make(chan time.Duration, calls)}
	srv := newServer(handler(t, "*", false), slog.New(slog.DiscardHandler))
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	c := dial(t, inner.Addr().String(), get+"\r\n")
	c.wantAnswer(t, 200)
	for _, tt := range []struct {
		name  string
		times <-chan time.Duration
		want  time.Duration
	}{
		{"a request", ln.read, 5 * time.Second},
		{"the next one", ln.read, 620 * time.Second},
		{"the answer", ln.write, 10 * time.Second},
	} {
		for timeout := time.After(patience); ; {
			select {
			case got := <-tt.times:
				if got.Round(time.Second) != tt.want {
					continue
				}
			case <-timeout:
				t.Errorf("%s: got no deadline in %v", tt.name, tt.want)
			}
			break
		}
	}
}

// deadlines is a listener whose connections tell how long their deadlines are away.
type deadlines struct {
	net.Listener
	read, write chan time.Duration
}

func (d *deadlines) Accept() (net.Conn, error) {
	c, err := d.Listener.Accept()
	return deadlineConn{c, d}, err
}

type deadlineConn struct {
	net.Conn
	*deadlines
}

func (c deadlineConn) Close() error { return c.Conn.Close() }

func (c deadlineConn) SetReadDeadline(t time.Time) error {
	c.read <- time.Until(t)
	return c.Conn.SetReadDeadline(t)
}

func (c deadlineConn) SetWriteDeadline(t time.Time) error {
	c.write <- time.Until(t)
	return c.Conn.SetWriteDeadline(t)
}

// The connections, in a listener with a limit and a time of the test's own.

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	const reached = `msg="connection limit reached`
	t.Run("the longest idle gives way", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 3, time.Nanosecond, handler(t, "*", false))
		first, second, third := dial(t, s.addr, ""), dial(t, s.addr, ""), dial(t, s.addr, "")
		for _, c := range []*client{first, second, third, first} {
			s.ask(t, c)
		}
		newest := dial(t, s.addr, "")
		second.wantClosed(t)
		s.calm(t)
		for _, c := range []*client{first, third, newest} {
			s.ask(t, c)
		}
		dial(t, s.addr, get+"\r\n").wantAnswer(t, 200)
		first.wantClosed(t)
		if log := s.log.String(); strings.Count(log, reached) != 1 || !strings.Contains(log, "max-connections=3") {
			t.Errorf("got log %q, want one line for two that gave way", log)
		}
	})
	t.Run("half-sent requests lock nobody out", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 3, time.Nanosecond, handler(t, "*", false))
		var half []*client
		for i, raw := range []string{"", get, "GET /hea"} {
			half = append(half, dial(t, s.addr, raw))
			waitFor(t, "the server to read", func() bool { return s.count(waiting) == i+1 })
		}
		silent, headers, line := half[0], half[1], half[2]
		dial(t, s.addr, get+"\r\n").wantAnswer(t, 200)
		silent.wantClosed(t)
		headers.send(t, "\r\n")
		headers.wantAnswer(t, 200)
		for range 3 {
			dial(t, s.addr, get)
		}
		line.wantClosed(t)
	})
	t.Run("a request has time to come", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 2, time.Hour, handler(t, "*", false))
		kept := dial(t, s.addr, "")
		s.ask(t, kept)
		first := dial(t, s.addr, "")
		waitFor(t, "two connections", func() bool { return s.count(waiting) == 2 })
		newest := dial(t, s.addr, get+"\r\n")
		waitFor(t, "the newest to wait", s.ln.crowded.Load)
		first.send(t, get+"\r\n")
		if resp, _ := first.wantAnswer(t, 200); !resp.Close {
			t.Error("got no Connection: close, want the client told to leave while another waits")
		}
		first.wantClosed(t)
		if resp, _ := newest.wantAnswer(t, 200); resp.Close {
			t.Error("got Connection: close, want the newest kept, for nobody waits any more")
		}
		s.ask(t, kept)
	})
	t.Run("a server that is late is not the client's fault", func(t *testing.T) {
		t.Parallel()
		inner, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln := newListener(inner, 1, time.Nanosecond, slog.New(slog.DiscardHandler))
		defer ln.Close()
		dial(t, inner.Addr().String(), get)
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first, _ := ln.next(); first != nil {
			t.Error("its turn to give way has come before the server has tried to read")
		}
		if _, err := c.Read(make([]byte, len(get))); err != nil {
			t.Fatal(err)
		}
		if next, _ := ln.next(); next != c {
			t.Error("its turn to give way does not come once the server has read")
		}
	})
	t.Run("a request that is answered keeps its place", func(t *testing.T) {
		t.Parallel()
		release := make(chan struct{})
		s := serveOn(t, 1, time.Nanosecond, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			<-release
		}))
		busy := dial(t, s.addr, get+"\r\n")
		waitFor(t, "the handler", func() bool { return s.count(answering) == 1 })
		newest := dial(t, s.addr, get+"\r\n")
		waitFor(t, "the newest to wait", s.ln.crowded.Load)
		waitFor(t, "the log", func() bool { return strings.Contains(s.log.String(), reached) })
		close(release)
		busy.wantAnswer(t, 200)
		newest.wantAnswer(t, 200)
	})
	t.Run("an answer that is not taken keeps no place", func(t *testing.T) {
		t.Parallel()
		var answers atomic.Int64
		h := handler(t, "*", false)
		s := serveOn(t, 3, time.Hour, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answers.Add(1)
			h.ServeHTTP(w, r)
		}))
		for range 3 {
			c := dial(t, s.addr, "")
			c.Conn.(*net.TCPConn).SetReadBuffer(16 << 10)
			go func() {
				for {
					if _, err := io.WriteString(c, get+"\r\n"); err != nil {
						return
					}
				}
			}()
		}
		waitFor(t, "the clients not to read", func() bool {
			before := answers.Load()
			time.Sleep(50 * time.Millisecond)
			return s.count(sending) == 3 && answers.Load() == before
		})
		if got := answers.Load(); got > 3*1000 {
			t.Errorf("got %d answers to clients that never read, want the few that small buffers hold", got)
		}
		dial(t, s.addr, get+"\r\n").wantAnswer(t, 200)
	})
	t.Run("one that is taken over is no concern", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 1, time.Hour, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
				}
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		}))
		dial(t, s.addr, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").wantAnswer(t, 200)
		last := dial(t, s.addr, get+"\r\n")
		last.wantAnswer(t, 200)
		last.Close()
		s.ln.Close()
		if err := s.ln.wait(t.Context()); err != nil {
			t.Errorf("got %v, want the end of all others", err)
		}
	})
	t.Run("the server survives a refusal without time", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 1, time.Hour, handler(t, "*", false))
		large := strings.Repeat("x", 300<<10) // behind an answer net/http reads 256 KiB at most
		for _, raw := range []string{
			get + "Cookie: " + large + "\r\n\r\n",
			get + "Content-Length: " + strconv.Itoa(len(large)) + "\r\n\r\n" + large,
		} {
			refused := dial(t, s.addr, "")
			io.WriteString(refused, raw) // fails where the server has closed before the end
			io.Copy(io.Discard, refused)
		}
		last := dial(t, s.addr, get+"\r\n")
		last.wantAnswer(t, 200)
		last.Close()
		s.ln.Close()
		if err := s.ln.wait(t.Context()); err != nil {
			t.Errorf("got %v, want every place given back", err)
		}
		if log := s.log.String(); strings.Contains(log, "panic") {
			t.Errorf("got log %q, want no panic", log)
		}
	})
	for _, tt := range []struct {
		name     string
		limit    int
		others   int // have a place
		crowded  bool
		wantTime bool // for the client to read why it was refused
	}{
		{name: "time to say why", limit: 2, wantTime: true},
		{name: "no time to say why while others wait", limit: 2, crowded: true},
		{name: "no time to say why with more than half of the places taken", limit: 3, others: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ln := newListener(inner, tt.limit, time.Hour, slog.New(slog.DiscardHandler))
			defer ln.Close()
			var refused *client
			var c net.Conn
			for range tt.others + 1 {
				refused = dial(t, inner.Addr().String(), "")
				if c, err = ln.Accept(); err != nil {
					t.Fatal(err)
				}
				defer c.Close()
			}
			ln.crowded.Store(tt.crowded)
			returned := false
			var server sync.WaitGroup
			server.Go(func() {
				c.(*conn).CloseWrite()
				returned = true
			})
			server.Wait()
			refused.wantClosed(t)
			if open := ln.conns.Len() > tt.others; open != tt.wantTime || returned != tt.wantTime {
				t.Errorf("got the place kept %t, the server going on %t, want both %t", open, returned, tt.wantTime)
			}
		})
	}
}

// TestCloseIdle closes connections in each phase, and one that becomes idle later.
func TestCloseIdle(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	s := serveOn(t, 10, time.Hour, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			<-release
		}
	}))
	silent, begun := dial(t, s.addr, ""), dial(t, s.addr, "G")
	idle, next := dial(t, s.addr, ""), dial(t, s.addr, "")
	s.ask(t, idle)
	s.ask(t, next)
	next.send(t, "G")
	slow := dial(t, s.addr, "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
	waitFor(t, "a byte on two connections, and the handler on one", func() bool {
		s.ln.mu.Lock()
		defer s.ln.mu.Unlock()
		n := 0
		for place := s.ln.conns.Front(); place != nil; place = place.Next() {
			if c := place.Value.(*conn); c.phase == waiting && c.begun || c.phase == answering {
				n++
			}
		}
		return n == 3
	})
	s.ln.closeIdle()
	silent.wantClosed(t)
	idle.wantClosed(t)
	for _, c := range []*client{begun, next} {
		c.send(t, get[1:]+"\r\n")
		c.wantAnswer(t, 200)
		c.wantClosed(t)
	}
	close(release)
	slow.wantAnswer(t, 200)
	slow.wantClosed(t)
}

// TestTurns asks whose turn it is to give way.
func TestTurns(t *testing.T) {
	t.Parallel()
	const grace, little = 20 * time.Second, 50 * time.Millisecond
	type client struct {
		phase phase
		since time.Duration // ago
	}
	for _, tt := range []struct {
		name     string
		grace    time.Duration
		clients  []client // in the order of their phases
		want     int      // the one that has to go, or -1
		wantWait time.Duration
	}{
		{name: "nobody", grace: little, want: -1, wantWait: little},
		{name: "all are answered", grace: little, clients: []client{{answering, time.Hour}, {answering, 0}}, want: -1, wantWait: little},
		{name: "all are answered, much grace", grace: grace, clients: []client{{answering, time.Hour}, {answering, 0}}, want: -1, wantWait: time.Second},
		{name: "the server has not come to read", grace: little, clients: []client{{queued, time.Hour}}, want: -1, wantWait: little},
		{name: "waiting behind one queued", grace: little, clients: []client{{queued, time.Hour}, {waiting, time.Minute}}, want: 1, wantWait: time.Second},
		{name: "gone already", grace: little, clients: []client{{gone, time.Hour}}, want: -1, wantWait: little},
		{name: "the longest waiting", grace: grace, clients: []client{{answering, time.Hour}, {waiting, 3 * grace}, {waiting, 2 * grace}}, want: 1, wantWait: time.Second},
		{name: "its request may be on its way", grace: grace, clients: []client{{waiting, grace / 4}, {waiting, 0}}, want: -1, wantWait: 3 * grace / 4},
		{name: "waiting before sending", grace: grace, clients: []client{{sending, time.Hour}, {waiting, 2 * grace}}, want: 1, wantWait: time.Second},
		{name: "waiting but young", grace: grace, clients: []client{{sending, time.Hour}, {waiting, grace / 2}}, want: -1, wantWait: grace / 2},
		{name: "an answer left lying", grace: grace, clients: []client{{sending, 3 * time.Second}, {sending, 2 * time.Second}}, want: 0, wantWait: time.Second},
		{name: "an answer on its way", grace: grace, clients: []client{{sending, 500 * time.Millisecond}}, want: -1, wantWait: 500 * time.Millisecond},
		{name: "an answer on its way, little grace", grace: little, clients: []client{{sending, 0}}, want: -1, wantWait: little},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ln := newListener(nil, len(tt.clients), tt.grace, slog.New(slog.DiscardHandler))
			conns := make([]*conn, len(tt.clients))
			for i, c := range tt.clients {
				conns[i] = &conn{TCPConn: &net.TCPConn{}, ln: ln, phase: c.phase, since: time.Now().Add(-c.since)}
				conns[i].place = ln.conns.PushBack(conns[i])
			}
			got, wait := ln.next()
			if i := slices.Index(conns, got); i != tt.want || i >= 0 && got.phase != gone {
				t.Errorf("got connection %d, want %d to go", i, tt.want)
			}
			if late := tt.wantWait - wait; late < 0 || late > tt.wantWait*3/4 { // this test takes time too
				t.Errorf("got a wait of %v, want %v", wait, tt.wantWait)
			}
		})
	}
}

// TestHeaderLines sends up to the limit of header lines, and beyond.
func TestHeaderLines(t *testing.T) {
	t.Parallel()
	with := func(lines int) string { return get + strings.Repeat("a:b\r\n", lines-1) } // Host is one
	const post = "POST / HTTP/1.1\r\nHost: a.example\r\n"
	for _, tt := range []struct {
		name, raw string
		want      []int // codes
		closed    bool
	}{
		{name: "100", raw: with(100) + "\r\n", want: []int{200}},
		{name: "100, bare line ends", raw: strings.ReplaceAll(with(100)+"\r\n", "\r", ""), want: []int{200}},
		{name: "101", raw: with(101) + "\r\n", want: []int{400}, closed: true},
		{name: "101, bare line ends", raw: strings.ReplaceAll(with(101)+"\r\n", "\r", ""), want: []int{400}, closed: true},
		{name: "without end", raw: with(700), want: []int{400}, closed: true},
		{name: "pipeline of 124", raw: strings.Repeat("GET /health HTTP/1.1\r\nHost:a\r\n\r\n", 124), want: slices.Repeat([]int{200}, 124)},
		{name: "pipeline of 100 each", raw: strings.Repeat(with(100)+"\r\n", 20), want: slices.Repeat([]int{200}, 20)},
		{name: "pipeline that ends in 101", raw: strings.Repeat(get+"\r\n", 20) + with(101) + "\r\n", want: append(slices.Repeat([]int{200}, 20), 400), closed: true},
		{name: "body of 1,000 lines", raw: post + "Content-Length: 2000\r\n\r\n" + strings.Repeat("x\n", 1000), want: []int{404}, closed: true},
		{name: "1,000 chunks", raw: post + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", 1000) + "0\r\n\r\n", want: []int{404}, closed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := serveOn(t, 10, time.Hour, handler(t, "*", false))
			c := dial(t, s.addr, "")
			go io.WriteString(c, tt.raw)
			for _, code := range tt.want {
				c.wantAnswer(t, code)
			}
			if tt.closed {
				c.wantClosed(t)
				return
			}
			c.send(t, get+"\r\n")
			c.wantAnswer(t, 200)
		})
	}
}

// TestAcceptErrors lets accept(2) fail, once for each error and then as often as it likes.
func TestAcceptErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		errs    []error
		wantLog string
		atLeast time.Duration // of trying again, less and less often
	}{
		{[]error{syscall.ENOMEM, syscall.ENOBUFS, syscall.EPROTO, syscall.ENETDOWN, syscall.EPERM, errors.New("anything")}, `msg="cannot accept connections, trying again" err="accept tcp: accept: cannot allocate memory"`, 315 * time.Millisecond},
		{[]error{syscall.EMFILE, syscall.ENFILE}, `msg="out of file descriptors, the longest waiting give way; raise ulimit -n (LimitNOFILE)" err="accept tcp: accept: too many open files"`, 0},
	} {
		t.Run(tt.errs[0].Error(), func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			s := serveOn(t, 10, time.Hour, handler(t, "*", false), tt.errs...)
			dial(t, s.addr, get+"\r\n").wantAnswer(t, 200)
			if got := time.Since(began); got < tt.atLeast {
				t.Errorf("got an answer after %v, want %v of trying again", got, tt.atLeast)
			}
			if log := s.log.String(); strings.Count(log, "\n") != 1 || !strings.Contains(log, tt.wantLog) {
				t.Errorf("got log %q, want one line with %q", log, tt.wantLog)
			}
		})
	}
	t.Run("out of descriptors, the longest waiting gives way", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 10, time.Nanosecond, handler(t, "*", false))
		idle, kept := dial(t, s.addr, ""), dial(t, s.addr, "")
		s.ask(t, idle)
		s.ask(t, kept)
		s.inner.fail(syscall.EMFILE)
		dial(t, s.addr, get+"\r\n").wantAnswer(t, 200) // accepted, so that the next accept fails
		idle.wantClosed(t)
		s.calm(t)
		s.ask(t, kept)
	})
	t.Run("the listener closes", func(t *testing.T) {
		t.Parallel()
		s := serveOn(t, 10, time.Hour, handler(t, "*", false), slices.Repeat([]error{syscall.ENOMEM}, 1000)...)
		waitFor(t, "the first error", func() bool { return s.log.String() != "" })
		s.ln.Close()
		<-s.served
	})
}

// TestHostileClients sends what no HTTP library would. Each gets a 4xx, or what such a request
// may get, or a closed connection, at once; and the next client its answer.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	p := start(t, nil)
	const kept, closed = "kept", "closed"
	for _, tt := range []struct {
		name, raw string
		want      []int // codes of the answers, in order
		then      string
	}{
		{name: "two lengths", raw: get + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", want: []int{400}, then: closed},
		{name: "length with chunked", raw: get + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get + "\r\n", want: []int{200}, then: closed},
		{name: "length with chunked elsewhere", raw: "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get + "\r\n", want: []int{404}, then: closed},
		// The two 5xx that net/http itself sends: RFC 9112, section 6.1, and RFC 9110, section 15.6.6.
		{name: "chunked twice", raw: get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", want: []int{501}, then: closed},
		{name: "HTTP/3.0", raw: "GET /health HTTP/3.0\r\nHost: a.example\r\n\r\n", want: []int{505}, then: closed},
		{name: "negative length", raw: get + "Content-Length: -1\r\n\r\n", want: []int{400}, then: closed},
		{name: "space before the colon", raw: get + "Content-Length : 1\r\n\r\na", want: []int{400}, then: closed},
		{name: "folded header", raw: get + " folded: 1\r\n\r\n", want: []int{400}, then: closed},
		{name: "NUL in a header", raw: get + "X: a\x00b\r\n\r\n", want: []int{400}, then: closed},
		{name: "NUL in the path", raw: "GET /hea\x00lth HTTP/1.1\r\nHost: a.example\r\n\r\n", want: []int{400}, then: closed},
		{name: "two hosts", raw: get + "Host: b.example\r\n\r\n", want: []int{400}, then: closed},
		{name: "no host", raw: "GET /health HTTP/1.1\r\n\r\n", want: []int{400}, then: closed},
		{name: "TLS", raw: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", want: []int{400}, then: closed},
		{name: "HTTP/2", raw: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", want: []int{400}, then: closed},
		{name: "no version", raw: "GET /health\r\n\r\n", want: []int{400}, then: closed},
		{name: "empty line first", raw: "\r\n" + get + "\r\n", want: []int{400}, then: closed}, // RFC 9112, section 2.2, would have it left out; net/http does not
		{name: "15 KB of headers", raw: get + "Cookie: " + strings.Repeat("x", 15<<10) + "\r\n\r\n", want: []int{200}, then: kept},
		{name: "20 KB of headers", raw: get + "Cookie: " + strings.Repeat("x", 20<<10-len(get)-12) + "\r\n\r\n", want: []int{200}, then: kept},
		{name: "21 KB of headers", raw: get + "Cookie: " + strings.Repeat("x", 21<<10) + "\r\n\r\n", want: []int{431}, then: closed}, // net/http adds 4 KiB to the 16
		{name: "200 KB of headers", raw: get + "Cookie: " + strings.Repeat("x", 200<<10) + "\r\n\r\n", want: []int{431}, then: closed},
		{name: "endless path", raw: "GET /" + strings.Repeat("x", 200<<10), want: []int{431}, then: closed},
		{name: "pipelining", raw: get + "\r\n" + get + "\r\n" + get + "\r\n", want: []int{200, 200, 200}, then: kept},
		{name: "body that never comes", raw: get + "Content-Length: 10\r\n\r\n", want: []int{200}, then: closed},
		{name: "HTTP/1.0", raw: "GET /health HTTP/1.0\r\n\r\n", want: []int{200}, then: closed},
		{name: "HTTP/1.0 kept", raw: "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", want: []int{200}, then: kept},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := p.dial(t, "")
			go io.WriteString(c, tt.raw) // the program may answer and close before it has read all
			for _, code := range tt.want {
				c.wantAnswer(t, code)
			}
			switch tt.then {
			case closed:
				c.wantClosed(t)
			case kept:
				c.send(t, get+"\r\n")
				c.wantAnswer(t, 200)
			}
			if resp, _ := p.get(t, "/health"); resp.StatusCode != 200 {
				t.Errorf("next client: got %d, want 200", resp.StatusCode)
			}
		})
	}
}

// TestUnreadBody waits for the body that nobody reads, for a client that is about to send it.
func TestUnreadBody(t *testing.T) {
	t.Parallel()
	s := serveOn(t, 1, time.Hour, handler(t, "*", false))
	c := dial(t, s.addr, "")
	began := time.Now()
	c.send(t, get+"Content-Length: 10\r\n\r\n")
	c.wantAnswer(t, 200)
	c.wantClosed(t)
	if got, want := time.Since(began), 100*time.Millisecond; got < want {
		t.Errorf("got the connection closed after %v, want %v for the body", got, want)
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

// Helpers: handlers and servers in the test, the program in a process of its own, clients.

// handler returns the handler for an allow list, in one of its two states.
func handler(tb testing.TB, list string, drain bool) http.Handler {
	tb.Helper()
	origins, err := parseOrigins(list)
	if err != nil {
		tb.Fatal(err)
	}
	draining := func() bool { return drain }
	return newHandler(routes(draining), origins, draining)
}

// server is the service's server and listener, without a process.
type server struct {
	addr   string
	ln     *listener
	inner  *failing // beneath ln
	log    *logBuffer
	served chan struct{} // closed when Serve has returned
}

// serveOn serves h on loopback with a limit and a time of the test's own. The first calls of
// accept return errs.
func serveOn(t *testing.T, limit int, grace time.Duration, h http.Handler, errs ...error) *server {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{
		addr:   tcp.Addr().String(),
		inner:  &failing{Listener: tcp, errs: errs},
		log:    &logBuffer{},
		served: make(chan struct{}),
	}
	log := slog.New(slog.NewTextHandler(s.log, nil))
	s.ln = newListener(s.inner, limit, grace, log)
	srv := newServer(closeWhile(s.ln.crowded.Load, h), log)
	srv.ConnState = s.ln.connState
	srv.WriteTimeout = 0 // what is not taken is the listener's to end
	go func() {
		srv.Serve(s.ln)
		close(s.served)
	}()
	t.Cleanup(func() { srv.Close() })
	return s
}

// count returns how many connections are in a phase.
func (s *server) count(p phase) (n int) {
	s.ln.mu.Lock()
	defer s.ln.mu.Unlock()
	for place := s.ln.conns.Front(); place != nil; place = place.Next() {
		if place.Value.(*conn).phase == p {
			n++
		}
	}
	return n
}

// calm waits until no connection waits for a place, and so no answer tells its client to leave.
func (s *server) calm(t *testing.T) {
	t.Helper()
	waitFor(t, "nobody to wait for a place", func() bool { return !s.ln.crowded.Load() })
}

// ask sends a request on c and returns when the answer has come and the server waits for the
// next request.
func (s *server) ask(t *testing.T, c *client) {
	t.Helper()
	c.send(t, get+"\r\n")
	c.wantAnswer(t, 200)
	waitFor(t, "the server to wait for the next request", func() bool {
		s.ln.mu.Lock()
		defer s.ln.mu.Unlock()
		for place := s.ln.conns.Front(); place != nil; place = place.Next() {
			if theirs := place.Value.(*conn); theirs.RemoteAddr().String() == c.LocalAddr().String() {
				return theirs.phase == waiting
			}
		}
		return false
	})
}

// failing is a listener with errors to return first.
type failing struct {
	net.Listener
	mu   sync.Mutex
	errs []error
}

func (f *failing) Accept() (net.Conn, error) {
	f.mu.Lock()
	if len(f.errs) > 0 {
		err := f.errs[0]
		f.errs = f.errs[1:]
		f.mu.Unlock()
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept", err)}
	}
	f.mu.Unlock()
	return f.Listener.Accept()
}

func (f *failing) fail(errs ...error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs = errs
}

func (f *failing) Close() error {
	f.fail()
	return f.Listener.Close()
}

// logBuffer is a log that is read while it is written.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
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

// waitFor returns the next line of the log that has text.
func (p *process) waitFor(t *testing.T, text string) string {
	t.Helper()
	var seen []string
	for timeout := time.After(patience); ; {
		select {
		case line, ok := <-p.log:
			if ok && strings.Contains(line, text) {
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

// opened waits until the program accepts connections, and closed until it no longer does.
func (p *process) opened(t *testing.T) {
	t.Helper()
	waitFor(t, "the listener", func() bool { return p.accepts() })
}

func (p *process) closed(t *testing.T) {
	t.Helper()
	waitFor(t, "the listener to close", func() bool { return !p.accepts() })
}

func (p *process) accepts() bool {
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		return false
	}
	conn.Close()
	return true
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

func (p *process) dial(t *testing.T, raw string) *client {
	t.Helper()
	return dial(t, p.addr, raw)
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

// client is a connection that sends what it likes, when it likes.
type client struct {
	net.Conn
	answers *bufio.Reader
}

// dial opens a connection and sends raw.
func dial(t *testing.T, addr, raw string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
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

// freePort returns a port on which nobody listens now.
func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// fullPipe returns the writing end of a pipe that is full and that nobody empties.
func fullPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
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
