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
	"syscall"
	"testing"
	"time"
)

// crowds returns the crowds that TestCrowd sends. The clients that are refused at once are 2,000 at
// most, because nearly all of them wait in the kernel's queue, which has room for 4,096, and half a
// core refuses some 1,500 of the largest requests a second.
func crowds() []crowd {
	var (
		whole    = request + "\r\n"
		cookies  = request + "Cookie: " + strings.Repeat("x", 15<<10) + "\r\n"
		tooLarge = request + "Cookie: " + strings.Repeat("x", 30<<10) + "\r\n"
		tiny     = request + strings.Repeat("a:b\r\n", 19<<10/5)
		body     = request + "Content-Length: 10\r\n\r\n"
		post     = "POST /contacts HTTP/1.1\r\nHost: a.example\r\nContent-Length: 100\r\n\r\n"
		garbage  = strings.Repeat("\x16\x03\x01\x00\xff\n", 100)

		// These leave room for one byte: in net/http's buffer of 4 KiB, and in the 20 KiB that a
		// request may have.
		buffer    = pad("GET /", 4<<10-1)
		headers   = pad("GET /", 20<<10-1)
		chunkSize = "POST /contacts HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n" + pad("1;", 4<<10-1)

		// A request and a part of the next: 1,000 lines, or as many lines as are read ahead, the 100
		// that a request may have, and a large header.
		next    = whole + "GET / HTTP/1.1\n"
		ahead   = next + lines(1000)
		mixture = next + lines((512-len(next))/4+100) + pad("a:", 18<<10)
	)
	return []crowd{
		{name: "5,000 send one request and keep the connection", clients: 5000, join: waits(whole)},
		{name: "5,000 send headers that never end", clients: 5000, join: waits(request)},
		{name: "5,000 send 15 KB of headers that never end", clients: 5000, join: waits(cookies), large: true},
		{name: "2,000 send 19 KB of tiny headers that never end", clients: 2000, join: waits(tiny), large: true},
		{name: "2,000 send 30 KB of headers", clients: 2000, join: waits(tooLarge), large: true},
		{name: "1,500 send a request but for its last bytes, 4,095 in all", clients: 1500, join: waits(buffer)},
		{name: "1,500 send a request but for its last bytes, 20,479 in all", clients: 1500, join: waits(headers), large: true},
		{name: "1,500 send a request and 1,000 lines of the next", clients: 1500, join: waits(ahead), large: true},
		{name: "1,500 send a request, many lines of the next, and a large header", clients: 1500, join: waits(mixture)},
		{name: "5,000 announce a body that never comes", clients: 5000, join: waits(body)},
		{name: "1,000 ask again and again", clients: 1000, join: asks(whole)},
		{name: "1,000 ask again and again with 15 KB of headers", clients: 1000, join: asks(cookies + "\r\n"), large: true},
		{name: "1,000 ask again and again with 19 KB of tiny headers", clients: 1000, join: asks(tiny + "\r\n"), large: true},
		{name: "1,000 ask again and again with 30 KB of headers", clients: 1000, join: asks(tooLarge + "\r\n"), large: true},
		{name: "1,000 send garbage again and again", clients: 1000, join: asks(garbage)},
		{name: "1,000 reset the connection again and again", clients: 1000, join: resets(request)},
		{name: "1,000 ask without end and never read", clients: 1000, join: floods(whole, 0)},
		{name: "5,000 ask without end and never read", clients: 5000, join: floods(whole, 0)},
		{name: "1,000 ask without end and read a byte every 100 ms", clients: 1000, join: floods(whole, 100*time.Millisecond)},
		{name: "5,000 ask without end and read a byte every 100 ms", clients: 5000, join: floods(whole, 100*time.Millisecond)},
		{name: "1,000 ask without end and never read, and then 600 are silent", clients: 1000, join: deaf(whole), late: 600, joinLate: waits("")},
		{name: "1,000 announce a body that a route reads, and it never comes", clients: 1000, join: waits(post), next: true},
		{name: "1,000 send a body that a route reads, a byte every 100 ms", clients: 1000, join: drips(post, 100*time.Millisecond), next: true},
		{name: "1,500 send a chunk of a body that a route reads, its size line without an end", clients: 1500, join: waits(chunkSize), next: true},
	}
}

// lines returns n short header lines with different names.
func lines(n int) string {
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, "%s:\n", strconv.FormatInt(int64(36+i), 36))
	}
	return text.String()
}

// pad returns text and as many letters as make it size bytes long.
func pad(text string, size int) string { return text + strings.Repeat("x", size-len(text)) }

