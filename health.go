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
	// Load balancers search for a word, so this has no "healthy", and no "unhealthy" either.
	drainingBody = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
)

// routes registers each route, with its method. Add the next one here. For pages of other origins,
// add its method to allowOrigins too.
func routes(draining func() bool) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /health", health(draining)) // HEAD too
	return mux
}

// newHandler passes each request through the rules for all routes, from the last of these lines to
// the first. While mustClose reports true, each answer is the last one on its connection.
func newHandler(routes http.Handler, origins []string, mustClose func() bool) http.Handler {
	h := refuseUnclean(routes)
	h = allowOrigins(origins, h)
	h = limitUnreadBody(h)
	h = closeWhile(mustClose, h)
	return neverStore(h)
}

// health answers 200, or 503 while draining reports true.
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

// jsonAnswer returns a handler that always gives the same answer. It builds the header only once.
func jsonAnswer(code int, body string) http.HandlerFunc {
	header := http.Header{
		"Content-Type":   {"application/json"},
		"Content-Length": {strconv.Itoa(len(body))}, // for HEAD too: RFC 9110, section 9.3.2
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(code)
		io.WriteString(w, body) // net/http drops it for HEAD; it fails if the client has gone
	}
}

// refuseUnclean answers 404 where ServeMux would redirect to a path without double slashes and
// dots, because many checks take a 3xx for healthy, even in a drain.
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

// allowOrigins lets pages of the origins read the answers. It never allows credentials, because
// there is no login. For other methods rs/cors sends no CORS headers, so a page cannot see its 405.
func allowOrigins(origins []string, next http.Handler) http.Handler {
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodGet, http.MethodHead},
		AllowedHeaders: []string{"*"},
		MaxAge:         600, // seconds: few preflights, and a new list is soon seen
	}).Handler(next)
}

// limitUnreadBody gives a body that its handler has left unread a short time to arrive, because
// net/http reads what is left of it before it answers. It hides the type of the body: after a large
// one net/http would sleep for 0.5 s. A handler limits its body itself, with http.MaxBytesReader.
func limitUnreadBody(next http.Handler) http.Handler {
	const unreadTimeout = 100 * time.Millisecond // enough for what is on its way
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Expect") == "" { // or net/http would not see that the body waits for a 100
			r.Body = struct{ io.ReadCloser }{r.Body}
		}
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

// neverStore keeps answers out of caches, because an old answer says nothing about now.
func neverStore(next http.Handler) http.Handler {
	header := []string{"no-store"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Cache-Control"] = header
		next.ServeHTTP(w, r)
	})
}

// parseOrigins returns the entries of a comma-separated list, or * alone.
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

// checkOrigin refuses what no browser sends as an Origin (RFC 6454, with hosts and ports as in the
// WHATWG URL Standard) and what would match too much. It takes other schemes than http and https as
// they stand, because the origins of apps have hosts such as "." or none.
func checkOrigin(origin string) error {
	if strings.ContainsAny(origin, " ;") {
		return errors.New("want commas between origins, and no blank or ; in one")
	}
	origin = strings.ToLower(origin) // as the matching does
	u, err := url.Parse(origin)
	noPages := []string{"", "ftp", "ws", "wss"} // no page has an origin with one of these
	if err != nil || !strings.Contains(origin, "://") || slices.Contains(noPages, u.Scheme) {
		return errors.New("want the scheme://host[:port] of a page, with a number for the port, or * alone for all")
	}
	host, port := u.Host, ""
	if u.Scheme == "http" || u.Scheme == "https" {
		host, port, err = webHost(u)
	} else if strings.Contains(host, "*") {
		err = errors.New("want * only with http and https")
	}
	if err != nil {
		return err
	}
	if sent := u.Scheme + "://" + host + port; origin != sent {
		return fmt.Errorf("want %s, as browsers send it", sent)
	}
	return nil
}

// webHost returns the host and the port of u as they stand in an origin: an IPv6 address is short
// and in brackets, and a port has its colon but no leading zeros. The default port is left out.
func webHost(u *url.URL) (host, port string, err error) {
	host = u.Hostname()
	ip, err := netip.ParseAddr(host)
	switch {
	case err == nil && ip.Is6() && ip.Zone() == "" && !ip.Is4In6():
		host = "[" + ip.String() + "]"
	case err == nil && ip.Is4(), isDomain(strings.TrimPrefix(host, "*.")):
	default:
		return "", "", errors.New("want a host of ASCII letters, digits, - and _ (others as punycode, xn--...) or a plain IP address, and * only as the whole first label")
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	switch {
	case u.Port() == "", u.Scheme == "http" && n == 80, u.Scheme == "https" && n == 443:
		return host, "", nil
	case err != nil, n == 0:
		return "", "", errors.New("want a port number from 1 to 65535, or none for the scheme's own")
	}
	return host, fmt.Sprintf(":%d", n), nil
}

// isDomain reports whether browsers leave the lower-case name as it is. They turn other letters
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
