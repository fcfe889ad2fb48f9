package ci

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// nextImage is the image with the README's example route: see TestNext.
const nextImage = "whatsapp-contact-processor:next"

// TestNext adds a route and a setting to a copy, as the README's recipes say, runs the tests, builds
// the image and sends requests to it. TestCrowd sends crowds to that image.
func TestNext(t *testing.T) {
	dir := t.TempDir()
	output(t, "bash", "-euc", `cd ..; cp $(git ls-files | grep -v /) .dockerignore "$0"`, dir)
	edit := func(name, before, after string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(replace(t, output(t, "cat", path)+"\n", before, after)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	readme := output(t, "cat", "../README.md")
	said := func(what string) string {
		t.Helper()
		found := regexp.MustCompile(what).FindStringSubmatch(readme)
		if found == nil {
			t.Fatalf("the README does not say %q", what)
		}
		return found[1]
	}
	if err := os.WriteFile(filepath.Join(dir, "contacts.go"), []byte(block(t, "go contacts.go")), 0o644); err != nil {
		t.Fatal(err)
	}

	// The route.
	const (
		route     = "\tmux.Handle(\"GET /health\", "
		methods   = "http.MethodGet, http.MethodHead"
		signature = "func routes(draining func() bool"
		row       = "\t\t{name: \"GET\", method: "
	)
	edit("health.go", route, "\t"+said("add `(mux\\..*?)` to `routes`")+"\n"+route)
	edit("health.go", methods, methods+", "+said("add `(http\\.Method\\w+)` to `AllowedMethods`"))
	edit("health.go", signature, signature+", "+said("Give `routes` the parameter `(.*?)`"))
	edit("main.go", "routes(draining.Load", "routes(draining.Load, "+said("its call in `serve` the argument `(.*?)`"))
	output(t, "bash", "-euc", "cd "+dir+"; "+said("Change the calls in the tests with `(.*?)`"))
	edit("health_test.go", row, block(t, "go TestAnswers")+row)

	// The setting.
	const (
		field   = "type config struct {\n"
		setting = "\t\t{\"drain-delay\", "
		pair    = "\"drain-delay\", c.drainDelay"
		wrong   = "\t\t{flag: \"host\", "
	)
	edit("main.go", field, field+"\t"+said("a field of `config` \\(`(.*?)`\\)")+"\n\n")
	edit("main.go", setting, "\t\t"+said("a row of `settings` \\(`(.*?)`\\)")+",\n"+setting)
	edit("main.go", pair, said("a pair in the `listening` line \\(`(.*?)`\\)")+", "+pair)
	edit("health_test.go", "config{port: ", "config{maxBody: 65536, port: ")
	edit("health_test.go", "config{host: ", "config{maxBody: 65536, host: ")
	edit("health_test.go", wrong, "\t\t{flag: \"max-body\", want: \"want \", values: []string{\"0\"}},\n"+wrong)
	edit("health_test.go", "\"DRAIN_DELAY=1ms\", ", "\"MAX_BODY=100000\", \"DRAIN_DELAY=1ms\", ")
	edit("health_test.go", " drain-delay=1ms", " max-body=100000 drain-delay=1ms")

	if out := output(t, "gofmt", "-l", dir); out != "" {
		t.Errorf("gofmt wants %s", out)
	}
	t.Log(output(t, "make", "-C", dir, "test"))
	output(t, "docker", "build", "-q", "-t", nextImage, dir)
	c := startContainer(t, nextImage, "-e GOMEMLIMIT=100MiB -e MAX_BODY=1000 ")
	for body, want := range map[string]string{
		`{"phone":"+49 30 123456"}`: "201",
		"{":                         "400",
		`{"phone":"` + strings.Repeat("1", 1000) + `"}`: "413",
	} {
		got := output(t, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-d", body, "http://"+c.addr+"/contacts")
		if got != want {
			t.Errorf("POST of %.30s: got %s, want %s", body, got, want)
		}
	}
	t.Logf("the image with another route: %s bytes", output(t, "docker", "image", "inspect", "--format", "{{.Size}}", nextImage))
}
