"""The CPU kernels of layers' linear maps, on AMX: against their references, over every geometry; their transposes as adjoints."""

import pytest
import tiers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvpfast import ops
from hvpfast.dispatch import BackendError, backend, precision
from hvpfast.testing import LAYOUTS, assert_accurate, laid_out

pytestmark = pytest.mark.skipif(tiers.WHY_NONE is not None, reason=str(tiers.WHY_NONE))
SIZE = st.integers(1, 70) | st.sampled_from([96, 127, 129, 200])


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    SIZE,
    st.integers(32, 100) | st.sampled_from([1023, 1025, 2100]),
    SIZE,
    st.booleans(),
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
)
def test_products(rows, deep, columns, shifted, layout, threads):
    assume(rows * columns >= 64)  # the bound is one in the mean
    x, w = laid_out(values(rows, deep), layout), laid_out(values(columns, deep, seed=1), layout).T
    bias = values(columns, seed=2) if shifted else None
    with tiers.forced("amx"), tiers.threads(threads):
        found = ops.matmul.on("cpu")(x, w, bias=bias)
        assert_accurate(found, ops.matmul, x, w, bias=bias, precision="bf16x3")
        if columns >= 32:
            again = ops.matmul.on("cpu")(laid_out(found, layout), w.T)
            assert_accurate(again, ops.matmul, found, w.T, precision="bf16x3")


def test_many_columns_and_long_sums():
    """More columns than are packed at a time, and more of both than one slice or one block of rows."""
    x, w = values(70, 1100), values(1100, 8300, seed=1)
    with tiers.forced("amx"), tiers.threads(2):
        assert_accurate(ops.matmul.on("cpu")(x, w), ops.matmul, x, w, precision="bf16x3")


AXIS = st.tuples(
    st.sampled_from([1, 2, 4, 7, 8, 15, 16, 17, 32, 33]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
)  # size, kernel, stride, padding, dilation


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(1, 5), st.sampled_from([1, 3, 16, 31, 33, 70]), st.sampled_from([1, 5, 32, 33, 65]),
    st.lists(AXIS, min_size=1, max_size=2), st.booleans(), st.integers(1, 3), st.sampled_from(["contiguous", "offset"]),
)  # fmt: skip
def test_convolutions_and_their_transposes(n, channels, features, axes, shifted, threads, layout):
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    dilation = tuple(1 if s > 1 else d for s, d in zip(stride, dilation, strict=True))
    size = tuple(max(m, d * (k - 1) + 1 - 2 * p) for m, k, p, d in zip(size, kernel, padding, dilation, strict=True))
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    x, w = laid_out(values(n, channels, *size), layout), values(features, channels, *kernel, seed=1)
    bias = values(features, seed=2) if shifted else None
    truth = ops.convolve.reference(x.double(), w.double(), **how)
    g = laid_out(values(*truth.shape, seed=3), layout)
    taps = w.shape[2:].numel()
    assume(
        truth.numel() >= 64
        and x.numel() >= 64
        and float(truth.abs().max()) > 0
        and min(channels, features) * taps >= 32
    )
    with tiers.forced("amx"), tiers.threads(threads):
        found = ops.convolve.on("cpu")(x, w, bias=bias, **how)
        back = ops.convolve.on("cpu")(g, w, size=size, **how)
    assert_accurate(found, ops.convolve, x, w, bias=bias, precision="bf16x3", **how)
    assert_accurate(back, ops.convolve, g, w, size=size, precision="bf16x3", **how)
    adjoint = (x.double() * ops.convolve.reference(g.double(), w.double(), size=size, **how)).sum()
    assert torch.isclose((truth * g).sum(), adjoint, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("side", [(130, 96), (97, 131)])  # rows that tiles lie in, and rows that follow without a gap
@pytest.mark.parametrize("n", [1, 3])
def test_images_in_bands_and_fewer_than_threads(side, n):
    x, w = values(n, 40, *side), values(70, 40, 3, 3, seed=1)
    with tiers.forced("amx"), tiers.threads(2):
        found = ops.convolve.on("cpu")(x, w, padding=1)
        back = ops.convolve.on("cpu")(found, w, padding=1, size=side)
    assert_accurate(found, ops.convolve, x, w, padding=1, precision="bf16x3")
    assert_accurate(back, ops.convolve, found, w, padding=1, size=side, precision="bf16x3")


def test_strides_and_dilations_of_a_transpose_go_apart():
    x, w = values(2, 32, 9, 9), values(32, 32, 3, 3)
    with tiers.forced("amx"):
        with pytest.raises(BackendError, match="transpose of a dilated convolution with a stride"):
            ops.convolve.on("cpu")(x, w, stride=2, dilation=2, padding=2, size=(17, 17))
        mixed = ops.convolve(x, w, stride=2, dilation=2, padding=2, size=(17, 17))
    assert_accurate(mixed, ops.convolve, x, w, stride=2, dilation=2, padding=2, size=(17, 17))


@pytest.mark.parametrize("scale", [1e30, 1e-35, float("inf"), float("nan")])
def test_what_bf16_does_not_hold_is_torch_s(scale):
    x, w, image, kernel = scale * values(40, 40), values(40, 40), scale * values(2, 32, 9, 9), values(32, 32, 3, 3)
    with tiers.forced("amx"):
        assert torch.equal(ops.matmul.on("cpu")(x, w).nan_to_num(), (x @ w).nan_to_num())
        found = ops.convolve.on("cpu")(image, kernel, padding=1)
        back = ops.convolve.on("cpu")(image, kernel, padding=1, size=(9, 9))
    assert torch.equal(found.nan_to_num(), torch.conv2d(image, kernel, padding=1).nan_to_num())
    truth = ops.convolve.reference(image, kernel, padding=1, size=(9, 9))
    assert torch.allclose(back, truth, rtol=1e-5, atol=1e-5 * float(truth.nan_to_num().abs().max()), equal_nan=True)


def test_nothing_to_add_up():
    with tiers.forced("amx"):
        assert torch.equal(ops.matmul.on("cpu")(values(3, 0), values(0, 2), bias=torch.ones(2)), torch.ones(3, 2))
        assert ops.convolve.on("cpu")(values(0, 5, 5, 5), values(4, 5, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("tier", ("portable", "avx2", "avx512"))
def test_other_tiers_and_full_precision_leave_it_to_torch(tier):
    x, w = values(300, 64), values(64, 64)
    with tiers.forced(tier):
        assert "needs AMX" in ops.matmul.why_not("cpu", x, w)
        assert "needs AMX" in ops.convolve.why_not("cpu", values(8, 32, 16, 16), values(32, 32, 3, 3))
        assert torch.equal(ops.matmul(x, w), x @ w)
    with tiers.forced("amx"), precision("ieee"):
        assert torch.equal(ops.matmul(x, w), x @ w)
        with backend("cpu"), pytest.raises(BackendError, match="precision is 'ieee'"):
            ops.matmul(x, w)
