#!/usr/bin/env bash
# run.sh COMMAND...: runs a command with an emulated NVIDIA GPU; see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$here/../../target/cuda-emulator
mkdir -p "$build/lib" "$build/kernels" "$build/cache"
cp "$here"/*.h "$here"/*.cuh "$build"
if [ "$here/fake.cpp" -nt "$build/lib/libcuda.so.1" ]; then
    g++ -std=c++17 -O1 -w -shared -fPIC "$here/fake.cpp" -o "$build/lib/libcuda.so.1" -ldl -Wl,-soname,libcuda.so.1
    ln -sf libcuda.so.1 "$build/lib/libcuda.so"
fi
export EMU_DIR=$build EMU_SMS=${EMU_SMS:-8} LD_LIBRARY_PATH=$build/lib TQKV_NVRTC=$build/lib/libcuda.so.1 TQKV_CACHE_DIR=$build/kernels TQKV_REQUIRE=cuda
exec "$@"
