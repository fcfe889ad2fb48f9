// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
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
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

var version = "devel" // the git tag or commit; the Makefile and the Dockerfile set it

const (
	program     = "whatsapp-contact-processor"
	exitFailure = 1  // something went wrong at run time
	exitUsage   = 64 // a wrong setting: EX_USAGE of sysexits.h, because a crash of Go exits with 2
)

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

// run is the whole program. It returns the exit code.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	signal.Ignore(syscall.SIGPIPE) // so that the exit code is the same if nobody reads the output
	log := newLogWriter(stderr)
	defer log.flush()
	c, err := parse(args, getenv, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(log, "%s: %s; -h lists the flags\n", program, oneLine(err.Error()))
		return exitUsage
	}
	if c.probe {
		err = probe(healthURL(c.host, c.port), stdout)
	} else {
		err = listenAndServe(c, slog.New(slog.NewTextHandler(log, nil)))
	}
	if err != nil {
		fmt.Fprintf(log, "%s: %s\n", program, oneLine(err.Error()))
		return exitFailure
	}
	return 0
}

// oneLine replaces each run of blanks and control characters by a single blank.
func oneLine(s string) string {
	isBlank := func(r rune) bool { return r == ' ' || unicode.IsControl(r) }
	return strings.Join(strings.FieldsFunc(s, isBlank), " ")
}

// config holds the values of the flags and variables.
type config struct {
	host, port                  string
	maxConnections              int
	origins                     []string
	drainDelay, shutdownTimeout time.Duration
	probe                       bool
}

// setting is a flag that also has an environment variable.
type setting struct {
	name, value, usage string
	set                func(string) error
}

func (s setting) variable() string { return strings.ToUpper(strings.ReplaceAll(s.name, "-", "_")) }

// settings returns the settings of c with their default values.
func settings(c *config) []setting {
	return []setting{
		{"host", "", "`address` or name to listen on; empty means all, IPv4 and IPv6", into(&c.host, parseHost)},
		{"port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one", into(&c.port, parsePort)},
		{"max-connections", "1000", "most open `connections`, 1 or more; at the limit, a new one replaces the one whose client has\nkept the service waiting longest", into(&c.maxConnections, parseLimit)},
		{"allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, each as scheme://host[:port];\n* alone means all, https://*.corp.example means every subdomain of corp.example", into(&c.origins, parseOrigins)},
		{"drain-delay", "0s", "`duration` for which /health answers 503 before the listener closes", into(&c.drainDelay, parseDuration)},
		{"shutdown-timeout", "10s", "longest `duration` to wait for open requests after the listener has closed", into(&c.shutdownTimeout, parseDuration)},
	}
}

// into returns a function that parses a value and stores it in field.
func into[T any](field *T, parse func(string) (T, error)) func(string) error {
	return func(value string) (err error) {
		*field, err = parse(value)
		return err
	}
}

// parse takes each setting from its flag, else from its variable, else its default. An error names
// the flag or the variable. For -h parse writes the help to stdout and returns flag.ErrHelp.
func parse(args []string, getenv func(string) string, stdout io.Writer) (config, error) {
	var c config
	flags := flag.NewFlagSet(program, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // package flag would print the help after each error
	flags.BoolVar(&c.probe, "probe", false, "ask the service at this host and port, print the answer, and exit with 0 or 1")
	for _, s := range settings(&c) {
		usage := s.usage + " [" + s.variable() + "]"
		if s.value != "" {
			usage += " (default " + s.value + ")"
		}
		flags.Func(s.name, usage, s.set)
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
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, s := range settings(&c) {
		if given[s.name] {
			continue
		}
		value := cmp.Or(getenv(s.variable()), s.value)
		if err := s.set(value); err != nil {
			return c, fmt.Errorf("invalid value %q for variable %s: %w", value, s.variable(), err)
		}
	}
	if c.probe && c.port == "0" {
		return c, errors.New("-probe needs the -port (PORT) that the service listens on, not 0")
	}
	return c, nil
}

// parseHost takes a name or an IP address. The address may have brackets, as in a URL.
func parseHost(s string) (string, error) {
	host := strings.Trim(s, "[]")
	if _, err := netip.ParseAddr(host); err == nil && (s == host || s == "["+host+"]") {
		return host, nil
	}
	if s == "" || isDomain(strings.ToLower(s)) {
		return s, nil
	}
	return "", errors.New("want an IP address or a host name, without scheme, port or path")
}

// parsePort returns the port without leading zeros.
func parsePort(s string) (string, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return "", errors.New("want a port number from 0 to 65535")
	}
	return strconv.FormatUint(n, 10), nil
}

func parseLimit(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, errors.New("want an integer of 1 or more")
	}
	return n, nil
}

