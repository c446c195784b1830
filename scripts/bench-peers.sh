#!/usr/bin/env bash
# Greedy decode and prefill, Pagoda beside plain JAX on this machine, in turn, and their ratios: the median of each counts.
# Compile time is left out. Sets up the peer's venv (.pagoda/peers) on first use; the larger models are drawn from a seed into a
# temporary folder.
#
#   scripts/bench-peers.sh [--rounds 5] [--models tiny,135m,1b] [--slots 1,8] [--prefill 512] [--new 256] [--busy]
#     --models   tiny (f32), 135m (f32 and bf16), 1b (bf16)                            [default: tiny]
#     --prefill  tokens of a prompt that is prefilled in one call; 0: none
#     --busy     measures beside one busy neighbour too: a process that keeps a core
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=5 models=tiny slots=1,8 prefill=512 new=256 busy=
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --models) models=$2; shift 2 ;;
    --slots) slots=$2; shift 2 ;;
    --prefill) prefill=$2; shift 2 ;;
    --new) new=$2; shift 2 ;;
    --busy) busy=1; shift ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
venv=.pagoda/peers
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import jax; assert jax.__version__ == "0.10.2"' 2>/dev/null; then
  echo "bench-peers: setting up jax 0.10.2 in $venv" >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy >&2
fi
cargo build --release --quiet

work=$(mktemp -d)
neighbour=
trap '[ -z "$neighbour" ] || kill "$neighbour" 2>/dev/null; rm -rf "$work"' EXIT
folder() { if [ "$1" = tiny ]; then echo examples/models/tiny-llama-kjv; else echo "$work/$1"; fi; }
for model in ${models//,/ }; do
  [ "$model" = tiny ] || "$venv/bin/python" scripts/draw_model.py "$model" "$work/$model"
done

lines=$work/lines
one() { # beside model dtype
  local dir; dir=$(folder "$2")
  local key="$1 $2 $3"
  "$venv/bin/python" benches/peers/jax_decode.py "$dir" --slots ${slots//,/ } --new "$new" --dtype "$3" --prefill "$prefill" |
    sed "s/^/jax $key /" >>"$lines"
  target/release/pagoda bench decode --model "$dir" --slots "$slots" --new "$new" --compute "$3" --json |
    sed "s/^/pagoda $key /" >>"$lines"
  if [ "$prefill" -gt 0 ]; then
    target/release/pagoda bench step --model "$dir" --slots 1 --prompt "$prefill" --new 2 --compute "$3" --seconds 3 |
      tr -d '\n' | sed "s/^/pagoda $key /; s/$/\n/" >>"$lines"
  fi
}
for ((round = 1; round <= rounds; round++)); do
  for beside in quiet ${busy:+busy}; do
    if [ "$beside" = busy ]; then
      sh -c 'while :; do :; done' &
      neighbour=$!
    fi
    for model in ${models//,/ }; do
      case $model in tiny) dtypes=f32 ;; 135m) dtypes='f32 bf16' ;; *) dtypes=bf16 ;; esac
      for dtype in $dtypes; do
        echo "bench-peers: round $round of $rounds, $beside, $model $dtype" >&2
        one "$beside" "$model" "$dtype"
      done
    done
    if [ -n "$neighbour" ]; then kill "$neighbour"; wait "$neighbour" 2>/dev/null || true; neighbour=; fi
  done
done
python3 - "$lines" <<'PY'
import json, statistics, sys
rates = {}
for line in open(sys.argv[1]):
    who, beside, model, dtype, text = line.split(" ", 4)
    row = json.loads(text)
    if "prefill" in row:  # `pagoda bench step`, or the peer's prefill
        what, rate = f"prefill {row['prompt']}", row["prefill"]["tok_s"]
    else:
        what, rate = f"{row['slots']} slots", row["tok_s"]
    rates.setdefault((model, dtype, what), {}).setdefault((beside, who), []).append(rate)
median = lambda by, key: statistics.median(by[key]) if key in by else float("nan")
print(f"{'model':<6}{'type':<6}{'what':<14}{'beside':<8}{'jax tok/s':>10}{'pagoda tok/s':>14}{'ratio':>8}{'of quiet':>10}")
for (model, dtype, what), by in sorted(rates.items()):
    for beside in ("quiet", "busy"):
        jax, pagoda = (median(by, (beside, who)) for who in ("jax", "pagoda"))
        if pagoda == pagoda:
            share = pagoda / median(by, ("quiet", "pagoda"))
            print(f"{model:<6}{dtype:<6}{what:<14}{beside:<8}{jax:>10.0f}{pagoda:>14.0f}{pagoda / jax:>7.2f}x{share:>10.2f}")
PY