type crowd struct {
	name    string
	clients int
	join    func(ctx context.Context, addr string)
	large   bool // its requests take memory

	late     int // clients that come all at once when the others are in
	joinLate func(ctx context.Context, addr string)
	next     bool // against the image with the route of the README's "Develop": see TestNext
}

// crowdTime is how long a crowd stays, and crowdComes how long its clients take to come.
const crowdTime, crowdComes = 12 * time.Second, 2 * time.Second

// beCrowd is the crowd. It runs in a process of its own, so that it does not slow the probe down.
func beCrowd(name, addr string) {
	ctx, cancel := context.WithTimeout(context.Background(), crowdTime)
	defer cancel()
	all := crowds()
	c := all[slices.IndexFunc(all, func(c crowd) bool { return c.name == name })]
	var clients sync.WaitGroup
	for i := range c.clients {
		clients.Go(func() {
			time.Sleep(crowdComes * time.Duration(i) / time.Duration(c.clients))
			c.join(ctx, addr)
		})
	}
	for i := range c.late {
		clients.Go(func() {
			time.Sleep(crowdComes + time.Second + 2*time.Second*time.Duration(i)/time.Duration(c.late))
			c.joinLate(ctx, addr)
		})
	}
	clients.Wait()
}

// TestCrowd sends crowds to the container of the README's Docker block. Crowds whose requests take
// much memory come once more without GOMEMLIMIT. The test needs the images that TestDocker and
// TestNext build, and a machine to itself.
func TestCrowd(t *testing.T) {
	var report strings.Builder // a line for each crowd, printed in one place at the end
	defer func() { t.Log(report.String()) }()
	for _, crowd := range crowds() {
		image := image
		if crowd.next {
			image = nextImage
		}
		limits := map[string]string{crowd.name: "-e GOMEMLIMIT=100MiB "}
		if crowd.large {
			limits[crowd.name+", no GOMEMLIMIT"] = ""
		}
		for name, limit := range limits {
			t.Run(name, func(t *testing.T) {
				fmt.Fprintf(&report, "\n%s: %s", name, crowd.send(t, startContainer(t, image, limit)))
			})
		}
	}
}

// send sends the crowd, and beside it the requests of a probe and of a client that keeps its
// connection. It returns a line about what they saw.
func (c crowd) send(t *testing.T, at *container) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), crowdTime)
	defer cancel()
	crowd := exec.Command(os.Args[0])
	crowd.Env = append(os.Environ(), "CI_BE_CROWD="+c.name, "CI_ADDR="+at.addr)
	if err := crowd.Start(); err != nil {
		t.Fatal(err)
	}
	var kept keptClient
	var beside sync.WaitGroup
	beside.Go(func() { kept.ask(ctx, at.addr) })
	times, failed, files := at.probe(ctx)
	beside.Wait()
	crowd.Wait()
	state := output(t, "docker", "inspect", "--format", "{{.State.Status}}, killed for memory: {{.State.OOMKilled}}", at.id)
	if state != "running, killed for memory: false" || len(failed) > 0 {
		t.Errorf("got the container %s and %d probes failed, want it running and none", state, len(failed))
	}
	if files > at.limit+1+10 { // the one that waits to get in; the listener, the log and the like
		t.Errorf("got %d open files, want no more than %d connections", files, at.limit)
	}
	return fmt.Sprintf("%d probes, failed: %q, median %v, slowest %v; %v; the kernel's queue was full %s times; %d open files at most; memory: %.0f MiB at most of %.0f",
		len(times), failed, times[len(times)/2].Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond), &kept, at.overflows(t), files, at.peak(t)/(1<<20), at.memory/(1<<20))
}

// join opens a connection that is closed with ctx. It returns nil if that fails.
func join(ctx context.Context, addr string) net.Conn {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	return conn
}

// waits returns a client that sends raw, waits until it is cut off, and soon comes back.
func waits(raw string) func(context.Context, string) {
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			if conn := join(ctx, addr); conn != nil {
				io.WriteString(conn, raw)
				io.Copy(io.Discard, conn)
				conn.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// asks returns a client that sends raw again with each answer, and connects again when it is
// told to leave or cut off.
func asks(raw string) func(context.Context, string) {
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			conn := join(ctx, addr)
			if conn == nil {
				continue
			}
			for answers := bufio.NewReader(conn); ; {
				io.WriteString(conn, raw)
				resp, err := http.ReadResponse(answers, nil)
				if err != nil {
					break
				}
				io.Copy(io.Discard, resp.Body)
				if resp.Close {
					break
				}
			}
			conn.Close()
		}
	}
}

// resets returns a client that sends raw and resets the connection, again and again.
func resets(raw string) func(context.Context, string) {
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			if conn := join(ctx, addr); conn != nil {
				io.WriteString(conn, raw)
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
		}
	}
}