// parseDuration requires a unit for 0 too. A day is enough for any drain, and no sum overflows.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	hasUnit := !strings.HasSuffix(s, "0")
	if err != nil || d < 0 || d > 24*time.Hour || !hasUnit {
		return 0, errors.New("want a duration from 0s to 24h with its unit, such as 500ms or 1m30s")
	}
	return d, nil
}

// healthURL returns the URL that a client on this machine uses for a service on host and port.
func healthURL(host, port string) string {
	if host == "" || net.ParseIP(host).IsUnspecified() {
		host = "127.0.0.1"
	}
	return (&url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/health"}).String()
}

// probe requests url once and fails unless the answer is 200. It uses no proxy, because company
// networks set HTTP_PROXY in every container, and their proxy cannot reach the service in this one.
func probe(url string, stdout io.Writer) error {
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       2 * time.Second, // less than the 3 s of the image's HEALTHCHECK
	}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 512)) // bytes, enough to see who answers
	said := oneLine(fmt.Sprintf("%s answered %s %s", url, resp.Status, body))
	if err != nil {
		return fmt.Errorf("%s: %w", said, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: want 200 OK", said)
	}
	fmt.Fprintln(stdout, said)
	return nil
}

// listenAndServe serves until a signal stops it; before it listens, there is nothing to drain. An
// IPv4 address needs tcp4, because with tcp Go opens 0.0.0.0 for IPv6 too. For a name Go takes one
// address, preferably an IPv4 address.
func listenAndServe(c config, log *slog.Logger) error {
	network := "tcp"
	if ip, err := netip.ParseAddr(c.host); err == nil && ip.Unmap().Is4() {
		network = "tcp4"
	}
	options := net.ListenConfig{Control: smallBuffers}
	ln, err := options.Listen(context.Background(), network, net.JoinHostPort(c.host, c.port))
	if err == nil && ln.Addr() == nil {
		err = errors.New("getsockname: no address, as in a sandbox that forbids it")
	}
	if err != nil {
		return fmt.Errorf("cannot listen on -host (HOST) %q, -port (PORT) %s: %w", c.host, c.port, err)
	}
	return serve(ln, c, notify(), log)
}

// smallBuffers limits what the kernel holds for a connection to 50 KB, some hundred answers: Linux
// takes twice the size each way, and more for a large packet, and counts it to the container. It
// sets the listening socket, so that the window is right from the handshake on.
func smallBuffers(_, _ string, socket syscall.RawConn) error {
	const size = 8 << 10 // bytes
	return socket.Control(func(fd uintptr) {
		syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, size)
		syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, size)
	})
}

// notify returns a channel that receives the first signal to stop. Later ones change nothing,
// because supervisors send several, but after half a second SIGINT ends the process. SIGHUP and
// SIGINT stay ignored if they were at the start, as nohup wants it (golang/go issue 22497).
func notify() <-chan os.Signal {
	signals := make(chan os.Signal, 1) // os/signal drops a signal that finds no room
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	stop := make(chan os.Signal, 1)
	go func() {
		stop <- <-signals
		time.Sleep(500 * time.Millisecond) // a wrapper may pass on the same Ctrl-C
		signal.Reset(os.Interrupt)
	}()
	return stop
}

