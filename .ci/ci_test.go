// Package ci runs what the README tells operators to copy, and the attacks that
// take too long for the project's own tests.
package ci

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience limits each wait for something that should happen within seconds.
const patience = 30 * time.Second

// service is the path of the program, as make build builds it.
var service string

func TestMain(m *testing.M) {
	if name := os.Getenv("CI_BE_CROWD"); name != "" {
		beCrowd(name, os.Getenv("CI_ADDR"))
		return
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "ci")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		service = filepath.Join(dir, "whatsapp-contact-processor")
		cmd := exec.Command("make", "-C", "..", "build", "BINARY="+service)
		if out, err := cmd.CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%v: %s", err, out))
		}
		for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
			if signal.Ignored(s) { // as under nohup; a signal that is caught is not ignored by children
				signal.Notify(make(chan os.Signal, 1), s)
			}
		}
		return m.Run()
	}())
}

// build builds the package in dir.
func build(t testing.TB, binary, dir string, flags ...string) {
	t.Helper()
	output(t, "go", append(append([]string{"build", "-C", dir, "-o", binary, "-trimpath", "-ldflags=-s -w"}, flags...), ".")...)
}

// block returns the README's block with this language and name on its fence.
func block(t *testing.T, fence string) string {
	t.Helper()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "\n```"+fence+"\n")
	text, _, ended := strings.Cut(rest, "\n```\n")
	if !found || !ended {
		t.Fatalf("the README has no block %q", fence)
	}
	return text + "\n"
}

// replace replaces what the README says by what this run uses.
func replace(t *testing.T, text string, oldnew ...string) string {
	t.Helper()
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			t.Fatalf("the block has no %q:\n%s", oldnew[i], text)
		}
	}
	return strings.NewReplacer(oldnew...).Replace(text)
}

func write(t *testing.T, name, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// output runs a command and returns its output. It fails the test if the command fails.
func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// background starts a program in a process group of its own, and kills the group at the end of the
// test. It shows the output if the test fails.
func background(t *testing.T, name string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			t.Logf("%s said:\n%s", name, out[max(0, len(out)-4000):])
		}
		log.Close()
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// until waits until ok returns true. If that takes too long, it fails the test and says what it
// waited for.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	within(t, patience, what, ok)
}

func within(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", limit, what)
		}
	}
}

// get returns the status code and the body of an answer, or 0 and the error.
func get(url string) (code int, body string) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(b)
}

// instance is one running service.
type instance struct {
	*exec.Cmd
	addr string        // 127.0.0.1:port
	done chan struct{} // closed when the process has ended

	mu  sync.Mutex
	log strings.Builder
}

func (in *instance) logged() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.log.String()
}

// start runs binary on a port of loopback, 0 for a free one, until it listens.
func start(t testing.TB, binary, port string, env ...string) *instance {
	t.Helper()
	return startCmd(t, exec.Command(binary), port, env...)
}

func startCmd(t testing.TB, cmd *exec.Cmd, port string, env ...string) *instance {
	t.Helper()
	cmd.Env = append([]string{"HOST=127.0.0.1", "PORT=" + port}, env...)
	in := &instance{Cmd: cmd, done: make(chan struct{})}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-in.done
	})
	listening := make(chan string, 1)
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			in.mu.Lock()
			fmt.Fprintln(&in.log, lines.Text())
			in.mu.Unlock()
			if _, rest, ok := strings.Cut(lines.Text(), "msg=listening addr="); ok {
				addr, _, _ := strings.Cut(rest, " ")
				listening <- addr
			}
		}
		cmd.Wait()
		close(in.done)
	}()
	select {
	case in.addr = <-listening:
	case <-in.done:
		t.Fatalf("the service does not start: %s", in.logged())
	case <-time.After(patience):
		t.Fatal("the service does not listen")
	}
	return in
}

// stop sends a signal and returns the exit code.
func (in *instance) stop(t *testing.T, s os.Signal) int {
	t.Helper()
	in.Process.Signal(s)
	select {
	case <-in.done:
	case <-time.After(patience):
		t.Fatalf("still running after %v", s)
	}
	return in.ProcessState.ExitCode()
}
