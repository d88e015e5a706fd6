"""The call of cuSOLVER's batched eigensolver, with a libcusolver of C in its place: arguments, workspaces, layouts, failures."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hvpfast.kernels import eigh_batched

from hvpfast.operators import eigen, lapack
from hvpfast.operators.factor import Dense


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "lda", "batch")),
        *((name, ctypes.c_int) for name in ("jobz", "uplo", "type_a", "type_w", "type_c")),
        ("stream", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("device", "host")),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("cusolver") / "libcusolver.so.12"
    source = Path(__file__).with_name("fake_cusolver.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(source), "-lm"], check=True)
    return path


@pytest.fixture
def library(built):
    found = ctypes.CDLL(str(built))
    ctypes.c_int.in_dll(found, "refuse").value = 0
    ctypes.c_int64.in_dll(found, "fail").value = -1
    return found


@pytest.fixture
def pretended(library, monkeypatch):
    """CPU tensors pass for CUDA ones, and torch for 2.11."""
    monkeypatch.setattr(eigh_batched, "_library", lambda: library)
    monkeypatch.setattr(eigh_batched, "_of_thread", SimpleNamespace())
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return library


def symmetric(batch, n, dtype=torch.float64, seed=0):
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + x.mT).to(dtype)


def last(library):
    return Call.in_dll(library, "last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "n"), [(2, 33), (3, 41), (5, 34)])
def test_against_lapack(pretended, dtype, batch, n):
    a = symmetric(batch, n, dtype)
    given = a.clone()
    values, vectors = eigh_batched.eigh(a)
    assert torch.equal(a, given)
    called = last(pretended)
    assert (called.n, called.lda, called.batch, called.stream) == (n, n, batch, 77)
    code = {torch.float32: 0, torch.float64: 1}[dtype]
    assert (called.jobz, called.uplo, called.type_a, called.type_w, called.type_c) == (1, 1, code, code, code)
    assert called.device == 8 * n * n + 40 and called.host == 24
    bound = 200 * torch.finfo(dtype).eps * n
    truth = torch.linalg.eigvalsh(a.double())
    assert (values.double() - truth).abs().max() < bound * truth.abs().max() / n
    rebuilt = (vectors.double() * values.double()[:, None]) @ vectors.double().mT
    torch.testing.assert_close(rebuilt, a.double(), rtol=0, atol=bound)
    torch.testing.assert_close(
        vectors.mT @ vectors, torch.eye(n, dtype=dtype).expand(batch, -1, -1), rtol=0, atol=bound
    )


def test_the_lower_triangle_is_read_as_torch_does_and_any_layout(pretended):
    a = symmetric(2, 35)
    scribbled = a + torch.ones(35, 35).triu(1) * 1e3
    for x in (scribbled, scribbled.mT.contiguous().mT, scribbled.expand(2, 2, 35, 35)[0]):
        torch.testing.assert_close(eigh_batched.eigh(x)[0], torch.linalg.eigvalsh(a), rtol=1e-10, atol=1e-10)


def test_one_handle_a_thread_and_device(pretended):
    count = ctypes.c_int.in_dll(pretended, "handles")
    before = count.value
    for _ in range(3):
        eigh_batched.eigh(symmetric(2, 33))
    assert count.value == before + 1


def test_a_matrix_that_did_not_converge_is_nan_and_goes_again_in_float64(pretended):
    ctypes.c_int64.in_dll(pretended, "fail").value = 1
    a = symmetric(3, 33, torch.float32)
    values, _ = eigh_batched.eigh(a)
    assert values[1].isnan().all() and values[[0, 2]].isfinite().all()
    ((values, vectors),) = lapack.eigh_all([a], [[0, 1, 2]])
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, a, rtol=0, atol=1e-4)
    factors = [Dense(x[None] @ x[None]) for x in a]
    for found, factor in zip(eigen.eigendecompose(factors), factors, strict=True):
        torch.testing.assert_close(found.dense(), factor.dense(), rtol=1e-4, atol=1e-3)
    assert last(pretended).batch == 3


def test_a_refused_call_falls_back_with_a_warning(pretended):
    ctypes.c_int.in_dll(pretended, "refuse").value = 1
    a = symmetric(2, 40)
    with pytest.warns(
        RuntimeWarning, match="cusolverDnXsyevBatched_bufferSize returned status 7; torch.linalg.eigh goes on"
    ):
        values, _ = eigh_batched.eigh(a)
    assert torch.equal(values, torch.linalg.eigh(a)[0])


def test_when_torch_takes_it(pretended, monkeypatch):
    why = eigh_batched.why_not
    assert why(symmetric(2, 33)) is None
    assert "several matrices above 32" in why(symmetric(1, 50)) and "shape (4, 32, 32)" in why(symmetric(4, 32))
    assert "float16" in why(symmetric(2, 33, torch.float16))
    assert "requires grad" in why(symmetric(2, 33).requires_grad_())
    monkeypatch.setattr(eigh_batched, "_library", lambda: "no such library")
    assert why(symmetric(2, 33)) == "no such library"
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert "calls the batched solver itself" in why(symmetric(2, 33))


def test_on_the_cpu_it_is_torch(library):
    a = symmetric(2, 40)
    assert "on cpu" in eigh_batched.why_not(a)
    for ours, theirs in zip(eigh_batched.eigh(a), torch.linalg.eigh(a), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("version", "does"),
    [("2.8.0", False), ("2.11.1+cu130", False), ("2.12.0", True), ("2.13.0a0+git1", True), ("3.0", True)],
)
def test_the_probe_by_version(version, does):
    assert eigh_batched.torch_batches(version) == does


def test_the_library_that_is_loaded(built):
    line = "7f00-7f01 r-xp 00000000 08:01 12    "
    maps = f"{line}/opt/a b/libcusolverMg.so.12\n{line}/opt/a b/libcusolver.so.12\n{line}/lib/libc.so.6\n"
    assert eigh_batched.loaded(maps) == "/opt/a b/libcusolver.so.12"
    assert eigh_batched.loaded(f"{line}/opt/libcusolverMg.so.12\n") is None
    ctypes.CDLL(str(built))
    mine = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(built) in line]
    assert eigh_batched.loaded("\n".join(mine)) == str(built)  # beside torch's own, where it is built for CUDA


def test_the_probe_prints(capsys):
    eigh_batched.main()
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and ("batches" in said or "loops over" in said)
