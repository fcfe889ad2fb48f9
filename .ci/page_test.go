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

// page is the README as GitHub shows it, in a column of text with a margin.
const page = `<!doctype html><meta charset=utf-8><style>
body { width: %dpx; margin: %dpx; font: 16px/1.5 "DejaVu Sans"; overflow-wrap: break-word }
code, pre { font: 85%%/1.45 "DejaVu Sans Mono" }
pre { padding: 16px; overflow: auto; background: #f6f8fa }
pre code { font-size: 100%% }
table { border-collapse: collapse; display: block; width: max-content; max-width: 100%%; overflow: auto }
td, th { padding: 6px 13px; border: 1px solid #d1d9e0 }
</style>%s<script>
const seen = { blocks: [], links: [], tables: [], details: 0, open: 0 };
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
for (const t of document.querySelectorAll("table")) {
	let section = t.previousElementSibling;
	while (!section.matches("h2")) section = section.previousElementSibling;
	const cells = [...t.querySelectorAll("th, td")];
	const third = cells.filter(c => c.cellIndex < 3).map(c => Math.ceil(c.getBoundingClientRect().right));
	const broken = cells.filter(c => c.cellIndex == 0).flatMap(c => [...c.querySelectorAll("code")]);
	seen.tables.push({
		section: section.textContent, right: Math.max(...third), screen: document.body.getBoundingClientRect().right,
		broken: broken.filter(c => c.textContent.startsWith("-") && c.getClientRects().length > 1).map(c => c.textContent),
	});
}
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
		}
		Links []struct {
			To    string
			Lands bool
		}
		Tables []struct {
			Section       string
			Right, Screen float64
			Broken        []string
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
		if block.Width > block.Box && text > 800 || block.Box == 0 { // a phone scrolls
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
	onPhone := 0
	for _, table := range seen.Tables {
		if len(table.Broken) > 0 {
			t.Errorf("%s: got %q broken at hyphens, want each name on one line", table.Section, table.Broken)
		}
		if table.Section != "Answers" && table.Section != "Configuration" {
			continue
		}
		onPhone++
		if table.Right > table.Screen {
			t.Errorf("%s: got a table whose first three columns end at %v, want the screen's %v", table.Section, table.Right, table.Screen)
		}
	}
	if onPhone < 3 {
		t.Errorf("got %d tables under Answers and Configuration, want 3", onPhone)
	}
	if len(seen.Links) == 0 || seen.Details == 0 || seen.Open != seen.Details {
		t.Errorf("got %d links, and %d of %d summaries that open; want some of each, and all to open", len(seen.Links), seen.Open, seen.Details)
	}
	t.Logf("%d blocks, the longest line of %d characters; %d links; %d summaries", len(seen.Blocks), widest, len(seen.Links), seen.Details)
}
