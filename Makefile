# The one list of developer commands; CI runs the same targets. `make` prints them.

.DEFAULT_GOAL := help
SHELL := bash

# One feature set, one profile: every cargo call takes the whole workspace. `-p` would unify other features and build it all again.
TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
export BIRB_NEST_BIN ?= $(TARGET_DIR)/debug/birb-nest
export PATH := $(CURDIR)/.dev/bin:$(PATH):$(HOME)/.cargo/bin:$(HOME)/go/bin

# Empty unless the pinned Rust is installed under another name (`stable`).
ifndef RUSTUP_TOOLCHAIN
TOOLCHAIN := $(shell scripts/rust-toolchain.sh)
ifneq ($(TOOLCHAIN),)
export RUSTUP_TOOLCHAIN := $(TOOLCHAIN)
endif
endif

COMPOSE ?= docker compose
# `make test T=some_name` runs only the tests whose name contains it.
export T

##@ Start

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: init
init: ## Install what is missing: Redis, PostgreSQL, nats-server, a C compiler
	@scripts/init.sh

.PHONY: build
build: ## Compile everything, tests included
	cargo build --workspace --all-targets

.PHONY: dev
dev: init ## Run it here on real servers; Ctrl-C stops all (API_PORT=9000 and the like change ports)
	cargo build --workspace
	@exec "$(TARGET_DIR)/debug/birb-nest-stack" dev

.PHONY: up
up: compose-present ## Run it in Docker containers (settings: .env.example)
	$(COMPOSE) up --build --detach --wait

.PHONY: down
down: compose-present ## Stop the containers; their data stays (`docker compose down -v` removes it)
	$(COMPOSE) down

.PHONY: compose-present
compose-present:
	@$(COMPOSE) version >/dev/null 2>&1 || { echo "This needs Docker with its Compose plugin. Without Docker: make dev" >&2; exit 1; }

##@ On Kubernetes

.PHONY: demo
demo: ## A cluster (root), the operator, a nest, a value written and read (DEMO_KUBECONFIG=FILE: on your cluster)
	@scripts/demo.sh up

.PHONY: demo-down
demo-down: ## Remove all that `make demo` made
	@scripts/demo.sh down

##@ Look at what runs

.PHONY: health
health: ## Ask API and worker how they are
	@scripts/health.sh

.PHONY: logs
logs: ## Follow every log of `make dev`
	@scripts/logs.sh api worker redis nats postgres

.PHONY: logs-api
logs-api: ## Follow the API's log
	@scripts/logs.sh api

.PHONY: logs-worker
logs-worker: ## Follow the worker's log
	@scripts/logs.sh worker

.PHONY: db-shell
db-shell: ## Open psql on the database of `make dev`
	@scripts/dev-client.sh psql

.PHONY: redis-cli
redis-cli: ## Open redis-cli on the Redis of `make dev`
	@scripts/dev-client.sh redis-cli

##@ Test

.PHONY: test
test: ## Run all tests but the pod ring, on real servers where they need them (T=name picks some)
	@scripts/test.sh all

.PHONY: test-unit
test-unit: ## Run the data plane's unit tests: no servers, seconds
	@scripts/test.sh unit

.PHONY: test-integration
test-integration: ## Run the tests that start real servers
	@scripts/test.sh integration

.PHONY: test-cluster
test-cluster: ## Run the tests of the Kubernetes API server that tests run on
	@scripts/test.sh cluster

.PHONY: test-e2e
test-e2e: ## Run the pod ring: a real Kubernetes with a node (root; T=name picks some)
	@scripts/test.sh e2e

.PHONY: soak
soak: ## Break things for MINUTES (30) while clients work, and judge what they saw (SOAK_SEED=n: the same run again; FAULTS=LostTail,KillNats: only those)
	@scripts/init.sh --tests
	@scripts/checker.sh
	cargo build --workspace --all-targets
	@"$(TARGET_DIR)/debug/birb-nest-soak" --minutes $(or $(MINUTES),30) $(if $(SOAK_SEED),--seed $(SOAK_SEED)) $(if $(FAULTS),--only $(FAULTS))

.PHONY: bench
bench: ## Measure reads and writes per second of a release build
	@scripts/bench.sh

.PHONY: bench-operator
bench-operator: ## Measure what 200 nests at rest ask of the API server (ten minutes); RELEASE=1 takes a release
	@scripts/init.sh --tests
	cargo build --workspace --all-targets
	$(if $(RELEASE),cargo build --release --workspace --bins)
	@"$(TARGET_DIR)/debug/birb-nest-cluster" build >/dev/null
	$(if $(RELEASE),BIRBNEST_TEST_OPERATOR="$(TARGET_DIR)/release/birb-nest-operator" )cargo test --workspace --test reconcile -- --ignored --nocapture two_hundred_nests

.PHONY: record-traces
record-traces: ## Record operator/src/scaling/traces anew from real logs (three minutes)
	@scripts/init.sh --tests
	cargo build --workspace --all-targets
	@"$(TARGET_DIR)/debug/birb-nest-cluster" build >/dev/null
	cargo test --workspace --test reconcile -- --ignored --nocapture traces_are_recorded

##@ Images

.PHONY: images
images: ## Build the images of data plane and operator into target/images, without Docker (RELEASE=1: optimised)
	@scripts/images.sh

.PHONY: server-images
server-images: ## Build stand-ins for the public images of PostgreSQL, Redis and NATS into target/images
	@scripts/server-images.sh

.PHONY: check-images
check-images: images server-images ## Run all images together, without a cluster, as restricted as pods are
	@scripts/check-images.sh

##@ Keep it clean

.PHONY: lint
lint: ## Check format, clippy, rustdoc, shell scripts, the chart and that core stays pure; warnings fail
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --document-private-items --workspace --no-deps
	scripts/check-core-pure.sh
	@scripts/check-chart.sh
	@if command -v promtool >/dev/null; then promtool check rules configs/alerts.yml && promtool test rules configs/alerts_test.yml; \
	  else echo "promtool: not installed, configs/alerts.yml not checked"; fi
	@if command -v shellcheck >/dev/null; then shellcheck -x scripts/*.sh scripts/*/*.sh .ci/run tests/cluster/src/*.sh && echo "shellcheck: ok"; \
	  else echo "shellcheck: not installed, skipped"; fi

.PHONY: vet
vet: lint ## The same as lint

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all

.PHONY: generate
generate: ## Write docs/CONFIGURATION.md, crds/, the chart's CRD and dist/install.yaml from the code
	cargo build --workspace --all-targets
	@scripts/generate.sh "$(TARGET_DIR)/debug"

.PHONY: check-generated
check-generated: generate ## Fail if a generated file is not the committed one
	@git ls-files --error-unmatch docs/CONFIGURATION.md crds charts/birb-nest/files dist/install.yaml >/dev/null
	git diff --exit-code -- docs/CONFIGURATION.md crds charts/birb-nest/files dist/install.yaml

.PHONY: deny
deny: ## Check licenses, banned crates and sources of all dependencies
	@command -v cargo-deny >/dev/null || { echo "cargo-deny is missing: cargo install --locked cargo-deny@0.20.2" >&2; exit 1; }
	cargo deny check bans licenses sources

.PHONY: clean
clean: ## Remove what cargo built
	cargo clean

.PHONY: dev-clean
dev-clean: ## Remove the data and logs of `make dev`, and the nats-server that init put there
	@! "$(TARGET_DIR)/debug/birb-nest-cluster" kubeconfig >/dev/null 2>&1 || { echo "A cluster runs in .dev/cluster: make demo-down" >&2; exit 1; }
	rm -rf .dev
