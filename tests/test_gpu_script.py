"""bench/gpu.sh with stand-ins for the interpreter, the GPU and compute-sanitizer: its steps, their shares of the time, and what
makes it fail. What the steps do is rehearsed in test_bench.py."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """#!/usr/bin/env bash
echo "$PWD: ${0##*/} $*" >> "$LOG"
case "${0##*/}" in
    nvidia-smi) exit "${NO_GPU:-0}" ;;
    compute-sanitizer) [[ "$*" == *gpu.py* ]] || exit "${NO_SANITIZER:-0}"; shift 4; exec "$@" ;;
esac
[[ -n "${FAILS:-}" && "$*" =~ $FAILS ]] && exit 9
[[ -n "${HANGS:-}" && "$*" =~ $HANGS ]] && exec sleep 60
exit 0
"""


@pytest.fixture
def script(tmp_path):
    """Runs it; returns the exit status, what it printed and the programs it ran."""
    for name in ("nvidia-smi", "compute-sanitizer", "python"):
        (tmp_path / name).write_text(PROGRAM)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"

    def run(**changes: str) -> tuple[int, str, list[str]]:
        log.write_text("")
        env = {key: value for key, value in os.environ.items() if not key.startswith("HVPFAST_")}
        env |= {"PATH": f"{tmp_path}{os.pathsep}{env['PATH']}", "PYTHON": str(tmp_path / "python"), "LOG": str(log)}
        done = subprocess.run([ROOT / "bench" / "gpu.sh"], env=env | changes, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


def test_its_steps_and_their_time(script):
    status, said, ran = script()
    assert status == 0 and "nothing failed" in said, said
    wanted = ["nvidia-smi", "python -m pip install .* --no-build-isolation --no-deps ..$", "python gpu.py --jobs",
              "python -m hvpfast validate --device cuda --jobs", "sanitizer --tool memcheck .* -c import torch"]  # fmt: skip
    assert all(re.search(pattern, line) for pattern, line in zip(wanted, ran, strict=False)), ran
    checks = sorted(line for line in ran[len(wanted) :] if "sanitizer" in line)
    assert [re.search(r"--tool (\w+) --error-exitcode 9 \S+python gpu.py --sanitize", line)[1] for line in checks] == [
        "memcheck",
        "racecheck",
    ]
    for line in ran:  # `python -m` takes the working directory's hvpfast first: it must not be one without kernels
        assert not (Path(line.split(": ")[0]) / "hvpfast").exists()
    seconds = [int(found) for line in ran for found in re.findall(r"--seconds (\d+)", line)]
    assert len(seconds) == 6 and all(0 < one < 590 for one in seconds)  # those of the checks twice, checker and checked


def test_what_fails_or_hangs_fails_it(script):
    for step in ("gpu.py --jobs", "hvpfast validate", "gpu.py --sanitize"):
        status, said, ran = script(FAILS=step)
        assert status == 1 and "status 9" in said and "something failed" in said
        assert any("racecheck" in line for line in ran)  # the steps after it run all the same
    status, said, _ = script(HANGS="hvpfast validate", HVPFAST_GPU_SECONDS="72")
    assert status == 1 and "killed" in said


def test_without_a_gpu_or_a_build_it_stops_and_without_a_sanitizer_it_goes_on(script):
    status, said, ran = script(NO_GPU="1")
    assert status == 1 and "no NVIDIA GPU here" in said and len(ran) == 1
    assert script(FAILS="pip")[0] == 1
    status, said, ran = script(NO_SANITIZER="1")
    assert status == 0 and "memory checks left out" in said and not any("--sanitize" in line for line in ran)
