#!/usr/bin/env bash
# What needs a GPU, in the order of its worth, for a machine that is lent for minutes: no network, one GPU, torch there.
#
#     WHEELS=DIR RESULTS=DIR bash benchmarks/gpu.sh [tests] [speed] [-- OPTIONS OF benchmarks.gpu]
#
# WHEELS holds what the machine lacks, and is installed first: megatron-core, emerging-optimizers, transformers 4.57 with
# its tokenizers and huggingface_hub; mamba-ssm and causal-conv1d built for the machine's torch, and
# flash-linear-attention, to compare with. `tests` takes about two minutes on 16 cores, `speed` half a minute a model.
# Everything is written to RESULTS as it comes. Rehearse on a CPU: bash benchmarks/gpu.sh speed -- --rehearse
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-runs/gpu}
mkdir -p "$RESULTS"

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site \
        "$WHEELS"/*.whl || exit
    export PYTHONPATH=/tmp/site
fi
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONWARNINGS=ignore
nvidia-smi | tee "$RESULTS/nvidia-smi.txt"

parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do parts+=("$1"); shift; done
[ $# -gt 0 ] && shift
status=0
for part in "${parts[@]}"; do
    date +%T
    case $part in
    tests)
        # Whole models in fp32 against the float64 reference run on whatever device there is: here, on the GPU.
        timeout "${TESTS_SECONDS:-240}" "$PYTHON" -m pytest -n 12 --dist worksteal -q --durations 15 --tb short \
            -p no:cacheprovider -p benchmarks.gpu.journal --journal "$RESULTS/tests.txt" \
            -m "gpu or not slow" -k "gpu or test_model_is or test_bf16 or as_if_alone" \
            tests/ops tests/gpu tests/model/test_reference.py tests/model/test_documents.py >"$RESULTS/tests.log" 2>&1 \
            || status=1
        grep -E "^(PASSED|FAILED|ERROR|SKIPPED) " "$RESULTS/tests.txt" | cut -d " " -f 1 | sort | uniq -c
        grep -E "^FAILED " "$RESULTS/tests.txt" | cut -c 1-200 | tail -60
        ;;
    speed) timeout 560 "$PYTHON" -m benchmarks.gpu --output "$RESULTS" "$@" || status=1 ;;
    *) echo "benchmarks/gpu.sh: $part: give tests or speed"; exit 2 ;;
    esac
done
exit $status
