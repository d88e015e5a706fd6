"""conv_gram: its reference against torch's own unfold, and its CPU kernel, tier by tier, against the reference."""

import math
import threading
import time

import pytest
import tiers
import torch
from hvpfast.kernels import native
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpfast import ops
from hvpfast.dispatch import precision
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (shape, kernel_size, options)
CASES = (
    ((3, 5, 7, 6), 3, {"padding": 1}),
    ((2, 17, 9, 8), 3, {"padding": "same", "ones_column": True}),
    ((40, 33, 6, 6), 3, {"padding": 1, "alpha": 0.5}),
    ((3, 4, 9, 10), (3, 2), {"stride": (2, 1), "padding": (1, 0), "ones_column": True}),
    ((2, 6, 11, 11), 5, {"padding": 2, "groups": 2, "ones_column": True}),
    ((2, 3, 15, 15), 7, {"stride": 2, "padding": 3}),
    ((2, 4, 8, 8), 4, {"padding": "same", "dilation": 2}),
    ((3, 4, 5, 5), 3, {"stride": 3, "padding": 4, "dilation": 3}),
    ((2, 8, 6, 6), 3, {"padding": 1, "groups": 8}),
    ((2, 3, 4, 4), 7, {"padding": 3}),
    ((4, 6, 20), 5, {"stride": 2, "padding": 2, "dilation": 2, "ones_column": True}),
    ((2, 3, 4, 5, 6), (2, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
    ((2, 20, 4, 4), 1, {"padding": "valid"}),
    ((1, 1, 1, 1), 1, {}),
    ((5, 7, 7, 7), 1, {"alpha": 0.5}),
    ((2, 3, 5, 23), 1, {"ones_column": True}),
    ((1, 100, 5, 4), 1, {"alpha": 0.5, "ones_column": True}),
    ((3, 97, 4, 5), 1, {"stride": 2, "padding": "valid"}),
    ((40, 34, 5, 4), 1, {"stride": (2, 1), "groups": 2, "ones_column": True}),
    ((3, 6, 9, 7), (3, 2), {"stride": (1, 2), "padding": 1, "groups": 2, "ones_column": True, "kfac_approx": "reduce"}),
    ((70, 40, 5), 3, {"padding": "same", "kfac_approx": "reduce"}),
)


def draw(shape, dtype, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype), layout)


def check(x, kernel_size, mode, **options):
    like = ops.conv_gram.reference(x, kernel_size, **options)
    held = torch.full_like(like, math.nan)
    if options.get("beta"):
        held = torch.randn(like.shape, dtype=like.dtype)
    out = held.clone()
    with precision(mode):
        assert ops.conv_gram.on("cpu")(x, kernel_size, out=out, **options) is out
    assert_accurate(out, ops.conv_gram, x, kernel_size, out=held, precision=mode, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_unfold(case):
    shape, kernel_size, options = case
    options = {name: value for name, value in options.items() if name not in ("groups", "ones_column", "alpha")}
    if "kfac_approx" in options:
        pytest.skip("a test of its own, below")
    if len(shape) != 4 or isinstance(options.get("padding"), str):
        pytest.skip("torch's unfold takes images and numbers")
    x = draw(shape, torch.float64)
    rows = torch.nn.functional.unfold(x, kernel_size, **options).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(ops.conv_gram.reference(x, kernel_size, **options), rows.T @ rows)


def test_the_reference_follows_the_layer_itself():
    x = draw((3, 4, 9, 8), torch.float64)
    for options in ({"padding": "same", "dilation": 2}, {"padding": 1, "stride": 2, "groups": 2}, {"padding": "valid"}):
        layer = torch.nn.Conv2d(4, 6, (4, 3), bias=True, dtype=torch.float64, **options)
        grads = torch.autograd.grad(layer(x).square().sum() / 2, layer.weight)[0]
        groups = options.get("groups", 1)
        factor = ops.conv_gram.reference(x, (4, 3), ones_column=True, **options).reshape(
            groups, -1, 4 // groups * 12 + 1
        )
        weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).reshape(groups, 6 // groups, -1)
        torch.testing.assert_close((weight @ factor)[..., :-1].reshape(grads.shape), grads)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases_and_layouts(tier, dtype):
    with tiers.forced(tier):
        for number, (shape, kernel_size, options) in enumerate(CASES):
            for layout in LAYOUTS if number % 3 == 0 else ("contiguous",):
                check(draw(shape, dtype, layout), kernel_size, "ieee", **options)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_reduced_precision_channels_last_and_any_out(tier):
    with tiers.forced(tier):
        x = draw((50, 40, 6, 5), torch.float32)
        for given_x in (x, x.to(memory_format=torch.channels_last)):
            for mode in ("bf16x3", "bf16"):
                check(given_x, 3, mode, padding=1, alpha=0.5, beta=2.0, ones_column=True)
                check(given_x, 3, mode, padding=1, stride=2)
        check(draw((70, 64, 5, 5), torch.bfloat16), 3, "ieee", padding=1)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_the_same_bits_every_time_on_any_thread_count(tier):
    x = draw((70, 20, 6, 6), torch.float32)
    with tiers.forced(tier):
        for count in (1, 2, 3):
            with tiers.threads(count):
                first = ops.conv_gram.on("cpu")(x, 3, padding=1)
                assert torch.equal(first, ops.conv_gram.on("cpu")(x, 3, padding=1))
                assert torch.equal(first, first.T)
                assert_accurate(first, ops.conv_gram, x, 3, padding=1, precision="bf16x3")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_geometry_to_1e_12(data):
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    axes = data.draw(st.integers(1, 3))
    size, kernel, stride, dilation, padding = (
        tuple(data.draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))
        for low, high in ((1, 7), (1, 4), (1, 4), (1, 3), (0, 4))
    )
    if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return
    groups = data.draw(st.integers(1, 2))
    x = draw((data.draw(st.integers(1, 4)), groups * data.draw(st.integers(1, 6)), *size), torch.float64)
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "ones_column": data.draw(st.booleans()),
    }
    options["kfac_approx"] = data.draw(st.sampled_from(("expand", "expand", "reduce")))
    want = ops.conv_gram.reference(x, kernel, **options)
    got = ops.conv_gram.on("cpu")(x, kernel, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "said"),
    (
        ({"kernel_size": 9}, "does not fit"),
        ({"kernel_size": (3, 3, 3)}, "2 of them"),
        ({"kernel_size": 3, "padding": "full"}, "'same', 'valid'"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, "needs stride 1"),
        ({"kernel_size": 3, "groups": 3}, "divide the channels"),
        ({"kernel_size": 3, "kfac_approx": "mean"}, "'expand' or 'reduce'"),
        ({"kernel_size": 3, "beta": 1.0}, "no out"),
        ({"kernel_size": 3, "out": torch.zeros(5, 5)}, "must be"),
    ),
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ops.conv_gram(torch.zeros(2, 4, 6, 6), **options)


