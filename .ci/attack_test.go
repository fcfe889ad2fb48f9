package ci

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const request = "GET /health HTTP/1.1\r\nHost: a.example\r\n"

// TestSignalUnderLoad ends the program 50 times while 24 clients ask as fast as they can.
// A client leaves when it is told to: one that asks for /health, like a balancer, with
// its first 503, one that keeps its connection with the first Connection: close.
func TestSignalUnderLoad(t *testing.T) {
	serviceRace := filepath.Join(t.TempDir(), "service-race")
	build(t, serviceRace, "..", "-race")
	kinds := []struct {
		path string
		keep bool
	}{{"/health", false}, {"/health", true}, {"/", true}}
	for _, tt := range []struct{ name, binary, delay string }{
		{"no drain delay", service, "0s"},
		{"drain delay", service, "100ms"},
		{"no drain delay, race detector", serviceRace, "0s"},
		{"drain delay, race detector", serviceRace, "100ms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var answered, lost atomic.Int64
			for range 50 {
				in := start(t, tt.binary, "0", "DRAIN_DELAY="+tt.delay, "GORACE=atexit_sleep_ms=0")
				enough := answered.Load() + 500
				var clients sync.WaitGroup
				for client := range 24 {
					kind := kinds[client%len(kinds)]
					clients.Go(func() {
						if err := ask(in.addr, kind.path, kind.keep, &answered); err != nil {
							lost.Add(1)
							t.Errorf("%s, connection kept %t: %v", kind.path, kind.keep, err)
						}
					})
				}
				until(t, "load", func() bool { return answered.Load() >= enough })
				if code := in.stop(t, syscall.SIGTERM); code != 0 {
					t.Errorf("got exit code %d, want 0: %s", code, in.logged())
				}
				clients.Wait()
			}
			t.Logf("50 signals: %d requests answered, %d lost", answered.Load(), lost.Load())
		})
	}
}

// ask sends requests, on one connection or on one each, until it is told to leave or the
// listener has closed. It returns the error of a request without an answer.
func ask(addr, path string, keep bool, answered *atomic.Int64) error {
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return nil
		}
		leave := false
		for answers := bufio.NewReader(conn); err == nil && !leave; {
			if _, leave, err = exchange(conn, answers, path); err == nil {
				answered.Add(1)
			}
			if !keep {
				break
			}
		}
		conn.Close()
		if err != nil || leave {
			return err
		}
	}
}

// exchange asks for path once and returns the code of the answer and whether it tells
// the client to leave.
func exchange(conn net.Conn, answers *bufio.Reader, path string) (code int, leave bool, err error) {
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: a.example\r\n\r\n", path); err != nil {
		return 0, true, err
	}
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		return 0, true, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Close, err
}

// TestLimits holds the server to the limits on its clients' time.
func TestLimits(t *testing.T) {
	in := start(t, service, "0")
	for _, tt := range []struct {
		name, send string
		drip       string // sent again and again
		limit      time.Duration
	}{
		{"nothing", "", "", 5 * time.Second},
		{"headers that never end", request, "X: y\r\n", 5 * time.Second},
		{"one byte at a time", "G", "E", 5 * time.Second},
		{"body that never comes", request + "Content-Length: 10\r\n\r\n", "", 100 * time.Millisecond},
		{"body that drips", request + "Content-Length: 100000\r\n\r\n", "x", 100 * time.Millisecond},
		{"chunks that never end", request + "Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 100 * time.Millisecond},
		{"body behind an expectation", request + "Content-Length: 10\r\nExpect: 100-continue\r\n\r\n", "", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", in.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			began := time.Now()
			conn.SetDeadline(began.Add(patience))
			io.WriteString(conn, tt.send)
			go func() {
				for {
					time.Sleep(50 * time.Millisecond)
					if _, err := io.WriteString(conn, tt.drip); err != nil {
						return
					}
				}
			}()
			answer, err := io.ReadAll(conn)
			took := time.Since(began)
			if e, ok := err.(net.Error); ok && e.Timeout() || took < tt.limit || took > tt.limit+2*time.Second {
				t.Errorf("got closed after %v (%v), want %v", took, err, tt.limit)
			}
			if strings.HasPrefix(string(answer), "HTTP/1.1 5") {
				t.Errorf("got %q, want no 5xx", answer)
			}
			t.Logf("closed after %.1f s", took.Seconds())
		})
	}
}

// TestTooManyConnections runs out of file descriptors.
func TestTooManyConnections(t *testing.T) {
	in := startCmd(t, exec.Command("sh", "-c", fmt.Sprintf("ulimit -n 40; exec %s", service)), "0")
	var conns []net.Conn
	for range 100 {
		conn, err := net.Dial("tcp", in.addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	until(t, "the log to tell", func() bool { return strings.Contains(in.logged(), "level=WARN msg=\"http: Accept error: ") })
	for _, conn := range conns {
		conn.Close()
	}
	until(t, "an answer", func() bool { code, _ := get("http://" + in.addr + "/health"); return code == 200 })
	if code := in.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("got exit code %d, want 0: %s", code, in.logged())
	}
	t.Logf("100 connections on 40 descriptors: %d lines logged", strings.Count(in.logged(), "\n"))
}
