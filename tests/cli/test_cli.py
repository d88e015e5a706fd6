"""The commands, run as a user runs them."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli.idx_files import idx

import hvpfast
from hvpfast import dispatch
from hvpfast.cli import demo, main, validate
from hvpfast.cli.datasets import digits
from hvpfast.cli.experiment import Experiment, Settings, arpack_check

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), (torch.randn(9, 4), torch.randint(0, 3, (9,)))

def dropout():
    model, loss, data = build()
    return nn.Sequential(model, nn.Dropout(0.5)), loss, data

def broken():
    raise KeyError("no such layer")

def wrong():
    return build()[0]
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "train.py").write_text(MODEL)
    return f"{tmp_path}/train.py"


@pytest.fixture
def quick(monkeypatch):
    small = {"density_probes": 2, "density_steps": 12, "plane_steps": 5, "trace_probes": 4, "hidden": 16}
    monkeypatch.setattr(demo, "Settings", lambda **given: Settings(**{**given, **small}))


def test_demo(tmp_path, capsys, quick):
    for module in ("sklearn", "tqdm", "scipy", "matplotlib"):
        pytest.importorskip(module)
    before = torch.get_rng_state()
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert torch.equal(before, torch.get_rng_state())
    text = capsys.readouterr().out
    assert re.search(r"^ *epoch +loss +test acc +lambda_max", text, re.M) and "heavy ball" in text and "= 38" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first, last = results["epochs"]
    assert [first["epoch"], last["epoch"]] == [0, 1] and last["step"] == 21
    assert last["loss"] < first["loss"] and last["test_accuracy"] > 0.5
    for row in (first, last):
        assert row["lambda_max"] > 0 > row["lambda_min"] and row["converged"] and row["threshold"] == pytest.approx(38)
        assert all(math.isfinite(row[name]) for name in ("trace", "stderr", "loss", "matvecs", "curvature_s"))
    assert results["check"]["relative_difference"] < 1e-3
    assert results["data"]["train"] == 1297 and len(results["data"]["sha256"]) == 64
    assert results["versions"]["hvpfast"] == hvpfast.__version__ and results["settings"]["seed"] == 0
    plane = results["plane"]
    assert plane["losses"][2][2] == plane["centre"] == pytest.approx(last["loss"], rel=1e-5)
    assert results["wall_s"]["total"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "http:" not in page and "https:" not in page and "<script" not in page and "<link" not in page
    assert page.count("data:image/png;base64,") == 4 and not re.search(r'(src|href)="(?!data:)', page)
    assert f"{last['lambda_max']:.4f}" in page
    for name in results["pictures"].values():
        assert (tmp_path / "out" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_whole_experiment_learns_and_agrees_with_arpack():
    pytest.importorskip("sklearn")
    experiment = Experiment(digits(), Settings(trace_probes=2, curvature_samples=400))
    with torch.random.fork_rng(devices=[]):
        rows = list(experiment.run(lambda: None))
    assert len(rows) == 6 and rows[-1]["step"] == 105 and rows[-1]["test_accuracy"] > 0.95
    assert all(math.isfinite(row["lambda_max"]) for row in rows)  # and no more: sharpness need not fall
    check = arpack_check(experiment.model, *experiment.sample, rows[-1]["lambda_max"], seed=0)
    assert check["relative_difference"] < 1e-3


def test_demo_is_repeatable_and_draws_nothing_if_asked(tmp_path, quick):
    pytest.importorskip("sklearn")
    rows = []
    for name in "ab":
        assert main(["demo", "--epochs", "1", "--out", str(tmp_path / name), "--no-plots", "--device", "cpu"]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        rows.append([{k: v for k, v in row.items() if not k.endswith("_s")} for row in results["epochs"]])
        assert results["pictures"] == {} and not list((tmp_path / name).glob("*.png"))
        assert "<img" not in (tmp_path / name / "report.html").read_text()
    assert rows[0] == rows[1]


def test_demo_on_idx_files(tmp_path, capsys, quick, monkeypatch):
    monkeypatch.setitem(demo.MNIST, "curvature_samples", 40)
    rng = np.random.default_rng(0)
    for stem, count in (("train", 96), ("t10k", 32)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = np.zeros((count, 5, 5), np.uint8)
        images.reshape(count, 25)[np.arange(count), labels] = 255
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    out = tmp_path / "out"
    assert (
        main(["demo", "--data", str(tmp_path), "--epochs", "1", "--out", str(out), "--no-plots", "--device", "cpu"])
        == 0
    )
    assert "first 40 training samples" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["name"] == "MNIST" and results["settings"]["curvature_samples"] == 40
    assert "first 40 training samples" in (out / "report.html").read_text()


def refused(capsys, *argv):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.startswith(f"hvpfast {argv[0]}: ")
    return text


def test_user_errors_have_no_traceback(capsys, tmp_path, spec):
    assert "no such folder" in refused(capsys, "demo", "--data", str(tmp_path / "absent"), "--no-plots")
    assert "negative" in refused(capsys, "demo", "--epochs", "-1", "--no-plots")
    assert "use cpu" in refused(capsys, "demo", "--device", "cqu", "--no-plots")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capsys, "demo", "--device", "cuda", "--no-plots")
        assert "no CUDA device" in refused(capsys, "validate", "--device", "cuda")
    assert "there is no such op" in refused(capsys, "validate", "--op", "grim")
    assert "module:function" in refused(capsys, "probe", "train")
    assert "no such file" in refused(capsys, "probe", "absent.py:build")
    assert "ModuleNotFoundError" in refused(capsys, "probe", "absent_module:build")
    assert "no function 'built'; it has broken, build" in refused(capsys, "probe", f"{spec}:built")
    assert "KeyError: 'no such layer'" in refused(capsys, "probe", f"{spec}:broken")
    assert "must return (model, loss, data)" in refused(capsys, "probe", f"{spec}:wrong")
    assert "dropout is active" in refused(capsys, "probe", f"{spec}:dropout")
    assert "no folder" in refused(capsys, "landscape", f"{spec}:build", "--out", str(tmp_path / "no" / "x"))
    with pytest.raises(SystemExit) as stopped:
        main(["probe"])
    assert stopped.value.code == 2
    assert main([]) == 2


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "pip install hvpfast[cli]" in refused(capsys, "demo")


def test_probe_agrees_with_a_dense_hessian(capsys, tmp_path, spec):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "density.png"
    assert main(["probe", f"{spec}:build", "--trace-matvecs", "64", "--density", str(picture)]) == 0
    text = capsys.readouterr().out
    space = {}
    exec(MODEL, space)
    model, loss, (x, y) = space["build"]()
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def of(vector):
        parts = [
            part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        return loss(torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    hessian = torch.autograd.functional.hessian(of, flat)
    values = torch.linalg.eigvalsh(hessian.double())
    found = {name: float(value) for name, value in re.findall(r"^(\w+) +(-?[\d.e-]+) ", text, re.M)}
    assert found["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-4)
    assert found["lambda_min"] == pytest.approx(float(values[0]), rel=1e-3)
    assert found["trace"] == pytest.approx(float(hessian.trace()), rel=1e-4)
    assert picture.stat().st_size > 1000
    assert main(["probe", f"{spec}:build", "--matrix", "ggn"]) == 0
    least = re.search(r"lambda_min +(-?[\d.e-]+)", capsys.readouterr().out)
    assert float(least[1]) > -1e-6


def test_landscape(capsys, tmp_path, spec):
    pytest.importorskip("matplotlib")
    assert (
        main(["landscape", f"{spec}:build", "--steps", "5", "--extent", "0.5", "--out", str(tmp_path / "map.png")]) == 0
    )
    with np.load(tmp_path / "map.npz") as stored:
        assert stored["losses"].shape == (5, 5) and stored["losses"][2, 2] == stored["centre"]
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "Native kernels" in text
    for name in dispatch.OPS:
        assert re.search(rf"^{name} .* runs for float32", text, re.M)


def test_validate_passes(capsys):
    assert main(["validate", "--device", "cpu", "--op", "gram"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^gram +reference +float32 .*passed$", text, re.M) and "agrees with its reference" in text


def test_validate_by_several_processes_and_within_a_time(capsys):
    """The rows of one process in whatever order; after the time none begins, and that is said."""
    shared = ["validate", "--device", "cpu", "--op", "kron_apply", "--op", "softmax_hvp"]
    tables = []
    for more in ([], ["--jobs", "2"]):
        assert main(shared + more) == 0
        tables.append(sorted(line for line in capsys.readouterr().out.splitlines() if line.endswith("passed")))
    assert tables[0] == tables[1] and len(tables[0]) > 8
    assert main([*shared, "--jobs", "2", "--seconds", "-1"]) == 0
    assert re.search(r"agrees with its reference; the time was over before \d+ rows", capsys.readouterr().out)
    assert "1 or more" in refused(capsys, "validate", "--jobs", "0")


@pytest.mark.parametrize("fault", ["wrong", "unwritten", "random", "raises"])
def test_validate_catches_a_bad_kernel(capsys, monkeypatch, fault):
    op = dispatch.OPS["sample_grads"]

    def run(a, g, *, out=None, precision):
        made = op.reference(a, g)
        if fault == "wrong":
            made = made * 1.001
        elif fault == "random":
            made = made * (1 + 1e-7 * torch.rand(()).to(made))
        elif fault == "unwritten":
            made = torch.empty_like(made)
        elif fault == "raises":
            raise RuntimeError("bad launch")
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(op, "backends", ("cpu",))
    monkeypatch.setitem(op._loaded, "cpu", dispatch._Implementation(run, None, None))
    monkeypatch.setattr(validate, "DTYPES", (torch.float32,))
    monkeypatch.setattr(validate, "LARGE", ())
    assert main(["validate", "--device", "cpu", "--op", "sample_grads"]) == 1
    text = capsys.readouterr().out
    assert "rows FAILED" in text
    assert {"wrong": "exceeds", "unwritten": "inf", "random": "two runs differ", "raises": "bad launch"}[fault] in text
    assert not torch.are_deterministic_algorithms_enabled()


def test_version_and_module():
    done = subprocess.run([sys.executable, "-m", "hvpfast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"hvpfast {hvpfast.__version__}"


def test_bench_outside_a_checkout(capsys, tmp_path, monkeypatch):
    from hvpfast.cli import bench

    monkeypatch.setattr(bench, "_checkout", lambda: None)
    assert "clone the repository" in refused(capsys, "bench")
