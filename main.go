// Whatsapp-contact-processor serves GET /health: 200 while it runs, 503 while it drains.
package main

import (
	"bytes"
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
		err = probe(healthURL(net.JoinHostPort(c.host, c.port)), stdout)
	} else {
		err = serve(c, notify(), slog.New(slog.NewTextHandler(log, nil)))
	}
	if err != nil {
		fmt.Fprintf(log, "%s: %s\n", program, oneLine(err.Error()))
		return exitFailure
	}
	return 0
}

// oneLine replaces what would move a terminal's cursor by single spaces.
func oneLine(s string) string {
	isGap := func(r rune) bool { return r == ' ' || unicode.IsControl(r) }
	return strings.Join(strings.FieldsFunc(s, isGap), " ")
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
			func(s string) (err error) { c.host, err = parseHost(s); return err }},
		{"port", "5034", "TCP `port`, 0 to 65535; 0 picks a free one",
			func(s string) (err error) { c.port, err = parsePort(s); return err }},
		{"max-connections", "1000", "most `connections` at once, 1 or more; for a new one the longest waiting gives way",
			func(s string) (err error) { c.maxConnections, err = parseLimit(s); return err }},
		{"allowed-origins", "*", "comma-separated `origins` whose pages may read the answers, as scheme://host[:port];\n* alone for all, https://*.corp.example for every subdomain of one",
			func(s string) (err error) { c.origins, err = parseOrigins(s); return err }},
		{"drain-delay", "0s", "`duration` of 503 on /health after a signal to stop, before the listener closes",
			func(s string) (err error) { c.drainDelay, err = parseDuration(s); return err }},
		{"shutdown-timeout", "10s", "longest `duration` of the wait for open requests once the listener has closed",
			func(s string) (err error) { c.shutdownTimeout, err = parseDuration(s); return err }},
	}
}

// parse takes each setting from its flag, else from its variable if that is not empty, else its
// default. An error names the flag or the variable. For -h it writes the help to stdout and
// returns flag.ErrHelp.
func parse(args []string, getenv func(string) string, stdout io.Writer) (config, error) {
	var c config
	given := map[string]bool{} // by a flag, so that the variable does not count
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

// parseDuration wants a unit behind a 0 too, where time.ParseDuration does without.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	hasUnit := !strings.HasSuffix(s, "0")
	if err != nil || d < 0 || !hasUnit {
		return 0, errors.New("want a duration of 0s or more with its unit, as 500ms or 1m30s")
	}
	return d, nil
}

// healthURL returns where a client on this machine finds a service that listens on addr.
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

// notify returns the signals that end the process. SIGHUP or SIGINT stays ignored if it was when
// the process started, as nohup and a shell's background want it (golang/go issue 22497); of
// other signals Go cannot tell. SIGPIPE would end the process when the reader of its log has gone.
func notify() <-chan os.Signal {
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 1) // os/signal drops what finds no room
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals
}

// orders turns signals into two contexts, whose causes name the signal. The first one ends stop.
// Supervisors send several for one stop, so only a person ends hurry: by SIGINT, and so late that
// it is not the same Ctrl-C passed on twice.
func orders(signals <-chan os.Signal) (stop, hurry context.Context) {
	const sameKey = 500 * time.Millisecond
	stop, endStop := context.WithCancelCause(context.Background())
	hurry, endHurry := context.WithCancelCause(context.Background())
	go func() {
		endStop(fmt.Errorf("%v", <-signals))
		first := time.Now()
		for s := range signals {
			if s == os.Interrupt && time.Since(first) >= sameKey {
				endHurry(fmt.Errorf("drain cut short by a second signal: %v", s))
			}
		}
	}()
	return stop, hurry
}

