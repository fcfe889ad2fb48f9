// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"bytes"
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
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
)

const program = "whatsapp-contact-processor"

const (
	exitFailure = 1  // something went wrong at run time
	exitUsage   = 64 // a wrong setting: EX_USAGE of sysexits.h, for Go itself crashes with 2
)

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

// run is the whole program. It returns the exit code.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
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

// oneLine replaces what would move a terminal's cursor by single spaces.
func oneLine(s string) string {
	isSpace := func(r rune) bool { return r == ' ' || unicode.IsControl(r) }
	return strings.Join(strings.FieldsFunc(s, isSpace), " ")
}

// config is what flags and variables say.
type config struct {
	host, port                  string
	maxConnections              int
	origins                     []string
	drainDelay, shutdownTimeout time.Duration
	probe                       bool
}

// setting is a flag that has an environment variable too.
type setting struct {
	name, value, usage string
	set                func(string) error
}

func (s setting) variable() string {
	return strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

// settings returns the settings of c with their default values.
func settings(c *config) []setting {
	return []setting{
		{"host", "", "`address` to listen on; empty for all interfaces, IPv4 and IPv6",
			into(&c.host, parseHost)},
		{"port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one",
			into(&c.port, parsePort)},
		{"max-connections", "1000", "most `connections` at once, 1 or more; for a new one the longest waiting gives way",
			into(&c.maxConnections, parseLimit)},
		{"allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, as scheme://host[:port];\n* alone for all, https://*.corp.example for every subdomain of one",
			into(&c.origins, parseOrigins)},
		{"drain-delay", "0s", "`duration` of 503 on /health after a signal to stop, before the listener closes",
			into(&c.drainDelay, parseDuration)},
		{"shutdown-timeout", "10s", "longest `duration` of the wait for open requests once the listener has closed",
			into(&c.shutdownTimeout, parseDuration)},
	}
}

// into returns a function that parses a value into field.
func into[T any](field *T, parse func(string) (T, error)) func(string) error {
	return func(value string) (err error) { *field, err = parse(value); return err }
}

// parse takes each setting from its flag, else from its variable if that is not empty, else its
// default. An error names the flag or the variable. For -h it writes the help to stdout and
// returns flag.ErrHelp.
func parse(args []string, getenv func(string) string, stdout io.Writer) (config, error) {
	var c config
	flags := flag.NewFlagSet(program, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is one line, without the help
	flags.BoolVar(&c.probe, "probe", false, "ask the service at this host and port, say what it answered, exit 0 or 1")
	for _, s := range settings(&c) {
		usage := s.usage + " [" + s.variable() + "]"
		if s.value != "" {
			usage += " (default " + s.value + ")"
		}
		flags.Func(s.name, usage, s.set)
	}
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(stdout)
		flags.Usage()
		return c, err
	case err != nil && strings.Contains(err.Error(), ": want "):
		return c, err
	case err != nil: // in package flag's own words
		return c, fmt.Errorf("%w; want -probe alone, or another flag with its value, as -port 5034", err)
	case flags.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q, want only flags", flags.Arg(0))
	}
	given := map[string]bool{} // by a flag, so that the variable does not count
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
		return c, errors.New("-probe wants the -port (PORT) that the service listens on, not 0")
	}
	return c, nil
}

// parseHost takes a name or an IP address, which may stand in brackets as in a URL.
func parseHost(s string) (string, error) {
	host := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		host = s[1 : len(s)-1]
	}
	if _, err := netip.ParseAddr(host); err == nil {
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

// parseDuration wants a unit behind a 0 too, where time.ParseDuration does without. A day is more
// than any drain needs, and far from where sums of durations overflow.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	hasUnit := !strings.HasSuffix(s, "0")
	if err != nil || d < 0 || d > 24*time.Hour || !hasUnit {
		return 0, errors.New("want a duration from 0s to 24h with its unit, as 500ms or 1m30s")
	}
	return d, nil
}

// healthURL returns where a client on this machine finds a service that listens on host and port.
func healthURL(host, port string) string {
	if host == "" || net.ParseIP(host).IsUnspecified() {
		host = "127.0.0.1"
	}
	return (&url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/health"}).String()
}

// probe asks url once and fails unless the answer is 200. It uses no proxy: a company network
// sets HTTP_PROXY in every container, and its proxy cannot reach this one.
func probe(url string, stdout io.Writer) error {
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		},
		Timeout: 2 * time.Second, // under the 3 s of the image's HEALTHCHECK
	}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 512)) // bytes, enough to see who answers
	said := oneLine(fmt.Sprintf("%s answered %s: %s", url, resp.Status, body))
	said = strings.TrimSuffix(said, ":") // of no body
	if err != nil {
		return fmt.Errorf("%s: %w", said, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: want 200 OK", said)
	}
	fmt.Fprintln(stdout, said)
	return nil
}

