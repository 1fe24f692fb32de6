#!/usr/bin/env bash
# Everything that README's table, docs/performance.md and its plot need of a CPU, in some 27 minutes on two cores:
#
#     benchmarks/cpu.sh            # results in $OUT, or where that is not set in benchmarks/results
#     benchmarks/cpu.sh --quick    # toys, to see that the script runs
#     python -m ssm_vlm.eval.benchmark --report    # afterwards: writes the pages from benchmarks/results
#
# Run it on a machine that does nothing else. Results name the commit, so files that differ from it are refused.
# PYTHON chooses the interpreter. A part that fails or takes too long loses its own rows only, but the script then fails.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
quick=0
if [ "${1:-}" = "--quick" ]; then
    quick=1
elif [ $# -gt 0 ]; then
    echo "usage: benchmarks/cpu.sh [--quick]" >&2
    exit 2
fi
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
unset SSM_VLM_SCAN_BACKEND

failed=0
# part SECONDS NAME ARGUMENTS...: one run of the benchmark, with a limit, saved as ..._NAME.json
part() {
    local seconds=$1 name=$2
    shift 2
    echo "== $(date +%T) $name, at most $seconds s"
    if ! timeout "$seconds" "$python" -m ssm_vlm.eval.benchmark "$@" --label "$name" --output "$out"; then
        echo "== $name failed or took more than $seconds s; what it saved before stays" >&2
        failed=1
    fi
}

cd "$root" || exit 1
if [ "$quick" = 1 ]; then
    part 240 quick --quick --threads 1
    exit "$failed"
fi
changes=$(git status --porcelain --untracked-files=no -- . ':(exclude)benchmarks/results')
if [ -n "$changes" ]; then
    printf 'error: commit or set aside these changes first, so that the results name what was measured:\n%s\n' "$changes" >&2
    exit 1
fi

small=vmamba_small_s2l15.in1k_224
vit=vit_small_patch16.augreg_in1k_224
others="vmamba_tiny_s1l8.in1k_224 vmamba_base_s2l15.in1k_224 swin_small.in1k_224 convnext_small.in1k_224
    vit_base_patch16.augreg_in1k_224"

# What the bars compare comes first, and what one bar compares runs side by side in one part. The smallest size of a part
# says how long the others will take, so that calls foreseen to be long are not warmed up.
part 340 bars encoder --encoder $small $vit --variant default compiled chunked copy_based --size 224 --batch 1 16 \
    --rounds 11 --budget 80
part 300 sizes encoder --encoder $small $vit --variant default compiled --size 224 384 512 768 1024 800x1333 --batch 1 \
    --rounds 4 --budget 30
part 150 op op --shape 56x56x192 14x14x768 --batch 1 --rounds 9 --budget 26
part 40 op-16-states op --shape 56x56x192x16 --backend cpp chunked --batch 1 --rounds 9 --budget 6
part 560 large encoder --encoder $small $vit --variant default compiled --size 224 1536 2048 --batch 1 --rounds 3 \
    --budget 130
part 60 bf16 encoder --encoder $small $vit --variant default --size 224 512 --batch 1 16 --dtype bfloat16 --rounds 9 \
    --budget 6
part 230 vlm vlm --vlm-encoder $small --connector mlp2 average_pool_mlp2 pixel_shuffle_mlp2 --language-model 0.5b \
    --size 224 512 1024 --dtype bfloat16 --rounds 3 --budget 45
part 80 vlm-vit vlm --vlm-encoder $vit --connector mlp2 --language-model 0.5b --size 224 512 --dtype bfloat16 \
    --rounds 3 --budget 45
part 190 vlm-7b vlm --vlm-encoder $small --connector mlp2 pixel_shuffle_mlp2 --language-model 7b --size 224 \
    --dtype bfloat16 --rounds 3 --budget 90
# shellcheck disable=SC2086  # names without spaces
part 270 others encoder --encoder $others --variant default --size 224 384 512 768 1024 800x1333 1536 2048 --batch 1 \
    --rounds 3 --budget 18
exit "$failed"
