"""sample_grads' CPU kernel, tier by tier, against its reference."""

import math

import pytest
import tiers
import torch

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out, make_inputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, T, I, O, K): outer products, rows of whole lines and not; one and several blocks; slices of long sums; empties.
SIZES = (
    (1, 1, 1, 1, 1), (17, 1, 65, 3, 3), (3, 1, 64, 50, 2), (3, 17, 63, 65, 2), (1, 129, 33, 150, 1), (1, 600, 40, 50, 2),
    (2, 9, 100, 7, 3), (0, 4, 5, 3, 1), (4, 0, 5, 3, 1), (3, 2, 0, 4, 1), (3, 2, 4, 0, 2),
)  # fmt: skip


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_layouts(tier, dtype):
    with tiers.forced(tier):
        for n, t, i, o, k in SIZES:
            for layout in LAYOUTS:
                args, kwargs = make_inputs("sample_grads", n=n, t=t, i=i, o=o, k=k, dtype=dtype, layout=layout)
                kwargs["out"] = laid_out(kwargs["out"], layout)
                for mode in ("auto", "ieee"):  # float32 data are not split unless asked for
                    kwargs["out"].fill_(math.nan)
                    with precision(mode):
                        assert ops.sample_grads.on("cpu")(*args, **kwargs) is kwargs["out"]
                    assert_accurate(kwargs["out"], ops.sample_grads, *args)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_results_larger_than_the_caches(tier):
    """Written past the caches where every row is a whole number of lines, and as usual where not."""
    with tiers.forced(tier):
        for n, t, i, o in ((40, 1, 256, 260), (40, 1, 257, 260), (33, 9, 256, 260), (33, 9, 250, 260)):
            args, _ = make_inputs("sample_grads", n=n, t=t, i=i, o=o)
            room = torch.full((n, o, i + 16), math.nan)
            for out in (torch.full((n, o, i), math.nan), room[..., :i], room[..., 5 : 5 + i]):
                ops.sample_grads.on("cpu")(*args, out=out)
                assert_accurate(out, ops.sample_grads, *args)
            assert bool(room[..., -5:].isnan().all())


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("mode", ("ieee", "bf16x3"))
def test_inputs_larger_than_the_caches(tier, mode):
    """Packed inputs beyond L2 meet several panels of the gradients at a time: a result in place, gathered, and turned."""
    with tiers.forced(tier), precision(mode):
        for n, t, i, o, k in ((1, 1100, 1030, 135, 1), (1, 260, 4100, 90, 10)):
            args, _ = make_inputs("sample_grads", n=n, t=t, i=i, o=o, k=k)
            for out in (torch.full((n * k, o, i), math.nan), torch.full((n * k, i, o), math.nan).mT):
                ops.sample_grads.on("cpu")(*args, out=out)
                assert_accurate(out, ops.sample_grads, *args, precision=mode)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("mode", ("bf16x3", "bf16"))
def test_reduced_precisions(tier, mode):
    with tiers.forced(tier), precision(mode):
        for n, t, i, o, k in ((3, 40, 64, 96, 2), (2, 300, 33, 65, 1), (5, 1, 70, 40, 1)):
            args, _ = make_inputs("sample_grads", n=n, t=t, i=i, o=o, k=k)
            assert_accurate(ops.sample_grads.on("cpu")(*args), ops.sample_grads, *args, precision=mode)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan, 1e30))
@pytest.mark.parametrize("size", ((4, 1, 30, 20), (4, 40, 30, 20)))
def test_values_that_a_split_cannot_hold(tier, value, size):
    n, t, i, o = size
    args, _ = make_inputs("sample_grads", n=n, t=t, i=i, o=o)
    args[0][2, t // 2, 20] = value
    want = ops.sample_grads.reference(*args)
    with tiers.forced(tier):
        for mode in ("auto", "bf16x3", "bf16", "ieee"):
            with precision(mode):
                got = ops.sample_grads.on("cpu")(*args)
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-1, equal_nan=True)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_every_time_on_any_thread_count(tier):
    for n, t, i, o, k in ((1, 40, 100, 300, 1), (2, 70, 64, 200, 2), (5, 1, 300, 200, 3)):
        args, _ = make_inputs("sample_grads", n=n, t=t, i=i, o=o, k=k)
        with tiers.forced(tier):
            results = []
            for count in (1, 2, 3, 5):
                with tiers.threads(count):
                    results += [ops.sample_grads.on("cpu")(*args) for _ in range(2)]
            assert all(torch.equal(results[0], each) for each in results)


def test_a_result_inside_an_input_is_left_to_the_reference():
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    a = torch.zeros(4, 1, 3)
    assert "shares memory" in ops.sample_grads.why_not("cpu", a, torch.zeros(4, 1, 1), out=a)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("t", [1, 3])
def test_memory_that_is_new_and_memory_that_is_not(tier, t):
    """A large result in fresh pages, in pages that were written, and half of each."""
    with tiers.forced(tier):
        check_new_memory(t)


def check_new_memory(t):
    torch.manual_seed(0)
    a, g = torch.randn(5, t, 700), torch.randn(5, t, 1100)  # 15 MB
    truth = ops.sample_grads.reference(a.double(), g.double())
    for room in (torch.empty(5, 1100, 700), torch.zeros(5, 1100, 700), torch.empty(5, 1100, 700)):
        room[:, :3] = math.nan if room[0, 0, 0] == 0 else 1.0
        for out in (room, None, room):
            found = ops.sample_grads.on("cpu")(a, g, out=out)
            assert float((found - truth).norm() / truth.norm()) < 3e-7
