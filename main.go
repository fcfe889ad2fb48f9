// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"cmp"
	"container/list"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	readTimeout    = 5 * time.Second        // for a client that drips its headers
	writeTimeout   = 10 * time.Second       // for a client that does not read
	idleTimeout    = 120 * time.Second      // over the 60 s of load balancers, so that they close first
	maxHeaderBytes = 16 << 10               // room for tokens and cookies; net/http adds 4 KiB
	probeTimeout   = 2 * time.Second        // under the 3 s of the image's HEALTHCHECK
	bodyTimeout    = 100 * time.Millisecond // for a body once the answer is out: nobody reads it, and it holds a place
	lastCall       = 50 * time.Millisecond  // for what is on its way when the listener or an idle connection closes
	perRequest     = 200 * time.Microsecond // more than one takes on a quarter of a core: n that come at once are heard within n times this
)

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

// run returns the exit code: 1 for what went wrong at run time, 2 for wrong usage.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	code := 1
	c, err := parse(args, getenv, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		code, err = 2, fmt.Errorf("%w; -h lists the flags", err)
	case c.probe:
		err = probe(healthURL(net.JoinHostPort(c.host, c.port)), stdout)
	default:
		signal.Ignore(syscall.SIGPIPE)     // or a log whose reader has gone would end the process
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
	maxConnections              int
	origins                     []string
	drainDelay, shutdownTimeout time.Duration
	probe                       bool
}

// parse takes each value from its flag, else from its variable if that is not empty,
// else its default. Errors name the flag or the variable; help goes to stdout.
func parse(args []string, getenv func(string) string, stdout io.Writer) (c config, err error) {
	flags := flag.NewFlagSet("whatsapp-contact-processor", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is one line, without the help
	variable := func(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }
	define := func(name, value, usage string, set func(string) error) {
		flags.Func(name, usage+" ["+variable(name)+"]", set)
		flags.Lookup(name).DefValue = value
	}
	define("host", "", "`address` to listen on; empty for all interfaces, IPv4 and IPv6",
		func(s string) error { c.host = strings.Trim(s, "[]"); return nil }) // as [::1] stands in a URL
	define("port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one",
		func(s string) error { c.port = s; return checkPort(s) })
	define("max-connections", "1000", "most `connections` at once, 1 or more; for a new one the longest waiting gives way",
		func(s string) (err error) {
			if c.maxConnections, err = strconv.Atoi(s); err != nil || c.maxConnections < 1 {
				err = errors.New("want an integer of 1 or more")
			}
			return err
		})
	define("allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, as scheme://host[:port];\n* alone for all, https://*.corp.example for every name under one",
		func(s string) (err error) { c.origins, err = parseOrigins(s); return err })
	define("drain-delay", "0s", "`duration` of 503 on /health after SIGTERM or SIGINT, before the listener closes",
		func(s string) (err error) { c.drainDelay, err = parseDuration(s); return err })
	define("shutdown-timeout", "10s", "longest `duration` of the wait for open requests once the listener has closed",
		func(s string) (err error) { c.shutdownTimeout, err = parseDuration(s); return err })
	flags.BoolVar(&c.probe, "probe", false, "ask the service at this host and port, say what it answered, exit 0 or 1")
	if err = flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(stdout)
		flags.Usage()
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q, want only flags", flags.Arg(0))
	}
	given := map[string]bool{"probe": true} // it has no variable
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	flags.VisitAll(func(f *flag.Flag) {
		if err != nil || given[f.Name] {
			return
		}
		value := cmp.Or(getenv(variable(f.Name)), f.DefValue)
		if err = f.Value.Set(value); err != nil {
			err = fmt.Errorf("invalid value %q for variable %s: %w", value, variable(f.Name), err)
		}
	})
	return c, err
}

func checkPort(s string) error {
	if _, err := strconv.ParseUint(s, 10, 16); err != nil {
		return errors.New("want a port number from 0 to 65535")
	}
	return nil
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || strings.HasSuffix(s, "0") { // it takes a 0 without its unit
		return 0, errors.New("want a duration of 0s or more with its unit, as 500ms or 1m30s")
	}
	return d, nil
}

