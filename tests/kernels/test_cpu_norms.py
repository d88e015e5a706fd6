"""sample_norms_squared's CPU kernel, tier by tier, against its reference."""

import math

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, make_inputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, T, I, O, K): one position; the direct route; the Gram route; slices of long sums; more threads than samples; rows without
# packing, also more features than one run; long samples of few features, unpacked.
SIZES = (
    (1, 1, 1, 1, 1), (17, 1, 65, 3, 3), (3, 17, 63, 65, 2), (5, 65, 33, 10, 3), (2, 129, 127, 64, 1), (1, 300, 40, 50, 1),
    (1, 270, 20, 30, 3), (2, 9, 300, 270, 2), (0, 4, 5, 3, 1), (4, 0, 5, 3, 1), (3, 2, 0, 4, 1), (3, 2, 4, 0, 2),
    (5, 7, 33, 18, 2), (3, 16, 64, 48, 1), (2, 5, 4100, 70, 3), (3, 300, 27, 50, 2), (2, 130, 96, 95, 1), (3, 128, 1, 3, 1),
)  # fmt: skip


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_layouts(tier, dtype):
    with tiers.forced(tier):
        for n, t, i, o, k in SIZES:
            for layout in LAYOUTS:
                args, _ = make_inputs("sample_norms_squared", n=n, t=t, i=i, o=o, k=k, dtype=dtype, layout=layout)
                for mode in ("ieee", "auto"):
                    with precision(mode):
                        got = ops.sample_norms_squared.on("cpu")(*args)
                    bound = "ieee" if mode == "ieee" else "bf16x3"
                    assert_accurate(got, ops.sample_norms_squared, *args, precision=bound)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("mode", ("bf16x3", "bf16"))
def test_reduced_precisions(tier, mode):
    with tiers.forced(tier), precision(mode):
        for n, t, i, o, k in ((3, 40, 64, 96, 2), (2, 200, 33, 65, 1), (2, 33, 300, 290, 1)):
            args, _ = make_inputs("sample_norms_squared", n=n, t=t, i=i, o=o, k=k)
            got = ops.sample_norms_squared.on("cpu")(*args)
            assert_accurate(got, ops.sample_norms_squared, *args, precision=mode)


@pytest.mark.parametrize(
    "size", ((8, 40, 256, 320, 1), (4, 64, 900, 300, 3), (2, 96, 1500, 700, 1), (2, 200, 900, 700, 1))
)
def test_what_a_split_leaves_out_of_the_diagonals_is_added(size):
    """lo lo' has one sign on the diagonals of a a' and g g': without it the error is near 6e-6, in every sample."""
    n, t, i, o, k = size
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(n, t, i, generator=generator), torch.randn(k * n, t, o, generator=generator)
    truth = ops.sample_norms_squared.reference(a.double(), g.double())
    with tiers.forced("amx"), precision("bf16x3"):
        found = ops.sample_norms_squared.on("cpu")(a, g)
    assert float((found / truth - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.inf, math.nan, 1e30))
@pytest.mark.parametrize("size", ((4, 1, 30, 20), (4, 40, 30, 20), (4, 6, 300, 200), (4, 200, 30, 70)))
def test_values_that_a_split_cannot_hold(tier, value, size):
    n, t, i, o = size
    args, _ = make_inputs("sample_norms_squared", n=n, t=t, i=i, o=o)
    args[0][2, t // 2, 20] = value
    want = ops.sample_norms_squared.reference(*args)
    with tiers.forced(tier):
        for mode in ("auto", "bf16x3", "bf16", "ieee"):
            with precision(mode):
                got = ops.sample_norms_squared.on("cpu")(*args)
            sound = torch.tensor([0, 1, 3])
            torch.testing.assert_close(got[sound], want[sound], rtol=1e-2, atol=0)
            assert math.isfinite(got[2]) == math.isfinite(want[2])
            assert not (math.isnan(value) and not math.isnan(got[2]))


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_every_time(tier):
    args, _ = make_inputs("sample_norms_squared", n=5, t=70, i=64, o=40, k=2)
    with tiers.forced(tier):
        for count in (1, 2, 3):
            with tiers.threads(count):
                first = ops.sample_norms_squared.on("cpu")(*args)
                assert all(torch.equal(first, ops.sample_norms_squared.on("cpu")(*args)) for _ in range(3))
                assert_accurate(first, ops.sample_norms_squared, *args, precision="bf16x3")


def test_more_than_two_to_the_31_values():
    a = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(0)).expand((1 << 21) + 3, 1, 1024)
    g = torch.ones(a.shape[0], 1, 1)
    g[-1] = 3
    found = ops.sample_norms_squared.on("cpu")(a, g)
    truth = a[0].double().square().sum() * g[:, 0, 0].double().square()
    assert float((found - truth).abs().max()) <= 1e-6 * float(truth.max())
