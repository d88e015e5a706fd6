"""The Triton kernel of the R-operator on every tile, split, layout and precision, against float64 and against differences."""

import math

import pytest
import torch
from hvpfast.kernels import linear_rop
from on_triton import DEVICE, DTYPES, PRECISIONS, poisoned, stated, tensor

from hvpfast import ops, testing

STATED = {"exact": "ieee", "bf16x6": "ieee"}


def inputs(p, i, o, k, dtype=torch.float32, layout="contiguous"):
    args, kwargs = testing.make_inputs("linear_rop", n=p, t=1, i=i, o=o, k=k, dtype=dtype, device=DEVICE, layout=layout)
    return args, kwargs["db"]


@pytest.mark.parametrize("key", linear_rop.TILES)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_tile_and_split(key, splits):
    product, tile = key.partition("-")[0], linear_rop.TILES[key]
    dtype = torch.bfloat16 if product == "exact" else torch.float32
    for p, i, o, k in ((tile.side, 4 * tile.depth, tile.side, 1), (65, 3 * tile.depth + 1, 17, 3), (3, 17, 130, 2)):
        args, db = inputs(p, i, o, k, dtype)
        for shift in (db, None):
            result = linear_rop.launch(*args, shift, product, tile, splits=splits)
            assert torch.equal(result, linear_rop.launch(*args, shift, product, tile, splits=splits))
            testing.assert_accurate(result, ops.linear_rop, *args, db=shift, precision=STATED.get(product, product))


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
@pytest.mark.parametrize("p, i, o", [(1, 1, 1), (3, 17, 63), (65, 3, 17), (17, 65, 1), (64, 64, 64), (130, 100, 40)])
def test_sizes(p, i, o, dtype, precision):
    args, db = inputs(p, i, o, 2, dtype)
    result = linear_rop.linear_rop(*args, db=db, precision=precision)
    bound = "ieee" if precision == "auto" else stated(precision)
    testing.assert_accurate(result, ops.linear_rop, *args, db=db, precision=bound)
    one = linear_rop.linear_rop(*args[:2], args[2][1], args[3][1], db=db[1], precision=precision)
    testing.assert_accurate(one, ops.linear_rop, *args[:2], args[2][1], args[3][1], db=db[1], precision=bound)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    args, db = inputs(18, 33, 19, 2, dtype, layout)
    testing.assert_accurate(linear_rop.linear_rop(*args, db=db), ops.linear_rop, *args, db=db)


def test_the_other_two_products_of_a_reverse_pass_are_this_one_with_other_axes():
    """gx = g w and gw = g' x, and their derivatives in the direction (dg, dw, dx): central differences of what is bilinear are
    exact up to rounding."""
    p, i, o = 33, 20, 17
    x, w, g, dx, dw, dg = (
        tensor(*shape, seed=seed) for seed, shape in enumerate(((p, i), (o, i), (p, o), (p, i), (o, i), (p, o)))
    )

    def rate(f):
        up, down = (f(*(y.double() + h * d.double() for y, d in ((x, dx), (w, dw), (g, dg)))) for h in (0.5, -0.5))
        return up - down

    for result, f in (
        (linear_rop.linear_rop(x, w, dx, dw), lambda x, w, g: x @ w.T),
        (linear_rop.linear_rop(g, w.T, dg, dw.T), lambda x, w, g: g @ w),
        (linear_rop.linear_rop(g.T, x.T, dg.T, dx.T), lambda x, w, g: g.T @ x),
    ):
        assert max(testing.error(result, rate(f))) < 1e-6


def test_of_nothing_and_of_one_direction_for_all():
    x, w = tensor(5, 4), tensor(3, 4)
    assert linear_rop.linear_rop(x, w, x.new_zeros(0, 5, 4), w.new_zeros(0, 3, 4)).shape == (0, 5, 3)
    assert linear_rop.linear_rop(x[:0], w, x[:0], w).shape == (0, 3)
    db = tensor(2, 3)
    empty = linear_rop.linear_rop(x[:, :0], w[:, :0], x.new_zeros(2, 5, 0), w.new_zeros(2, 3, 0), db=db)
    assert torch.equal(empty, db[:, None].expand(2, 5, 3))
    shared = x.expand(3, 5, 4), tensor(3, 3, 4, seed=2)  # stride 0 along K
    testing.assert_accurate(linear_rop.linear_rop(x, w, *shared), ops.linear_rop, x, w, *shared)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    args, db = inputs(20, 40, 18, 1)
    args[2][0, 7, 3] = bad
    result = linear_rop.linear_rop(*args, db=db, precision="bf16x3")
    assert (~result.isfinite()).nonzero()[:, 1].unique().tolist() == [7]


def test_every_element_is_written_and_nothing_else():
    args, db = inputs(19, 40, 18, 2)
    free = poisoned(4, 2, 19, 18)
    del free
    testing.assert_accurate(linear_rop.linear_rop(*args, db=db), ops.linear_rop, *args, db=db)


def test_it_says_what_it_cannot_do():
    args, _ = inputs(3, 4, 5, 1)
    assert "float64" in linear_rop.supports(*(x.double() for x in args))
    assert "not yet measured" in linear_rop.worthwhile(*args)
    x, d = torch.empty(8192, 1024, device="meta"), torch.empty(1, 8192, 1024, device="meta")
    assert "cuBLAS" in linear_rop.worthwhile(x, x[:1024], d, d[:, :1024], precision="ieee")
    assert linear_rop.worthwhile(x, x[:1024], d, d[:, :1024], precision="auto") is None
