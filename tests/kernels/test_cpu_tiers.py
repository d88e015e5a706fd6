"""The CPU kernels' instruction-set tiers: detection, forcing, and the shared OpenMP library."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiers
from hvpfast.kernels import extensions

pytestmark = pytest.mark.skipif(tiers.WHY_NONE is not None, reason=str(tiers.WHY_NONE))


def test_every_tier_is_named_and_the_portable_one_always_runs():
    with tiers.forced("portable") as module:
        assert tuple(module.tiers()) == tiers.TIERS
        assert module.tier() == "portable"


def test_an_unknown_tier_is_refused_by_name():
    with tiers.forced("portable") as module, pytest.raises(RuntimeError, match="'sse9'.*portable, avx2, avx512 or amx"):
        module.force_tier("sse9")


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_environment_forces_a_tier_or_says_why_not(tier, tmp_path):
    command = "import hvpfast.kernels.native as n; print(n.missing('cpu') or n._modules['cpu'].tier())"
    run = [sys.executable, "-c", command]
    done = subprocess.run(
        run, env={**os.environ, "HVPFAST_CPU": tier}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = done.stdout.strip()
    assert said == tier or f"HVPFAST_CPU={tier}: tier {tier} cannot run: " in said


def test_a_misspelt_tier_in_the_environment_is_an_error(tmp_path):
    command = "import hvpfast.kernels.native as n; print(n.missing('cpu'))"
    run = [sys.executable, "-c", command]
    done = subprocess.run(
        run, env={**os.environ, "HVPFAST_CPU": "fast"}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "'fast'" in done.stdout


def test_one_openmp_library_serves_torch_and_the_kernels(tmp_path):
    """In a process of its own, also after another package has brought a copy under another name."""
    if not sys.platform.startswith("linux"):
        pytest.skip("read from /proc")
    others = ["import sklearn.cluster"] if importlib.util.find_spec("sklearn") else []
    for before in ("pass", *others):
        command = f"{before}\nimport hvpfast.kernels.native as n; n.missing('cpu'); print(n._openmp_reason())"
        done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "None", done.stdout


@pytest.mark.parametrize(
    ("files", "one"),
    [
        (["/env/torch/lib/libgomp.so.1"], True),
        (["/env/torch/lib/libgomp.so.1", "/env/scikit_learn.libs/libgomp-e985.so.1.0.0"], True),
        (["/env/torch/lib/libgomp-a34b.so.1", "/usr/lib/libgomp.so.1.0.0"], False),  # ours is not torch's
        (["/env/torch/lib/libiomp5.so", "/usr/lib/libgomp.so.1"], False),
        (["/usr/lib/libgomp.so.1"], True),  # torch from the system
        (["/usr/lib/libgomp.so.1", "/opt/lib/libgomp.so.1"], False),
        ([], True),
    ],
)
def test_which_openmp_libraries_make_two_pools(files, one):
    assert (extensions._two_pools(files, Path("/env/torch")) is None) == one
