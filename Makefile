# Pagoda. `make demo` and `make test` are all that a newcomer needs; both set up what is missing.
.PHONY: help setup tpu-tools demo test bench bench-peers doc fmt

help:
	@echo "make demo         set up, build, and sample the demo model"
	@echo "make test         set up, then format check, clippy, docs and every test"
	@echo "make bench        criterion benches (CPU)"
	@echo "make bench-peers  tokens/s against plain JAX on this machine"
	@echo "make tpu-tools    libtpu, the TPU compiler, for certification without a TPU"

setup:
	@scripts/setup.sh

tpu-tools:
	@scripts/setup.sh tpu

demo: setup
	@cargo build --release --quiet
	@target/release/pagoda sample --config examples/configs/demo.yaml

test: tpu-tools
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
	cargo test --workspace --quiet

bench: setup
	cargo bench --workspace

bench-peers: setup
	@scripts/bench-peers.sh
