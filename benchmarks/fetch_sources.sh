#!/usr/bin/env bash
# Downloads the source archives of the CUDA kernels, for a GPU machine without network (benchmarks/gpu.sh builds them):
#
#     PYTHON=.venv/bin/python benchmarks/fetch_sources.sh [DIR]        DIR is benchmarks/sources where none is given
#
# Needs torch, setuptools and wheel in that Python: the packages' setup.py import them even to tell their names.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$here/sources}
mkdir -p "$target"
export MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
grep -E '^(causal-conv1d|mamba-ssm)==' "$here/../requirements-cuda.txt" | while read -r requirement; do
    "${PYTHON:-python3}" -m pip download --quiet --no-binary :all: --no-deps --no-build-isolation -d "$target" "$requirement"
done
ls -l "$target"
