# The image of weir, for the architecture of the machine that builds it or for others:
#   docker build -t weir:dev .
#   docker build --platform linux/arm64 -t weir:dev .
#   docker buildx build --platform linux/amd64,linux/arm64 -t weir:dev .
# Other architectures are cross-compiled, not emulated. Docker needs BuildKit for that (before version 23: DOCKER_BUILDKIT=1).
# Without Docker, `cargo xtask image` makes the same image.
#
# It holds the program under both its names (weir, kube-proxy) and the libraries it is linked with, but no shell.
# It runs as uid 0, because Kubernetes gives capabilities only to uid 0, and a bpffs belongs to root. It needs no other
# powers of root: NET_ADMIN; for the socket plane also BPF, PERFMON and SYS_ADMIN; for --dns also NET_BIND_SERVICE and
# /dev/net/tun. See charts/weir.

# Only this stage has a base image, and only its libraries get into the result. A digest may replace the tag.
ARG BUILD_IMAGE=rust:1.95-bookworm
FROM --platform=$BUILDPLATFORM ${BUILD_IMAGE} AS build
ARG TARGETARCH
WORKDIR /weir
COPY . .
# The caches keep downloads and compiled crates for the next build.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/weir/target \
    cargo xtask image --arch "$TARGETARCH" --root /image

FROM scratch
# The same labels as from `cargo xtask image`. The build does not know the commit: add --label org.opencontainers.image.revision=COMMIT
LABEL org.opencontainers.image.title="weir" \
      org.opencontainers.image.description="A Kubernetes service proxy that replaces kube-proxy, with one agent on each node" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT"
COPY --from=build /image/ /
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/weir"]