def test_reduce_is_the_gram_of_mean_patches():
    x = draw((5, 4, 6, 6), torch.float64)
    rows = torch.nn.functional.unfold(x, 3, padding=1).mean(2)
    got = ops.conv_gram(x, 3, padding=1, kfac_approx="reduce")
    torch.testing.assert_close(got, rows.T @ rows)
    got = ops.conv_gram(x, 3, padding=1, kfac_approx="reduce", ones_column=True)
    torch.testing.assert_close(got[-1, :-1], rows.sum(0))


@pytest.mark.parametrize("mode", ("ieee", "bf16x3"))
@pytest.mark.parametrize(
    ("shape", "kernel_size", "options"),
    (
        ((1, 64, 512, 512), 3, {"padding": 1}),
        ((2, 3, 1024, 1024), 7, {"padding": 3, "stride": 2}),
        ((32, 64, 64, 64), 3, {"padding": 1}),
        ((1, 32, 400, 400), 5, {"padding": 2, "groups": 32}),
        ((2, 96, 16, 24, 24), 3, {"padding": 1}),
        ((1, 16, 200000), 9, {"padding": 4}),
        ((40, 256, 28, 28), 1, {}),
    ),
    ids=str,
)
def test_scratch_memory_is_at_most_twice_the_input(shape, kernel_size, options, mode):
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    x = torch.ones(shape)
    bytes_held = native._modules["cpu"].workspace_bytes
    before, taken = bytes_held(), []

    def run():  # a thread of its own begins without scratch memory
        with precision(mode):
            ops.conv_gram.on("cpu")(x, kernel_size, **options)
        taken.append(bytes_held() - before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    until = time.monotonic() + 10
    while bytes_held() != before and time.monotonic() < until:  # given back as the system's thread ends, after `join`
        time.sleep(1e-3)
    assert bytes_held() == before
    assert 0 < taken[0] <= 2 * x.numel() * x.element_size()


@pytest.mark.parametrize(("channels", "kernel_size", "form"), ((4, 3, 2), (16, 2, 1), (3, 1, 3), (3, 1, 0)))
def test_more_than_two_to_the_31_values(channels, kernel_size, form, monkeypatch):
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    monkeypatch.setattr(native, "_cpu_conv_form", form)
    one = torch.zeros(1, channels, 4096)  # few values that are not zero: the sums stay exact in float32
    generator = torch.Generator().manual_seed(0)
    for ends in (slice(0, 24), slice(-24, None)):
        one[..., ends] = torch.randint(-1, 2, (1, channels, 24), generator=generator).float()
    count = 2**31 // one.numel() + 1
    want = count * ops.conv_gram.reference(one, kernel_size, padding=kernel_size // 2)
    with precision("ieee"):
        got = ops.conv_gram.on("cpu")(one.expand(count, -1, -1), kernel_size, padding=kernel_size // 2)
    assert torch.equal(got, want)


def test_values_more_than_two_to_the_31_apart():
    if tiers.WHY_NONE is not None:
        pytest.skip(tiers.WHY_NONE)
    try:
        memory = torch.empty(2**31 + 4096)  # 8 GB of addresses, of which only the pages that are written become memory
    except RuntimeError as error:
        pytest.skip(f"no such address space here: {error}")
    x = memory.as_strided((2, 17, 6, 6), (2**31, 36, 6, 1)).copy_(draw((2, 17, 6, 6), torch.float32))
    for kernel_size, options in ((3, {"padding": 1}), (3, {"stride": 2}), (3, {"groups": 17, "padding": 1}), (1, {})):
        check(x, kernel_size, "ieee", **options)