// listenAndServe takes signals over once it listens: until then there is nothing to drain, and a
// signal ends the process. Go would open 0.0.0.0 on IPv6 too, but who writes an IPv4 address means
// IPv4. Of the addresses of a name, as of localhost, Go takes one, and rather an IPv4 address.
func listenAndServe(c config, log *slog.Logger) error {
	signal.Ignore(syscall.SIGPIPE) // as when the reader of the log has gone
	network := "tcp"
	if ip, err := netip.ParseAddr(c.host); err == nil && ip.Unmap().Is4() {
		network = "tcp4"
	}
	ln, err := net.Listen(network, net.JoinHostPort(c.host, c.port))
	if err == nil && ln.Addr() == nil {
		err = errors.New("getsockname: no address, as in a sandbox that forbids it")
	}
	if err != nil {
		return fmt.Errorf("cannot listen on host %q, port %s: %w; want another -port (PORT) or -host (HOST)", c.host, c.port, err)
	}
	return serve(ln, c, notify(), log)
}

// notify returns a channel that gets the first signal to stop. SIGHUP or SIGINT stays ignored if
// it was when the process started, as nohup and a shell's background want it (golang/go issue
// 22497); of other signals Go cannot tell. Supervisors send several for one stop, so more of them
// change nothing. But for a person in a hurry, SIGINT ends the process again as it ends any other.
func notify() <-chan os.Signal {
	signals := make(chan os.Signal, 1) // os/signal drops what finds no room
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	stop := make(chan os.Signal, 1)
	go func() {
		stop <- <-signals
		time.Sleep(500 * time.Millisecond) // the same Ctrl-C may be passed on twice
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
		"max-connections", c.maxConnections, "allowed-origins", strings.Join(c.origins, ","),
		"drain-delay", c.drainDelay, "shutdown-timeout", c.shutdownTimeout)

	s := <-stop
	draining.Store(true) // balancers see /health fail and look elsewhere
	log.Info("draining", "signal", s, "delay", c.drainDelay)
	if err := drain(ln, c); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

const readTimeout = 5 * time.Second // for a whole request, which a client could drip for ever

// newServer returns a server that bounds its clients' time and memory.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        h,
		ReadTimeout:    readTimeout,
		WriteTimeout:   10 * time.Second,  // for a client that does not read its answer
		IdleTimeout:    620 * time.Second, // Google's balancers close after 600 s, and so first
		MaxHeaderBytes: 16 << 10,          // for tokens and cookies; net/http adds 4 KiB
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// Or it says 200 to OPTIONS *, draining or not; ServeMux says 400.
		DisableGeneralOptionsHandler: true,
	}
}

const lookAgain = 2 * time.Millisecond // as Server.Shutdown does: nobody has to wake anybody

// drain lets every client leave with its answer, and fails if that takes too long. Server.Shutdown
// is no help: it drops each request whose headers it has not read yet.
func drain(ln *listener, c config) error {
	time.Sleep(c.drainDelay)
	lastCall()
	ln.Close()
	lastCall()
	end := time.Now().Add(max(c.shutdownTimeout, 50*time.Millisecond)) // to close what is idle in
	for ln.open() > 0 {
		if time.Now().After(end) {
			return errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)")
		}
		ln.closeIdle()
		time.Sleep(lookAgain)
	}
	return nil
}

// lastCall lets in what is on its way to a door that closes. A process that got no processor wakes
// too late, before it has accepted what came meanwhile: so it naps until five naps end on time.
func lastCall() {
	const nap = 10 * time.Millisecond
	for naps, onTime := 0, 0; onTime < 5 && naps < 20; naps++ { // or 20 have ended
		began := time.Now()
		time.Sleep(nap)
		if time.Since(began) < 2*nap {
			onTime++
		}
	}
}

// logWriter passes lines on to w without making anybody wait, so that a log that nobody reads
// cannot hold up the process. Lines that find no room are dropped.
type logWriter struct {
	queue  chan []byte
	unread atomic.Int64 // lines that are in the queue, or on their way from it to w
}

