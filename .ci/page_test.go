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

// page is the README as GitHub shows it: a column of 980 pixels, of which 890 hold text.
const page = `<!doctype html><meta charset=utf-8><style>
body { width: 890px; margin: 45px; font: 16px/1.5 "DejaVu Sans"; overflow-wrap: break-word }
code, pre { font: 85%%/1.45 "DejaVu Sans Mono" }
pre { padding: 16px; overflow: auto; background: #f6f8fa }
pre code { font-size: 100%% }
table { border-collapse: collapse; display: block; width: max-content; max-width: 100%%; overflow: auto }
td, th { padding: 6px 13px; border: 1px solid #d1d9e0 }
</style>%s<script>
const seen = { blocks: [], links: [], details: 0, open: 0 };
for (const a of document.querySelectorAll("a[href^='#']"))
	seen.links.push({ to: a.getAttribute("href"), lands: document.getElementById(a.getAttribute("href").slice(1)) != null });
for (const d of document.querySelectorAll("details")) {
	d.querySelector("summary").click();
	seen.details++;
	if (d.open) seen.open++;
}
for (const p of document.querySelectorAll("pre")) {
	const summary = p.parentElement.querySelector(":scope > summary");
	const before = p.parentElement.tagName == "DETAILS" ? summary : p.previousElementSibling;
	seen.blocks.push({ text: p.textContent, before: before.textContent, width: p.scrollWidth, box: p.clientWidth });
}
document.body.dataset.seen = JSON.stringify(seen);
</script>`

// TestPage looks at the README in a browser, as its readers do.
func TestPage(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(readme, []byte("\n")); lines >= 400 {
		t.Errorf("got %d lines, want fewer than 400", lines)
	}
	var body bytes.Buffer
	markdown := goldmark.New(goldmark.WithExtensions(extension.GFM), goldmark.WithParserOptions(parser.WithAutoHeadingID()), goldmark.WithRendererOptions(renderer.WithUnsafe()))
	if err := markdown.Convert(readme, &body); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, page, body.String())
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
		}
		Links []struct {
			To    string
			Lands bool
		}
		Details, Open int
	}
	if err := json.Unmarshal([]byte(html.UnescapeString(found[1])), &seen); err != nil {
		t.Fatal(err)
	}

	fences := regexp.MustCompile("(?m)^```(\\w+) (\\S+)$").FindAllStringSubmatch(string(readme), -1)
	if len(fences) != len(seen.Blocks) || len(fences) == 0 {
		t.Fatalf("got %d blocks on the page, want the %d of the file", len(seen.Blocks), len(fences))
	}
	widest := 0
	for i, block := range seen.Blocks {
		language, name := fences[i][1], fences[i][2]
		if block.Width > block.Box || block.Box == 0 {
			t.Errorf("%s: got a block of %d pixels in a box of %d:\n%s", name, block.Width, block.Box, block.Text)
		}
		for line := range strings.Lines(block.Text) {
			widest = max(widest, len(line)-1)
		}
		// A block of commands is its own name, and that of the answer begins with the command.
		if language != "sh" && language != "http" && !strings.Contains(block.Before, name) {
			t.Errorf("%s: got %q before the block, want its name there", name, block.Before)
		}
	}
	for _, link := range seen.Links {
		if !link.Lands {
			t.Errorf("the link to %s lands nowhere", link.To)
		}
	}
	if len(seen.Links) == 0 || seen.Details == 0 || seen.Open != seen.Details {
		t.Errorf("got %d links, and %d of %d summaries that open; want some of each, and all to open", len(seen.Links), seen.Open, seen.Details)
	}
	t.Logf("%d blocks, the longest line of %d characters; %d links; %d summaries", len(seen.Blocks), widest, len(seen.Links), seen.Details)
}
