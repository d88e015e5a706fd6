"""The compiled form of what a call asks (csrc/cpu/calls.cpp): it answers as dispatch would, or leaves the question to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hvpfast import ops, untouchable
from hvpfast.dispatch import precision
from hvpfast.testing import assert_accurate

ops.gram(torch.ones(2, 2))  # loads the compiled kernels, where they are built
WHOLE = ops.gram._whole
pytestmark = pytest.mark.skipif(
    WHOLE is None or untouchable.KNOWN["exchange"] is None, reason="not built, or an older torch"
)


def whole(*args, mode="auto", **kwargs):
    return WHOLE(args, kwargs, mode)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ((7,), (1, 5), (9, 33), (3, 4, 17), (16, 700), (2050, 8)), ids=str)
def test_a_whole_call_is_the_op(shape, dtype):
    x = draw(*shape, dtype=dtype)
    for given in (x, torch.cat([x, x], -1)[..., : shape[-1]], x.mT.contiguous().mT if x.dim() > 1 else x):
        result = whole(given)
        if result is not NotImplemented:  # many features of 16 bits: the reference widens them
            assert_accurate(result, ops.gram, x, precision="bf16x3")
        width = shape[-1] + 1
        held = draw(width, width, dtype=ops.accumulate_dtype(dtype))
        out = held.clone()
        result = whole(given, out=out, ones_column=True, alpha=0.5, beta=-2)
        if result is not NotImplemented:
            assert result is out
            assert_accurate(out, ops.gram, x, out=held, ones_column=True, alpha=0.5, beta=-2.0, precision="bf16x3")
    assert shape[-1] > 96 or shape[0] > 1000 or result is not NotImplemented


def test_what_it_leaves_to_dispatch():
    x, out = draw(4, 3), torch.empty(3, 3)
    for args, kwargs in (
        ((), {"x": x}), ((x, x), {}), ((x,), {"other": 1}), ((x,), {"out": torch.empty(2, 2)}), ((x,), {"beta": 1.0}),
        ((x,), {"mirror": False}), ((x,), {"out": out, "mirror": None}),
        ((x,), {"out": out.double()}), ((x,), {"out": torch.empty(1).expand(3, 3)}), ((x,), {"out": 3}),
        ((x.int(),), {}), ((x.cfloat(),), {}), ((x.to("meta"),), {}), ((x.to_sparse(),), {}), ((torch._neg_view(x),), {}),
        ((x.clone().requires_grad_(),), {}), ((x,), {"out": out.clone().requires_grad_()}), ((x[:0],), {}), ((x[0, 0],), {}),
        ((x.tolist(),), {}), ((torch.nn.Buffer(x).as_subclass(type("Own", (torch.Tensor,), {})),), {}),
    ):  # fmt: skip
        assert WHOLE(args, kwargs, "auto") is NotImplemented
    assert whole(x, mode="fp8") is NotImplemented
    with torch.no_grad():
        assert whole(x.clone().requires_grad_()) is not NotImplemented
    seen = []
    torch.func.vmap(lambda y: (seen.append(whole(x)), y)[1])(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(whole(x))
    with FlopCounterMode(display=False):
        seen.append(whole(x))
    assert seen == [NotImplemented] * 3


def test_torchs_product_runs_in_the_tensors_dtype_whatever_autocast_says():
    x, out = draw(16, 700), torch.empty(700, 700)
    assert ops.gram.choose(x).backend == "reference"
    assert torch.equal(whole(x), x.T @ x) and whole(x, out=out) is out and torch.equal(out, x.T @ x)
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(x) is NotImplemented
        assert torch.equal(ops.gram(x), out)


@pytest.mark.parametrize(("rows", "features"), ((1, 130), (12, 40), (16, 120), (30, 200), (16, 600)))
def test_out_may_share_memory_with_x(rows, features):
    for start in (0, 1):
        held = draw(features + 1, features)
        want = ops.gram.reference(held[start : start + rows].double())
        result = ops.gram(held[start : start + rows], out=held[:features])
        assert float((result - want).norm() / want.norm()) < 1e-5


def test_out_counts_as_written():
    out, weight = torch.zeros(3, 3), torch.ones(3, 3, requires_grad=True)
    product = (weight * out).sum()
    assert whole(draw(4, 3), out=out) is out
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_values_that_are_no_numbers_stay_where_they_belong():
    for rows, features in ((3, 5), (20, 33), (1, 140), (500, 8)):
        x = draw(rows, features)
        x[rows // 2, 2] = math.inf
        x[0, -1] = math.nan
        found, want = ops.gram(x), x.T @ x
        assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.isinf(), want.isinf())


def test_precision_is_asked_for_by_name():
    x = draw(300, 96)
    errors = []
    for mode in ("ieee", "bf16x3", "bf16"):
        with precision(mode):
            assert torch.equal(ops.gram(x), whole(x, mode=mode))
        errors.append(float((whole(x, mode=mode) - ops.gram.reference(x.double())).norm()))
    assert errors[0] <= errors[1] <= errors[2]


def test_fits():
    a, g = draw(3, 2, 4), draw(6, 2, 5)
    assert untouchable.fits("nti,mto", a, g) and untouchable.fits("nti,mto,oi", a, g, draw(5, 4))
    assert untouchable.fits("nti,mto", a[:0], g[:0]) and not untouchable.fits("nti,mto", a[:0], g)
    for wrong in (g[:4], g[:, :1], g.double(), g[0], g[None], g.to("meta"), g.int(), g.to_sparse(), None):
        assert not untouchable.fits("nti,mto", a, wrong)
    assert not untouchable.fits("nti,mto,oi", a, g, draw(4, 5)) and not untouchable.fits("nti,mti", a, g)


def test_plain():
    x = draw(3, 2)
    grad = x.clone().requires_grad_()
    assert untouchable._plain((x, 1, None, "a", [x, x], torch.nn.Parameter(x, requires_grad=False)), {"b": x, "c": 1.0})
    for wrong in (grad, [x, grad], torch._neg_view(x), x.to_sparse(), object()):
        assert not untouchable._plain((x, wrong), {})
        assert not untouchable._plain((x,), {"b": wrong})
    with torch.no_grad():
        assert untouchable._plain((grad,), {})
