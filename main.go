// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"cmp"
	"container/list"
	"context"
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
	program = "whatsapp-contact-processor"

	exitFailure = 1 // of what went wrong at run time
	exitUsage   = 2 // a wrong flag or variable, which no restart mends
)

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

// run is the whole program: it returns the exit code, and nothing else ends the process.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	c, err := parse(args, getenv, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return fail(stderr, exitUsage, fmt.Errorf("%w; -h lists the flags", err))
	}
	if c.probe {
		err = probe(healthURL(net.JoinHostPort(c.host, c.port)), stdout)
	} else {
		err = serveUntilSignal(c, slog.New(slog.NewTextHandler(stderr, nil)))
	}
	if err != nil {
		return fail(stderr, exitFailure, err)
	}
	return 0
}

// fail says err in one line and returns code.
func fail(stderr io.Writer, code int, err error) int {
	fmt.Fprintf(stderr, "%s: %s\n", program, strings.ReplaceAll(err.Error(), "\n", " "))
	return code
}

// config is what flags and variables say.
type config struct {
	host, port                  string
	maxConnections              int
	origins                     []string
	drainDelay, shutdownTimeout time.Duration
	probe                       bool
}

// setting is a flag that has a variable too.
type setting struct {
	name, value, usage string
	set                func(string) error
}

// variable is the name of the flag in upper case, with _ for -.
func (s setting) variable() string {
	return strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

// settings returns what c can be told, with the default values.
func settings(c *config) []setting {
	return []setting{
		{"host", "", "`address` to listen on; empty for all interfaces, IPv4 and IPv6",
			func(s string) error { c.host = strings.Trim(s, "[]"); return nil }}, // as [::1] stands in a URL
		{"port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one",
			func(s string) (err error) { c.port, err = parsePort(s); return err }},
		{"max-connections", "1000", "most `connections` at once, 1 or more; for a new one the longest waiting gives way",
			func(s string) (err error) { c.maxConnections, err = parseLimit(s); return err }},
		{"allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, as scheme://host[:port];\n* alone for all, https://*.corp.example for every name under one",
			func(s string) (err error) { c.origins, err = parseOrigins(s); return err }},
		{"drain-delay", "0s", "`duration` of 503 on /health after SIGTERM or SIGINT, before the listener closes",
			func(s string) (err error) { c.drainDelay, err = parseDuration(s); return err }},
		{"shutdown-timeout", "10s", "longest `duration` of the wait for open requests once the listener has closed",
			func(s string) (err error) { c.shutdownTimeout, err = parseDuration(s); return err }},
	}
}

// parse takes each setting from its flag, else from its variable if that is not empty, else
// its default. Errors name the flag or the variable; help goes to stdout, with flag.ErrHelp.
func parse(args []string, getenv func(string) string, stdout io.Writer) (config, error) {
	var c config
	given := map[string]bool{} // by a flag: its variable does not count, not even a wrong one
	flags := flag.NewFlagSet(program, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is one line, without the help
	flags.BoolVar(&c.probe, "probe", false, "ask the service at this host and port, say what it answered, exit 0 or 1")
	for _, s := range settings(&c) {
		usage := s.usage + " [" + s.variable() + "]"
		if s.value != "" {
			usage += " (default " + s.value + ")"
		}
		flags.Func(s.name, usage, func(value string) error {
			given[s.name] = true
			return s.set(value)
		})
	}
	err := flags.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(stdout)
		flags.Usage()
	}
	if err != nil {
		return c, err
	}
	if flags.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q, want only flags", flags.Arg(0))
	}
	for _, s := range settings(&c) {
		if given[s.name] {
			continue
		}
		value := cmp.Or(getenv(s.variable()), s.value)
		if err := s.set(value); err != nil {
			return c, fmt.Errorf("invalid value %q for variable %s: %w", value, s.variable(), err)
		}
	}
	return c, nil
}

func parsePort(s string) (string, error) {
	if _, err := strconv.ParseUint(s, 10, 16); err != nil {
		return "", errors.New("want a port number from 0 to 65535")
	}
	return s, nil
}

func parseLimit(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, errors.New("want an integer of 1 or more")
	}
	return n, nil
}

// parseDuration wants a unit of 0 too: what has one ends in a letter.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || strings.HasSuffix(s, "0") {
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
	u := url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/health"}
	return u.String()
}

