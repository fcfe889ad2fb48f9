package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rs/cors"
)

const (
	healthyBody = `{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n"
	// Load balancers look for a substring: no "healthy" here, not even in "unhealthy".
	drainingBody = `{"status":"draining","message":"WhatsApp Contact Processor API is shutting down"}` + "\n"
)

// newRoutes answers /health with code and body, and anything else with 404 or 405.
func newRoutes(code int, body string) http.Handler {
	header := http.Header{ // made once, so that no request pays for it
		"Content-Type":   {"application/json"},
		"Content-Length": {strconv.Itoa(len(body))}, // of HEAD too: RFC 9110, section 9.3.2
		"Cache-Control":  {"no-store"},              // an old answer is no check
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { // HEAD too
		maps.Copy(w.Header(), header)
		w.WriteHeader(code)
		io.WriteString(w, body) // net/http keeps it from HEAD; an error means that the client has gone
	})
	return mux
}

// newHandler answers probes, with 503 once draining is true, and lets the pages of
// origins read every answer. Nobody logs in here: credentials are never allowed.
func newHandler(draining *atomic.Bool, origins []string) http.Handler {
	withCORS := cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodGet, http.MethodHead},
		AllowedHeaders: []string{"*"},
		MaxAge:         600, // seconds: spares a polling page its preflights, yet a new allow list is seen soon
	})
	running := withCORS.Handler(newRoutes(http.StatusOK, healthyBody))
	leaving := withCORS.Handler(newRoutes(http.StatusServiceUnavailable, drainingBody))
	closing := []string{"close"}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 { // chunked with a length must close: RFC 9112, section 6.1
			w.Header()["Connection"] = closing
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
		}
		if draining.Load() {
			w.Header()["Connection"] = closing // no balancer can move a kept connection: its client must
			leaving.ServeHTTP(w, r)
			return
		}
		running.ServeHTTP(w, r)
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

// checkOrigin refuses what no browser sends as an Origin (RFC 6454, with hosts and
// ports as the WHATWG URL Standard writes them) and what would match too much.
func checkOrigin(origin string) error {
	origin = strings.ToLower(origin) // as the matching does
	u, err := url.Parse(origin)
	if err != nil || u.Hostname() == "" || slices.Contains([]string{"", "file", "ftp", "ws", "wss"}, u.Scheme) {
		return errors.New("want the scheme://host[:port] of a page, or * alone for all")
	}
	host, port := u.Hostname(), strings.TrimLeft(u.Port(), "0")
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" && !ip.Is4In6() {
		host = ip.String()
	} else if !isDomain(strings.TrimPrefix(host, "*.")) {
		return errors.New("want a host of ASCII letters, digits, - and _ (others as punycode, xn--...) or a plain IP address, and * only as the whole first label")
	}
	if u.Scheme == "http" && port == "80" || u.Scheme == "https" && port == "443" {
		port = "" // the default is left out
	}
	sent := u.Scheme + "://" + strings.TrimSuffix(net.JoinHostPort(host, port), ":") // no port, no colon
	if origin != sent {
		return fmt.Errorf("want %s, as browsers send it", sent)
	}
	return checkPort(cmp.Or(port, "0"))
}

// isDomain reports whether browsers keep name as it is: they turn other letters into
// punycode, and a name whose last label is a number into an IPv4 address.
func isDomain(name string) bool {
	name = strings.TrimSuffix(name, ".")
	last := name[strings.LastIndexByte(name, '.')+1:]
	isNumber := strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x")
	isForeign := strings.Trim(name, ".-_0123456789abcdefghijklmnopqrstuvwxyz") != ""
	return !isNumber && !isForeign && !strings.Contains("."+name+".", "..") // no label is empty
}
