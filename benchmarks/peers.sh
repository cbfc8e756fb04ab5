#!/usr/bin/env bash
# vtoken compared with other packages, each in an environment of its own that looks through to .venv for torch:
#
#     benchmarks/peers.sh [results.json [repeats]]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/peers.json} repeats=${2:-3}
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
# VisionZip patches CLIP as it was up to transformers 4.45. Its source distribution installs no module (its setup.py looks for
# packages in the wrong folder), so that it is unpacked instead.
environment .venv-visionzip transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.36.0 \
    requests urllib3 charset-normalizer certifi idna
source=.venv-visionzip/visionzip-0.1.3
if [[ ! -d $source ]]; then
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
        --dest .venv-visionzip visionzip==0.1.3
    tar -xzf $source.tar.gz -C .venv-visionzip
fi

PYTHONPATH=$source .venv-visionzip/bin/python benchmarks/peers.py visionzip --out "$out" --repeats "$repeats"
.venv/bin/python benchmarks/peers.py tower --out "$out" --repeats "$repeats"
.venv-sparsevlm/bin/python benchmarks/peers.py llm --out "$out" --repeats "$repeats"
