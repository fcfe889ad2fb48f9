package ci

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// nextImage is the one of the README's example of another route: see TestNext.
const nextImage = "whatsapp-contact-processor:next"

// TestNext types the README's example of another route into a copy, as whoever carries on will,
// runs the tests, builds the image and asks it. TestCrowd sends crowds at that image.
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
	file, readme := block(t, "go contacts.go"), output(t, "cat", "../README.md")
	if err := os.WriteFile(filepath.Join(dir, "contacts.go"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	said := regexp.MustCompile("`(mux\\.HandleFunc\\(.*?\\))` in `routes`.*?`(http\\.Method\\w+)` in `AllowedMethods`").FindStringSubmatch(readme)
	if said == nil {
		t.Fatal("the README does not say what belongs in routes and AllowedMethods")
	}
	const route, methods, row = "\tmux.Handle(\"GET /health\", health(draining)) // HEAD too\n", "http.MethodGet, http.MethodHead", "\t\t{name: \"root\", "
	edit("health.go", route, route+"\t"+said[1]+"\n")
	edit("health.go", methods, methods+", "+said[2])
	edit("health_test.go", row, "\t\t"+strings.ReplaceAll(strings.TrimSpace(block(t, "go TestAnswers")), "\n", "\n\t\t")+"\n"+row)
	if out := output(t, "gofmt", "-l", dir); out != "" {
		t.Errorf("gofmt wants %s", out)
	}
	t.Log(output(t, "make", "-C", dir, "test"))
	output(t, "docker", "build", "-q", "-t", nextImage, dir)
	c := startContainer(t, nextImage, "-e GOMEMLIMIT=100MiB ")
	for body, want := range map[string]string{`{"phone":"+49 30 123456"}`: "201", "{": "400", `{"phone":"` + strings.Repeat("1", 80<<10) + `"}`: "413"} {
		got := output(t, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-d", body, "http://"+c.addr+"/contacts")
		if got != want {
			t.Errorf("POST of %.30s: got %s, want %s", body, got, want)
		}
	}
	t.Logf("the image with another route: %s bytes", output(t, "docker", "image", "inspect", "--format", "{{.Size}}", nextImage))
}
