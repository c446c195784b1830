# Pagoda. `make demo` and `make test` are all that a newcomer needs; both set up what is missing.
.PHONY: help setup tpu-tools mpi-tools demo test nightly families jax-suite multihost python serve-load bench bench-peers certify-all certify-sample tpu-static tpu-grid cost-points tables peers

help:
	@echo "make demo         set up, build, and sample the demo model"
	@echo "make test         set up, libtpu too, then format check, clippy, docs, every test, examples/my_kernel among them"
	@echo "make nightly      10,000 random problems, tiles and batches through the Mosaic kernels (make test: 500);"
	@echo "                  then each fuzz target for PAGODA_FUZZ_SECONDS (60) with a fresh seed, and examples/my_kernel as its own crate"
	@echo "make families     transformers writes the tiny checkpoints of tests/families anew (gigabytes of torch; only to change them)"
	@echo "make jax-suite    JAX's own Pallas TPU tests on the tile machine (hours; JAX_SRC=a checkout of jax-v0.10.2, PYTHON=one with"
	@echo "                  jax 0.10.2, absl-py, pytest, hypothesis; ARGS=\"--variants 2 --only 'tpu_ops*'\"; SERVING_SRC=tpu-inference)"
	@echo "make multihost    installs Open MPI; one model over two and four CPU processes, and processes that are killed"
	@echo "make python       the Python package in virtual environments with JAX 0.10.2 and the newest (PAGODA_BIN=... builds no wheel)"
	@echo "make serve-load   OpenAI's client at pagoda serve: 10,000 requests, 200 streams (ARGS=\"--requests 1000\")"
	@echo "make bench        criterion benches (CPU)"
	@echo "make bench-peers  tokens/s against plain JAX on this machine (ARGS=\"--models tiny,135m,1b --busy --peers jax,candle,llama.cpp\")"
	@echo "make tpu-tools    libtpu, the TPU compiler, for certification without a TPU"
	@echo "make certify-all  every certification by the TPU compiler (a quarter of an hour; PAGODA_RECORD=1 renews the tables)"
	@echo "make certify-sample N=200  problems that no table has, by the TPU compiler: how right the verdicts are"
	@echo "make tpu-static   static cycles of the TPU kernels beside the peers'"
	@echo "make tpu-grid N=40 the same over problems and batches that are drawn (SEED=1), beside v3"
	@echo "make cost-points  records what the models of cost are fitted to (PAGODA_COST_SECONDS=600), fits them, says how they rank"
	@echo "make tables       every table of the README that is measured: static cycles, the grid, tokens/s beside plain JAX"
	@echo "make peers        measures the peers' static cycles anew (hours; ARGS=\"--only v2 --quick\" and the like)"

setup:
	@scripts/setup.sh

tpu-tools:
	@scripts/setup.sh tpu

mpi-tools:
	@scripts/setup.sh mpi

demo: setup
	@cargo run --release --quiet -- sample --config examples/configs/demo.yaml

test: tpu-tools
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
	cargo test --workspace --quiet

nightly: setup
	cargo test --test mosaic_check --test sampler --test native_attention -- --ignored
	cargo test --test llama -- --ignored fresh
	cargo test -p pagoda-engine --lib -- --ignored a_million_requests --nocapture
	PAGODA_FUZZ_SECONDS=$${PAGODA_FUZZ_SECONDS:-60} cargo test --test fuzz
	cargo run --manifest-path examples/my_kernel/Cargo.toml --target-dir target --quiet > /dev/null

families:
	@[ -x .pagoda/families/bin/python ] || python3 -m venv .pagoda/families
	@.pagoda/families/bin/python -c 'import torch, transformers' 2>/dev/null || \
	  .pagoda/families/bin/pip install --quiet --disable-pip-version-check torch==2.8.0 transformers==5.24.0
	@.pagoda/families/bin/python scripts/families.py $(ARGS)

jax-suite: setup
	cargo build --quiet -p pagoda-ir --example call
	@$(or $(PYTHON),python3) scripts/jax_suite.py $(ARGS)

multihost: mpi-tools
	cargo test --features mpi --test multihost

python: setup
	@scripts/python.sh

serve-load: setup
	cargo build --release --quiet
	@[ -x .pagoda/serve/bin/python ] || python3 -m venv .pagoda/serve
	@.pagoda/serve/bin/python -c 'import openai' 2>/dev/null || \
	  .pagoda/serve/bin/pip install --quiet --disable-pip-version-check openai==3.57.0
	@.pagoda/serve/bin/python scripts/serve_load.py $(ARGS)

bench: tpu-tools
	cargo bench --workspace

bench-peers: setup
	@scripts/bench-peers.sh $(ARGS)

certify-all: tpu-tools
	cargo test --test certify -- --include-ignored --skip a_sample_of_problems
	cargo test --test llama -- --ignored libtpu
	cargo test --test check -- --ignored --nocapture

certify-sample: tpu-tools
	N=$(or $(N),200) SEED=$(or $(SEED),1) cargo test --test certify -- --ignored --nocapture a_sample_of_problems

tpu-static: tpu-tools
	cargo bench --bench tpu_static

tpu-grid: tpu-tools
	cargo bench --bench tpu_static -- grid $(or $(N),40) --seed $(or $(SEED),1)

cost-points: tpu-tools
	cargo test --test cost -- --ignored --nocapture record
	cargo test --test cost -- --ignored fit
	cargo bench --bench cost

tables: tpu-tools
	cargo bench --bench tpu_static
	cargo bench --bench tpu_static -- grid $(or $(N),40) --seed $(or $(SEED),1)
	cargo bench --bench cost
	@scripts/bench-peers.sh $(ARGS)

peers: tpu-tools
	@scripts/peers.py $(ARGS)