// serve answers until a signal comes from stop, and drains.
func serve(inner net.Listener, c config, stop <-chan os.Signal, log *slog.Logger) error {
	ln := newListener(inner, c.maxConnections, log)
	var draining atomic.Bool
	mustClose := func() bool { return draining.Load() || ln.shedding.Load() }
	srv := newServer(newHandler(routes(draining.Load), c.origins, mustClose), log)
	srv.ConnState = ln.setState
	go srv.Serve(ln) // returns when drain closes ln
	host, port, _ := net.SplitHostPort(inner.Addr().String())
	if strings.Contains(c.host, "%") {
		host = c.host // the kernel may leave out the zone
	}
	log.Info("listening", "addr", net.JoinHostPort(host, port), "url", healthURL(host, port),
		"version", version, "max-connections", c.maxConnections,
		"allowed-origins", strings.Join(c.origins, ","),
		"drain-delay", c.drainDelay, "shutdown-timeout", c.shutdownTimeout)

	s := <-stop
	draining.Store(true) // before the log says so
	log.Info("draining", "signal", s, "delay", c.drainDelay)
	if err := drain(ln, c); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

const (
	readTimeout = 5 * time.Second        // for a whole request, which may come a byte at a time
	clientTime  = 200 * time.Millisecond // for what is on its way when a place is needed
	lookAgain   = 2 * time.Millisecond   // as in Server.Shutdown, because a look cannot be lost
)

// newServer returns a server that limits the time and the memory of its clients.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        h,
		ReadTimeout:    readTimeout,
		WriteTimeout:   10 * time.Second,  // for a client that does not read its answer
		IdleTimeout:    620 * time.Second, // more than the 600 s of Google's balancers
		MaxHeaderBytes: 16 << 10,          // for tokens and cookies; net/http adds 4 KiB
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// Otherwise net/http answers OPTIONS * with 200 in a drain too; ServeMux answers 400.
		DisableGeneralOptionsHandler: true,
	}
}

// drain waits until each client has its answer, and fails after the shutdown timeout. It does not
// use Server.Shutdown, which drops requests whose headers have not been read yet.
func drain(ln *listener, c config) error {
	time.Sleep(c.drainDelay)
	ln.lastCall()
	ln.Close()
	ln.lastCall()
	end := time.Now().Add(c.shutdownTimeout)
	for late := 0; ln.open() > 0; time.Sleep(lookAgain) {
		if time.Now().After(end) {
			late++
		}
		if late > 25 { // looks, for what is idle or came while the process was stopped
			return errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)")
		}
		ln.closeIdle()
	}
	return nil
}

// lastCall waits for the connections that are on their way. It naps until Accept was free in five
// naps that ended on time, 40 at most. A process without a processor accepts nothing: 200 ms of
// that in one long sleep reset 1,969 of 2,400 clients, and with the naps 146.
func (ln *listener) lastCall() {
	const nap = 10 * time.Millisecond
	for naps, onTime := 0, 0; onTime < 5 && naps < 40; naps++ {
		began := time.Now()
		time.Sleep(nap)
		if time.Since(began) < 2*nap && !ln.shedding.Load() {
			onTime++
		}
	}
}

// logWriter writes lines to w in a goroutine of its own, so that a log that nobody reads cannot
// hold up the process. It drops a line if 100 lines before it still wait.
type logWriter struct {
	lines chan []byte   // nil is the end
	ended chan struct{} // closed once w has all lines before the end
}

func newLogWriter(w io.Writer) *logWriter {
	l := &logWriter{make(chan []byte, 100), make(chan struct{})}
	go func() {
		defer close(l.ended)
		for line := <-l.lines; line != nil; line = <-l.lines {
			w.Write(line) // fails if its reader has gone
		}
	}()
	return l
}

func (l *logWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
	}
	return len(line), nil
}

// flush ends the log and waits until w has all lines, for 100 ms at most.
func (l *logWriter) flush() {
	go func() { l.lines <- nil }()
	select {
	case <-l.ended:
	case <-time.After(100 * time.Millisecond):
	}
}

