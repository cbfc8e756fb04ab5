#!/usr/bin/env bash
# Every GPU figure of docs/performance.md in one go, in at most ten minutes on one H100:
#
#     benchmarks/gpu.sh                                   # the published shapes in bfloat16
#     benchmarks/gpu.sh --device cpu --scale tiny         # a rehearsal without a GPU: seconds instead of minutes
#     benchmarks/gpu.sh --python python3 --out /tmp/gpu   # another interpreter, another folder
#     benchmarks/gpu.sh --part video                      # only the way from a video file to an answer
#     benchmarks/gpu.sh --part cache                      # only the strategies of the KV cache
#
# Parts: the kernel tests, compute-sanitizer over them if it is there, the kernels at 7B shapes, every model shape with every
# strategy. Each part runs in a process of its own under a time limit and writes as it goes: one that fails, hangs or is killed
# does not lose the others. The last lines say which parts failed; the exit code counts them.
set -uo pipefail
cd "$(dirname "$0")/.."

part=models device=cuda scale=full kernel_shape=7b out=benchmarks/results/gpu python=.venv/bin/python
while (($#)); do
    case $1 in
        --device) device=$2 ;; --scale) scale=$2 ;; --out) out=$2 ;; --python) python=$2 ;; --part) part=$2 ;;
        *) echo "unknown option $1: --device, --scale, --out, --python, --part" >&2; exit 2 ;;
    esac
    shift 2
done
# seconds: kernel tests, sanitizer, one group of kernel cases; of measuring each model shape, and of building it
tests=80 sanitize=25 kernels=35 build=15 repeats=5 kernel_repeats=20 decode=64
declare -A limits=([llava-1.5-7b]=35 [llava-next-7b]=50 [qwen2.5-vl-7b-image]=40 [qwen2.5-vl-7b-video]=50
    [qwen3-vl-8b-video]=45 [llava-onevision-7b-video]=55)
if [[ $scale != full ]]; then # a rehearsal: few turns, and patience with a busy CPU
    kernel_shape=small repeats=1 kernel_repeats=2 decode=2 tests=600 kernels=300 build=300
fi
mkdir -p "$out"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ $part == video ]]; then
    small=()
    [[ $scale == full ]] || small=(--seconds 2 --size 144 176 --frames 8 --repeats 1 --steps 2)
    exec "$python" benchmarks/video.py --scale "$scale" --device "$device" --out "$out/video.json" "${small[@]}"
fi
if [[ $part == cache ]]; then
    small=()
    [[ $scale == full ]] || small=(--tokens 1k --turns 2)
    exec "$python" benchmarks/cache.py --scale "$scale" --device "$device" --dtype bfloat16 --out "$out/cache.json" "${small[@]}"
fi
rm -f "$out"/{models,kernels}.json # what there is would be joined
failed=()

part() { # name, seconds, command...
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    echo "=== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    echo "=== $name: exit code $code after $((SECONDS - began)) s"
    ((code == 0)) || failed+=("$name($code)")
}

[[ $device == cuda ]] && part device 10 nvidia-smi
part kernel-tests $tests "$python" -m pytest -q -p no:cacheprovider -n 0 tests/kernels -m gpu
for group in 'gather|kv' attention 'match|point|map'; do
    part "kernels-${group//|/-}" $kernels "$python" benchmarks/kernels.py --device "$device" --shape $kernel_shape \
        --repeats $kernel_repeats --only "$group" --out "$out/kernels.json"
done
for name in llava-1.5-7b llava-next-7b qwen2.5-vl-7b-image qwen2.5-vl-7b-video qwen3-vl-8b-video llava-onevision-7b-video; do
    part "model-$name" $((limits[$name] + build)) "$python" -m vtoken bench --shape "$name" --scale "$scale" \
        --device "$device" --repeats $repeats --decode $decode --limit "${limits[$name]}" --output "$out/models.json" \
        --plot "$out/models.png"
done
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    # small shapes: the sanitizer slows kernels down by orders of magnitude
    part sanitizer $sanitize "$sanitizer" --error-exitcode 1 "$python" benchmarks/kernels.py --device "$device" \
        --shape small --repeats 1 --only 'gather|kv|attention|match|point|map'
fi
echo "=== $SECONDS s in all; results in $out"
((${#failed[@]} == 0)) || echo "=== failed: ${failed[*]}"
exit ${#failed[@]}
