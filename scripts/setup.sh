#!/usr/bin/env bash
# Makes .venv. Without an argument: what serving and quantizing need, llama.cpp compiled for ACCEL (cpu, cuda or metal).
# `setup.sh dev` adds what the tests and checks need.
set -euo pipefail
cd "$(dirname "$0")/.."
python3=${PYTHON3:-python3}
venv=.venv

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

detect() {
  if [ "$(uname -s)" = Darwin ] && [ "$(uname -m)" = arm64 ]; then echo metal
  elif command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then echo cuda
  else echo cpu; fi
}

# Runs a long command quietly, with the time that has passed on a terminal; shows the end of its log when it fails.
quietly() {
  local what=$1 log status=0 start=$SECONDS; shift
  log=$(mktemp)
  "$@" >"$log" 2>&1 & local pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ -t 2 ]; then printf '\r%s: %d s ' "$what" $((SECONDS - start)) >&2; fi
    sleep 0.5
  done
  wait "$pid" || status=$?
  if [ -t 2 ]; then printf '\r' >&2; fi
  if [ $status -eq 0 ]; then say "$what: done in $((SECONDS - start)) s"; else tail -40 "$log" >&2; fi
  rm -f "$log"
  return $status
}

"$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || die "$python3 is missing or older than Python 3.11; set PYTHON3 to a newer one"
[ -x $venv/bin/python ] || "$python3" -m venv $venv || die "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"

if [ "${1:-}" = dev ]; then
  quietly "Installing the development tools" $venv/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' || die "pip failed: see above"
  touch $venv/.dev
  exit 0
fi

built=$(cat $venv/.accel 2>/dev/null || true)
accel=${ACCEL:-${built:-$(detect)}}
case $accel in
  cpu)   options="" ;;
  cuda)  options="-DGGML_CUDA=on" ;;
  metal) options="-DGGML_METAL=on" ;;
  *)     die "ACCEL is cpu, cuda or metal, not '$accel'" ;;
esac
if [ "$built" != "$accel" ] || ! $venv/bin/python -c 'import llama_cpp' 2>/dev/null; then
  command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || die "no C compiler; on Debian: apt-get install build-essential, on macOS: xcode-select --install"
  say "Compiling llama.cpp for $accel: about 8 minutes on two cores"
  # pip's wheel cache does not know which device a wheel was compiled for: only the plain build may use it
  fresh=(); if [ "$accel" != cpu ]; then fresh=(--no-cache-dir); fi
  if [ -n "$built" ]; then fresh=(--no-cache-dir --force-reinstall --no-deps); fi
  CMAKE_ARGS="$options ${CMAKE_ARGS:-}" quietly "llama-cpp-python" $venv/bin/pip install --disable-pip-version-check "${fresh[@]}" -c constraints.txt llama-cpp-python || die "llama.cpp did not compile: see above"
  echo "$accel" >$venv/.accel
fi
quietly "Installing Pestle" $venv/bin/pip install --disable-pip-version-check -c constraints.txt -e . || die "pip failed: see above"
[ -f quantize/native/kernels.so ] || say "No kernels of Pestle's own (no C compiler, or not x86-64): ggml quantizes, to the same bytes in more time"
$venv/bin/python -m compileall -q app quantize # so that the first start is as fast as the second
touch $venv/.runtime
