#!/usr/bin/env bash
# Measures the engine on a machine with an NVIDIA GPU and nothing else: no network, no compiler but nvcc's.
#
#   bench_gpu.sh pack            anywhere, before: sources, wheels and a tokenizer into the folder .gpu (some 40 MB)
#   bench_gpu.sh build [DIR]     there: llama.cpp for the card, its llama-server, an environment (about 6 minutes)
#   bench_gpu.sh run [DIR]       there: the table of bench_engine.py for two shapes of random weights (under 9 minutes)
#
# DIR is where it builds (default /tmp/pestle-gpu). Variables: ARCH (default 90: H100, H200), SHAPES (b1 b8), RUNS (3).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
packed=$root/.gpu
dir=${2:-/tmp/pestle-gpu}
release=$(sed -n 's/^llama_cpp_python==//p' constraints.txt)

say() { printf '%s\n' "$*" >&2; }

pack() {
  rm -rf "$packed" && mkdir -p "$packed/wheels"
  local tmp; tmp=$(mktemp -d); trap "rm -rf '$tmp'" EXIT
  python3 -m pip download -q --no-deps --no-binary :all: -d "$tmp" "llama-cpp-python==$release"
  tar xzf "$tmp"/llama_cpp_python-*.tar.gz -C "$tmp"
  local source=$tmp/llama_cpp_python-$release left_out=()
  for name in models docs media tests '.git*' ggml/src/ggml-{vulkan,sycl,hexagon,opencl,webgpu,cann}; do
    left_out+=(--exclude="vendor/llama.cpp/$name")
  done
  tar cJf "$packed/llama.tar.xz" -C "$source" "${left_out[@]}" vendor/llama.cpp llama_cpp
  for name in litestar litestar-htmx msgspec uvicorn httptools uvloop multipart polyfactory Faker rich-click sniffio \
    click h11 anyio idna; do
    local pinned; pinned=$(grep -i "^${name}==" constraints.txt) || continue
    python3 -m pip download -q --no-deps -d "$packed/wheels" --only-binary=:all: --python-version 3.12 \
      --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 "$pinned" || say "no wheel of $pinned"
  done
  .venv/bin/pip wheel -q --no-deps -w "$packed/wheels" .
  local model; model=$(.venv/bin/python scripts/rebuild_default_checkpoint.py 2>/dev/null)
  mkdir "$packed/tokenizer" && cp "$model"/*.json "$packed/tokenizer/"
  du -sh "$packed" >&2
}

build() {
  mkdir -p "$dir" && cd "$dir"
  tar xJf "$packed/llama.tar.xz"
  [ -d env ] || python3 -m venv --without-pip env
  local site; site=$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  python3 -c 'import site; print("\n".join(site.getsitepackages()))' >"$site/parent.pth" # numpy and others are there
  python3 -m pip --python env/bin/python install -q --no-index --no-deps "$packed"/wheels/*.whl
  cp -r llama_cpp "$site/"
  mkdir -p "$site/llama_cpp_python-$release.dist-info"
  printf 'Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: %s\n' "$release" >"$site/llama_cpp_python-$release.dist-info/METADATA"
  cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90}" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=ON >cmake.log 2>&1 || { tail -20 cmake.log; exit 1; }
  local start=$SECONDS
  ninja -C build llama-server llama-bench llama >build.log 2>&1 || { tail -30 build.log | cut -c1-400; exit 1; }
  say "built in $((SECONDS - start)) s"
  LLAMA_CPP_LIB_PATH=$dir/build/bin LD_LIBRARY_PATH=$dir/build/bin env/bin/python -c \
    'from app.llama.device import gpu_devices; from app.llama.library import build_name; print(gpu_devices(), build_name())'
}

run() {
  cd "$root"
  export LLAMA_CPP_LIB_PATH=$dir/build/bin LD_LIBRARY_PATH=$dir/build/bin LLAMA_SERVER=$dir/build/bin/llama-server
  local python=$dir/env/bin/python shape
  for shape in ${SHAPES:-b1 b8}; do
    [ -f "$dir/$shape.gguf" ] || $python scripts/random_gguf.py --shape "$shape" --tokenizer "$packed/tokenizer" "$dir/$shape.gguf"
    say "$shape: $(stat -c %s "$dir/$shape.gguf") bytes"
    local device=cuda; [ "$shape" = b8 ] && device=cuda-8b
    $python scripts/bench_engine.py --device "$device" --model "$dir/$shape.gguf" --runs "${RUNS:-3}" --threads 8 --pestle "$dir/env/bin/pestle" || true
  done
}

case ${1:-} in
  pack | build | run) "$1" ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
