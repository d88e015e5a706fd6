#!/usr/bin/env bash
# Everything a GPU machine has to say about hvpfast, in one command of under ten minutes and without a network:
# build, validation against the float64 references, times, memory checks. Results: bench/results/<device>-<date>.json.
# A step ends itself when its share of the time is over, and says what it left out; one that does not (it hangs) has failed.
#
#   bench/gpu.sh                              PYTHON=... picks the interpreter (default python3)
#   HVPFAST_GPU_SECONDS=900 bench/gpu.sh      with more time than 590 seconds
#   HVPFAST_GPU_REHEARSAL=1 bench/gpu.sh      the same steps on a CPU, tiny, results thrown away
set -uo pipefail
cd "$(dirname "$0")"  # not the checkout's root, where `python -m` would find hvpfast without its kernels
python=${PYTHON:-python3}
limit=${HVPFAST_GPU_SECONDS:-590}
jobs=$(($(nproc) / 2 > 8 ? 8 : $(nproc) / 2 > 1 ? $(nproc) / 2 : 1))
rehearsal=${HVPFAST_GPU_REHEARSAL:-0}
status=0

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
left() { echo $((limit - SECONDS > $1 ? limit - SECONDS - $1 : 1)); }  # left N: seconds, less N for what comes after
judge() {
    [ "$1" = 0 ] && return
    status=1
    [ "$1" = 124 ] && echo "it did not end: killed" || echo "it failed: status $1"
}

if [ "$rehearsal" = 1 ]; then
    step "rehearsal: no build; Triton's interpreter on the CPU"
    few=(--device interpret --op softmax_hvp --op linear_rop)
else
    step "build"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || { echo "no NVIDIA GPU here"; exit 1; }
    HVPFAST_BUILD=${HVPFAST_BUILD:-cuda} timeout "$(left 300)" "$python" -m pip install -q --no-build-isolation --no-deps .. || exit 1
    few=(--device cuda)
fi

step "large sizes, times, odd sizes"
timeout "$(left 150)" "$python" gpu.py --jobs "$jobs" --seconds "$(left 180)"
judge $?

step "hvpfast validate"
timeout "$(left 70)" "$python" -m hvpfast validate "${few[@]}" --jobs "$jobs" --seconds "$(left 95)"
judge $?

checker() { compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}"; }

if [ "$rehearsal" = 1 ]; then
    step "small sizes"
    timeout "$(left 10)" "$python" gpu.py --sanitize --only "^(softmax_hvp|linear_rop)" --seconds "$(left 100)"
    judge $?
elif ! command -v compute-sanitizer > /dev/null; then
    step "compute-sanitizer is not installed; memory checks left out"
elif ! checker memcheck "$python" -c 'import torch; torch.ones(1, device="cuda")' > /dev/null 2>&1; then
    step "compute-sanitizer cannot run here (the machine's runtime does not let it); memory checks left out"
else
    step "compute-sanitizer, memcheck and racecheck at once"
    logs=$(mktemp -d) share=$(left 25)
    pids=()
    for tool in memcheck racecheck; do
        export -f checker
        timeout "$(left 5)" bash -c 'checker "$@"' - "$tool" "$python" gpu.py --sanitize --seconds "$share" > "$logs/$tool" 2>&1 &
        pids+=($!)
    done
    for n in 0 1; do
        wait "${pids[$n]}"
        code=$?
        tail -n 5 "$logs"/$([ $n = 0 ] && echo memcheck || echo racecheck)
        judge $code
    done
fi
step "$([ $status = 0 ] && echo 'nothing failed' || echo 'something failed')"
exit "$status"
