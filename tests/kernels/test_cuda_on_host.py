"""The CUDA kernels' own source, compiled for the host (on_host/) and held against the references: places, ranges of rows,
barriers, the ones column and the blending are then right before a GPU has seen them."""

import importlib.util
import math
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hvpfast.kernels import native_cuda

from hvpfast import ops, testing

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\w+)<<<([^,]+), (\w+|dim3\([^)]*\)), \w+, stream>>>\((.*?)\);", re.DOTALL)
LAUNCHES = {"gram": 2, "gram_sm90": 2, "krylov": 8}  # of each file


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiler = shutil.which("g++")
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("there is no g++")
    folder, source = tmp_path_factory.mktemp("on_host"), ROOT / "csrc" / "cuda"
    for name, count in LAUNCHES.items():
        text, launches = LAUNCH.subn(r"launch(\2, \3, [=] { \1(\4); });", (source / f"{name}.cu").read_text())
        assert launches == count == text.count("launch(")
        (folder / f"{name}.cpp").write_text(text)
    includes = [Path(__file__).with_name("on_host"), source, pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", *(f"-I{path}" for path in includes), "-o", "_cuda.so"]
    command += [*(f"{name}.cpp" for name in LAUNCHES), str(source / "bindings.cpp"), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if "barrier" in done.stderr and "No such file" in done.stderr:
        pytest.skip("this g++ has no C++20 <barrier>")
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda", folder / "_cuda.so")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def host(module, monkeypatch):
    """The launchers with that module, and with fresh memory that holds NaN."""
    monkeypatch.setattr(native_cuda, "_load", lambda device: module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(native_cuda, "_processors", lambda device: 2)
    monkeypatch.setattr(native_cuda, "_capability", lambda device: (8, 0))
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: fresh(x, *a, **k).fill_(math.nan))
    return native_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, width, splits, layout",
    [(0, 5, 1, "contiguous"), (3, 17, 2, "offset"), (70, 136, 3, "contiguous"), (70, 129, 1, "transposed")],
)
def test_gram(host, monkeypatch, rows, width, splits, layout, dtype):
    monkeypatch.setattr(native_cuda, "_cuda_splits", lambda *_: splits)
    x = testing.laid_out(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    plain = host.cuda_gram(x)
    testing.assert_accurate(plain, ops.gram, x)
    assert torch.equal(plain, plain.T)
    before = torch.randn(width + 1, width + 1, generator=torch.Generator().manual_seed(1))  # not symmetric
    blend = {"alpha": 0.3, "beta": 0.7, "ones_column": True}
    out = host.cuda_gram(x, out=before.clone(), **blend)
    testing.assert_accurate(out, ops.gram, x, out=before, **blend)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "auto"), (torch.float16, "ieee"), (torch.float32, "auto"), (torch.float32, "bf16")],
)
@pytest.mark.parametrize(
    ("rows", "width", "splits", "layout"),
    [
        (3, 8, 1, "contiguous"),  # one box, of which next to nothing is there
        (70, 264, 2, "contiguous"),  # tiles off the diagonal; the second range has 6 rows
        (1100, 130, 1, "contiguous"),  # the ring of stages goes round, and past one chunk
        (129, 136, 4, "transposed"),  # an empty range; float32 in any layout
    ],
)
def test_gram_on_hopper(host, monkeypatch, rows, width, splits, layout, dtype, precision):
    monkeypatch.setattr(host, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(host, "_cuda_splits", lambda *_: splits)
    x = testing.laid_out(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype), layout)
    if dtype is torch.float16 and layout == "contiguous":  # rows longer than they need be
        x = torch.cat([x, torch.full((rows, 8 + -width % 8), math.nan, dtype=dtype)], 1)[:, :width]
    used = host._wgmma_products(x, precision)
    if dtype is torch.float32:
        assert used == (0 if rows < 32 else 3 if precision == "auto" else 1)
    else:
        assert used == (layout == "contiguous" and x.stride(0) % 8 == 0)
    stated = {"precision": "bf16x3" if used == 3 else "bf16"} if dtype is torch.float32 else {}
    plain = host.cuda_gram(x, precision=precision)
    testing.assert_accurate(plain, ops.gram, x, **stated)
    assert torch.equal(plain, plain.T)
    before = torch.randn(width + 1, width + 1, generator=torch.Generator().manual_seed(1))
    blend = {"alpha": 0.3, "beta": 0.7, "ones_column": True}
    out = host.cuda_gram(x, out=before.clone(), precision=precision, **blend)
    testing.assert_accurate(out, ops.gram, x, out=before, **stated, **blend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "length, count, layout",
    [
        (1, 0, "contiguous"),
        (0, 0, "contiguous"),
        (1536, 37, "contiguous"),  # rows on 16 bytes, more chunks than blocks, rows that do not divide by the warps
        (300, 1, "offset"),
        (257, 9, "transposed"),
        (1030, 33, "strided"),
    ],
)
def test_reorthogonalize(host, length, count, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    w = testing.laid_out(torch.randn(length, generator=generator).to(dtype), layout)
    basis = torch.linalg.qr(torch.randn(length, count, generator=generator, dtype=torch.float64))[0].T
    basis = testing.laid_out(basis.to(dtype), layout)
    given = w.clone(), basis.clone()
    found = host.cuda_reorthogonalize(w, basis)
    testing.assert_accurate(found, ops.reorthogonalize, w, basis)
    unit, *numbers = host.cuda_reorthogonalize(w, basis, normalize=True)
    testing.assert_accurate((unit, *numbers), ops.reorthogonalize, w, basis, normalize=True)
    assert all(torch.equal(x, y) for x, y in zip(found[1:], numbers, strict=True))  # the same bits again
    assert torch.equal(w, given[0]) and torch.equal(basis, given[1])


def test_reorthogonalize_of_what_the_basis_spans_and_of_nan(host):
    basis = torch.linalg.qr(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))[0].T
    combination = torch.tensor([3.0, -2.0, 0.5])
    rest, coefficients, norm = host.cuda_reorthogonalize(combination @ basis, basis)
    torch.testing.assert_close(coefficients, combination.double(), rtol=1e-6, atol=0)
    assert norm < 1e-6  # what remains is rounding, and orthogonal all the same
    assert (rest.double() @ basis.double().T).abs().max() < 1e-5 * norm
    zero, _, norm = host.cuda_reorthogonalize(torch.zeros(40), basis, normalize=True)
    assert norm == 0 and torch.equal(zero, torch.zeros(40))
    assert all(x.isnan().all() for x in host.cuda_reorthogonalize(torch.full((40,), math.nan), basis, normalize=True))