// probe asks url once and fails unless the answer is 200. It uses no proxy: a company network
// sets HTTP_PROXY in every container, and its proxy cannot reach this one.
func probe(url string, stdout io.Writer) error {
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       2 * time.Second, // under the 3 s of the image's HEALTHCHECK
	}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 512)) // bytes, enough to see who answers
	said := fmt.Sprintf("%s answered %s: %s", url, resp.Status, strings.Join(strings.Fields(string(body)), " "))
	if err != nil {
		return fmt.Errorf("%s: %w", said, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: want 200 OK", said)
	}
	fmt.Fprintln(stdout, said)
	return nil
}

// serveUntilSignal serves until the first signal and then drains; a second one ends that.
func serveUntilSignal(c config, log *slog.Logger) error {
	signal.Ignore(syscall.SIGPIPE)     // or a log whose reader has gone would end the process
	signals := make(chan os.Signal, 2) // room for the second, so that it is not lost
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	return serve(c, signals, log)
}

// serve listens, answers until the first signal, and drains until the second.
func serve(c config, signals <-chan os.Signal, log *slog.Logger) error {
	ln, err := net.Listen("tcp", net.JoinHostPort(c.host, c.port))
	if err != nil {
		return fmt.Errorf("%w; want another -port (PORT) or -host (HOST)", err)
	}
	// More than a request takes on a quarter of a core: that many new ones are heard in time.
	const perRequest = 200 * time.Microsecond
	limited := newListener(ln, c.maxConnections, perRequest*time.Duration(c.maxConnections), log)
	var draining atomic.Bool
	srv := newServer(newHandler(routes(draining.Load), c.origins, draining.Load), log)
	srv.ConnState = limited.connState
	served := make(chan struct{})
	go func() {
		srv.Serve(limited) // until the listener is closed
		close(served)
	}()
	log.Info("listening", "addr", ln.Addr(), "url", healthURL(ln.Addr().String()))

	first := <-signals
	draining.Store(true) // balancers see /health fail and look elsewhere
	log.Info("draining", "signal", first, "delay", c.drainDelay)
	ctx, end := context.WithCancelCause(context.Background())
	defer end(nil)
	go func() {
		select {
		case second := <-signals:
			end(fmt.Errorf("second signal: %v", second))
		case <-ctx.Done():
		}
	}()
	if err := drain(ctx, c, limited, served); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// newServer returns a server with limits on its clients' time and memory.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        h,
		ReadTimeout:    5 * time.Second,   // for a client that drips its request, body included
		WriteTimeout:   10 * time.Second,  // for a client that does not read its answer
		IdleTimeout:    120 * time.Second, // over the 60 s of load balancers, so that they close first
		MaxHeaderBytes: 16 << 10,          // room for tokens and cookies; net/http adds 4 KiB
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// It says 200 to OPTIONS *, draining or not.
		DisableGeneralOptionsHandler: true,
	}
}

// drain lets every client leave with its answer, and returns the cause of ctx's end if that
// comes first. Server.Shutdown is no help: it drops each request whose headers it has not yet
// read.
func drain(ctx context.Context, c config, ln *listener, served <-chan struct{}) error {
	const lastCall = 50 * time.Millisecond // for what is on its way to a listener or a connection
	if err := sleep(ctx, max(c.drainDelay, lastCall)); err != nil {
		return err
	}
	ln.Close()
	timeout := errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)")
	ctx, cancel := context.WithTimeoutCause(ctx, lastCall+max(c.shutdownTimeout, lastCall), timeout)
	defer cancel()
	select {
	case <-served: // the last connection has got in
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := sleep(ctx, lastCall); err != nil {
		return err
	}
	ln.closeIdle()
	return ln.wait(ctx)
}

// sleep returns after d, or with the cause of ctx's end if that comes first.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// listener bounds the number of connections that are open at a time. When the limit is
// reached, a new one takes the place of the one that has waited longest for its request.
type listener struct {
	net.Listener
	limit int           // connections with a place
	grace time.Duration // for the first request of a connection, before it can be the next to go
	log   *slog.Logger
	quiet time.Time     // until when the log is told no more of the limit
	freed chan struct{} // has room for one: a place has become free

	mu      sync.Mutex // guards what follows, and the conns
	conns   list.List  // with a place, the one longest in its phase first
	closing bool       // of those that are idle: see closeIdle
}

// conn is a connection with all that its listener knows of it.
type conn struct {
	*net.TCPConn
	ln    *listener
	place *list.Element // in ln.conns, from the end of Accept to Close
	phase phase
	since time.Time // it is in that phase
}