func newLogWriter(w io.Writer) *logWriter {
	l := &logWriter{queue: make(chan []byte, 100)} // lines; a process logs a few in its life
	go func() {
		for line := range l.queue {
			w.Write(line) // an error means that its reader has gone
			l.unread.Add(-1)
		}
	}()
	return l
}

func (l *logWriter) Write(line []byte) (int, error) {
	l.unread.Add(1)
	select {
	case l.queue <- bytes.Clone(line):
	default:
		l.unread.Add(-1)
	}
	return len(line), nil
}

// flush gives what is left a short time to be read, and no more.
func (l *logWriter) flush() {
	end := time.Now().Add(100 * time.Millisecond)
	for l.unread.Load() > 0 && time.Now().Before(end) {
		time.Sleep(lookAgain)
	}
}

// listener bounds the number of connections that are open at a time, and with it the memory that
// a crowd can take. At the limit the connection gives way whose client has kept the server waiting
// for longest: for a request, for its body, or to take an answer. So no crowd keeps others out.
type listener struct {
	net.Listener
	limit    int // of connections
	log      *slog.Logger
	warned   map[string]time.Time // when Accept last gave the log which message
	shedding atomic.Bool          // a new connection cannot get in: answers tell clients to leave

	mu    sync.Mutex // guards what follows, and the second half of each conn
	conns map[*conn]bool
}

func newListener(ln net.Listener, limit int, log *slog.Logger) *listener {
	return &listener{
		Listener: ln,
		limit:    limit,
		log:      log,
		warned:   map[string]time.Time{},
		conns:    map[*conn]bool{},
	}
}

// Accept returns the next connection once there is room for it; until then there is one more than
// the limit. The only error is that of a closed listener.
func (ln *listener) Accept() (net.Conn, error) {
	inner, err := ln.accept()
	if err != nil {
		return nil, err
	}
	// The kernel holds some hundred answers for a client that does not read: 50 KB at most, for
	// Linux takes twice the size each way and more for a large packet, and counts it to the
	// container. A route for large bodies wants larger buffers.
	const bufferSize = 8 << 10 // bytes
	if tcp, ok := inner.(*net.TCPConn); ok {
		tcp.SetReadBuffer(bufferSize) // if it fails, the default stays
		tcp.SetWriteBuffer(bufferSize)
	}
	c := &conn{Conn: inner, ln: ln, lineEnds: 2} // as behind a request
	ln.mu.Lock()
	ln.conns[c] = true
	ln.mu.Unlock()
	if ln.open() > ln.limit {
		ln.makeRoom()
	}
	return c, nil
}

// accept goes on after every error but that of a closed listener: accept(2) returns errors of the
// network too, and what the system lacks now it may have soon, above all when others leave.
func (ln *listener) accept() (net.Conn, error) {
	for {
		c, err := ln.Listener.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) {
			return c, err
		}
		ln.shedding.Store(true)
		ln.warn("cannot accept connections, the longest waiting give way; if files are short, raise ulimit -n (LimitNOFILE)", "err", err)
		if c := ln.longestWaiting(); c != nil {
			c.Close()
		}
		time.Sleep(20 * time.Millisecond) // an error that stays takes no processor time
		ln.shedding.Store(false)
	}
}

// makeRoom returns when no more connections than the limit are open.
func (ln *listener) makeRoom() {
	ln.shedding.Store(true)
	defer ln.shedding.Store(false)
	ln.warn("connection limit reached, the longest waiting give way", "max-connections", ln.limit)
	runtime.Gosched() // a client that can be answered leaves with that, and is not cut off
	for ln.open() > ln.limit {
		if c := ln.longestWaiting(); c != nil {
			c.Close()
		} else {
			time.Sleep(lookAgain)
		}
	}
}

// longestWaiting returns the connection whose client has kept the server waiting for longest, to be
// closed. What is on its way has 200 ms to come, so that busy clients are not cut off.
func (ln *listener) longestWaiting() (longest *conn) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	most := 200 * time.Millisecond
	now := time.Now()
	for c := range ln.conns {
		if waited := c.waited + now.Sub(c.since); !c.since.IsZero() && waited >= most {
			longest, most = c, waited
		}
	}
	if longest == nil || longest.needsRequest() {
		return longest
	}
	if tcp, ok := longest.Conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) // or the kernel would keep an answer that its client does not take
	}
	return longest
}

