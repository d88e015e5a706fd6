"""Every op on every backend that runs here, held against its reference; the references against loops and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    DTYPES,
    INTERPRETED_SIZES,
    LARGE,
    LEFT_OUT,
    PATCHED,
    REDUCED,
    SIZES,
    VARIANTS,
    Size,
    fitting,
    implementations,
    varied,
)
from op_truths import TRUTHS

from hvpfast import dispatch
from hvpfast.testing import LAYOUTS, STATED_BOUND, assert_accurate, error, laid_out, make_inputs, pieces

IMPLEMENTATIONS = implementations()
KERNELS = [(name, backend) for name, backend in IMPLEMENTATIONS if backend != "reference"]


def running(name: str, backend: str):
    """The op bound to a backend, or a skip that says why it cannot run here."""
    reason = dispatch.OPS[name].why_not(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return dispatch.OPS[name].on(backend)


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def tensors(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def interpreted(backend: str) -> bool:
    return backend == "triton" and device_of(backend) == "cpu"


def holds_all(
    name: str, backend: str, sizes: tuple[Size, ...], dtype: torch.dtype, layout: str, precision: str = "ieee"
) -> None:
    """`holds` for each size; the backend must take at least one of them, unless it leaves out the dtype."""
    if dtype in LEFT_OUT.get(backend, ()) or dtype in LEFT_OUT.get((name, backend), ()):
        pytest.skip(f"{name} on {backend} does not take {dtype}")
    if backend == "cpu" and name in REDUCED:
        pytest.skip("it multiplies in bf16x3 alone: tests/kernels/test_cpu_layers.py")
    chosen = fitting(name, sizes, interpreted(backend))
    if not chosen:
        pytest.skip("the interpreter would take minutes")
    ran = sum(holds(name, backend, size, dtype, layout, precision) for size in chosen)
    assert ran > 0, f"{name} on {backend} took none of the sizes in {dtype}, {layout}"


def holds(name: str, backend: str, size: Size, dtype: torch.dtype, layout: str, precision: str = "ieee") -> int:
    """Hold one op on one backend against the reference, with every variant; returns how many could run.

    Also held: nothing is written but the result, `out` is what is returned, and a second call gives the same bits.
    """
    op, ran = dispatch.OPS[name], 0
    variants = VARIANTS.get(name, ({},))
    if name in PATCHED and interpreted(backend):  # every variant in some layout of every width of data, one in each
        variants = [variants[(LAYOUTS.index(layout) + dtype.itemsize + 1) % len(variants)]]
    for variant in variants:
        args, kwargs = make_inputs(
            name, **size._asdict(), dtype=dtype, device=device_of(backend), layout=layout, seed=size.t
        )
        kwargs = varied(name, args, kwargs, variant)
        with dispatch.precision(precision):
            if op.why_not(backend, *args, **kwargs) is not None:
                continue
            given = [x.clone() for x in tensors(args, kwargs)]
            before = {key: value.clone() if key == "out" else value for key, value in kwargs.items()}
            result = op.on(backend)(*args, **kwargs)
            again = dict(kwargs, out=before["out"].clone()) if "out" in kwargs else kwargs
            try:
                if "out" in kwargs:
                    assert result is kwargs["out"], "the result is not `out`"
                for x, was in zip(tensors(args, kwargs), given, strict=True):
                    assert x is kwargs.get("out") or torch.equal(x, was), "an input was written to"
                twice = zip(pieces(op.on(backend)(*args, **again)), pieces(result), strict=True)
                assert all(torch.equal(x, y) for x, y in twice), "a second call gave other bits"
                bound = "bf16x3" if precision == "auto" else precision
                assert_accurate(result, op, *args, precision=bound, **before)
            except AssertionError as wrong:
                raise AssertionError(f"{name} on {backend}, {size}, {dtype}, {layout}, {variant}: {wrong}") from wrong
        ran += 1
    return ran


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_against_the_reference(name, backend, dtype, layout):
    running(name, backend)
    thorough = not interpreted(backend) or (dtype is torch.float32 and layout == "contiguous" and name not in PATCHED)
    holds_all(name, backend, SIZES if thorough else INTERPRETED_SIZES, dtype, layout)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_sizes_that_split(name, backend, dtype):
    running(name, backend)
    holds_all(name, backend, LARGE[:1] if interpreted(backend) else LARGE, dtype, "contiguous")


@pytest.mark.parametrize("precision", ("auto", "bf16x3", "bf16"))
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_reduced_precision_keeps_its_stated_bound(name, backend, precision):
    running(name, backend)
    assert precision == "auto" or precision in STATED_BOUND
    sizes = INTERPRETED_SIZES if interpreted(backend) else (*SIZES, *LARGE)
    holds_all(name, backend, sizes, torch.float32, "contiguous", precision)


@pytest.mark.parametrize(("name", "backend"), [pair for pair in KERNELS if pair[1] != "triton"])
@pytest.mark.parametrize("threads", (1, 2, 5))
def test_threads(name, backend, threads):
    running(name, backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        holds_all(name, backend, (*SIZES, *LARGE), torch.float32, "strided")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", TRUTHS)
def test_the_reference_is_the_formula(name):
    for size in SIZES:
        for variant in VARIANTS.get(name, ({},)):
            args, kwargs = make_inputs(name, **size._asdict(), dtype=torch.float64, seed=3)
            kwargs = varied(name, args, kwargs, variant)
            before = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}
            truth = TRUTHS[name](*args, **before)
            got = dispatch.OPS[name].reference(*args, **kwargs)
            for x, y in zip(pieces(got), pieces(truth), strict=True):
                assert x.shape == y.shape, (size, variant)
                assert max(error(x, y)) < 1e-13, (size, variant)


def test_every_op_is_proven_and_has_inputs():
    assert set(TRUTHS) == set(dispatch.OPS)
    for name in dispatch.OPS:
        args, kwargs = make_inputs(name)
        assert args
        if "out" in kwargs:
            assert kwargs["out"].isnan().all()


@pytest.mark.parametrize("name", dispatch.OPS)
def test_results_are_wide_and_fresh(name):
    for dtype in DTYPES:
        args, kwargs = make_inputs(name, dtype=dtype)
        kwargs.pop("out", None)
        result, *others = pieces(dispatch.OPS[name](*args, **kwargs))
        assert result.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert all(x.dtype in (result.dtype, torch.float64) for x in others)
        assert all(result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in tensors(args, {}))


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_shapes_of_the_leading_axes(name, backend):
    """Ops over `(..., features)` take any number of leading axes."""
    if name not in ("gram", "softmax_hvp", "softmax_root"):
        pytest.skip("the op takes (N, T, I)")
    op = running(name, backend)
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (5, 7), (2, 3, 7), (2, 3, 2, 7), (2, 1, 3, 1, 7)):
        x = torch.randn(*shape, generator=generator).to(device_of(backend))
        for y in (x, x.transpose(0, -1).contiguous().transpose(0, -1), laid_out(x, "strided")):
            args = (y,) if name == "gram" else (y, y.flip(-1))
            with dispatch.precision("ieee"):
                assert_accurate(op(*args), dispatch.OPS[name], *args)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_out_in_any_layout(name, backend):
    op = running(name, backend)
    args, kwargs = make_inputs(name, n=3, t=2, i=17, o=5, dtype=torch.float32, device=device_of(backend))
    if "out" not in kwargs:
        pytest.skip("the op has no out")
    for layout in LAYOUTS:
        out = laid_out(kwargs["out"], layout)
        surroundings = out._base.clone() if out._base is not None else None
        with dispatch.precision("ieee"):
            assert op(*args, out=out) is out
        assert_accurate(out, dispatch.OPS[name], *args)
        if surroundings is not None:
            written = out._base.clone()
            torch.as_strided(written, out.shape, out.stride(), out.storage_offset()).fill_(math.nan)
            assert written.isnan().all(), f"{layout}: written beside out"


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_out_may_be_the_input(name, backend):
    if name not in ("gram", "second_moment"):
        pytest.skip("no input has the result's shape")
    op = running(name, backend)
    for size in (5, 70):
        x = torch.randn(size, 1, size, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
        args = (x[:, 0],) if name == "gram" else (x, x.flip(0))
        expected = dispatch.OPS[name].reference(*(y.clone() for y in args))
        if (reason := dispatch.OPS[name].why_not(backend, *args, out=x[:, 0])) is not None:
            assert "shares memory" in reason  # a backend may say that it cannot, but not be wrong
            continue
        with dispatch.precision("ieee"):
            torch.testing.assert_close(op(*args, out=x[:, 0]), expected)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_non_finite_input_shows(name, backend, value):
    """Where the exact result is NaN or inf, a backend's is not finite either; elsewhere it is not disturbed."""
    op = running(name, backend)
    for t in (1, 3):
        args, kwargs = make_inputs(name, n=3, t=t, i=19, o=4, device=device_of(backend))
        pair = (1, 0, 2) if args[0].shape[0] > 1 and args[0].dim() == 3 else (..., 1, 2)
        args[0][pair if args[0].dim() > 1 else 2] = value
        if "padding" in kwargs:
            kwargs["padding"] = 0  # a kernel may leave products with the padding's zeros out; the reference has 0 * NaN
        if (reason := dispatch.OPS[name].why_not(backend, *args, **kwargs)) is not None:
            pytest.skip(f"{backend}: {reason}")
        exact = [x.clone() for x in pieces(dispatch.OPS[name].reference(*args, **kwargs))]
        assert (
            name.startswith("softmax") or not exact[0].isfinite().all()
        )  # a logit of -inf is a class of no probability
        for x, y in zip(pieces(op(*args, **kwargs)), exact, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite()), (t, backend)
