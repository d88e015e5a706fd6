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


def test_the_report_of_a_gpu_run(tmp_path):
    """Ours against the fastest other on such data, shares of floors, failures with their op; a roofline that is a picture."""
    pytest.importorskip("matplotlib")

    def row(name: str, ms: float, floor: float) -> dict:
        return {
            "group": "gram N=8 D=4",
            "name": name,
            "flops": 2e12,
            "bytes": 1e9,
            "ms": ms,
            "p20": ms,
            "p80": ms,
            "floor_ms": floor,
        }

    times = [row("torch.mm bf16, bf16 out", 4.0, 2.0), row("torch.mm tf32", 9.0, 4.0), row("reference bf16", 30.0, 4.0)]
    times += [
        row("triton bf16 auto", 2.5, 2.0),
        row("triton fp32 bf16x3", 6.0, 3.0),
        {"group": "g", "name": "cuda fp32", "failed": "E: x"},
    ]
    run_of = {"op": "gram", "backend": "triton", "cases": 3, "failures": ["N=1: off"]}
    data = {"rehearsal": False, "machine": {"device": "Some GPU"}, "validation": [run_of], "times": times}
    data["ceilings"] = {"copy": 4e12, "bf16": 7e14, "fp16": 7e14, "tf32": 3e14, "fp32": 5e13}
    results, picture = tmp_path / "gpu.json", tmp_path / "roofline.png"
    results.write_text(json.dumps(data))
    said = run("-m", "bench.report", results, "--roofline", picture).stdout
    assert "Some GPU" in said and "3 cases in 1 rows, 1 failures" in said and "- gram on triton: N=1: off" in said
    assert "| gram N=8 D=4 | triton bf16 auto | 2.5 | 2.5 to 2.5 | 80 % | 1.60x |" in said
    assert "| gram N=8 D=4 | triton fp32 bf16x3 | 6 | 6 to 6 | 50 % | 1.50x |" in said
    assert "E: x" in said and "torch.mm" not in said
    assert "| torch.mm tf32 | 9 |" in run("-m", "bench.report", results, "--all").stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    results.write_text(json.dumps(data | {"rehearsal": True, "times": []}))
    refused = run("-m", "bench.report", results, "--roofline", picture)
    assert refused.returncode == 2 and "has no times" in refused.stderr


def rehearsed(only: str, jobs: int = 1) -> dict:
    """The report of a rehearsed GPU run of the ops and groups that match."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    env |= {"HVPFAST_GPU_REHEARSAL": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    command = [sys.executable, "bench/gpu.py", "--only", only, "--jobs", str(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "0 failures; wrote" in done.stdout, done.stdout + done.stderr
    report = json.loads(Path(done.stdout.rsplit("wrote ", 1)[1].strip()).read_text())
    assert report["rehearsal"] and all("failed" not in row and "ms" not in row for row in report["times"])
    return report


def test_validation_goes_on_where_memory_ends_and_ops_come_in_turns(monkeypatch):
    """A row without memory beside others is tried again alone; a time limit leaves out precisions, not ops; failures count."""
    monkeypatch.setenv("HVPFAST_GPU_REHEARSAL", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    gpu = pytest.importorskip("gpu")
    asked, alone, found = [], [], []

    def each(wanted, jobs):
        for number, (name, backend, dtype, precision, *_) in enumerate(wanted):
            asked.append((name, dtype, precision))
            row = {"op": name, "backend": backend, "dtype": dtype, "precision": precision, "cases": 1, "failures": []}
            memory = {"memory": "N=1: all of it"} if number == 1 else {}
            yield None if number == len(wanted) - 1 else row | memory

    def hold(*job):
        alone.append(job[:4])
        return dict(zip(("op", "backend", "dtype", "precision"), job, strict=False)) | {"cases": 0, "failures": ["off"]}

    monkeypatch.setattr(gpu, "each", each)
    monkeypatch.setattr(gpu, "hold", hold)
    report = type("Report", (), {"add": lambda self, section, row: found.append(row)})()
    assert gpu.validate(report, (), (), "^kron", float("inf"), jobs=2) == 1  # the row that failed alone
    ops = ["kron_apply", "kron_solve"]
    assert [name for name, *_ in asked] == ops * 5 and len(set(asked)) == 10
    assert alone == [("kron_solve", "triton", *asked[1][1:])] and len(found) == 9


@pytest.mark.parametrize("only", ["softmax_hvp", "kron_apply"])
def test_the_gpu_run_is_rehearsed(only):
    """Validation and times of a kernel go through on the CPU; bench/gpu.sh with HVPFAST_GPU_REHEARSAL=1 rehearses all."""
    report = rehearsed(f"^{only}", jobs=2 if only == "kron_apply" else 1)
    assert {row["op"] for row in report["validation"]} == {only}
    names = {row["name"] for row in report["times"]}
    assert "reference fp32" in names and any(name.startswith("triton fp32") for name in names)


def test_products_from_cuda_graphs_are_rehearsed():
    """Their comparison with products without, and their rows among the times; on a CPU both come to the same products."""
    report = rehearsed("^cuda_graphs|^(Hessian|GGN) @ v")
    assert report["validation"] == [{"op": "cuda_graphs", "backend": "cuda", "cases": 48, "failures": []}]
    captured = [row["group"].split()[0] for row in report["times"] if row["name"] == "hvpfast, CUDA graphs fp32"]
    assert captured == ["Hessian", "GGN"]


def test_every_kernel_in_a_capture_is_rehearsed():
    """On other data than it was captured with; but the Kronecker ops, which refuse it (tests/kernels/test_triton_kron.py)."""
    from hvpfast import dispatch

    (row,) = rehearsed("^captures")["validation"]
    backends = [backend for op in dispatch.OPS.values() for backend in op.backends if backend in ("cpu", "triton")]
    assert row["failures"] == [] and len(backends) - 8 < row["cases"] <= len(backends) - 2


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


def test_what_statistics_are_off_by():
    done = run("-m", "bench.precision", "--quick")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows][-2:] == ["norms", "second moments"]
    assert all(float(off) < 1e-2 for _, *both in rows for off in both)


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
