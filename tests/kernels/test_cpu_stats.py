"""The CPU kernel of norm layers' statistics, tier by tier, in every layout that it takes."""

import pytest
import tiers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpfast import ops
from hvpfast.testing import assert_accurate

pytestmark = pytest.mark.skipif(tiers.WHY_NONE is not None, reason=str(tiers.WHY_NONE))
GIVEN = {
    "position": lambda n, t, i: (n, t, 1),
    "feature": lambda n, t, i: (n, 1, i),
    "layer": lambda n, t, i: (1, 1, i),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 3, 130, 300]), st.sampled_from([1, 3, 17, 65, 100]), st.integers(1, 2)),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["layer", "rms", None, *GIVEN]),
    st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
@pytest.mark.parametrize("tier", tiers.TIERS)
def test_against_the_reference(tier, shape, dtype, how, channels, threads):
    n, t, i, k = shape
    generator = torch.Generator().manual_seed(t + i)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, g = ((draw(m, i, t).to(dtype).mT if channels else draw(m, t, i).to(dtype)) for m in (n, k * n))
    options = {"kind": how, "eps": 1e-3}
    if how in GIVEN:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        options = {"mean": draw(*GIVEN[how](*x.shape)).to(wide), "rstd": draw(*GIVEN[how](*x.shape)).to(wide)}
    allowance = 32.0 if dtype is torch.float64 else 8.0  # in float64 the truth is the reference itself
    with tiers.forced(tier), tiers.threads(threads):
        if ops.norm_sample_stats.why_not("cpu", x, g, **options) is not None:
            assert how in GIVEN  # a value for each position of channels-first data, or the other way round
            return
        found = ops.norm_sample_stats.on("cpu")(x, g, **options)
        assert_accurate(found, ops.norm_sample_stats, x, g, allowance=allowance, **options)
        again = ops.norm_sample_stats.on("cpu")(x, g, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_layouts_that_it_takes():
    x = torch.zeros(2, 5, 3)
    for y, one, taken in (
        (x, torch.zeros(2, 5, 1), True), (x, torch.zeros(2, 1, 3), False), (x, torch.zeros(1, 1, 1), True),
        (x.mT.contiguous().mT, torch.zeros(2, 5, 1), False), (x.mT.contiguous().mT, torch.zeros(1, 1, 3), True),
    ):  # fmt: skip
        reason = ops.norm_sample_stats.why_not("cpu", y, y, rstd=one)
        assert (reason is None) == taken, (y.stride(), one.shape)
        assert taken or "one value for all of it" in reason
