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
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for something that should happen within seconds.
const patience = 30 * time.Second

// service is the program as it is released, built by TestMain.
var service string

func TestMain(m *testing.M) {
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

// replace puts what this run uses in the place of what the README says.
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

// output runs a command to its end and fails the test if that is not good.
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

// background starts a program, with its children in a group of their own, and ends
// all of them with the test. Its output is shown if the test fails.
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

// until waits for ok and says what it waited for if that does not come.
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

// get returns the status code and body of one answer, 0 and the error for none.
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

// pair is two instances behind a balancer. Only a allows the origin of the load,
// which so sees who answered.
type pair struct {
	url   string // of the balancer
	ports [2]string
	env   []string
	in    [2]*instance

	mu         sync.Mutex
	sent, lost map[string]int // by path
	problems   []string       // of the first ordinary requests lost
	last       [2]time.Time   // when the last answered ordinary request to each was sent
}

const origin = "https://a.example"

func newPair(t *testing.T, url string, env ...string) *pair {
	t.Helper()
	return &pair{url: url, ports: [2]string{freePort(t), freePort(t)}, env: env, sent: map[string]int{}, lost: map[string]int{}}
}

func (p *pair) start(t *testing.T, i int) {
	t.Helper()
	origins := [2]string{origin, "https://b.example"}
	p.in[i] = start(t, service, p.ports[i], append(p.env, "ALLOWED_ORIGINS="+origins[i])...)
}

// load sends GET path through the balancer, 100 a second at most, until ctx ends.
func (p *pair) load(ctx context.Context, path string, want int) {
	client := http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}
	defer client.CloseIdleConnections()
	for tick := time.NewTicker(10 * time.Millisecond); ctx.Err() == nil; <-tick.C {
		req, err := http.NewRequest("GET", p.url+path, nil)
		if err != nil {
			panic(err)
		}
		req.Header.Set("Origin", origin)
		began := time.Now()
		problem := ""
		who := 1
		if resp, err := client.Do(req); err != nil {
			problem = err.Error()
		} else {
			_, err := io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode != want || err != nil {
				problem = fmt.Sprint(resp.Status, ", error ", err)
			}
			if resp.Header.Get("Access-Control-Allow-Origin") != "" {
				who = 0
			}
		}
		p.mu.Lock()
		p.sent[path]++
		if problem != "" {
			p.lost[path]++
			if path != "/health" && len(p.problems) < 5 {
				p.problems = append(p.problems, problem)
			}
		} else if path != "/health" {
			p.last[who] = began
		}
		p.mu.Unlock()
	}
}

// serves waits until the balancer sends ordinary requests to instance i.
func (p *pair) serves(t *testing.T, i int) {
	t.Helper()
	since := time.Now()
	until(t, fmt.Sprintf("traffic to instance %d", i), func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.last[i].After(since)
	})
}

// roll restarts both instances, one after the other, under load. Ordinary requests are
// those that are not checks: the service answers them 404, and a balancer that loses one
// says something else.
func (p *pair) roll(t *testing.T, rounds int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	until(t, "the balancer", func() bool { code, _ := get(p.url + "/health"); return code == 200 })
	for range 4 {
		workers.Go(func() { p.load(ctx, "/contacts", 404) })
	}
	workers.Go(func() { p.load(ctx, "/health", 200) })
	p.serves(t, 0)
	p.serves(t, 1)

	var moved time.Duration
	for range rounds {
		for i := range p.in {
			signalled := time.Now()
			if code := p.in[i].stop(t, syscall.SIGTERM); code != 0 {
				t.Errorf("got exit code %d, want 0: %s", code, p.in[i].logged())
			}
			p.mu.Lock()
			moved = max(moved, p.last[i].Sub(signalled))
			p.mu.Unlock()
			p.start(t, i)
			p.serves(t, i)
		}
	}
	p.mu.Lock()
	t.Logf("%d rounds: ordinary requests sent %d, lost %d; GET /health sent %d, lost %d; %.1f s at most from SIGTERM to the last request to the leaving instance; %q",
		rounds, p.sent["/contacts"], p.lost["/contacts"], p.sent["/health"], p.lost["/health"], moved.Seconds(), p.problems)
	p.mu.Unlock()
}

// lostSoFar returns how many ordinary requests were lost.
func (p *pair) lostSoFar() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost["/contacts"]
}

// kill ends instance a without warning: it leaves the pool and comes back. In
// between another listener at its address counts the ordinary requests that the
// balancer still tries there: none, or with passive checks one now and then.
func (p *pair) kill(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	for range 4 {
		workers.Go(func() { p.load(ctx, "/contacts", 404) })
	}
	p.serves(t, 0)
	before := p.lostSoFar()
	p.in[0].stop(t, syscall.SIGKILL)
	time.Sleep(3 * time.Second) // two failed checks, a second apart, and then some
	after := p.lostSoFar()
	tried := p.tried(t, 2*time.Second)
	if lost := p.lostSoFar() - after; lost > 0 || tried > 5 {
		t.Errorf("killed: after 3 s got %d requests lost and %d tried on the instance in 2 s, want none lost and the instance out of the pool", lost, tried)
	}
	p.start(t, 0)
	p.serves(t, 0)
	t.Logf("SIGKILL: lost %d ordinary requests; the instance left the pool (%d tried there in 2 s) and came back", after-before, tried)
}

// tried takes the place of instance a for a while, answers nobody, and returns how
// many ordinary requests came.
func (p *pair) tried(t *testing.T, d time.Duration) (n int) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:"+p.ports[0])
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ln.(*net.TCPListener).SetDeadline(time.Now().Add(d))
	for {
		conn, err := ln.Accept()
		if err != nil {
			return n
		}
		conn.SetDeadline(time.Now().Add(time.Second))
		if line, _ := bufio.NewReader(conn).ReadString('\n'); strings.Contains(line, "/contacts") {
			n++
		}
		conn.Close()
	}
}

func (p *pair) wantNoneLost(t *testing.T) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost["/contacts"] > 0 {
		t.Errorf("got %d ordinary requests lost, want 0: %q", p.lost["/contacts"], p.problems)
	}
}
