package ci

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const request = "GET /health HTTP/1.1\r\nHost: a.example\r\n"

// TestSignalUnderLoad ends the program 50 times while 16 clients, half of them with
// kept connections, ask as fast as they can. Like a balancer, a client leaves with
// its first 503.
func TestSignalUnderLoad(t *testing.T) {
	serviceRace := filepath.Join(t.TempDir(), "service-race")
	build(t, serviceRace, "..", "-race")
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
				for client := range 16 {
					clients.Go(func() {
						if err := ask(in.addr, client%2 == 0, &answered); err != nil {
							lost.Add(1)
							t.Error(err)
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

// ask sends requests, on one connection or on one each, until an answer is 503 or
// the listener has closed. It returns the error of a request without an answer.
func ask(addr string, keep bool, answered *atomic.Int64) error {
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return nil
		}
		code, err := 200, error(nil)
		for answers := bufio.NewReader(conn); err == nil && code == 200; {
			if code, err = exchange(conn, answers); err == nil {
				answered.Add(1)
			}
			if !keep {
				break
			}
		}
		conn.Close()
		if err != nil || code != 200 {
			return err
		}
	}
}

func exchange(conn net.Conn, answers *bufio.Reader) (code int, err error) {
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
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
		{"body that never comes", request + "Content-Length: 10\r\n\r\n", "", 10 * time.Second},
		{"body that drips", request + "Content-Length: 100000\r\n\r\n", "x", 10 * time.Second},
		{"chunks that never end", request + "Transfer-Encoding: chunked\r\n\r\n", "1\r\nx\r\n", 10 * time.Second},
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
					time.Sleep(200 * time.Millisecond)
					if _, err := io.WriteString(conn, tt.drip); err != nil {
						return
					}
				}
			}()
			answer, err := io.ReadAll(conn)
			took := time.Since(began)
			if e, ok := err.(net.Error); ok && e.Timeout() || took < tt.limit-time.Second || took > tt.limit+2*time.Second {
				t.Errorf("got closed after %v (%v), want %v", took, err, tt.limit)
			}
			if strings.HasPrefix(string(answer), "HTTP/1.1 5") {
				t.Errorf("got %q, want no 5xx", answer)
			}
			t.Logf("closed after %.1f s", took.Seconds())
		})
	}
}

// TestSlowClients opens 2,000 connections that drip their headers.
func TestSlowClients(t *testing.T) {
	in := start(t, service, "0")
	const clients = 2000
	var slow sync.WaitGroup
	var longest atomic.Int64
	for range clients {
		slow.Go(func() {
			conn, err := net.Dial("tcp", in.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			began := time.Now()
			conn.SetDeadline(began.Add(patience))
			io.WriteString(conn, request)
			go func() {
				for err == nil {
					time.Sleep(time.Second)
					_, err = io.WriteString(conn, "X: y\r\n")
				}
			}()
			if answer, err := io.ReadAll(conn); len(answer) > 0 {
				t.Errorf("slow client: got %q and %v, want a closed connection", answer, err)
			}
			took := int64(time.Since(began))
			for seen := longest.Load(); took > seen && !longest.CompareAndSwap(seen, took); seen = longest.Load() {
			}
		})
	}
	var times []time.Duration
	gone := make(chan bool)
	go func() { slow.Wait(); close(gone) }()
	for waiting := true; waiting; {
		began := time.Now()
		if code, body := get("http://" + in.addr + "/health"); code != 200 {
			t.Errorf("other client: got %d %s, want 200", code, body)
		}
		times = append(times, time.Since(began))
		select {
		case <-gone:
			waiting = false
		case <-time.After(5 * time.Millisecond):
		}
	}
	slices.Sort(times)
	t.Logf("%d slow clients: cut off after %.1f s at most; %d others answered meanwhile, median %v, slowest %v",
		clients, time.Duration(longest.Load()).Seconds(), len(times), times[len(times)/2], times[len(times)-1])
	if longest := time.Duration(longest.Load()); longest > 10*time.Second {
		t.Errorf("slow clients: got cut off after %v, want 5s and the time to open 2,000 connections", longest)
	}
	if slowest := times[len(times)-1]; slowest > 2*time.Second {
		t.Errorf("other clients: got %v for the slowest answer, want it within a probe's 2 s", slowest)
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
