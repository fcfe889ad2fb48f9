// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// A probe takes milliseconds; a client that needs more is broken or hostile.
const (
	readHeaderTimeout = 5 * time.Second       // for a client that drips its headers
	readTimeout       = 10 * time.Second      // for a body that never comes
	writeTimeout      = 10 * time.Second      // for a client that does not read
	idleTimeout       = 120 * time.Second     // over the 60 s of load balancers, so that they close first
	maxHeaderBytes    = 16 << 10              // room for tokens and cookies; net/http adds 4 KiB
	probeTimeout      = 2 * time.Second       // under the 3 s of the image's HEALTHCHECK
	lastCall          = 50 * time.Millisecond // for requests on their way when the listener or an idle connection closes
)

func main() {
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run returns the exit code: 1 for what went wrong at run time, 2 for wrong usage.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	c, help, err := parse(args, getenv)
	code := 1
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, help)
		return 0
	case err != nil:
		code, err = 2, fmt.Errorf("%w; -h lists the flags", err)
	case c.probe:
		err = probe(healthURL(net.JoinHostPort(c.host, c.port)), stdout)
	default:
		signals := make(chan os.Signal, 2) // room for the second, so that it is not lost
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
		defer signal.Stop(signals)
		err = serve(c, signals, slog.New(slog.NewTextHandler(stderr, nil)))
	}
	if err != nil {
		fmt.Fprintf(stderr, "whatsapp-contact-processor: %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
		return code
	}
	return 0
}

type config struct {
	host, port                  string
	origins                     []string
	drainDelay, shutdownTimeout time.Duration
	probe                       bool
}

// parse sets each value from its flag, else from its variable if that is not empty,
// else to its default. Errors name flag or variable; help comes with flag.ErrHelp.
func parse(args []string, getenv func(string) string) (c config, help string, err error) {
	var out strings.Builder // flag writes the help here
	flags := flag.NewFlagSet("whatsapp-contact-processor", flag.ContinueOnError)
	flags.SetOutput(&out)
	wrong := map[string]error{} // by flag, what its variable has wrong
	define := func(name, value, usage string, set func(string) error) {
		variable := strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		flags.Func(name, usage+" ["+variable+"]", set)
		flags.Lookup(name).DefValue = value
		value = cmp.Or(getenv(variable), value)
		if err := set(value); err != nil {
			wrong[name] = fmt.Errorf("invalid value %q for variable %s: %w", value, variable, err)
		}
	}
	define("host", "", "`address` to listen on; empty for all interfaces, IPv4 and IPv6", func(s string) error { c.host = strings.Trim(s, "[]"); return nil })
	define("port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one", func(s string) error { c.port = s; return checkPort(s) })
	define("allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, as scheme://host[:port];\n* alone for all, https://*.corp.example for every name under one",
		func(s string) (err error) { c.origins, err = parseOrigins(s); return err })
	define("drain-delay", "0s", "`duration` of 503 on /health after SIGTERM or SIGINT, before the listener closes",
		func(s string) (err error) { c.drainDelay, err = parseDuration(s); return err })
	define("shutdown-timeout", "10s", "longest `duration` of the wait for open requests once the listener has closed",
		func(s string) (err error) { c.shutdownTimeout, err = parseDuration(s); return err })
	flags.BoolVar(&c.probe, "probe", false, "ask the service at this host and port, say what it answered, exit 0 or 1")
	if err = flags.Parse(args); err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q, want only flags", flags.Arg(0))
	}
	flags.Visit(func(f *flag.Flag) { delete(wrong, f.Name) })
	flags.VisitAll(func(f *flag.Flag) { err = cmp.Or(err, wrong[f.Name]) })
	return c, out.String(), err
}

func checkPort(s string) error {
	if _, err := strconv.ParseUint(s, 10, 16); err != nil {
		return errors.New("want a port number from 0 to 65535")
	}
	return nil
}

// parseDuration also refuses what time.ParseDuration takes: a bare 0 and less.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || strings.Trim(s, "+-0") == "" {
		return 0, errors.New("want a duration of 0s or more with its unit, as 500ms or 1m30s")
	}
	return d, nil
}

func parseOrigins(s string) ([]string, error) {
	origins := strings.Split(s, ",")
	for i, o := range origins {
		origins[i] = strings.TrimSpace(o)
		if err := checkOrigin(origins[i]); err != nil && strings.TrimSpace(s) != "*" {
			return nil, fmt.Errorf("origin %q: %w", origins[i], err)
		}
	}
	return origins, nil
}

