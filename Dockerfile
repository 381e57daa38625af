# The image of weir, for the architecture of the machine that builds it or for others:
#   docker build -t weir:dev .
#   docker build --platform linux/arm64 -t weir:dev .
#   docker buildx build --platform linux/amd64,linux/arm64 -t weir:dev .
# Another architecture is cross-compiled, not emulated. Docker needs BuildKit for it (before version 23: DOCKER_BUILDKIT=1).
# Without Docker, `cargo xtask image` makes the same image.
#
# It holds the program under both its names (weir, kube-proxy), the libraries it is linked with, and no shell.
# It runs as uid 0 without the powers that usually come with it: Kubernetes hands capabilities to uid 0 only, and a bpffs
# belongs to root. What it needs: NET_ADMIN; for eBPF also BPF, PERFMON and SYS_ADMIN; to answer names also
# NET_BIND_SERVICE and /dev/net/tun. See charts/weir.

# Only this stage has a base image, and nothing of it but the libraries comes into the result. A digest may be named instead of the tag.
ARG BUILD_IMAGE=rust:1.95-bookworm
FROM --platform=$BUILDPLATFORM ${BUILD_IMAGE} AS build
ARG TARGETARCH
WORKDIR /weir
COPY . .
# What was downloaded and compiled is there again the next time, whatever changed.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/weir/target \
    cargo xtask image --arch "$TARGETARCH" --root /image

FROM scratch
# What `cargo xtask image` writes too. The commit is known outside only: --label org.opencontainers.image.revision=COMMIT
LABEL org.opencontainers.image.title="weir" \
      org.opencontainers.image.description="A Kubernetes service proxy, one agent a node, in place of kube-proxy" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT"
COPY --from=build /image/ /
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/weir"]
