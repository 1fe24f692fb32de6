#!/usr/bin/env bash
# Kernel tests and benchmarks on a CUDA machine, within ten minutes, without network:
#
#     benchmarks/gpu.sh            # results in $OUT, or where that is not set in benchmarks/results
#     benchmarks/gpu.sh --quick    # toys on whatever is there, to see that the script runs
#     python -m ssm_vlm.eval.benchmark --report    # afterwards, anywhere: writes the pages from benchmarks/results
#
# The machine needs Python 3.11 or newer with PyTorch and Triton. What else is missing comes from benchmarks/wheels, which
# git ignores. Fill it beforehand, for the Python of the machine (53 MB; leave out what is there already):
#
#     pip download --only-binary=:all: --no-deps --python-version 3.12 --implementation cp -d benchmarks/wheels \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64 -c constraints.txt -r benchmarks/gpu_wheels.txt
#
# PYTHON chooses the interpreter; COMMIT names the commit where this is a copy without git. Every part has a limit and a
# results file of its own: one that fails or takes too long costs the others nothing, but the script then fails.
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
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1  # else the folder ssm_vlm here hides the package
unset SSM_VLM_SCAN_BACKEND

cuda=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
if [ "$cuda" = 0 ] && [ "$quick" = 0 ]; then
    echo "error: there is no CUDA device here; --quick tries the script without one" >&2
    exit 1
fi

failed=0
log=$out/gpu.log
: >"$log"
# limit SECONDS NAME COMMAND...: output to the terminal and to the log
limit() {
    local seconds=$1 name=$2
    shift 2
    echo "== $(date +%T) $name, at most $seconds s" | tee -a "$log"
    if ! timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$log"; then
        echo "== $name failed or took more than $seconds s; what it saved before stays" | tee -a "$log" >&2
        failed=1
    fi
}

cd "$root" || exit 1
benchmark=("$python" -m ssm_vlm.eval.benchmark --output "$out" ${COMMIT:+--commit "$COMMIT"})
if [ "$quick" = 1 ]; then
    limit 120 tests "$python" -m pytest -q -p no:cacheprovider tests/benchmarks -k equals
    limit 240 benchmark "${benchmark[@]}" --quick --threads 1
    exit "$failed"
fi

small=vmamba_small_s2l15.in1k_224
vit=vit_small_patch16.augreg_in1k_224
copies=(copy_based copy_based_prebuilt copy_based_own_scan)
benchmark+=(--device cuda --dtype bfloat16)
# On CUDA the tests of the Triton kernels run natively, and those marked gpu run at all.
kernel_tests=(tests/modeling/test_selective_scan_2d_triton.py tests/modeling/test_inference.py tests/benchmarks
    tests/modeling/test_selective_scan_2d.py tests/modeling/test_selective_scan_2d_op.py)
limit 150 tests "$python" -m pytest -q -p no:cacheprovider -m "not slow" --durations=5 "${kernel_tests[@]}"
# What the bars compare comes first. --budget bounds what is slow, such as copies that torch's loop scans.
limit 90 encoder "${benchmark[@]}" encoder --encoder $small $vit --variant default compiled \
    --size 224 512 1024 1536 2048 --batch 1 --rounds 20 --budget 5 --label encoder
limit 120 op "${benchmark[@]}" op --backend triton "${copies[@]}" --shape 14x14x768 56x56x192 --batch 64 \
    --rounds 20 --budget 30 --label op
limit 75 batch "${benchmark[@]}" encoder --encoder $small $vit --variant default "${copies[@]}" \
    --size 224 --batch 128 --rounds 10 --budget 10 --label batch
limit 55 vlm "${benchmark[@]}" vlm --vlm-encoder $small $vit --connector mlp2 average_pool_mlp2 --size 224 1024 \
    --rounds 5 --budget 4 --language-model 0.5b 7b --label vlm
limit 40 others "${benchmark[@]}" encoder --variant default --batch 1 --rounds 10 --budget 3 --label others \
    --encoder vmamba_tiny_s1l8.in1k_224 vmamba_base_s2l15.in1k_224 swin_small.in1k_224 convnext_small.in1k_224 \
    vit_base_patch16.augreg_in1k_224 --size 224 384 512 768 1024 800x1333 1536 2048
limit 30 op-1 "${benchmark[@]}" op --backend naive triton "${copies[@]}" --shape 56x56x192 56x56x192x16 --batch 1 --rounds 10 \
    --budget 3 --label op-1
exit "$failed"
