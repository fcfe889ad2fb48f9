FROM --platform=$BUILDPLATFORM golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY *.go ./
ARG TARGETOS TARGETARCH VERSION=devel
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags="-s -w -X main.version=$VERSION" -o /whatsapp-contact-processor .

FROM scratch
COPY --from=build /whatsapp-contact-processor /whatsapp-contact-processor
# A number needs no /etc/passwd, and Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 5034
# -probe asks at the HOST and PORT of the container's environment.
HEALTHCHECK --interval=10s --timeout=3s --retries=3 CMD ["/whatsapp-contact-processor", "-probe"]
ENTRYPOINT ["/whatsapp-contact-processor"]
