#!/bin/sh
# Results that need a GPU, on the first one that torch sees:
#
#   benchmarks/gpu.sh [FOLDER]        FOLDER of the JSON files (default: benchmarks/results)
#   ONLY="stage1_vitg tower_vitg_float8" benchmarks/gpu.sh    these alone, by the names of the files
#
# Nothing is downloaded: weights are random, shards are rendered. What matters most comes first; a
# command that fails or takes too long is named at the end and does not stop the others. To try it on
# a processor, see tests/test_benchmark_script.py: the variables below make everything small.
set -u
out=${1:-benchmarks/results}
only=${ONLY:-}
stage1=${STAGE1:-vitg}                       # presets
stage2=${STAGE2-vitg_opt2_7b vitg_flant5xl}
overrides=${OVERRIDES:-}                     # of all commands
overrides2=${OVERRIDES2:-}                   # of stage 2
rounds=${ROUNDS:-10}
samples=${SAMPLES:-4096}                     # rendered images
batch=${BATCH:-128}
fits=${FITS-stage1_vitg stage1_vitl stage2_vitg_opt2_7b stage2_vitg_flant5xl}
memory=${MEMORY:+--memory $MEMORY}            # empty: this GPU's, in which steps are really run
seconds=${SECONDS_EACH:-600}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
failed=

run() { # NAME COMMAND...
    name=$1
    shift
    echo "== $name"
    timeout --foreground "$seconds" "$@" || failed="$failed $name"
}

wanted() { # NAME
    case " ${only:-$1} " in *" $1 "*) true ;; *) false ;; esac
}

measure() { # NAME SUBJECT ARGUMENT...
    name=$1 subject=$2
    shift 2
    wanted "$name" || return 0
    run "$name" blip2-benchmark "$subject" --json "$out/$name.json" "$@"
}

steps="--rounds $rounds --batch $batch"
whole="data.crop_scale=null data.flip=0"
float8="vision.precision=float8 vision.dtype=bfloat16"
# shellcheck disable=SC2086  # lists of words
{
    measure "stage1_$stage1" stage1 --preset "$stage1" $steps $overrides
    measure "stage1_${stage1}_float8" stage1 --preset "$stage1" $steps $overrides $float8
    measure "stage1_${stage1}_cached" stage1 --preset "$stage1" $steps \
        $overrides data.features=cached $whole
    for preset in $stage2; do
        measure "stage2_$preset" stage2 --preset "$preset" $steps $overrides $overrides2
    done
    measure "tower_$stage1" tower --preset "$stage1" $steps $overrides
    measure "tower_${stage1}_float8" tower --preset "$stage1" $steps $overrides $float8

    # through the loader: pictures, and cached features of the same random tower
    if wanted "stage1_${stage1}_loader" || wanted "stage1_${stage1}_cached_loader"; then
        run shards blip2-prepare synthetic --out "$work/synthetic" --samples "$samples" --size 256 \
            --tokenizer 300
        run features blip2-prepare features "$work/synthetic" --split train --batch "$batch" \
            "experiment=stage1_$stage1" vision.weights=random $overrides
    fi
    shards="data=synthetic data.root=$work text.tokenizer=$work/synthetic/tokenizer"
    shards="$shards text.vocab_size=null"
    measure "stage1_${stage1}_loader" stage1 --preset "$stage1" $steps --loader $overrides $shards
    measure "stage1_${stage1}_cached_loader" stage1 --preset "$stage1" $steps --loader \
        $overrides $shards data.features=cached $whole

    for experiment in $fits; do
        measure "fit_$experiment" fit $memory "experiment=$experiment" $overrides
    done
}
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
