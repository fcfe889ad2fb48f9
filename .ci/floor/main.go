// Floor is a bare net/http server that sends the same bytes as the service, without routes, CORS and
// limits. With LIMITS set it has time limits.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Fprintf(os.Stderr, "msg=listening addr=%s\n", ln.Addr())
	fmt.Fprintln(os.Stderr, newServer().Serve(ln))
	os.Exit(1)
}

func newServer() *http.Server {
	body := []byte(`{"status":"healthy","message":"WhatsApp Contact Processor API is running"}` + "\n")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		h["Cache-Control"] = []string{"no-store"}
		h["Content-Length"] = []string{"75"}
		h["Content-Type"] = []string{"application/json"}
		h["Vary"] = []string{"Origin"}
		w.Write(body)
	})}
	if os.Getenv("LIMITS") != "" {
		server.ReadTimeout = 5 * time.Second
		server.WriteTimeout = 10 * time.Second
		server.IdleTimeout = 120 * time.Second
	}
	return server
}
