#!/usr/bin/env bash
# Everything a GPU machine has to say about hvpfast, in one command of under ten minutes and without a network:
# build, memory checks, validation against the float64 references, times. Results: bench/results/<device>-<date>.json.
#
#   bench/gpu.sh                              PYTHON=... picks the interpreter (default python3)
#   HVPFAST_GPU_REHEARSAL=1 bench/gpu.sh      the same steps on a CPU, tiny, results thrown away
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
status=0

step() { echo; echo "== $*"; }

if [ "${HVPFAST_GPU_REHEARSAL:-0}" = 1 ]; then
    step "rehearsal: no build; Triton's interpreter on the CPU"
else
    step "build"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || { echo "no NVIDIA GPU here"; exit 1; }
    HVPFAST_BUILD=${HVPFAST_BUILD:-cuda} timeout 240 "$python" -m pip install -q --no-build-isolation --no-deps . || exit 1
fi

# Compilation takes most of these steps' time: 124, the time was over, is no failure; what ran until then agreed.
judge() { [ "$1" = 0 ] || [ "$1" = 124 ] || status=1; [ "$1" != 124 ] || echo "the time was over"; }

step "large sizes, times, odd sizes"
timeout 340 "$python" bench/gpu.py --seconds 280 || status=1

step "hvpfast validate"
if [ "${HVPFAST_GPU_REHEARSAL:-0}" = 1 ]; then
    timeout 120 "$python" -m hvpfast validate --device interpret --op softmax_hvp --op linear_rop
    judge $?
    timeout 120 "$python" bench/gpu.py --sanitize --seconds 100
    judge $?
    exit "$status"
fi
timeout 60 "$python" -m hvpfast validate --device cuda
judge $?

if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "compute-sanitizer $tool"
        timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu.py --sanitize > "/tmp/hvpfast-$tool.txt" 2>&1
        code=$?
        tail -n 5 "/tmp/hvpfast-$tool.txt"
        judge "$code"
    done
else
    step "compute-sanitizer is not installed; memory checks left out"
fi
exit "$status"
