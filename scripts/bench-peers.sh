#!/usr/bin/env bash
# Greedy decode and prefill, Pagoda beside plain JAX, candle and llama.cpp on this machine, in turn, and their ratios: the median
# of each counts. Compile time is left out. Sets up the peers (venv .pagoda/peers, target/candle) on first use; the larger models
# are drawn from a seed into a temporary folder.
#
#   scripts/bench-peers.sh [--rounds 5] [--models tiny,135m,1b] [--peers jax,candle,llama.cpp] [--slots 1,8] [--prefill 512]
#                          [--new 256] [--busy]
#     --peers    llama.cpp is compiled by pip, which takes ten minutes  [default: jax]
#     --models   tiny (f32), 135m (f32 and bf16), 1b (bf16)                            [default: tiny]
#     --prefill  tokens of a prompt that is prefilled in one call; 0: none
#     --busy     measures beside one busy neighbour too: a process that keeps a core
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=5 models=tiny peers=jax slots=1,8 prefill=512 new=256 busy=
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --models) models=$2; shift 2 ;;
    --peers) peers=$2; shift 2 ;;
    --slots) slots=$2; shift 2 ;;
    --prefill) prefill=$2; shift 2 ;;
    --new) new=$2; shift 2 ;;
    --busy) busy=1; shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
venv=.pagoda/peers
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import jax; assert jax.__version__ == "0.10.2"' 2>/dev/null; then
  echo "bench-peers: setting up jax 0.10.2 in $venv" >&2
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy >&2
fi
cargo build --release --quiet
for peer in ${peers//,/ }; do
  case $peer in
    jax) ;;
    candle) cargo build --release --quiet --locked --manifest-path benches/peers/candle/Cargo.toml --target-dir target/candle ;;
    llama.cpp)
      if ! "$venv/bin/python" -c 'import llama_cpp, gguf; assert llama_cpp.__version__ == "0.3.36"' 2>/dev/null; then
        echo "bench-peers: compiling llama.cpp into $venv" >&2
        "$venv/bin/pip" install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 gguf==0.19.0 >&2
      fi ;;
    *) echo "bench-peers: --peers $peer: jax, candle or llama.cpp" >&2; exit 2 ;;
  esac
done

work=$(mktemp -d)
neighbour=
trap '[ -z "$neighbour" ] || kill "$neighbour" 2>/dev/null; rm -rf "$work"' EXIT
for model in ${models//,/ }; do
  case $model in
    tiny) cp -r examples/models/tiny-llama-kjv "$work/tiny" ;; # llama.cpp's copy of a model lies beside it
    *) "$venv/bin/python" scripts/draw_model.py "$model" "$work/$model" ;;
  esac
done

lines=$work/lines
one() { # beside model dtype
  local dir="$work/$2" key="$1 $2 $3" peer
  for peer in ${peers//,/ }; do
    local peer_command
    case $peer in
      jax) peer_command=("$venv/bin/python" benches/peers/jax_decode.py) ;;
      candle) peer_command=(target/candle/release/candle-decode) ;;
      llama.cpp) peer_command=("$venv/bin/python" benches/peers/llamacpp_decode.py) ;;
    esac
    "${peer_command[@]}" "$dir" --slots ${slots//,/ } --new "$new" --dtype "$3" --prefill "$prefill" |
      sed "s/^/$peer $key /" >>"$lines"
  done
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
peers = [peer for peer in ("jax", "candle", "llama.cpp") if any((("quiet", peer) in by) for by in rates.values())]
columns = "".join(f"{peer + ' tok/s':>17}{'ratio':>8}" for peer in peers)
print(f"{'model':<6}{'type':<6}{'what':<14}{'beside':<8}{'pagoda tok/s':>14}{'of quiet':>10}{columns}")
for (model, dtype, what), by in sorted(rates.items()):
    for beside in ("quiet", "busy"):
        pagoda = median(by, (beside, "pagoda"))
        if pagoda == pagoda:
            theirs = [median(by, (beside, peer)) for peer in peers]
            columns = "".join(f"{rate:>17.0f}{pagoda / rate:>7.2f}x" for rate in theirs)
            share = pagoda / median(by, ("quiet", "pagoda"))
            print(f"{model:<6}{dtype:<6}{what:<14}{beside:<8}{pagoda:>14.0f}{share:>10.2f}{columns}")
PY