// serve listens, answers until the first signal, and drains.
func serve(c config, signals <-chan os.Signal, log *slog.Logger) error {
	stop, hurry := orders(signals)
	ln, err := listen(stop, c)
	if err != nil && stop.Err() != nil { // it was still looking up the host
		log.Info("stopped", "signal", context.Cause(stop))
		return nil
	}
	if err != nil {
		return err
	}
	conns := newListener(ln, c.maxConnections, grace(c.maxConnections), log)
	var draining atomic.Bool
	leave := func() bool { return draining.Load() || conns.crowded.Load() }
	srv := newServer(newHandler(routes(draining.Load), c.origins, leave), log)
	srv.ConnState = conns.connState
	served := make(chan struct{})
	go func() {
		srv.Serve(conns) // returns when drain closes conns
		close(served)
	}()
	log.Info("listening", "addr", ln.Addr(), "url", healthURL(ln.Addr().String()),
		"max-connections", c.maxConnections, "allowed-origins", strings.Join(c.origins, ","),
		"drain-delay", c.drainDelay, "shutdown-timeout", c.shutdownTimeout)

	<-stop.Done()
	draining.Store(true) // balancers see /health fail and look elsewhere
	log.Info("draining", "signal", context.Cause(stop), "delay", c.drainDelay)
	if err := drain(hurry, c, conns, served); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// listen looks up the host, which ends with ctx, and listens there. Go would open 0.0.0.0 on IPv6
// too, but who writes an IPv4 address means IPv4. Of the addresses of a name, as of localhost, Go
// takes one, and rather an IPv4 address.
func listen(ctx context.Context, c config) (net.Listener, error) {
	network := "tcp"
	if ip, err := netip.ParseAddr(c.host); err == nil && ip.Unmap().Is4() {
		network = "tcp4"
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, network, net.JoinHostPort(c.host, c.port))
	if err != nil {
		return nil, fmt.Errorf("cannot listen on host %q, port %s: %w; want another -port (PORT) or -host (HOST)", c.host, c.port, err)
	}
	return ln, nil
}

// grace returns the time in which a quarter of a core reads the requests of n connections that
// come at once. More than one request may take is no use.
func grace(n int) time.Duration {
	const perRequest = 200 * time.Microsecond
	if n > int(readTimeout/perRequest) {
		return readTimeout
	}
	return time.Duration(n) * perRequest
}

// readTimeout is for a whole request, so that a client cannot drip it for ever.
const readTimeout = 5 * time.Second

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

// drain lets every client leave with its answer. It fails with the cause of ctx's end, or when
// that takes too long. Server.Shutdown is no help: it drops each request whose headers it has not
// read yet.
func drain(ctx context.Context, c config, ln *listener, served <-chan struct{}) error {
	const lastCall = 50 * time.Millisecond // for what is on its way to a door that closes
	if err := sleep(ctx, max(c.drainDelay, lastCall)); err != nil {
		return err
	}
	ln.Close()
	late := errors.New("requests still open after -shutdown-timeout (SHUTDOWN_TIMEOUT)")
	ctx, cancel := context.WithTimeoutCause(ctx, lastCall+max(c.shutdownTimeout, lastCall), late)
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

// sleep returns after d, or with the cause of ctx's end.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// logWriter passes lines on to w without making anybody wait, so that a log that nobody reads
// cannot hold up the process. It counts the lines for which it has no room, and drops them.
type logWriter struct {
	w     io.Writer
	queue chan []byte // lines, and nil behind the last one
	lost  atomic.Int64
	ended chan struct{} // closed behind the last line
}

func newLogWriter(w io.Writer) *logWriter {
	const room = 100 // lines of some 200 bytes; a process logs a few in its life
	l := &logWriter{w: w, queue: make(chan []byte, room), ended: make(chan struct{})}
	go l.pass()
	return l
}

func (l *logWriter) Write(line []byte) (int, error) {
	select {
	case l.queue <- bytes.Clone(line):
	default:
		l.lost.Add(1)
	}
	return len(line), nil
}

// pass writes the lines to w. An error means that their reader has gone, and so is ignored.
func (l *logWriter) pass() {
	defer close(l.ended)
	log := slog.New(slog.NewTextHandler(l.w, nil))
	for line := <-l.queue; line != nil; line = <-l.queue {
		l.w.Write(line)
		if len(l.queue) > 0 {
			continue
		}
		if lost := l.lost.Swap(0); lost > 0 {
			log.Warn("log lines lost, nobody read them", "lines", lost)
		}
	}
}

// flush ends the log. It gives what is left a moment to be read, and no more.
func (l *logWriter) flush() {
	moment := time.After(100 * time.Millisecond)
	select {
	case l.queue <- nil:
	case <-moment:
		return
	}
	select {
	case <-l.ended:
	case <-moment:
	}
}

// listener bounds the number of connections that are open at a time, and with it the memory that
// a crowd can take. At the limit a new connection takes the place of the one that has waited
// longest for a request. If none waits for a request, it takes the place of the one whose client
// has left its answer lying for longest. So no crowd keeps others out.
type listener struct {
	net.Listener
	limit   int           // of connections with a place
	grace   time.Duration // see newListener
	log     *slog.Logger
	warned  map[string]time.Time // when Accept last gave the log which message
	crowded atomic.Bool          // a new connection waits for a place
	freed   chan struct{}        // has room for one: a place has become free

	mu     sync.Mutex // guards what follows, and the second half of each conn
	conns  list.List  // of *conn: those with a place, by since
	noIdle bool       // see closeIdle
}

// newListener returns a listener for limit connections. Each has grace for its first or next
// request, which may be on its way, before it has to give way. That time counts from when the
// server is ready to read.
func newListener(ln net.Listener, limit int, grace time.Duration, log *slog.Logger) *listener {
	return &listener{
		Listener: ln,
		limit:    limit,
		grace:    grace,
		log:      log,
		warned:   map[string]time.Time{},
		freed:    make(chan struct{}, 1),
	}
}

// Accept returns the next connection once it has a place; until then there is one more than the
// limit. The only error is that of a closed listener.
func (ln *listener) Accept() (net.Conn, error) {
	defer ln.crowded.Store(false)
	tcp, err := ln.accept()
	if err != nil {
		return nil, err
	}
	c := &conn{TCPConn: tcp.(*net.TCPConn), ln: ln}
	c.limitBuffers()
	for !ln.seat(c) {
		ln.crowded.Store(true)
		ln.warn("connection limit reached, the longest waiting give way", "max-connections", ln.limit)
		runtime.Gosched() // a client that can be answered leaves with that, and is not cut off
		if ln.seat(c) {
			break
		}
		ln.await(ln.makeRoom())
	}
	return c, nil
}

// accept goes on after every error but that of a closed listener: accept(2) returns errors of the
// network too, and what the system lacks now it may have soon. It tries again at once, and each
// second in the end. Without a file descriptor to spare it makes room, as at the limit.
func (ln *listener) accept() (net.Conn, error) {
	for delay := 5 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		c, err := ln.Listener.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) {
			return c, err
		}
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			ln.crowded.Store(true)
			ln.warn("out of file descriptors, the longest waiting give way; raise ulimit -n (LimitNOFILE)", "err", err)
			ln.await(min(delay, ln.makeRoom()))
			ln.crowded.Store(false)
			continue
		}
		ln.warn("cannot accept connections, trying again", "err", err)
		ln.await(delay)
	}
}

