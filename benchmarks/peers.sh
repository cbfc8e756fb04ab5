#!/usr/bin/env bash
# vtoken beside other packages, each in an environment of its own that looks through to .venv for torch:
#
#     benchmarks/peers.sh [results.json]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/peers.json}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

environment() { # folder, packages...
    local folder=$1
    shift
    if [[ ! -x $folder/bin/python ]]; then
        .venv/bin/python -m venv "$folder"
        .venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
            >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
    fi
}

environment .venv-sparsevlm sparsevlm==0.1.3
# VisionZip patches CLIP as it was up to transformers 4.45
environment .venv-visionzip visionzip==0.1.3 transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.36.0

.venv-sparsevlm/bin/python benchmarks/peers.py llm --out "$out"
.venv-visionzip/bin/python benchmarks/peers.py visionzip --out "$out"
.venv/bin/python benchmarks/peers.py tower --out "$out"
