package ci

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkProgram measures the program beside the floor, a bare net/http server.
func BenchmarkProgram(b *testing.B) {
	floor := filepath.Join(b.TempDir(), "floor")
	build(b, floor, "./floor")
	begin := func(b *testing.B, impl string) *instance {
		switch impl {
		case "floor":
			return start(b, floor, "0")
		case "limits":
			return start(b, floor, "0", "LIMITS=1")
		default:
			return start(b, service, "0")
		}
	}
	for _, measure := range []struct {
		name string
		of   func(b *testing.B, impl string)
	}{
		{"start", func(b *testing.B, impl string) { // from exec to the first answer
			for b.Loop() {
				in := begin(b, impl)
				connect(b, in.addr)
				b.StopTimer()
				in.Process.Kill()
				<-in.done
				b.StartTimer()
			}
		}},
		{"request", func(b *testing.B, impl string) { // on 16 kept connections for each core
			in := begin(b, impl)
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for request := connect(b, in.addr); pb.Next(); {
					request()
				}
			})
		}},
		{"load", func(b *testing.B, impl string) { // the slowest of 100 answers, with 64 kept connections that ask without a pause
			in := begin(b, impl)
			var mu sync.Mutex
			var times []time.Duration
			b.SetParallelism(64 / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				var own []time.Duration
				for request := connect(b, in.addr); pb.Next(); {
					began := time.Now()
					request()
					own = append(own, time.Since(began))
				}
				mu.Lock()
				defer mu.Unlock()
				times = append(times, own...)
			})
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds()), "p99-ns")
			b.ReportMetric(0, "ns/op")
		}},
		{"memory", func(b *testing.B, impl string) { // resident, at rest and with 1,000 idle connections
			in := begin(b, impl)
			connect(b, in.addr)
			b.ReportMetric(resident(b, in), "rest-B")
			for range 999 {
				connect(b, in.addr)
			}
			b.ReportMetric(resident(b, in), "idle1000-B")
			b.ReportMetric(0, "ns/op")
		}},
	} {
		for _, impl := range []string{"floor", "limits", "service"} {
			b.Run(measure.name+"/impl="+impl, func(b *testing.B) { measure.of(b, impl) })
		}
	}
}

// connect opens a connection until the end of the benchmark, sends a first request on it and returns
// a function that sends the next, with hardly any work of its own.
func connect(b *testing.B, addr string) (request func()) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Error(err)
		return func() {}
	}
	b.Cleanup(func() { conn.Close() })
	raw := []byte("GET /health HTTP/1.1\r\nHost: a.example\r\n\r\n")
	answer := make([]byte, 1024)
	request = func() {
		conn.Write(raw)
		n, err := conn.Read(answer) // one write of net/http, so one read
		if err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 200 OK\r\n")) || !bytes.HasSuffix(answer[:n], []byte("running\"}\n")) {
			b.Errorf("got %q and error %v, want a whole answer", answer[:n], err)
		}
	}
	request()
	return request
}

// resident returns the resident memory of a process in bytes.
func resident(b *testing.B, in *instance) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", in.Process.Pid))
	if err != nil {
		b.Skip("resident memory is read from Linux's /proc")
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		b.Fatal(err)
	}
	return float64(kib) * 1024
}
