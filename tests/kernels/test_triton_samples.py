"""The Triton kernels of single samples' gradients, dots and inner products, on every tile, against float64."""

import pytest
import torch
from hvpfast.kernels import sample_dots, sample_grads, sample_gram, tiles
from on_triton import DEVICE, PRECISIONS, poisoned, stated

from hvpfast import ops, testing

STATED = {"exact": "ieee", "bf16x6": "ieee", "outer": "ieee", "bf16x4": "bf16x3"}


def inputs(dtype=torch.float32, **sizes):
    return testing.make_inputs("sample_grads", **sizes, dtype=dtype, device=DEVICE)[0]


def of(product: str) -> torch.dtype:
    return torch.bfloat16 if product == "exact" else torch.float32


@pytest.mark.parametrize("key", sample_grads.TILES)
def test_grads_on_every_tile(key):
    product, tile = key.partition("-")[0], sample_grads.TILES[key]
    for t, i, o in ((64, tile.side, tile.side), (33, 65, 17), (3, 130, 63)):
        a, g = inputs(n=2, t=t, i=i, o=o, k=2, dtype=of(product))
        wide = poisoned(4, o, i + 3)
        sample_grads.launch(a, g, wide[:, :, :i], product, tile)
        testing.assert_accurate(wide[:, :, :i], ops.sample_grads, a, g, precision=STATED.get(product, product))
        assert wide[:, :, i:].isnan().all()


@pytest.mark.parametrize("key", sample_dots.TILES)
def test_dots_on_every_tile(key):
    product, tile = key.partition("-")[0], sample_dots.TILES[key]
    for rows, i, o in ((tile.side, 2 * tile.depth, tile.side), (65, 33, 17), (3, 17, 130)):
        a, g = inputs(n=rows, t=1, i=i, o=o, k=2, dtype=of(product))
        w = torch.randn(3, o, i, generator=torch.Generator().manual_seed(1)).to(a)
        dots = sample_dots.launch(a[:, 0], g[:, 0], w, product, tile).sum(0)
        testing.assert_accurate(dots, ops.sample_dots, a, g, w, precision=STATED.get(product, product))


@pytest.mark.parametrize("key", sample_gram.TILES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_pairs_on_every_tile(key, symmetric):
    product, tile = key.partition("-")[0], sample_gram.TILES[key]
    for m, t, m2, t2, i, o in ((64, 1, 64, 1, 64, 64), (9, 7, 3, 64, 65, 33), (2, 33, 70, 1, 33, 34)):
        a, g = inputs(n=m, t=t, i=i, o=o, k=2, dtype=of(product))
        a2, g2 = (a, g) if symmetric else inputs(n=m2, t=t2, i=i, o=o, dtype=of(product), seed=5)
        out = poisoned(len(g), len(g2))
        sample_gram.launch_pairs(a, g, a2, g2, out, symmetric, product, tile)
        testing.assert_accurate(out, ops.sample_gram, a, g, a2, g2, precision=STATED.get(product, product))
        assert not symmetric or torch.equal(out, out.T)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_a_range_at_a_time(dtype, precision, symmetric):
    a, g = inputs(n=2, t=20, i=17, o=9, k=2, dtype=dtype)
    a2, g2 = (a, g) if symmetric else inputs(n=3, t=5, i=17, o=9, dtype=dtype, seed=5)
    out = poisoned(len(g), len(g2))
    sample_gram.by_gradients(a, g, a2, g2, out, symmetric, precision, workspace=4 * 17 * 4)  # 4 features, 4, and 1
    testing.assert_accurate(out, ops.sample_gram, a, g, a2, g2, precision=stated(precision))


def test_dots_and_grams_with_other_samples_through_their_ops():
    """What the op tests' one recipe leaves out: one direction, and a second set of samples."""
    a, g = inputs(n=5, t=3, i=40, o=33, k=2)
    a2, g2 = inputs(n=2, t=4, i=40, o=33, k=3, seed=5)
    w = torch.randn(33, 40, generator=torch.Generator().manual_seed(1)).to(a)
    testing.assert_accurate(ops.sample_dots.on("triton")(a, g, w), ops.sample_dots, a, g, w)
    result = ops.sample_gram.on("triton")(a, g, a2, g2)
    testing.assert_accurate(result, ops.sample_gram, a, g, a2, g2, precision="bf16x3")
    empty = ops.sample_gram.on("triton")(a, g, a2[:0], g2[:0])
    assert empty.shape == (10, 0)


def test_auto_is_full_float32_for_products_with_directions():
    a, g = inputs(n=64, t=1, i=65, o=33)
    w = torch.randn(33, 65, generator=torch.Generator().manual_seed(1)).to(a)
    testing.assert_accurate(
        sample_dots.sample_dots(a, g, w, precision="auto"), ops.sample_dots, a, g, w, precision="ieee"
    )


def test_they_say_what_they_cannot_do():
    a, g = inputs(n=3, t=4, i=4, o=3)
    w = g.new_zeros(3, 4)
    assert "shares memory" in sample_grads.supports(a, g, out=a[:, :3])
    assert "float64" in sample_dots.supports(a.double(), g.double(), w.double())
    assert "not yet measured" in sample_dots.worthwhile(a, g, w) and "not yet measured" in sample_gram.worthwhile(a, g)
    large = torch.empty(2048, 1, 4096, device="meta")
    assert "cuBLAS" in sample_gram.worthwhile(large, large, precision="ieee")
    assert sample_gram.worthwhile(large, large, precision="auto") is None
    assert tiles.product_of_few(torch.float32, "auto", 31) == "bf16x6"


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
def test_dots_keep_their_bound_where_the_sum_over_positions_cancels(precision):
    """A handful of sums of many products of either sign, smaller than the products' errors let one hope."""
    for seed in range(4):
        (a, g, w), _ = testing.make_inputs("sample_dots", n=3, t=40, i=70, o=66, device=DEVICE, seed=seed)
        result = sample_dots.sample_dots(a, g, w, precision=precision)
        testing.assert_accurate(result, ops.sample_dots, a, g, w, precision=precision)