// Close ends Accept, even where it waits to try again.
func (ln *listener) Close() error {
	err := ln.Listener.Close()
	ln.wake()
	return err
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

// makeRoom closes the connection whose turn it is to give way. It returns how long to wait for
// its place, or until it may be somebody's turn.
func (ln *listener) makeRoom() time.Duration {
	c, wait := ln.next()
	if c != nil {
		c.TCPConn.Close() // without the lock, for it waits until nobody reads or writes
	}
	return wait
}

// next returns the connection whose turn it is to give way, if there is one, and how long to wait.
func (ln *listener) next() (*conn, time.Duration) {
	const patience = time.Second // with a client that has its answer, and a server that has to close
	ln.mu.Lock()
	defer ln.mu.Unlock()
	var slowest *conn
	for place := ln.conns.Front(); place != nil; place = place.Next() {
		c := place.Value.(*conn)
		if c.phase == waiting {
			if rest := ln.grace - time.Since(c.since); rest > 0 {
				return nil, rest
			}
			c.phase = gone
			return c, patience
		}
		if c.phase == sending && slowest == nil {
			slowest = c
		}
	}
	if slowest == nil {
		return nil, min(ln.grace, patience) // nobody's turn comes sooner
	}
	if rest := patience - time.Since(slowest.since); rest > 0 {
		return nil, min(ln.grace, rest)
	}
	slowest.phase = gone
	slowest.SetLinger(0) // or the kernel would keep the answer for a client that does not take it
	return slowest, patience
}

// await returns when a place has become free, or after d.
func (ln *listener) await(d time.Duration) {
	select {
	case <-ln.freed:
	case <-time.After(max(d, time.Millisecond)): // so that waiting takes no processor time
	}
}

// wake ends await.
func (ln *listener) wake() {
	select {
	case ln.freed <- struct{}{}:
	default: // it has been woken already
	}
}

// warn logs each message once a minute at most.
func (ln *listener) warn(msg string, args ...any) {
	if time.Since(ln.warned[msg]) < time.Minute {
		return
	}
	ln.warned[msg] = time.Now()
	ln.log.Warn(msg, args...)
}

// closeIdle closes the connections on which no request has begun, now and from now on.
func (ln *listener) closeIdle() {
	ln.mu.Lock()
	ln.noIdle = true
	var idle []*conn
	for place := ln.conns.Front(); place != nil; place = place.Next() {
		if c := place.Value.(*conn); c.phase == waiting && !c.begun {
			idle = append(idle, c)
		}
	}
	ln.mu.Unlock()
	for _, c := range idle {
		c.TCPConn.Close() // without the lock, as in makeRoom
	}
}

// wait returns when the last connection has gone, or with the cause of ctx's end. Nobody may be
// in Accept any more.
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

// connState is told by the server what it does with a connection: see http.Server.ConnState.
func (ln *listener) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateActive:
		c.(*conn).enter(answering)
	case http.StateIdle:
		c.(*conn).enter(waiting)
		runtime.Gosched() // a client that sends many requests at once takes turns with the others
	case http.StateHijacked: // its handler has to bound and to close it from now on
		c.(*conn).leave()
	}
}

