"""second_moment's CPU kernel, tier by tier, against its reference."""

import math

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, make_inputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, T, I, O, K): T = 1 in one and several slices; blocks; slices of long sums; more output than one part; empties; long
# samples of few features, unpacked.
SIZES = (
    (1, 1, 1, 1, 1), (17, 1, 65, 3, 3), (300, 1, 40, 50, 2), (3, 17, 63, 65, 2), (2, 129, 33, 64, 1), (1, 300, 40, 50, 2),
    (3, 9, 300, 270, 2), (0, 4, 5, 3, 1), (4, 0, 5, 3, 1), (3, 2, 0, 4, 1), (3, 2, 4, 0, 2),
    (3, 300, 27, 50, 2), (5, 130, 96, 95, 1), (1, 128, 1, 3, 1),
)  # fmt: skip


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_layouts(tier, dtype):
    with tiers.forced(tier):
        for n, t, i, o, k in SIZES:
            for layout in LAYOUTS:
                args, kwargs = make_inputs("second_moment", n=n, t=t, i=i, o=o, k=k, dtype=dtype, layout=layout)
                for mode in ("ieee", "auto"):
                    kwargs["out"].fill_(math.nan)
                    with precision(mode):
                        got = ops.second_moment.on("cpu")(*args, **kwargs)
                    assert got is kwargs["out"]
                    bound = "ieee" if mode == "ieee" else "bf16x3"
                    assert_accurate(got, ops.second_moment, *args, precision=bound)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.inf, math.nan, 1e30))
@pytest.mark.parametrize("size", ((40, 1, 30, 20), (4, 40, 30, 20), (3, 200, 30, 70)))
def test_values_that_a_split_cannot_hold(tier, value, size):
    n, t, i, o = size
    args, _ = make_inputs("second_moment", n=n, t=t, i=i, o=o)
    args[0][2, t // 2, 20] = value
    want = ops.second_moment.reference(*args)
    with tiers.forced(tier):
        for mode in ("auto", "bf16x3", "bf16", "ieee"):
            with precision(mode):
                got = ops.second_moment.on("cpu")(*args)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_every_time_on_any_thread_count(tier):
    for n, t, i, o in ((9, 40, 600, 500), (700, 1, 100, 300), (7, 33, 64, 40)):
        args, _ = make_inputs("second_moment", n=n, t=t, i=i, o=o)
        with tiers.forced(tier):
            for count in (1, 2, 3):
                with tiers.threads(count):
                    first = ops.second_moment.on("cpu")(*args)
                    assert torch.equal(first, ops.second_moment.on("cpu")(*args))
                    assert_accurate(first, ops.second_moment, *args, precision="bf16x3")


def test_more_than_two_to_the_31_values():
    """Offsets beyond 32 bits, in the inputs of one position and of several (the expanded axis costs no memory)."""
    for t, i in ((1, 1024), (2, 512)):
        row = torch.randn(1, t, i, generator=torch.Generator().manual_seed(0))
        a = row.expand((1 << 21) + 3, t, i)
        g = torch.ones(a.shape[0], t, 1)
        g[-1] = 3
        found = ops.second_moment.on("cpu")(a, g)
        truth = row.double().sum(1).square() * (a.shape[0] - 1 + 9)
        assert float((found.double() - truth).abs().max()) <= 1e-4 * float(truth.max())


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("size", ((5000, 2, 40, 30), (700, 130, 30, 20)))
def test_long_sums_do_not_stand_still(tier, size):
    """Equal samples: naive float32 sums of many drift in one direction. Blocks, and long samples of few features."""
    n, t, i, o = size
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(1, t, i, generator=generator), torch.randn(1, t, o, generator=generator)
    truth = n * ops.second_moment.reference(a.double(), g.double())
    with tiers.forced(tier), precision("ieee"):
        found = ops.second_moment.on("cpu")(a.expand(n, t, i), g.expand(n, t, o))
    assert float((found - truth).norm() / truth.norm()) < 5e-6
