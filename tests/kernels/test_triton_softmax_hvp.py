"""The Triton kernels of softmax_hvp and softmax_root, each of their routes, against the reference in float64."""

import math

import pytest
import torch
from hvpfast.kernels import softmax_hvp as kernel
from on_triton import DEVICE, DTYPES, poisoned, tensor

from hvpfast import ops, testing

ROUTES = [{}, {"narrow": 0, "splits": 1}, {"narrow": 0, "splits": 3}]


def draw(rows, classes, columns, dtype=torch.float32, layout="contiguous", spread=3.0):
    x = spread * tensor(rows, classes, dtype=dtype)
    return testing.laid_out(x, layout), *(
        tensor(*shape, dtype=dtype, layout=layout, seed=seed) for seed, shape in ((1, (columns, rows, classes)), (2, (rows,)))
    )  # fmt: skip


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_every_route(route, dtype, layout):
    for size in (
        ((1, 1, 1), (3, 17, 2), (2, 2049, 2), (300, 5, 1)) if not route else ((1, 1, 1), (3, 17, 2), (1, 4400, 2))
    ):
        x, v, weight = draw(*size, dtype=dtype, layout=layout)
        for factor in (None, weight):
            out = poisoned(*v.shape)
            kernel.launch(x, v, factor, out, **route)
            testing.assert_accurate(out, ops.softmax_hvp, x, v, weight=factor)


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_every_route_of_the_root(route, dtype, transpose):
    for size in ((1, 1, 1), (3, 17, 2), (300, 5, 1)) if not route else ((3, 17, 2), (1, 4400, 2)):
        x, v, weight = draw(*size, dtype=dtype, layout="strided")
        for factor in (None, weight.abs()):
            out = poisoned(*v.shape)
            kernel.launch(x, v, factor, out, kernel.TRANSPOSE if transpose else kernel.ROOT, **route)
            testing.assert_accurate(out, ops.softmax_root, x, v, weight=factor, transpose=transpose)


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("kind", [kernel.ROOT, kernel.TRANSPOSE])
def test_the_root_of_extreme_logits(route, kind):
    """No overflow; a class without probability has no part in the root; NaN and inf where the reference has them."""
    for spread in (100.0, 1e4, 1e30, None):
        x, v, _ = draw(4, 2100, 1, spread=spread or 3.0)
        if spread is None:
            x[0, 7], x[1, 2099], x[2, 0], x[3] = -math.inf, math.inf, math.nan, -math.inf
        out = poisoned(*v.shape)
        kernel.launch(x, v, None, out, kind, **route)
        want = ops.softmax_root.reference(x, v, transpose=kind == kernel.TRANSPOSE)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_vocabulary():
    x, v, weight = draw(2, 128 * 1024 + 1, 1, dtype=torch.bfloat16)
    result = ops.softmax_hvp.on("triton")(x, v[0], weight=weight)
    testing.assert_accurate(result, ops.softmax_hvp, x, v[0], weight=weight)
    assert torch.equal(result, ops.softmax_hvp.on("triton")(x, v[0], weight=weight))
    for transpose in (False, True):
        result = ops.softmax_root.on("triton")(x, v[0], weight=weight.abs(), transpose=transpose)
        testing.assert_accurate(result, ops.softmax_root, x, v[0], weight=weight.abs(), transpose=transpose)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_no_overflow_and_constants_cancel(route):
    for spread in (100.0, 1e4, 1e30):
        x, v, weight = draw(4, 33, 1, spread=spread)
        out = poisoned(*v.shape)
        kernel.launch(x, v, weight, out, **route)
        want = ops.softmax_hvp.reference(x, v, weight=weight)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    x, v, _ = draw(4, 33, 1)
    out = poisoned(*v.shape)
    kernel.launch(x, torch.full_like(v, 3.0), None, out, **route)
    assert out.abs().max() < 1e-5


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_non_finite_values_as_the_reference_has_them(route, value):
    for where in ("logits", "v", "weight", "row"):
        for at in (0, 2099):
            x, v, weight = draw(3, 2100, 2)
            {"logits": x[1, at], "v": v[1, 1, at], "weight": weight[1], "row": x[1]}[where].fill_(value)
            out = poisoned(*v.shape)
            kernel.launch(x, v, weight, out, **route)
            torch.testing.assert_close(out, ops.softmax_hvp.reference(x, v, weight=weight), equal_nan=True)


def test_leading_axes_and_nothing():
    x, v = tensor(2, 3, 9), tensor(4, 2, 3, 9, seed=1).transpose(1, 2).contiguous().transpose(1, 2)
    testing.assert_accurate(kernel.softmax_hvp(x, v), ops.softmax_hvp, x, v)
    testing.assert_accurate(kernel.softmax_hvp(x[0, 0], v[0, 0, 0]), ops.softmax_hvp, x[0, 0], v[0, 0, 0])
    for shape in ((0, 3), (3, 0)):
        empty = torch.empty(shape, device=DEVICE)
        assert kernel.softmax_hvp(empty, empty).shape == shape
    assert "float64" in kernel.supports(x.double(), v.double())