// floods returns a client that sends raw again and again and reads a byte after each pause, or never
// if pause is 0. It connects again when it is cut off.
func floods(raw string, pause time.Duration) func(context.Context, string) {
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			conn := join(ctx, addr)
			if conn == nil {
				continue
			}
			if pause > 0 {
				go func() {
					for one := make([]byte, 1); ; time.Sleep(pause) {
						if _, err := conn.Read(one); err != nil {
							return
						}
					}
				}()
			}
			for {
				if _, err := io.WriteString(conn, raw); err != nil {
					break
				}
			}
			conn.Close()
		}
	}
}

// deaf returns a client that sends raw again and again, never reads, and has little room for answers.
// It connects again when it is cut off.
func deaf(raw string) func(context.Context, string) {
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10) // bytes
		})
	}}
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			conn, err := dialer.DialContext(ctx, "tcp", addr)
			if err != nil {
				continue
			}
			end := context.AfterFunc(ctx, func() { conn.Close() })
			for err == nil {
				_, err = io.WriteString(conn, raw)
			}
			end()
			conn.Close()
		}
	}
}

// drips returns a client that sends raw, and then a byte after each pause.
func drips(raw string, pause time.Duration) func(context.Context, string) {
	return func(ctx context.Context, addr string) {
		for ctx.Err() == nil {
			conn := join(ctx, addr)
			if conn == nil {
				continue
			}
			for _, err := io.WriteString(conn, raw); err == nil; _, err = io.WriteString(conn, "x") {
				time.Sleep(pause)
			}
			conn.Close()
		}
	}
}

// keptClient is a client that asks five times a second on a kept connection, as a balancer may.
type keptClient struct {
	answers, left, cut int // requests that were answered, answers that told it to leave, requests that got no answer
}

func (k *keptClient) String() string {
	return fmt.Sprintf("a kept connection: %d answers, %d told it to leave, cut off %d times", k.answers, k.left, k.cut)
}

func (k *keptClient) ask(ctx context.Context, addr string) {
	for ctx.Err() == nil {
		conn := join(ctx, addr)
		if conn == nil {
			continue
		}
		for answers := bufio.NewReader(conn); ; time.Sleep(200 * time.Millisecond) {
			_, leave, err := exchange(conn, answers, "/health")
			if ctx.Err() != nil {
				break
			}
			if err != nil {
				k.cut++
				break
			}
			k.answers++
			if leave {
				k.left++
				break
			}
		}
		conn.Close()
	}
}

// container is the service as the README's Docker block runs it.
type container struct {
	id, addr string
	proc     string  // of its process
	limit    int     // connections
	memory   float64 // bytes
}

// startContainer runs the README's line with another image and other memory options for Go.
func startContainer(t *testing.T, from, goMemory string) *container {
	t.Helper()
	line := replace(t, dockerRun(t, ""), "-e GOMEMLIMIT=100MiB ", goMemory, image, from)
	c := &container{id: output(t, "bash", "-euc", line)}
	t.Cleanup(func() { exec.Command("docker", "rm", "-f", c.id).Run() })
	fields := strings.Fields(output(t, "docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}} {{.State.Pid}} {{.HostConfig.Memory}}", c.id))
	c.addr, c.proc = net.JoinHostPort(fields[0], "5034"), "/proc/"+fields[1]
	c.memory, _ = strconv.ParseFloat(fields[2], 64)
	c.limit, _ = strconv.Atoi(regexp.MustCompile(`MAX_CONNECTIONS\] \(default (\d+)\)`).FindStringSubmatch(output(t, service, "-h"))[1])
	until(t, "the container", func() bool { code, _ := get("http://" + c.addr + "/health"); return code == 200 })
	return c
}

// probe asks ten times a second, with a probe's patience of 2 s, until ctx ends. It returns how
// long that took each time, what went wrong, and the most files that were open at a time.
func (c *container) probe(ctx context.Context) (times []time.Duration, failed []string, files int) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	for tick := time.NewTicker(100 * time.Millisecond); ctx.Err() == nil; <-tick.C {
		open, _ := os.ReadDir(c.proc + "/fd") // first: after the answer the crowd may have left
		files = max(files, len(open))
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

// overflows returns how often the kernel's queue of connections was full when one came.
func (c *container) overflows(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(c.proc + "/net/netstat") // two lines for each part: names, values
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	return values[slices.Index(names, "ListenOverflows")]
}

// cut returns the rest of the line after sep.
func cut(text, sep string) string {
	_, rest, _ := strings.Cut(text, sep)
	line, _, _ := strings.Cut(rest, "\n")
	return line
}
