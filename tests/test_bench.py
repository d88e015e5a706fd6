"""The benchmarks run, in miniature, and their report says what was compared with what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    done = run("-m", "pytest", "bench", "-q", "--bench-quick", "-p", "no:cacheprovider", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_plain_pytest_leaves_the_benches_out():
    done = run("-m", "pytest", "--collect-only", "-q", "tests/test_space.py", "-p", "no:cacheprovider")
    assert done.returncode == 0 and "bench_" not in done.stdout


def test_every_entry_says_what_it_is(results):
    entries = json.loads(results.read_text())["benchmarks"]
    suites = {entry["extra_info"]["suite"] for entry in entries}
    assert suites == {"ops", "operators", "optim", "samples", "kfac", "probes", "dispatch"}
    for entry in entries:
        info = entry["extra_info"]
        assert entry["group"] and entry["stats"]["rounds"] >= 2
        if info["suite"] != "dispatch":
            assert entry["stats"]["median"] > 0
            assert info["versions"]["torch"] and info["device"] and info["device_name"]
            alone = info["suite"] in ("probes", "kfac")  # some have rivals only in peers
            assert info["ratio"] > 0 if info["against"] else alone
        if info["suite"] == "ops":
            assert info["flops"] >= 0 and info["bytes"] > 0 and info["roofline_percent"] > 0
    against_itself = [e for e in entries if e["extra_info"].get("against") == e["extra_info"]["contestant"]]
    assert against_itself and all(e["extra_info"]["ratio"] == 1 for e in against_itself)
    assert "node" not in json.loads(results.read_text())["machine_info"]


def test_the_report(results):
    shown = run("-m", "bench.report", results)
    assert shown.returncode == 0, shown.stderr
    assert "these figures mean nothing" in shown.stdout
    lines = shown.stdout.splitlines()
    assert "### operators on cpu" in lines and any(line.startswith("| op and shape | backend |") for line in lines)
    rows = [line for line in lines if line.startswith("| ")]
    assert all(line.count(" | ") in (2, 5, 6, 8) for line in rows)
    everyone = run("-m", "bench.report", results, "--all", "--suite", "operators").stdout
    assert "autograd retained" in everyone and "### ops" not in everyone


def test_the_report_refuses_other_files(tmp_path):
    other = tmp_path / "other.json"
    for text, message in (("{", "Expecting"), ('{"benchmarks": []}', "holds no entry of these suites")):
        other.write_text(text)
        refused = run("-m", "bench.report", other)
        assert refused.returncode == 2 and message in refused.stderr
    assert run("-m", "bench.report", tmp_path / "none.json").returncode == 2


@pytest.mark.parametrize("only", ["softmax_hvp", "kron_apply"])
def test_the_gpu_run_is_rehearsed(only):
    """Validation and times of a kernel go through on the CPU; bench/gpu.sh with HVPFAST_GPU_REHEARSAL=1 rehearses all."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    env |= {"HVPFAST_GPU_REHEARSAL": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    command = [sys.executable, "bench/gpu.py", "--only", f"^{only}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "0 failures; wrote" in done.stdout, done.stdout + done.stderr
    report = json.loads(Path(done.stdout.rsplit("wrote ", 1)[1].strip()).read_text())
    assert report["rehearsal"] and {row["op"] for row in report["validation"]} == {only}
    assert all("failed" not in row and "ms" not in row for row in report["times"])
    names = {row["name"] for row in report["times"]}
    assert "reference fp32" in names and any(name.startswith("triton fp32") for name in names)


def test_the_proof_holds_for_ours():
    """Every case of `bench.proof` without the peers: exact to rounding, and the drawn ones to their noise."""
    done = run("-m", "bench.proof", "--alone")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for quantity, case, norm, error in rows:
        drawn = quantity.endswith("drawn labels")
        assert float(norm) > 0.1, case
        assert (float(error.strip("%")) < 2) if drawn else (float(error) <= 1e-10), (quantity, case, error)


def test_the_memory_of_factors_is_measured():
    done = run("-m", "bench.memory", "--quick")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ResNet-18", "GPT-2 small"]
    assert all("said beforehand" in line and line.endswith(" times") for line in lines)


def test_the_training_example(tmp_path):
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    done = run("-m", "bench.training", "--out", tmp_path / "pictures", "--steps", 5)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["cnn", "cnn", "transformer", "transformer"]
    assert all("after 5 steps" in line for line in lines)
    for name in ("cnn.png", "transformer.png"):
        assert (tmp_path / "pictures" / name).read_bytes()[:4] == b"\x89PNG"
    refused = run("-m", "bench.training", "--out", tmp_path, "--steps", 0)
    assert refused.returncode == 2 and "--steps is 0" in refused.stderr
