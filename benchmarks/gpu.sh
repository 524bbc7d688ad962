#!/usr/bin/env bash
# Every check that needs a CUDA GPU, in one command, on a bare machine without network:
#
#     benchmarks/gpu.sh [--sources DIR] [--data DIR] [--site DIR] [--steps "build kernels ..."] [--quick]
#
# It wants a Python with torch for CUDA, numpy, h5py, pyyaml, einops and tqdm (PYTHON=...), and nvcc. Demonstrations travel
# there with benchmarks/carry_demos.py.
#
#     --sources   what fetch_sources.sh has downloaded (benchmarks/sources)
#     --data      demonstrations with their language embeddings; made up where none are given
#     --site      where the built kernels are kept and, the next time, found (a temporary folder)
#     --steps     which of: build kernels memory throughput latency training compile (all)
#
# Results go to $OUT, or to benchmarks/results. No step takes longer than its limit, and one that fails does not stop the
# others. Without a GPU all of it runs small on the CPU.
set -u
from=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} sources=$PWD/benchmarks/sources data= site= quick=
steps="build kernels memory throughput latency training compile"
absolute() { case $1 in /*) echo "$1" ;; *) echo "$from/$1" ;; esac; } # from where the command was given
while [ $# -gt 0 ]; do
    case $1 in
    --sources) sources=$(absolute "$2"); shift 2 ;;
    --data) data=$(absolute "$2"); shift 2 ;;
    --site) site=$(absolute "$2"); shift 2 ;;
    --steps) steps=$2; shift 2 ;;
    --quick) quick=--quick; shift ;;
    *) echo "error: unknown argument $1; see the head of this file" >&2; exit 2 ;;
    esac
done
[[ $python == */* && $python != /* ]] && python=$from/$python
"$python" -c "import torch" || { echo "error: $python has no torch; choose another with PYTHON=..." >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=${site:-$work/site} summary=()
mkdir -p "$site" && site=$(cd "$site" && pwd)
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TQDM_DISABLE=1 TQDM_MININTERVAL=60
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && gpu=yes || gpu=

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS status=ok
    shift 2
    echo
    echo "=== $name"
    timeout "$limit" "$@" || status="failed with exit $?"
    summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$status")")
    [ "$status" = ok ]
}

# One target instead of nine: both setup.py write their list of targets into cc_flag and look at no variable, so a copy
# gets the one architecture of this GPU in its place. And only the types that this code uses, float32 and bfloat16: with
# all of them causal_conv1d_bwd.cu alone takes a core six minutes and a half, with these two a third of that.
build() {
    local archive directory capability
    [ -d "$site/mamba_ssm" ] && { echo "found in $site"; return; }
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-$(nproc)}
    for archive in "$sources"/causal_conv1d-*.tar.gz "$sources"/mamba_ssm-*.tar.gz; do
        [ -f "$archive" ] || { echo "no $archive; run benchmarks/fetch_sources.sh where there is a network"; return 1; }
        tar xzf "$archive" -C "$work"
        directory=$work/$(basename "$archive" .tar.gz)
        sed -i "s/+ cc_flag\(,\{0,1\}\)\$/+ [\"-gencode\", \"arch=compute_$capability,code=sm_$capability\"]\1/" "$directory/setup.py"
        grep -q "code=sm_$capability\"\]" "$directory/setup.py" || { echo "setup.py of $archive has changed"; return 1; }
        sed -i -E '/complex_t|at::Half|<float, at::BFloat16>/s/^template void (.*)\((\w+) &params, cudaStream_t stream\);/template <> void \1(\2 \&, cudaStream_t) { throw std::runtime_error("left out of this build"); }/' \
            "$directory"/csrc/*.cu "$directory"/csrc/*/*.cu 2>/dev/null
        echo "building $(basename "$directory") for sm_$capability"
        if ! "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-cache-dir --no-compile \
            --target "$site" "$directory" >"$work/build.log" 2>&1; then
            grep -E "error|Error" "$work/build.log" | head -n 20
            tail -n 30 "$work/build.log"
            return 1
        fi
    done
    # mamba_ssm/__init__.py imports all models of the package, some of which need more than a bare machine has.
    cd "$work"
    if ! "$python" -c "from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn"; then
        echo "the package's own __init__ cannot be imported here; it is emptied for this run"
        grep __version__ "$site/mamba_ssm/__init__.py" >"$work/version"
        cp "$work/version" "$site/mamba_ssm/__init__.py"
        "$python" -c "from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn"
    fi
}

wanted() { [[ " $steps " == *" $1 "* ]]; }

if [ -z "$gpu" ]; then
    echo "no GPU here: everything runs small on the CPU; the rows of CUDA kernels, graphs and bf16 will be missing"
    summary+=("build          missing: no GPU")
elif wanted build; then
    nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader
    export -f build
    export python sources work site
    step build 360 bash -c build
fi
wanted kernels && step kernels 90 "$python" benchmarks/gpu.py kernels $quick
wanted memory && step memory 120 "$python" benchmarks/gpu.py memory $quick
wanted throughput && step throughput 180 "$python" benchmarks/gpu.py throughput $quick
wanted latency && step latency 60 "$python" benchmarks/latency.py $quick

# A real training through train.py, of a minute or two, then the offline evaluation.
if wanted training; then
    runs=$work/runs settings=(--config conf/config.yaml)
    demos=(--demos 10 --steps 120 --image_size 128)
    if [ -n "$gpu" ] && [ -z "$quick" ]; then
        settings+=(--set data.cache=gpu --set training.phase1.num_epochs=20 --set training.phase2.num_epochs=50)
    else
        demos=(--demos 4 --steps 24 --image_size 32)
        settings+=(--set model.encoder_depth=1 --set model.image_size=32 --set training.batch_size=8
            --set training.phase1.num_epochs=1 --set training.phase2.num_epochs=1 --set training.log_interval=1)
    fi
    if [ -z "$data" ]; then
        data=$work/data
        step data 60 "$python" benchmarks/synthetic_demos.py "$data" "${demos[@]}"
    fi
    settings+=(--set "data.data_directory=$data" --set "data.cache_directory=$work/frames"
        --set "training.checkpoint_directory=$runs")
    step phase1 150 "$python" train.py "${settings[@]}" --phase 1 &&
        step phase2 90 "$python" train.py "${settings[@]}" --phase 2 \
            --phase1_checkpoint "$runs/phase1_temporal_jepa/checkpoint_best.pt" &&
        step eval 60 "$python" eval.py --checkpoint "$runs/phase2_flow_matching/checkpoint_best.pt"
    step logged 30 "$python" benchmarks/gpu.py training "$runs" $quick
fi

[ -n "$gpu" ] && wanted compile && step compile 120 "$python" benchmarks/latency.py --compile $quick

echo
echo "=== summary"
printf '%s\n' "${summary[@]}"