// listener limits how many connections are open, and so how much memory a crowd of clients takes.
// At the limit it closes the connection whose client has kept the server waiting for longest: for a
// request, for a body, or to take an answer. So no crowd keeps other clients out.
type listener struct {
	net.Listener
	limit    int // connections
	log      *slog.Logger
	warned   time.Time     // when Accept last logged a warning
	shedding atomic.Bool   // a new connection waits for a place
	left     chan struct{} // has room for one value: a connection has left

	mu    sync.Mutex // guards conns
	conns map[*conn]bool
}

func newListener(ln net.Listener, limit int, log *slog.Logger) *listener {
	left, conns := make(chan struct{}, 1), map[*conn]bool{}
	return &listener{Listener: ln, limit: limit, log: log, left: left, conns: conns}
}

// Accept returns the next connection once there is a place for it. Until then it counts as open, so
// that a drain waits for it. The only error is that of a closed listener: accept(2) also returns
// errors of the network, and files or memory that the system lacks may soon be free.
func (ln *listener) Accept() (net.Conn, error) {
	defer ln.shedding.Store(false)
	inner, err := ln.Listener.Accept()
	for err != nil && !errors.Is(err, net.ErrClosed) {
		ln.makeRoom("cannot accept connections, closing those that wait longest;"+
			" if files are short, raise ulimit -n (LimitNOFILE)", "err", err)
		inner, err = ln.Listener.Accept()
	}
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: inner}
	ln.mu.Lock()
	ln.conns[c] = true
	ln.mu.Unlock()
	for ln.open() > ln.limit {
		ln.makeRoom("connection limit reached, closing those that wait longest",
			"max-connections", ln.limit)
	}
	return c, nil
}

// makeRoom closes the connection that waits longest, if there is one, and returns once a connection
// has left or after lookAgain. It logs one warning a minute at most.
func (ln *listener) makeRoom(warning string, args ...any) {
	ln.shedding.Store(true)
	if time.Since(ln.warned) >= time.Minute {
		ln.warned = time.Now()
		ln.log.Warn(warning, args...)
	}
	if c := ln.longestWaiting(); c != nil {
		c.giveWay()
	}
	select {
	case <-ln.left:
	case <-time.After(lookAgain):
	}
}

// longestWaiting returns the connection to close, or nil if each client still has time.
func (ln *listener) longestWaiting() (longest *conn) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	most := clientTime
	for c := range ln.conns {
		c.mu.Lock()
		if waited := c.waitedSoFar(); waited >= most {
			longest, most = c, waited
		}
		c.mu.Unlock()
	}
	return longest
}

// open returns how many connections are open.
func (ln *listener) open() int {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return len(ln.conns)
}

// closeIdle lets Read fail where no request has started, so that the server closes the connection.
func (ln *listener) closeIdle() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for c := range ln.conns {
		c.mu.Lock()
		if c.waits > 0 && c.needsRequest() && !c.started {
			c.Conn.SetReadDeadline(time.Now().Add(lookAgain / 2)) // what has arrived is still read
		}
		c.mu.Unlock()
	}
}

// setState is the server's ConnState hook. A place is free once the goroutine of its connection is
// about to end, because until then it takes memory, or once a handler takes the connection over.
func (ln *listener) setState(nc net.Conn, state http.ConnState) {
	if tlsConn, ok := nc.(*tls.Conn); ok {
		nc = tlsConn.NetConn()
	}
	c := nc.(*conn)
	c.setState(state)
	switch {
	case state == http.StateIdle && ln.open() > ln.limit/2:
		// Beside 1,000 clients that ask without end and never read, the slowest probe took 0.5 s
		// with this turn for the others, and 1.15 s without.
		runtime.Gosched()
	case state == http.StateClosed || state == http.StateHijacked:
		ln.mu.Lock()
		delete(ln.conns, c)
		ln.mu.Unlock()
		select {
		case ln.left <- struct{}{}:
		default:
		}
	}
}

