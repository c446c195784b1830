#!/usr/bin/env bash
# Tokens/s of greedy decode on the tiny model, Pagoda beside plain JAX on this machine, in turn, and their ratios.
# Sets up the peer's venv (.pagoda/peers) on first use. Both leave compile time out.
#
#   scripts/bench-peers.sh [RUNS]     rounds of (JAX, Pagoda); default 3; the median of each counts
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-3}
venv=.pagoda/peers
model=examples/models/tiny-llama-kjv

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import jax; assert jax.__version__ == "0.10.2"' 2>/dev/null; then
  echo "bench-peers: setting up jax 0.10.2 in $venv" >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy >&2
fi
cargo build --release --quiet

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
for ((i = 0; i < runs; i++)); do
  "$venv/bin/python" benches/peers/jax_decode.py "$model" --slots 1 8 --new 256 --dtype f32 | sed 's/^/jax /' >>"$lines"
  target/release/pagoda bench decode --model "$model" --slots 1,8 --new 256 --compute f32 --json | sed 's/^/pagoda /' >>"$lines"
done
python3 - "$lines" <<'PY'
import json, statistics, sys
rates = {}
for line in open(sys.argv[1]):
    who, text = line.split(" ", 1)
    row = json.loads(text)
    rates.setdefault(row["slots"], {}).setdefault(who, []).append(row["tok_s"])
print(f"{'slots':>5}  {'jax tok/s':>10}  {'pagoda tok/s':>12}  ratio")
for slots, by in sorted(rates.items()):
    jax, pagoda = (statistics.median(by[who]) for who in ("jax", "pagoda"))
    print(f"{slots:>5}  {jax:>10.0f}  {pagoda:>12.0f}  {pagoda / jax:.2f}x")
PY