// warn logs each message once a minute at most.
func (ln *listener) warn(msg string, args ...any) {
	if time.Since(ln.warned[msg]) < time.Minute {
		return
	}
	ln.warned[msg] = time.Now()
	ln.log.Warn(msg, args...)
}

// open returns how many connections are open.
func (ln *listener) open() int {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return len(ln.conns)
}

// crowded reports whether the limit may soon be reached.
func (ln *listener) crowded() bool { return 2*ln.open() > ln.limit }

// closeIdle lets Read fail, and so the server close, where no request has begun.
func (ln *listener) closeIdle() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for c := range ln.conns {
		if c.needsRequest() && c.firstByte.IsZero() && !c.since.IsZero() {
			c.SetReadDeadline(time.Unix(1, 0)) // a time that is over
		}
	}
}

// setState is told by the server what it does with a connection: see http.Server.ConnState.
func (ln *listener) setState(nc net.Conn, state http.ConnState) {
	nc.(*conn).setState(state)
	if state == http.StateIdle && ln.crowded() {
		runtime.Gosched() // a client that sends many requests at once takes turns with the others
	}
}

// conn is a connection with what there is to know of it.
type conn struct {
	net.Conn // and not *net.TCPConn, whose ReadFrom would get past Write
	ln       *listener

	state     http.ConnState
	since     time.Time     // when the server began to wait for the client; zero if it does not
	waited    time.Duration // in this state, before that
	firstByte time.Time     // of the request that comes, as it was read; zero if none has begun
	lines     int           // that have ended in this state
	lineEnds  int           // behind the last other byte that came: two or more end the headers
}

// setState begins a state. A hijacked connection is its handler's to bound and to close.
func (c *conn) setState(state http.ConnState) {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	c.state = state
	c.waited = 0
	c.lines = 0
	c.firstByte = time.Time{}
	if c.lineEnds < 2 {
		c.firstByte = time.Now() // it came with the one before
	}
	if state == http.StateHijacked {
		delete(c.ln.conns, c)
	}
}

// needsRequest reports whether the server has to read a request. The caller holds ln.mu.
func (c *conn) needsRequest() bool { return c.state == http.StateNew || c.state == http.StateIdle }

// Read reads for the server. With room for one byte, that only looks beside a handler whether the
// client is still there, and waits for nobody.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) > 1 {
		c.startClock()
		defer c.stopClock()
	}
	if err := c.limitRequest(); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	c.noteRead(p[:n])
	return n, err
}

// Write lasts for as long as the client takes to make room.
func (c *conn) Write(p []byte) (int, error) {
	c.startClock()
	defer c.stopClock()
	return c.Conn.Write(p)
}

func (c *conn) startClock() {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	c.since = time.Now()
}

func (c *conn) stopClock() {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	c.waited += time.Since(c.since)
	c.since = time.Time{}
}

// limitRequest bounds a request before more of it is read. Behind too many header lines it fails,
// and net/http says 400: each takes some 200 bytes of memory, however short it is. Apache, Envoy
// and Kestrel have this limit; with Go 1.27 as the minimum, Server.MaxHeaderValueCount replaces it.
// And a kept connection's next request has readTimeout from its first byte on, not from its fourth.
func (c *conn) limitRequest() error {
	const maxLines = 1 + 100 // the request line and the headers
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	if c.needsRequest() && c.lines > maxLines {
		return errors.New("too many header lines")
	}
	if c.state == http.StateIdle && !c.firstByte.IsZero() {
		c.SetReadDeadline(c.firstByte.Add(readTimeout))
	}
	return nil
}

// noteRead notes what has come.
func (c *conn) noteRead(p []byte) {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	text := bytes.TrimRight(p, "\r\n")
	if len(text) > 0 {
		c.firstByte = cmp.Or(c.firstByte, time.Now())
		c.lineEnds = 0
	}
	c.lineEnds += bytes.Count(p[len(text):], []byte("\n"))
	c.lines += bytes.Count(p, []byte("\n"))
}

// Close returns when nobody reads or writes any more, and the place is free.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	delete(c.ln.conns, c)
	return err
}

// CloseWrite comes behind a 431, and behind a large body that nobody has read. Then net/http sleeps
// for half a second, so that the client can read why. In a crowd its goroutine ends at once, in its
// deferred function: asleep, those of 2,000 clients took 35 of a container's 128 MiB.
func (c *conn) CloseWrite() error {
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok || c.ln.crowded() {
		c.Close()
		runtime.Goexit()
	}
	return tcp.CloseWrite()
}
