#!/usr/bin/env bash
# Everything that only a GPU can answer, in one run of at most eight minutes on one H100 or H200:
#
#     CMD_PLUGIN_DATA=DATA benchmarks/gpu.sh [FOLDER FOR RESULTS]
#
# Needs this repository and a Python with torch, triton, pytorch-lightning and what pyproject.toml
# names; nothing is downloaded. Results go to benchmarks/results/*_cuda.jsonl, or to the folder. Each
# part runs by itself: one that fails is named at the end, and the others are there.
# Without a GPU, `QUICK=1 benchmarks/gpu.sh FOLDER` runs all of it small, on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed+=("$name")
}

mkdir -p "$out"
if [ -n "${QUICK:-}" ]; then
    part "kernels" 600 "$python" -m benchmarks.kernels --quick
    part "networks" 600 "$python" -m benchmarks.network_costs --quick
    part "training" 900 "$python" -m benchmarks.cmd_resnet18 --quick
else
    part "tests" 90 "$python" -m pytest -q -m gpu tests/kernels tests/callbacks tests/modes
    part "networks" 60 "$python" -m benchmarks.network_costs --out "$out"
    part "kernels" 150 "$python" -m benchmarks.kernels --sizes 100000000 1000000000 --out "$out"
    part "training" 270 "$python" -m benchmarks.cmd_resnet18 --out "$out/cmd_resnet18_cuda.jsonl"
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed, or took too long: ${failed[*]}" >&2
    exit 1
fi
