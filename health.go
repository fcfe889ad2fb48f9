package main

import (
	"encoding/json"
	"maps"
	"net/http"
	"strconv"
	"sync/atomic"

	"github.com/rs/cors"
)

// newAnswer returns a handler that sends status and message, encoded once so that no
// request pays for it, with the fields of header and those that every answer has.
func newAnswer(code int, status, message string, header http.Header) http.HandlerFunc {
	body, _ := json.Marshal(struct { // two strings always encode
		Status  string `json:"status"`
		Message string `json:"message"`
	}{status, message})
	body = append(body, '\n')
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(body))) // of HEAD too: RFC 9110, section 9.3.2
	header.Set("Cache-Control", "no-store")               // an old answer is no check
	return func(w http.ResponseWriter, _ *http.Request) {
		maps.Copy(w.Header(), header)
		w.WriteHeader(code)
		w.Write(body) // net/http keeps it from HEAD; an error means that the client has gone
	}
}

// newHandler answers probes, with 503 once draining is true, and lets the pages of
// origins read every answer. Nobody logs in here: credentials are never allowed.
func newHandler(draining *atomic.Bool, origins []string) http.Handler {
	healthy := newAnswer(http.StatusOK, "healthy", "WhatsApp Contact Processor API is running", http.Header{})
	// Load balancers look for a substring: no "healthy" here, not even in "unhealthy".
	leaving := newAnswer(http.StatusServiceUnavailable,
		"draining", "WhatsApp Contact Processor API is shutting down", http.Header{"Connection": {"close"}}) // the next request belongs elsewhere
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) { // HEAD too
		if draining.Load() {
			leaving(w, r)
			return
		}
		healthy(w, r)
	})
	handler := cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodGet, http.MethodHead},
		AllowedHeaders: []string{"*"},
		MaxAge:         600, // seconds: spares a polling page its preflights, yet a new allow list is seen soon
	}).Handler(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 { // never waited for; chunked with a length must close: RFC 9112, section 6.1
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	})
}
