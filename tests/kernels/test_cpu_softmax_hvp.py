"""softmax_hvp's CPU kernel, tier by tier, against its reference."""

import math

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (rows, C, K): less than a vector, whole vectors, several runs of sums, none.
SIZES = ((1, 1, 1), (3, 2, 2), (5, 17, 1), (4, 64, 3), (2, 130, 1), (3, 4097, 2), (2, 9001, 1), (0, 4, 1), (3, 0, 1))


def draw(rows, classes, columns, dtype=torch.float32, spread=3.0, layout="contiguous"):
    generator = torch.Generator().manual_seed(classes)

    def one(*shape, factor=1.0):
        return laid_out((factor * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype), layout)

    return one(rows, classes, factor=spread), one(columns, rows, classes), one(rows)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_layouts_and_weights(tier, dtype):
    # In float64 the truth is the reference itself, whose v - p'v cancels as much as the kernel's.
    allowance = 32.0 if dtype is torch.float64 else 8.0
    with tiers.forced(tier):
        for size in SIZES:
            for layout in LAYOUTS:
                logits, v, weight = draw(*size, dtype=dtype, layout=layout)
                for kwargs in ({}, {"weight": weight}):
                    for vectors in (v, v[0]):
                        got = ops.softmax_hvp.on("cpu")(logits, vectors, **kwargs)
                        assert_accurate(got, ops.softmax_hvp, logits, vectors, allowance=allowance, **kwargs)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_exponential_over_its_whole_range(tier, dtype):
    """Against v = 1 at the top class alone, each element of the product is minus p of its class, times p of the top."""
    with tiers.forced(tier):
        logits = torch.linspace(0, -800, 20001, dtype=dtype)
        v = torch.zeros_like(logits)
        v[0] = 1
        got = ops.softmax_hvp.on("cpu")(logits, v)
        p = torch.softmax(logits.double(), 0)
        truth = (-p * p[0])[1:]
        tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
        assert bool(((got[1:].double() - truth).abs() <= 8 * eps * truth.abs() + 2 * tiny).all())


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_a_vocabulary_and_no_overflow(tier):
    with tiers.forced(tier):
        logits, v, weight = draw(2, 128 * 1024, 1)
        got = ops.softmax_hvp.on("cpu")(logits, v, weight=weight)
        assert_accurate(got, ops.softmax_hvp, logits, v, weight=weight)
        for spread in (100.0, 1e4, 1e30):
            logits, v, weight = draw(4, 33, 1, spread=spread)
            got = ops.softmax_hvp.on("cpu")(logits, v, weight=weight)
            want = ops.softmax_hvp.reference(logits, v, weight=weight)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("classes", (5, 100))
def test_non_finite_values_as_the_reference_has_them(tier, value, classes):
    with tiers.forced(tier):
        for where in ("logits", "v", "weight", "row"):
            for at in (0, classes // 2, classes - 1):
                logits, v, weight = draw(4, classes, 2)
                if where == "logits":
                    logits[1, at] = value
                elif where == "v":
                    v[1, 1, at] = value
                elif where == "weight":
                    weight[1] = value
                else:
                    logits[1] = value
                got = ops.softmax_hvp.on("cpu")(logits, v, weight=weight)
                want = ops.softmax_hvp.reference(logits, v, weight=weight)
                torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_on_any_thread_count_and_any_number_of_vectors(tier):
    with tiers.forced(tier):
        logits, v, weight = draw(70, 300, 3)
        whole = ops.softmax_hvp.on("cpu")(logits, v, weight=weight)
        for count in (1, 2, 5):
            with tiers.threads(count):
                assert torch.equal(whole, ops.softmax_hvp.on("cpu")(logits, v, weight=weight))
                assert torch.equal(whole[1], ops.softmax_hvp.on("cpu")(logits, v[1], weight=weight))
