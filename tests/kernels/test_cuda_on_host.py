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

import lower
import pytest
import torch
from hvpfast.kernels import native_cuda

from hvpfast import ops, testing

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\w+)<<<([^,]+), (\w+|dim3\([^)]*\)), \w+, stream>>>\((.*?)\);", re.DOTALL)
LAUNCHES = {"cg": 1, "gram": 2, "gram_sm90": 2, "krylov": 8}  # of each file


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
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *(f"-I{path}" for path in includes), "-o", "_cuda.so"]
    command += [*(f"{name}.cpp" for name in LAUNCHES), str(source / "bindings.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if "ucontext.h" in done.stderr and "No such file" in done.stderr:
        pytest.skip("this C library has no <ucontext.h>")
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
    for each in ({}, blend):
        lower.assert_lower(host.cuda_gram, x, **each)


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


@pytest.mark.parametrize("count", [0, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reorthogonalize_of_a_list_of_tensors(host, count, dtype):
    """Fewer chunks than blocks, more tensors than a launch takes, one of no elements, one that is no view: as one flat vector."""
    generator = torch.Generator().manual_seed(0)
    for shapes in ([(3, 5)], [(7, 8), (0,), (600,), (2, 3, 4), *((1 + i % 5,) for i in range(90))]):
        sizes = [math.prod(shape) for shape in shapes]
        w = torch.randn(sum(sizes), generator=generator).to(dtype)
        basis = torch.linalg.qr(torch.randn(sum(sizes), count, generator=generator, dtype=torch.float64))[0].T.to(dtype)
        ws = [part.reshape(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        rows = [part.reshape(count, *shape) for part, shape in zip(basis.split(sizes, 1), shapes, strict=True)]
        if len(shapes) > 1:
            ws[0], rows[0] = ws[0].T.contiguous().T, rows[0].mT.contiguous().mT
        for normalize in (False, True):
            rest, coefficients, norm = host.cuda_reorthogonalize(ws, rows, normalize=normalize)
            assert [x.shape for x in rest] == [torch.Size(shape) for shape in shapes]
            found = torch.cat([x.reshape(-1) for x in rest]), coefficients, norm
            testing.assert_accurate(found, ops.reorthogonalize, w, basis, normalize=normalize)
            again = host.cuda_reorthogonalize(ws, rows, normalize=normalize)
            assert all(
                torch.equal(x, y)
                for x, y in zip(testing.pieces(again), testing.pieces((rest, *found[1:])), strict=True)
            )
            plain = ops.reorthogonalize(ws, rows, normalize=normalize)
            flat = torch.cat([x.reshape(-1) for x in plain[0]]), *plain[1:]
            testing.assert_accurate(flat, ops.reorthogonalize, w, basis, normalize=normalize)


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


def iteration(shapes, columns, dtype=torch.float64):
    """x, r, p, q as lists of tensors (*shape, columns), and rz, with A the identity and its double alternating."""
    generator = torch.Generator().manual_seed(0)
    last = () if columns is None else (columns,)
    x, r, p = ([torch.randn(*shape, *last, generator=generator).to(dtype) for shape in shapes] for _ in range(3))
    q = [(1 + i % 2) * y for i, y in enumerate(p)]
    rz = sum(y.double().square().reshape(-1, *last).sum(0) for y in r)
    return x, r, p, q, rz


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "length, columns, layout",
    [
        (1, None, "contiguous"),
        (3000, None, "contiguous"),
        (2500, 1, "offset"),
        (700, 3, "transposed"),
        (17, 256, "strided"),
    ],
)
def test_cg_update(host, length, columns, layout, dtype):
    *lists, rz = iteration([(length,)], columns, dtype)
    given = [testing.laid_out(one[0], layout) for one in lists]
    before = [y.clone() for y in given]
    result = host.cuda_cg_update(*given, rz, damping=0.25)
    testing.assert_accurate(result, ops.cg_update, *given, rz, damping=0.25)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    again = host.cuda_cg_update(*given, rz, damping=0.25)
    assert all(torch.equal(x, y) for x, y in zip(result, again, strict=True))
    if dtype in (torch.float32, torch.float64):
        own = [y.contiguous() for y in given]
        versions = [y._version for y in own[:3]]
        inplace = host.cuda_cg_update(*own, rz, damping=0.25, inplace=True)
        assert all(x is y for x, y in zip(inplace[:3], own, strict=False))
        assert all(torch.equal(x, y) for x, y in zip(inplace, result, strict=True))
        assert all(y._version > before for y, before in zip(own, versions, strict=False))


@pytest.mark.parametrize("columns", [None, 3])
def test_cg_update_of_more_tensors_than_a_launch_takes(host, columns):
    *lists, rz = iteration([(7,), (3, 5), (0,), *((i % 4, 2) for i in range(100)), (900,)], columns)
    result, want = host.cuda_cg_update(*lists, rz), ops.cg_update(*lists, rz)
    for got, exact in zip(testing.pieces(result), testing.pieces(want), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    whole = ops.cg_update(*(torch.cat([y.reshape(-1, *rz.shape) for y in one]) for one in lists), rz)
    assert torch.allclose(torch.cat([y.reshape(-1, *rz.shape) for y in result[2]]), whole[2], rtol=1e-12, atol=1e-12)
    empty = host.cuda_cg_update([], [], [], [], rz)
    assert empty[:3] == ([], [], []) and not empty[3].any() and not empty[4].any()


def test_cg_update_solves_a_system_and_keeps_what_has_no_positive_curvature(host):
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, b = factor @ factor.T + torch.eye(12), torch.randn(12, 2, generator=generator, dtype=torch.float64)
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rz = r.square().sum(0)
    for _ in range(12):
        *_, rz = host.cuda_cg_update(x, r, p, matrix @ p, rz, damping=0.5, inplace=True)
    torch.testing.assert_close(x, torch.linalg.solve(matrix + 0.5 * torch.eye(12), b), rtol=1e-8, atol=1e-10)
    x, r, p = (torch.randn(40, 3, generator=generator) for _ in range(3))
    q = p * torch.tensor([1.0, -1.0, math.nan])
    new_x, new_r, _, curvature, _ = host.cuda_cg_update(x, r, p, q, r.double().square().sum(0))
    assert curvature[0] > 0 > curvature[1] and curvature[2].isnan()
    assert torch.equal(new_x[:, 1:], x[:, 1:]) and torch.equal(new_r[:, 1:], r[:, 1:])
    testing.assert_accurate((new_x[:, :2], new_r[:, :2]), lambda *a: [y[:, :2] for y in ops.cg_update.reference(*a)[:2]],
                            x, r, p, q, r.double().square().sum(0))  # fmt: skip


def test_cg_update_says_what_it_cannot_do(host):
    x = torch.ones(4, 300)
    assert "on cpu" in host.cuda_cg_update_supports(x, x, x, x, torch.ones(300, dtype=torch.float64))
    assert "not yet measured" in host.cuda_cg_update_worthwhile(x, x, x, x, torch.ones(300, dtype=torch.float64))
