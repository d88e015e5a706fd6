"""The CPU kernels of double backward passes, tier by tier, against their references."""

import math

import pytest
import tiers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpfast import ops
from hvpfast.ops.rop import ACTIVATIONS
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out, make_inputs

pytestmark = pytest.mark.skipif(tiers.WHY_NONE is not None, reason=str(tiers.WHY_NONE))
NARROW = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 70) | st.sampled_from([1023, 1025, 3000, 40_000]),
    st.sampled_from(NARROW),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(["gx", "g", "x"]),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
)
@pytest.mark.parametrize("tier", tiers.TIERS)
def test_activations(tier, count, dtype, activation, of, layout, threads):
    generator = torch.Generator().manual_seed(count)
    given = [laid_out((3 * torch.randn(2, count, generator=generator)).to(dtype), layout) for _ in range(3)]
    with tiers.forced(tier), tiers.threads(threads):
        found = ops.activation_rop.on("cpu")(*given, activation=activation, of=of)
    assert len(found) == len(of)
    assert_accurate(found, ops.activation_rop, *given, activation=activation, of=of)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_value_by_value(tier, activation):
    """Over the whole range: each within a few units in the last place of 1, the largest of the terms that it is summed from."""
    x = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([-3e38, -1e10, -104.0, -0.0, 104.0, 1e10, 3e38])])
    one = torch.ones_like(x)
    with tiers.forced(tier):
        found = ops.activation_rop.on("cpu")(x, one, one, activation=activation)
    for got, truth in zip(
        found, ops.activation_rop.reference(*(y.double() for y in (x, one, one)), activation=activation), strict=True
    ):
        assert float((got.double() - truth).abs().max()) < 6e-7


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_what_is_not_a_number_stays_so(tier, value):
    with tiers.forced(tier):
        for activation in ACTIVATIONS:
            for at in (0, 7, 36):
                x, g, c = torch.randn(3, 37)
                x[at] = value
                for y in ops.activation_rop.on("cpu")(x, g, c, activation=activation):
                    assert (~y.isfinite()).nonzero().flatten().tolist() == [at]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 9) | st.sampled_from([130, 300]),
    st.integers(1, 40) | st.sampled_from([100, 257, 4099]),
    st.sampled_from([torch.float64, *NARROW]),
    st.sampled_from(["gxw", "gx", "gw", "g", "x", "w"]),
    st.sets(st.sampled_from(["c", "mean", "weight", "c_weight", "c_bias"])),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
)
@pytest.mark.parametrize("tier", tiers.TIERS)
def test_norms(tier, rows, features, dtype, of, absent, layout, threads):
    if absent >= {"c", "c_weight", "c_bias"}:
        absent = absent - {"c_weight"}
    if "weight" in absent:
        of = of.replace("w", "") or "g"
    args, kwargs = make_inputs("norm_rop", n=rows, i=features, dtype=dtype, layout=layout, seed=rows)
    kwargs |= dict.fromkeys(absent)
    with tiers.forced(tier), tiers.threads(threads):
        found = ops.norm_rop.on("cpu")(*args, **kwargs, of=of)
    assert len(found) == len(of)
    # In float64 the truth is the reference itself, which projects with as many roundings.
    assert_accurate(found, ops.norm_rop, *args, **kwargs, of=of, allowance=64.0 if dtype is torch.float64 else 8.0)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_a_far_mean_and_a_tiny_variance(tier):
    """z is what it is in torch; nothing of the mean's size enters the sums."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(6, 200, generator=generator) / 10
    (g, c), w = torch.randn(2, 6, 200, generator=generator), torch.randn(200, generator=generator)
    mean, rstd = x.mean(1), (x.var(1, correction=0) + 1e-5).rsqrt()
    with tiers.forced(tier):
        found = ops.norm_rop.on("cpu")(x, g, rstd, mean=mean, weight=w, c=c)
    assert_accurate(found, ops.norm_rop, x, g, rstd, mean=mean, weight=w, c=c)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_rows_are_the_same_bits_on_any_thread_count(tier):
    args, kwargs = make_inputs("norm_rop", n=90, i=300)
    with tiers.forced(tier):
        whole = ops.norm_rop.on("cpu")(*args, **kwargs)
        for count in (1, 2, 5):
            with tiers.threads(count):
                of_g, of_x, of_w = ops.norm_rop.on("cpu")(*args, **kwargs)
                assert torch.equal(of_g, whole[0]) and torch.equal(of_x, whole[1])
                assert torch.equal(of_w, ops.norm_rop.on("cpu")(*args, **kwargs)[2])