// conn is a connection with all that is known of it.
type conn struct {
	*net.TCPConn
	ln    *listener
	ready bool        // the server has begun to read
	lines headerLines // that have been read
	held  []byte      // has been read and is kept from the server: see Read

	place *list.Element // in ln.conns, from the end of Accept to Close; else nil
	phase phase
	since time.Time // when it entered its phase
	begun bool      // a byte of the request that it waits for has come
}

// phase is what a connection does.
type phase int

const (
	queued    phase = iota // it has a place, and the server has yet to turn to it
	waiting                // it waits for a request, the first or the next
	answering              // its handler is at work
	sending                // its client has to take an answer
	gone                   // it had to give way
)

// enter begins a phase.
func (c *conn) enter(p phase) {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	if c.place == nil || c.phase == gone {
		return
	}
	c.phase, c.since = p, time.Now()
	c.ln.conns.MoveToBack(c.place)
	if p != waiting {
		return
	}
	c.begun = c.lines.begun() // by what came behind the last one
	if c.ln.noIdle && !c.begun {
		c.TCPConn.Close()
	}
}

// hear notes that a byte has come. It reports whether the server wants it for a request.
func (c *conn) hear() bool {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	c.begun = true
	return c.phase == waiting
}

// leave gives the place back.
func (c *conn) leave() {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	if c.place == nil {
		return
	}
	c.ln.conns.Remove(c.place)
	c.place = nil
	c.ln.wake()
}

