package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/cors"
)

const (
	healthyBody = `{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n"
	// Load balancers look for a substring: no "healthy" here, not even in "unhealthy".
	drainingBody = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
)

// routes holds each route once, with its method. The next one goes here. For pages of other origins
// its method has to be in allowOrigins too.
func routes(draining func() bool) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /health", health(draining)) // HEAD too
	return mux
}

// newHandler passes every request through the rules that hold for all routes, the last of these
// lines first. While mustClose reports true, an answer is the last one on its connection.
func newHandler(routes http.Handler, origins []string, mustClose func() bool) http.Handler {
	h := refuseUnclean(routes)
	h = allowOrigins(origins, h)
	h = limitUnreadBody(h)
	h = closeWhile(mustClose, h)
	return neverStore(h)
}

// health says 200, or 503 while draining reports true.
func health(draining func() bool) http.Handler {
	healthy := jsonAnswer(http.StatusOK, healthyBody)
	leaving := jsonAnswer(http.StatusServiceUnavailable, drainingBody)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if draining() {
			leaving(w, r)
			return
		}
		healthy(w, r)
	})
}

// jsonAnswer returns a handler that always says the same. Its header is made once, so that no
// request pays for it.
func jsonAnswer(code int, body string) http.HandlerFunc {
	header := http.Header{
		"Content-Type":   {"application/json"},
		"Content-Length": {strconv.Itoa(len(body))}, // of HEAD too: RFC 9110, section 9.3.2
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(code)
		io.WriteString(w, body) // net/http keeps it from HEAD; an error: the client has gone
	}
}

// refuseUnclean says 404 where ServeMux would redirect to the path without its double slashes
// and dots: many a check takes a 3xx for good, draining or not.
func refuseUnclean(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		escaped := r.URL.EscapedPath()
		clean := path.Clean(escaped)
		if escaped == clean || escaped == clean+"/" && clean != "/" {
			next.ServeHTTP(w, r)
			return
		}
		http.NotFound(w, r)
	})
}

// allowOrigins lets the pages of origins read the answers. Nobody logs in here, so credentials
// are never allowed. Methods that are not allowed get no CORS headers from rs/cors, so a page does
// not see its 405. Private Network Access has no header here, for Chrome gave it up.
func allowOrigins(origins []string, next http.Handler) http.Handler {
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodGet, http.MethodHead},
		AllowedHeaders: []string{"*"},
		MaxAge:         600, // seconds: spares a page preflights, and shows it a new list soon
	}).Handler(next)
}

// limitUnreadBody gives a body that its handler has left unread a short time to arrive, because
// net/http reads what is left of it before it answers. A handler limits the size of its body itself,
// with http.MaxBytesReader.
func limitUnreadBody(next http.Handler) http.Handler {
	const unreadTimeout = 100 * time.Millisecond // enough for what is on its way
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		if r.ContentLength != 0 {
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(unreadTimeout))
		}
	})
}

// closeWhile asks each client to leave with its answer while mustClose reports true, because nobody
// else can move a connection that its client keeps. It asks so after a request in chunks too: RFC
// 9112, section 6.1, wants that if the request also has a length, which net/http has removed.
func closeWhile(mustClose func() bool, next http.Handler) http.Handler {
	header := []string{"close"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if mustClose() || len(r.TransferEncoding) > 0 {
			w.Header()["Connection"] = header
		}
		next.ServeHTTP(w, r)
	})
}

// neverStore keeps answers out of caches: an old one is no check, and the next version may have
// the path that this one has not.
func neverStore(next http.Handler) http.Handler {
	header := []string{"no-store"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Cache-Control"] = header
		next.ServeHTTP(w, r)
	})
}

// parseOrigins returns the entries of a comma-separated allow list.
func parseOrigins(list string) ([]string, error) {
	if strings.TrimSpace(list) == "*" {
		return []string{"*"}, nil
	}
	origins := strings.Split(list, ",")
	for i, entry := range origins {
		origins[i] = strings.TrimSpace(entry)
		if err := checkOrigin(origins[i]); err != nil {
			return nil, fmt.Errorf("origin %q: %w", origins[i], err)
		}
	}
	return origins, nil
}

// checkOrigin refuses what no browser sends as an Origin (RFC 6454, with hosts and ports as
// the WHATWG URL Standard writes them) and what would match too much.
func checkOrigin(origin string) error {
	if strings.ContainsAny(origin, " ;") {
		return errors.New("want commas between origins, and neither spaces nor ; in one")
	}
	origin = strings.ToLower(origin) // as the matching does
	u, err := url.Parse(origin)
	noPages := []string{"", "file", "ftp", "ws", "wss"} // their origins are null or none
	if err != nil || u.Hostname() == "" || slices.Contains(noPages, u.Scheme) {
		return errors.New("want the scheme://host[:port] of a page, with a number for the port, or * alone for all")
	}
	host, err := originHost(u.Hostname())
	if err != nil {
		return err
	}
	port, err := originPort(u.Scheme, u.Port())
	if err != nil {
		return err
	}
	if sent := u.Scheme + "://" + host + port; origin != sent {
		return fmt.Errorf("want %s, as browsers send it", sent)
	}
	return nil
}

// originHost returns host as it stands in an origin: an IPv6 address is shortened and stands
// in brackets.
func originHost(host string) (string, error) {
	ip, err := netip.ParseAddr(host)
	switch {
	case err == nil && ip.Is4():
		return host, nil
	case err == nil && ip.Zone() == "" && !ip.Is4In6():
		return "[" + ip.String() + "]", nil
	case isDomain(strings.TrimPrefix(host, "*.")):
		return host, nil
	}
	return "", errors.New("want a host of ASCII letters, digits, - and _ (others as punycode, xn--...) or a plain IP address, and * only as the whole first label")
}

// originPort returns port as it stands in an origin, behind a colon: the default of the
// scheme is left out, and so are leading zeros.
func originPort(scheme, port string) (string, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case port == "", scheme == "http" && n == 80, scheme == "https" && n == 443:
		return "", nil
	case err != nil, n == 0:
		return "", errors.New("want a port number from 1 to 65535, or none for the scheme's own")
	}
	return fmt.Sprintf(":%d", n), nil
}

// isDomain reports whether browsers keep the lower-case name as it is: they turn other letters
// into punycode, and a name whose last label is a number into an IPv4 address.
func isDomain(name string) bool {
	labels := strings.Split(strings.TrimSuffix(name, "."), ".")
	for _, label := range labels {
		if label == "" || strings.Trim(label, "-_0123456789abcdefghijklmnopqrstuvwxyz") != "" {
			return false
		}
	}
	last := labels[len(labels)-1]
	isNumber := strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x")
	return !isNumber
}
