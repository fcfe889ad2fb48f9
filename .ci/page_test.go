package ci

import (
	"bytes"
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/parser"
	renderer "github.com/yuin/goldmark/renderer/html"
)

// page is the README as GitHub shows it, in a column of text with a margin. Its fonts are wider than
// those of most phones.
const page = `<!doctype html><meta charset=utf-8><style>
body { width: %dpx; margin: %dpx; font: 16px/1.5 "DejaVu Sans"; overflow-wrap: break-word }
code, pre { font: 85%%/1.45 "DejaVu Sans Mono" }
pre { padding: 16px; overflow: auto; background: #f6f8fa }
pre code { font-size: 100%% }
table { border-collapse: collapse; display: block; width: max-content; max-width: 100%%; overflow: auto }
td, th { padding: 6px 13px; border: 1px solid #d1d9e0 }
</style>%s<script>
const seen = { blocks: [], links: [], tables: [], broken: [], details: 0, open: 0 };
for (const p of document.querySelectorAll("pre")) {
	const top = p.getBoundingClientRect().top;
	seen.blocks.push({ first: p.checkVisibility() && top < 850 });
}
for (const a of document.querySelectorAll("a[href^='#']"))
	seen.links.push({ to: a.getAttribute("href"), lands: document.getElementById(a.getAttribute("href").slice(1)) != null });
for (const d of document.querySelectorAll("details")) {
	d.querySelector("summary").click();
	seen.details++;
	if (d.open) seen.open++;
}
for (const [i, p] of document.querySelectorAll("pre").entries()) {
	const summary = p.parentElement.querySelector(":scope > summary");
	const before = p.parentElement.tagName == "DETAILS" ? summary : p.previousElementSibling;
	Object.assign(seen.blocks[i], { text: p.textContent, before: before.textContent, width: p.scrollWidth, box: p.clientWidth });
}
for (const t of document.querySelectorAll("table"))
	seen.tables.push({ head: t.querySelector("tr").textContent, width: t.scrollWidth, box: t.clientWidth });
for (const e of document.querySelectorAll("p, li, h1, h2, h3, h4, summary, table"))
	if (e.getBoundingClientRect().right > document.body.getBoundingClientRect().right + 1 || e.scrollWidth > e.clientWidth)
		seen.broken.push(e.textContent);
for (const c of document.querySelectorAll("li > code:first-child"))
	if (c.textContent.startsWith("-") && c.getClientRects().length > 1)
		seen.broken.push(c.textContent);
document.body.dataset.seen = JSON.stringify(seen);
</script>`

// TestPage looks at the README in a browser, as its readers do, at a desk and on a phone.
func TestPage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name         string
		text, margin int // pixels
	}{{"980 pixels", 890, 45}, {"390 pixels", 358, 16}} {
		t.Run(tt.name, func(t *testing.T) { lookAt(t, tt.text, tt.margin) })
	}
}

func lookAt(t *testing.T, text, margin int) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var body bytes.Buffer
	markdown := goldmark.New(goldmark.WithExtensions(extension.GFM), goldmark.WithParserOptions(parser.WithAutoHeadingID()), goldmark.WithRendererOptions(renderer.WithUnsafe()))
	if err := markdown.Convert(readme, &body); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, page, text, margin, body.String())
	}))
	defer server.Close()
	dom := output(t, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=980,1000", "--user-data-dir="+t.TempDir(), "--virtual-time-budget=10000", "--dump-dom", server.URL)
	found := regexp.MustCompile(`data-seen="([^"]*)"`).FindStringSubmatch(dom)
	if found == nil {
		t.Fatalf("the page did not run its script: %.2000s", dom)
	}
	var seen struct {
		Blocks []struct {
			Text, Before string
			Width, Box   int
			First        bool // on the first screen, and not folded
		}
		Links []struct {
			To    string
			Lands bool
		}
		Tables []struct {
			Head       string
			Width, Box int
		}
		Broken        []string // text that does not fit, and flags that are broken at a hyphen
		Details, Open int
	}
	if err := json.Unmarshal([]byte(html.UnescapeString(found[1])), &seen); err != nil {
		t.Fatal(err)
	}

	fences := regexp.MustCompile("(?m)^```(\\w+) (\\S+)$").FindAllStringSubmatch(string(readme), -1)
	if len(fences) != len(seen.Blocks) || len(fences) == 0 {
		t.Fatalf("got %d blocks on the page, want the %d of the file", len(seen.Blocks), len(fences))
	}
	first := 0
	for i, block := range seen.Blocks {
		language, name := fences[i][1], fences[i][2]
		if block.Width > block.Box && text > 800 || block.Box == 0 { // a phone scrolls
			t.Errorf("%s: got a block of %d pixels in a box of %d:\n%s", name, block.Width, block.Box, block.Text)
		}
		for line := range strings.Lines(block.Text) {
			if columns := len(line) - 1; block.First && columns > 60 {
				t.Errorf("%s: got a line of %d columns on the first screen, want 60 at most, or the block folded", name, columns)
			}
		}
		if block.First {
			first++
		}
		if language != "sh" && !strings.Contains(block.Before, name) {
			t.Errorf("%s: got %q before the block, want its name there", name, block.Before)
		}
	}
	for _, link := range seen.Links {
		if !link.Lands {
			t.Errorf("the link to %s lands nowhere", link.To)
		}
	}
	for _, table := range seen.Tables {
		if table.Width > table.Box {
			t.Errorf("got a table of %d pixels on a screen of %d: %q", table.Width, table.Box, table.Head)
		}
	}
	for _, text := range seen.Broken {
		t.Errorf("got %q wider than the screen, or broken at a hyphen", text)
	}
	if first == 0 || len(seen.Tables) == 0 {
		t.Errorf("got %d blocks on the first screen and %d tables, want some of each", first, len(seen.Tables))
	}
	if len(seen.Links) == 0 || seen.Details == 0 || seen.Open != seen.Details {
		t.Errorf("got %d links, and %d of %d summaries that open; want some of each, and all to open", len(seen.Links), seen.Open, seen.Details)
	}
	t.Logf("%d blocks, %d of them on the first screen; %d tables; %d links; %d summaries", len(seen.Blocks), first, len(seen.Tables), len(seen.Links), seen.Details)
}

