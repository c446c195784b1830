#!/usr/bin/env bash
# Tests the Python package in virtual environments with JAX 0.10.2 and with the newest JAX, each made anew under target/python.
#
# The newest JAX wants a newer Python than other versions of it: the newest that is found takes it.
#
# The wheel is built first, a release build. With PAGODA_BIN=path/of/pagoda that program is tested with the sources of the module
# instead, and nothing is built.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=target/python
mkdir -p "$folder"

if [[ -z "${PAGODA_BIN:-}" ]]; then
  rm -f "$folder"/wheels/pagoda-*.whl
  python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" .
fi

newest_python() {
  for python in python3.14 python3.13 python3.12 python3; do
    if "$python" -c 'import venv, ensurepip' 2>/dev/null; then echo "$python"; return; fi
  done
  echo "no Python here makes virtual environments (Debian: apt-get install python3-venv)" >&2
  exit 1
}

tested=" "
for jax in ${JAX_VERSIONS:-0.10.2 newest}; do
  venv="$folder/jax-$jax"
  rm -rf "$venv"
  if [[ $jax == newest ]]; then want=jax python=$(newest_python); else want="jax==$jax" python=python3; fi
  "$python" -m venv "$venv"
  if [[ -n "${PAGODA_BIN:-}" ]]; then
    "$venv/bin/pip" install --quiet "$want" numpy pytest xla-cpu-pjrt
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$PWD/python" > "$site/pagoda.pth"
    plugin=(-p pagoda.pytest_plugin)
  else
    "$venv/bin/pip" install --quiet "$want" pytest "$folder"/wheels/pagoda-*.whl
    plugin=()
  fi
  version=$("$venv/bin/python" -c 'import jax; print(jax.__version__)')
  if [[ $tested == *" $version "* ]]; then
    echo "# the $jax JAX is $version, which is tested"
    continue
  fi
  tested+="$version "
  echo "# Python package, JAX $version"
  "$venv/bin/python" -m pytest -q ${plugin[@]+"${plugin[@]}"} python/tests "$@"
done
