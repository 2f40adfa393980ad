# syntax=docker/dockerfile:1
# The image of birb-nest: one binary, three roles (setup | api | worker).

# The same Rust as rust-toolchain.toml, which stays outside: rustup would want to fetch components.
FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --workspace --bins \
    && cp target/release/birb-nest /birb-nest

FROM debian:bookworm-slim
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /birb-nest /usr/local/bin/birb-nest
USER 65532:65532
EXPOSE 8080 9091
ENTRYPOINT ["birb-nest"]
CMD ["api"]
