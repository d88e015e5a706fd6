"""Kernels compiled ahead of time for GPUs that are not here. All of them: `python -m hvpfast.kernels.ahead` (CI runs it)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from hvpfast.kernels import ahead  # noqa: E402

WGMMA = "gram (fp32 bf16x3|bf16 exact)-128.*even sm_90$"


def test_main_kernels_use_wgmma_and_do_not_spill(clean_env):
    command = [sys.executable, "-m", "hvpfast.kernels.ahead", "--only", WGMMA]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("gram ")]
    column = dict(zip(ahead.Row._fields, zip(*lines, strict=True), strict=True))
    assert len(lines) == 2
    assert all(int(n) > 0 for n in column["wgmma"]) and set(column["spills"]) == {"0"}


def test_it_says_that_the_interpreter_cannot_compile(clean_env):
    environment = {**clean_env, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hvpfast.kernels.ahead"], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and "TRITON_INTERPRET is set" in done.stderr


def test_every_compilation_has_limits():
    limits = json.loads(ahead.LIMITS.read_text())
    assert set(limits) == {case.key(target) for case in ahead.cases() for target in ahead.TARGETS}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"spills": 3, "stack": 16}, "it spills"),
        ({"wgmma": 0}, "lost its tensor-core instructions"),
        ({"registers": 250}, "250 registers, the limit is"),
        ({"shared": 200_000}, "RTX-class GPUs have"),
    ],
)
def test_what_breaks_a_row(change, said):
    key = next(case.key(90) for case in ahead.cases() if re.search(WGMMA, case.key(90)))
    limit = {"registers": 224, "shared": 98304, "tensor": 3}
    row = ahead.Row(*key.split(), 200, 0, 0, 65536, 4, 0, 0, 0, 12)._replace(**change)
    broken = ahead.check([row], {key: limit})
    assert (not broken) if said is None else any(said in one for one in broken)
    assert ahead.check([row], {}) and ahead.check([], {"gone fp32 x sm_90": limit})
    assert not any("limit is" in one for one in ahead.check([row], ahead.widened({}, [row])))


def test_what_launchers_ask_for_compiles(clean_env):
    """`python -m bench.launched` of one op and target; all of them take half an hour."""
    command = [
        sys.executable,
        "-m",
        "bench.launched",
        "--op",
        "weighted_grad",
        "--op",
        "softmax_root",
        "--target",
        "90",
    ]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, "--sizes", "3", "--jobs", "1"], capture_output=True, text=True, env=clean_env, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    configurations, compilations = re.match(r"(\d+) configurations of 2 ops, (\d+) comp", done.stdout).groups()
    assert configurations == compilations and int(compilations) > 10
    assert f"0 of {compilations} do not" in done.stdout
