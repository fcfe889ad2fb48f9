package ci

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// pair is two instances behind a balancer. Only instance a allows the origin of the load, so that the
// answer shows which one it came from.
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

// roll restarts both instances, one after the other, under load. An ordinary request, which is not a
// check, gets 404 from the service. Any other answer means that the balancer lost it.
func (p *pair) roll(t *testing.T, rounds int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	until(t, "the balancer", func() bool { code, _ := get(p.url + "/health"); return code == 200 })
	for range 4 {
		workers.Go(func() { p.load(ctx, "/no-such-path", 404) })
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
		rounds, p.sent["/no-such-path"], p.lost["/no-such-path"], p.sent["/health"], p.lost["/health"], moved.Seconds(), p.problems)
	p.mu.Unlock()
}

// lostSoFar returns how many ordinary requests were lost.
func (p *pair) lostSoFar() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost["/no-such-path"]
}

// kill kills instance a, which leaves the pool, and starts it again. Meanwhile another listener at its
// address counts the ordinary requests that the balancer still sends there: none, or a few with
// passive checks.
func (p *pair) kill(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	for range 4 {
		workers.Go(func() { p.load(ctx, "/no-such-path", 404) })
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

// tried listens at the address of instance a for a while, answers nothing, and returns how many
// ordinary requests came.
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
		if line, _ := bufio.NewReader(conn).ReadString('\n'); strings.Contains(line, "/no-such-path") {
			n++
		}
		conn.Close()
	}
}

func (p *pair) wantNoneLost(t *testing.T) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost["/no-such-path"] > 0 {
		t.Errorf("got %d ordinary requests lost, want 0: %q", p.lost["/no-such-path"], p.problems)
	}
}

// requests is one kind of load.
type requests struct {
	path string
	want int
	keep bool

	mu                   sync.Mutex
	sent, draining, lost int
	problems             []string
}

func (r *requests) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent
}

// send sends 20 requests a second, on kept connections until it is told to leave. It does not repeat a
// request: without an answer the request is lost. A kept connection may get one 503, but not as its
// first answer.
func (r *requests) send(ctx context.Context, addr string) {
	for ctx.Err() == nil {
		conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
		first := true
		for answers := bufio.NewReader(conn); ; first = false {
			code, leave := 0, true
			if err == nil {
				code, leave, err = exchange(conn, answers, r.path)
			}
			r.mu.Lock()
			r.sent++
			switch {
			case err == nil && code == r.want:
			case err == nil && code == 503 && r.keep && !first:
				r.draining++
			default:
				r.lost++
				r.problems = append(r.problems, fmt.Sprintf("%d, error %v", code, err))
			}
			r.mu.Unlock()
			time.Sleep(50 * time.Millisecond)
			if err != nil || leave || !r.keep || ctx.Err() != nil {
				break
			}
		}
		if conn != nil {
			conn.Close()
		}
	}
}

// exchange requests path once. It returns the code of the answer and whether it says Connection: close.
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