// healthURL returns where a client on this machine finds a service listening on addr.
func healthURL(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	if host == "" || net.ParseIP(host).IsUnspecified() {
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

// service is the process from listen to exit, and all that it knows of its connections.
type service struct {
	config
	log      *slog.Logger
	draining atomic.Bool
	mu       sync.Mutex                 // guards what follows
	changed  sync.Cond                  // tells of each change to it
	open     int                        // connections, the one that waits to get in among them
	waiting  list.List                  // for the first or next request: of net.Conn, the longest waiting first
	places   map[net.Conn]*list.Element // in waiting
	hearBy   map[net.Conn]time.Time     // of those that wait for the first: until when it may be on its way
	quiet    time.Time                  // until when the log is told no more of the limit
}

// serve answers until the first signal, then drains; a second signal ends that.
func serve(c config, signals <-chan os.Signal, log *slog.Logger) error {
	ln, err := net.Listen("tcp", net.JoinHostPort(c.host, c.port))
	if err != nil {
		return fmt.Errorf("%w; want another -port (PORT) or -host (HOST)", err)
	}
	s := &service{config: c, log: log, places: map[net.Conn]*list.Element{}, hearBy: map[net.Conn]time.Time{}}
	s.changed.L = &s.mu
	srv := &http.Server{
		Handler:                      newHandler(&s.draining, c.origins),
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnState:                    s.track,
		DisableGeneralOptionsHandler: true, // it says 200 to OPTIONS *, draining or not
	}
	served, drained := make(chan error, 1), make(chan error, 2)
	go func() { served <- srv.Serve(ln) }()
	log.Info("listening", "addr", ln.Addr(), "url", healthURL(ln.Addr().String()))
	select {
	case err := <-served:
		return err
	case sig := <-signals:
		go s.drain(sig, ln, served, drained)
	}
	select {
	case err := <-drained:
		return err
	case sig := <-signals:
		return fmt.Errorf("second signal: %v", sig)
	}
}

// drain lets every client leave with its answer. Server.Shutdown is no help: it drops each
// request whose headers it has not read yet.
func (s *service) drain(sig os.Signal, ln net.Listener, served <-chan error, drained chan<- error) {
	s.draining.Store(true) // balancers see /health fail and look elsewhere; each answer ends its connection
	s.log.Info("draining", "signal", sig, "delay", s.drainDelay)
	time.Sleep(max(s.drainDelay, lastCall))
	ln.Close()
	time.Sleep(lastCall)
	time.AfterFunc(max(s.shutdownTimeout, lastCall), func() { drained <- errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)") })
	<-served // the last connection has got in
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.open > 0 {
		for c := range s.places {
			if s.hearBy[c].IsZero() { // it is between two requests
				c.Close()
				delete(s.places, c)
			}
		}
		s.changed.Wait()
	}
	s.log.Info("stopped")
	drained <- nil
}

// track is told by net/http of each state that a connection enters.
func (s *service) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if place := s.places[c]; place != nil {
		s.waiting.Remove(place)
		delete(s.places, c)
	}
	delete(s.hearBy, c)
	switch state {
	case http.StateNew: // Serve accepts nothing until this returns
		s.open++
		s.makeRoom()
		s.places[c] = s.waiting.PushBack(c)
		s.hearBy[c] = time.Now().Add(time.Duration(s.maxConnections) * perRequest)
	case http.StateIdle:
		s.places[c] = s.waiting.PushBack(c)
	case http.StateClosed:
		s.open--
	}
	s.changed.Broadcast()
}

// makeRoom lets the longest waiting connection give way to a new one, unless all are being
// answered or that one is so new itself that its request may be on its way: then it waits.
// It returns when one has closed, so that not even a crowd exceeds the limit.
func (s *service) makeRoom() {
	if now := time.Now(); s.open > s.maxConnections && now.After(s.quiet) {
		s.quiet = now.Add(time.Minute)
		go s.log.Warn("connection limit reached, the longest waiting give way", "max-connections", s.maxConnections) // apart: a slow reader must not hold the lock
	}
	gaveWay := false
	for s.open > s.maxConnections {
		longest := s.waiting.Front()
		switch {
		case longest == nil || gaveWay:
			s.changed.Wait()
		case time.Now().Before(s.hearBy[longest.Value.(net.Conn)]):
			s.mu.Unlock()
			time.Sleep(time.Millisecond)
			s.mu.Lock()
		default:
			s.waiting.Remove(longest).(net.Conn).Close()
			gaveWay = true
		}
	}
}