// conn is a connection that knows how long it has waited for its client.
//
// It relies on what net/http does and does not promise. TestNetHTTP fails when that changes:
//   - One goroutine calls Accept.
//   - StateNew is set before the connection's goroutine starts, StateActive after the headers have
//     been read or refused, StateIdle after an answer, and StateClosed once, after Close.
//   - A request is read through a buffer of 4 KiB.
//   - Beside a handler, a goroutine reads one byte without a deadline. Other reads have a deadline.
//   - The deadline of a kept connection is set after StateIdle, so a drain has to try again. The
//     deadline of its next request is set after its fourth byte.
//   - A Read that fails before a request is complete ends the connection, with a 400 or without.
//   - The rest of a body, up to 256 KiB, is read before the answer is sent.
type conn struct {
	net.Conn                // not a *net.TCPConn, because its ReadFrom would bypass Write
	noDeadline atomic.Bool  // of Read
	lines      atomic.Int64 // of the next request that have come in this state

	mu      sync.Mutex // guards what follows
	state   http.ConnState
	waits   int           // calls of Read and Write that wait for the client
	since   time.Time     // when the first of them began
	waited  time.Duration // in this state, before since
	started bool          // some of the next request has come in this state
}

func (c *conn) setState(state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = state
	c.waited = 0
	c.started = false
	c.lines.Store(0)
}

// needsRequest reports whether the server waits for a request. The caller holds c.mu.
func (c *conn) needsRequest() bool { return c.state == http.StateNew || c.state == http.StateIdle }

// Once Go 1.27 is the minimum, Server.MaxHeaderValueCount replaces these limits.
const (
	serverBuffer = 4 << 10 // bytes that net/http reads into; a larger Read is for a handler
	maxRead      = 512     // bytes at once, because lines ahead of their request are not counted
	maxLines     = 1 + 100 // of a request, because each takes some 200 bytes, however short it is
)

// Read reads for the server. After too many lines of a request it fails, and net/http answers 400.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 1 && c.noDeadline.Load() {
		return c.Conn.Read(p) // beside a handler, which does not wait for it: see conn
	}
	if len(p) <= serverBuffer {
		p = p[:min(len(p), maxRead)]
	}
	if c.lines.Load() > maxLines {
		return 0, errors.New("too many header lines")
	}
	c.startWait()
	n, err := c.Conn.Read(p)
	c.endWait(p[:n])
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	c.startWait()
	defer c.endWait(nil)
	return c.Conn.Write(p)
}

// CloseWrite lets net/http refuse a request without a reset, and serves handlers that take over.
func (c *conn) CloseWrite() error {
	if inner, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return inner.CloseWrite()
	}
	return errors.ErrUnsupported
}

// SetReadDeadline sets the deadline of Read. A zero t means none.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.noDeadline.Store(t.IsZero())
	return c.Conn.SetReadDeadline(t)
}

// startWait starts the clock, unless it runs: a handler may read and write at once.
func (c *conn) startWait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waits == 0 {
		c.since = time.Now()
	}
	c.waits++
}

// endWait stops the clock with the last call that waits, and notes what has come of a request.
func (c *conn) endWait(came []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waits--
	if c.waits == 0 {
		c.waited += time.Since(c.since)
	}
	if !c.needsRequest() {
		return
	}
	c.lines.Add(int64(bytes.Count(came, []byte("\n"))))
	if c.started || len(bytes.Trim(came, "\r\n")) == 0 { // line ends alone do not start one
		return
	}
	c.started = true
	if c.state == http.StateIdle {
		// net/http would leave the first three bytes the time of an idle connection.
		c.Conn.SetReadDeadline(time.Now().Add(readTimeout))
	}
}

// waitedSoFar returns how long the server waits for the client, or 0. The caller holds c.mu.
func (c *conn) waitedSoFar() time.Duration {
	if c.waits == 0 {
		return 0
	}
	return c.waited + time.Since(c.since)
}

// giveWay closes the connection, unless its client has just been heard.
func (c *conn) giveWay() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waitedSoFar() < clientTime {
		return
	}
	if tcp, ok := c.Conn.(*net.TCPConn); ok && !c.needsRequest() {
		tcp.SetLinger(0) // or the kernel would keep an answer that its client does not take
	}
	c.Conn.Close()
}
