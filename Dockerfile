# The image of weir. Build it for the machine's own architecture or, with buildx, for others:
#   docker build -t weir:dev .
#   docker buildx build --platform linux/amd64,linux/arm64 -t weir:dev .
# Without Docker, `cargo xtask image` makes the same image.
#
# It holds the program under both its names (weir, kube-proxy), the libraries it is linked with, and no shell.
# It runs as uid 0 without the powers that usually come with it: Kubernetes hands capabilities to uid 0 only, and a bpffs
# belongs to root. What it needs: NET_ADMIN; for eBPF also BPF, PERFMON and SYS_ADMIN. See charts/weir.

FROM rust:1.95-bookworm AS build
WORKDIR /weir
COPY . .
RUN cargo xtask image --root /image

FROM scratch
COPY --from=build /image/ /
ENV PATH=/usr/local/bin
ENTRYPOINT ["/usr/local/bin/weir"]
