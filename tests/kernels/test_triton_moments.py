"""The Triton kernels that sum over samples (second moments, weighted sums), on every tile and split, against float64."""

import math

import pytest
import torch
from hvpfast.kernels import moments, products, rotated_second_moment, sample_statistics, second_moment, weighted_grad
from on_triton import DEVICE, poisoned

from hvpfast import ops, testing

STATED = {"exact": "ieee", "bf16x6": "ieee"}


def inputs(dtype=torch.float32, **sizes):
    return testing.make_inputs("sample_grads", **sizes, dtype=dtype, device=DEVICE)[0]


def of(product: str) -> torch.dtype:
    return torch.bfloat16 if product == "exact" else torch.float32


@pytest.mark.parametrize("key", [key for route, key in moments.TILES if route == "samples"])
def test_one_pass_gives_squares_weighted_sums_and_norms(key):
    product, tile = key.partition("-")[0], moments.TILES["samples", key]
    for (t, i, o), splits in (((64, tile.side, tile.side), 1), ((70, 33, 65), 2), ((33, 17, 3), 5)):
        if "short" in key and t > 64:
            continue
        a, g = inputs(n=2, t=t, i=i, o=o, k=2, dtype=of(product))
        c = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).to(a)
        squares, weighted = poisoned(o, i), poisoned(1, o, i)
        norms = moments.by_samples(
            a, g, c[:, :1], product, squares=squares, weighted=weighted, norms=True, tile=tile, splits=splits
        )
        stated = STATED.get(product, product)
        testing.assert_accurate(squares, ops.second_moment, a, g, precision=stated)
        testing.assert_accurate(weighted, ops.weighted_grad, a, g, c[:, :1], precision=stated)
        testing.assert_accurate(norms, ops.sample_norms_squared, a, g, precision=stated)
        columns = poisoned(2, o, i)
        moments.by_samples(a, g, c, product, weighted=columns, tile=tile, splits=splits)
        testing.assert_accurate(columns, ops.weighted_grad, a, g, c, precision=stated)


BY_ROWS = [(key, torch.float32) for route, key in moments.TILES if route == "rows"]
BY_ROWS += [("bf16x6", torch.bfloat16), ("bf16x6", torch.float16)]


@pytest.mark.parametrize(("key", "dtype"), BY_ROWS)
def test_one_product_of_rows(key, dtype):
    product, tile = key.partition("-")[0], moments.TILES["rows", key]
    for (n, t, i, o, k), splits in (
        ((64, 1, tile.side, tile.side, 1), 2),
        ((37, 1, 17, 65, 3), 1),
        ((9, 5, 65, 3, 2), 3),
    ):
        a, g = inputs(n=n, t=t, i=i, o=o, k=k, dtype=dtype)
        c = torch.randn(n * k, 2, generator=torch.Generator().manual_seed(1)).to(a)
        out = poisoned(2, o, i)
        moments.by_rows(a, g, c, out, product, tile=tile, splits=splits)
        testing.assert_accurate(out, ops.weighted_grad, a, g, c, precision=STATED.get(product, product))
        if t == 1:
            out = poisoned(1, o, i)
            moments.by_rows(a, g, None, out, product, tile=tile, splits=splits)
            testing.assert_accurate(out[0], ops.second_moment, a, g, precision=STATED.get(product, product))


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "auto"), (torch.float32, "ieee"), (torch.bfloat16, "auto")]
)
@pytest.mark.parametrize(("n", "t", "k"), [(3, 40, 2), (40, 1, 1), (9, 5, 1)])
def test_statistics_together_are_those_apart(dtype, precision, n, t, k):
    a, g = inputs(n=n, t=t, i=33, o=17, k=k, dtype=dtype)
    c = torch.randn(n * k, generator=torch.Generator().manual_seed(1)).to(a)
    bound = "ieee" if precision == "ieee" else "bf16x3"
    for weights in (None, c):
        found = sample_statistics.sample_statistics(a, g, weights, precision=precision)
        testing.assert_accurate(found, ops.sample_statistics, a, g, weights, precision=bound)


def test_float16_beyond_its_range_when_squared():
    """Squares and weighted slopes are float32: 300^2 is beyond float16, 2^-13 squared below its normal numbers."""
    a, g = (300 * x for x in inputs(n=40, t=1, i=17, o=5, dtype=torch.float16))
    testing.assert_accurate(second_moment.second_moment(a, g), ops.second_moment, a, g)
    a, g = (torch.ldexp(x, torch.tensor(-13)).to(x.dtype) / 300 for x in (a, g))
    testing.assert_accurate(second_moment.second_moment(a, g), ops.second_moment, a, g)
    c = torch.full((40,), 2.0**-14, dtype=torch.float16, device=DEVICE)
    testing.assert_accurate(weighted_grad.weighted_grad(a, g, c), ops.weighted_grad, a, g, c)


@pytest.mark.parametrize("t", [1, 40])
def test_what_is_not_finite_stays_in_its_rows_and_columns(t):
    a, g = inputs(n=3, t=t, i=20, o=18)
    g[1, 0, 4] = math.inf
    finite = second_moment.second_moment(a, g, precision="bf16x3").isfinite()
    assert finite[[o for o in range(18) if o != 4]].all() and not finite[4].all()


@pytest.mark.parametrize("key", products.TILES)
def test_plain_products(key):
    name, tile = key.partition("-")[0], products.TILES[key]
    for (k, r, c), splits in (((2 * tile.depth, tile.side, tile.side), 2), ((65, 17, 63), 1), ((130, 3, 66), 3)):
        generator = torch.Generator().manual_seed(k)
        x, y = (torch.randn(k, n, generator=generator).to(DEVICE, of(name)) for n in (r, c))
        result = products.product(x.T.contiguous().T, y, name, tile=tile, splits=splits)
        testing.assert_accurate(result, lambda x, y: x.float().T @ y.float() if x.dtype is torch.bfloat16 else x.T @ y,
                                x, y, precision=STATED.get(name, name))  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize(("n", "t"), [(1, 40), (3, 33), (40, 1)])
def test_rotations_keep_the_stated_bound_for_few_samples(n, t, precision):
    args, _ = testing.make_inputs("rotated_second_moment", n=n, t=t, i=65, o=33, device=DEVICE)
    result = rotated_second_moment.rotated_second_moment(*args, precision=precision)
    testing.assert_accurate(result, ops.rotated_second_moment, *args, precision=precision)


def test_second_moment_says_what_it_cannot_do():
    a, g = inputs(n=3, t=4, i=4, o=3)
    assert "float64" in second_moment.supports(a.double(), g.double())
    assert "shares memory" in second_moment.supports(a, g, out=a[0, :3])
    assert "not yet measured" in second_moment.worthwhile(a, g) and "not yet measured" in weighted_grad.worthwhile(
        a, g, g[:, 0, 0]
    )
