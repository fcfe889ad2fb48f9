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
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestCrowd sends crowds at the container of the README's Docker block and asks beside
// them as a probe does. It needs a machine to itself: TestDocker has built the image.
func TestCrowd(t *testing.T) {
	long := "Cookie: " + strings.Repeat("x", 15<<10) + "\r\n"
	for _, tt := range []struct {
		name    string
		clients int
		join    func(ctx context.Context, addr string) (answers int)
		steady  bool // every place is taken all the time: no more give way than have to
		lossy   bool // probes may fail: two cores can be too busy to hear a new one in its time, and it may have to give way
	}{
		{"5,000 that send one request and keep the connection", 5000, waits(request + "\r\n"), true, false},
		{"5,000 with headers that never end", 5000, waits(request), false, false},
		{"5,000 with 15 KB of headers that never end", 5000, waits(request + long), false, false},
		{"5,000 with a body that never comes", 5000, waits(request + "Content-Length: 10\r\n\r\n"), false, false},
		{"1,000 busy ones", 1000, asks(request + "\r\n"), true, false},
		{"1,000 busy ones with 15 KB of headers", 1000, asks(request + long + "\r\n"), false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := startContainer(t)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var crowd sync.WaitGroup
			var answers atomic.Int64
			for i := range tt.clients {
				crowd.Go(func() {
					time.Sleep(2 * time.Second * time.Duration(i) / time.Duration(tt.clients))
					answers.Add(int64(tt.join(ctx, c.addr)))
				})
			}
			times, failed, files := c.probe(ctx)
			crowd.Wait()
			state := output(t, "docker", "inspect", "--format", "{{.State.Status}}, killed for memory: {{.State.OOMKilled}}", c.id)
			if state != "running, killed for memory: false" || len(failed) > 0 && !tt.lossy {
				t.Errorf("got the container %s and %d probes failed, want it running and none: %q", state, len(failed), failed)
			}
			full := files[len(files)/4:] // the crowd is there after 2 of 20 s
			most, fewest := slices.Max(files), slices.Min(full)
			if most > c.limit+1+10 { // the one that waits to get in; the listener, the log and the like
				t.Errorf("got %d open files, want no more than %d connections", most, c.limit)
			}
			if least := c.limit * 98 / 100; tt.steady && fewest < least { // a few are just changing hands
				t.Errorf("got %d open files at a time, want %d connections or more all the time", fewest, least)
			}
			t.Logf("%d probes, %d failed, median %v, slowest %v; %d other answers; %d to %d open files; memory: %.0f MiB at most of %.0f",
				len(times), len(failed), times[len(times)/2], times[len(times)-1], answers.Load(), fewest, most, c.peak(t)/(1<<20), c.memory/(1<<20))
		})
	}
}

// waits returns a client that sends raw, waits until it is cut off, and comes back 5 s later.
func waits(raw string) func(context.Context, string) int {
	return func(ctx context.Context, addr string) (answers int) {
		for ctx.Err() == nil {
			conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
			if err == nil {
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				io.WriteString(conn, raw)
				io.Copy(io.Discard, conn)
				stop()
				conn.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Second):
			}
		}
		return 0
	}
}

// asks returns a client that sends raw again with each answer, and connects again when
// it had to give way.
func asks(raw string) func(context.Context, string) int {
	return func(ctx context.Context, addr string) (answers int) {
		for ctx.Err() == nil {
			conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
			if err != nil {
				continue
			}
			for reader := bufio.NewReader(conn); ctx.Err() == nil; answers++ {
				conn.SetDeadline(time.Now().Add(patience))
				io.WriteString(conn, raw)
				resp, err := http.ReadResponse(reader, nil)
				if err != nil {
					break
				}
				io.Copy(io.Discard, resp.Body)
			}
			conn.Close()
		}
		return answers
	}
}

// container is the service as the README's Docker block runs it.
type container struct {
	id, addr string
	proc     string  // of its process
	limit    int     // connections
	memory   float64 // bytes
}

func startContainer(t *testing.T) *container {
	t.Helper()
	c := &container{id: output(t, "bash", "-euc", dockerRun(t, ""))}
	t.Cleanup(func() { exec.Command("docker", "rm", "-f", c.id).Run() })
	fields := strings.Fields(output(t, "docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}} {{.State.Pid}} {{.HostConfig.Memory}}", c.id))
	c.addr, c.proc = net.JoinHostPort(fields[0], "5034"), "/proc/"+fields[1]
	c.memory, _ = strconv.ParseFloat(fields[2], 64)
	c.limit, _ = strconv.Atoi(regexp.MustCompile(`MAX_CONNECTIONS\] \(default (\d+)\)`).FindStringSubmatch(output(t, service, "-h"))[1])
	until(t, "the container", func() bool { code, _ := get("http://" + c.addr + "/health"); return code == 200 })
	return c
}

// probe asks ten times a second, with a probe's patience of 2 s, until ctx ends, and
// counts the open files meanwhile.
func (c *container) probe(ctx context.Context) (times []time.Duration, failed []string, files []int) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	for tick := time.NewTicker(100 * time.Millisecond); ctx.Err() == nil; <-tick.C {
		open, _ := os.ReadDir(c.proc + "/fd") // first: after the answer the crowd may have left
		files = append(files, len(open))
		began := time.Now()
		resp, err := client.Get("http://" + c.addr + "/health")
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if resp.StatusCode != 200 {
				err = fmt.Errorf("got %s", resp.Status)
			}
		}
		if err != nil {
			failed = append(failed, err.Error())
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	return times, failed, files
}

// peak returns the most memory that the container had at a time, in bytes.
func (c *container) peak(t *testing.T) float64 {
	t.Helper()
	groups, err := os.ReadFile(c.proc + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	path := "/sys/fs/cgroup/memory" + cut(string(groups), ":memory:") + "/memory.max_usage_in_bytes"
	if !strings.Contains(string(groups), ":memory:") { // version 2
		path = "/sys/fs/cgroup" + cut(string(groups), "0::") + "/memory.peak"
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bytes, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

// cut returns the rest of the line after sep.
func cut(text, sep string) string {
	_, rest, _ := strings.Cut(text, sep)
	line, _, _ := strings.Cut(rest, "\n")
	return line
}
