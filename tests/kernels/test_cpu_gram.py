"""gram's CPU kernel, tier by tier, against its reference."""

import math

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One panel and less, its edges, several panels, several blocks of rows, more features than rows.
SHAPES = (
    (1, 1),
    (3, 17),
    (17, 3),
    (63, 65),
    (129, 63),
    (300, 33),
    (127, 129),
    (1100, 50),
    (40, 300),
    (1, 130),
    (600, 7),
    (33, 120),
)


def draw(shape, dtype, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[..., : shape[-1] // 2].clamp_(min=0)
    return laid_out(x.to(dtype), layout)


def check(x, mode, **kwargs):
    width = x.shape[-1] + kwargs.get("ones_column", False)
    held = torch.full((width, width), math.nan, dtype=ops.accumulate_dtype(x.dtype))
    if kwargs.get("beta"):
        held = torch.randn(width, width, dtype=held.dtype)
    out = held.clone()
    with precision(mode):
        assert ops.gram.on("cpu")(x, out=out, **kwargs) is out
    assert_accurate(out, ops.gram, x, out=held, precision=mode, **kwargs)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_layouts(tier, dtype):
    with tiers.forced(tier):
        for shape in SHAPES:
            for layout in LAYOUTS:
                check(draw(shape, dtype, layout), "ieee", ones_column=shape[0] % 2 == 1, alpha=0.5)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("mode", ("ieee", "bf16x3", "bf16"))
def test_precisions_and_any_out(tier, mode):
    with tiers.forced(tier):
        for shape in ((40, 7), (65, 127), (513, 64)):
            for ones in (False, True):
                check(draw(shape, torch.float32), mode, ones_column=ones, alpha=-0.5, beta=2.0)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_many_features_share_the_triangle(tier):
    with tiers.forced(tier), tiers.threads(2):
        check(draw((70, 1601), torch.float32), "bf16x3")
        check(draw((530, 1540), torch.bfloat16, "transposed"), "ieee", ones_column=True, beta=0.5)
        check(draw((2700, 1540), torch.float32), "ieee")  # packed in two passes


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_leading_axes_of_every_stride(tier):
    with tiers.forced(tier):
        image = draw((3, 4, 5, 6), torch.float32)
        for x in (
            image,
            image.permute(0, 2, 3, 1),
            image[:, ::2],
            image.permute(3, 1, 2, 0),
            image[0, 0, 0],
            image[:, :1],
        ):
            check(x, "ieee")
        check(image[:0], "ieee", ones_column=True, beta=0.5)
        check(image[..., :0], "ieee", ones_column=True)
        check(image[..., :0], "ieee")


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_a_strided_out_is_written_in_place_and_nothing_beside_it(tier):
    with tiers.forced(tier):
        x = draw((50, 37), torch.float32)
        wide = torch.full((74, 40), 7.0)
        for out in (wide[::2, 1:38], wide[:37, :37].T):
            wide.fill_(7.0)
            ops.gram.on("cpu")(x, out=out)
            assert_accurate(out.contiguous(), ops.gram, x, precision="bf16x3")
            out.fill_(7.0)
            assert bool((wide == 7).all())


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan, 3e38, 1e-30))
def test_values_that_a_split_cannot_hold(tier, value):
    x = draw((100, 70), torch.float32)
    x[41, 30] = value
    if value == 1e-30:
        x = x * value
    want = ops.gram.reference(x)
    with tiers.forced(tier):
        for mode in ("auto", "bf16x3", "bf16"):
            with precision(mode):
                got = ops.gram.on("cpu")(x)
            torch.testing.assert_close(got.isnan(), want.isnan())
            torch.testing.assert_close(got.isinf(), want.isinf())
            torch.testing.assert_close(got[31:, 31:], want[31:, 31:], rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_every_time_and_any_thread_count_accurate(tier):
    x = draw((4000, 96), torch.float32)
    with tiers.forced(tier):
        for count in (1, 2, 3):
            with tiers.threads(count):
                first = ops.gram.on("cpu")(x)
                assert all(torch.equal(first, ops.gram.on("cpu")(x)) for _ in range(3))
                assert torch.equal(first, first.T)
                assert_accurate(first, ops.gram, x, precision="bf16x3")


def test_long_sums_stay_accurate():
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    for dtype in (torch.float32, torch.bfloat16):
        check(draw((50000, 33), dtype), "ieee")
        check(draw((50000, 33), dtype), "bf16x3")


def test_more_than_two_to_the_31_values():
    """One row of +-1, expanded: nothing is stored, and the sums are whole numbers."""
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).sign()
    rows = (1 << 26) + 32
    with tiers.threads(2):
        found = ops.gram.on("cpu")(row.expand(rows, 32))
    assert torch.equal(found, rows * row.T @ row)
