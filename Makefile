STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BINARY := bin/whatsapp-contact-processor

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## serve on port 5034 until Ctrl-C
	@$(BINARY)

test: ## run the tests
	go test -cover ./...

bench: ## time the handler and the server
	go test -run '^$$' -bench . -benchmem ./...

build: ## make the static binary bin/whatsapp-contact-processor
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o $(BINARY) .

lint: ## check with gofmt, vet and staticcheck
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt wants: $$unformatted"; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...

image: ## build the container image whatsapp-contact-processor
	docker build -t whatsapp-contact-processor .

clean: ## remove what build made
	rm -rf bin

.PHONY: help run test bench build lint image clean
