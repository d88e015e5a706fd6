"""Which implementation runs: the choice, its reasons, what is forced, and what only the reference may touch."""

from __future__ import annotations

import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import hvpfast as hf
from hvpfast import dispatch, ops
from hvpfast.dispatch import OPS, BackendError, Choice

A = torch.arange(6.0).reshape(3, 2)


@pytest.fixture
def fake(monkeypatch):
    """An op of its own, `doubled`, with fake kernels: `fake.native` and `fake.triton` stand for the kernel modules."""
    native, triton = types.ModuleType("hvpfast.kernels.native"), types.ModuleType("hvpfast.kernels.doubled")
    calls: list[tuple] = []

    def kernel(label):
        def run(x: Tensor, *, out=None, precision="auto"):
            calls.append((label, precision))
            return 2 * x if out is None else torch.mul(x.detach(), 2, out=out)

        return run

    native.missing = lambda device: None
    native.cpu_doubled, native.cuda_doubled, triton.doubled = kernel("cpu"), kernel("cuda"), kernel("triton")
    monkeypatch.setitem(sys.modules, "hvpfast.kernels.native", native)
    monkeypatch.setitem(sys.modules, "hvpfast.kernels.doubled", triton)
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: None)
    monkeypatch.setattr(dispatch, "OPS", dict(dispatch.OPS))

    def doubled(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Twice x."""
        calls.append(("reference", None))
        return x * 2 if out is None else out.copy_(x * 2)

    def check(x, *, out=None):
        if x.dim() == 0:
            raise ValueError("doubled: x is a scalar")

    def make(*backends: str):
        return hf.dispatch.op(check=check, backends=backends)(doubled)

    return types.SimpleNamespace(native=native, triton=triton, calls=calls, make=make)


def ran(fake) -> str:
    label = fake.calls[-1][0]
    fake.calls.clear()
    return label


# the choice -----------------------------------------------------------------------------------------------------------


def test_the_first_fit_kernel_runs_else_the_reference(fake):
    op = fake.make("cpu", "triton", "cuda")
    op(A)
    assert ran(fake) == "cpu"
    assert op.choose(A).backend == "cpu"
    fake.native.cpu_doubled_supports = lambda x, *, out=None, precision: "odd" if x.numel() % 2 else None
    op = fake.make("cpu", "triton", "cuda")
    op(A)
    assert ran(fake) == "cpu"
    op(A[:1, :1])
    assert ran(fake) == "reference"
    choice = op.choose(A[:1, :1])
    assert choice == Choice("reference", choice.why_not) and choice.why_not["cpu"] == "odd"
    assert str(choice).splitlines()[:2] == ["runs: reference", "not cpu: odd"]
    assert choice.why_not["triton"] == "not taken by itself for cpu tensors"


def test_a_kernel_known_to_be_slower_is_left_out_but_can_be_forced(fake):
    fake.native.cpu_doubled_worthwhile = lambda x, *, out=None, precision: "too small" if x.numel() < 5 else None
    op = fake.make("cpu")
    op(A)
    assert ran(fake) == "cpu"
    op(A[:1])
    assert ran(fake) == "reference"
    assert op.choose(A[:1]).why_not == {"cpu": "too small"}
    assert op.why_not("cpu", A[:1]) is None
    with hf.backend("cpu"):
        assert op.choose(A[:1]) == Choice("cpu")
        op(A[:1])
    assert ran(fake) == "cpu"
    op.on("cpu")(A[:1])
    assert ran(fake) == "cpu"


def test_order_on_a_gpu(fake, monkeypatch):
    monkeypatch.setattr(dispatch, "_device", lambda args, kwargs: "cuda")
    op = fake.make("cpu", "triton", "cuda")
    op(A)
    assert ran(fake) == "cuda"
    assert op.choose(A).why_not == {
        "triton": "cuda comes first",
        "cpu": "the tensors are on cuda; it takes those on cpu",
    }
    fake.native.cuda_doubled_supports = lambda x, *, out=None, precision: "no"
    op = fake.make("cpu", "triton", "cuda")
    op(A)
    assert ran(fake) == "triton"
    fake.triton.worthwhile = lambda x, *, out=None, precision: "slower"
    op = fake.make("cpu", "triton", "cuda")
    op(A)
    assert ran(fake) == "reference"
    assert op.choose(A).why_not["triton"] == "slower"


def test_precision_reaches_the_kernel(fake):
    op = fake.make("cpu")
    for name in dispatch.PRECISIONS:
        with hf.precision(name):
            op(A)
            op.on("cpu")(A)
    assert [precision for _, precision in fake.calls] == [name for name in dispatch.PRECISIONS for _ in range(2)]


def test_choose_computes_nothing_and_checks_arguments(fake):
    op = fake.make("cpu")
    op.choose(A)
    assert fake.calls == []
    for ask in (op, op.choose, op.on("cpu"), op.on("reference")):
        with pytest.raises(ValueError, match="doubled: x is a scalar"):
            ask(torch.tensor(1.0))
    with hf.backend("triton"), pytest.raises(BackendError, match="doubled has no triton implementation"):
        op.choose(A)


def test_kernels_that_cannot_be_imported_are_reasons(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "hvpfast.kernels.doubled", None)  # makes the import raise ImportError
    op = fake.make("cpu", "triton")
    assert "its kernel module could not be imported" in op.why_not("triton")
    with pytest.raises(BackendError, match="could not be imported"):
        op.on("triton")(A)
    monkeypatch.setitem(sys.modules, "hvpfast.kernels.native", None)
    op = fake.make("cpu", "triton")
    assert "install hvpfast with `pip install .`" in op.why_not("cpu")
    op(A)
    assert ran(fake) == "reference"


def test_without_the_extensions_everything_runs_on_the_reference(fake):
    fake.native.missing = lambda device: f"not built: no {device} today"
    op = fake.make("cpu", "cuda")
    op(A)
    assert ran(fake) == "reference"
    assert op.why_not("cpu") == "not built: no cpu today"
    with pytest.raises(BackendError, match="doubled: backend 'cpu' was asked for and cannot run: not built: no cpu"):
        op.on("cpu")(A)


def test_triton_is_missing_for_a_reason(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        assert "TRITON_INTERPRET=1" in dispatch.missing("triton")
        triton.knobs.runtime.interpret = True
        assert dispatch.missing("triton") is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install hvpfast[triton]" in dispatch.missing("triton")


# forcing --------------------------------------------------------------------------------------------------------------


def test_forced_backends_run_or_raise():
    runs = {name for name in dispatch.BACKENDS if OPS["gram"].why_not(name, A) is None}
    assert "reference" in runs
    for name in dispatch.BACKENDS:
        with hf.backend(name):
            if name in runs:
                torch.testing.assert_close(ops.gram(A), A.T @ A)
            else:
                with pytest.raises(BackendError, match=f"gram: backend '{name}' was asked for and cannot run: .*Use"):
                    ops.gram(A)


def test_a_forced_backend_refuses_what_it_cannot_touch(fake):
    fake.native.cpu_doubled_supports = lambda x, *, out=None, precision: (
        "it is float64" if x.dtype.itemsize > 4 else None
    )
    op = fake.make("cpu")
    for x, reason in (
        (A.double(), "it is float64"),
        (A.to("meta"), "the tensors are on meta; it takes those on cpu"),
        (A.clone().requires_grad_(), "an argument requires grad"),
        (A.to_sparse(), "layout torch.sparse_coo"),
        (torch._neg_view(A), "lazily negated"),
        (TwoTensor(A, A), "a TwoTensor, not a plain tensor"),
    ):
        with hf.backend("cpu"), pytest.raises(BackendError, match=reason):
            op(x)
        assert fake.calls == []
        assert reason in op.choose(x).why_not["cpu"] or x.is_meta
        op(x)
        assert ran(fake) == "reference"


def test_nesting_and_restoring():
    def now():
        return dispatch._state.backend, dispatch._state.precision

    before = now()
    with hf.backend("reference"), hf.precision("ieee"):
        assert now() == ("reference", "ieee")
        with hf.backend("cpu"):
            with hf.precision("bf16"):
                assert now() == ("cpu", "bf16")
            with hf.backend("auto"):
                assert now() == (None, "ieee")
            with hf.backend(None), hf.precision("auto"):
                assert now() == (None, "auto")
            assert now() == ("cpu", "ieee")
        assert now() == ("reference", "ieee")
        with pytest.raises(RuntimeError, match="inside"), hf.backend("triton"), hf.precision("bf16x3"):
            raise RuntimeError("inside")
        assert now() == ("reference", "ieee")
        again = hf.backend("cpu")
        with again:
            with again:
                pass
            assert now()[0] == "cpu"
    assert now() == before


def test_other_threads_see_what_is_forced():
    seen = []
    with hf.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.gram.choose(A)))
        thread.start()
        thread.join()
    assert seen == [Choice("reference")]


@pytest.mark.parametrize("make", (hf.backend, hf.precision))
def test_unknown_names_are_refused(make):
    with pytest.raises(ValueError, match="got 'gpu'; it must be one of auto, "):
        make("gpu")


def test_refusals_of_the_questions():
    with pytest.raises(ValueError, match="precision: got None"):
        hf.precision(None)
    for name in ("auto", "tpu", None):
        with pytest.raises(ValueError, match=r"must be one of"):
            ops.gram.on(name)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    (
        ("HVPFAST_BACKEND", "reference", "reference auto off"),
        ("HVPFAST_BACKEND", "auto", "None auto off"),
        ("HVPFAST_PRECISION", "ieee", "None ieee off"),
        ("HVPFAST_PRECISION", "auto", "None auto off"),
        ("HVPFAST_CUDA_GRAPHS", "auto", "None auto auto"),
        ("HVPFAST_CUDA_GRAPHS", "required", "None auto required"),
        ("HVPFAST_CUDA_GRAPHS", "1", "HVPFAST_CUDA_GRAPHS: got '1'; it must be one of off, auto, required"),
        (
            "HVPFAST_BACKEND",
            "fast",
            "HVPFAST_BACKEND: got 'fast'; it must be one of auto, reference, cpu, triton, cuda",
        ),
        ("HVPFAST_PRECISION", "fp8", "HVPFAST_PRECISION: got 'fp8'; it must be one of auto, ieee, bf16x3, bf16"),
    ),
)
def test_environment(clean_env, variable, value, expected):
    code = "from hvpfast.dispatch import _state as s; print(s.backend, s.precision, s.graphs)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean_env, variable: value}, capture_output=True, text=True
    )
    shown = done.stdout.strip() if done.returncode == 0 else done.stderr
    assert expected in shown and (done.returncode == 0) == ("got" not in expected)


# questions ------------------------------------------------------------------------------------------------------------


def test_the_table_of_backends():
    table = hf.backends()
    assert {(name, where) for name, where, _ in table} == {(name, where) for name in OPS for where in dispatch.BACKENDS}
    lines = str(table).splitlines()
    assert len(lines) == len(OPS) * len(dispatch.BACKENDS)
    for (name, where, reason), line in zip(table, lines, strict=True):
        assert line.split()[:2] == [name, where] and line.endswith(reason or "ready")
        assert reason is None if where == "reference" else (reason is None) == (OPS[name].why_not(where) is None)


def test_ops_look_like_functions():
    for name, op in OPS.items():
        assert (
            op.__name__ == name
            and op.__doc__
            and op.__module__.startswith("hvpfast.ops.")
            and op.__wrapped__ is op.reference
        )
        assert getattr(ops, name) is op
        assert repr(op).startswith(f"<op {name}: reference")
        assert op.on("reference").__name__ == f"{name}_reference"


def test_every_named_backend_has_its_launcher():
    """A name in `backends` without a kernel would only show when forced."""
    for name, op in OPS.items():
        for where in op.backends:
            reason = op.why_not(where)
            assert reason is None or ("implementation" not in reason and "no function" not in reason), (name, where)


# out and autograd -----------------------------------------------------------------------------------------------------


def test_autograd_learns_that_out_was_written(fake):
    """A tensor saved for a backward pass and then overwritten by a kernel is an error, not a wrong gradient."""
    op = fake.make("cpu")
    for call in (op, op.on("cpu"), op.on("reference")):
        out, weight = torch.zeros(3, 2), torch.ones(3, 2, requires_grad=True)
        product = (weight * out).sum()
        call(A, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    assert [label for label, _ in fake.calls] == ["cpu", "cpu", "reference"]


def test_out_that_requires_grad_is_left_to_autograd():
    out = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ops.gram(A, out=out)
    moved = (out * 1.0).clone()
    ops.gram(A, out=moved, beta=1.0, alpha=2.0)
    moved.sum().backward()
    torch.testing.assert_close(out.grad, torch.ones(2, 2))


def test_keyword_arguments_are_looked_at_too(fake):
    op = fake.make("cpu")
    op(x=A)
    assert ran(fake) == "cpu"
    op(x=A.clone().requires_grad_())
    assert ran(fake) == "reference"
    assert op.choose(x=A).backend == "cpu"