// TestPageSays looks for the answers to what users asked, each in the section where they look for it.
// Other tests run what the page says about programs.
func TestPageSays(t *testing.T) {
	t.Parallel()
	readme := output(t, "cat", "../README.md")
	if lines := strings.Count(readme, "\n") + 1; lines > 440 {
		t.Errorf("got a page of %d lines, want 440 at most", lines)
	}
	sections := map[string]string{}
	for _, section := range regexp.MustCompile("(?m)^#{2,4} ").Split(readme, -1) {
		title, text, _ := strings.Cut(section, "\n")
		sections[title] = text
	}
	for _, tt := range []struct{ question, section, want string }{
		{"Does it build on Windows?", "Start", "not on Windows"},
		{"Which version runs?", "Start", "`version=` is the git tag or commit, or `devel`"},
		{"Which origins do apps have?", "Configuration", "`app://\\.`, `file://` or `qrc://`"},
		{"How long does the probe wait?", "Configuration", "The probe waits for 2 s"},
		{"Why exit code 2?", "Configuration", "\\| 2 \\| Go .* crashed, .* cannot read `GOMEMLIMIT`"},
		{"When does & ignore Ctrl-C?", "How it stops", "`&` in a script ignores SIGINT"},
		{"Which 5 s does a connection get?", "Limits", "\\| 5 s \\| the first request on a new connection"},
		{"Which 620 s does a connection get?", "Limits", "\\| 620 s \\| .* a kept connection"},
		{"How much memory do 2,000 connections need?", "Limits", "256 MB for 2,000"},
		{"Another port in Docker?", "Docker", "`-p 8080:5034`"},
		{"How do I upgrade the container?", "Docker", "To upgrade, run `make image .*`docker stop .* docker rm .*`docker run`"},
		{"Can I reuse a tag?", "Docker", "Never reuse a tag"},
		{"How do I upgrade the pods?", "Kubernetes", "To upgrade, run `make image .* push or load .* `kubectl apply"},
		{"How long must the grace period be?", "Kubernetes", "terminationGracePeriodSeconds: 30 +# more than preStop \\+ DRAIN_DELAY \\+ SHUTDOWN_TIMEOUT"},
		{"TLS on Kubernetes?", "Kubernetes", "For TLS, .* Ingress"},
		{"TLS with Caddy?", "Caddy", "For TLS, .* in place of `:8080`"},
		{"Which DRAIN_DELAY?", "Rolling restart", "`DRAIN_DELAY=5s`"},
		{"My handler takes more than 10 s?", "Develop", "10 s, the client gets an empty reply .*`http.TimeoutHandler`.*`SetWriteDeadline`"},
		{"Why are uploads slow?", "Develop", "0\\.4 MB/s .*8 KiB"},
		{"Why does make lint take a minute?", "Develop", "1 min, to download the linters"},
	} {
		if !regexp.MustCompile(tt.want).MatchString(sections[tt.section]) {
			t.Errorf("%s The section %q does not say %q", tt.question, tt.section, tt.want)
		}
	}
}
