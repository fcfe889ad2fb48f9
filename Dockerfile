FROM --platform=$BUILDPLATFORM golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY *.go ./
ARG TARGETOS TARGETARCH
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags='-s -w' -o /whatsapp-contact-processor .

FROM scratch
COPY --from=build /whatsapp-contact-processor /whatsapp-contact-processor
# Nobody: the number needs no /etc/passwd, and Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 5034
# The binary asks itself, at the HOST and PORT that the container is given.
HEALTHCHECK --interval=10s --timeout=3s --retries=3 CMD ["/whatsapp-contact-processor", "-probe"]
ENTRYPOINT ["/whatsapp-contact-processor"]
