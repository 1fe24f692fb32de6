#!/usr/bin/env bash
# Kernel tests and benchmarks on a CUDA machine, within ten minutes, without network:
#
#     benchmarks/gpu.sh            # results in $OUT, or where that is not set in benchmarks/results
#     benchmarks/gpu.sh --quick    # toys on whatever is there, to see that the script runs
#
# The machine needs Python 3.11 or newer with PyTorch and Triton. What else is missing comes from benchmarks/wheels, which
# git ignores. Fill it beforehand, for the Python and the platform of the machine, and leave out what is there already:
#
#     pip download --only-binary=:all: --no-deps --python-version 3.12 --implementation cp -d benchmarks/wheels \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#         transformers==5.23.0 accelerate rich pytest psutil \
#         $(pip list --format freeze | grep -iE '^(huggingface.hub|click|fsspec|hf.xet|httpx2?|httpcore2?|anyio|idna|h11|certifi|truststore|filelock|packaging|pyyaml|tqdm|regex|tokenizers|typer|pydantic|pydantic.core|annotated.types|annotated.doc|typing.inspection|typing.extensions|shellingham|markdown.it.py|mdurl|pygments|safetensors|iniconfig|pluggy)=')
#
# PYTHON chooses the interpreter. A part that fails does not keep the next from running, but the script then fails.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
quick=0
if [ "${1:-}" = "--quick" ]; then
    quick=1
elif [ $# -gt 0 ]; then
    echo "usage: benchmarks/gpu.sh [--quick]" >&2
    exit 2
fi
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The folders of the checkout under their installed names, and the wheels that the machine lacks.
mkdir "$work/site" "$work/site/ssm_vlm"
for file in "$root"/ssm_vlm/*; do
    ln -s "$file" "$work/site/ssm_vlm/"
done
for folder in configuration modeling training eval model_cards; do
    ln -s "$root/$folder" "$work/site/ssm_vlm/$folder"
done
if ls "$root"/benchmarks/wheels/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$root"/benchmarks/wheels/*.whl || exit 1
fi
export PYTHONPATH="$work/site:$work/wheels${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

cuda=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
if [ "$cuda" = 0 ] && [ "$quick" = 0 ]; then
    echo "error: there is no CUDA device here; --quick tries the script without one" >&2
    exit 1
fi

failed=0
# limit SECONDS NAME COMMAND...: output to the terminal and to $out/NAME.log
limit() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name"
    if ! timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name failed or took more than $seconds s" >&2
        failed=1
    fi
}

cd "$root" || exit 1
benchmark=("$python" -m ssm_vlm.eval.benchmark)
if [ "$quick" = 1 ]; then
    limit 120 tests "$python" -m pytest -q -p no:cacheprovider tests/benchmarks -k equals
    limit 240 benchmark "${benchmark[@]}" --quick --threads 1 --output "$out"
    exit "$failed"
fi

# On CUDA the tests of the Triton kernels run natively, and those marked gpu run at all.
kernel_tests=(tests/benchmarks tests/modeling/test_inference.py tests/modeling/test_selective_scan_2d*.py)
limit 180 tests "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${kernel_tests[@]}"
# Several runs, so that a part that takes too long costs the others nothing. --budget bounds the slow contenders.
benchmark+=(--device cuda --dtype bfloat16 --output "$out")
plot=()
if "$python" -c 'import matplotlib' 2>/dev/null; then
    plot=(--plot "$out/encoder.png")
fi
limit 90 op "${benchmark[@]}" op --shape 56x56x192 14x14x768 56x56x192x16 --batch 1 64 --budget 4 --label op
limit 170 encoder "${benchmark[@]}" encoder --variant default compiled copy_based copy_based_prebuilt \
    --encoder vmamba_tiny_s1l8.in1k_224 vmamba_small_s2l15.in1k_224 vit_small_patch16.augreg_in1k_224 \
    --size 224 512 1024 1536 2048 --batch 1 128 --budget 6 --label encoder "${plot[@]}"
limit 60 others "${benchmark[@]}" encoder --variant default --batch 1 --rounds 10 --budget 4 --label others \
    --encoder vmamba_base_s2l15.in1k_224 swin_small.in1k_224 convnext_small.in1k_224 vit_base_patch16.augreg_in1k_224 \
    --size 224 384 512 768 1024 800x1333 1536 2048
limit 60 vlm "${benchmark[@]}" vlm --size 224 1024 --rounds 5 --budget 5 --language-model 0.5b 7b --label vlm
exit "$failed"