// Close is for the owner of the connection, the server, who gives its place back so. One that has
// to give way is closed beneath it, and has its place until the server is done with it.
func (c *conn) Close() error {
	err := c.TCPConn.Close()
	c.leave()
	return err
}

// CloseWrite is called by net/http behind a 431, and behind an answer to a large body that nobody
// has read. It sleeps for half a second then, so that the client can read why. The place would be
// held for that long, and a crowd of such clients would hold them all. So when places run short
// the connection closes at once, and its goroutine ends here, without the sleep: net/http's
// deferred function cleans up.
func (c *conn) CloseWrite() error {
	if !c.hasToHurry() {
		return c.TCPConn.CloseWrite()
	}
	c.Close()
	runtime.Goexit()
	return nil // never reached
}

// hasToHurry reports whether others wait for the place of c, or soon will: more than half of the
// places are taken. A connection that was hijacked has none.
func (c *conn) hasToHurry() bool {
	c.ln.mu.Lock()
	defer c.ln.mu.Unlock()
	return c.place != nil && (c.ln.crowded.Load() || 2*c.ln.conns.Len() > c.ln.limit)
}

// limitBuffers bounds what the kernel holds for a client that does not read to some hundred
// answers: 50 KB of memory at most, for Linux takes twice the size each way and more for a large
// packet, and counts it to the container. A route for large bodies wants larger buffers.
func (c *conn) limitBuffers() {
	const size = 8 << 10  // bytes
	c.SetReadBuffer(size) // if it fails, the default stays
	c.SetWriteBuffer(size)
}

// Write is a phase of its own, for the client decides how long it takes.
func (c *conn) Write(p []byte) (int, error) {
	c.enter(sending)
	defer c.enter(answering)
	return c.TCPConn.Write(p)
}

// Read fails where a request has more than maxHeaderLines, and net/http says 400. What stands
// behind the empty line is the next request or a body, and a body may have any number of lines.
// So what is behind the first line too many is held until somebody asks for more: the server for
// a request, or a handler for its body.
//
// With Go 1.27 as the minimum, Server.MaxHeaderValueCount replaces this.
func (c *conn) Read(p []byte) (int, error) {
	if !c.ready {
		c.ready = true
		c.enter(waiting) // what the server took to come here is not the client's delay
	}
	if c.lines.tooMany() && c.hear() {
		return 0, errors.New("too many header lines")
	}
	if len(c.held) > 0 {
		n := copy(p, c.held)
		c.held = c.held[n:]
		return n, nil
	}
	n, err := c.TCPConn.Read(p)
	if n == 0 {
		return n, err
	}
	allowed := c.lines.add(p[:n])
	if c.hear() && allowed < n {
		c.held = bytes.Clone(p[allowed:n])
		return allowed, nil
	}
	return n, err
}

// headerLines counts the lines since the last empty one.
type headerLines struct {
	n    int
	text bool // the line that has not ended yet is not empty
}

// maxHeaderLines bounds the memory of a request, for net/http spends some 200 bytes on each header
// line, however short it is. Apache, Envoy and Kestrel have the same limit.
const maxHeaderLines = 100

// tooMany reports whether there are more than maxHeaderLines behind the request line.
func (h *headerLines) tooMany() bool { return h.n > 1+maxHeaderLines }

// begun reports whether anything has come since the last empty line.
func (h *headerLines) begun() bool { return h.n > 0 || h.text }

// add counts the lines of p. It stops behind the first one too many and returns that place.
func (h *headerLines) add(p []byte) int {
	rest := p
	for {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		h.text = h.text || len(bytes.Trim(line, "\r")) > 0
		if !ended {
			return len(p)
		}
		rest = after
		h.n++
		if !h.text {
			h.n = 0
		}
		h.text = false
		if h.tooMany() {
			return len(p) - len(rest)
		}
	}
}
