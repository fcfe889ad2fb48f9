STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
EDITORCONFIG := github.com/editorconfig-checker/editorconfig-checker/v3/cmd/editorconfig-checker@v3.6.1
BENCHSTAT := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
BINARY := bin/whatsapp-contact-processor
# The git tag or commit, in letters that an image tag can have. In a tree without git it is devel.
VERSION := $(subst +,-,$(subst /,-,$(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)))
LDFLAGS = -s -w -X main.version=$(VERSION)
ROUNDS := 8
FUZZTIME := 20s

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## serve on port 5034 until Ctrl-C
	@$(BINARY)

test: ## run the tests
	go test -cover ./...

race: ## run the tests 20 times with the race detector, in any order
	go test -race -count=20 -shuffle=on ./...

fuzz: ## send random requests to the handler and to the allow list, FUZZTIME each
	go test -run '^$$' -fuzz FuzzHandler -fuzztime $(FUZZTIME) .
	go test -run '^$$' -fuzz FuzzOrigins -fuzztime $(FUZZTIME) .

bench: ## measure the program beside a bare net/http server
	@mkdir -p bin && rm -f bin/bench.txt
	@for round in $$(seq $(ROUNDS)); do \
		echo "round $$round of $(ROUNDS)"; \
		for bench in 'Program/(start|memory) 20x' 'Program/(request|load) 50000x'; do \
			set -- $$bench; \
			go test -C .ci -run '^$$' -bench "$$1" -benchtime $$2 . >>bin/bench.txt || { cat bin/bench.txt; exit 1; }; \
		done; \
	done
	@go run $(BENCHSTAT) -col /impl bin/bench.txt

build: ## build the static binary bin/whatsapp-contact-processor
	CGO_ENABLED=0 go build -trimpath -ldflags='$(LDFLAGS)' -o $(BINARY) .

lint: ## run gofmt, vet, staticcheck and editorconfig-checker; the first run downloads them
	@unformatted=$$(gofmt -l . .ci); test -z "$$unformatted" || { echo "gofmt wants: $$unformatted"; exit 1; }
	go vet ./...
	go vet -C .ci ./...
	go run $(STATICCHECK) ./...
	cd .ci && go run $(STATICCHECK) ./...
	go run $(EDITORCONFIG) $$(git ls-files --cached --others --exclude-standard)

image: ## build the container image whatsapp-contact-processor:VERSION
	docker build --build-arg VERSION=$(VERSION) -t whatsapp-contact-processor:$(VERSION) .

clean: ## remove the built files
	rm -rf bin

.PHONY: help run test race fuzz bench build lint image clean
