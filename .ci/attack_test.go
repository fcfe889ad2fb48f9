package ci

import (
	"bufio"
	"fmt"
	"io"
	"net"
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

// TestFreeze lets clients come while the program gets no processor, across the end of its drain
// delay: they are answered when it gets some again, before the listener closes.
func TestFreeze(t *testing.T) {
	var answered int
	for range 6 {
		in := start(t, service, "0", "DRAIN_DELAY=1s")
		in.Process.Signal(syscall.SIGTERM)
		until(t, "draining", func() bool { return strings.Contains(in.logged(), "msg=draining") })
		time.Sleep(200 * time.Millisecond)
		in.Process.Signal(syscall.SIGSTOP)
		var clients sync.WaitGroup
		var mu sync.Mutex
		for range 20 {
			conn, err := net.Dial("tcp", in.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			clients.Go(func() {
				code, _, err := exchange(conn, bufio.NewReader(conn), "/health")
				mu.Lock()
				defer mu.Unlock()
				if code == 503 {
					answered++
				} else {
					t.Errorf("got %d and error %v, want a 503", code, err)
				}
			})
		}
		time.Sleep(1400 * time.Millisecond)
		in.Process.Signal(syscall.SIGCONT)
		clients.Wait()
		select {
		case <-in.done:
		case <-time.After(patience):
			t.Fatal("still running")
		}
		if code := in.ProcessState.ExitCode(); code != 0 {
			t.Errorf("got exit code %d, want 0: %s", code, in.logged())
		}
	}
	t.Logf("6 freezes: %d of 120 clients answered", answered)
}

// TestSandbox refuses a system call that the listener needs once it listens, as a sandbox may.
func TestSandbox(t *testing.T) {
	out, err := exec.Command("strace", "-f", "-o", "/dev/null", "-e", "inject=getsockname:error=EPERM", service).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), "cannot listen") {
		t.Errorf("got %v and %q, want exit code 1 and one line", err, out)
	}
}

// TestLimits holds the server to the limits on its clients' time. Those of 620 s are read from
// its deadlines by the project's own tests.
func TestLimits(t *testing.T) {
	in := start(t, service, "0")
	for _, tt := range []struct {
		name, send string
		drip       string // sent again and again
		deaf       bool   // reads nothing
		limit      time.Duration
	}{
		{name: "nothing", limit: 5 * time.Second},
		{name: "headers that never end", send: request, drip: "X: y\r\n", limit: 5 * time.Second},
		{name: "one byte at a time", send: "G", drip: "E", limit: 5 * time.Second},
		{name: "body that never comes", send: request + "Content-Length: 10\r\n\r\n", limit: 100 * time.Millisecond},
		{name: "body that drips", send: request + "Content-Length: 100000\r\n\r\n", drip: "x", limit: 100 * time.Millisecond},
		{name: "chunks that never end", send: request + "Transfer-Encoding: chunked\r\n\r\n", drip: "1\r\nx\r\n", limit: 100 * time.Millisecond},
		{name: "a byte behind an answer", send: request + "\r\nG", limit: 5 * time.Second},
		{name: "body behind an expectation", send: request + "Content-Length: 10\r\nExpect: 100-continue\r\n\r\n"},
		{name: "answers that nobody reads", send: strings.Repeat(request+"\r\n", 200_000), deaf: true, limit: 10 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", in.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.(*net.TCPConn).SetReadBuffer(16 << 10) // bytes, so that answers do not find much room
			began := time.Now()
			conn.SetDeadline(began.Add(patience))
			if tt.deaf {
				_, err = io.WriteString(conn, tt.send) // fails when the connection is closed
			} else {
				io.WriteString(conn, tt.send)
				go func() {
					for {
						time.Sleep(50 * time.Millisecond)
						if _, err := io.WriteString(conn, tt.drip); err != nil {
							return
						}
					}
				}()
				var answer []byte
				answer, err = io.ReadAll(conn)
				if strings.HasPrefix(string(answer), "HTTP/1.1 5") {
					t.Errorf("got %q, want no 5xx", answer)
				}
			}
			took, late := time.Since(began), 2*time.Second
			if tt.deaf {
				late = 8 * time.Second // the kernel's buffers fill up first, more and more slowly
			}
			if e, ok := err.(net.Error); ok && e.Timeout() || tt.deaf && err == nil || took < tt.limit*98/100 || took > tt.limit+late {
				t.Errorf("got closed after %v (%v), want %v", took, err, tt.limit)
			}
			t.Logf("closed after %.1f s", took.Seconds())
		})
	}
}

// TestDescriptors runs out of file descriptors before the limit of connections is reached.
func TestDescriptors(t *testing.T) {
	in := startCmd(t, exec.Command("sh", "-c", fmt.Sprintf("ulimit -n 64; exec %s", service)), "0")
	for range 100 {
		conn, err := net.Dial("tcp", in.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := fmt.Fprint(conn, request+"\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	var slowest time.Duration
	for range 20 {
		began := time.Now()
		if code, body := get("http://" + in.addr + "/health"); code != 200 {
			t.Errorf("got %d %s beside 100 idle connections, want 200", code, body)
		}
		slowest = max(slowest, time.Since(began))
	}
	if slowest > 2*time.Second {
		t.Errorf("the slowest answer took %v, want that an idle connection gives way at once", slowest)
	}
	if log := in.logged(); strings.Count(log, "\n") != 2 || !strings.Contains(log, "raise ulimit -n (LimitNOFILE)") {
		t.Errorf("got log %s, want one line besides the first, that says what to raise", log)
	}
	if code := in.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("got exit code %d, want 0: %s", code, in.logged())
	}
	t.Logf("100 idle connections on 64 descriptors: slowest answer %v", slowest)
}