// phase is what a connection does.
type phase int

const (
	fresh   phase = iota // waits for its first request
	idle                 // waits for the next one
	active               // is being answered
	leaving              // had to give way
)

func newListener(ln net.Listener, limit int, grace time.Duration, log *slog.Logger) *listener {
	return &listener{Listener: ln, limit: limit, grace: grace, log: log, freed: make(chan struct{}, 1)}
}

// Accept returns the next connection once it has a place. Meanwhile it is one more than the
// limit.
func (ln *listener) Accept() (net.Conn, error) {
	tcp, err := ln.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{TCPConn: tcp.(*net.TCPConn), ln: ln}
	for !ln.seat(c) {
		ln.warn()
		ln.await(ln.makeRoom())
	}
	return c, nil
}

// seat gives c a place if there is one.
func (ln *listener) seat(c *conn) bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.conns.Len() >= ln.limit {
		return false
	}
	c.place = ln.conns.PushBack(c)
	c.since = time.Now()
	return true
}

// warn tells the log once a minute that the limit is reached.
func (ln *listener) warn() {
	if now := time.Now(); now.After(ln.quiet) {
		ln.quiet = now.Add(time.Minute)
		// Apart: a log that is read slowly keeps no connection waiting.
		go ln.log.Warn("connection limit reached, the longest waiting give way", "max-connections", ln.limit)
	}
}

// await returns when a place has become free, or after d.
func (ln *listener) await(d time.Duration) {
	select {
	case <-ln.freed:
	case <-time.After(d):
	}
}

// makeRoom closes the connection whose turn it is to give way. It returns how long it may take
// until that has gone, or until it may be somebody's turn.
func (ln *listener) makeRoom() time.Duration {
	c, wait := ln.next()
	if c != nil {
		c.TCPConn.Close() // waits for its reader, so without the lock
	}
	return wait
}

// next returns the connection that has waited longest for its request. A new one gives way
// only after its grace: its request may be on its way.
func (ln *listener) next() (*conn, time.Duration) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for place := ln.conns.Front(); place != nil; place = place.Next() {
		c := place.Value.(*conn)
		if c.phase != fresh && c.phase != idle {
			continue
		}
		if wait := ln.grace - time.Since(c.since); c.phase == fresh && wait > 0 {
			return nil, wait
		}
		c.phase = leaving
		return c, ln.grace
	}
	return nil, time.Millisecond // all are being answered
}

// connState is the listener's http.Server.ConnState.
func (ln *listener) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive:
		c.(*conn).enter(active)
	case http.StateIdle:
		c.(*conn).enter(idle)
	case http.StateHijacked: // the server has let go of it, and so does the listener
		c.(*conn).leave()
	}
}

// enter notes what c does from now on.
func (c *conn) enter(p phase) {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	if c.place == nil || c.phase == leaving {
		return
	}
	c.phase, c.since = p, time.Now()
	c.ln.conns.MoveToBack(c.place)
	if p == idle && c.ln.closing {
		c.TCPConn.Close()
	}
}

// leave gives the place of c to another.
func (c *conn) leave() {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	if c.place == nil {
		return
	}
	c.ln.conns.Remove(c.place)
	c.place = nil
	select {
	case c.ln.freed <- struct{}{}:
	default: // nobody has seen the last one yet, and will see both
	}
}

// Close is called by whom the connection belongs to: a place is free when its owner is done
// with it, and not when it was told to give way.
func (c *conn) Close() error {
	err := c.TCPConn.Close()
	c.leave()
	return err
}

// closeIdle closes the connections that are between two requests, now and from now on.
func (ln *listener) closeIdle() {
	ln.mu.Lock()
	ln.closing = true
	var leave []*conn
	for place := ln.conns.Front(); place != nil; place = place.Next() {
		if c := place.Value.(*conn); c.phase == idle {
			leave = append(leave, c)
		}
	}
	ln.mu.Unlock()
	for _, c := range leave {
		c.TCPConn.Close() // waits for its reader, who may want the lock
	}
}

// wait returns when all connections have gone, or with the cause of ctx's end.
func (ln *listener) wait(ctx context.Context) error {
	for {
		ln.mu.Lock()
		open := ln.conns.Len()
		ln.mu.Unlock()
		if open == 0 {
			return nil
		}
		select {
		case <-ln.freed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
