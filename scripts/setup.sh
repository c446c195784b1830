#!/usr/bin/env bash
# Brings a bare Debian machine to where Pagoda builds and runs: Debian packages and PJRT plugins.
# Quiet when nothing is to be done; says what it installs; names what is missing when it cannot go on.
#
#   scripts/setup.sh            compiler packages and the CPU plugin
#   scripts/setup.sh tpu        also libtpu, the TPU compiler (Google's terms apply; it is downloaded, never shipped)
#   scripts/setup.sh mpi        also Open MPI, for one model over several CPU processes
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# LLVM/MLIR 22 for melior, libclang for bindgen, protoc and its well-known types for crate pjrt-sys, mold to link.
packages=(llvm-22-dev libmlir-22-dev mlir-22-tools libpolly-22-dev clang-22 libclang-22-dev protobuf-compiler
  libprotobuf-dev libzstd-dev zlib1g-dev mold build-essential)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "not root and no sudo: as root, run: apt-get install ${missing[*]}"; fi
}

install_packages() {
  missing=()
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null || die "no apt-get here; install the equivalents of: ${missing[*]}"
  say "installing Debian packages: ${missing[*]}"
  log=$(mktemp)
  as_root apt-get update >"$log" 2>&1 || { cat "$log" >&2; die "apt-get update failed"; }
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; die "apt-get could not install: ${missing[*]} (log: $log)"; }
  rm -f "$log"
}

# wheel NAME VERSION SHA256 MEMBER [PIP OPTIONS]: unpacks MEMBER of a wheel into .pagoda/plugins.
wheel() {
  local name=$1 version=$2 sha=$3 member=$4
  shift 4
  [ -f ".pagoda/plugins/$member" ] && [ "$(cat ".pagoda/plugins/$name.version" 2>/dev/null)" = "$version $sha" ] && return
  python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
  say "downloading $name $version into .pagoda/plugins"
  mkdir -p .pagoda/plugins
  local tmp
  tmp=$(mktemp -d .pagoda/download.XXXXXX)
  echo "$name==$version --hash=sha256:$sha" >"$tmp/requirements.txt"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: "$@" \
    -d "$tmp" -r "$tmp/requirements.txt" >"$tmp/log" 2>&1 ||
    { tail -n 5 "$tmp/log" >&2; rm -rf "$tmp"; die "wheel $name $version could not be downloaded (is the package index reachable?)"; }
  python3 - "$tmp" ".pagoda/plugins" "$member" <<'PY'
import glob, os, sys, zipfile
tmp, target, member = sys.argv[1:]
archive = zipfile.ZipFile(glob.glob(os.path.join(tmp, "*.whl"))[0])
archive.extract(member, tmp)
os.makedirs(os.path.dirname(os.path.join(target, member)), exist_ok=True)
os.replace(os.path.join(tmp, member), os.path.join(target, member))
PY
  echo "$version $sha" >".pagoda/plugins/$name.version"
  rm -rf "$tmp"
}

command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or later (https://rustup.rs)"
command -v python3 >/dev/null || die "python3 is missing: apt-get install python3"
[ "$(uname -sm)" = "Linux x86_64" ] || say "warning: $(uname -sm) is untested; the plugins' wheels are for Linux x86_64"

install_packages "${packages[@]}"
wheel xla-cpu-pjrt 0.0.1 55837b6b7b47daa717f2d9a5a03563ea0ceaa338d06a81a1e2d3f060d960decc xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so
if [ "${1:-}" = tpu ]; then
  wheel libtpu 0.0.52 f5e2e596eaea9357fbb5a6755a7a9007c6ab75bfde4a55191b03eff402971140 libtpu/libtpu.so --python-version 3.11 --platform manylinux_2_31_x86_64
fi
if [ "${1:-}" = mpi ]; then
  install_packages libopenmpi-dev openmpi-bin
fi