// checkOrigin refuses what no browser sends as an Origin (RFC 6454, with hosts and
// ports as the WHATWG URL Standard writes them) and what would match too much.
func checkOrigin(o string) error {
	u, err := url.Parse(strings.ToLower(o)) // as the matching does
	if err != nil || u.Hostname() == "" || slices.Contains([]string{"", "file", "ftp", "ws", "wss"}, u.Scheme) {
		return errors.New("want the scheme://host[:port] of a page, or * alone for all")
	}
	host, port := u.Hostname(), strings.TrimLeft(u.Port(), "0")
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" && !ip.Is4In6() {
		host = ip.String()
	} else if !isDomain(strings.TrimPrefix(host, "*.")) {
		return errors.New("want a host of ASCII letters, digits, - and _ (others as punycode, xn--...) or a plain IP address, and * only as the whole first label")
	}
	sent := u.Scheme + "://" + strings.TrimSuffix(net.JoinHostPort(host, port), ":")
	sent = strings.TrimSuffix(sent, map[string]string{"http": ":80", "https": ":443"}[u.Scheme])
	if sent != strings.ToLower(o) {
		return fmt.Errorf("want %s, as browsers send it", sent)
	}
	return checkPort("0" + port)
}

// isDomain reports whether browsers keep s as it is: they turn other letters into
// punycode, and a name whose last label is a number into an IPv4 address.
func isDomain(s string) bool {
	last := s[strings.LastIndexByte(strings.TrimSuffix(s, "."), '.')+1:]
	return strings.Trim(s, "-.0123456789_abcdefghijklmnopqrstuvwxyz") == "" && !strings.Contains("."+s, "..") &&
		strings.Trim(last, ".0123456789") != "" && !strings.HasPrefix(last, "0x")
}

// healthURL returns where a client on this machine finds a service listening on addr.
func healthURL(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	if ip, _ := netip.ParseAddr(host); host == "" || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return (&url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/health"}).String()
}

// probe asks url once and fails unless the answer is 200. It uses no proxy: a company
// network sets HTTP_PROXY in every container, and its proxy cannot reach this one.
func probe(url string, stdout io.Writer) error {
	client := http.Client{Timeout: probeTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 512)) // bytes, enough to see who answers
	said := fmt.Sprintf("%s answered %s: %s", url, resp.Status, strings.Join(strings.Fields(string(body)), " "))
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %w", said, cmp.Or(err, errors.New("want 200 OK")))
	}
	fmt.Fprintln(stdout, said)
	return nil
}

// serve answers until the first signal, then drains: /health fails at once, so
// that balancers send their traffic elsewhere while the listener stays open for
// the drain delay; then open requests have the shutdown timeout to finish.
func serve(c config, signals <-chan os.Signal, log *slog.Logger) error {
	ln, err := net.Listen("tcp", net.JoinHostPort(c.host, c.port))
	if err != nil {
		return fmt.Errorf("%w; want another -port (PORT) or -host (HOST)", err)
	}
	var draining atomic.Bool
	var open atomic.Int64 // connections
	change := map[http.ConnState]int64{http.StateNew: 1, http.StateClosed: -1}
	srv := &http.Server{
		Handler:           newHandler(&draining, c.origins),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnState:         func(_ net.Conn, s http.ConnState) { open.Add(change[s]) },
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	log.Info("listening", "addr", ln.Addr(), "url", healthURL(ln.Addr().String()))
	select {
	case err := <-served:
		return err
	case s := <-signals:
		draining.Store(true)
		log.Info("draining", "signal", s, "delay", c.drainDelay)
	}
	// Server.Shutdown would drop each request whose headers it has not read yet.
	done := make(chan bool)
	go func() {
		time.Sleep(max(c.drainDelay, lastCall))
		ln.Close()
		for <-served; open.Load() > 0; srv.SetKeepAlivesEnabled(false) { // closes idle connections
			time.Sleep(lastCall)
		}
		close(done)
	}()
	select {
	case <-done:
		log.Info("stopped")
		return nil
	case <-time.After(c.drainDelay + c.shutdownTimeout + 4*lastCall): // idle connections take up to three
		return errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)")
	case s := <-signals:
		return fmt.Errorf("second signal: %v", s)
	}
}
