package ci

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
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

// TestSignalUnderLoad stops the program 50 times while 24 clients send requests as fast as they can.
// A client leaves once an answer says Connection: close.
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

// ask sends requests on one connection, or on a new one for each, until it is told to leave or the
// listener has closed. It returns the error of a request that got no answer.
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

// TestFreeze connects clients while the program is stopped, until after the end of its drain delay.
// They get their answers once it goes on, before the listener closes.
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

// TestFreezeInDrain stops the program in its drain for longer than its shutdown timeout, and sends the
// rest of some requests meanwhile. All of them get an answer, and the exit code is 0.
func TestFreezeInDrain(t *testing.T) {
	for range 6 {
		in := start(t, service, "0", "SHUTDOWN_TIMEOUT=1s")
		var clients [20]net.Conn
		for i := range clients {
			conn, err := net.Dial("tcp", in.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, request)
			clients[i] = conn
		}
		idle, err := net.Dial("tcp", in.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		answers := bufio.NewReader(idle)
		exchange(idle, answers, "/health") // the requests that came before have been read
		in.Process.Signal(syscall.SIGTERM)
		io.Copy(io.Discard, answers) // ends when the drain closes what is idle
		in.Process.Signal(syscall.SIGSTOP)
		for _, conn := range clients {
			io.WriteString(conn, "\r\n")
		}
		time.Sleep(1200 * time.Millisecond)
		in.Process.Signal(syscall.SIGCONT)
		for _, conn := range clients {
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || resp.StatusCode != 503 {
				t.Fatalf("got %v and error %v, want a 503", resp, err)
			}
		}
		<-in.done
		if code := in.ProcessState.ExitCode(); code != 0 {
			t.Errorf("got exit code %d, want 0: %s", code, in.logged())
		}
	}
}

// TestDrainAtLimit stops the program while a client holds its only place, and 20 others have sent their
// requests. It answers all of them before the listener closes.
func TestDrainAtLimit(t *testing.T) {
	in := start(t, service, "0", "MAX_CONNECTIONS=1")
	for i := range 21 {
		conn, err := net.Dial("tcp", in.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		if i == 0 {
			continue // silent
		}
		io.WriteString(conn, request+"\r\n")
		defer func() {
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
				t.Errorf("got %v and error %v, want an answer", resp, err)
			}
		}()
	}
	if code := in.stop(t, syscall.SIGTERM); code != 0 {
		t.Errorf("got exit code %d, want 0: %s", code, in.logged())
	}
}

// TestSandbox makes getsockname fail, as a sandbox may, after the program has begun to listen.
func TestSandbox(t *testing.T) {
	out, err := exec.Command("strace", "-f", "-o", "/dev/null", "-e", "inject=getsockname:error=EPERM", service).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), "cannot listen") {
		t.Errorf("got %v and %q, want exit code 1 and one line", err, out)
	}
}

// TestStopBeforeListening sends SIGTERM before the program listens. There is nothing to drain yet, so
// the signal ends it.
func TestStopBeforeListening(t *testing.T) {
	cmd := exec.Command("strace", "-f", "-o", "/dev/null", "-e", "inject=bind:delay_enter=2000000", service) // microseconds
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	until(t, "the program", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		fmt.Sscan(string(children), &pid)
		name, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		return name == service
	})
	syscall.Kill(pid, syscall.SIGTERM)
	cmd.Wait() // strace ends as the program does
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGTERM || strings.Contains(stderr.String(), "msg=") {
		t.Errorf("got %v and log %q, want the end by the signal and none", cmd.ProcessState, stderr.String())
	}
}

// TestLogUnread runs the program while nobody reads its standard error. Only lines are lost.
func TestLogUnread(t *testing.T) {
	for name, stderr := range map[string]func(*testing.T) *os.File{"full": fullPipe, "reader gone": brokenPipe} {
		t.Run(name, func(t *testing.T) {
			addr := "127.0.0.1:" + freePort(t)
			cmd := exec.Command(service, "-host", "127.0.0.1", "-port", addr[len("127.0.0.1:"):], "-max-connections", "1", "-drain-delay", "100ms")
			cmd.Stderr = stderr(t)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer time.AfterFunc(patience, func() { cmd.Process.Kill() }).Stop()
			until(t, "an answer", func() bool { code, _ := get("http://" + addr + "/health"); return code == 200 })
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, request)
			if code, body := get("http://" + addr + "/health"); code != 200 { // at the limit, which is worth a line
				t.Errorf("got %d %s, want 200", code, body)
			}
			cmd.Process.Signal(syscall.SIGTERM)
			if err := cmd.Wait(); err != nil {
				t.Errorf("got %v, want exit code 0", err)
			}
		})
	}
}

// brokenPipe returns the writing end of a pipe whose reader has gone.
func brokenPipe(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	return w
}

// fullPipe returns the writing end of a pipe that is full and that nobody empties.
func fullPipe(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	for err == nil {
		w.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, err = w.Write(make([]byte, 4096)) // bytes that the kernel takes whole or not at all
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return w
}

// TestLimits measures the time limits of clients. The one of 620 s is tested in fake time, in
// health_test.go.
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
		{name: "body after an expectation", send: request + "Content-Length: 10\r\nExpect: 100-continue\r\n\r\n"},
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
	for _, tt := range []struct {
		name, send string
		clients    int
	}{{"idle", request + "\r\n", 100}, {"silent", "", 400}} {
		t.Run(tt.name, func(t *testing.T) {
			in := startCmd(t, exec.Command("sh", "-c", fmt.Sprintf("ulimit -n 60; exec %s", service)), "0")
			for range tt.clients {
				conn, err := net.Dial("tcp", in.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := fmt.Fprint(conn, tt.send); err != nil {
					t.Fatal(err)
				}
			}
			var times []time.Duration
			for range 20 {
				began := time.Now()
				if code, body := get("http://" + in.addr + "/health"); code != 200 {
					t.Errorf("got %d %s, want 200", code, body)
				}
				times = append(times, time.Since(began))
			}
			// Each client that came before has 0.2 s, and some 50 are served at once.
			if slowest := slices.Max(times); slowest > 3*time.Second {
				t.Errorf("the slowest answer took %v, want the longest waiting closed at once", slowest)
			}
			if log := in.logged(); strings.Count(log, "\n") != 2 || !strings.Contains(log, "raise ulimit -n (LimitNOFILE)") {
				t.Errorf("got log %s, want one line besides the first, that says what to raise", log)
			}
			if code := in.stop(t, syscall.SIGTERM); code != 0 {
				t.Errorf("got exit code %d, want 0: %s", code, in.logged())
			}
			t.Logf("%d clients on 60 descriptors: first answer after %v, slowest %v", tt.clients, times[0], slices.Max(times))
		})
	}
}
