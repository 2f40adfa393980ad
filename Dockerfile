# syntax=docker/dockerfile:1
# Two images: `birb-nest`, the data plane with its three roles (setup | api | worker), and `birb-nest-operator`.
# Without Docker: `make images` (scripts/images.sh), which makes the stages `build` and `root` itself.

# The same Rust as rust-toolchain.toml, which stays outside: rustup would want to fetch components.
FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --workspace --bin birb-nest --bin birb-nest-operator \
    && cp target/release/birb-nest target/release/birb-nest-operator /

FROM debian:bookworm-slim AS root
COPY scripts/images/runtime-root.sh /
RUN bash /runtime-root.sh /root

FROM scratch AS base
LABEL org.opencontainers.image.source="https://github.com/birbparty/birb-nest" \
      org.opencontainers.image.licenses="MIT"
ENV PATH=/usr/local/bin:/usr/bin:/bin
# The stage `root` holds the root of the image in /root.
COPY --from=root /root /
USER 65532:65532

FROM base AS birb-nest-operator
COPY --from=build /birb-nest-operator /usr/local/bin/
ENTRYPOINT ["birb-nest-operator"]

# The last one: what `docker build .` gives.
FROM base AS birb-nest
COPY --from=build /birb-nest /usr/local/bin/
EXPOSE 8080 9091
ENTRYPOINT ["birb-nest"]
CMD ["api"]
